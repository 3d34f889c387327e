"""Writes docs/errors.md: every error message of the package, by class, from the places that raise it.

python docs/list_errors.py          # writes the page
python docs/list_errors.py --check  # fails if the page is out of date
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "lape_fast"
PAGE = DOCS / "errors.md"
INTRODUCTION = """# Error messages

Every error that lape_fast raises on purpose is a subclass of `LapeFastError` and says in a sentence what was wrong and
what to do. The command line prints that sentence, ends with exit code 1, and shows a traceback only with `--debug`; a
run that was asked to stop (Ctrl-C, SIGTERM) ends with 130 and goes on when the same command is given again. In Python
each class is also the built-in one it is closest to, so `except ValueError` catches a wrong shape.

This page lists all of them by class and by the file that raises them; `{...}` stands for what is filled in. It is
written by `docs/list_errors.py` from the code, and a test keeps it up to date. Anything else that ends a command, with
a traceback, is a bug: please report it.
"""


def error_classes() -> dict[str, str]:
    """Name -> what the class is for, in the order of lape_fast/errors.py."""
    tree = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8"))
    return {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def message(node: ast.AST) -> str:
    """A message as the code writes it, with what is filled in between braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(message(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message(node.left) + message(node.right)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    return f"{{{ast.unparse(node)}}}"


def raised() -> dict[str, dict[str, list[str]]]:
    """Class -> file -> its messages, in the order of the file."""
    classes, found = error_classes(), defaultdict(lambda: defaultdict(list))
    for path in sorted(PACKAGE.rglob("*.py")):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes and node.args
        ]
        for call in sorted(calls, key=lambda call: call.lineno):
            texts = found[call.func.id][path.relative_to(PACKAGE.parent).as_posix()]
            text = " ".join(message(call.args[0]).split())
            if text not in texts:
                texts.append(text)
    return found


def page() -> str:
    """The whole page."""
    parts, found = [INTRODUCTION], raised()
    for name, meaning in error_classes().items():
        if name not in found:
            continue
        parts.append(f"\n## {name}\n\n{meaning}\n")
        for path, texts in found[name].items():
            parts.append(f"\n`{path}`\n\n")
            # Code, so that nothing in a message is read as Markdown.
            parts += [f"- `` {text} ``\n" for text in texts]
    return "".join(parts)


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/errors.md is out of date; run `python docs/list_errors.py`.")


if __name__ == "__main__":
    main()
