"""Fixtures shared by all tests, and the account of what ran: passed, failed and skipped per tier."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the folder ../shared/{name} is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def shared_corpus() -> Path:
    """The aligned corpus of 123 languages."""
    return _folder("corpus")


@pytest.fixture(scope="session")
def shared_masks() -> Path:
    """The published neuron identifications."""
    return _folder("masks")


def _tier(nodeid: str) -> str:
    """The folder below tests/, or `whole` for the tests of the package as one."""
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 else "whole"


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints one line per tier, so that a skipped tier cannot pass for a green one."""
    tiers: dict[str, Counter] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            tiers.setdefault(_tier(report.nodeid), Counter())[outcome] += 1
    terminalreporter.section("tiers")
    for tier, counts in sorted(tiers.items()):
        outcomes = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "error", "skipped"))
        terminalreporter.write_line(f"{tier}: {outcomes}")
