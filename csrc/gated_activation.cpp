// h = act(gate) * up, and counts[language, neuron] += (gate > 0) while the row is in the first-level cache.

#include <cstring>
#include <limits>
#include <vector>

#include "elementwise.h"
#include "ops.h"

namespace lape_fast {
namespace {

// Columns that are activated, then counted while their gates are in the first-level cache.
constexpr int64_t kBlock = 1024;

// Counters no wider than the scalars need no unpacking when vectorised; they are flushed before they overflow.
template <class Scalar>
using Counter = std::conditional_t<sizeof(Scalar) == 2, uint16_t, int32_t>;

template <class Scalar>
struct Forward {
  Rows<const Scalar> gate, up;
  Rows<Scalar> h;
  const int32_t* language_ids = nullptr;  // [T]; absent where nothing is counted
  int64_t id_stride = 0;
  int64_t* counts = nullptr;  // [languages, F]
  int64_t languages = 0, neurons = 0;
};

template <class Scalar>
LAPE_INLINE void count_row(const Scalar* __restrict gate, Counter<Scalar>* __restrict counters, int64_t width) {
  LAPE_VECTORISE
  for (int64_t column = 0; column < width; ++column) counters[column] += is_positive(gate[column]);
}

template <class Integer>
LAPE_INLINE void flush(Integer* __restrict counters, int64_t* __restrict counts, int64_t width, bool shared) {
  if (shared) {
    for (int64_t column = 0; column < width; ++column) {
      if (counters[column]) __atomic_fetch_add(&counts[column], counters[column], __ATOMIC_RELAXED);
    }
  } else {
    LAPE_VECTORISE
    for (int64_t column = 0; column < width; ++column) {
      // Wraps, as the atomic addition does: the caller's counts may be any numbers.
      counts[column] = static_cast<int64_t>(static_cast<uint64_t>(counts[column]) + counters[column]);
    }
  }
  std::memset(counters, 0, width * sizeof(Integer));
}

template <Activation activation, bool gated, class Scalar>
LAPE_INLINE void activate_tile(const Forward<Scalar>& op, const Tile& tile, Counter<Scalar>* counters) {
  const int64_t width = tile.end_column - tile.first_column;
  int64_t language = 0, pending = 0;
  const auto flush_pending = [&]() LAPE_INLINE_LAMBDA {
    if (pending == 0) return;
    flush(counters, op.counts + language * op.neurons + tile.first_column, width, tile.columns_are_shared);
    pending = 0;
  };
  for (int64_t row = tile.first_row; row < tile.end_row; ++row) {
    const int64_t id = op.language_ids ? op.language_ids[row * op.id_stride] : -1;
    const bool counted = id >= 0 && id < op.languages;
    // Tokens of one language stand together, so a run of rows costs one flush.
    if (counted) {
      if (id != language || pending == std::numeric_limits<Counter<Scalar>>::max()) flush_pending();
      language = id;
      ++pending;
    }
    const Scalar* gate = op.gate[row] + tile.first_column;
    const Scalar* up = gated ? op.up[row] + tile.first_column : nullptr;
    Scalar* h = op.h[row] + tile.first_column;
    for (int64_t first = 0; first < width; first += kBlock) {
      const int64_t size = std::min(kBlock, width - first);
      activate_row<activation, gated>(gate + first, gated ? up + first : nullptr, h + first, size);
      if (counted) count_row(gate + first, counters + first, size);
    }
  }
  flush_pending();
}

// A flush costs as much as counting some rows, and more where columns are shared. So long runs of one language are cut
// by rows, which reads memory in order (5 to 15 % faster), and short ones by columns, which shares none.
template <class Scalar>
Cut best_cut(const Forward<Scalar>& op, int64_t tokens) {
  constexpr int64_t kLongRun = 64;
  int64_t language = -1, runs = 0;
  for (int64_t row = 0; op.language_ids && row < tokens; ++row) {
    const int64_t id = op.language_ids[row * op.id_stride];
    if (id < 0 || id == language) continue;
    language = id;
    ++runs;
  }
  return runs * kLongRun > tokens ? Cut::columns_first : Cut::rows_first;
}

void check(const Tensor& gate, const std::optional<Tensor>& up, const std::optional<Tensor>& language_ids,
           const std::optional<Tensor>& counts) {
  STD_TORCH_CHECK(gate.dim() == 2, "gate must be [T, F], but its shape is ", shape_of(gate), ".");
  check_rows("gate", gate, gate);
  if (up) check_rows("up", *up, gate);
  STD_TORCH_CHECK(language_ids.has_value() == counts.has_value(),
                  "language_ids and counts belong together; pass both to count, or neither.");
  if (!counts) return;
  STD_TORCH_CHECK(language_ids->is_cpu() && language_ids->scalar_type() == ScalarType::Int &&
                      language_ids->dim() == 1 && language_ids->size(0) == gate.size(0),
                  "language_ids must be int32 [", gate.size(0), "] on the CPU, one per token, but its shape is ",
                  shape_of(*language_ids), ".");
  STD_TORCH_CHECK(counts->is_cpu() && counts->scalar_type() == ScalarType::Long && counts->dim() == 2 &&
                      counts->size(1) == gate.size(1) && counts->is_contiguous(),
                  "counts must be contiguous int64 [languages, ", gate.size(1), "] on the CPU, but its shape is ",
                  shape_of(*counts), ".");
  const Reach written = check_memory("counts", *counts);
  const bool shared = written.meets(check_memory("language_ids", *language_ids)) ||
                      written.meets(check_memory("gate", gate)) || (up && written.meets(check_memory("up", *up)));
  STD_TORCH_CHECK(!shared, "counts shares memory with an operand, but is added to in place; clone one first.");
}

}  // namespace

Tensor gated_activation(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation,
                        const std::optional<Tensor>& language_ids, const std::optional<Tensor>& counts) {
  check(gate, up, language_ids, counts);
  const int64_t tokens = gate.size(0), neurons = gate.size(1);
  Tensor h = new_matrix("h", gate, tokens, neurons);
  // The ids of any number of tokens may stand in one place of memory, and to walk along them would take for ever.
  if (h.numel() == 0) return h;
  const InstructionSet isa = instruction_set();
  dispatch(gate.scalar_type(), activation, up.has_value(), [&]<class Scalar, Activation chosen, bool gated>() {
    Forward<Scalar> op{rows_of<Scalar>(gate), rows_of<Scalar>(up), mutable_rows_of<Scalar>(h)};
    if (counts) {
      op.language_ids = static_cast<const int32_t*>(language_ids->const_data_ptr());
      op.id_stride = language_ids->stride(0);
      op.counts = static_cast<int64_t*>(counts->mutable_data_ptr());
      op.languages = counts->size(0);
      op.neurons = neurons;
    }
    parallel_tiles(tokens, neurons, best_cut(op, tokens), [&](const Tile& tile) {
      std::vector<Counter<Scalar>> counters(counts ? tile.end_column - tile.first_column : 0);
      with_instruction_set(isa, [&]() LAPE_INLINE_LAMBDA { activate_tile<chosen, gated>(op, tile, counters.data()); });
    });
  });
  return h;
}

}  // namespace lape_fast
