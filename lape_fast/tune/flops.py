"""The floating-point operations of a step, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def count_flops(step: Callable[[], Any], *, attention: bool = True) -> int:
    """The floating-point operations of a step: its matrix products and (unless left out) its attention.

    Example:
        >>> a = torch.ones(2, 3)
        >>> count_flops(lambda: a @ a.T)
        24
    """
    # It imports Triton.
    from torch.utils.flop_counter import FlopCounterMode

    # The counter knows neither the product that adds in place nor the CPU's attention.
    unknown_to_it = {
        torch.ops.aten.addmm_: _addmm_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=unknown_to_it) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(number for op, number in counts.items() if attention or "attention" not in str(op))


def _addmm_flops(total, left, right, *args, **kwargs) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_flops(query, key, value, *args, **kwargs) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad, query, key, value, *args, **kwargs) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(grad, query, key, value)
