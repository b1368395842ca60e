"""Named ranges in profiles: `clara.measure`, `clara.adapt`, `clara.update`, or `clara.step` for all three."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


def range_of(verb: str, tensors: int) -> AbstractContextManager[Any]:
    """A range around the work of `verb` on so many tensors, for whichever profiler listens.

    Under PyTorch's profiler, or its NVTX emission, a `record_function`; else, where CUDA is in use, an NVTX range,
    which is a call of an empty function unless a tool such as Nsight Systems is attached. Without either, nothing.
    """
    recorded = torch.autograd.profiler._is_profiler_enabled
    if not recorded and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return _NOTHING
    name = f"clara.{verb} ({tensors} tensors)"
    return torch.profiler.record_function(name) if recorded else torch.cuda.nvtx.range(name)
