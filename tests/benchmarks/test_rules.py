"""The campaign that measures rules by ablation, on a tiny model: its rows and what they are compared by."""

from __future__ import annotations

import pytest
import torch

from benchmarks import rules
from lape_fast.files import read_json
from lape_fast.identify import ActivationCounts, Lape, rule_name
from tests.tiny_models import save_tiny

LANGUAGES = ["mlt_Latn", "eng_Latn", "rus_Cyrl"]


def drawn_counts() -> ActivationCounts:
    positive = torch.randint(0, 1001, (3, 2, 48), generator=torch.Generator().manual_seed(0))
    return ActivationCounts(positive, torch.full((3,), 1000), LANGUAGES)


def test_rules_are_compared_at_equal_sizes():
    selections = {rule_name(rule): neurons for rule, neurons in rules.select_all(drawn_counts(), [7])}
    for name in ("budget-7", "percentile-0.927083"):
        assert set(selections[name].per_language().values()) == {7}
        alone = selections[f"{name}-exclusive"]
        assert sum(alone.per_language().values()) == alone.union_count() <= 21
    loose = selections[rule_name(Lape(0.2, 0.8, 0.8))].per_language().values()
    assert set(selections[f"budget-{round(sum(loose) / 3)}"].per_language().values()) == {round(sum(loose) / 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    save_tiny(folder / "base")
    (folder / "texts").mkdir()
    for language in LANGUAGES:
        (folder / "texts" / f"{language}.txt").write_text(f"{language} one\n{language} two\n" * 3, encoding="utf-8")
    drawn_counts().save(folder / "counts.safetensors")
    return folder


def test_the_rows_and_going_on_where_it_was_stopped(folder, capsys):
    command = [
        *("--model", str(folder / "base"), "--counts", str(folder / "counts.safetensors")),
        *("--corpus", str(folder / "texts"), "--lines", "1-2", "--languages", *LANGUAGES, "--sizes", "7"),
        *("--workspace", str(folder / "work"), "--json"),
    ]
    rules.main([*command, str(folder / "first.json")])
    rows = read_json(folder / "first.json")
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) and {"budget-7", "lape-top0.05", "budget-7-exclusive"} <= set(names)
    for row in rows:
        own = [costs["own"] for costs in row["selectivity"].values()]
        assert row["mean_own"] == pytest.approx(sum(own) / 3)
        assert 0 <= row["own_hardest"] <= row["languages"] == 3
        least, median, most = row["neurons_per_language"]
        assert least <= median <= most and (row["languages_without"] > 0) == (least == 0)

    finished = {path: path.stat().st_mtime_ns for path in (folder / "work").iterdir()}
    assert len(finished) == len(rows)
    next(iter(finished)).unlink()
    rules.main([*command, str(folder / "second.json")])
    again = read_json(folder / "second.json")
    assert [row["selectivity"] for row in again] == [row["selectivity"] for row in rows]
    kept = [path for path, time in finished.items() if path.stat().st_mtime_ns == time]
    assert len(kept) == len(rows) - 1
