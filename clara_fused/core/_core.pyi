"""The compiled core (csrc/python/bindings.cpp). Addresses are of memory that the caller keeps alive; 0 means none.

A core is built for this text and refused beside any other (loading.py), so that one left over from older sources is
never called. What changes the meaning of a call and not its declaration has to be said here for that reason as well.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

from ..options import GroupOptions

version: str
interface: str

class Bucket:
    """The tensors of one device and storage types in one step. Owns gradients and state until it dies."""

    @property
    def device(self) -> str: ...
    @property
    def locations(self) -> list[tuple[int, int]]: ...
    @property
    def params(self) -> list[Any]: ...
    def __len__(self) -> int: ...
    def set_inputs(self, options: Sequence[GroupOptions], lrs: Sequence[Any], grad_scale: int, found_inf: int) -> None:
        """Per param group its options and its lr: a float, or (address, is float64) where the device has it."""
    def memory_sizes(self) -> tuple[int, int]:
        """CUDA: bytes the bucket needs on the device, and how many of them, the first, `write_table` fills."""
    def write_table(self, host_memory: int) -> None: ...
    def table_equals(self, host_memory: int) -> bool: ...
    def set_memory(self, device_memory: int) -> None: ...
    def measure(self, sums: int, threads: int, stream: int) -> None:
        """Writes the path, and `adaptation.PathSums`, float64 [n, 9]."""
    def adapt(self, sums: int, evidence: int, threads: int, stream: int) -> None:
        """Counts the step; such sums to `adaptation.Evidence`, float64 [n, 8], and scales but for the one of all."""
    def update(self, threads: int, stream: int) -> None: ...
    def step(self, threads: int, stream: int) -> None: ...

class BuildInfo(TypedDict):
    cpu_instruction_sets: list[str]
    cpu_instruction_set: str
    cpu_threads: str
    cuda: str  # such as "13.0, architectures 80;90"; empty without
    why_not_more: str

def gather(
    param_groups: list[dict[str, Any]], state: dict[Any, Any], scales: list[Any] | None
) -> tuple[list[Bucket], list[tuple[int, int]]]:
    """Buckets, and group and index of parameters that have a gradient but cannot be stepped by the core as they are.

    `scales`: tensors that hold the one scale of all, one per device; None where each parameter has a scale of its own.
    """

def supports(on_cuda: bool, param: int, grad: int) -> bool:
    """Dtypes by their place in tensors.SUPPORTED_DTYPES."""

def build_info() -> BuildInfo: ...
def cuda_problem(device: int) -> str: ...
