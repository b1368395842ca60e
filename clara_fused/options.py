"""Every option of a param group, once: its default (in the constructors), its check, and what the back ends read of it.

To add one: an argument of the constructors, a row of `OPTIONS`, a field of `GroupOptions`; then the rule that reads it
(csrc/adam_clara.h and its twin adaptation.py or torch_backend.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Constructor:
    """The constructor of AdamClaraGlobal and AdamClaraLocal: options and defaults."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        initial_scale: float | str = "cautious",
        path_fraction: float = 1 / 16,
        smoothing: float = 0.05,
        damping: float = 0.5,
        clip: tuple[float, float] | None = (0.5, 1.05),
        reference: float | str = "random_walk",
        scale_bounds: tuple[float, float] = (1e-8, 1e8),
        adapt_lr: bool = True,
        fused: bool | None = None,
        process_group: Any = None,
        **torch_switches: Any,
    ) -> None:
        """Create the optimizer.

        Args:
            params: parameters or param groups, as for ``torch.optim.Adam``. Those that get gradients must be dense and
                float32, bfloat16, float16 or float64.
            lr: learning rate >= 0, float or one-element tensor.
            betas: decay of the moments, each in [0, 1).
            eps: added to the denominator, >= 0.
            weight_decay: >= 0; added to the gradient, or decoupled as in AdamW.
            amsgrad: use the running maximum of the second moment.
            maximize: ascend instead of descend.
            decoupled_weight_decay: decay the parameter (AdamW) instead of the gradient.
            initial_scale: mu before the first step, a number inside `scale_bounds`; "cautious": such that the first
                step changes an element by at most a hundredth of the parameters' root mean square.
            path_fraction: share of a large tensor's elements that have a path, in (0, 1].
            smoothing: weight of a new step in the path, in (0, 1]; the path remembers about 1/smoothing steps.
            damping: > 0; a larger one makes the scale follow the path more slowly.
            clip: bounds of the scale's factor in one step, 0 < low <= high, or None.
            reference: what the path is compared with. "random_walk": the walk that the same gradients would give in
                random directions; a number > 0: this squared path of one element.
            scale_bounds: mu stays inside, 0 < low <= high.
            adapt_lr: False makes it torch.optim.Adam: mu is 1 from the start and stays as it is.
            fused: True runs the compiled core and raises at the first step if it cannot serve; False runs PyTorch; None
                runs the core where it can and PyTorch elsewhere.
            process_group: parameters are shards over this group (see docs/distributed.md).
            torch_switches: `foreach`, `capturable`, `differentiable` of torch.optim, as far as they ask for nothing.

        Raises:
            ValueError: an option is out of range.
            TypeError: an option or a parameter has the wrong type.
        """
        self._initialize(locals())

    def _initialize(self, arguments: Mapping[str, Any]) -> None:
        raise NotImplementedError


class SmoothedConstructor(Constructor):
    """The constructor of AdamClaraSmoothed: other defaults, and `lr_smoothing`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        initial_scale: float | str = "cautious",
        path_fraction: float = 1 / 16,
        smoothing: float = 0.05,
        damping: float = 0.25,
        clip: tuple[float, float] | None = (0.5, 2.0),
        lr_smoothing: float = 0.5,
        reference: float | str = "random_walk",
        scale_bounds: tuple[float, float] = (1e-8, 1e8),
        adapt_lr: bool = True,
        fused: bool | None = None,
        process_group: Any = None,
        **torch_switches: Any,
    ) -> None:
        """Create the optimizer.

        The arguments are those of AdamClaraLocal, with other defaults of `damping` and `clip`, and one more.

        Args:
            lr_smoothing: b in [0, 1), the weight of the scale as it was: mu <- b mu + (1 - b) mu f.
        """
        self._initialize(locals())


# --- checks ----------------------------------------------------------------------------------------------------------


Reader = Callable[[str, Any], dict[str, Any]]


def as_number(value: object) -> float | None:
    """A real number, numpy's included, or a tensor or array of one element as a float; None for anything else."""
    if isinstance(value, (bool, str)):
        return None
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor):
        is_real = value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
        return float(value.detach()) if is_real else None
    if hasattr(value, "dtype") and getattr(value, "size", 0) == 1 and value.dtype.kind in "fiu":  # a numpy array
        return float(value.item())  # type: ignore[attr-defined]
    return None


def _number(is_right: Callable[[float], bool], expected: str, word: str = "") -> Reader:
    """A number in a range, or `word`, which the back ends see as 0."""
    choices = f"{word!r} or " if word else ""

    def read(name: str, value: Any) -> dict[str, Any]:
        if word and isinstance(value, str):
            if value == word:
                return {name: 0.0}
        elif (number := as_number(value)) is None:
            raise TypeError(f"{name} must be {choices}a number, got {value!r}")
        elif is_right(number):
            return {name: number}
        name = "epsilon" if name == "eps" else name  # as torch.optim words it
        raise ValueError(f"Invalid {name} value: {value} (expected {choices}{expected})")

    return read


