"""Whole-tensor sums for sharded parameters.

The path's squared norm and its expectation are plain sums over elements, so those of a sharded tensor are the sums of
its shards' over the ranks that hold them. `WholeTensorSums` adds them up with one collective per mesh and step.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import adaptation
from .batches import Location, StepInputs, TensorWork, moved
from .dtensors import is_dtensor, is_ready, local, placed_as_shard, placed_like

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

ParamGroups = Sequence[Mapping[str, Any]]


class RanksDisagreeError(RuntimeError):
    """Ranks differ in parameters or hyperparameters, or a step failed on one of them; raised on all of them."""


def local_work(group_index: int, param_index: int, param: Tensor, grad: Tensor, state: dict[str, Any]) -> TensorWork:
    """What the back ends get to see of a parameter: of a DTensor, this rank's shard and its state's shards.

    A gradient with other placements than its parameter (DTensor's autograd leaves sums over ranks undone) is brought
    to the parameter's first, as torch.optim's own operations do.
    """
    if not is_dtensor(param):
        return TensorWork(group_index, param_index, param, grad, state)
    if grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = placed_like(grad, param)
    return TensorWork(group_index, param_index, local(param), local(grad), _LocalState(state, param))


class _LocalState(dict[str, Any]):
    """The state of a DTensor parameter with this rank's shards as values; a value set here is set in the state."""

    def __init__(self, state: dict[str, Any], param: Tensor) -> None:
        super().__init__({name: local(value) for name, value in state.items()})
        self._state = state
        self._param = param

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value)
        self._state[name] = placed_as_shard(value, self._param) if is_dtensor(self._state[name]) else value


def gradients_lie_as_parameters(param_groups: ParamGroups) -> bool:
    """Whether the memory of every DTensor gradient is that of its parameter's shard, ready to be read."""
    return all(
        param.grad is None or (param.grad.placements == param.placements and is_ready(param.grad))
        for group in param_groups
        for param in group["params"]
        if is_dtensor(param)
    )


# --- process groups --------------------------------------------------------------------------------------------------


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


# Groups over several mesh dimensions, made at most once per set of ranks and initialized torch.distributed.
_groups_by_ranks: WeakKeyDictionary[Any, dict[tuple[int, ...], ProcessGroup]] = WeakKeyDictionary()


def _group_of(ranks: tuple[int, ...]) -> ProcessGroup:
    """A process group of exactly these global ranks; called by all of them, and only by them."""
    import torch.distributed as dist

    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    known = _groups_by_ranks.setdefault(world, {})
    if ranks not in known:
        known[ranks] = dist.new_group(list(ranks), use_local_synchronization=True, group_desc="clara_fused")
    return known[ranks]


# --- who holds what --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placed:
    """A parameter of the optimizer and the ranks among which it is divided."""

    location: Location
    param: Tensor
    mesh: Any  # DeviceMesh; None for a plain tensor
    sharded_dims: frozenset[int]  # mesh dimensions that shard it
    holders: tuple[int, ...]  # global ranks whose parts make up the whole tensor, sorted


def _place(location: Location, param: Tensor, process_group: ProcessGroup | None) -> _Placed:
    import torch.distributed as dist

    if is_dtensor(param):
        target: DTensor = param  # type: ignore[assignment]
        mesh = target.device_mesh
        dims = frozenset(
            dim
            for dim, placement in enumerate(target.placements)
            if not placement.is_replicate() and mesh.size(dim) > 1
        )
        return _Placed(location, param, mesh, dims, _ranks_along(mesh, dims))
    if process_group is None:
        return _Placed(location, param, None, frozenset(), (dist.get_rank(),))
    return _Placed(location, param, None, frozenset(), tuple(sorted(dist.get_process_group_ranks(process_group))))


