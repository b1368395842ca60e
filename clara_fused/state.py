"""Per-parameter state: what it holds, which elements have a path, how it is made, kept in shape, and loaded.

Entries: `step` (0-dim), `exp_avg`, `exp_avg_sq` and, under amsgrad, `max_exp_avg_sq` (of the parameter's shape), `path`
(see `Sample`), `lr_scale` and the walk's scalars (0-dim). Moments and path are float64 for float64 parameters, float32
for all others; scalars are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .adaptation import Walk, fixed_order_sum, scalar_dtype
from .distributed import dtensors
from .options import GroupOptions
from .step import moved
from .tensors import describe, have_equal_layout, is_dense, is_plain

State = MutableMapping[str, Any]

WALK = tuple(f"walk_{column}" for column in Walk._fields)  # checkpoints name them so, too
SCALARS = ("step", "lr_scale", *WALK)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
NAMES = frozenset((*SCALARS, *MOMENTS, "path"))

_MIN_SAMPLED = 65_536  # smaller tensors keep the whole path
_MAX_RUN, _MIN_RUN = 1024, 64
_CAUTIOUS_SHARE = 0.01  # of the parameters' root mean square: the most that the first step changes an element by
_SIZE_PIECE = 1 << 20  # elements whose squares are in memory at a time


def moment_dtype(param: Tensor) -> torch.dtype:
    """Dtype of moments and path, and of the arithmetic, for a parameter."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


# --- which elements have a path --------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """In the storage order of the moments the first `kept` of every `run` elements have a path; equal: all have."""

    run: int
    kept: int

    def shape(self, param: Tensor) -> torch.Size:
        """The path's shape: of the parameter's shape, or rows of the kept elements."""
        if self.run == self.kept:
            return param.shape
        inner = _inner(param) // self.run * self.kept
        return torch.Size((inner,) if param.dim() == 1 else (param.shape[0], inner))

    def view(self, flat: Tensor) -> Tensor:
        """The sampled ones of elements in storage order, as a view [number of runs, kept]."""
        return flat.view(-1, self.run)[:, : self.kept]


WHOLE = Sample(1, 1)


def _inner(param: Tensor) -> int:
    """Elements of a row."""
    return param.numel() if param.dim() <= 1 else math.prod(param.shape[1:])


def _run(param: Tensor) -> int:
    """Elements of a run, a power of two, the same for a DTensor and its parts; 0: the whole path has to be kept."""
    inner = _inner(param)
    run = min(inner & -inner, _MAX_RUN)
    return run if run >= _MIN_RUN and _lies_in_rows(param) and _shards_hold_runs(param, run) else 0


def _lies_in_rows(param: Tensor) -> bool:
    """Whether the first dimension is the outermost one in memory."""
    strides = [stride for size, stride in zip(param.shape, param.stride(), strict=True) if size > 1]
    return param.shape[0] == 1 or strides[0] == max(strides)


def _shards_hold_runs(param: Tensor, run: int) -> bool:
    """Whether every rank's part of a DTensor consists of whole runs: the path can then be placed as the tensor is."""
    if not dtensors.is_dtensor(param):
        return True
    # Rows may be divided at will, what is within a row by runs only. A 1-D tensor is one row.
    within = 0 if param.dim() == 1 else 1
    parts = 1
    for mesh_dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if placement.is_replicate() or (within == 1 and getattr(placement, "dim", None) == 0):
            continue
        if getattr(placement, "dim", None) != within:
            return False
        parts *= param.device_mesh.size(mesh_dim)  # type: ignore[attr-defined]
    size = param.shape[within]
    return size % parts == 0 and size // parts * (_inner(param) // size) % run == 0


def sample_of(param: Tensor, path_fraction: float, all_elements: bool = False) -> Sample:
    """Which elements of a parameter (of a DTensor: of the whole tensor) have a path, if its state is created now.

    Args:
        all_elements: whether parameters are shards of unknown tensors (process_group): they keep the whole path.
    """
    run = 0 if all_elements or param.numel() < _MIN_SAMPLED else _run(param)
    if run == 0:
        return WHOLE
    kept = max(1, 1 << max(0, math.floor(math.log2(run * path_fraction) + 0.5)))
    return WHOLE if kept >= run else Sample(run, kept)


