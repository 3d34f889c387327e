"""IndexedAdamW against torch.optim.AdamW: the same values, states that can be exchanged, and no memory beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import LiveBytes
from lape_fast.errors import ConfigError
from lape_fast.ops.backend import EXTENSION_LOADED
from lape_fast.tune import IndexedAdamW, Part, attach_subnetwork
from tests.tiny_models import tiny_model

HEIGHT, WIDTH, SIZES = 37, 53, (5, 0, 11)


class Small:
    """Gate rows, up rows and down columns of a layer, with masters and gradients for them."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.bases = [torch.randn(HEIGHT, WIDTH, generator=generator).to(dtype) for _ in SIZES[:-1]]
        self.bases.append(torch.randn(WIDTH, HEIGHT, generator=generator).to(dtype))
        self.views = [*self.bases[:-1], self.bases[-1].T]
        self.neurons = [torch.randperm(HEIGHT, generator=generator)[:size].sort().values for size in SIZES]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        pairs = zip(self.views, self.neurons, strict=True)
        self.masters = [nn.Parameter(view[chosen].to(wide, copy=True)) for view, chosen in pairs]
        self.updates = 0

    def count(self) -> None:
        self.updates += 1

    def parts(self) -> list[Part]:
        triples = zip(self.masters, self.views, self.neurons, strict=True)
        return [Part(master, lambda view=view: view, chosen, self.count) for master, view, chosen in triples]

    def set_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for master in self.masters:
            master.grad = torch.randn(master.shape, generator=generator).to(master.dtype)


def train(small: Small, optimizer: torch.optim.Optimizer, steps: range, scheduler=None, max_norm=None) -> None:
    for step in steps:
        small.set_gradients(step)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(small.masters, max_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_equal(left: Small, right: Small) -> None:
    # fp64: a few roundings a step.
    for ours, theirs in zip(left.masters, right.masters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_follows_torch_with_a_schedule_and_clipping(max_norm):
    ours, theirs = Small(), Small()
    optimizer = IndexedAdamW(ours.parts(), **OPTIONS, max_grad_norm=max_norm)
    reference = torch.optim.AdamW(theirs.masters, **OPTIONS)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(each, 0.05, 20) for each in (optimizer, reference)]
    train(ours, optimizer, range(20), schedules[0])
    train(theirs, reference, range(20), schedules[1], max_norm)
    assert_equal(ours, theirs)
    for master, view, chosen in zip(ours.masters, ours.views, ours.neurons, strict=True):
        assert torch.equal(view[chosen], master)
    assert ours.updates == 20 * len(SIZES)


def test_gradients_are_left_as_they_are():
    small = Small()
    optimizer = IndexedAdamW(small.parts(), max_grad_norm=0.1)
    small.set_gradients(0)
    before = [master.grad.clone() for master in small.masters]
    optimizer.step()
    assert all(torch.equal(master.grad, grad) for master, grad in zip(small.masters, before, strict=True))


@pytest.mark.parametrize("torch_first", [True, False], ids=["from torch", "to torch"])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_states_can_be_exchanged_with_torch(torch_first, options):
    interrupted, whole = Small(), Small()
    train(whole, torch.optim.AdamW(whole.masters, **OPTIONS), range(8))
    makers = [
        lambda: torch.optim.AdamW(interrupted.masters, **OPTIONS, **options),
        lambda: IndexedAdamW(interrupted.parts()),
    ]
    first, second = (make() for make in (makers if torch_first else makers[::-1]))
    first.param_groups[0].update(OPTIONS)
    train(interrupted, first, range(4))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(interrupted, second, range(4, 8))
    assert_equal(interrupted, whole)


def test_its_own_state_survives_a_file(tmp_path):
    interrupted, whole = Small(torch.bfloat16), Small(torch.bfloat16)
    train(whole, IndexedAdamW(whole.parts(), **OPTIONS), range(6))
    first = IndexedAdamW(interrupted.parts(), **OPTIONS)
    train(interrupted, first, range(3))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = IndexedAdamW(interrupted.parts())
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(interrupted, second, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(interrupted.masters, whole.masters, strict=True))
    assert all(torch.equal(*pair) for pair in zip(interrupted.bases, whole.bases, strict=True))


def test_a_deep_copy_of_model_and_optimizer_goes_on_by_itself():
    model = tiny_model("llama")
    optimizer = attach_subnetwork(model, [torch.tensor([3, 7]), torch.tensor([5])]).optimizer(lr=0.1)
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, 5]])}

    def step(model, optimizer):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            return model(**batch).loss

    step(model, optimizer)
    copied = copy.deepcopy((model, optimizer))
    untouched = copy.deepcopy(model.state_dict())
    loss = step(*copied)
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    assert torch.equal(step(model, optimizer), loss)