def _ranks_along(mesh: Any, dims: frozenset[int]) -> tuple[int, ...]:
    """Global ranks that differ from this one in these dimensions of the mesh only; this one alone if outside of it."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        import torch.distributed as dist

        return (dist.get_rank(),)
    index = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
    return tuple(sorted(mesh.mesh[index].reshape(-1).tolist()))


@dataclass(frozen=True)
class _Collective:
    """One sum over a process group, and the tensors that go into it.

    Each tensor is weighted with 1 / (number of copies in the group), so that what several ranks hold alike counts
    once, whoever contributes it, and everybody ends up with the same bits.
    """

    group: Any
    ranks: tuple[int, ...]
    mesh: Any  # DeviceMesh whose dimensions the group consists of; None for the user's `process_group`
    members: tuple[_Placed, ...]

    @property
    def groups_to_agree(self) -> list[Any]:
        """Process groups that together hold all ranks that must agree: copies of a shard are trained alike as well."""
        if self.mesh is None:
            return [self.group]
        if self.mesh.get_coordinate() is None:
            return []
        return [self.mesh.get_group(dim) for dim in range(self.mesh.ndim) if self.mesh.size(dim) > 1]

    def weight(self, member: _Placed) -> float:
        return len(member.holders) / len(self.ranks)

    @cached_property
    def device(self) -> torch.device:
        """Where the numbers have to be to be sent."""
        return _sending_device(self.group, self.members)


def _sending_device(group: Any, members: Sequence[_Placed]) -> torch.device:
    """Where the tensors are, unless the group cannot send from there."""
    sendable = [device.type for device in getattr(group, "_device_types", [])]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if members:
        device = members[0].param.device
    else:
        # A rank without parameters can only guess where the others have theirs.
        device = accelerator or torch.device("cpu")
    if sendable and device.type not in sendable:
        return accelerator if accelerator is not None and accelerator.type in sendable else torch.device("cpu")
    return device


def _collectives_per_mesh(placed: Sequence[_Placed], process_group: ProcessGroup | None) -> list[_Collective]:
    """One collective per mesh, over the ranks that differ in a shard, and one for `process_group`.

    In the same order on all ranks: meshes as the parameters come, of which `process_group` may give each rank others,
    and `process_group`, also on a rank that has no parameters for it, as the others wait.
    """
    by_mesh: dict[Any, list[_Placed]] = {}
    for member in placed:
        by_mesh.setdefault(member.mesh, []).append(member)
    plain = by_mesh.pop(None, [])
    collectives = []
    for mesh, members in by_mesh.items():
        dims = frozenset[int]().union(*(member.sharded_dims for member in members))
        ranks = _ranks_along(mesh, dims)
        group = None
        if len(ranks) > 1:
            group = mesh.get_group(next(iter(dims))) if len(dims) == 1 else _group_of(ranks)
        collectives.append(_Collective(group, ranks, mesh, tuple(members)))
    if process_group is not None:
        ranks = tuple(sorted(torch.distributed.get_process_group_ranks(process_group)))
        collectives.append(_Collective(process_group, ranks, None, tuple(plain)))
    return collectives


def _merged(collectives: Sequence[_Collective], placed: Sequence[_Placed]) -> list[_Collective]:
    """As few collectives as sum up everything: what lives inside the ranks of a larger one joins it.

    Tensors without a collective of their own join as well: the copies of a plain parameter may differ in their last
    bits from rank to rank, and one scale for all must not.
    """
    kept: list[tuple[_Collective, list[_Placed]]] = []
    # Of equal ones `process_group` first: whether a rank has parameters for it must not decide on the order.
    for collective in sorted(collectives, key=lambda each: (-len(each.ranks), each.mesh is not None)):
        for larger, members in kept:
            if set(collective.ranks) <= set(larger.ranks):
                members.extend(collective.members)
                break
        else:
            kept.append((collective, list(collective.members)))
    if kept:
        covered = {member.location for _, members in kept for member in members}
        kept[0][1].extend(member for member in placed if member.location not in covered)
    return [replace(collective, members=tuple(members)) for collective, members in kept]


# --- sums over ranks -------------------------------------------------------------------------------------------------

# Bits of the checksum of the hyperparameters that rides along with every sum.
_CHECKSUM_BITS = 32
_COUNT_LINE = "number of sharded parameters: "


class _Route(NamedTuple):
    """How the sums of one step's tensors map to the rows of a collective; kept while the same tensors take part."""

    locations: list[Location]
    sources: Tensor  # index of the tensors among the step's, on the collective's device
    rows: Tensor  # their row in the collective
    weights: Tensor  # float64 [k, 1]
    absent_rows: tuple[int, ...]  # members without a gradient on this rank


