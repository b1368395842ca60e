"""Checks of parameters and gradients, and how messages name them. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .distributed.dtensors import is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# In the order of DType in csrc/tensor_list.h.
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF_DTYPES = (torch.bfloat16, torch.float16)


class SparseGradientError(TypeError, RuntimeError):
    """A sparse gradient: a TypeError like other unsuitable tensors, and the RuntimeError that torch.optim raises."""


def describe(group_index: int, param_index: int, tensor: Tensor) -> str:
    """Name a parameter (or its gradient) so that a user finds it."""
    return (
        f"param group {group_index}, parameter {param_index} "
        f"(shape {tuple(tensor.shape)}, dtype {tensor.dtype}, device {tensor.device})"
    )


def check(param: Tensor, grad: Tensor, group_index: int, param_index: int) -> None:
    """Check that a gradient can update its parameter.

    Raises:
        SparseGradientError: a sparse gradient.
        TypeError: a tensor that is complex, integer, not strided, or a gradient of a dtype that autograd does not
            produce for this parameter.
        ValueError: a gradient of another shape or device than the parameter; a parameter whose elements share memory
            (expanded), or a DTensor of partial sums.
    """
    where = describe(group_index, param_index, param)
    _check_param(param, where)
    check_placements(param, group_index, param_index)
    _check_grad(param, grad, where)


def _check_param(param: Tensor, where: str) -> None:
    if param.layout is not torch.strided:
        raise TypeError(f"{where}: parameters must be dense, got layout {param.layout}")
    if param.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"{where}: parameters must be one of {supported}")
    if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(f"{where}: elements share memory (strides {param.stride()}); pass a contiguous tensor")


def check_placements(param: Tensor, group_index: int, param_index: int) -> None:
    """Check that a DTensor is divided or copied over its mesh; plain tensors pass.

    Raises:
        ValueError: a placement is Partial: each rank holds a summand, and Adam's step of a sum is not a sum.
    """
    placements = tuple(cast("DTensor", param).placements) if is_dtensor(param) else ()
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{describe(group_index, param_index, param)}: placements {placements} are partial, expected Shard or "
            f"Replicate; redistribute the parameter first"
        )


def _check_grad(param: Tensor, grad: Tensor, where: str) -> None:
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
    mesh, grad_mesh = (getattr(t, "device_mesh", None) if is_dtensor(t) else None for t in (param, grad))
    if mesh != grad_mesh:
        got, expected = ("a plain tensor" if m is None else f"a DTensor on {m}" for m in (grad_mesh, mesh))
        raise TypeError(f"{where}: gradient is {got}, expected {expected}")


def _grad_dtype_is_fine(param: Tensor, grad: Tensor) -> bool:
    """Whether autograd can produce this dtype: the parameter's, float32 for 16-bit, or what `grad_dtype` allows."""
    if grad.dtype == param.dtype or (param.dtype in _HALF_DTYPES and grad.dtype == torch.float32):
        return True
    # torch >= 2.10: the dtype a leaf accepts for its gradient; None accepts any.
    allowed = getattr(param, "grad_dtype", param.dtype)
    return grad.dtype in SUPPORTED_DTYPES and allowed in (None, grad.dtype)


# --- memory ----------------------------------------------------------------------------------------------------------


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda dim: (dim[1], dim[0])):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def have_equal_layout(first: Tensor, second: Tensor) -> bool:
    """Whether the elements of two tensors of equal shape lie in memory in the same order, by strides."""
    return first.numel() <= 1 or all(
        size == 1 or mine == other
        for size, mine, other in zip(first.shape, first.stride(), second.stride(), strict=True)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is of no subclass but `nn.Parameter`."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether only the tensor's class knows what operations do with it, and where its elements are (quantized, say)."""
    return type(local(tensor)).__torch_dispatch__ is not Tensor.__torch_dispatch__


def overlapping(params: Sequence[Tensor]) -> set[int]:
    """Indices of parameters that share memory with another one in the list; of plain tensors that have memory."""
    starts = [(param.data_ptr(), index) for index, param in enumerate(params) if _has_memory(param)]
    starts.sort()
    found: set[int] = set()
    reached, previous = 0, 0
    for start, index in starts:
        end = start + _span(params[index])
        if start < reached:
            found |= {previous, index}
        if end > reached:
            reached, previous = end, index
    return found


def _has_memory(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.device.type != "meta"


def _span(tensor: Tensor) -> int:
    """Bytes from the first element in memory to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
