"""Training steps of one peer after the other on the weights of one base: checked, timed in rounds, and compared.

At true size two peers hardly fit beside each other, so a round builds each of them on the shared base, warms it, times
a few steps and takes it down again; the next round runs in reverse. Ratios are of times of the same round.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.quantise import quantise_layers
from benchmarks.gpu.shapes import Shape, build_model, choose_neurons
from benchmarks.gpu.stage import NotMeasured, Stage, free_memory, is_out_of_memory, missing_library
from benchmarks.llama import share
from benchmarks.measure import paired_ratio, peak_bytes, synchronize
from benchmarks.peers import Method, Peer, build_peer
from lape_fast.errors import LapeFastError
from lape_fast.models import decoder

GIB = 2**30

# Steps before the timed ones: the second finds optimizer states and the allocator's blocks in place.
WARM_UP = 2

# A round times a peer for about so long, but not with fewer or more steps.
SECONDS, LEAST_STEPS, MOST_STEPS = {"true": 1.5, "toy": 0.0}, 2, 10

# A peer's gradients may be this many times as far from fp32 as those of dense training in the same dtype are; the same
# budget as the ops'. And how far losses may differ: bf16 has 8 bits, and the losses of random weights are near ln V.
ERROR_BUDGET, LOSS_TOLERANCE = 2.0, 2e-2

# The smallest batch that a peer is rerun with after it ran out of memory.
LEAST_LENGTH = 128


class WrongAnswer(LapeFastError):
    """A peer computes something else than the others: its speed is worth nothing."""


@dataclass(frozen=True)
class Case:
    """What is measured of several peers together.

    Attributes:
        shape: the model.
        rows: R.
        length: S.
        language: whose neurons are trained.
        peers: label -> method and how ``build_peer`` shall set it up, without copies.
        baseline: the peer that ratios are to.
        rounds: how often each is built and timed.
        policy: "default", or what all have in common.
        quantise: how the base's layers are quantised, or None.
        goals: peer -> a goal of ``benchmarks.gpu.goals`` -> the column of its row that is held against it.
    """

    shape: Shape
    rows: int
    length: int
    language: str
    peers: Mapping[str, tuple[str | Method, Mapping[str, bool]]]
    baseline: str
    rounds: int
    policy: str = "default"
    quantise: str | None = None
    goals: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        policy = "" if self.policy == "default" else f" {self.policy}"
        return f"{self.shape.name} {self.rows}x{self.length} {self.language}{policy}"

    def labels(self, name: str) -> dict[str, Any]:
        """What a row of a peer says of itself, whatever becomes of it."""
        return {
            "model": self.shape.name,
            "rows": self.rows,
            "length": self.length,
            "language": self.language,
            "policy": self.policy,
            "peer": name,
            "dtype": "bfloat16",
        }


class Workbench:
    """One model at a time on the device, built when it is first asked for, and the neurons of a language.

    Args:
        stage: whose device it is on.
        options: of the suite.
    """

    def __init__(self, stage: Stage, options: Any):
        self.stage, self.options, self.device = stage, options, stage.device
        self._built: dict[str, nn.Module] = {}
        # Undoes what `base` does, at the latest when the process ends.
        weakref.finalize(self, gc.unfreeze)

    def base(self, shape: Shape, quantise: str | None = None) -> nn.Module:
        """The frozen model, its layers quantised if asked for; any other is given up for it."""
        key = f"{shape.name} {quantise}"
        if key not in self._built:
            self._built.clear()
            gc.unfreeze()
            free_memory(self.device)
            model = build_model(shape, self.device, torch.bfloat16)
            self._built[key] = model if quantise is None else quantise_layers(model, quantise)
            free_memory(self.device)
            # What is here now stays as long as this model, and need not be searched for garbage before every peer.
            gc.freeze()
        return self._built[key]

    def neurons(self, shape: Shape, language: str) -> list[Tensor]:
        """One index tensor per layer, on the device."""
        return [chosen.to(self.device) for chosen in choose_neurons(self.options, shape, language)[0]]

    def tokens(self, shape: Shape, rows: int, length: int) -> Tensor:
        """Random token ids, int64 ``[R, S]``."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(shape.vocabulary, (rows, length), generator=generator).to(self.device)


