"""Every check of what a user hands in, and every error message. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .dtensors import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .options import GroupOptions

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PATH_DTYPES = (None, torch.float32, torch.bfloat16)
_WALKS = ("random_walk", "measured_walk")
_HALF_DTYPES = (torch.bfloat16, torch.float16)


class SparseGradientError(TypeError, RuntimeError):
    """A sparse gradient: a TypeError like other unsuitable tensors, and the RuntimeError that torch.optim raises."""


def describe(group_index: int, param_index: int, tensor: Tensor) -> str:
    """Name a parameter (or its gradient) so that a user finds it."""
    return (
        f"param group {group_index}, parameter {param_index} "
        f"(shape {tuple(tensor.shape)}, dtype {tensor.dtype}, device {tensor.device})"
    )


# --- hyperparameters -------------------------------------------------------------------------------------------------


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_lr(lr: object, group_index: int, *, read_tensor: bool = False) -> None:
    """Check a learning rate: a float >= 0 or a one-element real tensor.

    The value of a tensor is read only on request and only on the CPU: a step must never wait for a device.

    Raises:
        ValueError: negative, NaN, or a tensor of more than one element.
        TypeError: neither number nor floating-point tensor.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"param group {group_index}: Tensor lr must be 1-element, got shape {tuple(lr.shape)}"
            )
        if not lr.is_floating_point():
            raise TypeError(f"param group {group_index}: Tensor lr must be floating point, got {lr.dtype}")
        if read_tensor and lr.device.type == "cpu" and not lr.item() >= 0.0:
            raise ValueError(f"param group {group_index}: Invalid learning rate: {lr.item()}")
    elif not _is_real(lr):
        raise TypeError(
            f"param group {group_index}: lr must be a float or a one-element tensor, got {type(lr).__name__}"
        )
    elif not lr >= 0.0:  # type: ignore[operator]
        raise ValueError(f"param group {group_index}: Invalid learning rate: {lr}")


def _check_number(
    group: Mapping[str, Any], group_index: int, name: str, words: str, in_range: Callable[[Any], bool], expected: str
) -> None:
    value = group[name]
    if not _is_real(value):
        raise TypeError(f"param group {group_index}: {name} must be a number, got {value!r}")
    if not in_range(value):
        raise ValueError(f"param group {group_index}: {words}: {value} (expected {expected})")


def _check_interval(value: object, group_index: int, name: str) -> None:
    if not (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(_is_real(end) for end in value)
    ):
        raise TypeError(f"param group {group_index}: {name} must be a pair of numbers (low, high), got {value!r}")
    low, high = value
    if not 0.0 < low <= high:
        raise ValueError(f"param group {group_index}: Invalid {name}: {value} (expected 0 < low <= high)")


