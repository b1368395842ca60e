#!/usr/bin/env python3
"""Time per optimizer step on parameter lists of real models, against the optimizers one could use instead.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --models gpt2-small --dtypes float32 --optimizers adam-foreach smoothed
    python benchmarks/step_time.py --device cuda --graph

All optimizers of a model step the same parameters in one process, in rounds of random order; ratios are taken round by
round against torch.optim.Adam(fused=True). Writes step_time-<device>.json and its plots.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from harness import plots
from harness.clocks import Step, StreamLoops, graphed, make_clock
from harness.contenders import BASELINE, CONTENDERS, DEFAULT_CONTENDERS, Contender, Unavailable
from harness.environment import OtherWork, available_memory
from harness.memory import give_back_freed_memory, keep_freed_memory, peak_extra_bytes
from harness.models import DEFAULT_MODELS, MODELS, ModelShapes
from harness.report import (
    NOTHING_MEASURED,
    benchmark_parser,
    bytes_text,
    checked_choices,
    console,
    duration,
    table,
    usable_device,
    write_json,
)
from harness.statistics import Samples, all_seconds, measure_interleaved, ratios, summarize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
WARM_UP_STEPS = 2
# torch.compile unrolls every tensor: half a minute for 60 of them.
MAX_TENSORS_TO_COMPILE = 20
# Of what is free at first, for one group of contenders. A machine's main memory has other users as well, and the first
# use of each page may take longer than the steps that are measured in it.
MEMORY_SHARE = {"cpu": 0.35, "cuda": 0.9}
# At most, per model and dtype. A CPU's steps take longer, and other users of its memory make them less even.
SECONDS = {"cpu": 30.0, "cuda": 15.0}
ROUNDS = {"cpu": 40, "cuda": 200}
NEVER_GRAPHED = {"published", "adam-loop"}  # they read from the device, or keep their step count on the host


@dataclass
class Outcome:
    """What one run of the program found."""

    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    bandwidths: list[dict[str, Any]] = field(default_factory=list)

    def skip(self, model: str, dtype: str, optimizer: str, reason: str) -> None:
        self.skipped.append({"model": model, "dtype": dtype, "optimizer": optimizer, "reason": reason})


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    device = usable_device(args)
    other_work = OtherWork()
    args.seconds = SECONDS[device.type] if args.seconds is None else args.seconds
    args.rounds = ROUNDS[device.type] if args.rounds is None else args.rounds
    flush_cache = None if args.cache is None else args.cache == "flushed"
    keeps_freed_memory = keep_freed_memory()
    # Memory that is kept counts as taken from then on, although later models can have it.
    memory = MEMORY_SHARE[device.type] * available_memory(device)
    names = list(dict.fromkeys([BASELINE, *args.optimizers]))
    models = [MODELS[name] for name in args.models or DEFAULT_MODELS[device.type]]
    outcome = Outcome()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(models) * len(args.dtypes))
        for model in models:
            for dtype in args.dtypes:
                progress.update(bar, description=f"{model.description}, {dtype}")
                run = Run(model, dtype, device, args, flush_cache, memory, outcome)
                run.measure([CONTENDERS[name] for name in names])
                progress.advance(bar)
                print_model(outcome, model, dtype)
    print_skipped(outcome.skipped)
    if not outcome.results:
        console.print("nothing could be measured")
        return NOTHING_MEASURED
    settings = {
        "seconds": args.seconds, "rounds": args.rounds, "graph": args.graph,
        "cache": args.cache or ("flushed" if device.type == "cuda" else "kept"), "baseline": BASELINE,
        "keeps_freed_memory": keeps_freed_memory,
    }  # fmt: skip
    path = args.out / f"step_time-{device.type}.json"
    content = {"bandwidths": outcome.bandwidths, "results": outcome.results, "skipped": outcome.skipped}
    write_json(path, "step_time", device, settings, other_work.share(), **content)
    if not args.no_plots:
        for picture in plots.plot_step_time(path, args.out):
            console.print(f"plot: {picture}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, DEFAULT_CONTENDERS, seconds=None, seconds_per="model and dtype")
    add = parser.add_argument
    add("--models", nargs="+", type=checked_choices("model", MODELS), metavar="NAME",
        help=f"of {', '.join(MODELS)}; default: those that suit the device")  # fmt: skip
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], metavar="DTYPE",
        help=f"of the parameters: {', '.join(DTYPES)}; default: float32 bfloat16")  # fmt: skip
    add("--rounds", type=int, help="at most; default: what suits the device")
    add("--graph", action="store_true", help="replay every step from a CUDA graph")
    add("--cache", choices=["flushed", "kept"],
        help="overwrite the cache before each step, or not; default: flushed on CUDA, kept on the CPU")  # fmt: skip
    return parser


@dataclass
class Run:
    """The measurement of one model in one dtype."""

    model: ModelShapes
    dtype_name: str
    device: torch.device
    args: argparse.Namespace
    flush_cache: bool | None
    memory: float
    outcome: Outcome

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def measure(self, contenders: Sequence[Contender]) -> None:
        groups = list(self._groups_that_fit(contenders))
        for group in groups:
            self._measure_group(group, self.args.seconds * len(group) / sum(map(len, groups)))
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            elif available_memory(self.device) < self.memory / 2:
                # The next group finds most of its memory in what was kept, but not where the gaps are too small for it.
                give_back_freed_memory()

    def skip(self, contender: Contender, reason: str) -> None:
        self.outcome.skip(self.model.name, self.dtype_name, contender.name, reason)

    def _groups_that_fit(self, contenders: Sequence[Contender]) -> Iterator[list[Contender]]:
        """Pack contenders into groups whose states fit into memory together; each group has the baseline."""
        per_element = 2 * self.dtype.itemsize + max(self.dtype.itemsize, 4)  # parameter, gradient, one temporary
        budget = self.memory - self.model.elements * per_element
        baseline = CONTENDERS[BASELINE]

        def state_bytes(contender: Contender) -> int:
            return self.model.elements * contender.traffic(self.dtype).state

        group, used = [baseline], state_bytes(baseline)
        for contender in contenders:
            if contender.name == BASELINE:
                continue
            needed = state_bytes(contender)
            if state_bytes(baseline) + needed > budget:
                needed += self.model.elements * per_element
                self.skip(contender, f"not enough memory, {bytes_text(needed)} are needed")
                continue
            if used + needed > budget:
                yield group
                group, used = [baseline], state_bytes(baseline)
            group.append(contender)
            used += needed
        if state_bytes(baseline) > budget:
            self.skip(baseline, "not enough memory")
        else:
            yield group

    def _measure_group(self, group: Sequence[Contender], seconds: float) -> None:
        params = self.model.parameters(self.dtype, self.device)
        clock = make_clock(self.device, self.flush_cache)
        steps: dict[str, Step] = {}
        extra_bytes: dict[str, int | None] = {}
        for contender in group:
            try:
                steps[contender.name] = self._warm_step(contender, params)
            except (Unavailable, RuntimeError, NotImplementedError) as error:
                self.skip(contender, first_sentence(error))
                continue
            extra_bytes[contender.name] = None if self.args.graph else peak_extra_bytes(
                steps[contender.name], self.device
            )
        if BASELINE not in steps:
            return
        loops = StreamLoops(self.device)
        samples = measure_interleaved(
            {**steps, **loops.steps()}, clock, BASELINE, max_seconds=seconds, max_rounds=self.args.rounds
        )
        streamed = {
            name: summarize([loops.moved_bytes / s for s in all_seconds(samples, name)]) for name in loops.steps()
        }
        fastest = max(streamed, key=lambda name: streamed[name].median)
        self.outcome.bandwidths.append(
            {"model": self.model.name, "dtype": self.dtype_name, "fastest": fastest}
            | {name: summary.as_json() for name, summary in streamed.items()}
        )
        measured = {(row["model"], row["dtype"], row["optimizer"]) for row in self.outcome.results}
        for contender in group:
            key = (self.model.name, self.dtype_name, contender.name)
            if contender.name in steps and key not in measured:
                self._record(contender, samples, loops.moved_bytes, fastest, extra_bytes[contender.name])

    def _warm_step(self, contender: Contender, params: Sequence[Tensor]) -> Step:
        if contender.compiled and len(params) > MAX_TENSORS_TO_COMPILE and not self._asked_for(contender):
            raise Unavailable(f"compiling {len(params)} tensors takes minutes; name it in --optimizers to run it")
        if self.args.graph:
            if contender.name in NEVER_GRAPHED:
                raise Unavailable("waits for the device in a step, so it cannot be captured in a CUDA graph")
            if contender.compiled:
                raise Unavailable("not measured in a CUDA graph")
        optimizer = contender.build(params)
        if self.args.graph and "capturable" in optimizer.defaults:
            for param_group in optimizer.param_groups:
                param_group["capturable"] = True
        step = contender.step_of(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.args.graph:
                return captured(step, self.device)
            for _ in range(WARM_UP_STEPS):
                step()
        return step

    def _asked_for(self, contender: Contender) -> bool:
        return self.args.optimizers != list(DEFAULT_CONTENDERS) and contender.name in self.args.optimizers

    def _record(
        self, contender: Contender, samples: Samples, loop_bytes: int, fastest_loop: str, extra_bytes: int | None
    ) -> None:
        seconds = all_seconds(samples, contender.name)
        traffic = contender.traffic(self.dtype)
        moved = traffic.moved * self.model.elements
        shares = [moved / loop_bytes / ratio for ratio in ratios(samples, contender.name, fastest_loop)]
        self.outcome.results.append(
            {
                "model": self.model.name,
                "description": self.model.description,
                "dtype": self.dtype_name,
                "tensors": len(self.model.shapes),
                "elements": self.model.elements,
                "optimizer": contender.name,
                "label": contender.label,
                "seconds": summarize(seconds).as_json(),
                "ratio": summarize(ratios(samples, contender.name, BASELINE)).as_json(),
                "bytes_per_element": traffic.moved,
                "state_bytes_per_element": traffic.state,
                "bandwidth": moved / summarize(seconds).median,
                "bandwidth_share": summarize(shares).as_json() if shares else None,
                "peak_extra_bytes": extra_bytes,
            }
        )


def captured(step: Callable[[], Any], device: torch.device) -> Step:
    """Warm up on a side stream, as graph capture asks for, then capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    replay = graphed(step, device)
    for _ in range(WARM_UP_STEPS):
        replay()
    return replay


