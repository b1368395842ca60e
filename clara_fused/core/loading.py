"""Is there a compiled core, what can it serve, and what to tell the user where it cannot."""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import tensors
from .._version import __version__
from ..distributed.dtensors import local

if TYPE_CHECKING:
    from types import ModuleType


_REINSTALL = (
    "reinstall clara_fused from its sources on a machine with a C++ compiler "
    "(`pip install --force-reinstall --no-deps .`; an editable install: `pip install --no-deps -e .`)"
)
# Next to the package's code wherever that is run from: in the source tree of an editable install as in a wheel.
_DECLARATION = Path(__file__).with_name("_core.pyi")


def interface_stamp() -> str | None:
    """A hash of the core's declaration, which setup.py compiles into it; None in a package without (a frozen one)."""
    return sha256(_DECLARATION.read_bytes()).hexdigest()[:16] if _DECLARATION.is_file() else None


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str]:
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


@lru_cache(maxsize=1)
def core_or_warning() -> Any:
    """The compiled module; None, and once a warning, where there is none."""
    core, problem = load()
    if core is None:
        warnings.warn(f"clara_fused runs on PyTorch operations, which is slower: {problem}", stacklevel=2)
    return core


@cache  # asked for every parameter of a first step under fused=True
def core_status(device: torch.device | str, param_dtype: torch.dtype) -> str | None:
    """Why the compiled core cannot serve parameters of this dtype on this device; None if it can.

    Returns:
        one sentence for the user, with what to do about it.
    """
    core, problem = load()
    if core is None:
        return problem
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the compiled core has no kernels for {device.type} devices; use fused=None or fused=False"
    problem = core.cuda_problem(device.index or 0)
    if not problem and param_dtype == torch.float64:
        return "the CUDA kernels do not serve float64 parameters; use fused=None or fused=False"
    return problem or None


def require(param: Tensor, grad: Tensor, group_index: int, param_index: int) -> None:
    """Check what ``fused=True`` promises.

    Raises:
        RuntimeError: the core cannot step this tensor; says why and what to do.
    """
    problem = _why_not(param, grad)
    if problem is not None:
        where = tensors.describe(group_index, param_index, param)
        raise RuntimeError(f"{where}: fused=True: {problem}; use fused=None or fused=False")


def _why_not(param: Tensor, grad: Tensor) -> str | None:
    """Why the core cannot step this tensor; None if it can, as far as can be told from this tensor alone."""
    problem = core_status(param.device, param.dtype)
    if problem is not None:
        return problem.removesuffix("; use fused=None or fused=False")
    for tensor, role in ((param, "parameters"), (grad, "gradients")):
        if tensors.is_wrapper(tensor):
            what = f"{role} of type {type(tensor).__name__}, which implements PyTorch's operations itself"
            return f"the compiled core does not serve {what}"
        part = local(tensor)
        if not tensors.is_plain(part):
            return f"the compiled core does not serve {role} of a class of their own ({type(part).__name__})"
        if part.is_neg() or part._is_zerotensor():
            return f"the compiled core does not serve {role} whose memory does not hold their values (lazy negatives)"
    dtypes = [tensors.SUPPORTED_DTYPES.index(each.dtype) for each in (param, grad)]
    if not core_or_warning().supports(param.device.type == "cuda", *dtypes):
        return f"the compiled core does not serve a {grad.dtype} gradient for a {param.dtype} parameter"
    part, part_grad = local(param), local(grad)
    if not tensors.is_dense(part):
        return f"the compiled core does not serve parameters with gaps in memory (strides {part.stride()})"
    if not tensors.have_equal_layout(part, part_grad):
        return (
            f"the compiled core does not serve a gradient with another memory layout (strides {part_grad.stride()}) "
            f"than its parameter's (strides {part.stride()})"
        )
    return None


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def describe_installation() -> str:
    """What is installed, which back end each device gets, and why not a better one; for ``python -m clara_fused``."""
    core, problem = load()
    lines = [f"clara_fused {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"]
    if core is None:
        lines.append(f"compiled core: none ({problem})")
    else:
        info = core.build_info()
        sets = ", ".join(info["cpu_instruction_sets"])
        kernels = f"{info['cpu_instruction_set']} kernels (of {sets})"
        lines.append(f"compiled core: {kernels}, threads of {info['cpu_threads']}")
        cuda = info["cuda"].replace(";", ", ")
        lines.append(f"compiled for CUDA: {cuda or 'no'}" + ("" if cuda else f" ({info['why_not_more']})"))
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    for device in devices:
        problems = {dtype: core_status(device, dtype) for dtype in tensors.SUPPORTED_DTYPES}
        for reason in dict.fromkeys(problems.values()):
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in problems if problems[dtype] == reason)
            name = "compiled core" if reason is None else f"PyTorch operations: {reason}"
            lines.append(f"{device} ({dtypes}): {name}")
    return "\n".join(lines)
