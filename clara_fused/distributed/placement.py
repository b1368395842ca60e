"""Who holds what: the ranks among which a parameter is divided."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..step import Location
from .dtensors import is_dtensor, is_dtensor_type

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

ParamGroups = Sequence[Mapping[str, Any]]

_PLAIN = {Tensor, torch.nn.Parameter}
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class ProcessGroupReference:
    """Holds the `process_group` of an optimizer through deepcopy (shared) and pickling (lost: groups are per process).

    `lost` tells an optimizer that came out of a pickle to ask for its group instead of summing over none.
    """

    def __init__(self, group: ProcessGroup | None, lost: bool = False) -> None:
        self.group = group
        self.lost = lost

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroupReference:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ProcessGroupReference, (None, self.lost or self.group is not None)


def check_process_group(group: object) -> None:
    """Check that an optimizer can sum over this process group, or that there is none.

    Raises:
        TypeError: not a torch.distributed process group.
        ValueError: a group that this rank does not belong to.
    """
    if group is None:
        return
    dist = torch.distributed
    if not dist.is_available() or not isinstance(group, (dist.ProcessGroup, type(dist.GroupMember.NON_GROUP_MEMBER))):
        raise TypeError(
            f"process_group must be None or a torch.distributed.ProcessGroup (torch.distributed.group.WORLD after "
            f"init_process_group, for example), got {type(group).__name__}"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this rank does not belong to the group")


def needs_sums(param_groups: ParamGroups, process_group: ProcessGroup | None) -> bool:
    """Whether some parameter may be spread over several ranks."""
    if process_group is not None:
        return not is_rehearsal()
    # Asked at every step: the loop over parameters is not one of Python's.
    types = set().union(*(map(type, group["params"]) for group in param_groups)) - _PLAIN
    return any(map(is_dtensor_type, types)) and not is_rehearsal()


def is_rehearsal() -> bool:
    """Whether nothing is sent: tensors without values, or ranks that are not there (estimates of memory)."""
    return torch._C._get_dispatch_mode(_FAKE) is not None or torch.distributed.get_backend() == "fake"


def located(param_groups: ParamGroups) -> Iterator[tuple[Location, Tensor]]:
    """All parameters, with their places."""
    for group_index, group in enumerate(param_groups):
        for param_index, param in enumerate(group["params"]):
            yield Location(group_index, param_index), param


def signature_of(param_groups: ParamGroups) -> list[object]:
    """What decides which rank adds what: the parameters, and the placements of those that are DTensors."""
    return [
        (id(param), param.device_mesh, param.placements) if is_dtensor(param) else id(param)  # type: ignore[attr-defined]
        for _, param in located(param_groups)
    ]


def is_fsdp1_shard(param: Tensor) -> bool:
    """Whether FSDP1 has marked this as its own: a shard (maybe empty), of which all ranks of its group have one."""
    return bool(getattr(param, "_fsdp_flattened", False))


def holds_fsdp1_shards(params: Iterable[Tensor]) -> bool:
    """Whether FSDP1 shards some of these parameters. Plain ones beside them it was told to ignore: they are whole."""
    return any(map(is_fsdp1_shard, params))


def is_deepspeed_partition(param: Tensor) -> bool:
    """Whether this, if it is the only one of its group, is one rank's part of the group's parameters laid end to end.

    It is a vector and no `nn.Parameter`. Without ZeRO, DeepSpeed's copies of vectors look the same.
    """
    return "deepspeed" in sys.modules and is_distributed() and param.dim() == 1 and type(param) is Tensor


def shards_of(params: Mapping[Location, Tensor]) -> set[Location]:
    """Plain tensors that are known to be shards, of which all ranks of the process group have one."""
    in_group = Counter(location.group_index for location in params)
    return {
        location
        for location, param in params.items()
        if is_fsdp1_shard(param) or (in_group[location.group_index] == 1 and is_deepspeed_partition(param))
    }


def is_distributed() -> bool:
    """Whether there may be other ranks."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    """Global ranks of a process group, sorted."""
    return tuple(sorted(torch.distributed.get_process_group_ranks(group)))


@dataclass(frozen=True)
class Placed:
    """A parameter of the optimizer and the ranks among which it is divided."""

    location: Location
    param: Tensor
    mesh: Any  # DeviceMesh; None for a plain tensor
    sharded_dims: frozenset[int]  # mesh dimensions that shard it
    holders: tuple[int, ...]  # global ranks whose parts make up the whole tensor, sorted


def place(location: Location, param: Tensor, process_group: ProcessGroup | None) -> Placed:
    """Where a parameter is; a plain one is divided among `process_group`, or whole without one."""
    if is_dtensor(param):
        mesh, placements = cast("DTensor", param).device_mesh, cast("DTensor", param).placements
        dims = frozenset(
            dim for dim, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(dim) > 1
        )
        return Placed(location, param, mesh, dims, ranks_along(mesh, dims))
    alone = (torch.distributed.get_rank(),)
    return Placed(location, param, None, frozenset(), alone if process_group is None else ranks_of(process_group))


def ranks_along(mesh: Any, dims: frozenset[int]) -> tuple[int, ...]:
    """Global ranks that differ from this one in these dimensions of the mesh only; this one alone if outside of it."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return (torch.distributed.get_rank(),)
    index = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
    return tuple(sorted(mesh.mesh[index].reshape(-1).tolist()))
