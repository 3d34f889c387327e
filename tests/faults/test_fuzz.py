"""The fuzzer on a few inputs of every kind of file, and that it notices what it is there to notice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks import fuzz, fuzz_guided
from benchmarks.fuzz_targets import MAKERS, SHARES, Target, make_targets
from lape_fast.errors import FileFormatError

ROOT = Path(__file__).parents[2]

# Of a target with the share 1. The campaign of 100,000 is `python -m benchmarks.fuzz`.
INPUTS = 120


@pytest.fixture
def here(tmp_path, monkeypatch):
    # Code in a file would leave its mark in the working directory.
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_broken_files_are_read_or_refused_in_a_sentence(name, here):
    target = make_targets(here / "work", [name])[name]
    target.place.mkdir(parents=True, exist_ok=True)
    path = target.place / target.name
    assert fuzz.check(target, path, target.seeds[0]) == ("read", "")
    outcomes = [
        (number, *fuzz.check(target, path, fuzz.make_input(target, name, 1, number)))
        for number in range(max(3, round(INPUTS * SHARES.get(name, 1.0))))
    ]
    assert [each for each in outcomes if each[1] == "FAILED"] == []


def target_that(read) -> Target:
    return Target("file.bin", "bytes", [b"content"], read, Path("."))


def refuse(sentence):
    def read(path):
        raise FileFormatError(sentence.format(path=path))

    return read


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda path: path.read_bytes(), "read"),
        (refuse("{path} is damaged; write it again."), "FileFormatError"),
        (refuse("{path} is damaged"), "FAILED"),
        (refuse("It is damaged."), "FAILED"),
        (lambda path: int("x"), "FAILED"),
        (lambda path: os.mkdir(fuzz.CANARY), "FAILED"),
    ],
)
def test_an_input_fails_unless_it_is_read_or_refused_in_a_sentence_that_names_it(here, read, outcome):
    assert fuzz.check(target_that(read), here / "file.bin", b"content")[0] == outcome
    assert not (here / fuzz.CANARY).exists()


def test_inputs_depend_on_the_seed_and_their_number_alone(here):
    target = target_that(None)
    inputs = [fuzz.make_input(target, "counts", 0, number) for number in range(50)]
    assert inputs == [fuzz.make_input(target, "counts", 0, number) for number in range(50)]
    assert len(set(inputs)) > 25
    assert inputs != [fuzz.make_input(target, "counts", 1, number) for number in range(50)]


def test_every_target_gets_a_part_of_the_inputs():
    given = fuzz.shares(100_000)
    assert set(given) == set(MAKERS) and min(given.values()) > 0
    assert sum(given.values()) == pytest.approx(100_000, abs=len(given))


def test_a_campaign_counts_what_became_of_each_input():
    row = fuzz.run_target("options", seed=0, inputs=25)
    assert sum(row["outcomes"].values()) == row["inputs"] == 25
    assert row["processes"] == 1 and row["failures"] == [] and 0 < row["slowest_s"] < fuzz.SECONDS


def work_badly(answers, name, seed, first, last):
    """A worker that hangs at input 1, crashes at input 3 and reads the others."""
    answers.send({"ready": 0})
    for number in range(first, last):
        answers.send({"begin": number})
        signal.alarm(1)
        if number == 1:
            time.sleep(60)
        if number == 3:
            os.abort()
        answers.send((number, "read", "", 0.5, 10))


def test_a_worker_that_hangs_or_crashes_is_started_again_behind_the_input():
    row = fuzz.run_target("any", seed=0, inputs=5, worker=work_badly)
    assert row["outcomes"] == {"FAILED": 2, "read": 3} and row["processes"] == 3
    assert [(each["input"], each["message"]) for each in row["failures"]] == [
        (1, "the process ended by SIGALRM"),
        (3, "the process ended by SIGABRT"),
    ]


def test_the_search_for_files_reaches_more_code_than_the_whole_ones(here, monkeypatch):
    pytest.importorskip("atheris")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    row = fuzz_guided.run_target("release index", 400, seed=0)
    assert not row["failed"], row["message"]
    assert row["inputs"] == 400 and row["coverage"][-1] > row["coverage"][0] > 0
