// AdamW for the selected rows of many weights: masters and moments in place, and rounded into the weights.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "elementwise.h"
#include "ops.h"

namespace lape_fast {
namespace {

// What an entry is computed with, worked out in fp64.
struct Step {
  double clip, decay, beta1, beta2, eps, size, root_correction2;
};

struct Part {
  ScalarType dtype;        // of the weight
  void* weight = nullptr;  // [F, D]; null if there is none to write
  int64_t neuron_stride = 0, entry_stride = 0;
  const int64_t* neurons = nullptr;  // [K]
  const void* grad = nullptr;        // [K, D], like the next three
  void *master = nullptr, *exp_avg = nullptr, *exp_avg_sq = nullptr;
  int64_t selected = 0, width = 0;
  // How the part is cut.
  int64_t tile_rows = 1, tile_columns = 1, first_tile = 0;

  bool scattered() const { return weight != nullptr && entry_stride != 1; }
  int64_t column_tiles() const { return (width + tile_columns - 1) / tile_columns; }
  int64_t tiles() const { return (selected + tile_rows - 1) / tile_rows * column_tiles(); }
};

// The weight's entries of a neuron stand side by side: whole rows, about so many entries at a time.
constexpr int64_t kRowTileEntries = 1 << 14;
// They stand in different lines of memory (columns of a down projection): then a tile goes down the lines, and writes
// to all its neurons in one line before it turns to the next. Each line costs an address translation, and a neuron's
// entries lie a page or more apart. The rounded entries wait in a buffer that fits into the first-level cache. Every
// write misses the caches, so those of the next line are asked for beforehand (measured: 1.6 times as fast).
constexpr int64_t kScatterRows = 128, kScatterColumns = 64;
// Fewer entries than this are not worth a second thread.
constexpr int64_t kTooSmallToShare = 1 << 15;

template <class Value>
LAPE_INLINE void update_row(const Step& step, const Value* __restrict grad, Value* __restrict master,
                            Value* __restrict exp_avg, Value* __restrict exp_avg_sq, int64_t width) {
  const Value clip(step.clip), decay(step.decay), eps(step.eps), size(step.size);
  const Value beta1(step.beta1), beta2(step.beta2), share2(1 - step.beta2), inverse_root(1 / step.root_correction2);
  // Interpolation from the nearer end, which is exact at both.
  const bool from_average = step.beta1 > 0.5;
  const Value share1 = from_average ? Value(1 - step.beta1) : -beta1;
  LAPE_VECTORISE
  for (int64_t entry = 0; entry < width; ++entry) {
    const Value g = clip * grad[entry], old = exp_avg[entry];
    const Value average = (from_average ? old : g) + share1 * (g - old);
    const Value square = beta2 * exp_avg_sq[entry] + share2 * g * g;
    exp_avg[entry] = average;
    exp_avg_sq[entry] = square;
    master[entry] = decay * master[entry] - size * (average / (std::sqrt(square) * inverse_root + eps));
  }
}

template <class Scalar>
LAPE_INLINE void round_row(const Wide<Scalar>* __restrict master, Scalar* __restrict rounded, int64_t width) {
  LAPE_VECTORISE
  for (int64_t entry = 0; entry < width; ++entry) {
    if constexpr (std::is_same_v<Scalar, BFloat16>) {
      // Unlike the activations, a master may be any NaN, and the carry of rounding would make some of them numbers.
      const uint32_t upper = round_to_upper_half(master[entry]) >> 16;
      rounded[entry].x = static_cast<uint16_t>(master[entry] == master[entry] ? upper : 0x7FC0u);
    } else {
      rounded[entry] = static_cast<Scalar>(master[entry]);
    }
  }
}

template <class Scalar>
LAPE_INLINE void update_tile(const Step& step, const Part& part, int64_t number) {
  using Value = Wide<Scalar>;
  const int64_t first_row = number / part.column_tiles() * part.tile_rows;
  const int64_t end_row = std::min(first_row + part.tile_rows, part.selected);
  const int64_t column = number % part.column_tiles() * part.tile_columns;
  const int64_t width = std::min(part.tile_columns, part.width - column);
  Scalar buffer[kScatterRows * kScatterColumns];
  Scalar* weight = static_cast<Scalar*>(part.weight) + column * part.entry_stride;
  for (int64_t row = first_row; row < end_row; ++row) {
    const int64_t start = row * part.width + column;
    Value* master = static_cast<Value*>(part.master) + start;
    update_row(step, static_cast<const Value*>(part.grad) + start, master, static_cast<Value*>(part.exp_avg) + start,
               static_cast<Value*>(part.exp_avg_sq) + start, width);
    if (part.weight == nullptr) continue;
    round_row<Scalar>(master, part.scattered() ? buffer + (row - first_row) * kScatterColumns
                                               : weight + part.neurons[row] * part.neuron_stride, width);
  }
  if (!part.scattered()) return;
  for (int64_t entry = 0; entry < width; ++entry) {
    Scalar* line = weight + entry * part.entry_stride;
    const Scalar* next_line = entry + 1 < width ? line + part.entry_stride : line;
    for (int64_t row = first_row; row < end_row; ++row) {
      const int64_t place = part.neurons[row] * part.neuron_stride;
      __builtin_prefetch(next_line + place, 1);
      line[place] = buffer[(row - first_row) * kScatterColumns + entry];
    }
  }
}

// What a tensor spans in memory, for the search for overlaps.
struct Span {
  const char* name;
  intptr_t begin = 0, end = 0;
  bool written = true;
  // Of a weight, in bytes: a row of `extent` every `period`. Views that share the period may lie side by side in it.
  int64_t extent = 0, period = 0;
};

Span span_of(const char* name, const Tensor& values, bool written) {
  const auto begin = reinterpret_cast<intptr_t>(values.const_data_ptr());
  return {name, begin, begin + values.numel() * static_cast<int64_t>(values.element_size()), written};
}

// Throws if entries of the weight share memory with each other.
Span span_of_weight(const Tensor& weight) {
  const int64_t bytes = weight.element_size();
  // (stride, size), the smaller stride first; the stride of a dimension of one entry means nothing.
  std::pair<int64_t, int64_t> inner{weight.stride(1), weight.size(1)}, outer{weight.stride(0), weight.size(0)};
  if (outer.second == 1 || (inner.second > 1 && outer.first < inner.first)) std::swap(inner, outer);
  const int64_t extent = inner.second == 1 ? 1 : (inner.second - 1) * inner.first + 1;
  STD_TORCH_CHECK((inner.second == 1 || inner.first > 0) && (outer.second == 1 || outer.first >= extent),
                  "The entries of a weight share memory with each other: its shape is ", shape_of(weight),
                  " and its strides are [", weight.stride(0), ", ", weight.stride(1), "]; pass a clone.");
  const auto begin = reinterpret_cast<intptr_t>(weight.const_data_ptr());
  const int64_t length = outer.second == 1 ? extent : (outer.second - 1) * outer.first + extent;
  // The stride of a single row may be any number, and overflow in bytes.
  const int64_t period = outer.first > std::numeric_limits<int64_t>::max() / bytes ? 0 : outer.first * bytes;
  return {"A weight", begin, begin + length * bytes, true, extent * bytes, period};
}

bool side_by_side(const Span& left, const Span& right) {
  if (left.period == 0 || left.period != right.period) return false;
  const int64_t offset = (right.begin - left.begin) % left.period;
  return offset >= left.extent && offset + right.extent <= left.period;
}

// Throws if something that is written shares memory with anything else, which threads would then race for.
void check_disjoint(std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& left, const Span& right) { return left.begin < right.begin; });
  // Those that reach beyond the beginning of the current one.
  std::vector<const Span*> open;
  for (const Span& span : spans) {
    std::erase_if(open, [&](const Span* other) { return other->end <= span.begin; });
    for (const Span* other : open) {
      STD_TORCH_CHECK((!span.written && !other->written) || side_by_side(*other, span), other->name, " and ",
                      span.name, " overlap in memory, but are updated in place; clone one first.");
    }
    if (span.end > span.begin) open.push_back(&span);
  }
}

