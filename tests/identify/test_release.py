"""A neuron release: what it holds, what it refuses, and that it comes back from a folder and from the hub."""

from __future__ import annotations

import json
import re
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import RepositoryNotFoundError

from lape_fast.errors import ArchitectureError, ConfigError, FileExistsAlreadyError, FileFormatError
from lape_fast.identify import ActivationCounts, Lape, NeuronSet, publish_release, select_neurons
from lape_fast.identify.card import escaped
from tests.report.samples import matrix_of

LANGUAGES = ["mlt_Latn", "cym_Latn", "nob_Latn", "srp_Cyrl"]
METADATA = {
    "model": "owner/tiny-3b",
    "config_hash": "c" * 64,
    "tokenizer_hash": "t" * 64,
    "corpus": {"spec": "texts", "lines": "1-90", "text_column": None, "languages": ["xyz_Latn"]},
    "context_length": 512,
    "stability": {
        "mlt_Latn": {"jaccard": 0.971234, "interval": [0.9512, 0.9876], "neurons": 40},
        "nob_Latn": {"jaccard": None, "interval": None, "neurons": 0},
        "srp_Cyrl": {"jaccard": 0.5, "interval": None, "neurons": 1},
    },
}
HOSTILE = "x\n---\nlicense: evil\n# <script>alert(1)</script> | `code` [link](http://evil.example) *b*\u202e"


def counts_of(seed=0, **metadata) -> ActivationCounts:
    positive = torch.randint(0, 100, (len(LANGUAGES), 2, 40), generator=torch.Generator().manual_seed(seed))
    tokens = torch.tensor([100, 12345, 100, 100])
    return ActivationCounts(positive, tokens, LANGUAGES, {**METADATA, **metadata})


def select(counts, rate, name) -> NeuronSet:
    neurons = select_neurons(counts, Lape(top_rate=rate, filter_rate=0.5, activation_bar=0.5))
    neurons.metadata["name"] = name
    return neurons


