"""What several test files share: making optimizers, comparing them with the oracle, snapshots of everything mutable."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from oracle import AdamState, Interval, Options, Oracle, adapted_scale, apply, measure, moves_scale, round_to

import clara_fused

VARIANTS = {
    "Global": clara_fused.AdamClaraGlobal,
    "Local": clara_fused.AdamClaraLocal,
    "Smoothed": clara_fused.AdamClaraSmoothed,
}

# Options that must agree in all groups under Global.
GLOBAL_OPTIONS = (
    "smoothing", "damping", "reference", "clip", "accumulate", "deferred", "initial_scale", "scale_bounds", "adapt_lr",
)  # fmt: skip

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}

# Hyperparameters that make every effect of the method visible in a few steps: scales off 1, factors that are neither
# clipped away nor one.
LIVELY: dict[str, dict[str, Any]] = {
    variant: {"lr": 0.05, "smoothing": 0.3, "damping": 0.7, "clip": (0.5, 1.6), "weight_decay": 0.1}
    for variant in VARIANTS
}
LIVELY["Smoothed"]["lr_smoothing"] = 0.6


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def why_not_core(device: str, dtype: torch.dtype) -> str:
    """Empty if the compiled core serves tensors of this type, else the reason it gives."""
    try:
        from clara_fused.core_backend import core_status
    except ImportError as error:
        return str(error)
    if reason := core_status(device, dtype):
        return reason
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        clara_fused.AdamClaraLocal([parameter], fused=True).step()
    except RuntimeError as error:
        return str(error)
    return ""


def core_available(device: str = "cpu", dtype: torch.dtype = torch.float32) -> bool:
    return not why_not_core(device, dtype)


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


def options_of(variant: str, group: dict[str, Any]) -> Options:
    """The oracle's options for a param group as it stands."""
    known = {key: group[key] for key in Options.__dataclass_fields__ if key in group}
    known["lr"] = float(known["lr"])
    if known["path_dtype"] is not None:
        known["path_dtype"] = name_of(known["path_dtype"])
    return Options.of(variant, **known)


def oracle_for(variant: str, optimizer: torch.optim.Optimizer) -> Oracle:
    """An oracle that starts where the optimizer's parameters are."""
    return Oracle(
        variant, [[AdamState(as_array(p), name_of(p.dtype)) for p in g["params"]] for g in optimizer.param_groups]
    )


def oracle_step(oracle: Oracle, optimizer: torch.optim.Optimizer, **amp: Any) -> None:
    """The step that the optimizer is about to take: same options, same gradients."""
    grads = [[None if p.grad is None else as_array(p.grad) for p in g["params"]] for g in optimizer.param_groups]
    oracle.step([options_of(oracle.variant, g) for g in optimizer.param_groups], grads, **amp)


def assert_close(actual: torch.Tensor, expected: Any, tolerance: float, what: str) -> None:
    """Within `tolerance` of the larger of the expected value and the tensor's own typical size."""
    actual, expected = as_array(actual), np.asarray(expected)
    assert actual.shape == expected.shape, what
    size = np.maximum(np.abs(expected), np.sqrt(np.mean(expected**2)) if expected.size else 0.0)
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
            assert_close(state["path"], expected.path, allowed(state["path"]), f"{where}: path")
            assert_close(state["lr_scale"], expected.scale, tolerance, f"{where}: lr_scale")


