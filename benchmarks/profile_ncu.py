#!/usr/bin/env python3
"""Measure with Nsight Compute how many bytes each kernel moves to and from DRAM, against the bytes that must move.

    python benchmarks/profile_ncu.py gpt2-small local
    python benchmarks/profile_ncu.py one-350m adam-fused --dtype bfloat16 --out DIR

Writes ncu-MODEL-OPTIMIZER-DTYPE.csv, as it comes from ncu, and a JSON with the sums over each kernel's launches.
Exit codes: 0 measured, 2 bad arguments, 3 no usable CUDA device, 4 no ncu, 5 ncu wrote what cannot be read.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness.contenders import CONTENDERS
from harness.models import MODELS
from harness.report import DEFAULT_RESULTS, checked_choices
from harness.tables import Document, aligned, traffic_table

# Newer devices count reads and writes under other names.
READ_METRICS = ("dram__bytes_read.sum", "dram__bytes_op_read.sum")
WRITE_METRICS = ("dram__bytes_write.sum", "dram__bytes_op_write.sum")
TIME_METRIC = "gpu__time_duration.sum"
REGISTERS_METRIC = "launch__registers_per_thread"
BASE_UNITS = {"byte": 1.0, "ns": 1e-9, "nsecond": 1e-9, "second": 1.0, "s": 1.0, "register/thread": 1.0, "": 1.0}

NCU = (
    "ncu", "--profile-from-start", "off",
    "--clock-control", "none",  # clocks as they are in use
    "--csv", "--print-units", "base",
    "--metrics", ",".join((READ_METRICS[0], WRITE_METRICS[0], TIME_METRIC, REGISTERS_METRIC)),
)  # fmt: skip
NO_PROFILER = 4
UNREADABLE = 5


class ReportError(Exception):
    """A CSV file is not what ncu documents."""


@dataclass(frozen=True)
class KernelTraffic:
    """What one kernel moved to and from DRAM in a step, summed over its launches."""

    name: str
    launches: int
    read_bytes: float
    written_bytes: float
    seconds: float
    registers: int


def read_ncu(path: Path) -> list[KernelTraffic]:
    """Read what ncu writes with the options above: a row per launch and metric.

    Raises:
        ReportError: not that format, or a metric is missing.
    """
    launches: dict[tuple[str, str], dict[str, float]] = {}
    for row in read_csv(path):
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
            registers=int(max(run.get(REGISTERS_METRIC, 0) for run in runs)),
        )
        for name, runs in by_kernel.items()
    ]


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows; ncu's own messages, above the header and after the rows, are passed over."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("==")]
    for index, line in enumerate(lines):
        if line.startswith('"ID"'):
            return list(csv.DictReader(lines[index:]))
    raise ReportError(f"{path}: no column 'ID'; is it the CSV of another report, or of an empty recording?")


def column(row: dict[str, str], name: str, path: Path) -> str:
    try:
        return row[name]
    except KeyError:
        raise ReportError(f"{path}: no column {name!r} among {', '.join(row)}") from None


def metric(metrics: dict[str, float], names: Iterable[str], path: Path) -> float:
    for name in names:
        if name in metrics:
            return metrics[name]
    raise ReportError(f"{path}: a launch lacks {' or '.join(names)}; is this user allowed to read the counters?")


def record(csv_path: Path, model_name: str, optimizer: str, dtype: str) -> Document:
    """What ncu found, and what had to move."""
    model = MODELS[model_name]
    return {
        "profiler": "ncu",
        "model": model_name,
        "optimizer": optimizer,
        "dtype": dtype,
        "elements": model.elements,
        "bytes_per_element_that_must_move": CONTENDERS[optimizer].traffic(getattr(torch, dtype), model.shapes).moved,
        "kernels": [asdict(kernel) for kernel in read_ncu(csv_path)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=checked_choices("model", MODELS), help=", ".join(MODELS))
    parser.add_argument("optimizer", type=checked_choices("optimizer", CONTENDERS), help=", ".join(CONTENDERS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--out", type=Path, default=DEFAULT_RESULTS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(arguments)
    if shutil.which("ncu") is None:
        parser.exit(NO_PROFILER, "ncu not found: install NVIDIA Nsight Compute and put ncu on PATH\n")

    # ncu runs every kernel once per group of metrics, and the same data each time: one step says as much as ten.
    target = Path(__file__).with_name("profile_target.py")
    program = [sys.executable, str(target), args.model, args.optimizer, "--dtype", args.dtype, "--steps", "1"]
    args.out.mkdir(parents=True, exist_ok=True)
    csv_path = args.out / f"ncu-{args.model}-{args.optimizer}-{args.dtype}.csv"
    # Without ncu at first: what the program itself cannot do here shows before ncu wraps its messages.
    for command in (program, [*NCU, "--log-file", str(csv_path), *program]):
        status = subprocess.run(command).returncode
        if status != 0:
            return status
    try:
        document = record(csv_path, args.model, args.optimizer, args.dtype)
    except (ReportError, OSError) as error:
        parser.exit(UNREADABLE, f"{error}\n")
    print(aligned(traffic_table(document)))
    path = csv_path.with_suffix(".json")
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"results: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
