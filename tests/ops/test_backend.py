"""Which backend runs, and what happens where the native extension was not built."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from lape_fast.errors import BackendError
from lape_fast.ops import gated_activation
from lape_fast.ops.backend import EXTENSION_LOADED, resolve_backend
from tests.ops.oracles import needs_extension

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv("LAPE_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_argument_beats_the_environment_beats_the_device(monkeypatch):
    automatic = "cpp" if EXTENSION_LOADED else "reference"
    assert resolve_backend(None, CPU) == resolve_backend("auto", CPU) == automatic
    assert resolve_backend(None, torch.device("cuda")) == "triton"
    assert resolve_backend(None, torch.device("mps")) == "reference"
    monkeypatch.setenv("LAPE_FAST_BACKEND", "reference")
    assert resolve_backend(None, CPU) == "reference"
    assert resolve_backend("auto", CPU) == automatic
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", CPU) == "triton"


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("cuda", "cpu", "'cuda' is unknown; choose one of auto, reference, cpp, triton"),
        ("cpp", "cuda", "'cpp' needs CPU tensors"),
        ("triton", "cpu", "'triton' needs CUDA tensors"),
    ],
)
def test_what_cannot_run_is_said(backend, device, message):
    with pytest.raises(BackendError, match=message):
        resolve_backend(backend, torch.device(device))


def test_an_unknown_backend_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("LAPE_FAST_BACKEND", "fast")
    with pytest.raises(BackendError, match="'fast' is unknown"):
        gated_activation(torch.zeros(2, 3), None, "silu")


@needs_extension
def test_the_extension_has_a_cpu_kernel_for_every_op():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lape_fast::")]
    assert "lape_fast::gated_activation" in names and "lape_fast::gated_activation_backward" in names
    # On a CPU the products of an fp8 model take so long that rounding its rows is nothing beside them.
    for name in set(names) - {"lape_fast::quantise_rows"}:
        cpu = [line for line in torch._C._dispatch_dump(name).splitlines() if line.startswith("CPU")]
        assert len(cpu) == 1 and "registration.cpp" in cpu[0], (name, cpu)


def test_without_the_extension_the_reference_counts_the_same_and_warns_once():
    program = """
        import importlib.machinery, sys, warnings

        class Hidden:
            @staticmethod
            def find_spec(name, path=None, target=None):
                return importlib.machinery.ModuleSpec(name, None) if name == "lape_fast._C" else None

        sys.meta_path.insert(0, Hidden)
        import torch
        from lape_fast.errors import BackendError
        from lape_fast.ops import gated_activation, gated_activation_backward, indexed_adamw_
        from lape_fast.ops.backend import EXTENSION_LOADED

        assert not EXTENSION_LOADED
        gate = torch.randn(50, 40)
        language_ids = torch.arange(50, dtype=torch.int32) % 3 - 1
        counts = torch.zeros(2, 40, dtype=torch.int64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                gated_activation(gate, gate, "silu", language_ids, counts)
                gated_activation_backward(gate, gate.clone(), None, "silu")
            torch.ops.lape_fast.gated_activation(gate, gate, 0, language_ids, counts)
            grad, master, exp_avg, exp_avg_sq = torch.ones(4, 2, 40)
            parts = [gate.clone()], [torch.tensor([3, 7])], [grad], [master], [exp_avg], [exp_avg_sq]
            indexed_adamw_(*parts, lr=0.1, step=1)
            assert torch.equal(parts[0][0][[3, 7]], master)
        assert [warning.category for warning in caught] == [RuntimeWarning], caught
        assert "pip install --no-build-isolation -e ." in str(caught[0].message)
        expected = torch.stack([(gate[language_ids == language] > 0).sum(0) for language in (0, 1)])
        assert torch.equal(counts, 4 * expected)
        try:
            gated_activation(gate, gate, "silu", backend="cpp")
        except BackendError as error:
            assert "the extension is not built" in str(error)
        else:
            raise AssertionError("the backend 'cpp' ran without the extension")
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
