"""The CPU kernels: their C++ test under the sanitizers and for every instruction set, and what Python sees of them.

The formulas are covered by the tests that run every optimizer with ``fused=True``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import VARIANTS, core_available

from clara_fused import core_backend

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
SANITIZERS = {
    "address, undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_cpp_core_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    sources = [
        ROOT / "tests/cpp/cpu_core.cpp",
        *(ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("kernels", "cpu_backend", "dispatch", "team", "workspace")),
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
    assert "0 failures" in run.stdout


pytestmark_core = pytest.mark.skipif(not core_available(), reason="needs the compiled core")

COMPARE = """
import sys
import torch
sys.path.insert(0, "tests")
from helpers import VARIANTS
from clara_fused import core_backend
print(core_backend._core_module().build_info()["cpu_instruction_set"])
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-7}[dtype]
    torch.manual_seed(0)
    values = [torch.randn(n, dtype=dtype) for n in (1, 15, 16, 17, 100, 16385, 40000, 200_000, 300_000)]
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
        torch.testing.assert_close(
            optimizers[0].state[a]["path"], optimizers[1].state[b]["path"], rtol=1e-4, atol=1e-4
        )
"""


@pytestmark_core
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


@pytestmark_core
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
            sizes = (7, 100_000, 400_000, 350_000, 64, 20_000) if few else (70_001,) * 40
            params = [torch.nn.Parameter(torch.randn(n)) for n in sizes]
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


@pytestmark_core
def test_a_gradient_dtype_without_kernels_is_named() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    if not hasattr(param, "grad_dtype"):
        pytest.skip("needs Tensor.grad_dtype (torch 2.10)")
    param.grad_dtype = None
    param.grad = torch.ones(3, dtype=torch.float64)
    optimizer = VARIANTS["Local"]([param], fused=True)
    with pytest.raises(RuntimeError, match=r"param group 0, parameter 0 .* torch.float64 gradient .* torch.float32"):
        optimizer.step()
    assert not optimizer.state
    VARIANTS["Local"]([param]).step()
    assert param[0] < 1


@pytestmark_core
def test_bucket_refuses_what_it_cannot_hold() -> None:
    core = core_backend._core_module()
    f32 = core.DType.float32
    groups = core.GroupTable(1)
    bucket = core.Bucket(
        groups, device=-1, variant=core.Variant.LOCAL, param=f32, grad=f32, path=f32, deferred=False
    )
    assert len(bucket) == 0
    bucket.step(2, 0)
    with pytest.raises(IndexError):
        bucket.add(
            group=1, numel=1, param=0, grad=0, exp_avg=0, exp_avg_sq=0, max_exp_avg_sq=0, path=0, step=0, lr_scale=0
        )
    with pytest.raises(IndexError):
        groups.set_lr(3, 0.1)