void check_operand(const char* name, const Tensor& values, const Tensor& master, int64_t selected) {
  STD_TORCH_CHECK(values.is_cpu() && values.dim() == 2 && values.size(0) == selected &&
                      values.size(1) == master.size(1) && values.scalar_type() == master.scalar_type() &&
                      values.is_contiguous(),
                  name, " must be contiguous [K, D] = [", selected, ", ", master.size(1),
                  "] on the CPU in the dtype of its master, but its shape is ", shape_of(values), ".");
  check_memory(name, values);
}

// The neurons of every part, one after the other: copied, so that nobody can change them after the check.
std::vector<int64_t> read_neurons(const std::vector<Tensor>& neurons) {
  std::vector<int64_t> every;
  for (const Tensor& chosen : neurons) {
    STD_TORCH_CHECK(chosen.is_cpu() && chosen.dim() == 1 && chosen.scalar_type() == ScalarType::Long,
                    "neurons must be int64 [K] on the CPU, but the shape of one is ", shape_of(chosen), ".");
    check_memory("neurons", chosen);
    // Any number of them may stand in one place of memory, and their copies in no memory.
    STD_TORCH_CHECK(chosen.size(0) <= 1 || chosen.stride(0) != 0, "neurons must increase strictly, but one of them ",
                    "stands for all ", chosen.size(0), ".");
    const auto* values = static_cast<const int64_t*>(chosen.const_data_ptr());
    for (int64_t place = 0; place < chosen.size(0); ++place) every.push_back(values[place * chosen.stride(0)]);
  }
  return every;
}

