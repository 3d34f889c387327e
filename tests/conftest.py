"""Fixtures shared by all tests: real text and published masks where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
