"""Models that compute their loss without logits: the stock loss and gradients, and everything else left alone."""

from __future__ import annotations

import copy
import inspect
import sys

import pytest
import torch
from torch import nn

from lape_fast.errors import ArchitectureError, ShapeError, TrainingError
from lape_fast.models import find_ffns, without_logits
from tests.ops.oracles import LargestTensor
from tests.tiny_models import DENSE_TYPES, EXPERT_TYPES, TINY_TYPES, VOCABULARY, tiny_model

ROWS, LENGTH = 2, 24

# What would show if a scale or a cap were forgotten, or applied where the model's own code does not.
FIELDS = {
    "gemma2": {"final_logit_softcapping": 1.5},
    "gemma3_text": {"final_logit_softcapping": 1.5},
    "gemma3": {"final_logit_softcapping": 1.5},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "opt": {"word_embed_proj_dim": 16},
}


def frozen(model_type: str, **arguments) -> nn.Module:
    """A model whose last FFN's output projection alone is trained, so that a loss has a gradient to compare."""
    model = tiny_model(model_type, **{**FIELDS.get(model_type, {}), **arguments}).requires_grad_(False)
    last = find_ffns(model)[-1]
    (last.projections["down"].weight if model_type in DENSE_TYPES else last._module.down_proj).requires_grad_()
    return model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = input_ids.clone()
    labels[0, 5:9] = -100
    return {"input_ids": input_ids, "labels": labels}


def packed() -> torch.Tensor:
    """Position ids of two documents per row."""
    position_ids = torch.arange(LENGTH).repeat(ROWS, 1)
    position_ids[:, 9:] -= 9
    return position_ids


def padding() -> torch.Tensor:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[1, -6:] = 0
    return mask


CALLS = {
    "plain": {},
    "packed": {"position_ids": packed(), "use_cache": False},
    "padded": {"attention_mask": padding()},
    "number in a tensor": {"num_items_in_batch": torch.tensor(17)},
    "number": {"num_items_in_batch": 17},
    "shifted labels": {"shift_labels": batch()["labels"].roll(-2, dims=1)},
    "all hidden states": {"output_hidden_states": True},
}


def run(model: nn.Module, **arguments):
    """The output and the gradients of a call."""
    model.zero_grad()
    output = model(**arguments)
    output.loss.backward()
    return output, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model_type", TINY_TYPES)
def test_the_loss_and_the_gradients_are_the_stock_models(model_type, call):
    model = frozen(model_type)
    arguments = {**batch(), **CALLS[call]}
    stock, right = run(model, **arguments)
    with without_logits(model):
        ours, gradients = run(model, **arguments)
    assert ours.logits is None
    # Both in fp32, with the logits' gradients rounded once more or less; tolerances of torch.testing for fp32.
    torch.testing.assert_close(ours.loss, stock.loss)
    torch.testing.assert_close(gradients, right)
    assert len(gradients) == 1
    if call == "all hidden states":
        torch.testing.assert_close(ours.hidden_states, stock.hidden_states)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere"])
def test_bfloat16(model_type):
    model = frozen(model_type, dtype=torch.bfloat16)
    stock, right = run(model, **batch())
    with without_logits(model):
        ours, gradients = run(model, **batch())
    assert ours.loss.dtype == stock.loss.dtype == torch.float32
    # The same bf16 logits and fp32 statistics.
    torch.testing.assert_close(ours.loss, stock.loss)
    # The gradient of the logits is rounded to bf16 before its division by the number of tokens rather than after.
    difference, largest = (gradients[0] - right[0]).abs().max(), right[0].abs().max()
    assert difference <= 4 * torch.finfo(torch.bfloat16).eps * largest


def test_inputs_embeds_and_positional_arguments():
    model, arguments = frozen("llama"), batch()
    embeds = model.get_input_embeddings()(arguments["input_ids"])
    stock = model(inputs_embeds=embeds, labels=arguments["labels"])
    with without_logits(model):
        torch.testing.assert_close(model(inputs_embeds=embeds, labels=arguments["labels"]).loss, stock.loss)
        torch.testing.assert_close(model(arguments["input_ids"], None, labels=arguments["labels"]).loss, stock.loss)
        pieces = model(**arguments, return_dict=False, use_cache=False)
    assert isinstance(pieces, tuple) and len(pieces) == 1
    torch.testing.assert_close(pieces[0], stock.loss)


@pytest.mark.parametrize("kept", [{"logits_to_keep": torch.arange(LENGTH)}, {"ignore_index": 7}, {"labels": None}])
def test_whoever_asks_for_logits_gets_the_stock_call(kept):
    model = frozen("llama")
    arguments = {**batch(), **kept}
    if "ignore_index" in kept:
        arguments["labels"] = arguments["input_ids"]
    stock = model(**arguments)
    with without_logits(model):
        ours = model(**arguments)
    assert ours.logits.equal(stock.logits)
    assert ours.loss is stock.loss is None or ours.loss.equal(stock.loss)


def test_generation_is_left_alone():
    model = frozen("llama")
    prompt = batch()["input_ids"][:1, :5]
    right = model.generate(prompt, max_new_tokens=4, do_sample=False)
    with without_logits(model):
        assert model.generate(prompt, max_new_tokens=4, do_sample=False).equal(right)


