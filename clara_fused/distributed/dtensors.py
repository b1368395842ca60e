"""DTensors: telling them apart, and getting at the memory on this rank."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..step import Location, TensorWork

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor_type(kind: type) -> bool:
    """Whether these are DTensors; does not import what defines them (there can be none before that)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def is_dtensor(tensor: object) -> bool:
    """Whether this is a DTensor."""
    return is_dtensor_type(type(tensor))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself. Call it without autograd."""
    if not is_dtensor(tensor):
        return tensor
    part: Any = cast("DTensor", tensor).to_local()
    # A wrapper around the result of a collective (AsyncCollectiveTensor) is not yet memory to read.
    return cast(Tensor, part.wait() if hasattr(part, "trigger_wait") else part)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; all ranks of a DTensor's mesh must call this."""
    return cast("DTensor", tensor).full_tensor() if is_dtensor(tensor) else tensor


def placed_like(value: Tensor, param: Tensor) -> Tensor:
    """A whole (or differently sharded) tensor as a tensor of the parameter's mesh and placements.

    A plain tensor is taken to be the whole one, equal on all ranks; nothing is sent then.
    """
    if not is_dtensor(param):
        return whole(value)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = cast(DTensor, param).device_mesh, cast(DTensor, param).placements
    if not is_dtensor(value):
        # Not distribute_tensor: it cannot cut out the strided shards of FSDP2 with tensor parallelism (PyTorch 2.13).
        value = DTensor.from_local(value.to(param.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return cast(DTensor, value).redistribute(mesh, placements)


def placed_as_shard(part: Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """A DTensor with the mesh and placements of `like` whose part on this rank is `part`, sharing its memory.

    Nothing is sent.

    Args:
        shape: of the whole tensor, contiguous.
    """
    from torch.distributed.tensor import DTensor

    target = cast("DTensor", like)
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(part, target.device_mesh, target.placements, run_check=False, shape=shape, stride=stride)


def local_work(location: Location, param: Tensor, grad: Tensor, state: dict[str, Any]) -> TensorWork:
    """What the back ends get to see of a parameter: of a DTensor, this rank's part of it and of its state.

    All ranks call this with the same parameters in the same order, as `place_gradient` may send.
    """
    if not is_dtensor(param):
        return TensorWork(location, param, grad, state)
    parts = {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    return TensorWork(location, local(param), local(place_gradient(param, grad)), parts)


def place_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its parameter's placements, as torch.optim's own operations bring it to them.

    It may have others: DTensor's autograd leaves sums over ranks undone.
    """
    if not (is_dtensor(param) and is_dtensor(grad)) or grad.placements == param.placements:  # type: ignore[attr-defined]
        return grad
    return placed_like(grad, param)
