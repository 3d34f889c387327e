"""The CUDA kernels, in Triton: one module per op, each with a ``launch`` that the op calls.

This folder is ``kernels/triton`` in the repository and ``lape_fast.kernels`` in Python. Only the ops import it, and
only when they run a kernel, so that lape_fast itself needs no Triton.
"""

from __future__ import annotations

import os

# Contracting a * b + c into one fused operation is faster and rounds once less. Triton 3.9 warns while this is unset.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
