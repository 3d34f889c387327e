// One kernel body, compiled once per instruction set, chosen when the program runs.
//
// A kernel is a chain of LAPE_INLINE functions called from a LAPE_INLINE lambda. with_instruction_set copies that chain
// into one function per target below, where the compiler's auto-vectoriser sees it with that target's registers. If a
// function of the chain could not be inlined the build fails, so no target can silently run another one's code.
#pragma once

#define LAPE_INLINE __attribute__((always_inline)) inline
#define LAPE_INLINE_LAMBDA __attribute__((always_inline))

// Before a loop whose steps do not depend on each other. Not `omp simd`, which keeps every local struct in memory.
#if defined(__clang__)
#define LAPE_VECTORISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define LAPE_VECTORISE _Pragma("GCC ivdep")
#endif

#if defined(__x86_64__)
#define LAPE_X86 1
#define LAPE_AVX2 __attribute__((target("avx2,fma")))
#define LAPE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif

namespace lape_fast {

enum class InstructionSet { baseline, avx2, avx512 };

// The best set of this processor, or the one that the environment variable LAPE_FAST_ISA names (baseline, avx2,
// avx512); read once. Throws when the name is unknown or this processor lacks that set.
InstructionSet instruction_set();

template <class Body>
void run_baseline(const Body& body) {
  body();
}

#ifdef LAPE_X86
template <class Body>
LAPE_AVX2 void run_avx2(const Body& body) {
  body();
}

template <class Body>
LAPE_AVX512 void run_avx512(const Body& body) {
  body();
}
#endif

template <class Body>
void with_instruction_set(InstructionSet chosen, const Body& body) {
#ifdef LAPE_X86
  if (chosen == InstructionSet::avx512) return run_avx512(body);
  if (chosen == InstructionSet::avx2) return run_avx2(body);
#endif
  run_baseline(body);
}

}  // namespace lape_fast