def excerpt(base: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A model of a few of the base's layers, on its weights."""
    model = share(base)
    stack = decoder(model).layers
    decoder(model).layers = nn.ModuleList(stack[number] for number in layers)
    model.config.num_hidden_layers = len(layers)
    return model


def check_gradients(
    bench: Workbench, shape: Shape, language: str, peers: Mapping[str, tuple[str | Method, Mapping[str, bool]]]
) -> dict[str, Any]:
    """Compares losses and gradients of the selected weights with fp32 autograd, on the two layers with most neurons.

    The lower of them is the lowest trained one, the upper stands for all others. A peer is right if its gradients are
    no more than ``ERROR_BUDGET`` times as far from fp32 as those of dense training in bf16 are.

    Returns:
        "errors": relative to the norm of the gradients, by peer; "dense_error"; "losses"; "wrong": the peers that are.
    """
    chosen = bench.neurons(shape, language)
    largest = sorted(sorted(range(len(chosen)), key=lambda layer: len(chosen[layer]))[-2:])
    base, neurons = excerpt(bench.base(shape), largest), [chosen[layer] for layer in largest]
    input_ids = bench.tokens(shape, 1, min(512, 4 * shape.hidden))
    right, right_loss = _gradients(build_peer("ffn", copy.deepcopy(base).float(), neurons), input_ids)
    dense, _ = _gradients(build_peer("ffn", base, neurons), input_ids)
    dense_error = _distance(dense, right)
    errors, losses, wrong = {}, {"fp32": right_loss}, []
    for name, (method, setting) in peers.items():
        try:
            peer = build_peer(method, base, neurons, **setting)
        except ImportError as error:
            if not missing_library(error):
                raise
            continue
        gradients, losses[name] = _gradients(peer, input_ids)
        same = abs(losses[name] - right_loss) <= LOSS_TOLERANCE * abs(right_loss)
        if gradients is not None:
            errors[name] = _distance(gradients, right)
            same &= errors[name] <= ERROR_BUDGET * dense_error
        if not same:
            wrong.append(name)
        del peer
        free_memory(bench.device)
    worst = max(errors.values(), default=0.0)
    return {
        "layers": largest,
        "dense_error": dense_error,
        "budget": ERROR_BUDGET,
        "errors": errors,
        "losses": losses,
        "wrong": wrong,
        "shown": f"wrong: {', '.join(wrong)}" if wrong else f"at most {worst / dense_error:.2f} x the dense error",
    }


def _gradients(peer: Peer, input_ids: Tensor) -> tuple[list[Tensor] | None, float]:
    loss = float(peer.backward(input_ids))
    return None if peer.gradients is None else [gradient.float() for gradient in peer.gradients()], loss


def _distance(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The norm of the difference, relative to that of what is right."""
    squares = [((mine - other).square().sum(), other.square().sum()) for mine, other in zip(found, right, strict=True)]
    differences, norms = (torch.stack(parts).sum() for parts in zip(*squares, strict=True))
    return float((differences / norms).sqrt())


def run_case(bench: Workbench, case: Case, wrong: Sequence[str] = (), ceilings: Mapping[str, float] | None = None):
    """Times all peers of a case in rounds, compares them, and reruns what ran out of memory at its largest batch.

    Args:
        bench: where.
        case: what.
        wrong: the peers that ``check_gradients`` found to be.
        ceilings: operations per second by name, for the MFU.
    """
    stage = bench.stage
    for number in range(case.rounds):
        for name in list(case.peers)[:: -1 if number % 2 else 1]:
            key = f"{case.key} {name} round {number}"
            # What did not run in the first round does not in the next one.
            if number == 0 or _row(stage, f"{case.key} {name} round 0").get("status") == "measured":
                measure = functools.partial(time_peer, bench, case, name, case.rows, case.length, wrong)
                stage.measure(key, measure, **case.labels(name), round=number)
    for name in case.peers:
        summary = functools.partial(summarise, bench, case, name, ceilings or {})
        stage.measure(f"{case.key} {name}", summary, **case.labels(name))
    for name in case.peers:
        if _row(stage, f"{case.key} {name}").get("status") == "out of memory":
            find_largest_batch(bench, case, name, wrong, ceilings or {})


def time_peer(
    bench: Workbench, case: Case, name: str, rows: int, length: int, wrong: Sequence[str] = ()
) -> dict[str, Any]:
    """Builds a peer, warms it, times its steps, and gives the base back.

    Returns:
        "step_ms" (the median), "step_ms_of_steps", "loss", "trainable" and the peaks "allocated_gib", "reserved_gib".

    Raises:
        WrongAnswer: its gradients or its loss are.
    """
    if name in wrong:
        raise WrongAnswer(f"The gradients or the loss of {name} are wrong, so it is not timed.")
    device, base = bench.device, bench.base(case.shape, case.quantise)
    free_memory(device)
    method, setting = case.peers[name]
    input_ids = bench.tokens(case.shape, rows, length)
    peer = build_peer(method, base, bench.neurons(case.shape, case.language), copied=False, **setting)
    return close_after(peer, functools.partial(_time_steps, peer, input_ids, bench.options.size))


def close_after(peer: Peer, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns; then the peer gives the base back.

    An error that says that memory is full is raised anew from here: the tensors that its frames held are gone by then,
    and there is room to give the base back.
    """
    full, result = None, {}
    try:
        result = run()
    except Exception as error:
        if not is_out_of_memory(error):
            peer.close()
            raise
        full = str(error)
    if full is not None:
        free_memory(next(peer.model.parameters()).device)
    peer.close()
    if full is not None:
        raise torch.OutOfMemoryError(full)
    return result


def _time_steps(peer: Peer, input_ids: Tensor, size: str) -> dict[str, Any]:
    for _ in range(WARM_UP):
        loss, warm = _timed_step(peer, input_ids)
    if input_ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(input_ids.device)
    steps = min(MOST_STEPS, max(LEAST_STEPS, int(1000 * SECONDS[size] / warm)))
    times = [_timed_step(peer, input_ids)[1] for _ in range(steps)]
    return {
        "step_ms": statistics.median(times),
        "step_ms_of_steps": times,
        "loss": float(loss),
        "trainable": peer.trainable,
        **peak_memory(peer, input_ids),
        "shown": f"{statistics.median(times):,.1f} ms",
    }


def _timed_step(peer: Peer, input_ids: Tensor) -> tuple[Tensor, float]:
    synchronize(input_ids.device)
    start = time.perf_counter()
    loss = peer.step(input_ids)
    synchronize(input_ids.device)
    return loss, 1000 * (time.perf_counter() - start)


def peak_memory(peer: Peer, input_ids: Tensor) -> dict[str, float | None]:
    """GiB: on CUDA the allocator's peaks since they were last reset, on the CPU the live bytes of one more step."""
    device = input_ids.device
    if device.type == "cuda":
        return {
            "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    if peer.optimizer:
        peer.optimizer.zero_grad()
    try:
        peak = peak_bytes(functools.partial(peer.step, input_ids), peer.resident(), device) / GIB
    except NotImplementedError:
        # The live bytes of sparse tensors, as SHiRA's, cannot be followed.
        peak = None
    return {"allocated_gib": peak, "reserved_gib": None}


def summarise(bench: Workbench, case: Case, name: str, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """A peer's row: its median over the rounds, and beside the baseline's.

    Raises:
        torch.OutOfMemoryError, NotMeasured, WrongAnswer: what became of its rounds.
    """
    mine, others = _rounds(bench.stage, case, name), _rounds(bench.stage, case, case.baseline)
    if not mine:
        _raise_outcome(_row(bench.stage, f"{case.key} {name} round 0"))
    rounds, times = list(mine.values()), [row["step_ms"] for row in mine.values()]
    loss, comparison = rounds[0]["loss"], {"ratio": None, "baseline_over_this": None, "ratio_ci": None}
    both = [number for number in mine if number in others]
    if both:
        right = others[both[0]]["loss"]
        if abs(loss - right) > LOSS_TOLERANCE * abs(right):
            raise WrongAnswer(f"The loss of {name} is {loss}, but that of {case.baseline} is {right}.")
        pairs = [mine[number]["step_ms"] for number in both], [others[number]["step_ms"] for number in both]
        ratio, interval = paired_ratio(*pairs)
        comparison = {"ratio": ratio, "baseline_over_this": 1 / ratio, "ratio_ci": interval}
    neurons, source = choose_neurons(bench.options, case.shape, case.language)
    row = {
        "step_ms": statistics.median(times),
        "step_ms_of_rounds": times,
        "baseline": case.baseline,
        **comparison,
        "loss": loss,
        "trainable": rounds[0]["trainable"],
        **{kind: _largest(rounds, kind) for kind in ("allocated_gib", "reserved_gib")},
        "neurons_per_layer": [len(chosen) for chosen in neurons],
        "mask": source,
        **_rates(case.shape, name, rounds[0]["trainable"], case.rows, case.length, statistics.median(times), ceilings),
    }
    goals = {goal: row[column] for goal, column in case.goals.get(name, {}).items()}
    row["goals"] = {goal: value for goal, value in goals.items() if value is not None}
    compared = f"{ratio:.3f} x {case.baseline}, " if both else ""
    row["shown"] = f"{row['step_ms']:,.1f} ms, {compared}{_memory_and_rate(row)}"
    return row


def _rounds(stage: Stage, case: Case, name: str) -> dict[int, dict[str, Any]]:
    """The rounds that were measured, by number."""
    rows = {number: _row(stage, f"{case.key} {name} round {number}") for number in range(case.rounds)}
    return {number: row for number, row in rows.items() if row.get("status") == "measured"}


def _raise_outcome(row: Mapping[str, Any]) -> None:
    """What a measure raised, so that another row says the same."""
    if row.get("status") == "out of memory":
        raise torch.OutOfMemoryError(row["key"])
    raise (NotMeasured if row.get("status") == "not measured" else WrongAnswer)(row.get("why", "not run"))


def _row(stage: Stage, key: str) -> dict[str, Any]:
    return next((row for row in stage.rows if row["key"] == key), {})


def _largest(rows: Sequence[Mapping[str, Any]], kind: str) -> float | None:
    found = [row[kind] for row in rows if row[kind] is not None]
    return max(found, default=None)


def find_largest_batch(
    bench: Workbench, case: Case, name: str, wrong: Sequence[str], ceilings: Mapping[str, float]
) -> None:
    """Halves the rows, and behind the last one its length, until a step of the peer fits."""
    stage, rows, length = bench.stage, case.rows, case.length
    while rows > 1 or length > LEAST_LENGTH:
        rows, length = (rows // 2, length) if rows > 1 else (1, length // 2)

        def measure(rows: int = rows, length: int = length) -> dict[str, Any]:
            row = time_peer(bench, case, name, rows, length, wrong)
            rates = _rates(case.shape, name, row["trainable"], rows, length, row["step_ms"], ceilings)
            row |= {**rates, "largest_batch": [rows, length]}
            return {**row, "shown": f"{row['shown']}, {_memory_and_rate(row)}"}

        key = f"{case.key} {name} at {rows}x{length}"
        stage.measure(key, measure, **case.labels(name))
        if _row(stage, key)["status"] != "out of memory":
            return


def _memory_and_rate(row: Mapping[str, Any]) -> str:
    memory = "" if row["allocated_gib"] is None else f"{row['allocated_gib']:.2f} GiB, "
    return f"{memory}{row['tokens_per_s']:,.0f} tokens/s"


def _rates(
    shape: Shape, name: str, trainable: int, rows: int, length: int, step_ms: float, ceilings: Mapping[str, float]
) -> dict[str, float]:
    """Tokens per second, and which part of each ceiling the useful operations are."""
    per_second = rows * length / (step_ms / 1000)
    useful = useful_flops(shape, name, trainable, length)
    shares = {f"mfu_of_{ceiling}": per_second * useful / speed for ceiling, speed in ceilings.items()}
    return {"tokens_per_s": per_second, "useful_flops_per_token": useful, **shares}


def useful_flops(shape: Shape, name: str, trainable: int, length: int) -> float:
    """Operations per token that training these weights needs: nothing computed twice, no gradient thrown away.

    Two per weight forward, two for its input's gradient and two for the gradient of a trained one. The attention of a
    causal row is half of its square, forward and 2.5 times in a flash kernel's backward.
    """
    multiplied = shape.layers * shape.layer_weights() + shape.vocabulary * shape.hidden
    if name.startswith("lora"):
        multiplied += trainable
    attention = 2 * length * shape.heads * shape.head_size * shape.layers
    return 4 * multiplied + 2 * min(trainable, multiplied) + 3.5 * attention
