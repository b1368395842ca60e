"""What several test files share: making optimizers, comparing them with the oracle, snapshots of everything mutable."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from oracle import (
    UNIT,
    AdamStep,
    Evidence,
    Interval,
    Options,
    Oracle,
    Sample,
    TensorState,
    Walk,
    adam_step,
    extended_path,
    initial_scale,
    next_scale_bounds,
    round_to,
    sums_of,
    updated,
)
from torch.utils._python_dispatch import TorchDispatchMode

import clara_fused

VARIANTS = {
    "Global": clara_fused.AdamClaraGlobal,
    "Local": clara_fused.AdamClaraLocal,
    "Smoothed": clara_fused.AdamClaraSmoothed,
}

# Options that must agree in all groups under Global.
GLOBAL_OPTIONS = ("initial_scale", "smoothing", "damping", "clip", "reference", "scale_bounds", "adapt_lr")

# Hyperparameters that make every effect of the method visible in a few steps: scales off 1, factors that are neither
# clipped away nor one.
LIVELY: dict[str, dict[str, Any]] = {
    variant: {
        "lr": 0.05, "smoothing": 0.3, "damping": 0.7, "clip": (0.5, 1.6), "weight_decay": 0.1, "initial_scale": 1.0,
    }
    for variant in VARIANTS
}  # fmt: skip
LIVELY["Smoothed"]["lr_smoothing"] = 0.6

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
COSINES = ("walk_cosine", "walk_cosine_sq", "walk_cosine_lag")  # their rounding errors are those of a 1
WALK = ("walk_moment_sq", "walk_path_moment", "walk_path_sq", "walk_grad_peak", *COSINES)
SCALARS = ("step", "lr_scale", *WALK)


class UnreadByTheHost(TorchDispatchMode):
    """Numbers count as on a device: what depends on them is decided there, not by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def why_not_core(device: str, dtype: torch.dtype) -> str:
    """Empty if the compiled core serves tensors of this type, else the reason it gives."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        clara_fused.AdamClaraLocal([parameter], fused=True).step()
    except (RuntimeError, ImportError) as error:
        return str(error)
    return ""


def core_available(device: str = "cpu", dtype: torch.dtype = torch.float32) -> bool:
    return not why_not_core(device, dtype)


def unforced(fused: bool) -> bool | None:
    """`fused` where PyTorch has to help out: the core takes what it can."""
    return None if fused else False


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and gradients


def parameters(
    shapes: Iterable[Sequence[int]] = ((5, 3), (7,), (2, 3, 4)), dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(tuple(shape), generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: Iterable[torch.Tensor], seed: int, size: float = 1.0, drift: float = 0.7) -> None:
    """Gradients of noise around a drift, the same for the same seed and shapes whatever the parameters hold."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        noise = torch.randn(tuple(param.shape), generator=generator)
        param.grad = (size * (noise + drift)).to(dtype=param.dtype, device=param.device)


def train(optimizer: torch.optim.Optimizer, steps: int, first: int = 0, size: float = 1.0) -> None:
    """Steps under gradients that depend on the step's number alone."""
    for step in range(first, first + steps):
        set_gradients(all_params(optimizer), step, size)
        optimizer.step()


def all_params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def clones(params: Iterable[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


# ---------------------------------------------------------------------------------------------------------------------
# Snapshots


def frozen(value: Any) -> Any:
    """A copy that shares nothing with `value`; tensors become (dtype, shape, bytes), so that NaN equals itself."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return value.dtype, tuple(value.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(entry) for entry in value]
    return copy.deepcopy(value)


def snapshot(optimizer: torch.optim.Optimizer, with_state: bool = True) -> Any:
    """Every bit that a step may change: parameters, gradients, state, options."""
    params = all_params(optimizer)

    def bits(tensor: torch.Tensor | None) -> Any:
        comparable = tensor is not None and tensor.layout == torch.strided and not tensor.is_meta
        return frozen(tensor) if comparable else tensor

    return {
        "params": [bits(p) for p in params],
        "grads": [bits(p.grad) for p in params],
        "state": [frozen(dict(optimizer.state[p])) if p in optimizer.state else None for p in params]
        if with_state
        else None,
        "options": [frozen({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups],
    }


def results(optimizer: torch.optim.Optimizer) -> Any:
    """Parameters and state alone, in order."""
    taken = snapshot(optimizer)
    return taken["params"], taken["state"]


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict as another process would read it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# Against the oracle


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy().copy()


def storage_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions, outermost in memory first; those of one element are nowhere in particular."""
    return sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))


