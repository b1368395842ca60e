"""The compiled core (csrc/bindings.cpp). Addresses are of tensors that the caller keeps alive; 0 means none.

A core is built for this text and refused beside any other (_interface.py), so that one left over from older sources is
never called. What changes the meaning of a call and not its declaration has to be said here for that reason as well.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypedDict

version: str
interface: str

class DType(Enum):
    float32 = ...
    bfloat16 = ...
    float16 = ...
    float64 = ...

class Variant(Enum):
    GLOBAL = ...
    LOCAL = ...
    SMOOTHED = ...

class GroupTable:
    def __init__(self, group_count: int) -> None: ...
    def set(
        self,
        group: int,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        decoupled_weight_decay: bool,
        smoothing: float,
        damping: float,
        reference: float | None,
        measured_walk: bool,
        clip_low: float,
        clip_high: float,
        accumulate: bool,
        scale_low: float,
        scale_high: float,
        adapt_lr: bool,
        lr_smoothing: float | None,
    ) -> None: ...
    def set_lr(self, group: int, lr: float) -> None: ...
    def set_lr_tensor(self, group: int, address: int, is_double: bool) -> None: ...
    def set_reference_address(self, group: int, values: int) -> None: ...

class Bucket:
    def __init__(
        self,
        groups: GroupTable,
        *,
        device: int,
        variant: Variant,
        param: DType,
        grad: DType,
        path: DType,
        deferred: bool,
    ) -> None: ...
    def add(
        self,
        *,
        group: int,
        numel: int,
        param: int,
        grad: int,
        exp_avg: int,
        exp_avg_sq: int,
        max_exp_avg_sq: int,
        path: int,
        step: int,
        lr_scale: int,
    ) -> int: ...
    def set_amp(self, grad_scale: int, found_inf: int) -> None: ...
    def memory_sizes(self) -> tuple[int, int]: ...
    def write_table(self, host_memory: int) -> None: ...
    def set_memory(self, device_memory: int) -> None: ...
    def measure(self, sums: int, threads: int, stream: int) -> None: ...
    def adapt(self, sums: int, threads: int, stream: int) -> None: ...
    def apply(self, threads: int, stream: int) -> None: ...
    def step(self, threads: int, stream: int) -> None: ...
    def __len__(self) -> int: ...

class TensorWatch:
    def __init__(
        self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any], use_exchange_api: bool = True
    ) -> None: ...
    def route(self, group: int, param: int, bucket: Bucket, row: int) -> None: ...
    def unchanged(self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> bool: ...
    def params_with_grad(self, param_groups: list[dict[str, Any]]) -> list[Any]: ...
    @property
    def uses_exchange_api(self) -> bool: ...

class CudaInfo(TypedDict):
    toolkit: str
    architectures: str

class BuildInfo(TypedDict):
    cpu_instruction_sets: list[str]
    cpu_instruction_set: str
    cpu_threads: str
    compiler: str
    cuda: CudaInfo | None

def supports(cuda: bool, param: DType, grad: DType, path: DType) -> bool: ...
def build_info() -> BuildInfo: ...
def release_workspace() -> int: ...
def cuda_problem(device: int) -> str: ...
def random_walk_table(beta1: float, smoothing: float) -> list[float]: ...
def measured_walk_table(beta1: float, smoothing: float) -> list[float]: ...
