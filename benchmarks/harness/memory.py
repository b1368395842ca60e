"""Memory of the measured process: what a step takes at its peak, and where its temporaries come from."""

from __future__ import annotations

import ctypes
import os
import platform
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from harness.clocks import Step

# The profiler's library announces every start and stop on stderr, unless told that only errors matter.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, instead of giving it back to the system each time.

    By default glibc maps every large block anew and unmaps it when it is freed. A step with temporaries then waits for
    the system to find and clear pages, on a virtual machine for its host as well, which takes ten times longer some
    times than others, and what was given back keeps the system busy beside the steps that follow. PyTorch's allocator
    for CUDA keeps what is freed; with this, the CPU's does so too.

    Returns:
        whether it is so now; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No blocks outside the heap, and a heap that never shrinks. Both return 1 on success.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Give what was kept back to the system; does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


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
    # PyTorch counts peaks of CPU memory nowhere; its profiler records every allocation and release.
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))