def sample_of_path(param: Tensor, path: Tensor) -> Sample | None:
    """Which elements a path is of that is there already; None if it does not fit the parameter."""
    if path.shape == param.shape:
        return WHOLE
    run = _run(param)
    kept = run * path.numel() // max(1, param.numel())
    if kept == 0 or kept & (kept - 1) or Sample(run, kept).shape(param) != path.shape:
        return None
    return Sample(run, kept)


# --- creation --------------------------------------------------------------------------------------------------------


def names_of(amsgrad: bool) -> tuple[str, ...]:
    """The entries that a step needs."""
    return (*SCALARS, *MOMENTS[: 3 if amsgrad else 2], "path")


def check(state: Mapping[str, Any], param: Tensor, group_index: int, param_index: int) -> None:
    """Check that the entries that are there can be stepped on; what is missing will be created. Changes nothing.

    A path of any shape passes: one that does not fit the parameter's shape or layout will be started anew.

    Raises:
        ValueError: an entry is not a floating-point tensor, or has another shape than it should have.
    """
    for name in sorted(NAMES & state.keys()):
        value = state[name]
        expected = torch.Size() if name in SCALARS else param.shape
        if isinstance(value, Tensor) and value.is_floating_point() and (name == "path" or value.shape == expected):
            continue
        got = f"shape {tuple(value.shape)}, dtype {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{describe(group_index, param_index, param)}: state {name!r} is {got}, "
            f"expected a floating-point tensor of shape {tuple(expected)}"
        )
    if ("exp_avg" in state) != ("exp_avg_sq" in state):
        raise ValueError(
            f"{describe(group_index, param_index, param)}: state has one of 'exp_avg' and 'exp_avg_sq', expected both"
        )


def signature(state: Mapping[str, Any], param: Tensor, grad: Tensor, amsgrad: bool) -> tuple[object, ...]:
    """What the checks of a parameter, its gradient and its state depend on, in a form that is quick to compare."""
    tensors = grad, param, *(state.get(name) for name in ("exp_avg", "exp_avg_sq", "path"))  # the others are small
    seen = [(each.dtype, each.shape, each.device) for each in tensors if isinstance(each, Tensor)]
    return (amsgrad, type(grad), grad.layout, param.stride(), *seen, *map(id, state.values()))


def is_complete(state: Mapping[str, Any], param: Tensor, amsgrad: bool) -> bool:
    """Whether `complete` would change nothing."""
    dtype, device = moment_dtype(param), param.device
    for name in names_of(amsgrad):
        value = state.get(name)
        expected = torch.float32 if name in SCALARS else dtype
        if value is None or value.dtype != expected or value.device != device or _lies_otherwise(value, param):
            return False
    return sample_of_path(param, state["path"]) is not None


def _lies_otherwise(value: Tensor, param: Tensor) -> bool:
    """Whether an entry of the parameter's shape has another memory layout than the parameter, a sample than rows."""
    if value.shape != param.shape:
        return not dtensors.local(value).is_contiguous()
    return not have_equal_layout(value, param) and is_dense(param)


def complete(
    state: State, param: Tensor, options: GroupOptions, lr_scale: Tensor | float, all_elements: bool = False
) -> None:
    """Create what is missing, at a parameter's first step; later, follow one that changed dtype, device or layout.

    Args:
        lr_scale: mu if there is none yet.
        all_elements: see `sample_of`.

    Expects `check` to have passed.
    """
    path_stays = all(name in state for name in ("path", *WALK)) and sample_of_path(param, state["path"]) is not None
    if path_stays and state["path"].shape != param.shape and _lies_otherwise(state["exp_avg"], param):
        path_stays = False  # a sample goes by storage order: in the new layout it would be of other elements
    if not path_stays:  # a path and what is expected of it start together
        for name in ("path", *WALK):
            state.pop(name, None)
    for name in names_of(options.amsgrad):
        dtype = torch.float32 if name in SCALARS else moment_dtype(param)
        value = state.get(name)
        if value is None:
            state[name] = _initial_value(name, dtype, param, options, lr_scale, all_elements)
            continue
        if value.dtype != dtype or value.device != param.device:
            value = value.to(device=param.device, dtype=dtype)
        if _lies_otherwise(value, param):
            is_sample = value.shape != param.shape
            value = value.contiguous() if is_sample else torch.empty_like(param, dtype=dtype).copy_(value)
        state[name] = value


