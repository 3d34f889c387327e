"""The atlas holds what the files hold, in a page that is small, closed and escaped; the browser tests look at it."""

from __future__ import annotations

import base64
import hashlib
import math
import re

import numpy as np
import pytest
import torch

from lape_fast.errors import ArchitectureError, LanguageError, SelectionError
from lape_fast.identify import NeuronSet
from lape_fast.report import render_atlas
from lape_fast.report.clustering import average_linkage
from tests.report.atlas_samples import LAYERS, WIDTH, alignment_of, counts_of, read_atlas, sample
from tests.report.samples import matrix_of

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    neurons, counts = sample()
    path = tmp_path_factory.mktemp("atlas") / "atlas.html"
    render_atlas(path, neurons, counts)
    return neurons, counts, path, *read_atlas(path)


def test_every_language_has_its_neurons(atlas):
    neurons, _, _, header, blocks = atlas
    width = math.ceil(header["union"] / 8)
    for number, language in enumerate(header["languages"]):
        bits = np.unpackbits(blocks["members"][number * width : (number + 1) * width], bitorder="little")
        held = np.sort(blocks["positions"][bits[: header["union"]].astype(bool)])
        assert held.tolist() == neurons.flat(language["code"]).tolist()
        assert language["neurons"] == len(held)
        assert language["per_layer"] == [len(layer) for layer in neurons[language["code"]]]
    assert header["union"] == neurons.union_count()


def test_a_language_is_told_what_no_other_has(atlas):
    neurons, _, _, header, _ = atlas
    for language in header["languages"]:
        others = {n for each in neurons.languages if each != language["code"] for n in neurons.flat(each).tolist()}
        assert language["exclusive"] == len(set(neurons.flat(language["code"]).tolist()) - others)


def test_probabilities_are_those_of_the_counts_to_half_a_level(atlas):
    _, counts, _, header, blocks = atlas
    stored = blocks["probability"].reshape(header["probabilities"], -1) / (header["levels"] - 1)
    for number, language in enumerate(header["languages"]):
        place = counts.languages.index(language["code"])
        p = counts.positive[place].flatten()[blocks["positions"].astype(np.int64)] / counts.tokens[place]
        # Levels are of the square root.
        assert np.abs(stored[:, number] - p.sqrt().numpy()).max() <= 0.5 / (header["levels"] - 1) + 1e-12


def test_neurons_stand_in_the_order_of_their_entropy(atlas):
    _, counts, _, header, blocks = atlas
    p = counts.probability().flatten(1)[:, blocks["positions"].astype(np.int64)].double()
    q = p / p.sum(0)
    entropy = torch.special.entr(q).sum(0).numpy()
    assert (np.diff(entropy) >= -1e-12).all()
    largest = math.log(len(header["languages"]))
    assert np.abs(blocks["entropy"] / 65_535 * largest - entropy).max() <= 0.5 * largest / 65_535 + 1e-12


def test_similarity_is_the_jaccard_index(atlas):
    neurons, _, _, header, blocks = atlas
    order = [neurons.languages.index(language["code"]) for language in header["languages"]]
    expected = neurons.jaccard()[order][:, order].numpy()
    assert np.abs(blocks["similarity"].reshape(expected.shape) / 65_535 - expected).max() <= 0.5 / 65_535


def test_stability_is_what_the_counts_say(atlas):
    _, counts, _, header, _ = atlas
    known = {language["code"]: language["stability"] for language in header["languages"]}
    assert known[counts.languages[0]] == 0.9
    assert known[counts.languages[1]] is None


def test_average_linkage_of_a_tree_that_can_be_reckoned_by_hand():
    # Two pairs; between the pairs 0.1, 0.2, 0.2 and 0.3, whose mean is 0.2.
    similarity = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.2, 0.3], [0.1, 0.2, 1, 0.8], [0.2, 0.3, 0.8, 1]])
    merges, order = average_linkage(similarity)
    assert [(left, right) for left, right, _ in merges] == [(0, 1), (2, 3), (4, 5)]
    assert [alike for *_, alike in merges] == pytest.approx([0.9, 0.8, 0.2])
    assert order == [0, 1, 2, 3]


def test_average_linkage_agrees_with_means_over_all_pairs():
    generator = np.random.default_rng(0)
    values = generator.random((20, 20))
    similarity = (values + values.T) / 2
    merges, order = average_linkage(similarity)
    members = {number: [number] for number in range(20)}
    for made, (left, right, alike) in enumerate(merges, 20):
        assert alike == pytest.approx(similarity[np.ix_(members[left], members[right])].mean())
        members[made] = members.pop(left) + members.pop(right)
        # None of the clusters that were left were more alike.
        others = [
            similarity[np.ix_(a, b)].mean() for i, a in members.items() for j, b in members.items() if i < j < made
        ]
        assert all(each <= alike + 1e-12 for each in others)
    assert sorted(order) == list(range(20))


