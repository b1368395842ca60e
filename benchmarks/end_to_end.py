#!/usr/bin/env python3
"""Seconds per training step of a character GPT with each optimizer, and the optimizer's part of it.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --sizes small --optimizers adam-fused smoothed

The model and the text are those of examples/train.py. A step is forward, backward, optimizer and zero_grad; every
optimizer trains a model of its own, in rounds of random order. Writes end_to_end-<device>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from harness.clocks import make_clock
from harness.contenders import BASELINE, Contender
from harness.environment import REPOSITORY
from harness.report import Session, benchmark_parser, checked_choices
from harness.statistics import measure_interleaved, summarize
from harness.tables import training_table

sys.path.insert(0, str(REPOSITORY / "examples"))

from training.data import TextData
from training.models import CharGPT


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
    "adam-fused", "adam-foreach", "apex", "transformer-engine", "bitsandbytes", "global", "local", "smoothed",
)  # fmt: skip


class TrainingStep:
    """One step of training, with the optimizer's part of it timed on the side."""

    def __init__(self, size: Size, data: TextData, contender: Contender, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = CharGPT(data.vocabulary_size, size.context, size.width, size.layers, size.heads).to(device)
        self.optimizer = contender.build(list(self.model.parameters()))
        self.data, self.batch, self.device = data, size.batch, device
        self.generator = torch.Generator().manual_seed(0)
        self._marks: list[tuple[Any, Any, Any]] = []

    def __call__(self) -> None:
        start = self._mark()
        inputs, targets = self.data.training_batch(self.batch, self.generator)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        before = self._mark()
        self.optimizer.step()
        self._marks.append((start, before, self._mark()))
        self.optimizer.zero_grad()

    def _mark(self) -> Any:
        """A point in time, on the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def forget_times(self) -> None:
        self._marks.clear()

    def optimizer_and_step_seconds(self) -> list[tuple[float, float]]:
        """Seconds of the optimizer and of the whole step, for every step so far; waits for the device."""
        if self.device.type != "cuda":
            return [(end - before, end - start) for start, before, end in self._marks]
        torch.cuda.synchronize(self.device)
        return [(before.elapsed_time(end) / 1e3, start.elapsed_time(end) / 1e3) for start, before, end in self._marks]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, DEFAULT_OPTIMIZERS, seconds=10.0, per="size")
    parser.add_argument("--sizes", nargs="+", type=checked_choices("size", SIZES), metavar="NAME",
                        help=f"of {', '.join(SIZES)}; default: those that suit the device")  # fmt: skip
    args = parser.parse_args(arguments)
    session = Session("end_to_end", args)
    for name in args.sizes or DEFAULT_SIZES[session.device.type]:
        measure(session, name)
    return session.finish(training_table)


def measure(session: Session, size_name: str) -> None:
    size = SIZES[size_name]
    data = TextData(session.device, context=size.context, validation_windows=1)
    steps: Any = session.warmed(
        session.names, lambda contender: TrainingStep(size, data, contender, session.device), size_name
    )
    if not steps:
        return
    for step in steps.values():
        step.forget_times()
    # The cache is left as it is: the forward and backward passes fill it.
    clock = make_clock(session.device, flush_cache=False)
    samples = measure_interleaved(steps, clock, BASELINE, max_seconds=session.args.seconds)
    for name, step in steps.items():
        parts = step.optimizer_and_step_seconds()
        params = list(step.model.parameters())
        place = {"size": size_name, "elements": sum(p.numel() for p in params), "tensors": len(params)}
        session.record(
            samples, name, place | {"batch": size.batch, "context": size.context},
            optimizer_seconds=summarize([own for own, _ in parts]).as_json(),
            optimizer_share=summarize([own / total for own, total in parts]).median,
        )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
