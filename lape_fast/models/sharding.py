"""Models larger than one device: each process holds a share of every layer and borrows the rest as it runs (FSDP2)."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lape_fast.errors import ConfigError
from lape_fast.models.hidden_states import decoder
from lape_fast.models.layouts import layout_of
from lape_fast.models.loading import load_model
from lape_fast.models.quantised import quantisation_of


def load_sharded_model(
    name_or_path: str | os.PathLike, *, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """``load_model`` for the processes of a ``torchrun``: the decoder is sharded among them, the head is left out.

    Only the first process reads the weights, into main memory; the others receive their shares. Every process must run
    the model equally often, as ``count_activations`` does.

    Args:
        name_or_path, dtype: as for ``load_model``.
        device: of this process, such as ``cuda:3``.

    Returns:
        A model whose decoder maps token ids to hidden states and whose head has no weights, and its tokenizer.

    Raises:
        ConfigError: there is only one process, or the checkpoint is quantised; or as for ``load_model``.

    Example:
        >>> with joined_world() as world:
        ...     model, tokenizer = load_sharded_model("meta-llama/Llama-3.1-70B", device=world.device)
    """
    from transformers import AutoModelForCausalLM

    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ConfigError("A model is shared among several processes (--fsdp), but this is the only one; use torchrun.")
    weights, buffers, facts = {}, {}, [None]
    if dist.get_rank() == 0:
        whole, tokenizer = load_model(name_or_path, dtype=dtype, device="cpu")
        if any(quantisation_of(module) is not None for module in whole.modules()):
            raise ConfigError(
                f"{name_or_path} was saved quantised, and quantised weights cannot be shared among processes; leave "
                "--fsdp away, or use a checkpoint in 16 bits."
            )
        weights, buffers = decoder(whole).state_dict(), dict(decoder(whole).named_buffers())
        facts = [(whole.config, whole.dtype, tokenizer)]
    dist.broadcast_object_list(facts)
    config, model_dtype, tokenizer = facts[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=model_dtype)
    model.config.name_or_path = os.fspath(name_or_path)
    inner = decoder(model)
    device = torch.device(device or "cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in inner.get_submodule(layout_of(model).layers):
        fully_shard(layer, mesh=mesh)
    # The decoder and not the whole model, whose head is never run.
    fully_shard(inner, mesh=mesh)
    inner.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(inner, weights, options=options)
    # The state does not hold what is computed from the config, such as rotary frequencies.
    for name, buffer in inner.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    return model.eval(), tokenizer