def _flag(name: str, value: Any) -> dict[str, Any]:
    return {name: bool(value)}


def _pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of numbers, got {value!r}")
    first, second = as_number(value[0]), as_number(value[1])
    if first is None or second is None:
        raise TypeError(f"{name} must be a pair of numbers, got {value!r}")
    return first, second


def _betas(name: str, value: Any) -> dict[str, Any]:
    betas = _pair(name, value)
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    return {"beta1": betas[0], "beta2": betas[1]}


def _interval(name: str, value: Any) -> tuple[float, float]:
    low, high = _pair(name, value)
    if not 0.0 < low <= high:
        raise ValueError(f"Invalid {name}: {value} (expected 0 < low <= high)")
    return low, high


def _clip(name: str, value: Any) -> dict[str, Any]:
    low, high = (0.0, math.inf) if value is None else _interval(name, value)
    return {"clip_low": low, "clip_high": high}


def _scale_bounds(name: str, value: Any) -> dict[str, Any]:
    low, high = _interval(name, value)
    return {"scale_low": low, "scale_high": high}


class Option(NamedTuple):
    """How an option is read."""

    read: Reader
    """Checks a value, by its name; returns fields of `GroupOptions`."""
    one_for_all: bool = False
    """Whether AdamClaraGlobal, which has one scale, wants it equal in all groups."""


OPTIONS: Mapping[str, Option] = {
    "lr": Option(lambda name, lr: {}),  # may be a tensor that must not be read: see `_read_lr`
    "betas": Option(_betas),
    "eps": Option(_number(lambda x: x >= 0.0, ">= 0")),
    "weight_decay": Option(_number(lambda x: x >= 0.0, ">= 0")),
    "amsgrad": Option(_flag),
    "maximize": Option(_flag),
    "decoupled_weight_decay": Option(_flag),
    "initial_scale": Option(_number(lambda x: x > 0.0, "> 0", "cautious"), one_for_all=True),
    "path_fraction": Option(_number(lambda x: 0.0 < x <= 1.0, "in (0, 1]")),
    "smoothing": Option(_number(lambda x: 0.0 < x <= 1.0, "in (0, 1]"), one_for_all=True),
    "damping": Option(_number(lambda x: x > 0.0, "> 0"), one_for_all=True),
    "clip": Option(_clip, one_for_all=True),
    "lr_smoothing": Option(_number(lambda x: 0.0 <= x < 1.0, "in [0, 1)")),
    "reference": Option(_number(lambda x: x > 0.0, "> 0", "random_walk"), one_for_all=True),
    "scale_bounds": Option(_scale_bounds, one_for_all=True),
    "adapt_lr": Option(_flag, one_for_all=True),
}


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """Checked options of one param group but `lr`; the core reads them by these names (CLARA_GROUP_OPTIONS)."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    initial_scale: float
    """0: cautious."""
    path_fraction: float
    smoothing: float
    damping: float
    clip_low: float
    """0 and, in `clip_high`, infinity where the factor is not clipped."""
    clip_high: float
    reference: float
    """0: the walk of the gradients that came."""
    scale_low: float
    scale_high: float
    adapt_lr: bool
    lr_smoothing: float = 0.0

    @property
    def log_beta1(self) -> float:
        return math.log(self.beta1) if self.beta1 > 0.0 else -math.inf

    @property
    def log_beta2(self) -> float:
        return math.log(self.beta2) if self.beta2 > 0.0 else -math.inf


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step reads beside the tensors."""

    options: Sequence[GroupOptions]
    """Per param group, checked."""
    lrs: Sequence[float | Tensor]
    """Per param group, checked; a tensor has one element, on any device."""
    one_scale: bool
    """AdamClaraGlobal: one learning-rate scale follows the evidence of all tensors."""
    grad_scale: Tensor | None
    """A GradScaler's, one element; gradients are to be divided by it."""
    found_inf: Tensor | None
    """A GradScaler's, one element; where it is not 0 nothing is changed."""


