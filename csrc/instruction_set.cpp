#include "instruction_set.h"

#include <cstdlib>
#include <exception>
#include <string>

#include <torch/headeronly/util/Exception.h>

namespace lape_fast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

InstructionSet best_of_this_processor() {
#ifdef LAPE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return InstructionSet::avx512;
  if (avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet choose() {
  const InstructionSet best = best_of_this_processor();
  const char* wanted = std::getenv("LAPE_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int number = 0; number < 3; ++number) {
    if (std::string(wanted) != kNames[number]) continue;
    STD_TORCH_CHECK(number <= static_cast<int>(best), "LAPE_FAST_ISA asks for ", wanted, ", but the best that this ",
                    "processor has is ", kNames[static_cast<int>(best)], "; unset the variable.");
    return static_cast<InstructionSet>(number);
  }
  STD_TORCH_CHECK(false, "LAPE_FAST_ISA is \"", wanted, "\"; set it to baseline, avx2 or avx512, or unset it.");
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

}  // namespace lape_fast

// For tests and benchmark records, through ctypes: the name of the instruction set in use, null if there is none.
extern "C" __attribute__((visibility("default"))) const char* lape_fast_instruction_set() {
  try {
    return lape_fast::kNames[static_cast<int>(lape_fast::instruction_set())];
  } catch (const std::exception&) {
    return nullptr;
  }
}
