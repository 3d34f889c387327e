"""An adapter of 100 MB at Llama-3.1-8B's width in bf16: its size, and how long it takes to save, load and switch.

write        the adapter folder, as `lape-fast tune` writes it
load         into a fresh base, without PEFT: neurons attached, fingerprint checked, values written
peft-save    ``save_pretrained`` (which keeps the fp32 masters, twice the size)
peft-load    ``PeftModel.from_pretrained`` of the written folder
set-adapter  from one language to another that shares none of its neurons, both of them 100 MB

python -m benchmarks.adapter --json FILE
"""

from __future__ import annotations

import argparse
import copy
import functools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import machine_facts, report

LAYERS, HIDDEN, NEURONS = 4, 4096, 14336
# 3 x 4,096 values of 2 bytes per neuron.
SELECTED = 1024

COLUMNS = {
    "ms": lambda row: f"{row['ms']:,.0f}",
    "MB": lambda row: f"{row['bytes'] / 1e6:,.1f}" if row["bytes"] else "",
    "size / values": lambda row: f"{row['ratio_to_values']:.4f}" if row["bytes"] else "",
}


def build_base() -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=256,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return 1000 * (time.perf_counter() - start), result


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")


def measure(base: nn.Module, workspace: Path) -> dict[str, tuple[float, int | None]]:
    """One round: milliseconds and bytes per row."""
    from peft import PeftModel, get_peft_model

    from lape_fast.tune import Subnetwork, SubnetworkConfig, load_adapter, write_adapter

    order = torch.randperm(NEURONS)
    configs = [
        SubnetworkConfig(neurons=[order[part].sort().values] * LAYERS, language="mlt_Latn")
        for part in (slice(0, SELECTED), slice(SELECTED, 2 * SELECTED))
    ]
    tuned = get_peft_model(copy.deepcopy(base), configs[0], "first")
    tuned.add_adapter("second", configs[1])
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    subnetwork = Subnetwork(tuned.get_base_model(), "first")
    written, saved = workspace / "written", workspace / "saved"
    written.mkdir()
    rows = {}
    milliseconds, _ = timed(functools.partial(write_adapter, subnetwork, written, configs[0].to_dict()))
    rows["write"] = milliseconds, size_of(written)
    milliseconds, _ = timed(functools.partial(tuned.save_pretrained, saved, selected_adapters=["first"]))
    rows["peft-save"] = milliseconds, size_of(saved / "first")
    tuned.set_adapter("second")
    rows["set-adapter"] = timed(functools.partial(tuned.set_adapter, "first"))[0], None
    del tuned, subnetwork
    fresh = copy.deepcopy(base)
    rows["load"] = timed(functools.partial(load_adapter, fresh, written))[0], None
    fresh = copy.deepcopy(base)
    rows["peft-load"] = timed(functools.partial(PeftModel.from_pretrained, fresh, written))[0], None
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after one to warm up")
    options = parser.parse_args(arguments)
    base = build_base()
    rounds = []
    for _ in range(1 + options.rounds):
        workspace = Path(tempfile.mkdtemp())
        try:
            rounds.append(measure(base, workspace))
        finally:
            shutil.rmtree(workspace)
    values = LAYERS * SELECTED * 3 * HIDDEN * 2
    rows = []
    for name, (_, size) in rounds[0].items():
        times = [each[name][0] for each in rounds[1:]]
        ratio = size / values if size else None
        rows.append(
            {
                "name": name,
                "ms": statistics.median(times),
                "ms_of_rounds": times,
                "bytes": size,
                "ratio_to_values": ratio,
            }
        )
    settings = {"layers": LAYERS, "hidden": HIDDEN, "neurons_per_layer": SELECTED, "dtype": "bfloat16"}
    report(__doc__.partition("\n")[0], rows, COLUMNS, settings, machine_facts(torch.device("cpu")), options.json)


if __name__ == "__main__":
    main()
