"""The optimizers that are measured: ours and those a user could pick instead."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import clara_fused
from harness.published import PerTensorAdamClara

# So small that parameters keep their magnitude over the thousands of equal steps of a measurement.
LEARNING_RATE = 1e-7

Step = Callable[[], Any]


class Unavailable(Exception):
    """Why a contender cannot be measured here."""


@dataclass(frozen=True)
class Traffic:
    """Bytes per element that an algorithm must move to and from memory in one step, and that its state occupies."""

    moved: int
    state: int


@dataclass(frozen=True)
class Contender:
    """One optimizer in one configuration.

    `build` makes it for the given parameters; it raises `Unavailable` if it cannot.
    """

    name: str
    label: str
    build: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    traffic: Callable[[torch.dtype], Traffic]
    compiled: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.split("@")[0].split("-")[0] in VARIANTS

    @property
    def runs_core(self) -> bool:
        return self.is_ours and "@" not in self.name

    def step_of(self, optimizer: torch.optim.Optimizer) -> Step:
        """What is called, and timed, once per step."""
        if not self.compiled:
            return optimizer.step
        # The compiler remarks on everything that it leaves to Python.
        torch._logging.set_logs(dynamo=logging.ERROR)
        return torch.compile(optimizer.step)


VARIANTS = {
    "global": clara_fused.AdamClaraGlobal,
    "local": clara_fused.AdamClaraLocal,
    "smoothed": clara_fused.AdamClaraSmoothed,
}


# --- bytes that must move --------------------------------------------------------------------------------------------


def adam_traffic(param: int, moment: int) -> Traffic:
    """Adam: parameter and both moments read and written, gradient (of the parameter's size) read."""
    return Traffic(moved=3 * param + 4 * moment, state=2 * moment)


def clara_traffic(param: int, moment: int, path: int, deferred: bool) -> Traffic:
    """AdamClara: Adam's and the path, in one pass if deferred; else a second pass reads parameter and moments again.

    Measure reads gradient, moments, path and writes moments, path; apply reads parameter and moments and writes the
    parameter. float32 throughout: 28 + 16 = 44 bytes per element, deferred 36.
    """
    one_pass = 3 * param + 4 * moment + 2 * path
    return Traffic(moved=one_pass + (0 if deferred else 2 * moment), state=2 * moment + path)


def torch_adam_traffic(dtype: torch.dtype) -> Traffic:
    """torch.optim.Adam keeps its moments in the parameter's dtype."""
    return adam_traffic(dtype.itemsize, dtype.itemsize)


def mixed_adam_traffic(dtype: torch.dtype) -> Traffic:
    """Moments in float32 whatever the parameter."""
    return adam_traffic(dtype.itemsize, max(4, dtype.itemsize))


def _our_traffic(deferred: bool) -> Callable[[torch.dtype], Traffic]:
    def traffic(dtype: torch.dtype) -> Traffic:
        moment = max(4, dtype.itemsize)
        return clara_traffic(dtype.itemsize, moment, moment, deferred)

    return traffic


# --- the contenders --------------------------------------------------------------------------------------------------


def _torch_adam(name: str, label: str, **options: Any) -> Contender:
    return Contender(
        name, label, lambda params: torch.optim.Adam(params, lr=LEARNING_RATE, **options), torch_adam_traffic
    )


def _peer(name: str, label: str, module: str, class_name: str, traffic: Callable[[torch.dtype], Traffic]) -> Contender:
    def build(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        if params[0].device.type != "cuda":
            raise Unavailable(f"{module} runs on CUDA devices only")
        try:
            optimizer_class = getattr(importlib.import_module(module), class_name)
        except Exception as error:  # a peer built for another torch can fail with anything
            raise Unavailable(f"{module} cannot be imported: {error}") from error
        return optimizer_class(params, lr=LEARNING_RATE)

    return Contender(name, label, build, traffic)


def _ours(variant: str, deferred: bool, runner: str) -> Contender:
    def build(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        optimizer = VARIANTS[variant](params, lr=LEARNING_RATE, deferred=deferred, fused=runner == "core")
        if runner == "compile":
            # Pieces to bound scratch memory would only make the traced program longer; the compiler needs no scratch.
            optimizer.max_temporary_bytes = 1 << 50
        return optimizer

    suffix = "" if runner == "core" else f"@{runner}"
    mode = " deferred" if deferred else ""
    note = {"core": "", "pytorch": " (PyTorch)", "compile": " (PyTorch, torch.compile)"}[runner]
    return Contender(
        f"{variant}{'-deferred' if deferred else ''}{suffix}",
        f"AdamClara {variant.capitalize()}{mode}{note}",
        build,
        _our_traffic(deferred),
        compiled=runner == "compile",
    )


BASELINE = "adam-fused"

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        _torch_adam("adam-fused", "torch Adam fused", fused=True),
        _torch_adam("adam-foreach", "torch Adam foreach", foreach=True),
        _torch_adam("adam-loop", "torch Adam for-loop", foreach=False, fused=False),
        _peer("apex", "apex FusedAdam", "apex.optimizers", "FusedAdam", mixed_adam_traffic),
        _peer(
            "transformer-engine",
            "TransformerEngine FusedAdam",
            "transformer_engine.pytorch.optimizers",
            "FusedAdam",
            mixed_adam_traffic,
        ),
        _peer("bitsandbytes", "bitsandbytes Adam (32 bit)", "bitsandbytes.optim", "Adam32bit", mixed_adam_traffic),
        Contender(
            "published",
            "AdamClara as first published",
            lambda params: PerTensorAdamClara(params, lr=LEARNING_RATE),
            _our_traffic(deferred=False),
        ),
        *(
            _ours(variant, deferred, runner)
            for runner in ("core", "pytorch", "compile")
            for variant in VARIANTS
            for deferred in (False, True)
        ),
    )
}

DEFAULT_CONTENDERS = (
    *(name for name, contender in CONTENDERS.items() if not contender.is_ours),
    *(name for name, contender in CONTENDERS.items() if contender.runs_core),
    "smoothed@pytorch",
    "smoothed@compile",
)
