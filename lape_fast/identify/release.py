"""A neuron release: a folder that is ready for a model hub, and reading one back from a folder or from the hub.

README.md                                a model card
release.json                             what is in the folder, with a fingerprint of each set
counts.safetensors                       the counts from which the sets were selected, and others can be
neurons/NAME/neurons.safetensors         one for each rule and its rates
neurons/NAME/neurons.ablation.json       where it was measured what the neurons are worth
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lape_fast import __version__
from lape_fast.errors import ArchitectureError, ConfigError, FileFormatError, LanguageError
from lape_fast.files import SCHEMA_VERSION, atomic_folder, fits, is_number, read_json, write_json, write_text
from lape_fast.identify.card import SELECTIVITY, render_card
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.metadata import check_metadata
from lape_fast.identify.neurons import NeuronSet
from lape_fast.identify.selection import MODEL_FIELDS

KIND = "neuron-release"
INDEX_NAME, CARD_NAME, COUNTS_NAME = "release.json", "README.md", "counts.safetensors"

# Characters; file systems take 255 bytes.
LONGEST_NAME = 100

# What is read of an ablation.
_NUMBER = (None, is_number)
ABLATION_SHAPE = {
    "neurons_fingerprint": str,
    "selectivity": {str: dict.fromkeys(SELECTIVITY, _NUMBER)},
    "mean_selectivity": {str: _NUMBER},
}

# What the index needs of a set to read it back.
SET_FIELDS = ("name", "path", "fingerprint")


@dataclass(frozen=True)
class _Set:
    name: str
    source: Path
    neurons: NeuronSet
    fingerprint: str
    ablation: tuple[Path, dict[str, Any]] | None


def publish_release(
    folder: str | os.PathLike,
    counts: str | os.PathLike,
    neurons: Sequence[str | os.PathLike],
    ablations: Sequence[str | os.PathLike] = (),
    license: str | None = None,
) -> dict[str, Any]:
    """Lays out sets of neurons, the counts they come from and a model card in a folder, all of it or nothing.

    Nothing is uploaded: ``hf upload OWNER/NAME FOLDER`` does that.

    Args:
        folder: where; must not exist, or be empty.
        counts: the counts file.
        neurons: the neuron files that were selected from it.
        ablations: the ablations of some of them, as ``lape-fast ablate`` wrote them.
        license: under which the release is given away, as the hub names it (``apache-2.0``).

    Returns:
        What ``release.json`` holds.

    Raises:
        ConfigError: neurons that do not come from these counts, two sets of one name, an ablation of other neurons.
        ArchitectureError: neurons or an ablation of another model.
        FileExistsAlreadyError: the folder holds something.

    Example:
        >>> publish_release("release", "out/counts.safetensors", ["out/neurons.safetensors"], license="apache-2.0")
    """
    counted = ActivationCounts.load(counts)
    sets = _sets([Path(path) for path in neurons], counted, [Path(path) for path in ablations])
    index = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "lape_fast": __version__,
        "license": license,
        "model": {name: counted.metadata[name] for name in MODEL_FIELDS if name in counted.metadata},
        "layers": counted.layers,
        "neurons_per_layer": counted.neurons_per_layer,
        "counts": {"path": COUNTS_NAME, "fingerprint": counted.fingerprint()},
        "tokens": dict(zip(counted.languages, counted.tokens.tolist(), strict=True)),
        "sets": [_entry(each) for each in sets],
    }
    with atomic_folder(folder) as temporary:
        shutil.copyfile(counts, temporary / COUNTS_NAME)
        for each, entry in zip(sets, index["sets"], strict=True):
            (temporary / entry["path"]).parent.mkdir(parents=True)
            shutil.copyfile(each.source, temporary / entry["path"])
            if each.ablation:
                shutil.copyfile(each.ablation[0], temporary / entry["ablation"])
        write_json(temporary / INDEX_NAME, index)
        write_text(temporary / CARD_NAME, render_card(index, counted))
    return index


def load_release(source: str | os.PathLike, rule: str | None = None, revision: str | None = None) -> NeuronSet:
    """One set of neurons of a release; see ``NeuronSet.from_pretrained``."""
    fetch = _fetcher(source, revision)
    index = read_json(fetch(INDEX_NAME))
    _check_index(index, source)
    names = [entry["name"] for entry in index["sets"]]
    if rule is None and len(names) == 1:
        rule = names[0]
    if rule not in names:
        asked = "holds several sets" if rule is None else f"has no set {rule!r}"
        raise ConfigError(f"The release {source} {asked}; name one of {', '.join(names)} as the rule.")
    entry = index["sets"][names.index(rule)]
    neurons = NeuronSet.load(fetch(entry["path"]))
    if neurons.fingerprint() != entry["fingerprint"]:
        raise FileFormatError(
            f"{entry['path']} of the release {source} holds other neurons than its {INDEX_NAME} says; get the release "
            "again."
        )
    return neurons


def _sets(paths: Sequence[Path], counts: ActivationCounts, ablations: Sequence[Path]) -> list[_Set]:
    if not paths:
        raise ConfigError("A release needs at least one set of neurons; name a neuron file.")
    measured: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in ablations:
        values = read_ablation(path)
        _check_model(path, values, counts)
        earlier, _ = measured.setdefault(values["neurons_fingerprint"], (path, values))
        if earlier is not path:
            raise ConfigError(f"{earlier} and {path} are ablations of the same neurons; publish one of them.")

    # A selection may leave languages out; the hash that it states is of what it was made from.
    @functools.cache
    def hash_of(languages: tuple[str, ...]) -> str:
        return (counts if list(languages) == counts.languages else counts.restrict(languages)).fingerprint()

    sets: dict[str, _Set] = {}
    for path in paths:
        neurons = NeuronSet.load(path)
        _check_source(path, neurons, counts, hash_of)
        name, fingerprint = _set_name(path, neurons), neurons.fingerprint()
        if name in sets:
            raise ConfigError(f"{sets[name].source} and {path} are both called {name!r}; publish one of them.")
        sets[name] = _Set(name, path, neurons, fingerprint, measured.get(fingerprint))
    known = {each.fingerprint for each in sets.values()}
    for fingerprint, (path, _) in measured.items():
        if fingerprint not in known:
            raise ConfigError(
                f"{path} is the ablation of none of these neurons; publish those that were switched off in it, too, or "
                "leave it out."
            )
    return list(sets.values())


def _set_name(path: Path, neurons: NeuronSet) -> str:
    """The name of the rule that selected the set, or of its file where no rule is known; it names a folder, too."""
    names = (
        re.sub(r"[^A-Za-z0-9._=-]+", "-", str(name)).strip(".-")
        for name in (neurons.metadata.get("name") or "", path.stem)
    )
    name = next(filter(None, names), None)
    if name is None or len(name) > LONGEST_NAME:
        length = "no letter and no digit" if name is None else f"{len(name)} characters"
        raise ConfigError(
            f"The name of the neurons in {path} has {length}, and it is to name a folder; give them one of 1 to "
            f"{LONGEST_NAME} characters, letters or digits, as metadata['name']."
        )
    return name


def _entry(each: _Set) -> dict[str, Any]:
    elsewhere = {*MODEL_FIELDS, "name", "rule", "counts_hash"}
    place = PurePosixPath("neurons", each.name)
    return {
        "name": each.name,
        "path": str(place / "neurons.safetensors"),
        "fingerprint": each.fingerprint,
        "counts_hash": each.neurons.metadata["counts_hash"],
        "rule": each.neurons.metadata.get("rule"),
        # A safetensors file keeps its metadata in no order.
        "thresholds": {name: value for name, value in sorted(each.neurons.metadata.items()) if name not in elsewhere},
        "union": each.neurons.union_count(),
        "neurons": each.neurons.per_language(),
        "ablation": str(place / "neurons.ablation.json") if each.ablation else None,
        "selectivity": each.ablation[1]["selectivity"] if each.ablation else None,
        "measured_on": each.ablation[1].get("corpus") if each.ablation else None,
    }


def _check_source(path: Path, neurons: NeuronSet, counts: ActivationCounts, hash_of: Callable) -> None:
    _check_model(path, neurons.metadata, counts)
    if (neurons.layers, neurons.neurons_per_layer) != (counts.layers, counts.neurons_per_layer):
        raise ArchitectureError(
            f"{path} holds neurons of {neurons.layers} layers x {neurons.neurons_per_layer}, but the counts are of "
            f"{counts.layers} x {counts.neurons_per_layer}; a release is of one model."
        )
    stated = neurons.metadata.get("counts_hash")
    try:
        found = hash_of(tuple(neurons.languages))
    except LanguageError as error:
        raise ConfigError(f"{path} does not come from these counts: {error}") from error
    if stated != found:
        origin = f"from counts with the hash {stated[:12]}" if stated else "without saying from which counts"
        raise ConfigError(
            f"{path} was selected {origin}, and these counts have {found[:12]}; select it again from these counts, or "
            "publish it with its own."
        )


def read_ablation(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the JSON that ``lape-fast ablate`` wrote.

    Raises:
        FileFormatError: it is something else, or what is read of it is damaged.
    """
    values = read_json(path)
    if not fits(values, ABLATION_SHAPE) or values.get("kind", "ablation") != "ablation":
        raise FileFormatError(f"{path} holds no ablation; name the JSON file that `lape-fast ablate` wrote.")
    check_metadata(path, values)
    return values


