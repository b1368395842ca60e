"""Peak memory of one step beyond what the optimizer keeps."""

from __future__ import annotations

import os

import torch
from torch.profiler import ProfilerActivity, profile

from harness.clocks import Step

# The profiler's library announces every start and stop on stderr, unless told that only errors matter.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_extra_bytes(step: Step, device: torch.device) -> int | None:
    """Most bytes allocated through PyTorch at any moment of a warm step, less what was allocated before it.

    Returns:
        None where PyTorch does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return _peak_of_allocations(profiler)


def _peak_of_allocations(profiler: profile) -> int | None:
    """PyTorch counts peaks of CPU memory nowhere; its profiler records every allocation and release."""
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak
