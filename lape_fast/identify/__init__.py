"""Which neurons belong to a language: counting, selecting, and the files that hold both."""

from lape_fast.identify.chunks import CountingSettings
from lape_fast.identify.counting import count_activations
from lape_fast.identify.counting_ffn import CountingFFN, count_batch, counting_ffns
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.distributed import World, joined_world
from lape_fast.identify.identification import count_to_file, identify_neurons
from lape_fast.identify.masks import export_masks, import_masks
from lape_fast.identify.merging import merge_files, missing_parts
from lape_fast.identify.neurons import NeuronSet, random_like
from lape_fast.identify.release import publish_release
from lape_fast.identify.rules import RULES, Budget, Lape, Percentile, Rule, parse_rules, rule_name
from lape_fast.identify.selection import select_many, select_neurons
from lape_fast.identify.stability import measure_stability

__all__ = [
    "RULES",
    "ActivationCounts",
    "Budget",
    "CountingFFN",
    "CountingSettings",
    "Lape",
    "NeuronSet",
    "Percentile",
    "Rule",
    "World",
    "count_activations",
    "count_batch",
    "count_to_file",
    "counting_ffns",
    "export_masks",
    "identify_neurons",
    "import_masks",
    "joined_world",
    "measure_stability",
    "merge_files",
    "missing_parts",
    "parse_rules",
    "publish_release",
    "random_like",
    "rule_name",
    "select_many",
    "select_neurons",
]
