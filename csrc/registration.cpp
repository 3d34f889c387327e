// The table of contents of the native code: one line per op. The schemas are defined in Python, beside each op's
// reference, so that the ops exist where this extension was not built.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(lape_fast, CPU, m) {
  m.impl("gated_activation", TORCH_BOX(&lape_fast::gated_activation));
  m.impl("gated_activation_backward", TORCH_BOX(&lape_fast::gated_activation_backward));
  m.impl("indexed_adamw_", TORCH_BOX(&lape_fast::indexed_adamw_));
}