def rows_outermost(tensor: torch.Tensor) -> bool:
    axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1]
    return all(tensor.stride(axis) <= tensor.stride(0) for axis in axes) or tensor.shape[0] == 1


def flat_array(tensor: torch.Tensor, order: Sequence[int]) -> np.ndarray:
    return as_array(tensor.detach().permute(*order).reshape(-1) if order else tensor.detach().reshape(-1))


def options_of(variant: str, group: dict[str, Any]) -> Options:
    """The oracle's options for a param group as it stands."""
    known = {key: group[key] for key in Options.__dataclass_fields__ if key in group}
    known["lr"] = float(known["lr"])
    known["betas"] = tuple(float(beta) for beta in known["betas"])
    if variant != "Smoothed":
        known.pop("lr_smoothing", None)
    return Options(**known)


def oracle_for(variant: str, optimizer: torch.optim.Optimizer) -> Oracle:
    """An oracle that starts where the optimizer's (contiguous) parameters are."""
    groups = [[TensorState(as_array(p), name_of(p.dtype)) for p in g["params"]] for g in optimizer.param_groups]
    return Oracle(variant, groups)


def oracle_step(oracle: Oracle, optimizer: torch.optim.Optimizer, **amp: Any) -> None:
    """The step that the optimizer is about to take: same options, same gradients."""
    grads = [[None if p.grad is None else as_array(p.grad) for p in g["params"]] for g in optimizer.param_groups]
    oracle.step([options_of(oracle.variant, g) for g in optimizer.param_groups], grads, **amp)


def assert_close(actual: torch.Tensor, expected: Any, tolerance: float, what: str, least: float = 0.0) -> None:
    """Within `tolerance` of the larger of the expected value, the tensor's own typical size, and `least`."""
    actual, expected = as_array(actual), np.asarray(expected)
    assert actual.shape == expected.shape, what
    size = np.maximum(np.abs(expected), max(least, np.sqrt(np.mean(expected**2)) if expected.size else 0.0))
    worst = np.max(np.abs(actual - expected) / np.maximum(size, 1e-30), initial=0.0)
    assert worst <= tolerance, f"{what}: off by {worst:.2e}, allowed {tolerance:.1e}"


def assert_follows_oracle(
    optimizer: torch.optim.Optimizer, oracle: Oracle, tolerance: float, narrow_tolerance: float | None = None
) -> None:
    """Parameters and state of a free-running oracle. `narrow_tolerance` is for what is stored in 16 bits."""
    narrow_tolerance = tolerance if narrow_tolerance is None else narrow_tolerance

    def allowed(tensor: torch.Tensor) -> float:
        return narrow_tolerance if tensor.element_size() == 2 else tolerance

    for g, (group, states) in enumerate(zip(optimizer.param_groups, oracle.groups, strict=True)):
        for i, (param, expected) in enumerate(zip(group["params"], states, strict=True)):
            where = f"group {g}, parameter {i}"
            assert_close(param, expected.theta, allowed(param), f"{where}: parameter")
            if expected.scale is None:
                assert param not in optimizer.state, where
                continue
            state = optimizer.state[param]
            assert state["step"].item() == expected.step, where
            assert_close(state["exp_avg"], expected.m, tolerance, f"{where}: exp_avg")
            assert_close(state["exp_avg_sq"], expected.v, tolerance, f"{where}: exp_avg_sq")
            assert_close(state["path"], expected.path, tolerance, f"{where}: path")
            assert_close(state["lr_scale"], expected.scale, tolerance, f"{where}: lr_scale")
            for key, value in zip(WALK, expected.walk.values(), strict=True):
                assert_close(state[key], value, tolerance, f"{where}: {key}", least=float(key in COSINES))


@dataclass
class _Before:
    """A parameter with its state before a step; arrays in the parameter's storage order."""

    options: Options
    param: torch.Tensor
    where: str
    bits: Any
    order: list[int]
    theta: np.ndarray
    grad: np.ndarray | None
    step: int
    scale: Interval
    sample: Sample
    walk: Walk
    moments: dict[str, np.ndarray]
    path: np.ndarray
    unit: float