def _check_betas(betas: object, group_index: int) -> None:
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(_is_real(beta) for beta in betas)):
        raise TypeError(f"param group {group_index}: betas must be a pair of floats, got {betas!r}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"param group {group_index}: Invalid beta parameter at index {index}: {beta}")


def check_options(group: Mapping[str, Any], group_index: int, *, smoothed: bool) -> None:
    """Check every option of a param group except `lr`.

    Raises:
        ValueError: an option is out of range; worded as torch.optim words it where torch has the option.
        TypeError: an option has the wrong type.
    """
    _check_betas(group["betas"], group_index)
    numbers: list[tuple[str, str, Callable[[Any], bool], str]] = [
        ("eps", "Invalid epsilon value", lambda x: x >= 0.0, ">= 0"),
        ("weight_decay", "Invalid weight_decay value", lambda x: x >= 0.0, ">= 0"),
        ("smoothing", "Invalid smoothing value", lambda x: 0.0 < x <= 1.0, "in (0, 1]"),
        ("damping", "Invalid damping value", lambda x: x > 0.0, "> 0"),
        ("initial_scale", "Invalid initial_scale value", lambda x: x > 0.0, "> 0"),
    ]
    if smoothed:
        numbers.append(("lr_smoothing", "Invalid lr_smoothing value", lambda x: 0.0 <= x < 1.0, "in [0, 1)"))
    for name, words, in_range, expected in numbers:
        _check_number(group, group_index, name, words, in_range, expected)
    _check_reference(group["reference"], group_index)
    if group["clip"] is not None:
        _check_interval(group["clip"], group_index, "clip")
    _check_interval(group["scale_bounds"], group_index, "scale_bounds")
    _check_initial_scale(group, group_index)
    if group["path_dtype"] not in _PATH_DTYPES:
        error = ValueError if isinstance(group["path_dtype"], torch.dtype) else TypeError
        raise error(
            f"param group {group_index}: path_dtype must be None, torch.float32 or torch.bfloat16, "
            f"got {group['path_dtype']!r}"
        )


def _check_reference(reference: object, group_index: int) -> None:
    if isinstance(reference, str) and reference in _WALKS:
        return
    if not _is_real(reference) and not isinstance(reference, str):
        raise TypeError(
            f"param group {group_index}: reference must be 'random_walk', 'measured_walk' or a number > 0, "
            f"got {reference!r}"
        )
    if isinstance(reference, str) or not cast(float, reference) > 0.0:
        raise ValueError(
            f"param group {group_index}: Invalid reference value: {reference!r} "
            f"(expected 'random_walk', 'measured_walk' or > 0)"
        )


def _check_initial_scale(group: Mapping[str, Any], group_index: int) -> None:
    initial_scale, (low, high) = group["initial_scale"], group["scale_bounds"]
    if not low <= initial_scale <= high:
        raise ValueError(
            f"param group {group_index}: Invalid initial_scale value: {initial_scale} "
            f"(expected inside scale_bounds {(low, high)})"
        )
    if not group["accumulate"] and initial_scale != 1.0:
        raise ValueError(
            f"param group {group_index}: Invalid initial_scale value: {initial_scale} (expected 1 with "
            f"accumulate=False, where the scale does not build on its previous value)"
        )


def check_max_temporary_bytes(limit: object) -> None:
    """Check a bound of scratch memory.

    Raises:
        TypeError: neither None nor an integer.
        ValueError: below 1.
    """
    if limit is None:
        return
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"max_temporary_bytes must be None or an integer, got {limit!r}")
    if limit < 1:
        raise ValueError(f"max_temporary_bytes must be at least 1, got {limit}")


def check_equal_in_all_groups(all_options: Sequence[GroupOptions], names: Sequence[str]) -> None:
    """Check that the groups of AdamClaraGlobal agree on everything that decides on its one scale.

    Raises:
        ValueError: a group differs from group 0; names the group and the option.
    """
    for group_index, options in enumerate(all_options):
        for name in names:
            expected, got = getattr(all_options[0], name), getattr(options, name)
            if got != expected:
                raise ValueError(
                    f"param group {group_index}: AdamClaraGlobal has one learning-rate scale, so {name} must be equal "
                    f"in all groups; group 0 has {expected!r}, group {group_index} has {got!r}"
                )


def check_process_group(group: object) -> None:
    """Check that an optimizer can sum over this process group, or that there is none.

    Raises:
        TypeError: not a torch.distributed process group.
        ValueError: a group that this rank does not belong to.
    """
    if group is None:
        return
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(
        group, (distributed.ProcessGroup, type(distributed.GroupMember.NON_GROUP_MEMBER))
    ):
        raise TypeError(
            f"process_group must be None or a torch.distributed.ProcessGroup (torch.distributed.group.WORLD after "
            f"init_process_group, for example), got {type(group).__name__}"
        )
    if group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this rank does not belong to the group")


# --- tensors ---------------------------------------------------------------------------------------------------------


def check_param(param: Tensor, group_index: int, param_index: int) -> None:
    """Check that a parameter is a dense real floating-point tensor.

    Raises:
        TypeError: complex, integer, of an unsupported floating-point dtype, or not strided.
        ValueError: elements of the tensor share memory (an expanded tensor), so it cannot be updated in place.
    """
    if is_lazy(param):  # of a lazy module: the first forward pass will make a tensor of it
        return
    if param.layout is not torch.strided:
        raise TypeError(
            f"{describe(group_index, param_index, param)}: parameters must be dense, got layout {param.layout}"
        )
    if param.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"{describe(group_index, param_index, param)}: parameters must be one of "
            f"{', '.join(str(dtype) for dtype in SUPPORTED_DTYPES)}"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(
            f"{describe(group_index, param_index, param)}: elements share memory (strides {param.stride()}); "
            f"pass a contiguous tensor"
        )
    check_placements(param, group_index, param_index)


