"""Hands a step's tensors to the compiled core, and keeps on a device what the next step can use again.

The core sees addresses and sizes only. One walk in C++ per step (`_core.gather`) finds the tensors; nothing is
remembered of them but tables on CUDA devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import profiling
from ..adaptation import Evidence, PathSums
from ..options import StepInputs
from ..step import Location, moved
from . import loading

if TYPE_CHECKING:
    from . import _core

# Bucket tables kept for each optimizer: of the last steps (losses that alternate have different tensors).
_MAX_TABLES = 16


class Tables:
    """What an optimizer keeps on CUDA devices between steps."""

    def __init__(self) -> None:
        self._tables: list[_Table] = []
        # Tables that a CUDA graph has captured: its replays read them. They stay as they are.
        self._captured: list[_Table] = []

    def table_of(self, bucket: _core.Bucket, device: torch.device) -> _Table:  # pragma: no cover (needs a GPU)
        """A table on the device that describes the bucket: one of an earlier step, or a new one."""
        for table in (*self._tables, *self._captured):
            if table.serves(bucket):
                break
        else:
            if loading.is_capturing():
                raise RuntimeError(_NEW_TABLE_IN_A_GRAPH)
            table = _Table(bucket, device)
            self._tables = [table, *self._tables[: _MAX_TABLES - 1]]
        if loading.is_capturing() and table not in self._captured:
            self._captured.append(table)
        if not torch.cuda.is_current_stream_capturing():
            # Where a graph is captured, torch.cuda.graph has waited for the device: all that was sent has arrived.
            table.reach_current_stream()
        bucket.set_memory(table.memory.data_ptr())
        return table


_NEW_TABLE_IN_A_GRAPH = (
    "a CUDA graph is being captured, and no step has been taken before with these parameters and this state, so that "
    "the compiled core would have to copy a table from the host; take one or more steps before the capture"
)


class CoreBucket:
    """Tensors, of any groups, that share device and dtypes; implements `step.Bucket`."""

    def __init__(self, bucket: _core.Bucket, tables: Tables, inputs: StepInputs) -> None:
        self._bucket = bucket
        self.device = torch.device(bucket.device)
        # What a launch reads by address has to live as long as the bucket.
        self._amp = [
            value if value is None else moved(value, self.device).to(torch.float32)
            for value in (inputs.grad_scale, inputs.found_inf)
        ]
        self._lrs = [_on_device(lr, self.device) if isinstance(lr, Tensor) else lr for lr in inputs.lrs]
        lrs = [(lr.data_ptr(), lr.dtype == torch.float64) if isinstance(lr, Tensor) else lr for lr in self._lrs]
        bucket.set_inputs(inputs.options, lrs, *(0 if value is None else value.data_ptr() for value in self._amp))
        # Number of threads, and CUDA stream, of every operation.
        self._launch = torch.get_num_threads(), 0
        if self.device.type == "cuda":  # pragma: no cover (needs a GPU)
            self._table = tables.table_of(bucket, self.device)  # as long as the bucket
            self._launch = 0, torch._C._cuda_getCurrentRawStream(self.device.index)

    @property
    def locations(self) -> Sequence[Location]:
        return [Location(*location) for location in self._bucket.locations]

    def _rows(self, columns: int) -> Tensor:
        return torch.empty(len(self._bucket), columns, dtype=torch.float64, device=self.device)

    def measure(self) -> Tensor:
        with profiling.range_of("measure", len(self._bucket)):
            # Zeros: where found_inf is set the core leaves them as they are.
            sums = self._rows(len(PathSums._fields)).zero_()
            self._bucket.measure(sums.data_ptr(), *self._launch)
            return sums

    def adapt(self, sums: Tensor) -> Tensor:
        with profiling.range_of("adapt", len(self._bucket)):
            sums = moved(sums, self.device).contiguous()
            evidence = self._rows(len(Evidence._fields)).zero_()
            self._bucket.adapt(sums.data_ptr(), evidence.data_ptr(), *self._launch)
            return evidence

    def update(self) -> None:
        with profiling.range_of("update", len(self._bucket)):
            self._bucket.update(*self._launch)
        # The core writes through raw pointers, unseen by autograd: without this, a backward pass through a graph that
        # saved a parameter before the step would quietly use the new values.
        torch.autograd.graph.increment_version(self._bucket.params)

    def step(self) -> None:
        with profiling.range_of("step", len(self._bucket)):
            self._bucket.step(*self._launch)
        torch.autograd.graph.increment_version(self._bucket.params)


def _on_device(lr: Tensor, device: torch.device) -> Tensor:
    lr = moved(lr.detach(), device)
    return lr if lr.dtype in (torch.float32, torch.float64) else lr.to(torch.float64)


class _Table:  # pragma: no cover (needs a GPU)
    """A bucket's table on a device: written once, sent in the background, read by the kernels of many steps.

    Sent from pinned memory: the host does not wait, but every stream that is to read the table does.
    """

    def __init__(self, bucket: _core.Bucket, device: torch.device) -> None:
        size, table_size = bucket.memory_sizes()
        self._sizes = size, table_size
        self._device = device
        self._host = torch.empty(table_size, dtype=torch.uint8, device="cpu", pin_memory=True)
        bucket.write_table(self._host.data_ptr())
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.current_stream(device)
        self.memory[:table_size].copy_(self._host, non_blocking=True)
        self._sent = self._stream.record_event()
        self._readers: deque[torch.cuda.Stream] = deque([self._stream], maxlen=8)

    def serves(self, bucket: _core.Bucket) -> bool:
        """Whether this is the table that the bucket would write."""
        return self._sizes == bucket.memory_sizes() and bucket.table_equals(self._host.data_ptr())

    def reach_current_stream(self) -> None:
        """Make the current stream wait for the table if it was sent on another one."""
        current = torch.cuda.current_stream(self._device)
        if current not in self._readers:
            current.wait_event(self._sent)
            self.memory.record_stream(current)
            self._readers.append(current)
