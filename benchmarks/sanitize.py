"""The native code under the sanitizers of gcc, on a build of its own: exits with 1 if one reports anything.

    python -m benchmarks.sanitize --json FILE

AddressSanitizer and UBSan watch the extension while the tests of the ops and random calls run; ThreadSanitizer watches
its inner functions on plain threads (``tests/native/race_harness.cpp``), since libgomp's barriers are races to it.
Errors that are planted have to be reported, each by its sanitizer.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

from benchmarks.measure import machine_facts, report
from lape_fast.progress import log

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/ops", "tests/text/test_packing.py", "tests/faults/test_native.py"]
# Triton is no C++, and inductor would build its own code under the sanitizers.
CHOSEN = "not triton and not compile and not opcheck"

REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error: |WARNING: ThreadSanitizer")
NOTHING = r"(?!)"
BEYOND, OVERFLOW, RACE = "heap-buffer-overflow", "signed integer overflow", "data race"

# Says where the extension was loaded from; then makes the error that it is told to.
PLANT = """
import ctypes, importlib.util, sys
import torch
import lape_fast.ops
from lape_fast import _host
planted = ctypes.CDLL(sys.argv[1])
values = torch.ones(5)
torch.ops.lape_fast.gated_activation(values[None], None, 0, None, None)
print("loaded", [line.split()[-1] for line in open("/proc/self/maps") if line.rstrip().endswith(".so")
                 and ("/_C.abi3" in line or "/_host." in line) and "lape_fast" in line], flush=True)
if sys.argv[2] == "beyond":
    planted.read_beyond(ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel()))
else:
    planted.add_one(ctypes.c_int64(2**63 - 1))
