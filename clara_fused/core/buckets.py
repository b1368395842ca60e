"""Hands tensors to the compiled core: which ones it can serve, in which buckets, and what is kept between steps.

The core sees addresses and sizes only. Everything it is given here is dense memory in one common layout per parameter;
what is not is copied first (`_Staging`).
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import validation
from ._interface import interface_stamp
from ._version import __version__
from .batches import Location, StepInputs, TensorWork, moved
from .dtensors import local
from .options import GroupOptions, Variant

if TYPE_CHECKING:
    from types import ModuleType

    from . import _core

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Tables of walks kept on a device, one per (beta1, smoothing, whether its steps are measured) in use lately.
_MAX_REFERENCES = 64
_REINSTALL = (
    "reinstall clara_fused from its sources on a machine with a C++ compiler "
    "(`pip install --force-reinstall --no-deps .`; an editable install: `pip install --no-deps -e .`)"
)


# --- is there a core? ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or why there is none."""
    try:
        core = importlib.import_module("._core", __package__)
    except ModuleNotFoundError:
        return None, f"the compiled core is not installed: {_REINSTALL}"
    except ImportError as error:
        return None, f"the compiled core cannot be loaded ({error}): {_REINSTALL}"
    built_for = getattr(core, "version", "unknown")
    if built_for != __version__:
        return None, f"the compiled core is of version {built_for}, clara_fused of {__version__}: {_REINSTALL}"
    if interface_stamp() not in (None, getattr(core, "interface", "unknown")):
        problem = "the compiled core was built from other sources than this clara_fused and has to be rebuilt"
        return None, f"{problem}: {_REINSTALL}"
    return core, ""


def core_status(device: torch.device | str, param_dtype: torch.dtype) -> str | None:
    """Why the compiled core cannot serve parameters of this dtype on this device; None if it can.

    Returns:
        one sentence for the user, with what to do about it.
    """
    core, problem = _load()
    if core is None:
        return problem
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the compiled core has no kernels for {device.type} devices; use fused=None or fused=False there"
    if core.build_info()["cuda"] is None:
        return _no_cuda_kernels
    if param_dtype == torch.float64:
        return "the CUDA kernels do not serve float64 parameters; use fused=None or fused=False for them"
    return _cuda_problem(device.index or 0) or None


_no_cuda_kernels = (
    "the compiled core was built without CUDA; reinstall it where the CUDA toolkit (12.4 or newer) is installed"
)


@cache
def _cuda_problem(index: int) -> str:
    problem: str = _core_module().cuda_problem(index)
    return problem


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether only the tensor's class knows what operations do with it, and where its elements are (quantized, say)."""
    return type(local(tensor)).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _why_not(param: Tensor, grad: Tensor, path_dtype: torch.dtype) -> str | None:
    """Why the core cannot step this tensor; None if it can."""
    problem = core_status(param.device, param.dtype)
    if problem is not None:
        return problem
    for tensor, role in ((param, "parameters"), (grad, "gradients")):
        if _is_wrapper(tensor):
            return (
                f"the compiled core does not serve {role} of type {type(tensor).__name__}, which implements "
                f"PyTorch's operations itself; use fused=None or fused=False"
            )
    core = _core_module()
    codes = _dtype_codes()
    if not core.supports(param.device.type == "cuda", codes[param.dtype], codes[grad.dtype], codes[path_dtype]):
        return (
            f"the compiled core does not serve a {grad.dtype} gradient for a {param.dtype} parameter with a "
            f"{path_dtype} path; use fused=None or fused=False"
        )
    return None


def serves(param: Tensor, grad: Tensor, options: GroupOptions) -> bool:
    """Whether the core can step this tensor. Warns, once, if there ought to be a core and is none."""
    _warn_without_core()
    return _why_not(param, grad, _path_dtype(param, options)) is None


def require(param: Tensor, grad: Tensor, options: GroupOptions, group_index: int, param_index: int) -> None:
    """Check what ``fused=True`` promises.

    Raises:
        RuntimeError: the core cannot step this tensor; says why and what to do.
    """
    problem = _why_not(param, grad, _path_dtype(param, options))
    if problem is not None:
        raise RuntimeError(f"{validation.describe(group_index, param_index, param)}: fused=True: {problem}")


