"""A subnetwork in the trainers that people have: transformers' Trainer, TRL's SFTTrainer, a loop with accelerate."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, default_data_collator

from lape_fast.errors import AdapterError, CorpusError, StoppedError, TrainingError
from lape_fast.identify import NeuronSet
from lape_fast.tune import SubnetworkConfig, TrainingSettings, callbacks
from lape_fast.tune.subnetwork import installed_layers
from lape_fast.tune.training import Steps, last_checkpoint, pack_documents, train
from tests.tiny_models import VOCABULARY, save_tiny, tiny_model, tiny_tokenizer

LANGUAGE = "mlt_Latn"
NEURONS = NeuronSet.from_lists({LANGUAGE: [[1, 5, 40], [0, 2]]}, neurons_per_layer=48)
TEXT = [f"Il-qattus numru {number} qagħad fuq it-tapit il-kbir." for number in range(40)]


def config(**options):
    return SubnetworkConfig(neurons=NEURONS, language=LANGUAGE, **options)


def token_rows(number=24, length=16):
    """Rows of random ids; of every third row only the last few tokens are to be predicted."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(number):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: 11 if row % 3 == 0 else 0] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def arguments(output, **options):
    standard = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(output), **{**standard, **options})


def trainer_of(model, output, optimizer=None, validation=None, **options):
    return Trainer(
        model=model.train(),
        args=arguments(output, **options),
        train_dataset=token_rows(),
        eval_dataset=validation,
        data_collator=default_data_collator,
        optimizers=(optimizer, None),
    )


def masters(model):
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def trained_masters(output, dtype=torch.float64, **options):
    """What the Trainer makes of a fresh model."""
    model = get_peft_model(tiny_model("llama", dtype=dtype), config(**options.pop("config", {})))
    trainer_of(model, output, **options).train()
    return masters(model)