class Absent(NamedTuple):
    """A sharded parameter that has no gradient on this rank, and its sums over the others."""

    group_index: int
    param_index: int
    sums: Tensor  # float64 [2]


def _largest_over_ranks(collective: _Collective, values: Sequence[Tensor | None]) -> Tensor:
    """Element by element the largest of the ranks' values, None counting as 0."""
    zero = torch.zeros((), device=collective.device)
    largest = torch.stack([zero if value is None else moved(value, collective.device) for value in values])
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=collective.group)
    return largest


class PendingSums:
    """Sums that are under way between the ranks."""

    def __init__(self, owner: WholeTensorSums, own_sums: Tensor, sent: list[tuple[_Collective, _Route, Tensor, Any]]):
        self._owner = owner
        self._own_sums = own_sums
        self._sent = sent

    def result(self) -> tuple[Tensor, list[Absent]]:
        """Whole-tensor sums [n, 2] in the order the parts were given, and those of parameters that took no part."""
        sums, absent = self._own_sums, []
        for collective, route, buffer, work in self._sent:
            work.wait()
            rows = self._owner.checked(collective, buffer).view(-1, 2)
            sums = sums.index_copy(0, route.sources.to(sums.device), moved(rows[route.rows], sums.device))
            for row in route.absent_rows:
                location = collective.members[row].location
                absent.append(Absent(location.group_index, location.param_index, rows[row]))
        return sums, absent


