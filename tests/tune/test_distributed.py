"""Several processes train what one trains: replicated (DDP), sharded (FSDP2), and under torchrun."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, default_data_collator

from lape_fast.errors import AdapterError, TrainingError, WorkerError
from lape_fast.identify import joined_world
from lape_fast.models import decoder, load_model
from lape_fast.models.layouts import layout_of
from lape_fast.text import open_corpus
from lape_fast.tune import TrainingSettings, attach_subnetwork, callbacks, load_adapter, tune_language, write_adapter
from lape_fast.tune.training import last_checkpoint, pack_documents, train
from tests.identify.processes import KEPT, run_together
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from tests.tune.test_subnetwork import batch, neurons_of
from tests.tune.test_trainers import LANGUAGE, NEURONS, TEXT, config, token_rows

# fp64 rounding of sums in another order, over the steps.
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}


def numbers(tensors):
    """What travels between processes; sharded tensors are gathered, by all processes together."""
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return [tensor.detach().clone().double().numpy() for tensor in whole]


def assert_close(left, right, **tolerance):
    for mine, theirs in zip(left, right, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), **(tolerance or ROUNDING))


def assert_same(left, right):
    assert all((mine == theirs).all() for mine, theirs in zip(left, right, strict=True))


def training(output, text=TEXT, validation=None, dtype=torch.float64, **options):
    """Trains by ``train``; returns the masters, the report, and what went wrong."""

    def run():
        model = tiny_model("llama", dtype=dtype)
        rows, held_out = (each and pack_documents(model, tiny_tokenizer(), each, 32) for each in (text, validation))
        peft_model = get_peft_model(model, config()).train()
        settings = TrainingSettings(
            **{"context_length": 32, "rows_per_step": 8, "learning_rate": 1e-2, "evaluate_every": 2, **options}
        )
        try:
            report = train(peft_model, rows, output, settings, validation=held_out)
        except TrainingError as error:
            KEPT.append(error)
            return None, None, str(error)
        masters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
        log = [entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry]
        return numbers(masters), log, report["steps"]

    return run


def test_two_processes_train_what_one_trains(tmp_path):
    # More than one pass over text whose rows are no multiple of a step's; measured on rows that two cannot share.
    options = {"steps": 11, "validation": TEXT[:7], "patience": 3}
    (alone,) = run_together(training(tmp_path / "alone", **options), 1)
    together = run_together(training(tmp_path / "two", **options), 2)
    passes = run_together(training(tmp_path / "passes", rows_per_pass=2, **options), 2)
    for masters, log, steps in together + passes:
        assert_close(masters, alone[0])
        assert log == pytest.approx(alone[1], rel=1e-9)
        assert steps == alone[2]
    assert_same(together[0][0], together[1][0])
    # Going on with another number of processes is no other run.
    for path in (tmp_path / "two").glob("checkpoint-1*"):
        (path / "trainer_state.json").write_text("{")
    (resumed,) = run_together(training(tmp_path / "two", **options), 1)
    assert_close(resumed[0], alone[0])


def test_all_processes_stop_at_a_gradient_that_is_not_finite_and_name_all_rows(tmp_path):
    found = run_together(training(tmp_path, dtype=torch.float32, steps=9, learning_rate=1e38, warmup=0.0), 2)
    assert [masters for masters, _, _ in found] == [None, None]
    (sentence,) = {sentence for _, _, sentence in found}
    rows = pack_documents(tiny_model("llama"), tiny_tokenizer(), TEXT, 32)
    step = int(sentence.split("step ")[1].split(" ")[0])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[8 * (step - 1) : 8 * step]
    named = ", ".join(map(str, sorted(set(rows.find(rows.columns["input_ids"][order])))))
    assert f"(rows {named} of the packed text)" in sentence


def shard(model, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in decoder(model).get_submodule(layout_of(model).layers):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def steps_by_hand(model, subnetwork, rows):
    """Gradients of the first step, over two passes, and the masters after three."""
    optimizer, gradients = torch.optim.AdamW(subnetwork.parameters(), lr=1e-2), None
    for step in range(3):
        optimizer.zero_grad()
        for number in (2 * step, 2 * step + 1):
            (model(**{name: values[rows] for name, values in batch(number, rows=4).items()}).loss / 2).backward()
        gradients = gradients or numbers(parameter.grad for parameter in subnetwork.parameters())
        torch.nn.utils.clip_grad_norm_(subnetwork.parameters(), 0.1)
        optimizer.step()
    return gradients, numbers(subnetwork.parameters())


CASES = [
    ("llama", torch.float64, "save"),
    ("llama", torch.bfloat16, "recompute"),
    ("llama", torch.bfloat16, "checkpoint"),
    ("phi3", torch.bfloat16, "save"),
]


def alone_by_hand(model_type, dtype, policy):
    model = tiny_model(model_type, dtype=dtype, layers=3).train()
    subnetwork = attach_subnetwork(model, neurons_of(model), policy, storage="overlay")
    return *steps_by_hand(model, subnetwork, slice(None)), subnetwork.fingerprint()


def sharded_by_hand(model_type, dtype, policy, attached_first, output):
    model = tiny_model(model_type, dtype=dtype, layers=3).train()
    base, neurons = copy.deepcopy(model.state_dict()), neurons_of(model)
    if attached_first:
        subnetwork = attach_subnetwork(model, neurons, policy, storage="overlay")
    else:
        shard(model)
        subnetwork = attach_subnetwork(model, neurons, policy)
    if attached_first:
        shard(model)
    rank = dist.get_rank()
    gradients, masters = steps_by_hand(model, subnetwork, slice(2 * rank, 2 * rank + 2))
    output.mkdir(exist_ok=True)
    write_adapter(subnetwork, output, config().to_dict())
    with pytest.raises(AdapterError, match="quantised or sharded"):
        subnetwork.detach(keep=True)
    fingerprint = subnetwork.fingerprint()
    subnetwork.detach(keep=False)
    state = model.state_dict()
    assert list(state) == list(base)
    assert_same(numbers(state.values()), numbers(base.values()))
    return gradients, masters, fingerprint


def test_a_sharded_model_trains_what_a_whole_one_trains(tmp_path):
    def every_case():
        with joined_world():
            return [
                sharded_by_hand(*case, attached_first, tmp_path / f"{number}{attached_first}")
                for number, case in enumerate(CASES)
                for attached_first in (True, False)
            ]

    expected = [alone_by_hand(*case) for case in CASES for _ in range(2)]
    found = run_together(every_case, 2)
    assert_same([*found[0][1][0], *found[0][1][1]], [*found[1][1][0], *found[1][1][1]])
    for results in found:
        for (_, dtype, _), result, (gradients, masters, fingerprint) in zip(
            [case for case in CASES for _ in range(2)], results, expected, strict=True
        ):
            # Each process's gradient is a sum in the masters' fp32; what they are sums of is the same bits.
            tolerance = ROUNDING if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
            assert_close(result[0], gradients, **tolerance)
            assert_close(result[1], masters, **tolerance)
            assert result[2] == fingerprint
    for number, (_, dtype, _) in enumerate(CASES):
        for attached_first in (True, False):
            folder = tmp_path / f"{number}{attached_first}"
            saved = load_file(folder / "adapter_model.safetensors")
            masters = found[0][2 * number + (not attached_first)][1]
            assert len(saved) == len(masters)
            for values, master in zip(sorted(saved.values(), key=sort_key), sorted(masters, key=sort_key), strict=True):
                assert torch.equal(values, torch.tensor(master).to(dtype))


def sort_key(values):
    return tuple(values.shape), float(values.sum())


def test_a_sharded_model_in_mixed_precision_keeps_fp32_masters():
    """Where FSDP gathers everything in bf16, the masters' share of each process stays fp32."""

    def run():
        with joined_world() as world:
            model = tiny_model("llama", layers=3).train()
            subnetwork = attach_subnetwork(model, neurons_of(model), storage="overlay")
            shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
            gradients, _ = steps_by_hand(model, subnetwork, slice(2 * world.rank, 2 * world.rank + 2))
            assert {master.dtype for master in subnetwork.parameters()} == {torch.float32}
        return gradients

    model = tiny_model("llama", layers=3).bfloat16().train()
    subnetwork = attach_subnetwork(model, neurons_of(model), storage="overlay")
    expected, _ = steps_by_hand(model, subnetwork, slice(None))
    for found in run_together(run, 2):
        for mine, theirs in zip(found, expected, strict=True):
            difference, size = torch.tensor(mine - theirs).norm(), torch.tensor(theirs).norm()
            # Sums of products rounded to 8 bits each, in another order: a few roundings in one direction.
            assert difference < 8 * torch.finfo(torch.bfloat16).eps * size


