#!/usr/bin/env python3
"""Seconds per training step of a character GPT with each optimizer, and the optimizer's part of it.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --sizes small --optimizers adam-fused smoothed

The model and the text are those of examples/train.py. A step is forward, backward, optimizer and zero_grad; every
optimizer trains a model of its own, in rounds of random order. Writes end_to_end-<device>.json and its plot.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from harness import plots
from harness.clocks import make_clock
from harness.contenders import BASELINE, CONTENDERS, Contender, Unavailable
from harness.environment import REPOSITORY, OtherWork
from harness.memory import keep_freed_memory
from harness.report import (
    NOTHING_MEASURED,
    benchmark_parser,
    checked_choices,
    console,
    duration,
    table,
    usable_device,
    write_json,
)
from harness.statistics import all_seconds, measure_interleaved, ratios, summarize

sys.path.insert(0, str(REPOSITORY / "examples"))

from training.data import TextData
from training.models import CharGPT

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    context: int
    batch: int


SIZES = {
    "tiny": Size(width=64, layers=2, heads=4, context=64, batch=24),
    "small": Size(width=256, layers=4, heads=8, context=64, batch=8),
    "medium": Size(width=512, layers=8, heads=8, context=64, batch=4),
    "large": Size(width=768, layers=12, heads=12, context=512, batch=16),
    "xl": Size(width=1024, layers=24, heads=16, context=512, batch=8),
}
DEFAULT_SIZES = {"cpu": ("tiny", "small", "medium"), "cuda": ("small", "large", "xl")}
DEFAULT_OPTIMIZERS = (
    "adam-fused", "adam-foreach", "apex", "transformer-engine", "bitsandbytes", "published",
    "global", "local", "smoothed", "smoothed-deferred",
)  # fmt: skip


class TrainingStep:
    """One step of training, with the optimizer's part of it timed on the side."""

    def __init__(self, size: Size, data: TextData, contender: Contender, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = CharGPT(data.vocabulary_size, size.context, size.width, size.layers, size.heads)
        self.model.to(device)
        self.optimizer = contender.build(list(self.model.parameters()))
        self.optimizer_step = contender.step_of(self.optimizer)
        self.data, self.batch, self.device = data, size.batch, device
        self.generator = torch.Generator().manual_seed(0)
        self._marks: list[tuple[Any, Any, Any]] = []

    def __call__(self) -> None:
        start = self._mark()
        inputs, targets = self.data.training_batch(self.batch, self.generator)
        with self._precision():
            loss = cross_entropy(self.model(inputs), targets)
        loss.backward()
        before = self._mark()
        self.optimizer_step()
        self._marks.append((start, before, self._mark()))
        self.optimizer.zero_grad()

    def _mark(self) -> Any:
        """A point in time, on the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def forget_times(self) -> None:
        self._marks.clear()

    def optimizer_and_step_seconds(self) -> list[tuple[float, float]]:
        """Seconds of the optimizer and of the whole step, for every step so far; waits for the device."""
        if self.device.type != "cuda":
            return [(end - before, end - start) for start, before, end in self._marks]
        torch.cuda.synchronize(self.device)
        return [
            (before.elapsed_time(end) / 1e3, start.elapsed_time(end) / 1e3) for start, before, end in self._marks
        ]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    device = usable_device(args)
    other_work = OtherWork()
    settings = {"seconds": args.seconds, "baseline": BASELINE, "keeps_freed_memory": keep_freed_memory()}
    names = list(dict.fromkeys([BASELINE, *args.optimizers]))
    results: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    sizes = args.sizes or DEFAULT_SIZES[device.type]
    with Progress(console=console, transient=True) as progress:
        for name in progress.track(sizes, description="sizes"):
            rows = measure(name, names, device, args.seconds, skipped)
            if rows:
                print_size(rows)
            results += rows
    for name, reason in skipped.items():
        console.print(f"not measured: {CONTENDERS[name].label}: {reason}")
    if not results:
        console.print("nothing could be measured")
        return NOTHING_MEASURED
    path = args.out / f"end_to_end-{device.type}.json"
    write_json(
        path, "end_to_end", device, settings, other_work.share(), results=results,
        skipped=[{"optimizer": n, "reason": r} for n, r in skipped.items()],
    )  # fmt: skip
    if not args.no_plots:
        console.print(f"plot: {plots.plot_end_to_end(path, args.out)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, DEFAULT_OPTIMIZERS, seconds=12.0, seconds_per="size")
    parser.add_argument(
        "--sizes", nargs="+", type=checked_choices("size", SIZES), metavar="NAME",
        help=f"of {', '.join(SIZES)}; default: those that suit the device",
    )  # fmt: skip
    return parser


def measure(
    size_name: str, names: Sequence[str], device: torch.device, seconds: float, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    size = SIZES[size_name]
    data = TextData(device, context=size.context, validation_windows=1)
    steps: dict[str, TrainingStep] = {}
    for name in names:
        try:
            step = TrainingStep(size, data, CONTENDERS[name], device)
            for _ in range(WARM_UP_STEPS):
                step()
        except (Unavailable, RuntimeError, NotImplementedError) as error:
            skipped[name] = str(error).splitlines()[0]
            continue
        steps[name] = step
    if BASELINE not in steps:
        return []
    for step in steps.values():
        step.forget_times()
    # The cache is left as it is: the forward and backward passes fill it.
    samples = measure_interleaved(steps, make_clock(device, flush_cache=False), BASELINE, max_seconds=seconds)
    rows = []
    for name, step in steps.items():
        whole = summarize(all_seconds(samples, name))
        parts = step.optimizer_and_step_seconds()
        params = list(step.model.parameters())
        rows.append(
            {
                "size": size_name,
                "elements": sum(param.numel() for param in params),
                "tensors": len(params),
                "batch": size.batch,
                "context": size.context,
                "optimizer": name,
                "label": CONTENDERS[name].label,
                "seconds": whole.as_json(),
                "optimizer_seconds": summarize([own for own, _ in parts]).as_json(),
                "optimizer_share": summarize([own / total for own, total in parts]).median,
                "ratio": summarize(ratios(samples, name, BASELINE)).as_json(),
            }
        )
    return rows


def print_size(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    title = (
        f"Character GPT, {first['size']}: {first['elements'] / 1e6:.3g} M parameters in {first['tensors']} tensors, "
        f"batches of {first['batch']} × {first['context']}"
    )
    made = table(title, "optimizer", "training step", "ratio", "± 95%", "optimizer", "share")
    for row in rows:
        made.add_row(
            row["label"], duration(row["seconds"]["median"]), f"{row['ratio']['median']:.3f}",
            f"{row['ratio']['error']:.3f}", duration(row["optimizer_seconds"]["median"]),
            f"{row['optimizer_share']:.1%}", style="bold" if CONTENDERS[row["optimizer"]].runs_core else None,
        )  # fmt: skip
    console.print(made)


if __name__ == "__main__":
    raise SystemExit(main())
