"""The compiled core on the CPU: its C++ test under the sanitizers and for every instruction set, what `gather` finds
regular, and what Python sees of the verbs.

The formulas are covered by the C++ test, and by the tests that run every optimizer with ``fused=True``.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SCALARS, VARIANTS, core_available
from torch import Tensor
from torch.nn import Parameter

from clara_fused import AdamClaraSmoothed
from clara_fused.options import OPTIONS, GroupOptions, OptionReader

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
SANITIZERS = {
    "address, undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_cpp_core_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    sources = [
        ROOT / "tests/cpp/cpu_core.cpp",
        *(ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("kernels", "cpu_backend", "dispatch", "team")),
    ]

    def compile_one(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        command = [compiler, *FLAGS, *SANITIZERS[sanitizer], "-DCLARA_CPU_ISA=baseline", "-c", str(source)]
        subprocess.run([*command, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = str(tmp_path / "cpu_core")
    subprocess.run([compiler, *SANITIZERS[sanitizer], *objects, "-o", program, "-ldl", "-lpthread"], check=True)
    brief = ["brief"] if sanitizer == "thread" else []
    run = subprocess.run([program, *brief], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " 0 failures" in run.stdout


needs_core = pytest.mark.skipif(not core_available(), reason="needs the compiled core")

COMPARE = """
import sys
import torch
sys.path.insert(0, "tests")
from helpers import VARIANTS
from clara_fused.core import _core
print(_core.build_info()["cpu_instruction_set"])
shapes = [(1,), (15,), (16,), (17,), (100,), (16385,), (300, 256), (128, 64, 3, 3), (70, 1024), (200_000,)]
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-7}[dtype]
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    optimizers = [VARIANTS["Smoothed"](ours, fused=True, lr=0.01), VARIANTS["Smoothed"](theirs, fused=False, lr=0.01)]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        path, expected = optimizers[0].state[a]["path"], optimizers[1].state[b]["path"]
        torch.testing.assert_close(path, expected, rtol=1e-4, atol=1e-4)
