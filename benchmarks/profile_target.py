#!/usr/bin/env python3
"""The program that profilers and sanitizers run: a few steps of one optimizer, marked for the profiler.

    python benchmarks/profile_target.py gpt2-small smoothed --steps 10

Warm-up steps come first; recording runs from cudaProfilerStart to cudaProfilerStop, with an NVTX range `clara.step`
around every step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from clara_fused.adaptation import PathSums
from harness.contenders import CONTENDERS, Unavailable
from harness.models import MODELS, ModelShapes
from harness.report import NOTHING_MEASURED, checked_choices

WARM_UP_STEPS = 5
# Small, for the sanitizers: ends of vectors and chunks, tensors without elements, and samples with runs of 1024 and 64.
MIXED = ModelShapes("mixed", "tensors of all kinds", ((), (5,), (0,), (1027,), (8195,), (66, 1024), (1030, 64)))
PROFILED = {**MODELS, MIXED.name: MIXED}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=checked_choices("model", PROFILED), help=", ".join(PROFILED))
    parser.add_argument("variant", type=checked_choices("optimizer", CONTENDERS), help=", ".join(CONTENDERS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--steps", type=int, default=10, help="recorded; default: %(default)s")
    parser.add_argument("--overrun", action="store_true", help="instead let a kernel of ours write past its memory")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skipped: PyTorch finds no usable CUDA device")
        return NOTHING_MEASURED

    params = PROFILED[args.model].parameters(getattr(torch, args.dtype), torch.device("cuda"))
    contender = CONTENDERS[args.variant]
    try:
        optimizer = contender.build(params)
    except Unavailable as error:
        print(f"skipped: {error}")
        return NOTHING_MEASURED
    for _ in range(WARM_UP_STEPS):
        optimizer.step()
    if args.overrun:
        overrun(optimizer)
        return 0
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(args.steps):
        with torch.cuda.nvtx.range("clara.step"):
            optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def overrun(optimizer: Any) -> None:
    """Let `measure` write the sums of all tensors into room for one: whether a sanitizer notices."""
    (bucket,) = optimizer._gather(optimizer._options.read(optimizer.param_groups))
    one_row = bucket._rows(len(PathSums._fields))[:1].clone()
    bucket._bucket.measure(one_row.data_ptr(), *bucket._launch)
    torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