"""


def run(command: Sequence[Any], folder: Path, **environment: str) -> tuple[int, str, float]:
    """Runs a command.

    Returns:
        Its exit code, everything it said, and its seconds.
    """
    begun = time.perf_counter()
    words = [str(word) for word in command]
    settings = {**os.environ, "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        words, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    return done.returncode, done.stdout, time.perf_counter() - begun


def must(command: Sequence[Any], folder: Path, **environment: str) -> str:
    """Runs a command that has to succeed; what it said."""
    code, said, _ = run(command, folder, **environment)
    if code:
        raise SystemExit(f"{said[-5_000:]}\n{command[0]} ended with {code}, and nothing could be examined.")
    return said


def row(name: str, sanitizer: str, result: tuple[int, str, float], checked: str, planted: str | None = None) -> dict:
    """What became of a command under a sanitizer.

    Args:
        name: of the row.
        sanitizer: what watched.
        result: of ``run``.
        checked: a pattern whose numbers in the output, added up, are how much was checked.
        planted: the error that has to be reported; None where there must be none.
    """
    code, said, seconds = result
    reports = len(REPORT.findall(said))
    sound = (code != 0 and reports > 0 and planted in said) if planted else (code == 0 and reports == 0)
    if not sound:
        log(said[-20_000:])
    log(f"{name}: {seconds:,.0f} s, {reports} reports{', as planted' if planted and sound else ''}.")
    amount = sum(int(number.replace(",", "")) for number in re.findall(checked, said))
    return {
        "name": name,
        "sanitizer": sanitizer,
        "checked": amount,
        "reports": reports,
        "planted": planted is not None,
        "sound": sound and (planted is not None or amount > 0),
        "exit_code": code,
        "seconds": seconds,
    }


def watch_memory(build: Path, calls: int, seed: int) -> tuple[list[dict[str, Any]], str]:
    """The rows of AddressSanitizer and UBSan, and the flags of their build."""
    objects, package = build / "objects", build / "package"
    log("Building the extension under AddressSanitizer and UBSan: some minutes.")
    setup = [sys.executable, "setup.py", "-q", "build", "--build-base", objects, "--build-lib", package]
    must(setup, ROOT, LAPE_FAST_SANITIZE="address,undefined", MAX_JOBS=str(os.cpu_count()))
    ninja = next(objects.rglob("build.ninja")).read_text(encoding="utf-8")
    flags = re.search(r"^post_cflags = (.*)$", ninja, re.MULTILINE).group(1)
    for name in ("tests", "benchmarks"):
        shutil.rmtree(package / name, ignore_errors=True)
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", package)
    planted = build / "planted.so"
    must(
        ["g++", *flags.split(), "-fvisibility=default", "-shared", "-fPIC", "tests/native/planted.cpp", "-o", planted],
        ROOT,
    )

    libraries = [must(["gcc", f"-print-file-name={name}"], ROOT).strip() for name in ("libasan.so", "libstdc++.so")]
    environment = {
        "LD_PRELOAD": ":".join(libraries),
        # Python keeps most of what it has until it ends. What cannot be allocated is an error that torch reports.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }

    def watched(*words: Any) -> tuple[int, str, float]:
        return run([sys.executable, *words], package, **environment)

    rows = []
    for kind, told in (("beyond", BEYOND), ("overflow", OVERFLOW)):
        result = watched("-c", PLANT, planted, kind)
        loaded = re.search(r"^loaded (.*)$", result[1], re.MULTILINE)
        found = set(re.findall(r"'(.*?)'", loaded.group(1))) if loaded else set()
        if len(found) != 2 or not all(path.startswith(f"{package}/") for path in found):
            raise SystemExit(f"{result[1][-5_000:]}\nThe build in {package} is not what was loaded, but {found}.")
        rows.append(row(f"planted: {told}", "address,undefined", result, NOTHING, told))
    for path in found:
        if b"__asan_report" not in Path(path).read_bytes():
            raise SystemExit(f"{path} was built without AddressSanitizer; remove {build} and start again.")
    # Uncaptured, since the report of an error that ends the process would be lost with it.
    tests = watched("-m", "pytest", "-s", "-p", "no:cacheprovider", "-k", CHOSEN, *TESTS)
    rows.append(row("tests", "address,undefined", tests, r"(\d+) passed.* in [\d.]+s"))
    fuzz = ["benchmarks.fuzz_ops", "--calls", calls, "--seed", seed, "--at", build / "call"]
    rows.append(row("random calls", "address,undefined", watched("-m", *fuzz), r"(?m)^\w+ [a-z ]+: ([\d,]+)$"))
    return rows, flags


def watch_threads(build: Path) -> list[dict[str, Any]]:
    """The rows of ThreadSanitizer."""
    harness = build / "race_harness"
    includes = [f"-I{path}" for path in include_paths()]
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", "-ffunction-sections", "-Wl,--gc-sections"]
    flags.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    must(["g++", *flags, *includes, "tests/native/race_harness.cpp", "-o", harness], ROOT)
    rows = [row("planted: race", "thread", run([harness, "--broken"], ROOT), NOTHING, RACE)]
    return [*rows, row("2 and 8 threads", "thread", run([harness], ROOT), r"(\d+) comparisons")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sanitize", help="where to build")
    parser.add_argument("--calls", type=int, default=20_000, help="random calls")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args()
    begun = time.perf_counter()
    rows, flags = watch_memory(options.build.resolve(), options.calls, options.seed)
    rows += watch_threads(options.build.resolve())
    columns = {
        "checked": lambda row: f"{row['checked']:,}" if row["checked"] else "",
        "reports": lambda row: f"{row['reports']}",
        "as it should be": lambda row: "yes" if row["sound"] else "NO",
        "s": lambda row: f"{row['seconds']:,.0f}",
    }
    compiler = must(["g++", "--version"], ROOT).splitlines()[0]
    settings = {"compiler": compiler, "flags": flags, "seed": options.seed, "seconds": time.perf_counter() - begun}
    report("Native code", rows, columns, settings, machine_facts(torch.device("cpu")), options.json)
    raise SystemExit(not all(row["sound"] for row in rows))


if __name__ == "__main__":
    main()
