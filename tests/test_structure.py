"""The shape of the house: imports run one way, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lape_fast"

# A folder imports only from folders to its left.
ORDER = ["kernels", "ops", "models", "text", "identify", "tune", "study", "report"]
# What every folder may import.
COMMON = {"errors", "files", "yaml_files", "progress", "__version__", "_C", "_host"}


def imported_parts(path: Path) -> set[str]:
    """The first part below lape_fast of everything a file imports from it, wherever the import stands."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "lape_fast" else [f"lape_fast.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path} uses a relative import; name the module in full.")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("lape_fast.")}
    return parts


# The command line is the last: it may import everything.
SOURCES = sorted(path for folder in ORDER for path in (PACKAGE / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_folder_imports_only_from_its_left(path):
    folder = path.relative_to(PACKAGE).parts[0]
    position = ORDER.index(folder)
    # ops and their kernels are two rungs of one ladder.
    allowed = set(ORDER[: position + 1]) | COMMON | ({"kernels", "ops"} if position < 2 else set())
    assert imported_parts(path) <= allowed


def test_no_source_file_is_longer_than_500_lines():
    repository = PACKAGE.parent
    sources = [
        path for folder in ("lape_fast", "kernels", "csrc", "benchmarks") for path in (repository / folder).rglob("*")
    ]
    long = [
        path for path in sources if path.suffix in {".py", ".cpp", ".h"} and len(path.read_text().splitlines()) > 500
    ]
    assert not long


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_is_light_and_touches_no_device():
    code = (
        "import sys, lape_fast, lape_fast.identify, lape_fast.tune, lape_fast.study, lape_fast.text, lape_fast.ops\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([name for name in ('datasets', 'babel', 'matplotlib', 'transformers.trainer', 'triton', 'peft', "
        "'lm_eval', 'sacrebleu') "
        "if name in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_the_bare_import_does_not_even_load_torch():
    assert run("import sys, lape_fast; print('torch' in sys.modules)").strip() == "False"


def test_help_and_completion_do_not_wait_for_torch():
    code = (
        "import sys\n"
        "from lape_fast.cli import main\n"
        "sys.argv = ['lape-fast', 'tune', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert run(code).splitlines()[-1] == "[]"


def test_every_public_name_exists():
    import lape_fast

    for name in lape_fast.__all__:
        assert getattr(lape_fast, name) is not None