"""


@needs_core
@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_pytorch(instruction_set: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env={**os.environ, "CLARA_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    if run.stdout.strip() != instruction_set:
        pytest.skip(f"this processor cannot run {instruction_set}")


@needs_core
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_do_not_depend_on_the_number_of_threads(variant: str, few: bool) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            # Large tensors that the threads share; then so many that each thread takes whole ones.
            shapes = [(7,), (100, 1000), (400, 1024), (350, 1024), (64,), (20_000,)] if few else [(70, 1001)] * 40
            params = [Parameter(torch.randn(shape)) for shape in shapes]
            optimizer = VARIANTS[variant](params, fused=True)
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            results.append([*params, *(optimizer.state[p]["lr_scale"] for p in params)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- gather ----------------------------------------------------------------------------------------------------------

State = dict[Tensor, dict[str, Any]]
ENTRIES = (*SCALARS, "exp_avg", "exp_avg_sq", "path")


def core_module() -> Any:
    from clara_fused.core import _core

    return _core


def with_grad(value: Tensor, grad: Tensor | None = None) -> Parameter:
    param = Parameter(value)
    if grad is not None and grad.dtype != value.dtype:
        if not hasattr(param, "grad_dtype"):
            pytest.skip("needs Tensor.grad_dtype")
        param.grad_dtype = None
    param.grad = torch.randn_like(value) if grad is None else grad
    return param


def state_of(param: Tensor, path_shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    state: dict[str, Any] = {name: torch.zeros(()) for name in ENTRIES}
    state["lr_scale"] = torch.ones(())
    for name in ("exp_avg", "exp_avg_sq", "path"):
        state[name] = torch.zeros_like(param.detach(), dtype=dtype)
    if path_shape is not None:
        state["path"] = torch.zeros(path_shape, dtype=dtype)
    return state


def irregular(
    params: list[Parameter], state: State | None = None, scales: list[Tensor] | None = None, **group: Any
) -> list[int]:
    if state is None:
        state = {param: state_of(param) for param in params}
    buckets, others = core_module().gather([{"params": params, "amsgrad": False, **group}], state, scales)
    regular = [location for bucket in buckets for location in bucket.locations]
    assert sorted([*regular, *others]) == [(0, i) for i in range(len(params))]
    return [index for _, index in others]


def step_once(params: list[Parameter], state: State, amsgrad: bool = False, **options: float) -> None:
    core = core_module()
    values = {
        "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "smoothing": 0.05, "damping": 0.5, "clip_low": 0.5,
        "clip_high": 1.05, "scale_low": 1e-8, "scale_high": 1e8, **options,
    }  # fmt: skip
    group = SimpleNamespace(**{name: values.get(name, 0.0) for name in GroupOptions.__dataclass_fields__})
    buckets, others = core.gather([{"params": params, "amsgrad": amsgrad}], state, None)
    assert not others
    for bucket in buckets:
        bucket.set_inputs([group], [0.1], 0, 0)
        bucket.step(2, 0)


@needs_core
@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3, 4), torch.ones(1), torch.ones(()), torch.ones(0, 5), torch.ones(4, 6).t(), torch.ones(2, 1, 3),
        torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.ones(5, dtype=torch.float64),
        torch.ones(5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.float16),
        torch.ones(6, 4).as_strided((1, 4), (9, 1)),
    ],
)  # fmt: skip
def test_dense_tensors_are_regular(value: Tensor) -> None:
    assert irregular([with_grad(value)]) == []


@needs_core
@pytest.mark.parametrize(
    ("value", "path_shape", "fits"),
    [
        (torch.ones(300, 256), (300, 16), True),
        (torch.ones(300, 256), (300, 1), True),
        (torch.ones(300, 256), (300, 24), False),  # 24 of 256 is no power of two
        (torch.ones(300, 256), (300 * 16,), False),
        (torch.ones(256, 300).t(), (300, 16), False),  # dimension 0 is not outermost in memory
        (torch.ones(256, 64, 3, 3), (256, 36), True),
        (torch.ones(256, 64, 3, 3).to(memory_format=torch.channels_last), (256, 36), True),
        (torch.ones(70 * 1024), (70 * 64,), True),
        (torch.ones(70 * 1024), (70, 64), False),
    ],
)
def test_layouts_of_paths(value: Tensor, path_shape: tuple[int, ...], fits: bool) -> None:
    param = with_grad(value)
    assert (irregular([param], {param: state_of(param, path_shape)}) == []) == fits


@needs_core
@pytest.mark.parametrize("name", ENTRIES)
def test_incomplete_state_is_irregular(name: str) -> None:
    param = with_grad(torch.ones(10))
    for wrong in (None, 7, torch.zeros(3), torch.zeros(10, dtype=torch.float16), torch.zeros(10, device="meta")):
        state = state_of(param)
        state[name] = wrong
        assert irregular([param], {param: state}) == [0]
    del state[name]
    assert irregular([param], {param: state}) == [0]
    assert irregular([param], {}) == [0]
    assert irregular([param], {param: 7}) == [0]  # type: ignore[dict-item]


@needs_core
def test_amsgrad_needs_its_maximum() -> None:
    param = with_grad(torch.ones(10))
    state = state_of(param)
    assert irregular([param], {param: state}, amsgrad=True) == [0]
    state["max_exp_avg_sq"] = torch.zeros(10)
    assert irregular([param], {param: state}, amsgrad=True) == []


class Subclass(Tensor):
    pass


@needs_core
@pytest.mark.parametrize(
    "make",
    [
        lambda: with_grad(torch.ones(6, 4), torch.ones(6, 8)[:, ::2]),
        lambda: with_grad(torch.ones(6, 4), torch.ones(4, 6).t()),
        lambda: with_grad(torch.ones(6, 8)[:, ::2]),
        lambda: with_grad(torch.ones(1).expand(5), torch.ones(5)),
        lambda: with_grad(torch.ones(5, dtype=torch.complex64)),
        lambda: with_grad(torch.ones(5, 5), torch.ones(5, 5).to_sparse()),
        lambda: with_grad(torch.ones(5, device="meta"), torch.ones(5, device="meta")),
        lambda: with_grad(torch.ones(5), torch.ones(5).as_subclass(Subclass)),
        lambda: with_grad(torch.ones(5).as_subclass(Subclass), torch.ones(5)),
        lambda: with_grad(torch.ones(5), torch.ones(5, dtype=torch.float64)),
        lambda: with_grad(torch.ones(1), torch.ones(1, dtype=torch.complex64).conj().imag),
        lambda: with_grad(torch.ones(1, dtype=torch.complex64).conj().imag),
    ],
)
def test_odd_tensors_are_irregular(make: Callable[[], Parameter]) -> None:
    plain = with_grad(torch.ones(3))
    odd = make()
    assert irregular([plain, odd]) == [1]
    assert irregular([odd, Parameter(torch.ones(2)), plain][:1]) == [0]


@needs_core
def test_memory_that_parameters_share_is_irregular() -> None:
    buffer = torch.randn(100)
    parts = [with_grad(buffer[i : i + 20]) for i in (0, 10, 20, 60, 80)]
    assert irregular(parts) == [0, 1, 2]
    for param in (with_grad(torch.ones(4)), with_grad(torch.ones(0))):
        assert irregular([param, param]) == [0, 1]


@needs_core
def test_one_scale_is_the_same_tensor_for_all() -> None:
    params = [with_grad(torch.ones(5)) for _ in range(3)]
    state: State = {param: state_of(param) for param in params}
    scales = [state[params[0]]["lr_scale"]]
    for param in params:
        state[param]["lr_scale"] = scales[0]
    assert irregular(params, state, scales) == []
    state[params[1]]["lr_scale"] = torch.ones(())
    assert irregular(params, state, scales) == [1]
    assert irregular(params, state, []) == [0, 1, 2]
    assert irregular(params, state) == []


@needs_core
def test_buckets_are_sorted_and_tell_their_tensors() -> None:
    core = core_module()
    dtypes = (torch.float64, torch.bfloat16, torch.float32, torch.float32)
    params = [with_grad(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    idle = Parameter(torch.ones(3))
    groups = [{"params": [params[0], idle]}, {"params": params[1:]}]
    buckets, _ = core.gather(groups, {param: state_of(param) for param in params}, None)
    assert [bucket.locations for bucket in buckets] == [[(1, 1), (1, 2)], [(1, 0)], [(0, 0)]]
    assert all(bucket.device == "cpu" for bucket in buckets)
    assert all(a is b for a, b in zip(buckets[0].params, params[2:], strict=True))
    assert len(buckets[0]) == 2


@needs_core
def test_gather_works_under_a_torch_function_mode() -> None:
    param = with_grad(torch.ones(3))
    with torch.device("meta"):
        assert irregular([param], {param: state_of(param)}) == [0]  # the state was made there
    state: State = {param: state_of(param)}
    with torch.device("meta"):
        assert irregular([param], state) == []


@needs_core
def test_a_bucket_owns_what_it_points_to() -> None:
    core = core_module()
    param = with_grad(torch.ones(1000))
    state: State = {param: state_of(param)}
    gathered = core.gather([{"params": [param]}], state, None)
    alive = weakref.ref(param.grad), weakref.ref(state[param]["exp_avg"])
    param.grad = None
    state.clear()
    gc.collect()
    assert all(reference() is not None for reference in alive)
    del gathered
    gc.collect()
    assert all(reference() is None for reference in alive)


@needs_core
def test_gather_says_what_it_cannot_walk() -> None:
    gather = core_module().gather
    for groups in ([3], [{}], [{"params": None}], 3):
        with pytest.raises(TypeError):
            gather(groups, {}, None)


@needs_core
def test_state_in_another_order_than_the_parameters() -> None:
    params = [with_grad(torch.full((4,), float(i))) for i in range(40)]
    state: State = {param: state_of(param) for param in reversed(params)}
    step_once(params[::2], state)
    assert [float(state[param]["step"]) for param in params] == [1.0, 0.0] * 20


@needs_core
@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_adaptation_the_core_is_adam(amsgrad: bool) -> None:
    torch.manual_seed(0)
    ours = [with_grad(torch.randn(shape)) for shape in ((3,), (17, 5), (300, 256), (256, 64, 3, 3), ())]
    theirs = [Parameter(param.detach().clone()) for param in ours]
    state: State = {p: state_of(p) for p in ours}
    state[ours[2]] = state_of(ours[2], (300, 16))
    state[ours[3]] = state_of(ours[3], (256, 36))
    adam = torch.optim.Adam(theirs, lr=0.1, weight_decay=0.1, amsgrad=amsgrad)
    for param in ours if amsgrad else []:
        state[param]["max_exp_avg_sq"] = torch.zeros_like(param.detach())
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        step_once(ours, state, amsgrad, weight_decay=0.1)
        adam.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_core
def test_inputs_that_do_not_fit_are_refused() -> None:
    param = Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    (bucket,), _ = core_module().gather([{"params": [param], "amsgrad": False}], {param: state_of(param)}, None)
    group = OptionReader(OPTIONS, False).read([AdamClaraSmoothed([param]).param_groups[0]]).options[0]
    for options, lrs, error in (
        ([], [], ValueError), ([group], [], ValueError), ([object()], [0.1], AttributeError),
        ([group], ["0.1"], RuntimeError),
    ):  # fmt: skip
        with pytest.raises(error):
            bucket.set_inputs(options, lrs, 0, 0)
