#!/usr/bin/env python3
"""Host time per optimizer step, in all and per tensor, for 10 to 3,000 small tensors.

    python benchmarks/cpu_overhead.py
    python benchmarks/cpu_overhead.py --tensors 100 1000 --optimizers adam-fused smoothed

The tensors have 64 elements, so that next to nothing but the cost per step and per tensor is left. On a GPU the call is
timed, not the device's work; optimizers that wait for the device in a step are charged for it. Writes
cpu_overhead-<device>.json and its plot.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from harness import plots
from harness.clocks import CpuClock, Step
from harness.contenders import BASELINE, CONTENDERS, Unavailable
from harness.environment import OtherWork
from harness.memory import keep_freed_memory
from harness.models import small_tensors
from harness.report import (
    NOTHING_MEASURED,
    benchmark_parser,
    console,
    duration,
    table,
    usable_device,
    write_json,
)
from harness.statistics import all_seconds, measure_interleaved, ratios, summarize

DEFAULT_TENSORS = (10, 30, 100, 300, 1000, 3000)
DEFAULT_OPTIMIZERS = (
    "adam-fused", "adam-foreach", "adam-loop", "apex", "transformer-engine", "bitsandbytes", "published",
    "global", "local", "smoothed", "smoothed-deferred", "smoothed@pytorch",
)  # fmt: skip
WARM_UP_STEPS = 3


class HostClock:
    """Time until `step` returns. The device is idle before each step, so that a full queue never blocks the host."""

    min_sample_seconds = 0.01

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds_per_step(self, step: Step, steps: int) -> float:
        seconds = 0.0
        for _ in range(steps):
            self.synchronize()
            started = time.perf_counter()
            step()
            seconds += time.perf_counter() - started
        self.synchronize()
        return seconds / steps

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    device = usable_device(args)
    other_work = OtherWork()
    settings = {"seconds": args.seconds, "baseline": BASELINE, "keeps_freed_memory": keep_freed_memory()}
    names = list(dict.fromkeys([BASELINE, *args.optimizers]))
    results: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    with Progress(console=console, transient=True) as progress:
        for count in progress.track(args.tensors, description="tensors"):
            results += measure(count, names, device, args.seconds, skipped)
    if not results:
        console.print("nothing could be measured")
        return NOTHING_MEASURED
    print_results(results, args.tensors)
    for name, reason in skipped.items():
        console.print(f"not measured: {CONTENDERS[name].label}: {reason}")
    costs = linear_costs(results)
    path = args.out / f"cpu_overhead-{device.type}.json"
    write_json(
        path, "cpu_overhead", device, settings, other_work.share(),
        results=results, costs=costs, skipped=[{"optimizer": n, "reason": r} for n, r in skipped.items()],
    )  # fmt: skip
    if not args.no_plots:
        console.print(f"plot: {plots.plot_cpu_overhead(path, args.out)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, DEFAULT_OPTIMIZERS, seconds=5.0, seconds_per="number of tensors")
    parser.add_argument("--tensors", nargs="+", type=int, default=list(DEFAULT_TENSORS), metavar="COUNT")
    return parser


def measure(
    count: int, names: Sequence[str], device: torch.device, seconds: float, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    params = small_tensors(count).parameters(torch.float32, device)
    clock = HostClock(device) if device.type == "cuda" else CpuClock()
    steps: dict[str, Step] = {}
    for name in names:
        try:
            step = CONTENDERS[name].step_of(CONTENDERS[name].build(params))
            for _ in range(WARM_UP_STEPS):
                step()
        except (Unavailable, RuntimeError, NotImplementedError) as error:
            skipped[name] = str(error).splitlines()[0]
            continue
        steps[name] = step
    if BASELINE not in steps:
        return []
    samples = measure_interleaved(steps, clock, BASELINE, max_seconds=seconds)
    return [
        {
            "tensors": count,
            "optimizer": name,
            "label": CONTENDERS[name].label,
            "seconds": summarize(all_seconds(samples, name)).as_json(),
            "ratio": summarize(ratios(samples, name, BASELINE)).as_json(),
        }
        for name in steps
    ]


def linear_costs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cost per step and per tensor of every optimizer: a line through its medians, fitted to their relative errors."""
    costs = []
    for name in dict.fromkeys(row["optimizer"] for row in results):
        rows = [row for row in results if row["optimizer"] == name]
        if len(rows) < 2:
            continue
        seconds = np.array([row["seconds"]["median"] for row in rows])
        counts = np.array([row["tensors"] for row in rows], dtype=np.float64)
        weighted = np.stack([np.ones_like(counts), counts], axis=1) / seconds[:, None]
        (per_step, per_tensor), *_ = np.linalg.lstsq(weighted, np.ones_like(seconds), rcond=None)
        costs.append(
            {
                "optimizer": name,
                "label": rows[0]["label"],
                "seconds_per_step": float(f"{max(per_step, 0.0):.4g}"),
                "seconds_per_tensor": float(f"{per_tensor:.4g}"),
            }
        )
    return costs


def print_results(results: Sequence[dict[str, Any]], counts: Sequence[int]) -> None:
    made = table("Host time per step by number of tensors", "optimizer", *map(str, counts), "per tensor")
    for cost in linear_costs(results) or [{"optimizer": row["optimizer"], "label": row["label"]} for row in results]:
        rows = {row["tensors"]: row for row in results if row["optimizer"] == cost["optimizer"]}
        cells = [
            f"{duration(row['seconds']['median'])} ({row['ratio']['median']:.2f}×)" if row else ""
            for row in map(rows.get, counts)
        ]
        per_tensor = duration(cost["seconds_per_tensor"]) if "seconds_per_tensor" in cost else ""
        style = "bold" if CONTENDERS[cost["optimizer"]].runs_core else None
        made.add_row(cost["label"], *cells, per_tensor, style=style)
    console.print(made)


if __name__ == "__main__":
    raise SystemExit(main())
