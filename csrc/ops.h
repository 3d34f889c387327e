// Every native op; the schemas stand in lape_fast/ops, in the module of the same name.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

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

// One AdamW step for the masters and moments of every part, rounded into the rows of its weight.
void indexed_adamw_(const std::vector<Tensor>& weights, const std::vector<Tensor>& neurons,
                    const std::vector<Tensor>& grads, const std::vector<Tensor>& masters,
                    const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                    const std::optional<Tensor>& clip, double lr, double beta1, double beta2, double eps,
                    double weight_decay, int64_t step);

}  // namespace lape_fast
