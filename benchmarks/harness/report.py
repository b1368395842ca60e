"""Command-line options, JSON files and terminal tables that the benchmark programs share."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from harness.contenders import CONTENDERS
from harness.environment import REPOSITORY, OtherWork, describe_environment

DEFAULT_RESULTS = REPOSITORY / "benchmarks" / "results"
NOTHING_MEASURED = 3
SCHEMA_VERSION = 1
# Of all cores' time. Below it the medians were seen to stay where they are.
MUCH_OTHER_WORK = 0.05

console = Console(width=None if sys.stdout.isatty() else 140, soft_wrap=False)


def benchmark_parser(
    documentation: str | None, optimizers: Sequence[str], seconds: float | None, seconds_per: str
) -> argparse.ArgumentParser:
    """The options that all benchmarks have; to be completed with a program's own.

    Args:
        documentation: the program's docstring.
        optimizers: contenders measured by default.
        seconds: measuring time by default, per `seconds_per`; None if that is up to the device.
    """
    summary, _, details = (documentation or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", default=device, help="cpu, cuda, cuda:1 ...; default here: %(default)s")
    add("--out", type=Path, default=DEFAULT_RESULTS, metavar="DIR", help="for JSON and plots; default: %(default)s")
    add("--threads", type=int, help="CPU threads of PyTorch and the core; default: PyTorch's")
    add("--optimizers", nargs="+", type=checked_choices("optimizer", CONTENDERS), default=list(optimizers),
        metavar="NAME", help=f"of {', '.join(CONTENDERS)}")  # fmt: skip
    default_seconds = "what suits the device" if seconds is None else f"{seconds:g}"
    add("--seconds", type=float, default=seconds, help=f"to measure per {seconds_per}; default: {default_seconds}")
    add("--no-plots", action="store_true")
    return parser


def usable_device(args: argparse.Namespace) -> torch.device:
    """The device asked for, made current; exits with status 3 if this machine lacks it."""
    other_work = OtherWork()
    time.sleep(0.5)
    warn_of_other_work(other_work.share(), "is running here: the ratios may not repeat")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            console.print(f"skipped: --device {args.device}, but PyTorch finds no usable CUDA device")
            raise SystemExit(NOTHING_MEASURED)
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def warn_of_other_work(share: float | None, consequence: str) -> None:
    """Ratios survive a machine that slows now and then, but not one whose cores are taken all the time.

    Threads that wait for each other then wait for the scheduler: torch's fused Adam was seen a thousand times slower.
    """
    if share is not None and share > MUCH_OTHER_WORK:
        console.print(f"[bold]other work ({share:.0%} of the cores) {consequence}[/bold]")


def checked_choices(kind: str, known: Any) -> Callable[[str], str]:
    """A type for argparse whose error names the known values."""

    def check(value: str) -> str:
        if value not in known:
            raise argparse.ArgumentTypeError(f"no {kind} {value!r}; there are {', '.join(map(str, known))}")
        return value

    return check


def write_json(
    path: Path,
    benchmark: str,
    device: torch.device,
    settings: dict[str, Any],
    other_work: float | None,
    **content: Any,
) -> None:
    """Write what was found, with all that it depends on.

    Args:
        other_work: the share of the cores that others had meanwhile; of much of it the user is warned.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": benchmark,
        "schema": SCHEMA_VERSION,
        "device": device.type,
        **describe_environment(device),
        "other_work": None if other_work is None else round(other_work, 3),
        "settings": settings,
        **content,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"results: {path}")
    warn_of_other_work(other_work, "ran beside this: the ratios may not repeat")


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return made


def duration(seconds: float) -> str:
    """With three digits and a fitting unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bytes_text(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"
