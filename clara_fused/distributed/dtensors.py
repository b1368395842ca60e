"""DTensors: telling them apart, and getting at the memory on this rank."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: object) -> bool:
    """Whether this is a DTensor; does not import what defines them (there can be none before that)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself. Call it without autograd."""
    if not is_dtensor(tensor):
        return tensor
    part: Any = cast("DTensor", tensor).to_local()
    return cast(Tensor, part.wait() if _is_awaited(part) else part)


def _is_awaited(part: object) -> bool:
    """Whether this is a wrapper around the result of a collective (AsyncCollectiveTensor), not yet memory to read."""
    return hasattr(part, "trigger_wait")


def is_ready(tensor: Tensor) -> bool:
    """Whether this rank's part of a DTensor can be read at once."""
    return not _is_awaited(cast("DTensor", tensor).to_local())


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


def placed_as_shard(part: Tensor, param: Tensor) -> Tensor:
    """A DTensor like `param` (any dtype) whose part on this rank is `part`, sharing its memory; nothing is sent."""
    from torch.distributed.tensor import DTensor

    target = cast("DTensor", param)
    return DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )
