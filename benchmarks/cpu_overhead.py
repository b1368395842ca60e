#!/usr/bin/env python3
"""Host time per optimizer step, in all and per tensor, for 10 to 3,000 small tensors.

    python benchmarks/cpu_overhead.py
    python benchmarks/cpu_overhead.py --tensors 100 1000 --optimizers adam-fused smoothed

The tensors have 64 elements, so that next to nothing but the cost per step and per tensor is left. Measured twice: with
gradients in all tensors, and with gradients that come and go, at every step in another random half of them. On a GPU
the call is timed, not the device's work. Writes cpu_overhead-<device>.json.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from harness.clocks import Step
from harness.contenders import BASELINE
from harness.models import small_tensors
from harness.report import Session, benchmark_parser
from harness.statistics import measure_interleaved
from harness.tables import Row, overhead_table

DEFAULT_TENSORS = (10, 30, 100, 300, 1000, 3000)
DEFAULT_OPTIMIZERS = (
    "adam-fused", "adam-foreach", "adam-loop", "apex", "transformer-engine", "bitsandbytes",
    "global", "local", "smoothed", "local@pytorch",
)  # fmt: skip


class HostClock:
    """Time until `step` returns, its `before` not counted. The device is idle before each step, so that a full queue
    never blocks the host."""

    min_sample_seconds = 0.01

    def __init__(self, device: torch.device, before: Step) -> None:
        self._device, self._before = device, before

    def seconds_per_step(self, step: Step, steps: int) -> float:
        seconds = 0.0
        for _ in range(steps):
            self._before()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            started = time.perf_counter()
            step()
            seconds += time.perf_counter() - started
        return seconds / steps


class Gradients:
    """Call it before a step: gradients in all parameters, or in a random half of them, another half each time."""

    def __init__(self, params: Sequence[Tensor], changing: bool) -> None:
        self._pairs = [(param, param.grad) for param in params]
        self._changing, self._random = changing, random.Random(0)

    def __call__(self) -> None:
        if self._changing:
            chosen = set(self._random.sample(range(len(self._pairs)), len(self._pairs) // 2))
            for index, (param, grad) in enumerate(self._pairs):
                param.grad = grad if index in chosen else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, DEFAULT_OPTIMIZERS, seconds=4.0, per="number of tensors")
    parser.add_argument("--tensors", nargs="+", type=int, default=list(DEFAULT_TENSORS), metavar="COUNT")
    args = parser.parse_args(arguments)
    session = Session("cpu_overhead", args)
    for count in args.tensors:
        for gradients in ("all", "changing"):
            measure(session, count, gradients)
    return session.finish(overhead_table, costs=linear_costs(session.results))


def measure(session: Session, count: int, gradients: str) -> None:
    params = small_tensors(count).parameters(torch.float32, session.device)
    before = Gradients(params, gradients == "changing")
    # Every optimizer creates all its state in the warm-up, where all tensors have gradients.
    steps = session.warmed(
        session.names, lambda contender: contender.build(params).step, f"{count} tensors, {gradients} gradients"
    )
    if steps:
        clock = HostClock(session.device, before)
        samples = measure_interleaved(steps, clock, BASELINE, max_seconds=session.args.seconds / 2)
        stepped = count if gradients == "all" else count // 2
        for name in steps:
            session.record(samples, name, {"tensors": count, "stepped": stepped, "gradients": gradients})


def linear_costs(results: Sequence[Row]) -> list[Row]:
    """Cost per step and per tensor stepped: a line through an optimizer's medians, fitted to their relative errors."""
    costs = []
    for gradients, name in dict.fromkeys((row["gradients"], row["optimizer"]) for row in results):
        rows = [row for row in results if (row["gradients"], row["optimizer"]) == (gradients, name)]
        if len(rows) < 2:
            continue
        seconds = np.array([row["seconds"]["median"] for row in rows])
        counts = np.array([row["stepped"] for row in rows], dtype=np.float64)
        weighted = np.stack([np.ones_like(counts), counts], axis=1) / seconds[:, None]
        (per_step, per_tensor), *_ = np.linalg.lstsq(weighted, np.ones_like(seconds), rcond=None)
        costs.append({
            "gradients": gradients, "optimizer": name, "label": rows[0]["label"],
            "seconds_per_step": float(f"{max(per_step, 0.0):.4g}"), "seconds_per_tensor": float(f"{per_tensor:.4g}"),
        })  # fmt: skip
    return costs


if __name__ == "__main__":
    raise SystemExit(main())
