"""Figures: everything in the data is drawn, named, inside the picture, and the same every time."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy
import pytest
import torch

from lape_fast.errors import LanguageError, ShapeError, TrainingError
from lape_fast.identify.neurons import NeuronSet
from lape_fast.report import (
    ablation_heatmap,
    alignment_curves,
    figure_svg,
    language_change,
    language_label,
    learning_curve,
    neurons_by_layer,
    neurons_per_language,
    save_figure,
    steered_languages,
    training_dynamics,
    weight_change_map,
)
from lape_fast.report.canvas import house_style
from tests.report.samples import (
    LAYERS,
    ablation_matrix,
    alignment,
    codes,
    dynamics_records,
    matrix_of,
    neuron_set,
    scores,
    steering,
    training_log,
    weight_change,
)

SIZES = (1, 24, 123)
HOSTILE = '<script>alert("$x^$")</script>\n&\x00_Latn'


def _change(number):
    before, after = scores(number)
    return language_change(before, after, codes(1)[0])


FIGURES = {
    "neurons_by_layer": lambda number: neurons_by_layer(neuron_set(number)),
    "neurons_per_language": lambda number: neurons_per_language(neuron_set(number)),
    "ablation_heatmap": lambda number: ablation_heatmap(ablation_matrix(number, number)),
    "language_change": _change,
    "learning_curve": lambda number: learning_curve(training_log(), f"Tuning {number} neurons"),
    "alignment_curves": lambda number: alignment_curves(alignment(number)),
    "weight_change_map": lambda number: weight_change_map(weight_change(number)),
    "steered_languages": lambda number: steered_languages(steering(number)),
    "training_dynamics": lambda number: training_dynamics(dynamics_records(number), "Maltese: lora", codes(1)[0]),
}


def _words(figure) -> str:
    """All text of a figure as it is written into a page."""
    return "\n".join(ElementTree.fromstring(figure_svg(figure)).itertext())


def _bars(figure) -> list[list[float]]:
    """The lengths of the bars, from the top, for every group of bars."""
    return [[bar.get_width() for bar in group] for group in figure.axes[0].containers]


def _row_names(figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def _column_names(figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


@pytest.mark.parametrize("number", SIZES)
def test_neurons_by_layer_draws_every_cell(number):
    neurons = neuron_set(number)
    figure = neurons_by_layer(neurons)
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.shape == (number, LAYERS)
    names = _row_names(figure)
    assert names == sorted(language_label(code) for code in neurons.languages)
    for code in neurons.languages:
        row = drawn[names.index(language_label(code))].filled(0)
        assert row.tolist() == [len(layer) for layer in neurons[code]]


def test_counts_are_written_into_the_cells_of_a_small_map():
    neurons = neuron_set(24)
    written = [text.get_text() for text in neurons_by_layer(neurons).axes[0].texts]
    counts = [str(len(layer)) for code in neurons.languages for layer in neurons[code] if len(layer)]
    assert sorted(text for text in written if text.isdigit()) == sorted(counts)


def test_a_set_without_any_neuron_is_still_drawn(tmp_path):
    empty = NeuronSet.from_lists({"mlt_Latn": [[], []]}, neurons_per_layer=8)
    for draw in (neurons_by_layer, neurons_per_language):
        save_figure(draw(empty), tmp_path / "empty.png", "Nothing.")
        assert "Maltese" in _words(draw(empty))


@pytest.mark.parametrize("number", SIZES)
def test_neurons_per_language_draws_one_bar_each_longest_first(number):
    neurons = neuron_set(number)
    figure = neurons_per_language(neurons)
    (lengths,) = _bars(figure)
    assert lengths == sorted(neurons.per_language().values(), reverse=True)
    drawn = dict(zip(_row_names(figure), lengths, strict=True))
    assert drawn == {language_label(code): count for code, count in neurons.per_language().items()}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 24), (24, 24), (123, 123)])
def test_ablation_is_centred_and_marks_the_own_language(rows, columns):
    matrix = ablation_matrix(rows, columns)
    figure = ablation_heatmap(matrix)
    (image,) = figure.axes[0].images
    drawn = image.get_array()
    low, high = image.get_clim()
    assert low == -high and high == pytest.approx(0.2)
    rows_drawn, columns_drawn = _row_names(figure), _column_names(figure)
    for row, (language, count) in enumerate(zip(matrix.ablated, matrix.neurons, strict=True)):
        place = rows_drawn.index(f"{language_label(language)} ({count:,})")
        for column, other in enumerate(matrix.evaluated):
            assert drawn[place, columns_drawn.index(language_label(other))] == matrix.cost[row, column]
    outlined = [(round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)) for patch in figure.axes[0].patches]
    assert [drawn[place] for place in outlined] == pytest.approx([0.2] * rows)
    assert len(set(outlined)) == rows


def test_a_heat_map_puts_languages_of_one_script_together():
    languages = ["rus_Cyrl", "eng_Latn", "ukr_Cyrl", "afr_Latn", "bul_Cyrl"]
    names = _column_names(ablation_heatmap(matrix_of(languages, languages, torch.eye(5), [1] * 5)))
    assert names == ["Bulgarian", "Russian", "Ukrainian", "Afrikaans", "English"]


def test_the_heat_map_of_120_languages_is_a_picture_of_sane_size(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "ablation.png"
    save_figure(ablation_heatmap(ablation_matrix(120, 120)), path, "Costs.")
    height, width, _ = imread(path).shape
    # At least 20 pixels for a row with its name, and no more than a viewer opens.
    assert 120 * 20 < height < 5000 and 120 * 20 < width < 5000
    assert path.stat().st_size < 5_000_000
    assert path.with_suffix(".svg").stat().st_size < 1_000_000


def test_red_is_harm_and_the_legend_says_so():
    figure = ablation_heatmap(ablation_matrix(2, 3))
    image = figure.axes[0].images[0]
    red, _, blue, _ = image.to_rgba(numpy.array([[0.2]]))[0, 0]
    assert red > 2 * blue
    red, _, blue, _ = image.to_rgba(numpy.array([[-0.2]]))[0, 0]
    assert blue > 2 * red
    assert "Bits per byte added (above 0, red: worse; below 0, blue: better)" in _words(figure)


def test_an_ablation_without_effect_is_drawn_and_one_without_rows_refused():
    still = matrix_of(["mlt_Latn"], ["mlt_Latn"], torch.tensor([[-1e-9]]), [0])
    assert "+0.000" in _words(ablation_heatmap(still))
    with pytest.raises(ShapeError, match="0 rows"):
        ablation_heatmap(matrix_of([], ["mlt_Latn"], torch.ones(0, 1), []))


@pytest.mark.parametrize("number", SIZES)
def test_language_change_draws_every_language_and_method(number):
    before, after = scores(number)
    target = codes(1)[0]
    figure = language_change(before, after, target)
    names = _row_names(figure)
    assert names[0] == language_label(target)
    assert figure.axes[0].get_yticklabels()[0].get_fontweight() == "bold"
    for lengths, method in zip(_bars(figure), after.values(), strict=True):
        drawn = dict(zip(names, lengths, strict=True))
        assert drawn == pytest.approx({language_label(code): method[code] - before[code] for code in before})


def test_language_change_states_its_sign_and_both_findings():
    before = {"mlt_Latn": 2.0, "fra_Latn": 1.0, "deu_Latn": 1.0}
    after = {"subnetwork": {"mlt_Latn": 1.5, "fra_Latn": 1.1, "deu_Latn": 1.3}}
    words = _words(language_change(before, after, "mlt_Latn"))
    assert "below 0: better, above 0: worse" in words
    assert "subnetwork: Maltese \N{MINUS SIGN}0.500, mean of the others +0.200" in words


def test_language_change_refuses_what_cannot_be_compared():
    before, after = scores(3)
    with pytest.raises(LanguageError, match="mlt_Latn"):
        language_change(before, after, "mlt_Latn")
    del after["random"][codes(3)[2]]
    with pytest.raises(LanguageError, match=f"{codes(3)[2]}.*'random'"):
        language_change(before, after, codes(1)[0])
    with pytest.raises(ShapeError, match="0 methods"):
        language_change(before, {}, codes(1)[0])


def test_learning_curve_draws_both_losses_and_names_the_lowest():
    figure = learning_curve(training_log(), "Tuning Maltese")
    training, validation = (line.get_xydata().tolist() for line in figure.axes[0].lines)
    assert training == [[step, 4 - step / 40] for step in range(10, 81, 10)]
    assert [step for step, _ in validation] == [20, 40, 60, 80]
    words = _words(figure)
    assert "lowest: 3.000 at step 40" in words and "nats per token" in words and "Tuning Maltese" in words
    with pytest.raises(TrainingError, match="no loss"):
        learning_curve([{"step": 1, "train_loss": 2.0}], "nothing")


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize("name", FIGURES)
def test_names_neither_overlap_nor_leave_the_figure(name, number):
    figure = FIGURES[name](number)
    # Text is measured as it is drawn.
    with house_style():
        box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    # No wasted space either: the margins are slim.
    assert width - box.width < 0.3 and height - box.height < 0.3
    axes = figure.axes[0]
    rows = sorted((label.get_window_extent() for label in axes.get_yticklabels()), key=lambda row: row.y0)
    assert all(lower.y1 <= upper.y0 for lower, upper in zip(rows, rows[1:], strict=False))
    columns = sorted((label.get_window_extent() for label in axes.get_xticklabels()), key=lambda column: column.x0)
    assert all(left.x1 <= right.x0 for left, right in zip(columns, columns[1:], strict=False))


@pytest.mark.parametrize("name", FIGURES)
def test_files_are_whole_in_both_forms_and_the_same_every_time(name, tmp_path):
    from matplotlib.image import imread

    path, again = tmp_path / "figures" / f"{name}.png", tmp_path / "again" / f"{name}.png"
    for target in (path, again):
        save_figure(FIGURES[name](12), target, HOSTILE)
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300
    assert len(numpy.unique(pixels[..., 0])) > 20
    assert pixels[0, 0, :3].tolist() == [1, 1, 1]
    assert sorted(file.name for file in path.parent.iterdir()) == [f"{name}.png", f"{name}.svg"]
    for file in path.parent.iterdir():
        assert file.read_bytes() == (again.parent / file.name).read_bytes()
    root = ElementTree.parse(path.with_suffix(".svg")).getroot()
    assert root.get("role") == "img"
    # The alternative comes first, on one line, since XML has no place for some of its characters.
    assert root[0].tag == "{http://www.w3.org/2000/svg}title"
    assert root[0].text == '<script>alert("$x^$")</script> & _Latn'
    # The same words as in a page, on the white that a PNG has.
    words = "\n".join("".join(root.itertext()).split("_Latn", 1)[1].split())
    assert words == "\n".join(_words(FIGURES[name](12)).split())
    assert (
        "currentColor" not in path.with_suffix(".svg").read_text() and "#ffffff" in path.with_suffix(".svg").read_text()
    )


@pytest.mark.parametrize("name", FIGURES)
def test_svg_is_the_same_every_time_and_stands_alone(name):
    figure = FIGURES[name](24)
    svg = figure_svg(figure)
    assert svg == figure_svg(figure) == figure_svg(FIGURES[name](24))
    references = re.findall(r'(?:href|src)="([^"]*)"', svg)
    assert all(reference.startswith(("#", "data:image/png;")) for reference in references)
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert "<metadata" not in svg and "<text" in svg and "currentColor" in svg


def test_svg_does_not_depend_on_the_process():
    script = (
        "import hashlib\n"
        "from tests.report.test_figures import FIGURES\n"
        "from lape_fast.report import figure_svg\n"
        "print(*(hashlib.sha256(figure_svg(draw(5)).encode()).hexdigest() for draw in FIGURES.values()))\n"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first == second and len(first.split()) == len(FIGURES)


def test_names_are_english_plain_and_never_markup():
    assert language_label("mlt_Latn") == "Maltese"
    assert language_label("xyz_Latn") == "xyz_Latn"
    assert language_label(HOSTILE).isprintable()
    neurons = NeuronSet.from_lists({HOSTILE: [[1], [2]], "mlt_Latn": [[1], []]}, neurons_per_layer=8)
    for figure in (neurons_by_layer(neurons), neurons_per_language(neurons)):
        svg = figure_svg(figure)
        assert "<script" not in svg
        assert '<script>alert("$x^$")' in _words(figure)


def test_importing_costs_nothing_and_drawing_leaves_no_global_state():
    script = (
        "import sys, lape_fast.report\n"
        "assert not {'matplotlib', 'babel', 'datasets'} & set(sys.modules)\n"
        "import matplotlib\n"
        "from lape_fast.report.canvas import STYLE\n"
        "before = {name: str(matplotlib.rcParams[name]) for name in STYLE}\n"
        "from lape_fast.report import figure_svg, learning_curve\n"
        "figure_svg(learning_curve([{'step': 1, 'loss': 2.0}], 'title'))\n"
        "assert before == {name: str(matplotlib.rcParams[name]) for name in STYLE}\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def _drawn(panel) -> dict[str, list[tuple[float, float]]]:
    """The lines of a panel by their names in its legend."""
    named = [line for line in panel.lines if not line.get_label().startswith("_")]
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in named}


def test_training_dynamics_draws_every_record():
    records = dynamics_records(5)
    loss, gradient, update, change = training_dynamics(records, "Maltese: lora", codes(1)[0]).axes
    assert _drawn(loss) == {
        name: [(record["step"], record[field]) for record in records if field in record]
        for name, field in (("training", "loss"), ("validation", "validation_loss"))
    }
    for panel, field in ((gradient, "gradient_norm"), (update, "update_norm")):
        drawn = _drawn(panel)
        assert list(drawn) == ["gate", "up", "down", "total"]
        for part, points in drawn.items():
            assert points == [(record["step"], record[field][part]) for record in records if field in record]
    # The target, whose place is 0, falls by 0.001 a step; the others rise by 0, 0.001, 0.002, 0.003.
    target, others = _drawn(change).values()
    assert target == [(0, 0), (40, pytest.approx(-0.04)), (80, pytest.approx(-0.08))]
    assert others == [(0, 0), (40, pytest.approx(0.06)), (80, pytest.approx(0.12))]
    band = change.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0) and band[:, 1].max() == pytest.approx(0.24)


def test_training_dynamics_without_what_it_can_do_without():
    records = [{"step": step, "tokens": 64 * step, "loss": 3.0} for step in (1, 2)]
    assert "no other languages were measured" in _words(training_dynamics(records, "short"))
    with pytest.raises(TrainingError, match="1 records and no loss"):
        training_dynamics([{"step": 0, "tokens": 0}], "empty")


def test_alignment_draws_every_stage_before_and_after():
    measured = alignment(3)
    cosine, cka, retrieval = alignment_curves(measured).axes
    pivot = language_label(measured.pivot)
    for panel, name, baseline in ((cosine, "cosine", "cosine_misaligned"), (cka, "cka", "cka_misaligned")):
        drawn = _drawn(panel)
        for stage in measured.stages:
            curves = {
                f"{stage}: {pivot}": measured.to_pivot(name, stage),
                f"{stage}: mean of 3": measured.mean(name, stage),
                f"{stage}: misaligned (mean)": measured.mean(baseline, stage),
            }
            for label, curve in curves.items():
                assert drawn[label] == list(enumerate(curve.tolist()))
    both = [measured.mean(f"retrieval_{side}_target", "tuned") for side in ("from", "to")]
    assert _drawn(retrieval)["tuned: mean of 3"] == list(enumerate(((both[0] + both[1]) / 2).tolist()))
    assert {point[1] for point in _drawn(retrieval)["chance"]} == {1 / 200}
    words = _words(alignment_curves(measured))
    assert "200 parallel sentences" in words and "tuned: misaligned (mean)" in words and "chance" in words
    with pytest.raises(ShapeError, match="5 stages"):
        alignment_curves(dataclasses.replace(measured, stages=("base", "a", "b", "c", "d")))


def test_weight_change_draws_every_projection_and_leaves_the_rest_empty():
    change = weight_change(2)
    figure = weight_change_map(change)
    drawn = figure.axes[0].images[0].get_array()
    assert _row_names(figure) == [f"adapter {number}: {name}" for number in (0, 1) for name in ("gate", "down")]
    assert drawn.mask[:, 0].all() and not drawn.mask[:, 1:].any()
    for each in change.changes:
        row = _row_names(figure).index(f"{each.adapter}: {each.projection}")
        assert drawn[row, each.layer] == each.relative_norm
    with pytest.raises(ShapeError, match="nothing to draw"):
        weight_change_map(dataclasses.replace(change, changes=()))


def test_steered_languages_add_up_to_all_texts():
    result = steering(24)
    figure = steered_languages(result)
    names = _row_names(figure)
    assert names[0] == language_label(result.language) and names[-1] == "12 others" and len(names) == 13
    without, with_steering = _bars(figure)
    assert [sum(without), sum(with_steering)] == pytest.approx([100, 100])
    assert without[0] == pytest.approx(100 / 24) and with_steering[0] == pytest.approx(100 * 13 / 24)
    assert f"with steering: 54% in {names[0]}" in _words(figure)