def test_no_logits_are_ever_held(monkeypatch):
    # The function of the same name hides the module from all but this table.
    monkeypatch.setattr(sys.modules["lape_fast.ops.linear_cross_entropy"], "CHUNK_ROWS", 8)
    model = frozen("llama")
    with LargestTensor() as stock:
        run(model, **batch())
    with without_logits(model), LargestTensor() as ours:
        run(model, **batch())
    assert stock.elements == ROWS * LENGTH * VOCABULARY
    # All else in this model is smaller than its logits.
    assert ours.elements < stock.elements


def test_it_is_undone():
    model, other = frozen("llama"), frozen("llama")
    signature = inspect.signature(model.forward)
    undoing = without_logits(model)
    assert inspect.signature(model.forward) == signature
    assert model(**batch()).logits is None
    assert other(**batch()).logits is not None
    undoing.close()
    assert model(**batch()).logits is not None and "forward" not in vars(model)
    undoing.close()
    with pytest.raises(ZeroDivisionError), without_logits(model):
        raise ZeroDivisionError
    assert "forward" not in vars(model)


def test_it_is_undone_below_what_others_installed():
    model = frozen("llama")
    undoing = without_logits(model)
    ours = model.forward
    model.forward = type(ours)(lambda self, *args, **kwargs: ours(*args, **kwargs), model)
    above = model.forward
    assert model(**batch()).logits is None
    undoing.close()
    assert model.forward == above and model(**batch()).logits is not None


def test_a_deep_copy_runs_itself():
    model = frozen("llama")
    with without_logits(model):
        copied = copy.deepcopy(model)
        copied.get_output_embeddings().weight.data.zero_()
        # All words are equally likely without a head.
        assert copied(**batch()).loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item())
        assert model(**batch()).loss.item() != pytest.approx(torch.tensor(VOCABULARY).log().item())


def test_autocast():
    model = frozen("llama")
    with torch.autocast("cpu", torch.bfloat16):
        stock, right = run(model, **batch())
        with without_logits(model):
            ours, gradients = run(model, **batch())
    torch.testing.assert_close(ours.loss, stock.loss)
    difference, largest = (gradients[0] - right[0]).abs().max(), right[0].abs().max()
    # As in bfloat16.
    assert difference <= 4 * torch.finfo(torch.bfloat16).eps * largest


def test_gradient_checkpointing():
    model = frozen("llama").train()
    stock, right = run(model, **batch())
    model.gradient_checkpointing_enable()
    with without_logits(model):
        ours, gradients = run(model, **batch(), use_cache=False)
    torch.testing.assert_close(ours.loss, stock.loss)
    torch.testing.assert_close(gradients, right)


def test_torch_compile():
    model = frozen("llama")
    stock, right = run(model, **batch(), use_cache=False)
    with without_logits(model):
        compiled = torch.compile(model, backend="aot_eager")
        model.zero_grad()
        loss = compiled(**batch(), use_cache=False).loss
        loss.backward()
    torch.testing.assert_close(loss, stock.loss)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters() if parameter.requires_grad], right)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainer_trains_the_same(tmp_path, precision):
    from transformers import Trainer, TrainingArguments, default_data_collator

    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in torch.randint(3, VOCABULARY, (16, LENGTH), generator=generator):
        labels = row.clone()
        # Steps of unequally many labels, which num_items_in_batch evens out over accumulated batches.
        labels[: int(row[0]) % 20] = -100
        rows.append({"input_ids": row, "labels": labels})

    def train(model: nn.Module) -> tuple[list[float], float]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            bf16=precision == "bf16",
            prediction_loss_only=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.evaluate()["eval_loss"]

    stock = train(frozen("llama"))
    model = frozen("llama")
    with without_logits(model):
        ours = train(model)
    assert len(stock[0]) == 3 and stock[0][0] != stock[0][2]
    # Adam's steps magnify roundings where a gradient is about zero, in bf16 those of the gradients' eight bits.
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert ours[0] == pytest.approx(stock[0], rel=tolerance)
    assert ours[1] == pytest.approx(stock[1], rel=tolerance)
    assert model(**batch()).logits is not None


def test_a_trained_head_is_refused_when_it_is_trained():
    model = tiny_model("llama")
    with without_logits(model):
        with pytest.raises(TrainingError, match="The head's weight needs a gradient"):
            model(**batch())
        with torch.no_grad():
            assert model(**batch()).loss.isfinite()


def test_labels_of_another_shape_are_refused():
    model, arguments = frozen("llama"), batch()
    with without_logits(model), pytest.raises(ShapeError, match="one per row"):
        model(input_ids=arguments["input_ids"], labels=arguments["labels"][:, 1:])


def test_models_it_cannot_serve_are_refused():
    model = frozen("llama")
    with pytest.raises(ArchitectureError, match="but a NoneType"):
        without_logits(model.model)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ArchitectureError, match="no plain linear layer but a Sequential"):
        without_logits(model)
    model = frozen("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ArchitectureError, match="torch.int8 weights"):
        without_logits(model)
    model = frozen("llama")
    model.loss_function = lambda **arguments: None
    with pytest.raises(ArchitectureError, match="a loss of its own"):
        without_logits(model)
    model = frozen("llama")
    model.forward = lambda **arguments: None
    with pytest.raises(ArchitectureError, match="no method"):
        without_logits(model)


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
def test_the_loss_of_the_routers_is_refused_or_left_to_the_model(model_type):
    model = frozen(model_type)
    stock = model(**batch(), output_router_logits=True)
    with without_logits(model):
        assert model(**batch(), output_router_logits=True).loss.equal(stock.loss)
    model = frozen(model_type, output_router_logits=True)
    with pytest.raises(ArchitectureError, match="output_router_logits"):
        without_logits(model)
