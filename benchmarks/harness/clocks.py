"""Timing of steps on the CPU and on CUDA devices, and the bandwidth that simple loops reach there."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

CPU_STREAM_BYTES = 512 << 20
CUDA_STREAM_BYTES = 1 << 30

Step = Callable[[], Any]


class Clock(Protocol):
    """Times calls on one device. Keeps memory of its own only while it exists."""

    min_sample_seconds: float
    """A sample is made of as many steps as fill this time."""

    def seconds_per_step(self, step: Step, steps: int) -> float:
        """Mean time of `steps` calls in a row."""
        ...


class CpuClock:
    """Leaves the cache as it is: a CPU's is small against lists of large tensors, and has other users as well."""

    min_sample_seconds = 0.02

    def seconds_per_step(self, step: Step, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - started) / steps


class CudaClock:
    """CUDA events around every step.

    With `flush_cache`, four times the L2 cache is overwritten before each step, outside the events: the step then finds
    its tensors in memory, as after a backward pass. As there, the host is ahead of the device when a step begins: one
    more step, which is not counted, keeps the device busy at first. So what is measured is the device's time, plus the
    waiting for a host that is slower than the device. The host's own time is cpu_overhead.py's to measure.
    """

    min_sample_seconds = 0.005

    def __init__(self, device: torch.device, flush_cache: bool = True) -> None:
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.zeros(4 * l2_bytes, dtype=torch.uint8, device=device) if flush_cache else None

    def seconds_per_step(self, step: Step, steps: int) -> float:
        new_event = partial(torch.cuda.Event, enable_timing=True)
        events = [(new_event(), new_event()) for _ in range(steps + 1)]
        for start, end in events:
            if self._scratch is not None:
                self._scratch.zero_()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in events[1:]) / steps / 1e3


def make_clock(device: torch.device, flush_cache: bool = True) -> Clock:
    return CudaClock(device, flush_cache) if device.type == "cuda" else CpuClock()


class StreamLoops:
    """The simplest loops over memory: a copy and an in-place update, both read and write each byte once.

    An optimizer updates in place. On a CPU that is faster than a copy, which first fetches the lines that it
    overwrites; so achieved bandwidth is told as a share of the faster loop.
    """

    def __init__(self, device: torch.device) -> None:
        size = CUDA_STREAM_BYTES if device.type == "cuda" else CPU_STREAM_BYTES
        self._source = torch.ones(size // 4, dtype=torch.float32, device=device)
        self._target = torch.zeros_like(self._source)
        self.moved_bytes = 2 * size

    def steps(self) -> dict[str, Step]:
        return {"copy": self._copy, "in-place": self._update}

    def _copy(self) -> Tensor:
        return self._target.copy_(self._source)

    def _update(self) -> Tensor:
        return self._source.mul_(1.0)
