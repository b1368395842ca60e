#!/usr/bin/env python3
"""Read the CSV files that profile_nsys.sh and profile_ncu.sh leave, print a summary, and write it as JSON.

python benchmarks/nsight_report.py nsys DIR/nsys-gpt2-small-smoothed-float32 --model gpt2-small --variant smoothed
python benchmarks/nsight_report.py ncu DIR/ncu-gpt2-small-smoothed-float32 --model gpt2-small --variant smoothed
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness.contenders import CONTENDERS
from harness.models import MODELS
from harness.report import console, duration, table

STEP_RANGE = "clara.step"


class ReportError(Exception):
    """A CSV file is not what the profilers document."""


def read_csv(path: Path, first_column: str) -> list[dict[str, str]]:
    """Rows of a profiler's CSV; the tools' own messages, above the header and after the rows, are passed over.

    Raises:
        ReportError: there is no header that starts with `first_column`.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("==")]
    for index, line in enumerate(lines):
        if line.lstrip('"').startswith(first_column):
            return list(csv.DictReader(lines[index:]))
    raise ReportError(f"{path}: no column {first_column!r}; is it the CSV of another report, or of an empty recording?")


def column(row: dict[str, str], name: str, path: Path) -> str:
    try:
        return row[name]
    except KeyError:
        raise ReportError(f"{path}: no column {name!r} among {', '.join(row)}") from None


# --- Nsight Systems --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelTime:
    """One kernel's share of a step; times in seconds."""

    name: str
    launches_per_step: float
    seconds_per_step: float
    median_seconds: float


@dataclass(frozen=True)
class HostRange:
    """An NVTX range on the host."""

    name: str
    per_step: float
    median_seconds: float


@dataclass(frozen=True)
class StepProfile:
    """What a recording of steady steps shows; times in seconds."""

    steps: int
    kernels: list[KernelTime]
    ranges: list[HostRange]
    launches_per_step: float
    copies_per_step: float
    busy_seconds_per_step: float
    busy_share: float
    gaps: int
    median_gap_seconds: float
    largest_gap_seconds: float


def read_nsys(base: Path) -> StepProfile:
    """Read the `nsys stats` CSV files <base>_cuda_gpu_kern_sum.csv, ..._cuda_gpu_trace.csv, ..._nvtx_pushpop_sum.csv.

    Raises:
        ReportError: a file is not in the documented format, or the recording has no step or no kernel.
    """
    ranges = read_ranges(suffixed(base, "nvtx_pushpop_sum"))
    steps = round(sum(per_run for name, per_run, _ in ranges if name == STEP_RANGE))
    if not steps:
        raise ReportError(f"{base}: no NVTX range {STEP_RANGE!r} was recorded")
    kernels = read_kernels(suffixed(base, "cuda_gpu_kern_sum"), steps)
    launches, copies, busy, gaps = read_trace(suffixed(base, "cuda_gpu_trace"))
    return StepProfile(
        steps=steps,
        kernels=kernels,
        ranges=[HostRange(name, count / steps, median) for name, count, median in ranges],
        launches_per_step=launches / steps,
        copies_per_step=copies / steps,
        busy_seconds_per_step=busy / steps,
        busy_share=busy / (busy + sum(gaps)),
        gaps=len(gaps),
        median_gap_seconds=statistics.median(gaps) if gaps else 0.0,
        largest_gap_seconds=max(gaps, default=0.0),
    )


def suffixed(base: Path, report: str) -> Path:
    return base.with_name(f"{base.name}_{report}.csv")


def read_ranges(path: Path) -> list[tuple[str, float, float]]:
    """Name, number and median seconds of every NVTX range."""
    return [
        # Names come as "domain:name", with an empty domain for the default one.
        (column(row, "Range", path).removeprefix(":"), float(column(row, "Instances", path)),
         float(column(row, "Med (ns)", path)) * 1e-9)
        for row in read_csv(path, "Time (%)")
    ]  # fmt: skip


def read_kernels(path: Path, steps: int) -> list[KernelTime]:
    return [
        KernelTime(
            name=column(row, "Name", path),
            launches_per_step=float(column(row, "Instances", path)) / steps,
            seconds_per_step=float(column(row, "Total Time (ns)", path)) * 1e-9 / steps,
            median_seconds=float(column(row, "Med (ns)", path)) * 1e-9,
        )
        for row in read_csv(path, "Time (%)")
    ]


def read_trace(path: Path) -> tuple[int, int, float, list[float]]:
    """Kernel launches, copies and fills, seconds in which the device was busy, and the gaps in between in seconds."""
    spans = []
    launches = copies = 0
    for row in read_csv(path, "Start (ns)"):
        start = int(column(row, "Start (ns)", path))
        spans.append((start, start + int(column(row, "Duration (ns)", path))))
        # Only kernels have a grid.
        if column(row, "GrdX", path):
            launches += 1
        else:
            copies += 1
    if not launches:
        raise ReportError(f"{path}: no kernel was recorded")
    spans.sort()
    busy, gaps, end = 0, [], spans[0][0]
    for span_start, span_end in spans:
        if span_start > end:
            gaps.append((span_start - end) * 1e-9)
        busy += max(0, span_end - max(end, span_start))
        end = max(end, span_end)
    return launches, copies, busy * 1e-9, gaps


