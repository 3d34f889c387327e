"""Which neurons belong to a language: counting, selecting, and the files that hold both."""

from lape_fast.identify.counting import CountingFFN, count_activations, count_batch, counting_ffns
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.identification import count_to_file, identify_neurons
from lape_fast.identify.masks import export_masks, import_masks
from lape_fast.identify.neurons import NeuronSet, random_like
from lape_fast.identify.release import publish_release
from lape_fast.identify.selection import select_neurons

__all__ = [
    "ActivationCounts",
    "CountingFFN",
    "NeuronSet",
    "count_activations",
    "count_batch",
    "count_to_file",
    "counting_ffns",
    "export_masks",
    "identify_neurons",
    "import_masks",
    "publish_release",
    "random_like",
    "select_neurons",
]
