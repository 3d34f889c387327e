"""Reporting what was found: figures, and one self-contained page."""

from lape_fast.report.dynamics import training_dynamics
from lape_fast.report.figures import (
    ablation_heatmap,
    figure_svg,
    language_change,
    language_label,
    learning_curve,
    neurons_by_layer,
    neurons_per_language,
    save_figure,
)
from lape_fast.report.page import Picture, Section, Table, render_report
from lape_fast.report.study_report import report_study, summary_table

__all__ = [
    "Picture",
    "Section",
    "Table",
    "ablation_heatmap",
    "figure_svg",
    "language_change",
    "language_label",
    "learning_curve",
    "neurons_by_layer",
    "neurons_per_language",
    "render_report",
    "report_study",
    "save_figure",
    "summary_table",
    "training_dynamics",
]
