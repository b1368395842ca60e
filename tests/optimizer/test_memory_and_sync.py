"""The PyTorch back end's temporary memory, and that no step waits for a device."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import VARIANTS, all_params, core_available, parameters, set_gradients, train
from torch.utils._python_dispatch import TorchDispatchMode

# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads change no allocation, and wait for each other where the machine is busy."""
    torch.set_num_threads(1)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` had allocated at once, from the allocator's own record (temporaries inside of operators
    included)."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_the_measurement_sees_temporaries() -> None:
    x = torch.ones(1_000_000)
    assert 8_000_000 <= peak_bytes(lambda: (x + 1) * (x + 2)) <= 12_100_000
    assert peak_bytes(lambda: x.add_(1)) < 10_000


def big_parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """One large tensor and many of all sizes: 12 MB in float32, where a block of the back end has 1 MiB."""
    return parameters([(1500, 2000), (1,), (256, 512), (3, 0), *[(100, 31)] * 20, (5,)], dtype)


# Scalars: some tens of bytes per tensor for step counts, factors, bias corrections and sums.
PER_TENSOR = 2048

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {"weight_decay": 0.1, "maximize": True, "amsgrad": True},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "path of all elements": {"path_fraction": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_at_most_one_copy_of_the_parameters(dtype: torch.dtype, options: str, variant: str) -> None:
    params = big_parameters(dtype)
    optimizer = VARIANTS[variant](params, fused=False, **OPTIONS[options])
    train(optimizer, 1)
    one_copy = sum(p.numel() * max(4, p.element_size()) for p in params)
    assert peak_bytes(optimizer.step) <= one_copy + PER_TENSOR * len(params)


def test_the_largest_bucket_counts(variant: str) -> None:
    """Several dtypes are worked on one after the other."""
    params = [*parameters([(1500, 1000)], torch.float32), *parameters([(1500, 1000)], torch.float64)]
    optimizer = VARIANTS[variant](params, fused=False)
    train(optimizer, 1)
    assert peak_bytes(optimizer.step) <= 1_500_000 * 8 + 100_000


def test_amp_needs_no_more(variant: str) -> None:
    params = big_parameters(torch.float32)
    optimizer = VARIANTS[variant](params, fused=False)
    train(optimizer, 1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    one_copy = sum(p.numel() * 4 for p in params)
    assert peak_bytes(optimizer.step) <= one_copy + PER_TENSOR * len(params)


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
def test_the_core_needs_no_memory(variant: str) -> None:
    """Steady state: no allocation that grows with the parameters."""
    params = big_parameters(torch.float32)
    optimizer = VARIANTS[variant](params, fused=True)
    train(optimizer, 3)
    assert peak_bytes(optimizer.step) <= PER_TENSOR * len(params)


class _MallocStatistics(ctypes.Structure):
    """glibc's struct mallinfo2; of its fields only the bytes in use have a name here."""

    _fields_ = [("before", ctypes.c_size_t * 7), ("bytes_in_use", ctypes.c_size_t), ("after", ctypes.c_size_t * 2)]


@pytest.mark.slow
def test_a_schedule_of_betas_leaves_nothing_behind(variant: str, fused: bool) -> None:
    """OneCycleLR brings new betas at every step of a run."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("reads what malloc has handed out from glibc (2.33 or newer)")
    mallinfo.restype = _MallocStatistics
    optimizer = VARIANTS[variant](parameters(), fused=fused)
    set_gradients(all_params(optimizer), 0)

    def run(steps: int, first_beta1: float) -> int:
        for step in range(steps):
            optimizer.param_groups[0]["betas"] = (first_beta1 + 1e-6 * step, 0.999)
            optimizer.step()
        gc.collect()
        return int(mallinfo().bytes_in_use)

    before = run(200, 0.899)
    assert run(1000, 0.9) - before < 1000 * 20


# ---------------------------------------------------------------------------------------------------------------------
# Host synchronization

WAITS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique2",
    "aten::allclose",
}


class NoWaiting(TorchDispatchMode):
    """Raises where a step on a GPU would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_mode_catches_waiting() -> None:
    with NoWaiting():
        for wait in (lambda x: x.item(), bool, float, lambda x: x.nonzero(), lambda x: torch.equal(x, x)):
            with pytest.raises(AssertionError, match="waits"):
                wait(torch.ones(()))


def test_no_step_reads_a_tensor(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prodigy's .item() per parameter cost half of its step. First step, steady state, new gradients, AMP, tensor lr,
    joining parameters, telemetry."""
    params = [*parameters(), *parameters([(64, 1024), (7,), ()], torch.bfloat16)]
    optimizer = VARIANTS[variant](
        [{"params": params[:4], "lr": torch.tensor(0.02)}, {"params": params[4:], "lr": 0.1}],
        fused=False,
        amsgrad=True,
        weight_decay=0.1,
    )
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits for the device")
        )
    for step in range(6):
        set_gradients(params, step)
        if step < 2:
            params[1].grad = None
        if step >= 3:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(step == 4))
        with NoWaiting():
            optimizer.step()
            optimizer.lr_scales()
            optimizer.effective_lrs()
            optimizer.zero_grad()


@pytest.mark.parametrize("lr_device", [None, "cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_without_values(variant: str, dtype: torch.dtype, lr_device: str | None) -> None:
    """Meta tensors have no values: whatever reads one raises, and so does what mixes them with tensors of the host."""
    shapes = [(5, 3), (), (0,), (64, 1024)]
    params = [torch.nn.Parameter(torch.randn(shape, device="meta", dtype=dtype)) for shape in shapes]
    lr = 0.1 if lr_device is None else torch.tensor(0.1, device=lr_device)
    optimizer = VARIANTS[variant](params, fused=False, lr=lr, amsgrad=True, weight_decay=0.1)
    for step in range(4):
        for param in params[step % 2 :]:
            param.grad = torch.ones_like(param)
        if step >= 2:
            optimizer.grad_scale = torch.tensor(2.0, device="meta")
            optimizer.found_inf = torch.tensor(0.0, device="meta")
        optimizer.step()
    assert all(t.is_meta for t in (*optimizer.lr_scales(), *optimizer.effective_lrs()))
    assert all(value.is_meta for state in optimizer.state.values() for value in state.values())
