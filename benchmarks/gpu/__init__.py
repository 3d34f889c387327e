"""The benchmark suite for a GPU, in stages that each fit into a few minutes: ``python -m benchmarks.gpu --help``."""
