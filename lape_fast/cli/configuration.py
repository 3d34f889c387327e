"""YAML files of options: names and plain values, read without building anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lape_fast.errors import ConfigError, FileFormatError
from lape_fast.files import read_text

# Bytes; a recipe has a few hundred.
LONGEST = 1 << 16

# The mapping, and a list in it.
DEEPEST = 2

PREFIX = "tag:yaml.org,2002:"
NULL, PLAIN = f"{PREFIX}null", {f"{PREFIX}{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp")}


def read_options(path: Path) -> dict[str, Any]:
    """The options of a YAML file by name; each value is None, a text as a flag would give it, or a list of such.

    Raises:
        ConfigError: the file is no mapping of names to such values. Aliases, which can make a few lines unfold into
            gigabytes, and tags, which name what is to be built, are refused; so is a name that stands twice.
    """
    import yaml

    try:
        text = read_text(path, LONGEST)
        depth = 0
        # Event by event: PyYAML takes minutes over brackets that nest thousands deep.
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                what = "an alias (`*name`)" if depth <= DEEPEST else "lists within lists"
                raise ConfigError(f"The configuration {path} has {what}; write plain values.")
        node = yaml.compose(text, yaml.SafeLoader)
    except ConfigError:
        raise
    except (FileFormatError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"The configuration {path} cannot be read ({error}); give a YAML file of options.") from error
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise ConfigError(f"The configuration {path} must be a mapping such as `seed: 0`.")
    options: dict[str, Any] = {}
    for key, value in node.value:
        if key.value in options:
            raise ConfigError(f"The configuration {path} sets {key.value!r} twice; keep one of them.")
        is_list = isinstance(value, yaml.SequenceNode) and value.tag == f"{PREFIX}seq"
        nodes = value.value if is_list else [value]
        if not all(isinstance(each, yaml.ScalarNode) and each.tag in PLAIN for each in nodes):
            raise ConfigError(
                f"The configuration {path} gives {key.value!r} something other than a number, a text or a list of "
                "them; write it as the flag would be."
            )
        texts = [None if each.tag == NULL else each.value for each in nodes]
        options[key.value] = texts if is_list else texts[0]
    return options