def print_nsys(profile: StepProfile, title: str) -> None:
    made = table(f"{title}, {profile.steps} steps", "kernel", "launches per step", "per step", "median")
    for kernel in profile.kernels:
        made.add_row(
            short_kernel_name(kernel.name), f"{kernel.launches_per_step:g}", duration(kernel.seconds_per_step),
            duration(kernel.median_seconds),
        )  # fmt: skip
    console.print(made)
    console.print(
        f"per step: {profile.launches_per_step:g} kernel launches, {profile.copies_per_step:g} copies and fills, "
        f"device busy {duration(profile.busy_seconds_per_step)} ({profile.busy_share:.1%} of the time); gaps: median "
        f"{duration(profile.median_gap_seconds)}, largest {duration(profile.largest_gap_seconds)}"
    )
    made = table("host ranges", "range", "per step", "median")
    for host_range in profile.ranges:
        made.add_row(host_range.name, f"{host_range.per_step:g}", duration(host_range.median_seconds))
    console.print(made)


def short_kernel_name(name: str) -> str:
    """Without arguments and return type; template arguments stay."""
    return name.partition("(")[0].removeprefix("void ")


# --- Nsight Compute --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelTraffic:
    """What one kernel moved to and from DRAM in a step, summed over its launches."""

    name: str
    launches: int
    read_bytes: float
    written_bytes: float
    seconds: float
    registers: int

    @property
    def moved_bytes(self) -> float:
        return self.read_bytes + self.written_bytes


# Newer devices count reads and writes under other names.
READ_METRICS = ("dram__bytes_read.sum", "dram__bytes_op_read.sum")
WRITE_METRICS = ("dram__bytes_write.sum", "dram__bytes_op_write.sum")
TIME_METRIC = "gpu__time_duration.sum"
BASE_UNITS = {"byte": 1.0, "ns": 1e-9, "nsecond": 1e-9, "second": 1.0, "s": 1.0, "register/thread": 1.0, "": 1.0}


def read_ncu(path: Path) -> list[KernelTraffic]:
    """Read `ncu --csv --print-units base`: a row per launch and metric.

    Raises:
        ReportError: not that format, or a metric is missing.
    """
    launches: dict[tuple[str, str], dict[str, float]] = {}
    for row in read_csv(path, "ID"):
        unit = column(row, "Metric Unit", path)
        if unit not in BASE_UNITS:
            raise ReportError(f"{path}: unit {unit!r} is not a base unit; ncu needs --print-units base")
        value = column(row, "Metric Value", path).replace(",", "")
        metrics = launches.setdefault((column(row, "ID", path), column(row, "Kernel Name", path)), {})
        if value and value != "n/a":
            metrics[column(row, "Metric Name", path)] = float(value) * BASE_UNITS[unit]
    if not launches:
        raise ReportError(f"{path}: no kernel was recorded")
    by_kernel: dict[str, list[dict[str, float]]] = {}
    for (_, name), metrics in launches.items():
        by_kernel.setdefault(name, []).append(metrics)
    return [
        KernelTraffic(
            name=name,
            launches=len(runs),
            read_bytes=sum(metric(run, READ_METRICS, path) for run in runs),
            written_bytes=sum(metric(run, WRITE_METRICS, path) for run in runs),
            seconds=sum(metric(run, (TIME_METRIC,), path) for run in runs),
            registers=int(max(run.get("launch__registers_per_thread", 0) for run in runs)),
        )
        for name, runs in by_kernel.items()
    ]


def metric(metrics: dict[str, float], names: Iterable[str], path: Path) -> float:
    for name in names:
        if name in metrics:
            return metrics[name]
    raise ReportError(f"{path}: a launch lacks {' or '.join(names)}; is this user allowed to read the counters?")


def print_ncu(kernels: Sequence[KernelTraffic], elements: int, must_move: float, title: str) -> None:
    """Bytes per element by kernel, and their sum against what must move.

    Written bytes that are still in the L2 cache when a kernel ends are not counted: up to that cache's size is missing.
    """
    made = table(title, "kernel", "launches", "time", "read B/element", "written B/element", "GB/s", "registers")
    for kernel in kernels:
        made.add_row(
            short_kernel_name(kernel.name), str(kernel.launches), duration(kernel.seconds),
            f"{kernel.read_bytes / elements:.2f}", f"{kernel.written_bytes / elements:.2f}",
            f"{kernel.moved_bytes / kernel.seconds / 1e9:.0f}", str(kernel.registers),
        )  # fmt: skip
    console.print(made)
    moved = sum(kernel.moved_bytes for kernel in kernels) / elements
    console.print(f"moved {moved:.2f} bytes per element; {must_move:.4g} must move: {moved / must_move:.3f}×")


# --- the program -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("profiler", choices=["nsys", "ncu"])
    parser.add_argument("base", type=Path, help="path of the CSV files, without what follows the common part")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--variant", choices=CONTENDERS, required=True)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(arguments)
    model, contender = MODELS[args.model], CONTENDERS[args.variant]
    title = f"{contender.label}, {model.description}, {args.dtype}"
    facts = {"profiler": args.profiler, "model": model.name, "optimizer": contender.name, "dtype": args.dtype}
    try:
        if args.profiler == "nsys":
            profile = read_nsys(args.base)
            print_nsys(profile, title)
            content = asdict(profile)
        else:
            kernels = read_ncu(args.base.with_name(args.base.name + ".csv"))
            must_move = contender.traffic(getattr(torch, args.dtype), model.shapes).moved
            print_ncu(kernels, model.elements, must_move, title)
            content = {
                "elements": model.elements,
                "bytes_per_element_that_must_move": must_move,
                "kernels": [asdict(kernel) for kernel in kernels],
            }
    except (ReportError, OSError) as error:
        parser.exit(5, f"{error}\n")
    path = args.base.with_name(args.base.name + ".json")
    path.write_text(json.dumps({**facts, **content}, indent=1) + "\n", encoding="utf-8")
    console.print(f"results: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
