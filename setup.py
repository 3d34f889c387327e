"""Builds lape_fast with its two native modules; LAPE_FAST_NO_EXTENSION=1 leaves both out.

LAPE_FAST_SANITIZE=address,undefined builds them with those sanitizers of the compiler (`make sanitize`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

REQUIREMENTS = [
    "torch>=2.11",
    "transformers>=5.16",
    "datasets>=5.2",
    "peft>=0.20",
    "triton>=3.6; platform_system == 'Linux'",
    "accelerate",
    "babel",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "pyyaml",
    "rich",
    "safetensors",
    "typer",
]
# What only some users need, by the name of the extra: `pip install "lape-fast[quantise]"`.
EXTRAS = {
    "quantise": ["bitsandbytes>=0.50", "torchao>=0.18"],
    "trl": ["trl>=1.16"],
    "liger": ["liger-kernel>=0.8"],
    "evaluate": ["lm_eval>=0.4.13", "sacrebleu>=2.6"],
}
TEST_REQUIREMENTS = [
    # It is built for nothing else.
    "atheris; sys_platform == 'linux' and python_version < '3.14'",
    "hypothesis",
    "ninja",
    "playwright",
    "pybind11",
    "pytest",
    "pytest-benchmark",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "zstandard",
]

# The kernels choose their instruction set when they run, so no flag depends on the machine that builds. Nobody reads
# errno or floating-point traps, and without them the compiler may turn a branch into a select.
OPTIMISE = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# The first error ends the program. torch is built without what the check of virtual tables needs, and Python's own
# -fwrapv would make the overflow of a signed integer no error.
SANITIZE = os.environ.get("LAPE_FAST_SANITIZE")
SANITIZERS = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"] if SANITIZE else []
if SANITIZE:
    OPTIMISE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-fno-trapping-math"]
    OPTIMISE += ["-fno-wrapv", "-D_GLIBCXX_ASSERTIONS", *SANITIZERS]
OPERATOR_SOURCES = [
    "registration",
    "instruction_set",
    "gated_activation",
    "gated_activation_backward",
    "indexed_adamw",
]


def read_version() -> str:
    """The version in lape_fast/__init__.py, without importing torch."""
    text = Path("lape_fast/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def native_modules() -> dict:
    """The arguments of setup() that build the native modules."""
    if os.environ.get("LAPE_FAST_NO_EXTENSION") == "1":
        return {}
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # The torch ops, through the LibTorch stable ABI of torch 2.11: one file serves every later torch and Python.
    operators = CppExtension(
        "lape_fast._C",
        [f"csrc/{name}.cpp" for name in OPERATOR_SOURCES],
        depends=[str(header) for header in Path("csrc").glob("*.h")],
        extra_compile_args=[*OPTIMISE, "-Wall", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"],
        extra_link_args=SANITIZERS,
        py_limited_api=True,
    )
    # The helpers without tensors.
    host = Pybind11Extension(
        "lape_fast._host",
        ["csrc/sequence_packer.cpp"],
        cxx_std=20,
        extra_compile_args=OPTIMISE if SANITIZE else [],
        extra_link_args=SANITIZERS,
    )
    return {"ext_modules": [operators, host], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="lape-fast",
    version=read_version(),
    description="Find the feed-forward neurons of a language in a large language model, and tune only those",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["lape_fast", "lape_fast.*"], exclude=["lape_fast.kernels"]), "lape_fast.kernels"],
    package_dir={"lape_fast.kernels": "kernels/triton"},
    package_data={
        "lape_fast.text": ["*.tsv"],
        "lape_fast.identify": ["templates/*"],
        "lape_fast.report": ["templates/*", "templates/atlas/*"],
    },
    install_requires=REQUIREMENTS,
    extras_require={**EXTRAS, "test": TEST_REQUIREMENTS + [each for extra in EXTRAS.values() for each in extra]},
    entry_points={"console_scripts": ["lape-fast = lape_fast.cli:main"]},
    **native_modules(),
)