class WholeTensorSums:
    """Adds the path sums of sharded tensors over the ranks that hold their shards: one collective per mesh and step.

    Made anew whenever the parameters or their placements change, on all ranks together: the ranks then compare what
    they are about to add, so that a disagreement is an error rather than a sum of unlike things. Every later sum
    carries a checksum of the hyperparameters.

    Args:
        total: all tensors are summed into one number per column (AdamClaraGlobal).

    Raises:
        RanksDisagreeError: the ranks disagree on parameters or hyperparameters.
    """

    def __init__(
        self, param_groups: ParamGroups, process_group: ProcessGroup | None, total: bool, hyperparameters: list[str]
    ) -> None:
        self.signature = signature_of(param_groups)
        placed = [
            _place(Location(group_index, param_index), param, process_group)
            for group_index, group in enumerate(param_groups)
            for param_index, param in enumerate(group["params"])
        ]
        self._process_group = process_group
        self._total = total
        per_mesh = _collectives_per_mesh(placed, process_group)
        collectives = _merged(per_mesh, placed) if total else per_mesh
        meshes = [collective.mesh for collective in collectives]
        for collective in [*collectives, *(each for each in per_mesh if each.mesh not in meshes)]:
            self._compare_ranks(collective, hyperparameters)
        # The total is complete without the tensors of this rank, a list of tensors is the same on all ranks.
        self._collectives = [each for each in collectives if len(each.ranks) > 1 and (total or each.members)]
        self._routes: list[_Route | None] = [None] * len(self._collectives)
        self._disagreement = _DisagreementWatch()
        # Whether this step's `found_inf` has been told to the other ranks.
        self._overflow_is_known = False

    def serves(self, param_groups: ParamGroups, process_group: ProcessGroup | None) -> bool:
        """Whether parameters, placements and group are still those this was made for."""
        return self._process_group is process_group and self.signature == signature_of(param_groups)

    @property
    def idle(self) -> bool:
        """Whether every tensor is whole on its rank: nothing is ever sent."""
        return not self._collectives

    @cached_property
    def _locations(self) -> frozenset[Location]:
        return frozenset(member.location for c in self._collectives for member in c.members)

    def covers(self, location: Location) -> bool:
        """Whether this tensor's sums go through a collective."""
        return location in self._locations

    def largest_over_ranks(self, values: Mapping[Location, Tensor]) -> dict[Location, Tensor]:
        """For every parameter in a collective the largest of what the ranks have for it; waits for all of them.

        Args:
            values: 0-dim, > 0; parameters may be missing.

        Returns:
            0-dim tensors, 0 where no rank has a value.
        """
        found: dict[Location, Tensor] = {}
        for collective in self._collectives:
            keys = [member.location for member in collective.members]
            largest = _largest_over_ranks(collective, [values.get(key) for key in keys])
            found.update(zip(keys, largest.unbind(), strict=True))
        return found

    def largest_of_all(self, value: Tensor | None) -> Tensor | None:
        """As `largest_over_ranks`, for one value that all ranks of all collectives share; None: no rank has one."""
        for collective in self._collectives:
            (largest,) = _largest_over_ranks(collective, [value]).unbind()
            value = largest if largest > 0.0 else None
        return value

    def with_overflow_of_all_ranks(self, inputs: StepInputs) -> StepInputs:
        """The step's inputs, with a GradScaler's `found_inf` set if it is on any rank: all skip the step, or none.

        One rank that skips alone would be a step behind with its shards for good.
        """
        if inputs.found_inf is None:
            return inputs
        return replace(inputs, found_inf=self._overflow_of_all_ranks(inputs.found_inf))

    def _overflow_of_all_ranks(self, found_inf: Tensor) -> Tensor:
        for collective in self._collectives:
            found_inf = moved(found_inf, collective.device).to(torch.float32, copy=True)
            torch.distributed.all_reduce(found_inf, op=torch.distributed.ReduceOp.MAX, group=collective.group)
        self._overflow_is_known = True
        return found_inf

    # --- Local and Smoothed: one row per parameter ---

    def start(self, locations: Sequence[Location], sums: Sequence[Tensor], hyperparameters: list[str]) -> PendingSums:
        """Begin to add rows over the ranks, in the background.

        Every parameter has a row, with zeros where it has no gradient, so that the ranks never differ in what they
        send.

        Args:
            locations: of the tensors of all batches that `covers`, in order.
            sums: per batch float64 [n, 2].
        """
        self._disagreement.poll()
        self._overflow_is_known = False
        device = self._collectives[0].device
        own_sums = _concatenated(sums, device)
        sent = []
        for index, collective in enumerate(self._collectives):
            route = self._route(index, locations)
            rows = own_sums.new_zeros(len(collective.members), 2, device=collective.device)
            rows[route.rows] = moved(own_sums[route.sources.to(device)], collective.device) * route.weights
            sent.append((collective, route, *self._send(collective, rows, hyperparameters)))
        return PendingSums(self, own_sums, sent)

    # --- Global: the two totals ---

    def total(self, locations: Sequence[Location], sums: Sequence[Tensor], hyperparameters: list[str]) -> Tensor:
        """Sums over all tensors and all ranks.

        Args:
            locations: of the tensors of all batches, in order.
            sums: per batch float64 [n, 2].

        Returns:
            float64 [2].
        """
        self._disagreement.poll()
        self._overflow_is_known = False
        own_sums = _concatenated(sums, self._collectives[0].device)
        sent = []
        for index, collective in enumerate(self._collectives):
            route = self._route(index, locations)
            mine = moved(own_sums[route.sources.to(own_sums.device)], collective.device) * route.weights
            sent.append(self._send(collective, adaptation.total_sums([mine]), hyperparameters))
        totals = []
        for collective, (buffer, work) in zip(self._collectives, sent, strict=True):
            work.wait()
            totals.append(moved(self.checked(collective, buffer), own_sums.device))
        return torch.stack(totals).sum(0)

    # --- a step that cannot be taken ---

    def send_failure(self, found_inf: Tensor | None) -> None:
        """Make the ranks that wait for this one's part in the step's sums raise; waits for them."""
        if found_inf is not None and not self._overflow_is_known:
            self._overflow_of_all_ranks(found_inf)
        self._overflow_is_known = False
        for collective in self._collectives:
            numbers = 2 if self._total else 2 * len(collective.members)
            buffer = torch.full((_CHECKSUM_BITS + numbers,), math.nan, dtype=torch.float64, device=collective.device)
            torch.distributed.all_reduce(buffer, group=collective.group)

    # --- details ---

    def _route(self, index: int, locations: Sequence[Location]) -> _Route:
        route = self._routes[index]
        if route is None or route.locations != locations:
            route = self._routes[index] = self._new_route(self._collectives[index], list(locations))
        return route

    def _new_route(self, collective: _Collective, locations: list[Location]) -> _Route:
        row_of = {member.location: row for row, member in enumerate(collective.members)}
        sources = [source for source, location in enumerate(locations) if location in row_of]
        rows = [row_of[locations[source]] for source in sources]
        weights = [collective.weight(collective.members[row]) for row in rows]
        present = set(rows)
        return _Route(
            locations,
            torch.tensor(sources, dtype=torch.int64, device=collective.device),
            torch.tensor(rows, dtype=torch.int64, device=collective.device),
            torch.tensor(weights, dtype=torch.float64, device=collective.device).unsqueeze(1),
            tuple(row for row in range(len(collective.members)) if row not in present),
        )

    def _send(self, collective: _Collective, numbers: Tensor, hyperparameters: list[str]) -> tuple[Tensor, Any]:
        """Start the sum of `numbers` and of the bits of the checksum, which come first."""
        import torch.distributed as dist

        bits = self._disagreement.bits(hyperparameters, collective.device)
        buffer = torch.cat([bits, numbers.reshape(-1)])
        return buffer, dist.all_reduce(buffer, group=collective.group, async_op=True)

    def checked(self, collective: _Collective, buffer: Tensor) -> Tensor:
        """The sums in a received buffer, after a look at the checksum."""
        self._disagreement.look_at(buffer[:_CHECKSUM_BITS], len(collective.ranks))
        return buffer[_CHECKSUM_BITS:]

    def _compare_ranks(self, collective: _Collective, hyperparameters: list[str]) -> None:
        """Raise on all ranks if one of them is about to add something else than this one; waits for all of them."""
        import torch.distributed as dist

        mine = [*hyperparameters, *self._describe_members(collective)]
        checksum = float(_checksum(mine))
        groups = collective.groups_to_agree
        extremes = torch.tensor([checksum, -checksum], dtype=torch.float64)
        for group in groups:
            extremes = extremes.to(_sending_device(group, collective.members))
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        largest, negative_smallest = extremes.tolist()
        if largest == -negative_smallest:
            return
        lines_by_rank = {dist.get_rank(): mine}
        for group in groups:
            gathered: list[dict[int, list[str]]] = [{}] * dist.get_world_size(group)
            dist.all_gather_object(gathered, lines_by_rank, group=group)
            lines_by_rank = {rank: lines for part in gathered for rank, lines in part.items()}
        raise RanksDisagreeError(_first_difference(lines_by_rank))

    def _describe_members(self, collective: _Collective) -> list[str]:
        # Under process_group each rank may have other parameters in a total, and so the common ones in other places.
        compared = [m for m in collective.members if not (self._total and m.mesh is None and self._process_group)]
        lines = []
        for member in compared:
            place = f"param group {member.location.group_index}, parameter {member.location.param_index}: "
            # Shards without a mesh differ in shape from rank to rank.
            shape = "" if member.mesh is None else f"shape {tuple(member.param.shape)}, "
            lines.append(f"{'parameter of ' if self._total else place}{shape}dtype {member.param.dtype}")
        return [f"{_COUNT_LINE}{len(compared)}", *lines]