def _initial_value(
    name: str, dtype: torch.dtype, param: Tensor, options: GroupOptions, lr_scale: Tensor | float, all_elements: bool
) -> Tensor:
    if name == "lr_scale" and isinstance(lr_scale, Tensor):
        return lr_scale.detach().to(param.device, dtype, copy=True)
    if name in SCALARS:
        value = lr_scale if name == "lr_scale" else 0.0
        return torch.full((), cast(float, value), dtype=dtype, device=param.device)
    sample = sample_of(param, options.path_fraction, all_elements) if name == "path" else WHOLE
    if sample == WHOLE:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    part = dtensors.local(param)
    rows = torch.zeros(sample.shape(part), dtype=dtype, device=part.device)
    return dtensors.placed_as_shard(rows, param, sample.shape(param)) if part is not param else rows


# --- the initial scale -----------------------------------------------------------------------------------------------


def size_of(params: Sequence[Tensor]) -> Tensor:
    """How large these parameters are: float64 [2], sum of squares and number of elements here.

    On the device of the first of them (not meta if there are others); deterministic, whatever their order. Nothing is
    read by the host.
    """
    parts = [dtensors.local(param) for param in params if not is_lazy(param)]  # lazy: no size before the module has run
    parts = [part for part in parts if part.is_floating_point() and part.layout is torch.strided]
    parts = [part for part in parts if not part.is_meta] or parts
    device = parts[0].device if parts else torch.device("cpu")
    squares, numel = [torch.zeros((), dtype=scalar_dtype(device), device=device)], 0
    for part in parts:
        try:
            squares.append(moved(_sum_of_squares(part), device))
        except (RuntimeError, TypeError, AttributeError):
            if is_plain(part):
                raise
            continue  # a subclass that only its own kernels can read
        numel += part.numel()
    total = fixed_order_sum(torch.sort(torch.stack(squares)).values)
    return torch.stack([total, torch.full_like(total, numel)])


def is_trained(param: Tensor) -> bool:
    """Whether a parameter is not frozen."""
    return param.requires_grad or param.grad is not None


def _sum_of_squares(tensor: Tensor) -> Tensor:
    dtype = scalar_dtype(tensor.device)
    pieces = [fixed_order_sum(p.to(dtype).square()) for p in torch.split(tensor.reshape(-1), _SIZE_PIECE)]
    return fixed_order_sum(torch.stack(pieces))


def cautious_scale(size: Tensor, lr: float | Tensor, options: GroupOptions) -> Tensor:
    """mu with which the first step is small beside the parameters, however large lr is; see docs/algorithm.md.

    Steps relative to the size of what they change are those of LARS (You et al., arXiv 1708.03888), Adafactor (Shazeer
    and Stern, arXiv 1804.04235, section 8) and LAMB (You et al., arXiv 1904.00962), which take them all along.

    Args:
        size: of `size_of` those that are trained; of all where none is, as they are about to be.

    Returns:
        0-dim float32, min(1, 0.01 RMS / lr) within the scale's bounds; 1 where RMS or lr is 0, or RMS is not finite.
    """
    if isinstance(lr, Tensor):
        lr = moved(lr, size.device).reshape(()).to(size.dtype)
    scale = _CAUTIOUS_SHARE * torch.sqrt(size[0] / size[1]) / lr
    scale = torch.where(torch.isfinite(scale) & (scale > 0.0), scale.clamp(max=1.0), 1.0)
    return scale.clamp(options.scale_low, options.scale_high).to(torch.float32)


def shared_scales(states: Iterable[State]) -> dict[torch.device, Tensor]:
    """Make all states of one device hold the same `lr_scale` tensor (AdamClaraGlobal), the first one found.

    One tensor per device is what keeps "the same value in every parameter's state" true without a write per parameter.

    Returns:
        the tensors, by device.
    """
    shared: dict[torch.device, Tensor] = {}
    for state in states:
        scale = state.get("lr_scale")
        if scale is None:
            continue
        if scale.device not in shared:
            source = next(iter(shared.values()), scale)
            shared[scale.device] = moved(source, scale.device)
        state["lr_scale"] = shared[scale.device]
    return shared


# --- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verbatim:
    """A state value that torch.optim.Optimizer.load_state_dict must pass on as it is.

    The base class casts every tensor to its parameter's dtype: float32 moments of a bfloat16 parameter would lose
    their lower bits for good.
    """

    value: Any


