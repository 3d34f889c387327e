// The backward of h = act(gate) * up, in place over gate and up, keeping the columns of k selected neurons compactly.

#include <limits>
#include <vector>

#include "elementwise.h"
#include "ops.h"

namespace lape_fast {
namespace {

// Selected neurons whose h is computed together.
constexpr int64_t kBatch = 256;

struct SelectedNeuron {
  int64_t neuron, slot;
};

template <class Scalar>
struct Backward {
  Rows<const Scalar> grad_h;
  Rows<Scalar> gate, up;       // become dL/dgate, dL/dup
  Rows<Scalar> hidden, grads;  // [T, K], [T, 2K] or [T, K]
  // Sorted by neuron, so that a tile finds its own with two searches instead of a test per element.
  const std::vector<SelectedNeuron>& selection;
};

template <class Value>
struct Gradients {
  Value gate, up;
};

template <Activation activation, bool gated, class Scalar>
LAPE_INLINE void differentiate_row(const Scalar* grad_h, Scalar* gate, Scalar* up, int64_t width) {
  const auto step = [](Wide<Scalar> grad, Wide<Scalar> gate, auto... up) LAPE_INLINE_LAMBDA {
    const auto [value, slope] = differentiate<activation>(gate);
    return Gradients<Wide<Scalar>>{(grad * ... * up) * slope, grad * value};
  };
  const auto of_gate = [](const auto& gradients) LAPE_INLINE_LAMBDA { return gradients.gate; };
  const auto of_up = [](const auto& gradients) LAPE_INLINE_LAMBDA { return gradients.up; };
  for_units<Scalar>(width, [&]<class Unit>(int64_t first, int64_t units) LAPE_INLINE_LAMBDA {
    const auto* __restrict grads = reinterpret_cast<const Unit*>(grad_h + first);
    auto* __restrict gates = reinterpret_cast<Unit*>(gate + first);
    auto* __restrict ups = reinterpret_cast<Unit*>(gated ? up + first : nullptr);
    LAPE_VECTORISE
    for (int64_t unit = 0; unit < units; ++unit) {
      if constexpr (gated) {
        const auto gradients = map(step, load(grads[unit]), load(gates[unit]), load(ups[unit]));
        store(map(of_gate, gradients), gates[unit]);
        store(map(of_up, gradients), ups[unit]);
      } else {
        store(map(of_gate, map(step, load(grads[unit]), load(gates[unit]))), gates[unit]);
      }
    }
  });
}

// h of the selected neurons, while gate and up still hold their values.
template <Activation activation, bool gated, class Scalar>
LAPE_INLINE void keep_hidden(const Scalar* gate, const Scalar* up, const SelectedNeuron* begin,
                             const SelectedNeuron* end, Scalar* hidden) {
  Scalar some_gate[kBatch], some_up[kBatch], some_h[kBatch];
  for (int64_t size = 0; begin < end; begin += size) {
    size = std::min<int64_t>(kBatch, end - begin);
    for (int64_t place = 0; place < size; ++place) {
      some_gate[place] = gate[begin[place].neuron];
      if constexpr (gated) some_up[place] = up[begin[place].neuron];
    }
    activate_row<activation, gated>(some_gate, some_up, some_h, size);
    for (int64_t place = 0; place < size; ++place) hidden[begin[place].slot] = some_h[place];
  }
}

template <Activation activation, bool gated, class Scalar>
LAPE_INLINE void differentiate_tile(const Backward<Scalar>& op, const Tile& tile) {
  const auto comes_before = [](const SelectedNeuron& chosen, int64_t column) { return chosen.neuron < column; };
  const auto begin = op.selection.data(), end = begin + op.selection.size();
  const auto first = std::lower_bound(begin, end, tile.first_column, comes_before);
  const auto last = std::lower_bound(first, end, tile.end_column, comes_before);
  const int64_t selected = op.selection.size();
  for (int64_t row = tile.first_row; row < tile.end_row; ++row) {
    Scalar* gate = op.gate[row];
    Scalar* up = gated ? op.up[row] : nullptr;
    keep_hidden<activation, gated>(gate, up, first, last, op.hidden[row]);
    differentiate_row<activation, gated>(op.grad_h[row] + tile.first_column, gate + tile.first_column,
                                         gated ? up + tile.first_column : nullptr,
                                         tile.end_column - tile.first_column);
    Scalar* grads = op.grads[row];
    for (auto chosen = first; chosen < last; ++chosen) {
      grads[chosen->slot] = gate[chosen->neuron];
      if constexpr (gated) grads[selected + chosen->slot] = up[chosen->neuron];
    }
  }
}

void check_slots(const std::optional<Tensor>& slots, int64_t selected, int64_t neurons) {
  // A slot is an int32; a tensor of no tokens may have more neurons than that.
  const int64_t most = slots ? std::min<int64_t>(neurons, std::numeric_limits<int32_t>::max()) : 0;
  STD_TORCH_CHECK(selected >= 0 && selected <= most, "selected is ", selected, ", but ",
                  slots ? "there are " + std::to_string(most) + " neurons" : "there are no slots",
                  "; pass the number of slots in the slot map.");
  if (!slots) return;
  STD_TORCH_CHECK(slots->is_cpu() && slots->scalar_type() == ScalarType::Int && slots->dim() == 1 &&
                      slots->size(0) == neurons,
                  "slots must be int32 [", neurons, "] on the CPU, but its shape is ", shape_of(*slots), ".");
  check_memory("slots", *slots);
}

// The selected neurons in order; throws unless slots holds each of 0 .. selected - 1 exactly once.
std::vector<SelectedNeuron> read_selection(const std::optional<Tensor>& slots, int64_t selected, int64_t neurons) {
  std::vector<SelectedNeuron> selection;
  if (!slots) return selection;
  const auto* values = static_cast<const int32_t*>(slots->const_data_ptr());
  const int64_t stride = slots->stride(0);
  std::vector<bool> taken(selected, false);
  for (int64_t neuron = 0; neuron < neurons; ++neuron) {
    const int64_t slot = values[neuron * stride];
    if (slot == -1) continue;
    STD_TORCH_CHECK(slot >= 0 && slot < selected && !taken[slot], "slots gives neuron ", neuron, " the slot ", slot,
                    ", but each of 0 to ", selected - 1, " may occur once, and -1 elsewhere; build it with slot_map.");
    taken[slot] = true;
    selection.push_back({neuron, slot});
  }
  STD_TORCH_CHECK(static_cast<int64_t>(selection.size()) == selected, "slots fills ", selection.size(), " of ",
                  selected, " slots; pass the number of slots in the slot map as selected.");
  return selection;
}

// Throws if writing one of the two in place could change the other, or if rows of `written` overlap each other.
void check_disjoint(const char* names, const Tensor& written, const Tensor& other) {
  if (written.numel() == 0) return;
  const int64_t bytes = written.element_size(), width = written.size(1) * bytes, rows = written.size(0);
  // The stride of a single row may be any number, and overflow in bytes.
  const int64_t stride = rows == 1 ? width : written.stride(0) * bytes;
  const int64_t other_stride = rows == 1 ? width : other.stride(0) * bytes;
  STD_TORCH_CHECK(stride >= width, "The rows of a tensor overwritten in place overlap; clone it first.");
  const auto first = reinterpret_cast<intptr_t>(written.const_data_ptr());
  const auto other_first = reinterpret_cast<intptr_t>(other.const_data_ptr());
  const int64_t offset = other_first - first;
  const bool apart = offset >= (rows - 1) * stride + width || -offset >= (rows - 1) * other_stride + width;
  // Halves of one fused tensor: the same stride, side by side within a row.
  const bool interleaved = rows > 1 && stride == other_stride && ((offset % stride) + stride) % stride >= width &&
                           ((offset % stride) + stride) % stride <= stride - width;
  STD_TORCH_CHECK(apart || interleaved, names, " overlap in memory, but are overwritten in place; clone one first.");
}

}  // namespace

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad_h, const Tensor& gate,
                                                     const std::optional<Tensor>& up, int64_t activation,
                                                     const std::optional<Tensor>& slots, int64_t selected) {
  STD_TORCH_CHECK(gate.dim() == 2, "gate must be [T, F], but its shape is ", shape_of(gate), ".");
  check_rows("gate", gate, gate);
  check_rows("grad_h", grad_h, gate);
  check_disjoint("gate and grad_h", gate, grad_h);
  if (up) {
    check_rows("up", *up, gate);
    check_disjoint("up and grad_h", *up, grad_h);
    check_disjoint("gate and up", gate, *up);
  }
  const int64_t tokens = gate.size(0), neurons = gate.size(1);
  check_slots(slots, selected, neurons);
  Tensor hidden = new_matrix("hidden", gate, tokens, selected);
  Tensor grads = new_matrix("grads", gate, tokens, up ? 2 * selected : selected);
  // The slots of any number of neurons may stand in one place of memory, and to walk along them would take for ever.
  if (gate.numel() == 0) return {hidden, grads};
  const std::vector<SelectedNeuron> selection = read_selection(slots, selected, neurons);
  const InstructionSet isa = instruction_set();
  dispatch(gate.scalar_type(), activation, up.has_value(), [&]<class Scalar, Activation chosen, bool gated>() {
    const Backward<Scalar> op{rows_of<Scalar>(grad_h),        mutable_rows_of<Scalar>(gate),
                              mutable_rows_of<Scalar>(up),    mutable_rows_of<Scalar>(hidden),
                              mutable_rows_of<Scalar>(grads), selection};
    parallel_tiles(tokens, neurons, Cut::rows_first, [&](const Tile& tile) {
      with_instruction_set(isa, [&]() LAPE_INLINE_LAMBDA { differentiate_tile<chosen, gated>(op, tile); });
    });
  });
  return {hidden, grads};
}

}  // namespace lape_fast