def _frozen(value: Any) -> Any:
    """A value that cannot change in place and compares by value. A list stays unequal to it, so it is always reread."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(each) for each in value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # or numpy's
        return str.__str__(value)
    number = as_number(value)
    return value if number is None else number


class OptionReader:
    """Reads and checks the options of param groups at every step; nearly nothing where no value has changed.

    Args:
        names: the options of an optimizer (keys of `OPTIONS`), `lr` among them.
        one_for_all: AdamClaraGlobal.
    """

    def __init__(self, names: Iterable[str], one_for_all: bool) -> None:
        self.names = tuple(names)
        self._values = itemgetter(*(name for name in self.names if name != "lr"))
        self._one_for_all = one_for_all
        self._seen: list[Any] = []
        self._read: list[GroupOptions] = []

    def read(
        self,
        groups: Sequence[Mapping[str, Any]],
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | float | None = None,
    ) -> StepInputs:
        """What a step reads beside the tensors; a learning rate is a tensor where only a device knows its value.

        Raises:
            ValueError, TypeError: names group and option.
        """
        values = [self._values(group) for group in groups]
        try:
            changed = values != self._seen
        except (ValueError, RuntimeError):  # an array or tensor among them, which has no truth value; refused below
            changed = True
        if changed:
            options = [self.read_group(group, index) for index, group in enumerate(groups)]
            if self._one_for_all and groups:
                self._check_equal(groups)
            # Nothing of options that were refused stays: the user may take them back.
            self._read, self._seen = options, [_frozen(each) for each in values]
        lrs = [group["lr"] for group in groups]
        lrs = [lr if type(lr) is float and lr >= 0.0 else _read_lr(lr, index) for index, lr in enumerate(lrs)]
        amp = [
            torch.full((), each, dtype=torch.float32, device="cpu") if isinstance(each, (int, float)) else each
            for each in (grad_scale, found_inf)
        ]
        return StepInputs(self._read, lrs, self._one_for_all, *amp)

    def read_group(self, group: Mapping[str, Any], index: int) -> GroupOptions:
        """Options of one group, and a check of its learning rate; see `read`."""
        _read_lr(group["lr"], index)
        fields: dict[str, Any] = {}
        try:
            for name in self.names:
                fields.update(OPTIONS[name].read(name, group[name]))
            options = GroupOptions(**fields)
            if options.initial_scale and not options.scale_low <= options.initial_scale <= options.scale_high:
                raise ValueError(
                    f"Invalid initial_scale value: {options.initial_scale} "
                    f"(expected inside scale_bounds {(options.scale_low, options.scale_high)})"
                )
        except (ValueError, TypeError) as error:
            raise type(error)(f"param group {index}: {error}") from None
        return options

    def _check_equal(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for name in (name for name in self.names if OPTIONS[name].one_for_all):
            expected = OPTIONS[name].read(name, groups[0][name])
            for index, group in enumerate(groups):
                if OPTIONS[name].read(name, group[name]) != expected:
                    raise ValueError(
                        f"param group {index}: AdamClaraGlobal has one learning-rate scale, so {name} must be equal "
                        f"in all groups; group 0 has {groups[0][name]!r}, group {index} has {group[name]!r}"
                    )

    def normalize(self, group: dict[str, Any]) -> None:
        """Make plain Python values of options that checkpoints and JSON would refuse; a tensor `lr` stays."""
        for name in self.names:
            if OPTIONS[name].read is _flag:
                group[name] = bool(group[name])
            elif not (name == "lr" and isinstance(group[name], Tensor)):
                group[name] = _frozen(group[name])


def readable(tensor: Tensor) -> bool:
    """Whether the host can read a tensor's value without waiting for a device: real memory of the CPU."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _read_lr(lr: Any, index: int) -> float | Tensor:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"param group {index}: Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        if not lr.is_floating_point():
            raise TypeError(f"param group {index}: Tensor lr must be floating point, got {lr.dtype}")
        if not readable(lr):
            return lr
    number = as_number(lr)
    if number is None:
        kind = type(lr).__name__
        raise TypeError(f"param group {index}: lr must be a float or a one-element tensor, got {kind}")
    if not number >= 0.0:
        raise ValueError(f"param group {index}: Invalid learning rate: {number}")
    return number


def coming_lr(lr: float | Tensor, group: Mapping[str, Any], index: int) -> float | Tensor:
    """A checked learning rate; where a warm-up starts at 0, the one it leads to, as torch's schedulers note it."""
    return lr if isinstance(lr, Tensor) or lr > 0.0 else _read_lr(group.get("initial_lr", 0.0), index)


def largest_lr(lrs: Sequence[float | Tensor], device: torch.device) -> float | Tensor:
    """The largest of checked learning rates; a 0-dim float32 tensor on `device` where only devices know them."""
    numbers = [lr for lr in lrs if not isinstance(lr, Tensor)]
    if len(numbers) == len(lrs):
        return max(numbers)
    on_device = [lr.to(device, non_blocking=True).reshape(()) for lr in lrs if isinstance(lr, Tensor)]
    largest = torch.stack([lr.to(torch.float32) for lr in on_device]).max()
    return largest.clamp(min=max(numbers)) if numbers else largest


# --- torch.optim's switches ------------------------------------------------------------------------------------------

# And what to do instead, where one asks for something.
SWITCHES = {
    "foreach": "the compiled core (fused=None) and the PyTorch back end (fused=False) both step many tensors at once",
    "capturable": "every step can be captured into a CUDA graph; make lr a tensor on the device",
    "differentiable": "the step is taken without autograd; use torch.optim.Adam where it is to be differentiated",
    "fused": "it is an argument of the optimizer, not of a param group",
}


def check_switches(switches: Mapping[str, Any], where: str) -> None:
    """Accept switches of torch.optim that ask for nothing.

    Raises:
        TypeError: one of them asks for something, or is not known to torch.optim.
    """
    for name, value in switches.items():
        if name not in SWITCHES:
            raise TypeError(f"{where} got an unexpected keyword argument {name!r}")
        if value is not None and (name == "fused" or value is not False):
            raise TypeError(f"{where} does not take {name}={value!r}: {SWITCHES[name]}")
