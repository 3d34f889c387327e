"""The benchmark suite for a GPU, in stages that each fit into a few minutes: ``python -m benchmarks.gpu --help``."""

# In their order; each is the module of its name, with run(stage, options), and writes the JSON file of its name.
STAGES = ("correctness", "kernels", "identification", "training", "memory")
