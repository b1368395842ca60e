"""The optimizers that are measured: ours and those a user could pick instead."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import clara_fused
from harness.models import Shape, path_elements

# So small that parameters keep their magnitude over the thousands of equal steps of a measurement.
LEARNING_RATE = 1e-7
PATH_FRACTION = 1 / 16  # the default of our optimizers

Step = Callable[[], Any]


class Unavailable(Exception):
    """Why a contender cannot be measured here."""


@dataclass(frozen=True)
class Traffic:
    """Bytes per element that an algorithm must move to and from memory in one step, and that its state occupies."""

    moved: float
    state: float


def adam_traffic(param: int, moment: int) -> Traffic:
    """Adam: parameter and both moments read and written, gradient (of the parameter's size) read."""
    return Traffic(moved=3 * param + 4 * moment, state=2 * moment)


def clara_traffic(param: int, moment: int, path_share: float) -> Traffic:
    """Update moves what Adam's step does. Measure, on the elements that have a path, reads gradient, moments and path
    and writes the path. float32: 28 bytes per element and 20 per element with a path."""
    adam = adam_traffic(param, moment)
    return Traffic(adam.moved + path_share * (param + 4 * moment), adam.state + path_share * moment)


@dataclass(frozen=True)
class Contender:
    """One optimizer in one configuration. `build` makes it for parameters, or raises `Unavailable`.

    path_fraction: of ours alone. wide_moments: moments are float32 where parameters have 16 bits.
    """

    name: str
    label: str
    build: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    wide_moments: bool = False
    path_fraction: float | None = None

    @property
    def is_ours(self) -> bool:
        return self.path_fraction is not None

    def traffic(self, dtype: torch.dtype, shapes: Sequence[Shape] = ()) -> Traffic:
        """For tensors of these shapes; without shapes, for large ones."""
        moment = max(4, dtype.itemsize) if self.wide_moments else dtype.itemsize
        if self.path_fraction is None:
            return adam_traffic(dtype.itemsize, moment)
        share = self.path_fraction
        if shapes:
            share = sum(path_elements(s, share) for s in shapes) / sum(map(math.prod, shapes))
        return clara_traffic(dtype.itemsize, moment, share)


VARIANTS = {
    "global": clara_fused.AdamClaraGlobal,
    "local": clara_fused.AdamClaraLocal,
    "smoothed": clara_fused.AdamClaraSmoothed,
}


def _torch_adam(name: str, label: str, **options: Any) -> Contender:
    return Contender(name, label, lambda params: torch.optim.Adam(params, lr=LEARNING_RATE, **options))


def _peer(name: str, label: str, module: str, class_name: str) -> Contender:
    def build(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        if params[0].device.type != "cuda":
            raise Unavailable(f"{module} runs on CUDA devices only")
        try:
            optimizer_class = getattr(importlib.import_module(module), class_name)
        except Exception as error:  # a peer built for another torch can fail with anything
            raise Unavailable(f"{module} cannot be imported: {error}") from error
        return optimizer_class(params, lr=LEARNING_RATE)

    return Contender(name, label, build, wide_moments=True)


def _ours(variant: str, whole: bool = False, pytorch: bool = False) -> Contender:
    fraction = 1.0 if whole else PATH_FRACTION

    def build(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        return VARIANTS[variant](params, lr=LEARNING_RATE, path_fraction=fraction, fused=not pytorch)

    name = f"{variant}{'-whole' * whole}{'@pytorch' * pytorch}"
    label = f"AdamClara{variant.capitalize()}{', whole path' * whole}{' (PyTorch)' * pytorch}"
    return Contender(name, label, build, wide_moments=True, path_fraction=fraction)


BASELINE = "adam-fused"

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        _torch_adam("adam-fused", "torch Adam fused", fused=True),
        _torch_adam("adam-foreach", "torch Adam foreach", foreach=True),
        _torch_adam("adam-loop", "torch Adam for-loop", foreach=False, fused=False),
        _peer("apex", "apex FusedAdam", "apex.optimizers", "FusedAdam"),
        _peer("transformer-engine", "TransformerEngine FusedAdam", "transformer_engine.pytorch.optimizers",
              "FusedAdam"),
        _peer("bitsandbytes", "bitsandbytes Adam (32 bit)", "bitsandbytes.optim", "Adam32bit"),
        *(_ours(variant, whole, pytorch) for pytorch in (False, True) for whole in (False, True)
          for variant in VARIANTS),
    )
}  # fmt: skip

DEFAULT_CONTENDERS = (
    *(name for name, contender in CONTENDERS.items() if not contender.is_ours),
    "global", "local", "smoothed", "local-whole", "local@pytorch",
)  # fmt: skip