void check_neurons(const int64_t* neurons, int64_t selected, int64_t height) {
  for (int64_t place = 0; place < selected; ++place) {
    const int64_t before = place == 0 ? -1 : neurons[place - 1];
    STD_TORCH_CHECK(neurons[place] > before && neurons[place] < height, "neurons must increase strictly within the ",
                    height, " rows of their weight, but ", neurons[place], " stands at place ", place, " after ",
                    before, ".");
  }
}

void add_weight(Part& part, const Tensor& weight, const Tensor& master, std::vector<Span>& spans) {
  part.dtype = weight.scalar_type();
  // Refuses other dtypes here, where it can say so, and not on a thread.
  dispatch_dtype(part.dtype, []<class>() {});
  const auto wide = part.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == part.width &&
                      master.scalar_type() == wide,
                  "A weight must be [F, ", part.width, "] on the CPU and its master float32 (float64 for float64), ",
                  "but the shape of one is ", shape_of(weight), ".");
  check_memory("A weight", weight);
  check_neurons(part.neurons, part.selected, weight.size(0));
  if (part.selected == 0 || part.width == 0) return;
  spans.push_back(span_of_weight(weight));
  part.weight = weight.mutable_data_ptr();
  part.neuron_stride = weight.stride(0);
  part.entry_stride = part.width == 1 ? 1 : weight.stride(1);
}

double read_clip(const std::optional<Tensor>& clip) {
  if (!clip) return 1;
  const bool single = clip->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(clip->is_cpu() && clip->dim() == 0 && (single || clip->scalar_type() == ScalarType::Double),
                  "clip must be float32 or float64 with no dimension on the CPU, but its shape is ", shape_of(*clip),
                  ".");
  check_memory("clip", *clip);
  return single ? *static_cast<const float*>(clip->const_data_ptr())
                : *static_cast<const double*>(clip->const_data_ptr());
}

}  // namespace