class _DisagreementWatch:
    """Finds ranks whose hyperparameters have come to differ, from the sum of their checksums' bits.

    All ranks agree if and only if every bit is set on all of them or on none, and all ranks see the same sum: NaN, if
    one of them cannot take its step (`send_failure`). On the CPU the error is raised in the very step; on a device the
    finding is copied to the host in the background and raised at a later step, because a step never waits for the
    device.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._bits: dict[torch.device, Tensor] = {}
        self._found: Tensor | None = None
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def bits(self, hyperparameters: list[str], device: torch.device) -> Tensor:
        """This rank's checksum as float64 [_CHECKSUM_BITS] of 0 and 1."""
        if self._lines != hyperparameters:
            self._lines, self._bits = hyperparameters, {}
        if device not in self._bits:
            checksum = _checksum(hyperparameters)
            bits = torch.tensor([checksum >> bit & 1 for bit in range(_CHECKSUM_BITS)], dtype=torch.float64)
            pinned = bits.pin_memory() if device.type == "cuda" else bits
            self._bits[device] = moved(pinned, device)
        return self._bits[device]

    def look_at(self, summed_bits: Tensor, ranks: int) -> None:
        """Compare the sum over `ranks` of everybody's bits."""
        disagreement = ((summed_bits != 0.0) & (summed_bits != ranks)).any()
        if disagreement.device.type != "cuda":
            if disagreement:
                raise RanksDisagreeError(self._message())
            return
        self._found = disagreement if self._found is None else self._found.logical_or_(disagreement)
        if self._on_its_way is None and not torch.cuda.is_current_stream_capturing():
            host_copy = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self._found, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self._on_its_way = host_copy, arrived

    def poll(self) -> None:
        """Raise what an earlier step found, if it has reached the host."""
        if self._on_its_way is None or torch.cuda.is_current_stream_capturing():
            return
        host_copy, arrived = self._on_its_way
        if arrived.query():  # type: ignore[no-untyped-call]
            self._on_its_way = None
            if host_copy:
                raise RanksDisagreeError(self._message())

    def _message(self) -> str:
        return (
            "the ranks have come to disagree on hyperparameters (param group options must be equal on all ranks at "
            f"every step), or the step of a rank has failed with an error of its own; this rank has: "
            f"{'; '.join(self._lines)}"
        )