def test_a_state_with_options_it_lacks_is_refused():
    small = Small()
    reference = torch.optim.AdamW(small.masters, amsgrad=True)
    with pytest.raises(ConfigError, match="amsgrad=True"):
        IndexedAdamW(small.parts()).load_state_dict(reference.state_dict())


def test_parameters_without_a_gradient_rest_and_keep_their_own_count():
    ours, theirs = Small(), Small()
    optimizer, reference = IndexedAdamW(ours.parts(), **OPTIONS), torch.optim.AdamW(theirs.masters, **OPTIONS)
    for step in range(4):
        for small, each in ((ours, optimizer), (theirs, reference)):
            small.set_gradients(step)
            if step != 1:
                small.masters[0].grad = None
            each.step()
    assert_equal(ours, theirs)
    assert [float(optimizer.state[master]["step"]) for master in ours.masters] == [1, 4, 4]


def test_a_step_without_any_gradient_does_nothing():
    small = Small()
    before = copy.deepcopy(small.masters)
    IndexedAdamW(small.parts(), max_grad_norm=1.0).step()
    assert all(torch.equal(*pair) for pair in zip(small.masters, before, strict=True)) and small.updates == 0


def test_a_weight_that_must_not_be_written_is_not():
    written, resting = Small(torch.bfloat16), Small(torch.bfloat16)
    before = copy.deepcopy(resting.bases)
    parts = [part._replace(weight=lambda: None) for part in resting.parts()]
    train(written, IndexedAdamW(written.parts()), range(3))
    train(resting, IndexedAdamW(parts), range(3))
    assert all(torch.equal(*pair) for pair in zip(written.masters, resting.masters, strict=True))
    assert all(torch.equal(*pair) for pair in zip(resting.bases, before, strict=True))
    # It is told of every update all the same.
    assert resting.updates == written.updates == 3 * len(SIZES)


def test_a_closure_is_called_with_gradients_enabled():
    small = Small()
    optimizer = IndexedAdamW(small.parts())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(master.square().sum() for master in small.masters)
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


@pytest.mark.skipif(not EXTENSION_LOADED, reason="the native extension is not built")
def test_memory_is_two_moments_and_nothing_passing(monkeypatch):
    monkeypatch.delenv("LAPE_FAST_BACKEND", raising=False)
    small = Small(torch.bfloat16)
    optimizer = IndexedAdamW(small.parts(), max_grad_norm=1.0)
    train(small, optimizer, range(1))
    entries, smallest = sum(SIZES) * WIDTH, min(master.nbytes for master in small.masters if master.numel())
    moments = [values for state in optimizer.state.values() for values in state.values() if values.dim()]
    assert sum(values.nbytes for values in moments) == 8 * entries
    small.set_gradients(1)
    with LiveBytes() as live:
        optimizer.step()
    # Norms, the factor and the checks of the neurons: they grow with parts and neurons, not with entries.
    assert live.peak < smallest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        IndexedAdamW(Small().parts(), **options)


def test_there_is_one_group_of_at_least_one_part():
    with pytest.raises(ConfigError, match="no parts"):
        IndexedAdamW([])
    with pytest.raises(ConfigError, match="one parameter group"):
        IndexedAdamW(Small().parts()).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