void indexed_adamw_(const std::vector<Tensor>& weights, const std::vector<Tensor>& neurons,
                    const std::vector<Tensor>& grads, const std::vector<Tensor>& masters,
                    const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                    const std::optional<Tensor>& clip, double lr, double beta1, double beta2, double eps,
                    double weight_decay, int64_t step) {
  for (const auto* list : {&weights, &neurons, &grads, &exp_avgs, &exp_avg_sqs}) {
    STD_TORCH_CHECK(list->size() == masters.size(), "There are ", masters.size(), " masters, but ", list->size(),
                    " of another operand; pass one of each for every part.");
  }
  STD_TORCH_CHECK(step >= 1, "step is ", step, ", but it counts from 1.");
  const std::vector<int64_t> every_neuron = read_neurons(neurons);
  const int64_t* next_neuron = every_neuron.data();
  std::vector<Part> parts;
  std::vector<Span> spans;
  int64_t tiles = 0, entries = 0;
  for (size_t number = 0; number < masters.size(); ++number) {
    const Tensor &master = masters[number], &weight = weights[number];
    Part part{master.scalar_type()};
    part.neurons = next_neuron;
    part.selected = neurons[number].size(0);
    next_neuron += part.selected;
    STD_TORCH_CHECK(master.dim() == 2 && (part.dtype == ScalarType::Float || part.dtype == ScalarType::Double),
                    "A master must be float32 or float64 [K, D], but its shape is ", shape_of(master), ".");
    part.width = master.size(1);
    check_operand("A master", master, master, part.selected);
    check_operand("grad", grads[number], master, part.selected);
    check_operand("exp_avg", exp_avgs[number], master, part.selected);
    check_operand("exp_avg_sq", exp_avg_sqs[number], master, part.selected);
    if (weight.dim() != 1 || weight.size(0) != 0) add_weight(part, weight, master, spans);
    spans.push_back(span_of("grad", grads[number], false));
    spans.push_back(span_of("A master", master, true));
    spans.push_back(span_of("exp_avg", exp_avgs[number], true));
    spans.push_back(span_of("exp_avg_sq", exp_avg_sqs[number], true));
    part.grad = grads[number].const_data_ptr();
    part.master = master.mutable_data_ptr();
    part.exp_avg = exp_avgs[number].mutable_data_ptr();
    part.exp_avg_sq = exp_avg_sqs[number].mutable_data_ptr();
    if (master.numel() == 0) continue;
    part.tile_rows = part.scattered() ? kScatterRows : std::max<int64_t>(1, kRowTileEntries / part.width);
    part.tile_columns = part.scattered() ? kScatterColumns : part.width;
    part.first_tile = tiles;
    tiles += part.tiles();
    entries += master.numel();
    parts.push_back(part);
  }
  check_disjoint(std::move(spans));

  const Step constants{read_clip(clip),
                       1 - lr * weight_decay,
                       beta1,
                       beta2,
                       eps,
                       lr / (1 - std::pow(beta1, static_cast<double>(step))),
                       std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))};
  const InstructionSet isa = instruction_set();
  // One flat range of tiles over all parts.
  torch::stable::parallel_for(0, tiles, entries < kTooSmallToShare ? tiles : 1, [&](int64_t begin, int64_t end) {
    const auto starts_after = [](int64_t tile, const Part& part) { return tile < part.first_tile; };
    auto part = std::upper_bound(parts.begin(), parts.end(), begin, starts_after) - 1;
    for (int64_t tile = begin; tile < end; ++tile) {
      if (tile == part->first_tile + part->tiles()) ++part;
      dispatch_dtype(part->dtype, [&]<class Scalar>() {
        with_instruction_set(isa, [&]() LAPE_INLINE_LAMBDA {
          update_tile<Scalar>(constants, *part, tile - part->first_tile);
        });
      });
    }
  });
}

}  // namespace lape_fast
