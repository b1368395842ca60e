#!/usr/bin/env python3
"""Bytes of optimizer state per parameter, measured, on the parameter lists of real models.

    python benchmarks/state_bytes.py
    python benchmarks/state_bytes.py --models resnet50

Each distinct shape is stepped once, with fewer rows where it is large: what grows with the elements is scaled back.
Memory that several states share counts once. Writes state_bytes-cpu.json.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harness.contenders import VARIANTS
from harness.models import MODELS, ModelShapes, Shape
from harness.report import Session, benchmark_parser, checked_choices
from harness.tables import state_table

DEFAULT_MODELS = ("gpt2-small", "llama-1b", "resnet50")
# Rows are left out while this many elements remain, more than a tensor needs to have its path sampled.
ENOUGH_ELEMENTS = 1 << 20

Build = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def _peer(module: str, name: str, **options: Any) -> Build:
    return lambda params: getattr(importlib.import_module(module), name)(params, **options)


OPTIMIZERS: dict[str, Build] = {
    "torch Adam": torch.optim.Adam,
    **{cls.__name__: cls for cls in VARIANTS.values()},
    "AdamClaraLocal, path_fraction=1": lambda params: VARIANTS["local"](params, path_fraction=1.0),
    "Prodigy": _peer("prodigyopt", "Prodigy"),
    "Prodigy, slice_p=11": _peer("prodigyopt", "Prodigy", slice_p=11),
    "Schedule-free AdamW": _peer("schedulefree", "AdamWScheduleFree"),
}  # fmt: skip


def shortened(shape: Shape) -> tuple[Shape, int]:
    """The shape with a power of two fewer rows, and that power."""
    divisor = 1
    while shape[0] % (2 * divisor) == 0 and math.prod(shape) >= 2 * divisor * ENOUGH_ELEMENTS:
        divisor *= 2
    return (shape[0] // divisor, *shape[1:]), divisor


def state_bytes(build: Build, model: ModelShapes, dtype: torch.dtype) -> int:
    """Of all tensors in the states after a step."""
    total = 0
    for shape, count in Counter(model.shapes).items():
        small, divisor = shortened(shape)
        param = torch.full(small, 0.02, dtype=dtype, requires_grad=True)
        param.grad = torch.full_like(param, 0.01)
        optimizer = build([param])
        if hasattr(optimizer, "train"):
            optimizer.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        for value in optimizer.state[param].values():
            # What a state merely points to, the parameter's own memory, is not the optimizer's.
            if isinstance(value, torch.Tensor) and value.data_ptr() != param.data_ptr():
                total += count * value.untyped_storage().nbytes() * (divisor if value.dim() else 1)
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, (), seconds=None, per="nothing")
    parser.add_argument("--models", nargs="+", type=checked_choices("model", MODELS), default=list(DEFAULT_MODELS))
    parser.set_defaults(device="cpu")
    args = parser.parse_args(arguments)
    session = Session("state_bytes", args)
    for dtype in ("float32", "bfloat16"):
        for label, build in OPTIMIZERS.items():
            for model in (MODELS[name] for name in args.models):
                try:
                    found = state_bytes(build, model, getattr(torch, dtype)) / model.elements
                except ImportError as error:
                    print(f"not measured: {label}: {error}")
                    break
                session.results.append({
                    "model": model.name, "description": model.description, "dtype": dtype, "optimizer": label,
                    "label": label, "bytes_per_parameter": round(found, 4),
                })  # fmt: skip
    return session.finish(state_table, lambda document: state_table(document, "bfloat16"))


if __name__ == "__main__":
    raise SystemExit(main())