class StepCheck:
    """Checks one step of an optimizer from its own state before it, so that nothing adds up and the bounds are those
    of a single evaluation of the formulas.

    - moments, path, parameter: inside the interval that the formulas span when every operation is widened by 8 units of
      the arithmetic's roundoff (float32, or float64 for float64 parameters), then rounded to storage. Rounding is
      monotone, so the rounded ends bound the stored value: no allowance for the storage type is needed.
    - walk: from the sums over the path as the optimizer stored it and over intervals of the steps.
    - scale: from those sums, the walk as the optimizer stored it, and the old scale.
    - parameter: with the scale that the optimizer stored.
    """

    def __init__(self, variant: str, optimizer: torch.optim.Optimizer):
        self.variant, self.optimizer = variant, optimizer
        self._first_scales: dict[int, float] = {}  # by group

    def step(self, grad_scale: float | None = None, call: Callable[[], Any] | None = None) -> None:
        """Takes the step (`call`, or the optimizer's) and checks it."""
        before = self._before()
        (call or self.optimizer.step)()
        active = []
        for old in before:
            if old.grad is None:
                assert frozen(old.param) == old.bits, f"{old.where}: changed without a gradient"
            else:
                active.append(old)
        steps, evidence = [], []
        for old in active:
            new = self._check_moments(old, grad_scale)
            steps.append(new)
            evidence.append(self._check_path_and_walk(old, new))
        if self.variant == "Global":
            evidence = [sum(evidence, Evidence())] * len(active)
        for old, new, its_evidence in zip(active, steps, evidence, strict=True):
            self._check_scale(old, its_evidence)
            self._check_parameter(old, new)

    # --- before ---

    def _before(self) -> list[_Before]:
        groups = self.optimizer.param_groups
        options = [options_of(self.variant, g) for g in groups]
        return [
            self._freeze(options, g, i, param)
            for g, group in enumerate(groups)
            for i, param in enumerate(group["params"])
        ]

    def _freeze(self, options: Sequence[Options], g: int, i: int, param: torch.Tensor) -> _Before:
        state = self.optimizer.state.get(param, {})
        order = storage_order(param)
        where = f"group {g}, parameter {i} {tuple(param.shape)} {param.dtype}"
        theta = flat_array(param, order)
        sample = Sample.of(param.shape, options[g].path_fraction, rows_outermost(param)) if param.dim() else Sample()
        if "path" in state and state["path"].shape != sample.path_shape(param.shape):
            # Made when the option, the layout or the tensor was another: told by its shape.
            run = Sample.longest_run(param.shape)
            kept = state["path"].numel() * run // param.numel()
            sample = Sample() if state["path"].shape == param.shape else Sample(run, kept)
        if "path" not in state:
            path = sample.take(np.zeros_like(theta))
        else:
            path = flat_array(state["path"], order if sample.whole else range(state["path"].dim()))
        return _Before(
            options=options[g],
            param=param,
            where=where,
            bits=frozen(param),
            order=order,
            theta=theta,
            grad=None if param.grad is None else flat_array(param.grad, order),
            step=int(state["step"].item()) if "step" in state else 0,
            scale=self._scale(options, g, param, state),
            sample=sample,
            walk=Walk(*(state[key].item() if key in state else 0.0 for key in WALK)),
            moments={
                key: flat_array(state[key], order) if key in state else np.zeros_like(theta) for key in MOMENTS
            },
            path=path,
            unit=UNIT["float64" if param.dtype == torch.float64 else "float32"],
        )  # fmt: skip

    def _scale(self, options: Sequence[Options], g: int, param: torch.Tensor, state: dict[str, Any]) -> Interval:
        """In the state; else the initial one, which is found by a sum over all elements."""
        unit = UNIT["float32"]
        if "lr_scale" in state:
            return Interval.exact(state["lr_scale"].item(), unit)
        one_scale = self.variant == "Global"
        if one_scale:
            for other in self.optimizer.state.values():
                if isinstance(other, dict) and "lr_scale" in other:
                    return Interval.exact(other["lr_scale"].item(), unit)
        if state and options[g].initial_scale == "cautious":
            return Interval.exact(1.0, unit)  # moments without a scale: they come from another optimizer
        if g not in self._first_scales:
            groups = self.optimizer.param_groups if one_scale else [self.optimizer.param_groups[g]]
            of_these = list(options) if one_scale else [options[g]]
            self._first_scales[g] = initial_scale(of_these, [[as_array(p) for p in each["params"]] for each in groups])
        first = self._first_scales[g]
        exact = first == 1.0 or options[g].initial_scale != "cautious"
        return Interval.exact(first, unit) if exact else Interval.exact(first, unit).widened(32 * unit)

    # --- after ---

    def _check_moments(self, old: _Before, grad_scale: float | None) -> AdamStep:
        state, opt = self.optimizer.state[old.param], old.options
        arrays = (old.theta, old.grad, *(old.moments[key] for key in MOMENTS))
        new = adam_step(
            opt, old.step + 1, *(Interval.exact(a, old.unit) for a in arrays), grad_scale, old.walk.moment_sq
        )
        assert state["step"].item() == old.step + 1, old.where
        moments = {"exp_avg": new.m, "exp_avg_sq": new.v}
        if opt.amsgrad:
            moments["max_exp_avg_sq"] = new.v_max
        for key, bounds in moments.items():
            self._check_kept(state[key], old, key)
            self._check_inside(state[key], bounds, f"{old.where}: {key}", old.order)
        return new

    @staticmethod
    def _check_kept(tensor: torch.Tensor, old: _Before, key: str) -> None:
        kept = torch.float64 if old.param.dtype == torch.float64 else torch.float32
        assert (tensor.dtype, tensor.device) == (kept, old.param.device), f"{old.where}: {key}"

    def _check_path_and_walk(self, old: _Before, new: AdamStep) -> Evidence:
        state, opt, sample = self.optimizer.state[old.param], old.options, old.sample
        path = state["path"]
        self._check_kept(path, old, "path")
        assert tuple(path.shape) == sample.path_shape(old.param.shape), f"{old.where}: path of shape {path.shape}"
        order = old.order if sample.whole else list(range(path.dim()))
        parts = new.of(sample)
        before = Interval.exact(old.path, old.unit)
        bounds = extended_path(opt, before, parts[2])
        self._check_inside(path, bounds, f"{old.where}: path", order)
        stored = Interval.exact(flat_array(path, order), old.unit)
        sums = sums_of(opt, sample, before, stored, *parts)
        walk = old.walk.advanced(opt, old.step + 1, sums, old.param.numel())
        kept = []
        for key, bounds in zip(WALK, walk.values(), strict=True):
            assert state[key].dtype == torch.float32 and state[key].dim() == 0, f"{old.where}: {key}"
            if not isinstance(bounds, Interval):
                bounds = Interval.exact(bounds, UNIT["float32"])
            self._check_inside(state[key], bounds.widened(4 * UNIT["float32"]), f"{old.where}: {key}", [])
            kept.append(state[key].item())
        return Evidence.of(opt, sums, Walk(*kept))

    def _check_scale(self, old: _Before, evidence: Evidence) -> None:
        scale = self.optimizer.state[old.param]["lr_scale"]
        assert scale.dtype == torch.float32 and scale.dim() == 0, old.where
        if evidence.none or not old.options.adapt_lr:
            bounds = old.scale
        else:
            bounds = next_scale_bounds(old.options, old.scale, evidence)
        self._check_inside(scale, bounds, f"{old.where}: lr_scale", [])

    def _check_parameter(self, old: _Before, new: AdamStep) -> None:
        scale = self.optimizer.state[old.param]["lr_scale"].item()
        # lr * scale may be a float32 product even for float64 parameters.
        rate = Interval.exact(old.options.lr * scale, old.unit).widened(4 * UNIT["float32"])
        bounds = updated(old.options, Interval.exact(old.theta, old.unit), new.u, rate)
        self._check_inside(old.param, bounds, f"{old.where}: parameter", old.order)

    @staticmethod
    def _check_inside(actual: torch.Tensor, bounds: Interval, what: str, order: Sequence[int]) -> None:
        storage, values = name_of(actual.dtype), flat_array(actual, order)
        low, high = (np.reshape(round_to(storage, end), values.shape) for end in (bounds.lo, bounds.hi))
        outside = ~((low <= values) & (values <= high))
        assert not outside.any(), (
            f"{what}: {values[outside].ravel()[:3]} not in {low[outside].ravel()[:3]} .. {high[outside].ravel()[:3]}"
        )