def test_resident_values_in_a_model_that_is_sharded_later_are_refused():
    def run():
        with joined_world():
            model = tiny_model("llama").train()
            subnetwork = attach_subnetwork(model, neurons_of(model, [2, 2]))
            shard(model)
            with pytest.raises(TrainingError, match="were sharded after .* attach it with storage='overlay'"):
                steps_by_hand(model, subnetwork, slice(0, 2))
        return True

    assert run_together(run, 2) == [True, True]


def take_fsdp_on_cpu():
    """accelerate shards on accelerators only and says nothing elsewhere; its state as two GPUs would make it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )
    Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def trainer_run(output, sharded, resume=None):
    def run():
        with joined_world() as world:
            peft_model = get_peft_model(tiny_model("llama", dtype=torch.bfloat16), config(storage="overlay"))
            before = numbers(frozen(peft_model))
            arguments = TrainingArguments(
                output_dir=str(output),
                max_steps=4,
                per_device_train_batch_size=4 // world.size,
                learning_rate=1e-2,
                save_steps=2,
                use_cpu=True,
                disable_tqdm=True,
                train_sampling_strategy="sequential",
                **(
                    {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
                    if sharded
                    else {}
                ),
            )
            if sharded:
                take_fsdp_on_cpu()
            trainer = Trainer(
                model=peft_model.train(),
                args=arguments,
                train_dataset=token_rows(),
                data_collator=default_data_collator,
            )
            trainer.train(resume_from_checkpoint=resume)
            trainer.save_model(str(output / "final"))
            world.wait()
            trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
            assert all(isinstance(parameter, DTensor) == sharded for parameter in trained)
            assert_same(numbers(frozen(peft_model)), before)
            return numbers(trained)

    return run


def frozen(model):
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]


def test_the_trainer_shards_saves_and_resumes(tmp_path):
    (alone,) = run_together(trainer_run(tmp_path / "alone", False), 1)
    straight = run_together(trainer_run(tmp_path / "sharded", True), 2)
    resumed = run_together(trainer_run(tmp_path / "sharded", True, str(tmp_path / "sharded" / "checkpoint-2")), 2)
    for masters in straight + resumed:
        assert_same(masters, straight[0])
        # Half of a sum in fp32 comes from each process.
        assert_close(masters, alone, rtol=1e-4, atol=1e-6)
    # The adapter is whole and is anybody's: a model that knows nothing of processes computes with it.
    model = tiny_model("llama", dtype=torch.bfloat16)
    subnetwork = load_adapter(model, tmp_path / "sharded" / "final")
    assert_same(numbers(subnetwork.parameters()), straight[0])
    assert not (tmp_path / "sharded" / "final" / "model.safetensors").exists()


def test_a_process_that_fails_is_one_sentence_in_the_others(tmp_path):
    def run():
        def fail(self, args, state, control, **kwargs):
            if state.global_step == 3 and os.environ["RANK"] == "1":
                raise OSError("no space left")

        callbacks.Interruption.on_step_begin = fail
        with pytest.raises(WorkerError if os.environ["RANK"] == "0" else OSError) as raised:
            training(tmp_path, steps=9, save_every=2)()
        KEPT.append(raised)
        return str(raised.value)

    first, second = run_together(run, 2)
    assert first.startswith("Another process of this run has ended")
    assert second == "no space left"
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_torchrun_tunes_what_one_process_tunes_and_writes_it_once(tmp_path):
    base = save_tiny(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / f"{LANGUAGE}.txt").write_text("\n".join(TEXT), encoding="utf-8")
    NEURONS.save(tmp_path / "neurons.safetensors")

    options = {"context-length": 32, "rows-per-step": 4, "steps": 6, "learning-rate": 0.01, "device": "cpu"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lape_fast",
    ]
    command += ["tune", "--model", base, "--corpus", tmp_path / "texts", "--language", LANGUAGE, "--json"]
    command += ["--neurons", tmp_path / "neurons.safetensors", "--output", tmp_path / "two"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    # One process prints, once.
    assert json.loads(done.stdout)["steps"] == 6
    model, tokenizer = load_model(base, device="cpu")
    settings = TrainingSettings(context_length=32, rows_per_step=4, steps=6, learning_rate=0.01)
    before = get_peft_model(load_model(base, device="cpu")[0], config()).state_dict()
    tune_language(model, tokenizer, open_corpus(tmp_path / "texts"), config(), tmp_path / "one", settings)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, values in one.items():
        # Rounding in fp32, which Adam's division blows up where a gradient is all but zero.
        change = (values - before[f"{name}.default"]).norm()
        assert (two[name] - values).norm() < 1e-3 * change
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "neurons.safetensors", "one", "texts", "two"]
    one, two = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    # The command draws what the function records.
    assert two == one | {"training-dynamics.png", "training-dynamics.svg", "report.html"}
