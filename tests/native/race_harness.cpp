// The kernels' own inner functions on plain threads, for ThreadSanitizer, to which libgomp's barriers are races.
//
//     race_harness            counts and updates from 2 and 8 threads, compared with one thread; exits with 0
//     race_harness --broken   the same without the atomics, which ThreadSanitizer has to report
//
// The functions are in unnamed namespaces, so the kernels are included as they are. Of torch they need nothing but
// headers: the ops around them, which make tensors, are dropped by the linker (`make sanitize`).

#include "../../csrc/gated_activation.cpp"
#define check_disjoint check_backward_disjoint
#include "../../csrc/gated_activation_backward.cpp"
#undef check_disjoint
#include "../../csrc/indexed_adamw.cpp"

#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <thread>

namespace lape_fast {
namespace {

// Everything that threads share out: rows, of which all add to the same columns of the counts.
constexpr int64_t kTokens = 192, kNeurons = 300, kLanguages = 3, kRepetitions = 5;

void on_threads(int64_t threads, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> running;
  for (int64_t number = 0; number < threads; ++number) running.emplace_back(body, number);
  for (std::thread& each : running) each.join();
}

Tile rows_of_thread(int64_t number, int64_t threads, bool shared) {
  return {kTokens * number / threads, kTokens * (number + 1) / threads, 0, kNeurons, shared};
}

template <class Scalar>
std::vector<Scalar> random_values(int64_t size, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<Scalar> values(size);
  for (Scalar& value : values) value = static_cast<Scalar>(normal(generator));
  return values;
}

// The counts of one activation on so many threads, by the kernel's own tiles.
template <class Scalar>
std::vector<int64_t> counted(int64_t threads, bool shared) {
  const auto gate = random_values<Scalar>(kTokens * kNeurons, 1), up = random_values<Scalar>(kTokens * kNeurons, 2);
  std::vector<Scalar> h(kTokens * kNeurons);
  std::vector<int32_t> language_ids(kTokens);
  for (int64_t token = 0; token < kTokens; ++token) language_ids[token] = token / 20 % (kLanguages + 1) - 1;
  std::vector<int64_t> counts(kLanguages * kNeurons, 0);
  Forward<Scalar> op{{gate.data(), kNeurons}, {up.data(), kNeurons}, {h.data(), kNeurons}};
  op.language_ids = language_ids.data();
  op.id_stride = 1;
  op.counts = counts.data();
  op.languages = kLanguages;
  op.neurons = kNeurons;
  on_threads(threads, [&](int64_t number) {
    std::vector<Counter<Scalar>> counters(kNeurons);
    activate_tile<Activation::silu, true>(op, rows_of_thread(number, threads, shared), counters.data());
  });
  return counts;
}

// What the backward leaves in its four outputs.
std::vector<float> differentiated(int64_t threads) {
  const auto grad_h = random_values<float>(kTokens * kNeurons, 3);
  auto gate = random_values<float>(kTokens * kNeurons, 4), up = random_values<float>(kTokens * kNeurons, 5);
  const std::vector<SelectedNeuron> selection{{3, 1}, {77, 0}, {299, 2}};
  std::vector<float> hidden(kTokens * 3), grads(kTokens * 6);
  const Backward<float> op{{grad_h.data(), kNeurons}, {gate.data(), kNeurons}, {up.data(), kNeurons},
                           {hidden.data(), 3},        {grads.data(), 6},       selection};
  on_threads(threads, [&](int64_t number) {
    differentiate_tile<Activation::gelu, true>(op, rows_of_thread(number, threads, true));
  });
  for (const auto* each : {&up, &hidden, &grads}) gate.insert(gate.end(), each->begin(), each->end());
  return gate;
}

// The weight's columns and the masters after a step that threads share.
std::vector<float> updated(int64_t threads) {
  constexpr int64_t kSelected = 200, kWidth = 130, kHeight = 400;
  const auto grad = random_values<float>(kSelected * kWidth, 6);
  auto master = random_values<float>(kSelected * kWidth, 7), weight = random_values<float>(kHeight * kWidth, 8);
  std::vector<float> exp_avg(kSelected * kWidth), exp_avg_sq(kSelected * kWidth);
  std::vector<int64_t> neurons(kSelected);
  for (int64_t place = 0; place < kSelected; ++place) neurons[place] = 2 * place;
  Part part{ScalarType::Float, weight.data(), 1, kHeight, neurons.data(), grad.data(), master.data()};
  part.exp_avg = exp_avg.data();
  part.exp_avg_sq = exp_avg_sq.data();
  part.selected = kSelected;
  part.width = kWidth;
  part.tile_rows = kScatterRows;
  part.tile_columns = kScatterColumns;
  const Step step{1, 0.99, 0.9, 0.999, 1e-8, 1e-3, 1};
  on_threads(threads, [&](int64_t number) {
    for (int64_t tile = number; tile < part.tiles(); tile += threads) update_tile<float>(step, part, tile);
  });
  weight.insert(weight.end(), master.begin(), master.end());
  return weight;
}

bool same(const char* name, int64_t threads, const auto& found, const auto& expected) {
  if (found == expected) return true;
  std::printf("%s on %lld threads is not what it is on one.\n", name, static_cast<long long>(threads));
  return false;
}

// How many comparisons held; 0 if one did not.
int64_t all_same(bool shared) {
  bool holds = true;
  int64_t comparisons = 0;
  for (int64_t repetition = 0; repetition < kRepetitions; ++repetition) {
    for (const int64_t threads : {2, 8}) {
      holds &= same("counting fp32", threads, counted<float>(threads, shared), counted<float>(1, false));
      holds &= same("counting bf16", threads, counted<BFloat16>(threads, shared), counted<BFloat16>(1, false));
      holds &= same("backward", threads, differentiated(threads), differentiated(1));
      holds &= same("update", threads, updated(threads), updated(1));
      comparisons += 4;
    }
  }
  return holds ? comparisons : 0;
}

}  // namespace
}  // namespace lape_fast

int main(int arguments, char** values) {
  const bool broken = arguments > 1 && std::strcmp(values[1], "--broken") == 0;
  const int64_t comparisons = lape_fast::all_same(!broken);
  if (comparisons == 0) return 1;
  std::printf("%lld comparisons: every result is that of one thread.\n", static_cast<long long>(comparisons));
  return 0;
}