@lru_cache(maxsize=1)
def _warn_without_core() -> None:
    core, problem = _load()
    if core is None:
        warnings.warn(f"clara_fused runs on PyTorch operations, which is slower: {problem}", stacklevel=2)


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def release_workspace() -> int:
    """Free the memory that steps on the CPU share; the next one that needs it allocates it anew.

    Local and Smoothed keep Adam's steps of large tensors there between measure and apply, at most two bytes for each
    element that they optimize. All optimizers of the process share one such block, as large as the largest needed it,
    which goes with the last of them.

    Returns:
        bytes freed; 0 where nothing was allocated, or there is no core, or a step is under way.
    """
    core, _ = _load()
    return 0 if core is None else core.release_workspace()


def _core_module() -> Any:
    return _load()[0]


@lru_cache(maxsize=1)
def _dtype_codes() -> dict[torch.dtype, _core.DType]:
    codes = _core_module().DType
    return {
        torch.float32: codes.float32,
        torch.bfloat16: codes.bfloat16,
        torch.float16: codes.float16,
        torch.float64: codes.float64,
    }


def _path_dtype(param: Tensor, options: GroupOptions) -> torch.dtype:
    return options.path_dtype or (torch.float64 if param.dtype == torch.float64 else torch.float32)


# --- layouts ---------------------------------------------------------------------------------------------------------


def _is_dense(tensor: Tensor) -> bool:
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


def _has_layout(tensor: Tensor, like: Tensor) -> bool:
    """Whether the elements lie in memory in the same order as those of `like`, a dense tensor of equal shape."""
    if tensor.stride() == like.stride() or tensor.numel() <= 1:
        return True
    return all(
        size == 1 or mine == other
        for size, mine, other in zip(like.shape, tensor.stride(), like.stride(), strict=True)
    )


def _is_its_memory(tensor: Tensor) -> bool:
    """Whether the memory holds the values: not their negatives, nor nothing at all (forward-mode autograd's zeros)."""
    return not (tensor.is_neg() or tensor._is_zerotensor())


@dataclass(slots=True)
class _Staging:
    """Copies in the core's layout of what the user holds in another one."""

    param: tuple[Tensor, Tensor] | None = None  # the user's, the copy
    grad: Tensor | None = None

    @property
    def needed(self) -> bool:
        return self.param is not None or self.grad is not None


# --- a bucket --------------------------------------------------------------------------------------------------------


