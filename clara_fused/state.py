"""Per-parameter state: what it holds, how it is made, kept in shape, and loaded.

Entries: `step` (0-dim float32), `exp_avg`, `exp_avg_sq`, `path` (of the parameter's shape), `lr_scale` (0-dim float32)
and, under amsgrad, `max_exp_avg_sq`. Moments are float32 for parameters of at most 32 bits and float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dtensors, validation
from .batches import moved
from .options import GroupOptions

State = MutableMapping[str, Any]

_SCALAR_SHAPE = torch.Size(())
# Group-level entries that other Adam implementations write into checkpoints and that mean nothing here.
FOREIGN_GROUP_OPTIONS = ("foreach", "capturable", "differentiable", "fused", "bias_correction", "step")


def moment_dtype(param: Tensor) -> torch.dtype:
    """Dtype of the moments, and of the arithmetic, for a parameter."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _expected_dtypes(param: Tensor, path_dtype: torch.dtype | None, amsgrad: bool) -> dict[str, torch.dtype]:
    moments = moment_dtype(param)
    dtypes = {
        "step": torch.float32,
        "exp_avg": moments,
        "exp_avg_sq": moments,
        "path": path_dtype or moments,
        "lr_scale": torch.float32,
    }
    if amsgrad:
        dtypes["max_exp_avg_sq"] = moments
    return dtypes


def _expected_shapes(param: Tensor, names: Iterable[str]) -> dict[str, torch.Size]:
    return {name: _SCALAR_SHAPE if name in ("step", "lr_scale") else param.shape for name in names}


def check(state: State, param: Tensor, options: GroupOptions, group_index: int, param_index: int) -> None:
    """Check that the state a parameter has, if any, can be stepped on; changes nothing.

    `max_exp_avg_sq` may be missing: amsgrad can be switched on at any time.

    Raises:
        ValueError: an entry is missing or has the wrong shape.
    """
    if not state:
        return
    names = [
        name
        for name in _expected_dtypes(param, options.path_dtype, options.amsgrad)
        if name != "max_exp_avg_sq" or name in state
    ]
    validation.check_state(state, param, group_index, param_index, _expected_shapes(param, names))


def prepare(state: State, param: Tensor, options: GroupOptions) -> None:
    """Create the state of a parameter at its first step; later, follow a parameter that changed dtype or device.

    `lr_scale` starts at `initial_scale`. Expects `check` to have passed.
    """
    for name, dtype in _expected_dtypes(param, options.path_dtype, options.amsgrad).items():
        value = state.get(name)
        if value is None:
            state[name] = _initial_value(name, dtype, param, options.initial_scale)
        elif value.dtype != dtype or value.device != param.device:
            state[name] = value.to(device=param.device, dtype=dtype)


def _initial_value(name: str, dtype: torch.dtype, param: Tensor, initial_scale: float) -> Tensor:
    if name == "step":
        return torch.zeros((), dtype=dtype, device=param.device)
    if name == "lr_scale":
        return torch.full((), initial_scale, dtype=dtype, device=param.device)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def share_scale(states: Iterable[State]) -> None:
    """Make all states of one device hold the same `lr_scale` tensor (AdamClaraGlobal), the first one found.

    One tensor per device is what keeps "the same value in every parameter's state" true without a write per parameter.
    """
    source: Tensor | None = None
    shared: dict[torch.device, Tensor] = {}
    for state in states:
        scale = state.get("lr_scale")
        if scale is None:
            continue
        if source is None:
            source = scale
        if scale.device not in shared:
            shared[scale.device] = moved(source, scale.device)
        state["lr_scale"] = shared[scale.device]


# --- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verbatim:
    """A state value that torch.optim.Optimizer.load_state_dict must pass on as it is.

    The base class casts every tensor to its parameter's dtype: float32 moments of a bfloat16 parameter would lose
    their lower bits for good.
    """

    value: Any


def shield(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a state dict with every state value wrapped in `Verbatim`."""
    shielded = {
        key: {name: Verbatim(value) for name, value in entry.items()} if isinstance(entry, Mapping) else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": shielded}


def adopt(
    entry: Mapping[str, Any],
    param: Tensor,
    group: Mapping[str, Any],
    group_step: Any,
    group_index: int,
    param_index: int,
) -> dict[str, Any]:
    """Turn one parameter's loaded state into state of its own: own memory, the parameter's layout, exact dtypes.

    A state of another Adam is completed: `path` starts at zeros, `lr_scale` at the group's `initial_scale`, `step` at
    the group's (`group_step`, as apex writes it).

    Raises:
        ValueError: not the state of an Adam, or of a parameter of another shape.
    """
    values = {name: value.value if isinstance(value, Verbatim) else value for name, value in entry.items()}
    if not values:
        return {}
    if "step" not in values and group_step is not None:
        values["step"] = group_step
    amsgrad = "max_exp_avg_sq" in values
    dtypes = _expected_dtypes(param, group["path_dtype"], amsgrad)
    for name, initial in (("path", 0.0), ("lr_scale", group["initial_scale"])):
        if name not in values:
            values[name] = _initial_value(name, dtypes[name], param, initial)
    for name in ("step", "lr_scale"):
        if name in values:
            scalar = torch.as_tensor(dtensors.whole(values[name]), dtype=torch.float32)
            values[name] = scalar.reshape(()) if scalar.numel() == 1 else scalar
    validation.check_state(values, param, group_index, param_index, _expected_shapes(param, dtypes))
    return {
        name: _own_copy(value, param, dtypes[name]) if name in dtypes else value for name, value in values.items()
    }


def _own_copy(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    if value.shape == _SCALAR_SHAPE and param.shape != _SCALAR_SHAPE:
        return value.detach().to(device=param.device, dtype=dtype, copy=True)
    own = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return own.copy_(dtensors.placed_like(value, param))