def _checksum(lines: Sequence[str]) -> int:
    return zlib.crc32("\n".join(lines).encode())


def _first_difference(lines_by_rank: Mapping[int, Sequence[str]]) -> str:
    """Name the first entry in which a rank differs from the lowest one."""
    first_rank = min(lines_by_rank)
    first = lines_by_rank[first_rank]
    rank = min(rank for rank, lines in lines_by_rank.items() if list(lines) != list(first))
    pairs = zip_longest(first, lines_by_rank[rank], fillvalue="nothing")
    expected, got = next(pair for pair in pairs if pair[0] != pair[1])
    hint = ""
    if expected.startswith(_COUNT_LINE):
        hint = (
            ". AdamClaraLocal and AdamClaraSmoothed sum tensor by tensor over process_group, so each rank must "
            "hold a shard of every parameter; leave process_group out where ranks hold whole parameters of their "
            "own (ZeroRedundancyOptimizer)"
        )
    return f"the ranks disagree: rank {first_rank} has {expected!r}, rank {rank} has {got!r}{hint}"


def _concatenated(sums: Sequence[Tensor], device: torch.device) -> Tensor:
    if not sums:
        return torch.zeros(0, 2, dtype=torch.float64, device=device)
    return torch.cat([moved(part, device) for part in sums])


def signature_of(param_groups: ParamGroups) -> list[object]:
    """What decides which rank adds what: the parameters, and the placements of those that are DTensors."""
    return [
        (id(param), param.device_mesh, param.placements) if is_dtensor(param) else id(param)
        for group in param_groups
        for param in group["params"]
    ]


def needs_sums(param_groups: ParamGroups, process_group: ProcessGroup | None) -> bool:
    """Whether some parameter may be spread over several ranks."""
    return process_group is not None or any(is_dtensor(param) for group in param_groups for param in group["params"])