class Workplace:
    """Counts, two selections from them by name, and the ablation of the first."""

    def __init__(self, folder, **metadata):
        self.folder, self.release = folder, folder / "release"
        self.more = []
        counts = counts_of(**metadata)
        self.counts = folder / "counts.safetensors"
        counts.save(self.counts)
        self.sets = {}
        for name, rate in (("lape-5", 0.05), ("lape-20", 0.2)):
            self.sets[name] = select(counts, rate, name)
            self.sets[name].save(folder / f"{name}.safetensors")
        self.neurons = [folder / f"{name}.safetensors" for name in self.sets]
        self.ablation = folder / "lape-5.ablation.json"
        matrix = matrix_of(LANGUAGES[:2], LANGUAGES[:2], torch.tensor([[0.25, 0.125], [0.0, 0.5]]), [3, 4])
        measured = {
            "config_hash": METADATA["config_hash"],
            "neurons_fingerprint": self.sets["lape-5"].fingerprint(),
            "corpus": {"spec": "held-out", "lines": "91-99"},
        }
        self.ablation.write_text(json.dumps({**matrix.to_json(), **measured}))

    def publish(self, **options):
        return publish_release(self.release, self.counts, self.neurons, [self.ablation, *self.more], **options)

    def card(self) -> tuple[dict, str]:
        """The header and the text of the card."""
        _, header, text = (self.release / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        return yaml.safe_load(header), text


@pytest.fixture
def workplace(tmp_path):
    return Workplace(tmp_path)


def same(first: NeuronSet, second: NeuronSet) -> bool:
    return first.summary() == second.summary() and first.fingerprint() == second.fingerprint()


def test_a_release_holds_everything_and_comes_back(workplace):
    index = workplace.publish(license="apache-2.0")
    files = {str(path.relative_to(workplace.release)) for path in workplace.release.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "release.json",
        "counts.safetensors",
        "neurons/lape-5/neurons.safetensors",
        "neurons/lape-5/neurons.ablation.json",
        "neurons/lape-20/neurons.safetensors",
    }
    assert json.loads((workplace.release / "release.json").read_text()) == index
    counts = ActivationCounts.load(workplace.release / "counts.safetensors")
    assert counts.fingerprint() == index["counts"]["fingerprint"] == counts_of().fingerprint()
    for name, entry in zip(workplace.sets, index["sets"], strict=True):
        assert same(NeuronSet.from_pretrained(workplace.release, rule=name), workplace.sets[name])
        assert entry["fingerprint"] == workplace.sets[name].fingerprint()
        assert entry["counts_hash"] == counts.fingerprint()
        assert entry["thresholds"]["filter_rate"] == 0.5
    with pytest.raises(ConfigError, match="several sets; name one of lape-5, lape-20"):
        NeuronSet.from_pretrained(workplace.release)
    with pytest.raises(ConfigError, match="no set 'lape-7'; name one of lape-5, lape-20"):
        NeuronSet.from_pretrained(workplace.release, rule="lape-7")


def test_the_only_set_needs_no_name(workplace):
    publish_release(workplace.release, workplace.counts, workplace.neurons[:1])
    assert same(NeuronSet.from_pretrained(str(workplace.release)), workplace.sets["lape-5"])


def test_the_card_states_what_a_user_must_know(workplace):
    workplace.publish(license="apache-2.0")
    header, text = workplace.card()
    assert header["license"] == "apache-2.0"
    assert header["base_model"] == "owner/tiny-3b"
    # Norwegian must not become `false`.
    assert header["language"] == ["cym", "mlt", "nob", "srp"]
    assert "language-neurons" in header["tags"]
    neurons = workplace.sets["lape-5"]
    assert f"activation threshold {neurons.metadata['activation_threshold']:.6g}" in text
    row = next(line for line in text.splitlines() if line.startswith(r"| cym\_Latn"))
    counts = " | ".join(str(each.count("cym_Latn")) for each in workplace.sets.values())
    assert row == rf"| cym\_Latn | Welsh | 12,345 | not measured | {counts} |"
    assert "| Maltese | 100 | 0.97, 0.95 to 0.99 |" in text and "Bokmål | 100 | unknown |" in text
    assert "| Serbian | 100 | 0.50 |" in text
    assert "| corpus | spec texts, lines 1-90 |" in text
    assert "Measured on: spec held-out, lines 91-99." in text
    assert r"| cym\_Latn | Welsh | " in text and "| +0.5000 | +0.5000 | +0.5000 |" in text
    assert "| +0.2500 | +0.1250 | +0.1250 |" in text
    assert 'NeuronSet.from_pretrained("OWNER/NAME", rule="lape-5")' in text
    # Every row of a table has as many cells as its header.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert len(re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)) == 4


def test_the_card_says_what_was_not_measured(workplace):
    publish_release(workplace.release, workplace.counts, workplace.neurons[1:])
    header, text = workplace.card()
    assert "license" not in header and "licence of this release | not named" in text
    assert "No ablation was made" in text


def test_metadata_can_neither_break_the_header_nor_write_into_the_card(tmp_path):
    workplace = Workplace(tmp_path, model=HOSTILE, corpus={"spec": HOSTILE}, dtype=HOSTILE)
    workplace.publish(license=HOSTILE)
    header, text = workplace.card()
    assert header["license"] == " ".join(HOSTILE.split()).replace("\u202e", "") and "base_model" not in header
    assert set(header) == {"license", "language", "library_name", "tags"}
    assert "<script" not in text.replace(r"\<script", "") and "\n# <" not in text and "\u202e" not in text
    # The title, and a comment in the example.
    assert [line[:5] for line in re.findall(r"^# .*", text, re.MULTILINE)] == ["# Lan", "# Or "]
    assert not re.search(r"(?<!\\)\[link|(?<!\\)`code|^---$", text, re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_escaping_leaves_ordinary_names_readable():
    assert escaped("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert escaped("a_b\\|c\nd") == r"a\_b\\\|c d"
    assert escaped(1234567) == "1,234,567"


def test_a_model_read_from_a_folder_is_no_base_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "out" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("out/base", "/models/llama", "../llama"):
        workplace = Workplace(tmp_path, model=name)
        workplace.publish()
        header, text = workplace.card()
        assert "base_model" not in header and f"| model | {name} |" in text
        shutil.rmtree(workplace.release)


def test_selections_of_fewer_languages_belong_to_their_counts(workplace):
    few = select(counts_of().restrict(["srp_Cyrl", "mlt_Latn"]), 0.1, "few")
    few.save(workplace.folder / "few.safetensors")
    workplace.neurons.append(workplace.folder / "few.safetensors")
    index = workplace.publish()
    assert list(index["sets"][2]["neurons"]) == ["srp_Cyrl", "mlt_Latn"]
    assert same(NeuronSet.from_pretrained(workplace.release, rule="few"), few)


def other_counts(workplace):
    select(counts_of(seed=1), 0.1, "lape-20").save(workplace.neurons[1])


def other_model(workplace):
    select(counts_of(config_hash="d" * 64), 0.1, "lape-20").save(workplace.neurons[1])


def other_size(workplace):
    NeuronSet.from_lists({"mlt_Latn": [[1]]}, 40, {"config_hash": "c" * 64}).save(workplace.neurons[1])


def no_origin(workplace):
    lists = {"mlt_Latn": [[1], [2]]}
    NeuronSet.from_lists(lists, 40, {"config_hash": "c" * 64}).save(workplace.neurons[1])


def foreign_language(workplace):
    lists = {"swh_Latn": [[1], [2]]}
    NeuronSet.from_lists(lists, 40, {"config_hash": "c" * 64}).save(workplace.neurons[1])


def one_name_twice(workplace):
    (workplace.folder / "again").mkdir()
    workplace.neurons.append(workplace.folder / "again" / "lape-20.safetensors")
    workplace.sets["lape-20"].save(workplace.neurons[2])


def long_name(workplace):
    select(counts_of(), 0.2, "n" * 101).save(workplace.neurons[1])


def no_name_at_all(workplace):
    workplace.neurons[1] = workplace.neurons[1].rename(workplace.folder / "-.safetensors")
    select(counts_of(), 0.2, "").save(workplace.neurons[1])


def foreign_ablation(workplace):
    workplace.neurons.pop(0)


def ablation_of_another_model(workplace):
    values = json.loads(workplace.ablation.read_text())
    workplace.ablation.write_text(json.dumps({**values, "config_hash": "d" * 64, "model": "owner/other"}))


def no_ablation(workplace):
    workplace.ablation.write_text("{}")


def two_ablations_of_one_set(workplace):
    shutil.copyfile(workplace.ablation, workplace.folder / "again.json")
    workplace.more = [workplace.folder / "again.json"]


def taken(workplace):
    workplace.release.mkdir()
    (workplace.release / "mine.txt").touch()


REFUSED = {
    other_counts: (ConfigError, "lape-20.safetensors was selected from counts with the hash"),
    other_model: (ArchitectureError, r"lape-20.safetensors is of the model owner/tiny-3b \(config_hash dddd"),
    other_size: (ArchitectureError, "1 layers x 40"),
    no_origin: (ConfigError, "without saying from which counts"),
    foreign_language: (ConfigError, "swh_Latn"),
    one_name_twice: (ConfigError, "both called 'lape-20'"),
    long_name: (ConfigError, "lape-20.safetensors has 101 characters.* 1 to 100"),
    no_name_at_all: (ConfigError, "-.safetensors has no letter and no digit"),
    foreign_ablation: (ConfigError, "lape-5.ablation.json is the ablation of none"),
    ablation_of_another_model: (ArchitectureError, "owner/other"),
    no_ablation: (FileFormatError, "holds no ablation"),
    two_ablations_of_one_set: (ConfigError, "ablations of the same neurons"),
    taken: (FileExistsAlreadyError, "exists already"),
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_does_not_belong_together_is_refused_and_leaves_nothing(workplace, spoil):
    spoil(workplace)
    before = sorted(workplace.folder.rglob("*"))
    error, words = REFUSED[spoil]
    with pytest.raises(error, match=words):
        workplace.publish()
    assert sorted(workplace.folder.rglob("*")) == before


def test_a_release_needs_neurons(workplace):
    with pytest.raises(ConfigError, match="at least one"):
        publish_release(workplace.release, workplace.counts, [])


def test_neurons_that_were_exchanged_are_noticed(workplace):
    workplace.publish()
    shutil.copyfile(workplace.neurons[0], workplace.release / "neurons" / "lape-20" / "neurons.safetensors")
    with pytest.raises(FileFormatError, match="neurons/lape-20/neurons.safetensors of the release .* holds other"):
        NeuronSet.from_pretrained(workplace.release, rule="lape-20")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "counts"}, "not that of a neuron release"),
        ({"schema_version": 99}, "upgrade"),
        ({"sets": {}}, "damaged"),
        ({"sets": [{"name": "lape-5"}]}, "damaged"),
        ({"sets": [{"name": "x", "path": "neurons/../../secret.safetensors", "fingerprint": ""}]}, "damaged"),
        ({"sets": [{"name": "x", "path": "/etc/neurons.safetensors", "fingerprint": ""}]}, "damaged"),
        ({"sets": []}, "damaged"),
    ],
)
def test_a_damaged_index_is_named(workplace, change, words):
    index = workplace.publish()
    (workplace.release / "release.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(FileFormatError, match=words):
        NeuronSet.from_pretrained(workplace.release)


def test_a_folder_is_read_without_the_hub_and_a_wrong_one_named(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    workplace.publish()
    assert NeuronSet.from_pretrained(workplace.release, rule="lape-5").languages == LANGUAGES
    with pytest.raises(ConfigError, match="no revision 'main'"):
        NeuronSet.from_pretrained(workplace.release, "lape-5", revision="main")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="holds no release.json"):
        NeuronSet.from_pretrained(tmp_path / "empty")


@pytest.fixture
def hub(workplace, monkeypatch):
    """A hub that has the release as owner/name in its revision v1; the network edge alone is replaced."""
    asked = []

    def download(repo_id, filename, *, revision=None):
        huggingface_hub.utils.validate_repo_id(repo_id)
        asked.append((repo_id, filename, revision))
        if repo_id != "owner/name" or revision != "v1":
            response = type("Response", (), {"headers": {}, "request": None})()
            raise RepositoryNotFoundError("404 Client Error: Repository Not Found", response=response)
        return str(workplace.release / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    workplace.publish()
    return asked


def test_a_hub_id_is_fetched_file_by_file(workplace, hub):
    neurons = NeuronSet.from_pretrained("owner/name", rule="lape-20", revision="v1")
    assert same(neurons, workplace.sets["lape-20"])
    # The counts, which may be a gigabyte, are not.
    assert hub == [
        ("owner/name", "release.json", "v1"),
        ("owner/name", "neurons/lape-20/neurons.safetensors", "v1"),
    ]


def test_what_the_hub_has_not_is_one_sentence(hub):
    with pytest.raises(ConfigError, match="no folder owner/nothing.*check the name"):
        NeuronSet.from_pretrained("owner/nothing", rule="lape-5")


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "../nothing", "~/no-such-folder", __file__])
def test_the_hub_is_not_asked_for_what_can_only_be_a_folder(hub, source):
    with pytest.raises(ConfigError, match=f"no folder {re.escape(source)}; name the folder"):
        NeuronSet.from_pretrained(source, rule="lape-5")
    assert not hub


@pytest.mark.parametrize("name", ["", "..", None, "///"])
def test_a_set_whose_name_names_no_folder_is_called_after_its_file(workplace, name):
    select(counts_of(), 0.2, name).save(workplace.neurons[1])
    index = workplace.publish()
    assert [entry["path"] for entry in index["sets"]] == [
        f"neurons/{stem}/neurons.safetensors" for stem in ("lape-5", "lape-20")
    ]