class CoreBatch:
    """Tensors, of any groups, that share device, dtypes and `deferred`; implements `batches.Batch`."""

    def __init__(self, works: Sequence[TensorWork], options: Sequence[GroupOptions], groups: _Groups, variant: Variant):
        self.works: Sequence[TensorWork] = works
        self.locations: Sequence[Location] = [work.location for work in works]
        self._groups = groups
        first = works[0]
        self._device = first.param.device
        self._is_cuda = self._device.type == "cuda"
        codes = _dtype_codes()
        self._bucket: _core.Bucket = _core_module().Bucket(
            groups.table,
            device=self._device.index if self._is_cuda else -1,
            variant=getattr(_core_module().Variant, variant.name),
            param=codes[first.param.dtype],
            grad=codes[first.grad.dtype],
            path=codes[first.state["path"].dtype],
            deferred=options[first.group_index].deferred,
        )
        self._deferred = options[first.group_index].deferred
        # Whether `step` does all of it; else measure, adapt, apply, with sums from elsewhere in between.
        self.adapts_alone = False
        self._staged: list[_Staging] = []
        self._sums: Tensor | None = None
        # Whether a CUDA graph has captured a launch. Its replays go on using this batch's memory.
        self.captured = False
        self._keep: tuple[Tensor | None, ...] = ()
        for work in works:
            self._add(work, options[work.group_index].amsgrad)
        self._memory = _DeviceMemory(self._bucket, self._device) if self._is_cuda else None

    @property
    def stages(self) -> bool:
        """Whether the core works on copies of some of the tensors."""
        return bool(self._staged)

    def _add(self, work: TensorWork, amsgrad: bool) -> None:
        staging = _Staging()
        param = work.param.detach()
        if not _is_dense(param):
            # empty_like of a tensor with gaps is dense.
            staging.param = (param, torch.empty_like(param).copy_(param))
            param = staging.param[1]
        grad = work.grad.detach()
        if not _has_layout(grad, param) or not _is_its_memory(grad):
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            staging.grad = grad
        if staging.needed:
            self._staged.append(staging)
        names = (*_MOMENTS, "path", *(("max_exp_avg_sq",) if amsgrad else ()))
        for name in names:
            value = work.state[name]
            if not _has_layout(value, param):
                work.state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
        self._bucket.add(
            group=work.group_index,
            numel=param.numel(),
            param=param.data_ptr(),
            grad=grad.data_ptr(),
            exp_avg=work.state["exp_avg"].data_ptr(),
            exp_avg_sq=work.state["exp_avg_sq"].data_ptr(),
            max_exp_avg_sq=work.state["max_exp_avg_sq"].data_ptr() if amsgrad else 0,
            path=work.state["path"].data_ptr(),
            step=work.state["step"].data_ptr(),
            lr_scale=work.state["lr_scale"].data_ptr(),
        )

    def watched_by(self, watch: _core.TensorWatch) -> None:
        """Let the watch leave the addresses of fresh gradients in this bucket."""
        for row, work in enumerate(self.works):
            watch.route(work.group_index, work.param_index, self._bucket, row)

    def prepare(self, inputs: StepInputs) -> None:
        """Take over what a step reads beside the tensors; once per step, before anything else."""
        self._groups.update(inputs)
        grad_scale, found_inf = self._scalar(inputs.grad_scale), self._scalar(inputs.found_inf)
        self._keep = (grad_scale, found_inf)
        self._bucket.set_amp(
            0 if grad_scale is None else grad_scale.data_ptr(), 0 if found_inf is None else found_inf.data_ptr()
        )

    def _scalar(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else moved(value, self._device).to(torch.float32)

    def _launch(self) -> tuple[int, int]:
        """Number of threads, and CUDA stream, that the next operation is to use."""
        if self._memory is not None:
            if torch.cuda.is_current_stream_capturing():
                # torch.cuda.graph has waited for the device, so all that was sent has arrived.
                self.captured = True
            else:
                self._groups.uploads.reach_current_stream()
                self._memory.uploads.reach_current_stream()
            return 0, torch._C._cuda_getCurrentRawStream(self._device.index)
        return torch.get_num_threads(), 0

    def step(self) -> None:
        """measure, adapt and apply in one go; under AdamClaraGlobal only if this is the only batch."""
        self._bucket.step(*self._launch())
        self._write_back()

    def measure(self) -> Tensor:
        """See `batches.Batch.measure`."""
        if self._sums is None:
            self._sums = torch.zeros(len(self._bucket), 2, dtype=torch.float64, device=self._device)
            if self._memory is not None:
                self._memory.uploads.keep(self._sums)
        self._bucket.measure(self._sums.data_ptr(), *self._launch())
        if self._deferred:
            self._write_back()
        return self._sums

    def adapt(self, sums: Tensor | None) -> None:
        """See `batches.Batch.adapt`."""
        if sums is not None:
            sums = moved(sums, self._device).contiguous()
        self._bucket.adapt(0 if sums is None else sums.data_ptr(), *self._launch())

    def apply(self) -> None:
        """See `batches.Batch.apply`."""
        if not self._deferred:
            self._bucket.apply(*self._launch())
            self._write_back()

    def _write_back(self) -> None:
        for staging in self._staged:
            if staging.param is not None:
                original, copy = staging.param
                original.copy_(copy)


class _Uploads:
    """Host data on its way to a device: never waited for by the host, but by every stream that is to read it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._alive: deque[Tensor] = deque(maxlen=2 * _MAX_REFERENCES)
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    def send(self, pinned: Tensor, target: Tensor) -> None:
        """Copy `pinned` over the start of `target` in the background."""
        self._stream = torch.cuda.current_stream(self._device)
        target[: len(pinned)].copy_(pinned, non_blocking=True)
        self._event = self._stream.record_event()
        self.keep(pinned)
        self.keep(target)

    def keep(self, tensor: Tensor) -> None:
        """Keep a tensor alive, and its memory from being reused while another stream may still read it."""
        self._alive.append(tensor)

    def reach_current_stream(self) -> None:
        """Make the current stream wait for what was sent on another one."""
        if self._event is None:
            return
        current = torch.cuda.current_stream(self._device)
        if current != self._stream:
            current.wait_event(self._event)
            for tensor in self._alive:
                if tensor.is_cuda:
                    tensor.record_stream(current)


class _DeviceMemory:
    """What a bucket's kernels need on the device beside the tensors: a table of them, and scratch memory."""

    def __init__(self, bucket: _core.Bucket, device: torch.device) -> None:
        size, table_size = bucket.memory_sizes()
        table = torch.empty(table_size, dtype=torch.uint8, pin_memory=True)
        bucket.write_table(table.data_ptr())
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.uploads = _Uploads(device)
        self.uploads.send(table, memory)
        bucket.set_memory(memory.data_ptr())


class _Groups:
    """The options of all param groups, as the core keeps them for one device."""

    def __init__(self, device: torch.device, group_count: int) -> None:
        self.table: _core.GroupTable = _core_module().GroupTable(group_count)
        self._device = device
        self._options: list[GroupOptions | None] = [None] * group_count
        self._lrs: list[float | Tensor] = []
        self.uploads = _Uploads(device)
        self._references: dict[tuple[float, float, bool], Tensor] = {}

    def update(self, inputs: StepInputs) -> None:
        self._lrs = [self._on_device(lr) if isinstance(lr, Tensor) else lr for lr in inputs.lrs]
        for group, (options, lr) in enumerate(zip(inputs.options, self._lrs, strict=True)):
            if options is not self._options[group]:
                self._set(group, options)
            if isinstance(lr, Tensor):
                self.table.set_lr_tensor(group, lr.data_ptr(), lr.dtype == torch.float64)
            else:
                self.table.set_lr(group, lr)

    def _on_device(self, lr: Tensor) -> Tensor | float:
        if lr.device.type == "cpu" and self._device.type != "cpu":
            return float(lr)  # as a kernel argument
        lr = moved(lr, self._device)
        return lr if lr.dtype in (torch.float32, torch.float64) else lr.to(torch.float64)

    def _set(self, group: int, options: GroupOptions) -> None:
        self._options[group] = options
        self.table.set(
            group,
            beta1=options.beta1,
            beta2=options.beta2,
            eps=options.eps,
            weight_decay=options.weight_decay,
            maximize=options.maximize,
            decoupled_weight_decay=options.decoupled_weight_decay,
            smoothing=options.smoothing,
            damping=options.damping,
            reference=options.fixed_reference,
            measured_walk=options.measured_walk,
            clip_low=options.clip[0],
            clip_high=options.clip[1],
            accumulate=options.accumulate,
            scale_low=options.scale_bounds[0],
            scale_high=options.scale_bounds[1],
            adapt_lr=options.adapt_lr,
            lr_smoothing=options.lr_smoothing,
        )
        if self._device.type == "cuda" and options.fixed_reference is None:
            self.table.set_reference_address(group, self._reference(options).data_ptr())

    def _reference(self, options: GroupOptions) -> Tensor:
        """The table of the group's walk on the device."""
        key = (options.beta1, options.smoothing, options.measured_walk)
        if key not in self._references:
            core = _core_module()
            tabulate = core.measured_walk_table if options.measured_walk else core.random_walk_table
            values = torch.tensor(tabulate(options.beta1, options.smoothing), dtype=torch.float64).pin_memory()
            reference = torch.empty(len(values), dtype=torch.float64, device=self._device)
            self.uploads.send(values, reference)
            if len(self._references) >= _MAX_REFERENCES:
                # A schedule of betas: the oldest is long out of use, and freed in the order of the stream.
                self._references.pop(next(iter(self._references)))
            self._references[key] = reference
        return self._references[key]


def batches_of(works: Sequence[TensorWork], inputs: StepInputs, variant: Variant) -> list[CoreBatch]:
    """Sort tensors that the core `serves` into as few batches as their devices and dtypes allow."""
    groups: dict[torch.device, _Groups] = {}
    sorted_works: dict[tuple[object, ...], list[TensorWork]] = {}
    for work in works:
        key = (
            work.param.device,
            work.param.dtype,
            work.grad.dtype,
            work.state["path"].dtype,
            inputs.options[work.group_index].deferred,
        )
        sorted_works.setdefault(key, []).append(work)
    batches = []
    for batch_works in sorted_works.values():
        device = batch_works[0].param.device
        if device not in groups:
            groups[device] = _Groups(device, len(inputs.options))
        batches.append(CoreBatch(batch_works, inputs.options, groups[device], variant))
    for batch in batches:
        batch.prepare(inputs)
    return batches


# --- what is kept between steps --------------------------------------------------------------------------------------


def _structure(options: Sequence[GroupOptions]) -> list[tuple[object, ...]]:
    """What decides which tensors a batch holds, beside the tensors."""
    return [(o.deferred, o.amsgrad, o.path_dtype) for o in options]


class Plan:
    """The batches of a step, kept for the next one as long as no tensor but gradients is replaced or changed.

    Guarded by a `_core.TensorWatch`, which compares every tensor at every step.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
        batches: Sequence[CoreBatch],
        inputs: StepInputs,
    ) -> None:
        self.batches = batches
        self._options = inputs.options
        self._structure = _structure(inputs.options)
        self._watch: _core.TensorWatch = _core_module().TensorWatch(
            param_groups, state, use_exchange_api=os.environ.get("CLARA_TENSOR_WATCH") != "attributes"
        )
        for batch in batches:
            batch.watched_by(self._watch)
            # The watch finds every tensor anew at each step. To hold on to them would keep gradients and state alive
            # that the user has dropped.
            batch.works = ()

    def prepare(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any], inputs: StepInputs) -> bool:
        """Whether the batches still stand for what is in the groups and the state; if so, ready them for the step."""
        if inputs.options is not self._options:
            if _structure(inputs.options) != self._structure:
                return False
            self._options = inputs.options
        if not self._watch.unchanged(param_groups, state):
            return False
        for batch in self.batches:
            batch.prepare(inputs)
        return True

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has captured a step of these batches."""
        return any(batch.captured for batch in self.batches)

    def params_with_grad(self, param_groups: list[dict[str, Any]]) -> list[Tensor]:
        """The parameters that take part in the step, right after `prepare` has said yes."""
        return self._watch.params_with_grad(param_groups)


def plan_of(
    param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any], batches: Sequence[object], inputs: StepInputs
) -> Plan | None:
    """A plan for further steps like the one just taken, if the core does all of it on the tensors themselves.

    None also if something that took no part in the step cannot be watched, such as state that the user has put there.
    """
    core_batches = [batch for batch in batches if isinstance(batch, CoreBatch) and not batch.stages]
    if not batches or len(core_batches) != len(batches):
        return None
    try:
        return Plan(param_groups, state, core_batches, inputs)
    except ValueError:
        return None


def describe_installation() -> str:
    """What is installed, which back end each device gets, and why not a better one; for ``python -m clara_fused``."""
    core, problem = _load()
    lines = [f"clara_fused {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"]
    if core is None:
        lines.append(f"compiled core: none ({problem})")
    else:
        info = core.build_info()
        sets = ", ".join(info["cpu_instruction_sets"])
        kernels = f"{info['cpu_instruction_set']} kernels (of {sets})"
        lines.append(f"compiled core: {kernels}, threads of {info['cpu_threads']}")
        cuda = info["cuda"]
        lines.append(
            "compiled for CUDA: no"
            if cuda is None
            else f"compiled for CUDA: {cuda['toolkit']}, architectures {cuda['architectures'].replace(';', ', ')}"
        )
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    for device in devices:
        problems = {dtype: core_status(device, dtype) for dtype in validation.SUPPORTED_DTYPES}
        for reason in dict.fromkeys(problems.values()):
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in problems if problems[dtype] == reason)
            name = "compiled core" if reason is None else f"PyTorch operations: {reason}"
            lines.append(f"{device} ({dtypes}): {name}")
    return "\n".join(lines)