def check_placements(param: Tensor, group_index: int, param_index: int) -> None:
    """Check that a DTensor is divided or copied over its mesh; plain tensors pass.

    Raises:
        ValueError: a placement is Partial: each rank holds a summand, and Adam's step of a sum is not a sum.
    """
    if not is_dtensor(param):
        return
    placements = cast("DTensor", param).placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{describe(group_index, param_index, param)}: placements {tuple(placements)} are partial, expected Shard "
            f"or Replicate; redistribute the parameter first"
        )


def _grad_dtype_is_fine(param: Tensor, grad: Tensor) -> bool:
    """Whether autograd can produce this dtype: the parameter's, float32 for 16-bit, or what `grad_dtype` allows."""
    if grad.dtype == param.dtype or (param.dtype in _HALF_DTYPES and grad.dtype == torch.float32):
        return True
    # torch >= 2.10: the dtype a leaf accepts for its gradient; None accepts any.
    allowed = getattr(param, "grad_dtype", param.dtype)
    return grad.dtype in SUPPORTED_DTYPES and allowed in (None, grad.dtype)


def check_grad(param: Tensor, grad: Tensor, group_index: int, param_index: int) -> None:
    """Check that a gradient can update its parameter.

    Raises:
        SparseGradientError: sparse.
        TypeError: complex, integer, or a dtype that autograd does not produce for this parameter.
        ValueError: another shape or device than the parameter.
    """
    where = describe(group_index, param_index, param)
    if grad.layout is not torch.strided:
        raise SparseGradientError(
            f"{where}: AdamClara does not support sparse gradients (layout {grad.layout}, shape {tuple(grad.shape)}, "
            f"dtype {grad.dtype}); expected a dense gradient"
        )
    if not _grad_dtype_is_fine(param, grad):
        raise TypeError(f"{where}: gradient has dtype {grad.dtype}, expected {param.dtype}")
    if grad.shape != param.shape:
        raise ValueError(f"{where}: gradient has shape {tuple(grad.shape)}, expected {tuple(param.shape)}")
    if grad.device != param.device:
        raise ValueError(f"{where}: gradient is on {grad.device}, expected {param.device}")
    if is_dtensor(param) or is_dtensor(grad):
        mesh, grad_mesh = (getattr(tensor, "device_mesh", None) for tensor in (param, grad))
        if mesh != grad_mesh:
            got, expected = ("a plain tensor" if m is None else f"a DTensor on {m}" for m in (grad_mesh, mesh))
            raise TypeError(f"{where}: gradient is {got}, expected {expected}")


def check_state(
    state: Mapping[str, Any], param: Tensor, group_index: int, param_index: int, shapes: Mapping[str, torch.Size]
) -> None:
    """Check that existing state fits its parameter, before a step relies on it.

    Raises:
        ValueError: an entry is missing, is not a floating-point tensor, or has another shape than `shapes` gives.
    """
    for name, shape in shapes.items():
        value = state.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != shape:
            got = f"shape {tuple(value.shape)}, dtype {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{describe(group_index, param_index, param)}: state {name!r} is {got}, "
                f"expected a floating-point tensor of shape {tuple(shape)}"
            )


def check_capture(param: Tensor, has_state: bool, by_core: bool, group_index: int, param_index: int) -> None:
    """Check that a step that nothing has been kept for may be captured into a CUDA graph.

    The core would copy a table from the host, and fresh state would be reset by every replay.

    Raises:
        RuntimeError: the core would take the step, or the parameter has no state yet.
    """
    if by_core or not has_state:
        raise RuntimeError(
            f"{describe(group_index, param_index, param)}: a CUDA graph is being captured, and no step has been taken "
            f"before with these parameters, gradients and options; take one or more before the capture. A step in "
            f"which the compiled core copies (parameters with gaps, gradients in another memory layout) or leaves a "
            f"part to PyTorch (float64) can only be captured with fused=False"
        )