def assert_base_holds_masters(model):
    for layer in installed_layers(model):
        for part, master in layer.masters().items():
            held = layer.base_weight(part)[layer.neurons()]
            assert torch.equal(held, master.to(held.dtype))


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, **options)


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        (torch.float32, "adamw_torch_fused"),
        (torch.bfloat16, "adamw_torch_fused"),
        (torch.bfloat16, adamw(foreach=True)),
        (torch.bfloat16, adamw(foreach=False)),
        (torch.bfloat16, "sgd"),
        (torch.bfloat16, "adafactor"),
    ],
    ids=["fp32", "fused", "foreach", "plain", "sgd", "adafactor"],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, dtype, optimizer):
    def run(resume):
        model = tiny_model("llama", dtype=dtype)
        peft_model = get_peft_model(model, config())
        before = masters(peft_model)
        named = isinstance(optimizer, str)
        options = {"optim": optimizer} if named else {}
        mine = None if named else optimizer([p for p in peft_model.parameters() if p.requires_grad])
        trainer_of(peft_model, tmp_path, mine, **options).train(resume_from_checkpoint=resume)
        after = masters(peft_model)
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert_base_holds_masters(model)
        return [*after, *model.state_dict().values()]

    straight, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(left, right) for left, right in zip(straight, resumed, strict=True))
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert {values.dtype for values in saved.values()} == {torch.float32}
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_transformers_own_adapters_train_and_their_checkpoints_load(tmp_path):
    model, again = (tiny_model("llama", dtype=torch.bfloat16) for _ in range(2))
    model.add_adapter(config())
    trainer_of(model, tmp_path).train()
    assert_base_holds_masters(model)
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    again.load_adapter(str(tmp_path / "checkpoint-4"))
    ids = token_rows()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_eight_rows_at_once_are_eight_passes_of_one(tmp_path):
    together = trained_masters(tmp_path / "1x8", per_device_train_batch_size=8)
    passes = trained_masters(tmp_path / "8x1", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    # The same sums in fp64 in another order, though the rows have unequal numbers of tokens to predict.
    for left, right in zip(together, passes, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_the_trainers_own_switches_change_nothing(tmp_path):
    plain = trained_masters(tmp_path / "plain")
    for name, options in {
        "checkpointing": {"activation_checkpointing": True},
        "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        "policy": {"config": {"policy": "checkpoint"}},
        "overlay": {"config": {"storage": "overlay"}},
    }.items():
        for left, right in zip(plain, trained_masters(tmp_path / name, **options), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, msg=name)
    torch._dynamo.reset()


def test_mixed_precision_learns_what_full_precision_learns(tmp_path):
    exact = trained_masters(tmp_path / "exact", torch.float32, optim="sgd", learning_rate=1.0)
    start = masters(get_peft_model(tiny_model("llama"), config()))
    mixed = trained_masters(tmp_path / "mixed", torch.float32, optim="sgd", learning_rate=1.0, bf16=True)
    for left, right, old in zip(mixed, exact, start, strict=True):
        assert left.dtype == torch.float32
        # A sum of products rounded to 8 bits each; 3 % of the change allows for 8 roundings in one direction.
        assert (left - right).norm() < 8 * torch.finfo(torch.bfloat16).eps * (right - old).norm()


def test_the_best_values_are_in_the_base_when_training_ends(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    peft_model = get_peft_model(model, config())
    # The best of a loss that falls shall be the highest, so that it is not the last.
    trainer = trainer_of(
        peft_model,
        tmp_path,
        validation=token_rows(),
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_global_step < 8
    best = load_file(os.path.join(trainer.state.best_model_checkpoint, "adapter_model.safetensors"))
    assert_base_holds_masters(model)
    for name, values in best.items():
        path, part = name.removeprefix("base_model.model.").rsplit(".", 1)
        layer = model.get_submodule(path)
        assert torch.equal(layer.base_weight(part)[layer.neurons()], values.bfloat16())


@pytest.mark.parametrize("packing", [False, True])
def test_trls_sft_trainer_trains_and_resumes(tmp_path, packing):
    from trl import SFTConfig, SFTTrainer

    def run(resume):
        model = tiny_model("llama", dtype=torch.bfloat16)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=2,
                save_steps=2,
                logging_steps=1,
                learning_rate=1e-2,
                max_length=48,
                packing=packing,
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=Dataset.from_dict({"text": TEXT}),
            processing_class=copy.deepcopy(tiny_tokenizer()),
            peft_config=config(),
        )
        trainer.train(resume_from_checkpoint=resume)
        assert_base_holds_masters(model)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return masters(trainer.model), losses

    (straight, losses), (resumed, _) = run(None), run(str(tmp_path / "checkpoint-2"))
    assert losses[-1] < losses[0]
    assert all(torch.equal(left, right) for left, right in zip(straight, resumed, strict=True))
    assert all(values.dtype == torch.float32 for values in straight)
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


@pytest.mark.parametrize("storage", ["resident", "overlay"])
def test_trls_dpo_trainer_takes_the_base_for_its_reference(tmp_path, storage):
    from trl import DPOConfig, DPOTrainer

    model = tiny_model("llama", dtype=torch.bfloat16)
    columns = {"prompt": "Il-qattus", "chosen": " qagħad fuq it-tapit.", "rejected": " sat on the mat."}
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({name: [text] * 8 for name, text in columns.items()}),
        processing_class=copy.deepcopy(tiny_tokenizer()),
        peft_config=config(storage=storage),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Before the first step the model is its own reference.
    assert losses[-1] < losses[0] == pytest.approx(math.log(2), abs=1e-4)


def test_another_adapter_may_be_the_reference():
    def gradients(between):
        model = get_peft_model(tiny_model("llama", dtype=torch.bfloat16), config()).train()
        model.add_adapter("reference", config())
        row = {name: values[None] for name, values in token_rows()[0].items()}
        loss = model(**row).loss
        if between:
            model.set_adapter("reference")
            with torch.no_grad():
                model(**row)
            model.set_adapter("default")
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for left, right in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(left, right)


def test_new_tokens_that_trl_wants_trained_are_refused_in_words(tmp_path):
    from trl import SFTConfig, SFTTrainer

    other = copy.deepcopy(tiny_tokenizer())
    other.add_tokens(["<|im_start|>"], special_tokens=True)
    other.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="trains no other weights.*trainable_token_indices"):
        SFTTrainer(
            model=tiny_model("llama"),
            args=SFTConfig(
                output_dir=str(tmp_path), chat_template_path=str(tmp_path / "other"), use_cpu=True, bf16=False
            ),
            train_dataset=Dataset.from_dict({"text": TEXT}),
            processing_class=copy.deepcopy(tiny_tokenizer()),
            peft_config=config(),
        )


def test_a_loop_with_accelerate_saves_and_loads_its_state(tmp_path):
    def prepared():
        accelerator = Accelerator(cpu=True)
        model = get_peft_model(tiny_model("llama", dtype=torch.bfloat16), config()).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        batches = torch.utils.data.DataLoader(token_rows(), batch_size=2)
        return accelerator, *accelerator.prepare(model, optimizer, batches)

    def steps(accelerator, model, optimizer, batches, first, last):
        for batch in itertools.islice(batches, first, last):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert_base_holds_masters(model)

    prepared_run = prepared()
    steps(*prepared_run, 0, 2)
    prepared_run[0].save_state(str(tmp_path))
    steps(*prepared_run, 2, 4)
    resumed_run = prepared()
    resumed_run[0].load_state(str(tmp_path))
    assert_base_holds_masters(resumed_run[1])
    steps(*resumed_run, 2, 4)
    for left, right in zip(masters(prepared_run[1]), masters(resumed_run[1]), strict=True):
        assert torch.equal(left, right)


SETTINGS = TrainingSettings(context_length=32, rows_per_step=2, steps=6, learning_rate=1e-2, save_every=2)


def packed(dtype=torch.float32, text=TEXT):
    model = tiny_model("llama", dtype=dtype)
    rows = pack_documents(model, tiny_tokenizer(), text, 32)
    return get_peft_model(model, config()).train(), rows


def during(monkeypatch, step, action):
    """Does something after this many steps of ``train``."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            action()

    monkeypatch.setattr(callbacks.Progress, "on_step_begin", on_step_begin)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_from_which_the_run_goes_on(tmp_path, monkeypatch, number):
    straight, rows = packed(torch.bfloat16)
    train(straight, rows, tmp_path / "straight", SETTINGS)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="after step 4 of 6; the same command"):
        during(patch, 3, lambda: os.kill(os.getpid(), number))
        train(packed(torch.bfloat16)[0], rows, tmp_path / "stopped", SETTINGS)
    assert signal.getsignal(number) is handler
    assert last_checkpoint(tmp_path / "stopped") == str(tmp_path / "stopped" / "checkpoint-4")
    resumed, _ = packed(torch.bfloat16)
    train(resumed, rows, tmp_path / "stopped", SETTINGS)
    assert all(torch.equal(left, right) for left, right in zip(masters(straight), masters(resumed), strict=True))


def test_a_checkpoint_that_a_kill_left_half_written_is_skipped(tmp_path):
    model, rows = packed()
    train(model, rows, tmp_path, SETTINGS)
    newest = tmp_path / "checkpoint-6" / "trainer_state.json"
    newest.write_text(newest.read_text()[:40])
    (tmp_path / "checkpoint-8").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    newest.write_text("")
    again, _ = packed()
    train(again, rows, tmp_path, SETTINGS)
    assert all(torch.equal(left, right) for left, right in zip(masters(model), masters(again), strict=True))


def test_a_gradient_that_is_not_finite_stops_the_run_at_the_last_good_values(tmp_path, monkeypatch):
    model, rows = packed()

    def spoil():
        model.base_model.model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = torch.nan

    with monkeypatch.context() as patch, pytest.raises(TrainingError) as raised:
        during(patch, 3, spoil)
        train(model, rows, tmp_path, SETTINGS)
    order = Steps(rows, 8, SETTINGS.seed).order
    # Of rows with the same text the first is named.
    named = ", ".join(map(str, sorted(rows.find(rows.columns["input_ids"][order[6:8]]))))
    assert f"The gradient of step 4 (rows {named} of the packed text) is not finite" in str(raised.value)
    assert "lower the learning rate" in str(raised.value)
    assert all(values.isfinite().all() for values in masters(model))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_step_without_anything_to_predict_is_a_step_of_no_gradient(tmp_path):
    model, rows = packed()
    order = Steps(rows, 4, SETTINGS.seed).order
    rows.columns["labels"][order] = -100
    before = masters(model)
    short = TrainingSettings(**{**vars(SETTINGS), "steps": 2, "weight_decay": 0.0})
    train(model, rows, tmp_path / "short", short)
    assert all(torch.equal(left, right) for left, right in zip(masters(model), before, strict=True))
    report = train(model, rows, tmp_path / "long", SETTINGS)
    assert report["train_loss"] > 0
    assert all(values.isfinite().all() for values in masters(model))


def test_rows_without_anything_to_predict_are_left_out():
    # BLOOM's positions cannot restart, so each of its documents has a row of its own.
    model = tiny_model("bloom")
    rows = pack_documents(model, tiny_tokenizer(), ["", "abc", ""], 8)
    assert len(rows) == 1
    assert (rows[0]["labels"][1:] != -100).sum() == 3
    with pytest.raises(CorpusError, match="The 2 documents hold no token to predict"):
        pack_documents(model, tiny_tokenizer(), ["", ""], 8)


def held_out():
    return pack_documents(tiny_model("llama"), tiny_tokenizer(), ["Il-bieb u l-mejda."] * 8, 32)


def test_training_stops_when_nothing_gets_better_and_the_base_has_the_best(tmp_path):
    model, rows = packed(torch.bfloat16, ["qqqqqqqqqqqqqqqqqqqqqqqqqq"] * 40)
    settings = TrainingSettings(
        context_length=32, rows_per_step=8, steps=60, learning_rate=0.1, evaluate_every=2, patience=3, warmup=0.0
    )
    report = train(model, rows, tmp_path, settings, validation=held_out())
    measured = [entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry]
    assert report["steps"] == 2 * len(measured) < 60
    # Of the last four measurements the first is the best, and no later one was as good.
    assert len(measured) - 1 - measured.index(min(measured)) == 3
    assert_base_holds_masters(model)


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_the_learning_rate_follows_the_schedule(tmp_path, schedule):
    model, rows = packed()
    changes = {"steps": 20, "schedule": schedule, "warmup": 0.25}
    report = train(model, rows, tmp_path, TrainingSettings(**{**vars(SETTINGS), **changes}))
    rates = [entry["learning_rate"] for entry in report["log"] if "learning_rate" in entry]
    assert len(rates) == 20
    # Five steps of warm-up; the peak is reached at the sixth, and transformers' `constant` has none.
    assert max(rates) == rates[5] == 1e-2
    assert rates[0] == (1e-2 if schedule == "constant" else 0.0)
    assert (rates[-1] < 1e-3) == (schedule != "constant")


def test_rows_per_pass_changes_the_sums_order_alone(tmp_path):
    runs = []
    for rows_per_pass in (None, 1, 4):
        model, rows = packed(torch.float64)
        # Steps that reach over the end of the text, which is no multiple of a step.
        steps = 2 * len(rows) // 8 + 1
        settings = TrainingSettings(
            context_length=32, rows_per_step=8, rows_per_pass=rows_per_pass, steps=steps, learning_rate=1e-2
        )
        assert len(rows) % 8
        report = train(model, rows, tmp_path / str(rows_per_pass), settings)
        assert report["log"][-1]["epoch"] == pytest.approx(steps * 8 / len(rows), abs=1e-4)
        runs.append(masters(model))
    for other in runs[1:]:
        for left, right in zip(runs[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_several_visible_gpus_make_no_data_parallel(tmp_path, monkeypatch):
    alone, rows = packed()
    train(alone, rows, tmp_path / "alone", SETTINGS)
    finish = TrainingArguments.__post_init__

    def see_four_gpus(self):
        finish(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", see_four_gpus)
    assert arguments(tmp_path).train_batch_size == 8
    among_four, _ = packed()
    report = train(among_four, rows, tmp_path / "four", SETTINGS)
    assert report["steps"] == 6
    assert all(torch.equal(left, right) for left, right in zip(masters(alone), masters(among_four), strict=True))


def test_ctrl_c_in_the_command_is_one_sentence_and_a_checkpoint(tmp_path):
    base = save_tiny(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / f"{LANGUAGE}.txt").write_text("\n".join(TEXT), encoding="utf-8")
    NEURONS.save(tmp_path / "neurons.safetensors")
    command = [sys.executable, "-m", "lape_fast", "tune", "--model", base, "--corpus", tmp_path / "texts"]
    command += ["--neurons", tmp_path / "neurons.safetensors", "--language", LANGUAGE, "--output", tmp_path / "adapter"]
    command += ["--context-length", "32", "--rows-per-step", "2", "--steps", "1000000"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    workspace = tmp_path / "adapter.checkpoints"
    while last_checkpoint(workspace) is None:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 130
    step = int(last_checkpoint(workspace).rpartition("-")[2])
    assert said == f"Interrupted after step {step} of 1000000; the same command goes on from there."
    assert step % 200
