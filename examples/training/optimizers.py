"""Optimizers by their names on the command line, their options as text, and the learning rates they have in force."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from clara_fused import AdamClaraGlobal, AdamClaraLocal, AdamClaraSmoothed

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "global": AdamClaraGlobal,
    "local": AdamClaraLocal,
    "smoothed": AdamClaraSmoothed,
}
NOT_SETTABLE = {"self", "params", "lr", "process_group"}  # lr has a flag of its own


def option_names(optimizer: str) -> set[str]:
    return set(inspect.signature(OPTIMIZERS[optimizer]).parameters) - NOT_SETTABLE


def parse_option(text: str) -> tuple[str, Any]:
    """``"clip=0.5,1.02"`` -> ``("clip", (0.5, 1.02))``. Values are Python literals, true, false or words."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is not of the form name=value")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def options_for(optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options this optimizer knows: one command line may hold options of several."""
    return {name: value for name, value in options.items() if name in option_names(optimizer)}


def check_options_are_known(options: Iterable[str], optimizers: list[str]) -> None:
    known = set().union(*(option_names(optimizer) for optimizer in optimizers))
    for name in options:
        if name not in known:
            raise ValueError(f"no option {name!r} in {', '.join(optimizers)}; there are {', '.join(sorted(known))}")


def effective_lrs(optimizer: torch.optim.Optimizer) -> Tensor:
    """Learning rate in force for every parameter tensor: float32 [tensors], on their device, without waiting for it."""
    if hasattr(optimizer, "effective_lrs"):
        return torch.cat(optimizer.effective_lrs())
    return torch.cat(
        [
            torch.full((len(group["params"]),), float(group["lr"]), device=group["params"][0].device)
            for group in optimizer.param_groups
        ]
    )
