#!/usr/bin/env python3
"""Time per optimizer step on parameter lists of real models, against the optimizers one could use instead.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --models gpt2-small --dtypes float32 --optimizers adam-foreach smoothed

All optimizers of a model step the same parameters in one process, in rounds of random order; ratios are taken round by
round against torch.optim.Adam(fused=True). Writes step_time-<device>.json.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch

from harness.clocks import StreamLoops, make_clock
from harness.contenders import BASELINE, CONTENDERS, DEFAULT_CONTENDERS
from harness.environment import available_memory
from harness.memory import give_back_freed_memory, peak_extra_bytes
from harness.models import DEFAULT_MODELS, MODELS, ModelShapes
from harness.report import Session, benchmark_parser, checked_choices
from harness.statistics import all_seconds, measure_interleaved, ratios, summarize
from harness.tables import Row, bytes_text, step_time_tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
WARM_UP_STEPS = 2
# Of what is free at first, for one group of contenders. A machine's main memory has other users as well, and the first
# use of each page may take longer than the steps that are measured in it.
MEMORY_SHARE = {"cpu": 0.35, "cuda": 0.9}
# At most, per model and dtype. A CPU's steps take longer, and other users of its memory make them less even.
SECONDS = {"cpu": 20.0, "cuda": 15.0}
ROUNDS = {"cpu": 40, "cuda": 200}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, DEFAULT_CONTENDERS, seconds=None, per="model and dtype")
    parser.add_argument("--models", nargs="+", type=checked_choices("model", MODELS), metavar="NAME",
                        help=f"of {', '.join(MODELS)}; default: those that suit the device")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"],
                        help="of the parameters; default: float32 bfloat16")  # fmt: skip
    args = parser.parse_args(arguments)
    session = Session("step_time", args)
    args.seconds = args.seconds or SECONDS[session.device.type]
    # Memory that is kept counts as taken from then on, although later models can have it.
    memory = MEMORY_SHARE[session.device.type] * available_memory(session.device)
    models = [MODELS[name] for name in args.models or DEFAULT_MODELS[session.device.type]]
    bandwidths: list[Row] = []
    for model in models:
        for dtype in args.dtypes:
            measure(session, model, dtype, memory, bandwidths)
    return session.finish(step_time_tables, bandwidths=bandwidths)


def measure(session: Session, model: ModelShapes, dtype: str, memory: float, bandwidths: list[Row]) -> None:
    groups = list(groups_that_fit(session, model, dtype, memory))
    for group in groups:
        seconds = session.args.seconds * len(group) / sum(map(len, groups))
        measure_group(session, model, dtype, group, seconds, bandwidths)
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        elif available_memory(session.device) < memory / 2:
            # The next group finds most of its memory in what was kept, but not where the gaps are too small for it.
            give_back_freed_memory()


def groups_that_fit(session: Session, model: ModelShapes, dtype: str, memory: float) -> Iterator[list[str]]:
    """Pack contenders into groups whose states fit into memory together; each group has the baseline."""
    size = DTYPES[dtype].itemsize
    free = memory - model.elements * (2 * size + max(size, 4))  # parameter, gradient, one temporary
    state = {name: model.elements * CONTENDERS[name].traffic(DTYPES[dtype], model.shapes).state
             for name in session.names}  # fmt: skip
    group, used = [BASELINE], state[BASELINE]
    for name in session.names:
        if state[BASELINE] + state[name] * (name != BASELINE) > free:
            needed = memory - free + state[BASELINE] + state[name]
            session.skip(name, f"not enough memory, {bytes_text(needed)} are needed", f"{model.name} {dtype}")
        elif name != BASELINE:
            if used + state[name] > free:
                yield group
                group, used = [BASELINE], state[BASELINE]
            group.append(name)
            used += state[name]
    if state[BASELINE] <= free:
        yield group


def measure_group(
    session: Session, model: ModelShapes, dtype: str, group: Sequence[str], seconds: float, bandwidths: list[Row]
) -> None:
    device = session.device
    params = model.parameters(DTYPES[dtype], device)
    clock = make_clock(device)
    steps = session.warmed(
        group, lambda contender: contender.build(params).step, f"{model.name} {dtype}", WARM_UP_STEPS
    )
    if not steps:
        return
    extra = {name: peak_extra_bytes(step, device) for name, step in steps.items()}
    loops = StreamLoops(device)
    samples = measure_interleaved(
        {**steps, **loops.steps()}, clock, BASELINE, max_seconds=seconds, max_rounds=ROUNDS[device.type]
    )
    streamed = {n: summarize([loops.moved_bytes / s for s in all_seconds(samples, n)]) for n in loops.steps()}
    fastest = max(streamed, key=lambda name: streamed[name].median)
    place = {
        "model": model.name, "description": model.description, "dtype": dtype, "tensors": len(model.shapes),
        "elements": model.elements,
    }  # fmt: skip
    first = not any(row["model"] == model.name and row["dtype"] == dtype for row in session.results)
    if first:
        rates = {name: summary.as_json() for name, summary in streamed.items()}
        bandwidths.append({"model": model.name, "dtype": dtype, "fastest": fastest, **rates})
    for name in steps:
        if name == BASELINE and not first:
            continue
        traffic = CONTENDERS[name].traffic(DTYPES[dtype], model.shapes)
        moved = traffic.moved * model.elements
        shares = [moved / loops.moved_bytes / ratio for ratio in ratios(samples, name, fastest)]
        session.record(
            samples, name, place, bytes_per_element=round(traffic.moved, 3),
            bandwidth=moved / summarize(all_seconds(samples, name)).median,
            bandwidth_share=summarize(shares).as_json() if shares else None, peak_extra_bytes=extra[name],
        )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