def _check_model(path: Path, metadata: dict[str, Any], counts: ActivationCounts) -> None:
    stated, counted = metadata.get("config_hash"), counts.metadata.get("config_hash")
    if stated != counted:
        raise ArchitectureError(
            f"{path} is of the model {metadata.get('model')} (config_hash {str(stated)[:12]}), but the counts are of "
            f"{counts.metadata.get('model')} ({str(counted)[:12]}); a release is of one model."
        )


def _fetcher(source: str | os.PathLike, revision: str | None) -> Callable[[str], Path]:
    """What turns the name of a file of a release into its path here; from the hub only if there is no such folder."""
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{folder} is a folder and has no revision {revision!r}; leave the revision out.")
        if not (folder / INDEX_NAME).is_file():
            raise FileFormatError(f"The folder {folder} holds no {INDEX_NAME}, so it is no neuron release.")
        return functools.partial(_inside, folder)
    if folder.exists() or folder.is_absolute() or os.fspath(source).startswith((".", "~")):
        raise ConfigError(f"There is no folder {source}; name the folder of a release, or its hub id as OWNER/NAME.")

    def download(name: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(os.fspath(source), name, revision=revision))
        # Offline, unknown, gated and misspelt ids: all errors of the hub are one or the other.
        except (OSError, ValueError) as error:
            reason = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
            raise ConfigError(
                f"There is no folder {source}, and {name} of a release of that name cannot be had from the hub "
                f"({reason}); check the name, the revision, the network and your access."
            ) from error

    return download