def shield(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a state dict, the optimizer's own state values wrapped in `Verbatim`, and the user's tensors copied."""
    params = {key for group in state_dict["param_groups"] for key in group["params"]}
    shielded = {
        key: {name: _shielded(value, key in params and name in NAMES) for name, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": shielded}


def _shielded(value: Any, is_own: bool) -> Any:
    return Verbatim(value) if is_own else value.clone() if isinstance(value, Tensor) else value


# Entries of param groups that other optimizers write into checkpoints: torch's switches, apex's count of steps.
_FOREIGN = ("foreach", "capturable", "differentiable", "fused", "bias_correction", "step")
# Of version 1, the unreleased prototype, whose rule was another one: the numbers of its rule mean nothing here.
_VERSION_1 = ("deferred", "path_dtype", "accumulate")
_RULE_OF_VERSION_1 = ("smoothing", "damping", "reference", "clip", "lr_smoothing", "initial_scale", "scale_bounds")


def adopt_group(group: dict[str, Any], template: Mapping[str, Any], option_names: Iterable[str]) -> None:
    """Give a loaded param group the options of this optimizer: those it lacks as `template` has them."""
    if "smoothing" not in group:  # not from one of these optimizers
        dropped: tuple[str, ...] = _FOREIGN
    elif _VERSION_1[0] in group:
        dropped = (*_VERSION_1, *_RULE_OF_VERSION_1)
    else:
        dropped = ()
    for name in dropped:
        group.pop(name, None)
    for name in option_names:
        group.setdefault(name, template[name])


def adopt(
    entry: Mapping[str, Any],
    param: Tensor,
    options: GroupOptions,
    group_step: Any,
    location: tuple[int, int],
    all_elements: bool,
) -> dict[str, Any]:
    """Turn one parameter's loaded state into state of its own: own memory, the parameter's layout, exact dtypes.

    A state of another Adam is completed: path and walk start anew, `lr_scale` at the group's `initial_scale` (cautious:
    at 1, as the parameter has been trained at this rate), `step` at the group's (`group_step`, as apex writes it). A
    path that does not fit starts anew as well, a whole one is sampled.

    Raises:
        ValueError: not the state of an Adam, or of a parameter of another shape.
    """
    own = {name: value.value for name, value in entry.items() if isinstance(value, Verbatim)}
    others = {name: value for name, value in entry.items() if not isinstance(value, Verbatim)}
    if "step" not in own and group_step is not None:
        own["step"] = group_step
    for name in SCALARS:
        if name in own:
            value = dtensors.whole(own[name]) if isinstance(own[name], Tensor) else own[name]
            device = value.device if isinstance(value, Tensor) else "cpu"
            value = torch.as_tensor(value, dtype=torch.float32, device=device)
            own[name] = value.reshape(()) if value.numel() == 1 else value
    path = own.pop("path", None)
    for name in ("step", *MOMENTS[:2]):
        own.setdefault(name, None)
    check(own, param, *location)
    loaded = {name: _own_copy(value, param, name) for name, value in own.items()}
    if path is not None and all(name in own for name in WALK):
        path = _adopted_path(path, param, options, all_elements)
        if path is not None:
            loaded["path"] = path
    complete(loaded, param, options, trained_scale(options), all_elements)
    return {**others, **loaded}


def trained_scale(options: GroupOptions) -> float:
    """mu of a parameter that another optimizer has trained at this rate."""
    return options.initial_scale if options.initial_scale and options.adapt_lr else 1.0


def _own_copy(value: Tensor, param: Tensor, name: str) -> Tensor:
    if name in SCALARS:
        return value.detach().to(device=param.device, dtype=torch.float32, copy=True)
    own = torch.empty_like(param, dtype=moment_dtype(param), memory_format=torch.preserve_format, requires_grad=False)
    return own.copy_(dtensors.placed_like(value, param))


def _adopted_path(path: Tensor, param: Tensor, options: GroupOptions, all_elements: bool) -> Tensor | None:
    """A loaded path in the layout that this optimizer gives the parameter's; None if it does not fit."""
    if not isinstance(path, Tensor) or not path.is_floating_point():
        return None
    own = _initial_value("path", moment_dtype(param), param, options, 0.0, all_elements)
    if path.shape == own.shape:
        return own.copy_(dtensors.placed_like(path, own))
    if path.shape != param.shape:
        return None
    whole, part = dtensors.local(_own_copy(path, param, "path")), dtensors.local(own)
    sample = sample_of(param, options.path_fraction, all_elements)
    part.copy_(sample.view(in_storage_order(whole)).reshape(part.shape))
    return own


def in_storage_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as a flat view, in the order in which they lie in memory."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]), reverse=True)
    return tensor.permute(order).reshape(-1)
