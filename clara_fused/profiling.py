"""Named ranges in profiles: `clara.measure`, `clara.adapt`, `clara.apply`, with the variant and the tensor count."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .options import Variant


def profiler_range(verb: str, variant: Variant, tensors: int) -> AbstractContextManager[Any]:
    """A range around the work of `verb` on so many tensors, for whichever profiler listens.

    Under PyTorch's profiler, or its NVTX emission, a `record_function`; else, where CUDA is in use, an NVTX range,
    which is a call of an empty function unless a tool such as Nsight Systems is attached. Without either, nothing.
    """
    # Under torch.compile a range would break the graph.
    if torch.compiler.is_compiling():
        return nullcontext()
    recorded = torch.autograd.profiler._is_profiler_enabled
    if not recorded and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return nullcontext()
    name = f"clara.{verb} ({variant.value}, {tensors} tensors)"
    return torch.profiler.record_function(name) if recorded else torch.cuda.nvtx.range(name)
