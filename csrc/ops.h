// Every native op; the schemas stand in lape_fast/ops, in the module of the same name.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace lape_fast {

using torch::stable::Tensor;

// h = act(gate) * up; counts[language, neuron] += (gate > 0).
Tensor gated_activation(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation,
                        const std::optional<Tensor>& language_ids, const std::optional<Tensor>& counts);

// gate <- dL/dgate, up <- dL/dup; returns the selected columns of h and of (dL/dgate | dL/dup).
std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad_h, const Tensor& gate,
                                                     const std::optional<Tensor>& up, int64_t activation,
                                                     const std::optional<Tensor>& slots, int64_t selected);

}  // namespace lape_fast
