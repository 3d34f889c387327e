// Errors on purpose, built like the kernels and called on their tensors: what the sanitizers have to report, so that a
// silent one cannot pass (benchmarks/sanitize.py).

#include <cstdint>

extern "C" float read_beyond(const float* values, int64_t size) { return values[size]; }

extern "C" int64_t add_one(int64_t value) { return value + 1; }
