"""Reporting what was found: figures, and one self-contained page."""

from lape_fast.report.analyses import alignment_curves, steered_languages, weight_change_map
from lape_fast.report.atlas import render_atlas
from lape_fast.report.canvas import figure_paths, figure_svg, save_figure
from lape_fast.report.dynamics import training_dynamics
from lape_fast.report.figures import (
    ablation_heatmap,
    language_change,
    language_label,
    learning_curve,
    neurons_by_layer,
    neurons_per_language,
)
from lape_fast.report.page import Picture, Section, Table, render_report
from lape_fast.report.study_report import report_study, summary_table
from lape_fast.report.tuning_report import report_tuning

__all__ = [
    "Picture",
    "Section",
    "Table",
    "ablation_heatmap",
    "alignment_curves",
    "figure_paths",
    "figure_svg",
    "language_change",
    "language_label",
    "learning_curve",
    "neurons_by_layer",
    "neurons_per_language",
    "render_atlas",
    "render_report",
    "report_study",
    "report_tuning",
    "save_figure",
    "steered_languages",
    "summary_table",
    "training_dynamics",
    "weight_change_map",
]