def _inside(folder: Path, name: str) -> Path:
    """The path of a file of a release in a folder; a link may not lead elsewhere."""
    path, root = folder / name, folder.resolve()
    # The hub's own cache keeps a download as links into the blobs beside it.
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        leads_out = not any(path.resolve().is_relative_to(each) for each in roots)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read ({error}); get the release again.") from error
    if leads_out:
        raise FileFormatError(
            f"{path} is a link to {path.resolve()}, outside the release; put the file itself into the folder."
        )
    return path


def _check_index(index: Any, source: str | os.PathLike) -> None:
    if not isinstance(index, dict) or index.get("kind") != KIND or type(index.get("schema_version")) is not int:
        raise FileFormatError(f"{INDEX_NAME} of {source} is not that of a neuron release.")
    if index["schema_version"] > SCHEMA_VERSION:
        raise FileFormatError(
            f"The release {source} has schema version {index['schema_version']}, but this lape_fast reads up to "
            f"{SCHEMA_VERSION}; upgrade lape_fast."
        )
    entries = index.get("sets")
    if not isinstance(entries, list) or not entries or not all(map(_is_sound, entries)):
        raise FileFormatError(f"{INDEX_NAME} of the release {source} is damaged; get the release again.")


def _is_sound(entry: Any) -> bool:
    """Whether an entry of the index can be read, and its path leads to something inside the release."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in SET_FIELDS):
        return False
    parts = PurePosixPath(entry["path"]).parts
    return parts[:1] == ("neurons",) and ".." not in parts and "\0" not in entry["path"]
