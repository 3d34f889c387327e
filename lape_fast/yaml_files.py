"""YAML files of plain values: mappings, lists, numbers and texts, read without building anything else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lape_fast.errors import ConfigError, FileFormatError
from lape_fast.files import read_text

if TYPE_CHECKING:
    import yaml

# Bytes; a recipe has a few thousand.
LONGEST = 1 << 16

PREFIX = "tag:yaml.org,2002:"
PLAIN = {f"{PREFIX}{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")}


def compose_plain(path: str | os.PathLike, what: str, deepest: int) -> yaml.MappingNode:
    """The nodes of a YAML file that is one mapping.

    Args:
        path: the file.
        what: it is called in messages.
        deepest: how far collections may nest; the mapping itself is 1.

    Raises:
        ConfigError: the file is no such mapping. Aliases, which can make a few lines unfold into gigabytes, and tags,
            which name what is to be built, are refused; so is a name that stands twice.
    """
    import yaml

    try:
        text = read_text(path, LONGEST)
        depth = 0
        # Event by event: PyYAML takes minutes over brackets that nest thousands deep.
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"The {what} {path} has an alias (`*name`); write plain values.")
            if depth > deepest:
                raise ConfigError(f"The {what} {path} nests deeper than {deepest} levels; write plain values.")
        node = yaml.compose(text, yaml.SafeLoader)
    except ConfigError:
        raise
    except (FileFormatError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"The {what} {path} cannot be read ({error}); check what file was named.") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"The {what} {path} must be a mapping such as `seed: 0`.")
    _check(node, f"The {what} {path}")
    return node


def _check(node: yaml.Node, where: str) -> None:
    import yaml

    if node.tag not in PLAIN:
        raise ConfigError(f"{where} has the tag {node.tag!r:.60}; write a number, a text, a list or a mapping of them.")
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _check(each, where)
    if isinstance(node, yaml.MappingNode):
        names = set()
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{where} must be a mapping such as `seed: 0`.")
            if name.value in names:
                raise ConfigError(f"{where} sets {name.value!r} twice; keep one of them.")
            names.add(name.value)
            _check(name, where)
            _check(value, where)
