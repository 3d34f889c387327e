"""The atlas at full size: how large the page is, and how soon a browser shows it and changes the view.

188 languages, 40 layers of 14,336 neurons, 5 % of them selected, with activation probabilities of noise around shared
and own neurons. Times are of headless Chromium, from the start of the navigation to the first paint of a figure, and
from a change of the address to the paint behind it; medians over rounds.

    python -m benchmarks.atlas --json FILE
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import machine_facts, report
from lape_fast.identify import ActivationCounts, Lape, select_neurons
from lape_fast.report import render_atlas

LANGUAGES, LAYERS, WIDTH, TOKENS = 188, 40, 14_336, 1_000_000
VIEWS = ("layers", "similarity", "languages", "neurons", "language", "neuron", "layers&as=table")
COLUMNS = {"value": lambda row: f"{row['value']:,.1f}", "unit": lambda row: row["unit"]}

# Resolves behind the paint that follows a change of the address.
CHANGE = """address => new Promise(done => {
  const start = performance.now();
  addEventListener("hashchange", () => requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))),
    { once: true });
  location.hash = address;
})"""


def draw_counts(languages: int, layers: int, width: int) -> ActivationCounts:
    """Counts of noise: neurons that all share, that eight neighbours share, and that a language has alone."""
    generator = torch.Generator().manual_seed(0)
    neurons = layers * width
    common = torch.rand(neurons, generator=generator) * 0.3
    positive = torch.empty(languages, neurons, dtype=torch.int64)
    for language in range(languages):
        if language % 8 == 0:
            family = torch.randperm(neurons, generator=generator)[: neurons // 50]
        p = common * (0.8 + 0.4 * torch.rand(neurons, generator=generator))
        p[family] = 0.2 * p[family] + 0.4 * torch.rand(len(family), generator=generator)
        own = torch.randperm(neurons, generator=generator)[: neurons // 100]
        p[own] = 0.5 + 0.5 * torch.rand(len(own), generator=generator)
        positive[language] = (p * TOKENS).long()
    codes = [f"x{chr(97 + number // 26)}{chr(97 + number % 26)}_Latn" for number in range(languages)]
    return ActivationCounts(
        positive.view(languages, layers, width), torch.full((languages,), TOKENS), codes, {"model": "noise"}
    )


def time_in_browser(page_file: Path, rounds: int, language: str, neuron: str) -> dict[str, float]:
    """Milliseconds of the first paint and of every view."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium")
    if executable is None:
        sys.exit("No Chromium is installed; `make test-browser` installs it.")
    addresses = {view: f"view={view}" for view in VIEWS}
    addresses |= {"language": f"view=language&id={language}", "neuron": f"view=neuron&id={neuron}"}
    times: dict[str, list[float]] = {name: [] for name in ("first paint", "all unpacked", *VIEWS)}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(page_file.as_uri())
            page.wait_for_selector("html[data-ready]")
            times["all unpacked"].append(page.evaluate("performance.now()"))
            times["first paint"].append(
                page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            )
            for view, address in addresses.items():
                # From another view each time, so that something changes.
                page.evaluate(CHANGE, "view=none")
                times[view].append(page.evaluate(CHANGE, address))
            page.close()
        browser.close()
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--languages", type=int, default=LANGUAGES)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--neurons", type=int, default=WIDTH, help="neurons per layer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    counts = draw_counts(options.languages, options.layers, options.neurons)
    neurons = select_neurons(counts, Lape())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atlas.html"
        start = time.perf_counter()
        render_atlas(path, neurons, counts)
        seconds = time.perf_counter() - start
        rows = [
            {"name": "page", "value": path.stat().st_size / 1e6, "unit": "MB"},
            {"name": "written in", "value": seconds, "unit": "s"},
        ]
        language = neurons.languages[0]
        layer = next(layer for layer, chosen in enumerate(neurons[language]) if len(chosen))
        times = time_in_browser(path, options.rounds, language, f"{layer}.{int(neurons[language][layer][0])}")
    rows += [{"name": name, "value": value, "unit": "ms"} for name, value in times.items()]
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    report(__doc__.partition("\n")[0], rows, COLUMNS, settings, machine_facts(torch.device("cpu")), options.json)


if __name__ == "__main__":
    main()