def test_one_language_without_counts_is_an_atlas_too(tmp_path):
    neurons = NeuronSet.from_lists({"mlt_Latn": [[0, 5], [3]]}, neurons_per_layer=16)
    render_atlas(tmp_path / "atlas.html", neurons)
    header, blocks = read_atlas(tmp_path / "atlas.html")
    assert header["probabilities"] is None and header["merges"] == []
    assert blocks["positions"].tolist() == [0, 5, 19]


def test_nothing_in_the_page_can_run_or_load(tmp_path):
    neurons = NeuronSet.from_lists({HOSTILE: [[0]], "mlt_Latn": [[1]]}, 16, {"model": HOSTILE, "name": HOSTILE})
    render_atlas(tmp_path / "atlas.html", neurons)
    page = (tmp_path / "atlas.html").read_text(encoding="utf-8")
    assert page.count("<script") == 3 and "<img" not in page
    assert read_atlas(tmp_path / "atlas.html")[0]["languages"][0]["code"] in (HOSTILE, "mlt_Latn")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for element in ("style", "script"):
        source = re.search(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page


def test_noise_takes_no_more_than_a_byte_a_probability(tmp_path):
    # Noise does not compress, so a page with all probabilities that it may hold stays below 6 MB with any counts.
    languages = [f"x{chr(97 + n // 26)}{chr(97 + n % 26)}_Latn" for n in range(188)]
    lists = {language: [list(range(number, 1434, 188))] for number, language in enumerate(languages)}
    neurons = NeuronSet.from_lists(lists, 1434)
    counts = counts_of(languages, layers=1, width=1434)
    generator = torch.Generator().manual_seed(0)
    counts.positive.copy_((torch.rand(counts.positive.shape, generator=generator) ** 2 * 10_000).long())
    sizes = []
    for name, given in (("with", counts), ("without", None)):
        render_atlas(tmp_path / name, neurons, given)
        sizes.append((tmp_path / name).stat().st_size)
    cells, entropies = 188 * 1434, 2 * 1434 * 4 / 3
    # Six bits in base64 are a byte; the rest is what deflate adds, and neurons that no longer stand in their order.
    assert sizes[0] - sizes[1] < 1.03 * (cells + entropies)


def test_what_does_not_fit_is_refused(tmp_path):
    neurons, counts = sample()
    path = tmp_path / "atlas.html"
    with pytest.raises(LanguageError, match="not among"):
        render_atlas(path, neurons, counts.restrict(counts.languages[:3]))
    with pytest.raises(ArchitectureError):
        render_atlas(path, neurons, counts_of(neurons.languages, LAYERS, WIDTH // 2))
    with pytest.raises(SelectionError, match="nothing to show"):
        render_atlas(path, NeuronSet.from_lists({"mlt_Latn": [[]]}, 16))
    assert not path.exists()


def test_the_ablation_keeps_its_numbers_in_the_order_of_the_languages(tmp_path):
    neurons, _ = sample(3)
    cost = torch.tensor([[0.5, 0.1, 0.0], [0.2, 0.6, -0.1], [0.0, 0.3, 0.7]])
    matrix = matrix_of(neurons.languages, neurons.languages, cost, [1, 2, 3])
    render_atlas(tmp_path / "atlas.html", neurons, ablation=matrix)
    header, _ = read_atlas(tmp_path / "atlas.html")
    order = [language["code"] for language in header["languages"]]
    assert header["ablation"]["rows"] == header["ablation"]["columns"] == order
    for row, language in enumerate(order):
        for column, other in enumerate(order):
            expected = cost[neurons.languages.index(language), neurons.languages.index(other)].item()
            assert header["ablation"]["cost"][row][column] == pytest.approx(expected, abs=5e-5)


def test_the_alignment_keeps_its_curves(tmp_path):
    alignment = alignment_of(["mlt_Latn", "deu_Latn"], ("base", "tuned"), layers=4)
    render_atlas(tmp_path / "atlas.html", sample(3)[0], alignment=alignment)
    charts = {each["title"]: each["series"] for each in read_atlas(tmp_path / "atlas.html")[0]["alignment"]["charts"]}
    cosine = {each["name"]: each["values"] for each in charts["Cosine"]}
    assert cosine["tuned: English"] == pytest.approx(alignment.to_pivot("cosine", "tuned").tolist(), abs=1e-5)
    assert cosine["base: misaligned sentences"] == pytest.approx(alignment.mean("cosine_misaligned").tolist(), abs=1e-5)
    both = (alignment.mean("retrieval_from_target") + alignment.mean("retrieval_to_target")) / 2
    retrieval = {each["name"]: each["values"] for each in charts["Retrieval accuracy"]}
    assert retrieval["base: mean of 2 languages"] == pytest.approx(both.tolist(), abs=1e-5)
