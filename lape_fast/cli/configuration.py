"""YAML files of options: names and plain values, as flags would give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lape_fast.errors import ConfigError
from lape_fast.yaml_files import PREFIX, compose_plain

# The mapping, and a list in it.
DEEPEST = 2


def read_options(path: Path) -> dict[str, Any]:
    """The options of a YAML file by name; each value is None, a text as a flag would give it, or a list of such.

    Raises:
        ConfigError: the file is no mapping of names to such values.
    """
    import yaml

    options: dict[str, Any] = {}
    for name, value in compose_plain(path, "configuration", DEEPEST).value:
        if isinstance(value, yaml.MappingNode):
            raise ConfigError(
                f"The configuration {path} gives {name.value!r} a mapping; write it as the flag would be."
            )
        is_list = isinstance(value, yaml.SequenceNode)
        texts = [None if each.tag == f"{PREFIX}null" else each.value for each in (value.value if is_list else [value])]
        options[name.value] = texts if is_list else texts[0]
    return options