class StepCheck:
    """Checks one step of an optimizer from its own state before it, so that nothing adds up and the bounds are those
    of a single evaluation of the formulas.

    - moments, path, parameter: inside the interval that the formulas span when every operation is widened by 8 units of
      the arithmetic's roundoff (float32, or float64 for float64 parameters), then rounded to storage. Rounding is
      monotone, so the rounded ends bound the stored value: no allowance for the storage type is needed.
    - scale: from the path norm of the path as the optimizer stored it, and the old scale.
    - parameter: with the scale that the optimizer stored (deferred: had stored).
    """

    def __init__(self, variant: str, optimizer: torch.optim.Optimizer):
        self.variant, self.optimizer = variant, optimizer

    def step(self, grad_scale: float | None = None, call: Callable[[], Any] | None = None) -> None:
        """Takes the step (`call`, or the optimizer's) and checks it."""
        groups = self.optimizer.param_groups
        options = [options_of(self.variant, g) for g in groups]
        before = [[self._freeze(opt, p) for p in g["params"]] for opt, g in zip(options, groups, strict=True)]
        (call or self.optimizer.step)()

        active: list[tuple[Options, dict[str, Any], torch.Tensor, str]] = []
        for g, (opt, group) in enumerate(zip(options, groups, strict=True)):
            for i, (param, old) in enumerate(zip(group["params"], before[g], strict=True)):
                where = f"group {g}, parameter {i} {tuple(param.shape)} {param.dtype}"
                if old["grad"] is None:
                    assert frozen(param) == old["bits"], f"{where}: changed without a gradient"
                else:
                    active.append((opt, old, param, where))
        norms, walks = [], []
        for opt, old, param, where in active:
            self._check_moments(opt, old, param, where, grad_scale)
            path = as_array(self.optimizer.state[param]["path"])
            norms.append(float(np.sum(path**2)))
            walks.append(opt.expected_path_norm(old["step"] + 1, self._step_from_stored_moments(opt, param)))
        if self.variant == "Global":
            norms, walks = [sum(norms)] * len(active), [sum(walks)] * len(active)
        for (opt, old, param, where), norm, walk in zip(active, norms, walks, strict=True):
            self._check_scale(opt, old, param, where, norm, walk)
            self._check_parameter(opt, old, param, where)

    def _freeze(self, options: Options, param: torch.Tensor) -> dict[str, Any]:
        old: dict[str, Any] = {"theta": as_array(param), "bits": frozen(param), "step": 0}
        old["grad"] = None if param.grad is None else as_array(param.grad)
        state = self.optimizer.state.get(param, {})
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "path"):
            old[key] = as_array(state[key]) if key in state else np.zeros_like(old["theta"])
        scale = options.initial_scale
        if state:
            old["step"], scale = int(state["step"].item()), state["lr_scale"].item()
        elif self.variant == "Global":
            scales = [s["lr_scale"].item() for s in self.optimizer.state.values()]
            scale = scales[0] if scales else scale
        old["scale"] = float(np.float32(scale))
        return old

    def _step_from_stored_moments(self, opt: Options, param: torch.Tensor) -> np.ndarray:
        state = self.optimizer.state[param]
        step = int(state["step"].item())
        second = as_array(state["max_exp_avg_sq" if opt.amsgrad else "exp_avg_sq"])
        denominator = np.sqrt(second / (1 - opt.betas[1] ** step)) + opt.eps
        return as_array(state["exp_avg"]) / (1 - opt.betas[0] ** step) / denominator

    def _check_moments(
        self, opt: Options, old: dict[str, Any], param: torch.Tensor, where: str, grad_scale: float | None
    ) -> None:
        unit = UNIT["float64" if param.dtype == torch.float64 else "float32"]
        names = ("theta", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "path")
        new = measure(opt, old["step"] + 1, *(Interval.exact(old[n], unit) for n in names), grad_scale)
        old["u"] = new.u
        state = self.optimizer.state[param]
        assert state["step"].item() == old["step"] + 1, where
        kept = torch.float64 if param.dtype == torch.float64 else torch.float32
        moments = {"exp_avg": new.m, "exp_avg_sq": new.v}
        if opt.amsgrad:
            moments["max_exp_avg_sq"] = new.v_max
        for key, bounds in moments.items():
            assert state[key].dtype == kept, where
            self._check_inside(state[key], bounds, f"{where}: {key}")
        path_dtype = kept if opt.path_dtype is None else getattr(torch, opt.path_dtype)
        assert state["path"].dtype == path_dtype, where
        self._check_inside(state["path"], new.path, f"{where}: path")

    def _check_scale(
        self, opt: Options, old: dict[str, Any], param: torch.Tensor, where: str, norm: float, walk: float
    ) -> None:
        scale = self.optimizer.state[param]["lr_scale"]
        assert scale.dtype == torch.float32 and scale.dim() == 0, where
        old["new_scale"] = scale.item()
        if moves_scale(opt, norm, walk):
            # Scales are float32 for every type. The norm is a float32 sum per block: 16 more units.
            unit = UNIT["float32"]
            measured = Interval.exact(norm, unit).widened(16 * unit)
            # A measured walk comes from steps of float32, squared: their error of some 8 units counts twice.
            walked = 32 * unit if opt.reference == "measured_walk" else 0.0
            expected = Interval.exact(walk, unit).widened(walked)
            bounds = adapted_scale(self.variant, opt, Interval.exact(old["scale"], unit), measured, expected)
            self._check_inside(scale, bounds, f"{where}: lr_scale")
        else:
            assert old["new_scale"] == old["scale"], f"{where}: lr_scale moved"

    def _check_parameter(self, opt: Options, old: dict[str, Any], param: torch.Tensor, where: str) -> None:
        scale = old["scale"] if opt.deferred else old["new_scale"]
        unit = old["u"].unit
        # lr * scale may be a float32 product even for float64 parameters.
        rate = Interval.exact(opt.lr * scale, unit).widened(4 * UNIT["float32"])
        bounds = apply(opt, Interval.exact(old["theta"], unit), old["u"], rate)
        self._check_inside(param, bounds, f"{where}: parameter")

    @staticmethod
    def _check_inside(actual: torch.Tensor, bounds: Interval, what: str) -> None:
        storage, values = name_of(actual.dtype), as_array(actual)
        low, high = round_to(storage, bounds.lo), round_to(storage, bounds.hi)
        outside = ~((low <= values) & (values <= high))
        assert not outside.any(), (
            f"{what}: {values[outside].ravel()[:3]} not in {low[outside].ravel()[:3]} .. {high[outside].ravel()[:3]}"
        )
