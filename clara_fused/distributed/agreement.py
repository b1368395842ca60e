"""Ranks that sum with each other have to agree on what they sum; these are the checks that they do."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..options import StepInputs
from ..step import Location, moved
from .collectives import Collective, collectives_per_mesh, merged, on_device, sending_device
from .placement import Placed, holds_fsdp1_shards, is_fsdp1_shard, place, shards_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Bits of the checksum of the hyperparameters that rides along with every sum.
CHECKSUM_BITS = 32
_COUNT_LINE = "number of sharded parameters: "


class RanksDisagreeError(RuntimeError):
    """Ranks differ in parameters or hyperparameters, or a step failed on one of them; raised on all of them."""


def known_lr(lr: float | Tensor) -> float | None:
    """A learning rate; None if it is on another device: reading it would wait."""
    return None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def describe_hyperparameters(optimizer: str, inputs: StepInputs) -> list[str]:
    """One line per group and option."""
    lines = [f"optimizer: {optimizer}"]
    for index, (lr, options) in enumerate(zip(inputs.lrs, inputs.options, strict=True)):
        values = {"lr": known_lr(lr), **dataclasses.asdict(options)}
        lines += [f"param group {index}: {name} = {value!r}" for name, value in values.items()]
    return lines


def describe_members(members: Sequence[Placed], by_place: bool) -> list[str]:
    """What the ranks are to have alike of these parameters.

    Args:
        by_place: they have the same places in the optimizers of all ranks.
    """
    lines = [f"{_COUNT_LINE}{len(members)}"]
    for member in members:
        group_index, param_index = member.location
        place = f"param group {group_index}, parameter {param_index}" if by_place else "parameter"
        # Shards without a mesh differ in shape from rank to rank.
        shape = "" if member.mesh is None else f"shape {tuple(member.param.shape)}, "
        lines.append(f"{place}: {shape}dtype {member.param.dtype}")
    return lines


def compare_ranks(compared: Sequence[tuple[Collective, list[str]]]) -> None:
    """Raise on all ranks if one of them is about to add something else than another one; waits for all of them.

    Nobody raises before everything is compared, and the ranks have told each other what came of it: whoever has raised
    is missing in what the others compare next. That word goes round once, in every collective; it reaches all ranks of
    a mesh, since each of its dimensions has one.
    """
    import torch.distributed as dist

    def largest(collective: Collective, *numbers: float) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        for group in collective.groups_to_agree:
            values = values.to(sending_device(group, collective.members))
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
        return values.tolist()

    differing = []
    for collective, lines in compared:
        checksum = float(_checksum(lines))
        highest, negative_lowest = largest(collective, checksum, -checksum)
        if highest != -negative_lowest:
            differing.append((collective, lines))
    known = float(bool(differing))
    for collective, _ in compared:
        (known,) = largest(collective, known)
    if not known:
        return
    differences = []
    for collective, lines in differing:
        lines_by_rank = {dist.get_rank(): lines}
        for group in collective.groups_to_agree:
            gathered: list[dict[int, list[str]]] = [{}] * dist.get_world_size(group)
            dist.all_gather_object(gathered, lines_by_rank, group=group)
            lines_by_rank = {rank: lines for part in gathered for rank, lines in part.items()}
        differences.append(_first_difference(lines_by_rank))
    elsewhere = "other ranks disagree that share parameters with ranks that this one shares parameters with"
    raise RanksDisagreeError(differences[0] if differences else elsewhere)


def agreed_collectives(
    params: Mapping[Location, Tensor], process_group: ProcessGroup | None, one_scale: bool, hyperparameters: list[str]
) -> tuple[list[Collective], Collective | None]:
    """What is sent at every step, after all ranks have compared it.

    Returns:
        The collectives that sum tensor by tensor, and the one more sum of AdamClaraGlobal under `process_group`.

    Raises:
        RanksDisagreeError: they differ in this or in their hyperparameters.
    """
    placed = [place(location, param, process_group) for location, param in params.items()]
    if holds_fsdp1_shards(params.values()):
        placed = [member for member in placed if member.mesh is not None or is_fsdp1_shard(member.param)]
    collectives = per_mesh = collectives_per_mesh(placed, process_group)
    total = None
    if one_scale:
        collectives = [each for each in per_mesh if each.mesh is not None]
        alone = [member for member in placed if member.mesh is None]
        if process_group is not None:
            total = per_mesh[-1]
            # Each rank may have parameters of its own, but of what is sharded all of them have a part.
            known = shards_of(params)
            shards, alone = [member for member in alone if member.location in known], []
            if shards:
                collectives.append(Collective(process_group, total.ranks, None, shards))
        collectives = merged(collectives, alone)
    compared = [*collectives, *(each for each in per_mesh if each.mesh not in [known.mesh for known in collectives])]
    # Where each rank may have others the common ones may be in other places.
    described = [describe_members(() if each is total else each.members, by_place=total is None) for each in compared]
    compare_ranks([(each, [*hyperparameters, *lines]) for each, lines in zip(compared, described, strict=True)])
    summed = [each for each in collectives if len(each.ranks) > 1 and each.members]
    return summed, total if total is not None and len(total.ranks) > 1 else None


class DisagreementWatch:
    """Finds ranks whose hyperparameters have come to differ, from the sum of their checksums' bits.

    All ranks agree if and only if every bit is set on all of them or on none, and all ranks see the same sum: NaN, if
    one of them cannot take its step (`RankSums.fail`). On the CPU the error is raised in the very step; on a device the
    finding is copied to the host in the background and raised at a later step, because a step never waits for the
    device.
    """

    def __init__(self, optimizer: str) -> None:
        self._optimizer = optimizer
        self._seen: object = None
        self._lines: list[str] = []
        self._bits: dict[torch.device, Tensor] = {}
        self._found: Tensor | None = None
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def describe(self, inputs: StepInputs) -> list[str]:
        """Put a step's hyperparameters in words, where they have changed: it takes tens of microseconds a group."""
        seen = [known_lr(lr) for lr in inputs.lrs], list(inputs.options)
        if seen != self._seen:
            self._seen, self._lines, self._bits = seen, describe_hyperparameters(self._optimizer, inputs), {}
        return self._lines

    def bits(self, device: torch.device) -> Tensor:
        """This rank's checksum as float64 [CHECKSUM_BITS] of 0 and 1."""
        if device not in self._bits:
            checksum = _checksum(self._lines)
            values = [float(checksum >> bit & 1) for bit in range(CHECKSUM_BITS)]
            self._bits[device] = on_device(values, torch.float64, device)
        return self._bits[device]

    def look_at(self, summed_bits: Tensor, ranks: int) -> None:
        """Remember whether the sum over `ranks` of everybody's bits says that they differ."""
        found = ((summed_bits != 0.0) & (summed_bits != ranks)).any()
        self._found = found if self._found is None else self._found | moved(found, self._found.device)

    def raise_or_defer(self) -> None:
        """Raise what was found, or send it on its way to the host."""
        if self._found is None:
            return
        if self._found.device.type != "cuda":
            found, self._found = bool(self._found), None
            if found:
                raise RanksDisagreeError(self._message())
        elif self._on_its_way is None and not torch.cuda.is_current_stream_capturing():
            host_copy = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            host_copy.copy_(self._found, non_blocking=True)
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
