"""Where each architecture keeps its feed-forward network (FFN), as one table.

Every FFN computes ``down(activation(gate(x)) * up(x))``, or ``down(activation(gate(x)))`` where it has no up
projection; in a mixture of experts every expert does. An architecture is one row of ``LAYOUTS``; nothing else in
lape_fast knows any architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from lape_fast.errors import ArchitectureError


@dataclass(frozen=True)
class Layout:
    """What the table says about every architecture; the defaults are Llama's.

    Attributes:
        decoder: path from the model without its head to the module that maps token ids to hidden states.
        layers: path from the decoder to its list of layers.
        norm: name of the decoder's norm behind its last layer, which a decoder may hold as None.
        activation_field: the config's field that names the activation.
        activation_name: the activation itself, where the code fixes it whatever the config says.
        must_be_off: config fields that make the model's code go around the modules named here.
        packing: whether position_ids that restart keep attention inside documents.
        position_ids: whether the decoder takes position_ids at all.
        logit_scale_field: the config's field with the number that the head's output is multiplied by; None for none.
        logit_softcap_field: the field with the c of c * tanh(logits / c), which may itself be None; None for no cap.
    """

    decoder: str = ""
    layers: str = "layers"
    norm: str = "norm"
    activation_field: str = "hidden_act"
    activation_name: str | None = None
    must_be_off: tuple[str, ...] = ()
    packing: bool = True
    position_ids: bool = True
    logit_scale_field: str | None = None
    logit_softcap_field: str | None = None


@dataclass(frozen=True)
class DenseLayout(Layout):
    """An architecture whose layers have one FFN each.

    Attributes:
        replaced: path within a layer to the module that ``FFN.replace`` exchanges.
        gate, up, down: paths within a layer to the projections; up is None in an ungated FFN, and equal to gate
            where one fused projection computes the gate's neurons and then up's.
        identities: paths within a layer to what ``FFN.replace`` turns into ``nn.Identity``, because ``replaced``
            covers the input projection only; in the order of the computation.
        transposed: whether the projections are GPT-2's Conv1D, which stores [inputs, outputs].
        ffn_norm: path within a layer to the norm whose output goes into the FFN and nowhere else, or None.
    """

    replaced: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str = "mlp.down_proj"
    identities: tuple[str, ...] = ()
    transposed: bool = False
    ffn_norm: str | None = "post_attention_layernorm"

    @property
    def fused(self) -> bool:
        """Whether one projection computes both gate and up."""
        return self.gate == self.up


@dataclass(frozen=True)
class ExpertLayout(Layout):
    """An architecture whose layers have experts, computed through transformers' experts interface.

    Attributes:
        experts: path within a layer to the module that holds all of them, as 3-D ``gate_up_proj`` and ``down_proj``.
        interleaved: whether gate_up_proj computes gate and up in turns, rather than all of gate and then all of up.
        transposed: whether the weights are stored [experts, inputs, outputs].
        biased: whether both projections have biases.
    """

    experts: str = "mlp.experts"
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False


GEMMA = DenseLayout(
    activation_field="hidden_activation",
    ffn_norm="pre_feedforward_layernorm",
    logit_softcap_field="final_logit_softcapping",
)

LAYOUTS = {
    "llama": DenseLayout(),
    "mistral": DenseLayout(),
    "qwen2": DenseLayout(),
    "qwen3": DenseLayout(),
    "olmo2": DenseLayout(ffn_norm=None),
    # One norm feeds the attention and the FFN.
    "cohere": DenseLayout(ffn_norm=None, logit_scale_field="logit_scale"),
    "cohere2": DenseLayout(ffn_norm=None, logit_scale_field="logit_scale"),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    # With its vision tower, the model has the field of its text config too but does not cap its logits.
    "gemma3": replace(GEMMA, decoder="language_model", logit_softcap_field=None),
    "phi3": DenseLayout(gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
    # The dropout behind c_proj belongs to the residual stream: only what lies before it is replaced.
    "gpt2": DenseLayout(
        layers="h",
        norm="ln_f",
        replaced="mlp.c_fc",
        gate="mlp.c_fc",
        up=None,
        down="mlp.c_proj",
        identities=("mlp.act", "mlp.c_proj"),
        activation_field="activation_function",
        transposed=True,
        ffn_norm="ln_2",
    ),
    "gpt_neox": DenseLayout(
        norm="final_layer_norm",
        replaced="mlp.dense_h_to_4h",
        gate="mlp.dense_h_to_4h",
        up=None,
        down="mlp.dense_4h_to_h",
        identities=("mlp.act", "mlp.dense_4h_to_h"),
    ),
    # OPT's layers have no mlp module, and its attention mask ignores position_ids.
    "opt": DenseLayout(
        decoder="decoder",
        norm="final_layer_norm",
        replaced="fc1",
        gate="fc1",
        up=None,
        down="fc2",
        identities=("activation_fn", "fc2"),
        activation_field="activation_function",
        packing=False,
        # Some sizes of OPT apply it behind the FFN.
        ffn_norm=None,
    ),
    # BLOOM's positions are distances between columns (ALiBi). With slow_but_exact it multiplies by slices of the
    # output projection's weight, around the module and without its bias.
    "bloom": DenseLayout(
        layers="h",
        norm="ln_f",
        replaced="mlp.dense_h_to_4h",
        gate="mlp.dense_h_to_4h",
        up=None,
        down="mlp.dense_4h_to_h",
        identities=("mlp.gelu_impl", "mlp.dense_4h_to_h"),
        activation_name="gelu_tanh",
        must_be_off=("slow_but_exact",),
        packing=False,
        position_ids=False,
        # Its output may also be the residual.
        ffn_norm=None,
    ),
    "mixtral": ExpertLayout(),
    "qwen3_moe": ExpertLayout(),
    # Its experts compute x * sigmoid(1.702 * x), clamped, whatever hidden_act says: of the gate's sign, as SiLU is. Its
    # attention masks are made without position_ids.
    "gpt_oss": ExpertLayout(activation_name="silu", interleaved=True, transposed=True, biased=True, packing=False),
}

# The names that configs use, and the op's activation that computes each.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}

# Weights of any other dtype are quantised.
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def layout_of(model: nn.Module) -> Layout:
    """The table's row for a model.

    Raises:
        ArchitectureError: no model of transformers, or its ``config.model_type`` is not in the table.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ArchitectureError(
            f"A {type(model).__name__} is not a model of transformers; give the model itself, as "
            "peft_model.get_base_model() returns it, or as it was before torch.compile."
        )
    check_known(model.config.model_type)
    return LAYOUTS[model.config.model_type]


def check_known(model_type: str) -> None:
    """Raises ArchitectureError, with the way to add a row, unless the table has ``model_type``."""
    if model_type not in LAYOUTS:
        raise ArchitectureError(
            f"The architecture {model_type!r} has no row in the table of FFN layouts, which knows "
            f"{', '.join(LAYOUTS)}; to add it, write a row under its config.model_type into LAYOUTS in "
            "lape_fast/models/layouts.py and a tiny model of it into tests/tiny_models.py."
        )