def first_sentence(error: Exception) -> str:
    """Enough of an error to know why; compilers and drivers append pages."""
    first_line = str(error).strip().partition("\n")[0]
    return first_line if isinstance(error, Unavailable) else f"{type(error).__name__}: {first_line}"


def print_model(outcome: Outcome, model: ModelShapes, dtype: str) -> None:
    rows = [row for row in outcome.results if row["model"] == model.name and row["dtype"] == dtype]
    if not rows:
        return
    title = f"{model.description}, {dtype}: {model.elements:,} elements in {len(model.shapes)} tensors"
    made = table(title, "optimizer", "per step", "quartiles", "ratio", "± 95%", "B/element", "GB/s", "of loop", "extra")
    for row in rows:
        seconds, ratio, share = row["seconds"], row["ratio"], row["bandwidth_share"]
        extra = row["peak_extra_bytes"]
        made.add_row(
            row["label"],
            duration(seconds["median"]),
            f"{duration(seconds['quartile_low'])} – {duration(seconds['quartile_high'])}",
            f"{ratio['median']:.3f}",
            f"{ratio['error']:.3f}",
            f"{row['bytes_per_element']}",
            f"{row['bandwidth'] / 1e9:.1f}",
            "" if share is None else f"{share['median']:.0%}",
            "" if extra is None else bytes_text(extra),
            style="bold" if CONTENDERS[row["optimizer"]].runs_core else None,
        )
    console.print(made)
    for loops in outcome.bandwidths:
        if loops["model"] == model.name and loops["dtype"] == dtype:
            console.print(f"simple loops: copy {loops['copy']['median'] / 1e9:.1f} GB/s, "
                          f"in-place {loops['in-place']['median'] / 1e9:.1f} GB/s\n")  # fmt: skip
            break


def print_skipped(skipped: Sequence[dict[str, str]]) -> None:
    if not skipped:
        return
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in skipped:
        reasons.setdefault((row["optimizer"], row["reason"]), []).append(f"{row['model']} {row['dtype']}")
    made = table("not measured", "optimizer", "reason", "where")
    made.columns[1].justify = made.columns[2].justify = "left"
    for (optimizer, reason), where in reasons.items():
        made.add_row(optimizer, reason, ", ".join(where) if len(where) <= 3 else f"{len(where)} lists")
    console.print(made)


if __name__ == "__main__":
    raise SystemExit(main())
