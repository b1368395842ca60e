"""The CUDA kernels without a GPU: the sources that nvcc compiles, compiled by g++ against tests/emulation and run.

tests/emulation/conformance.cpp checks every step against formulas of its own; here it is built under AddressSanitizer
and UndefinedBehaviorSanitizer, and under ThreadSanitizer. That the checks can fail is shown by planting faults in a
copy of the kernels.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation"
UNITS = ("float32.cu", "bfloat16.cu", "float16.cu", "cuda_backend.cu")
PROGRAM = "conformance.cpp"
COMPILE = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}

pytestmark = pytest.mark.timeout(900)  # the first test of a sanitizer compiles

# What ThreadSanitizer, ten times slower, is given: every kernel, and every kind of access. None of its findings could
# depend on the options that the other tests vary.
UNDER_THREAD_SANITIZER = [
    "borders/float32-float32/",
    "borders/bfloat16-bfloat16/",
    "borders/float16-float32/",
    "modes/float32-float32/smoothed/",
    "infinite gradients",
    "verbs one by one",
    "errors name",
]


@dataclass(frozen=True)
class Fault:
    """A mistake to plant: in csrc/cuda/`file`, `correct` becomes `wrong`."""

    sanitizer: str
    file: str
    correct: str
    wrong: str
    tests: str
    symptom: str


FAULTS = {
    "off by one": Fault(
        "address",
        "element_kernels.cuh",
        "first + kVector <= count; first += kStride) visit(Turn<Access::kAligned>",
        "first + kVector <= count + 1; first += kStride) visit(Turn<Access::kAligned>",
        "borders/float32-float32/local/aligned",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "bias correction of the step before": Fault(
        "address",
        "element_kernels.cuh",
        "*record.step + 1.0f, arguments.grad_scale",
        "*record.step + 0.0f, arguments.grad_scale",
        "modes/float32-float32/local/plain",
        "FAILED modes/float32-float32/local/plain",
    ),
    "a sample that lies elsewhere": Fault(
        "address",
        "element_kernels.cuh",
        "(path_element >> log_kept) * ((1 << log_run) - (1 << log_kept))",
        "(path_element >> log_kept) * ((1 << log_run) - (2 << log_kept))",
        "modes/float32-float32/local/plain",
        "FAILED modes/float32-float32/local/plain",
    ),
    "a stream that is read for nothing": Fault(
        "address",
        "element_kernels.cuh",
        "if (with_param) e.param",
        "if (with_param || true) e.param",
        "moves no byte twice",
        "FAILED moves no byte twice",
    ),
    "no barrier before reading what other warps have written": Fault(
        "thread",
        "block.cuh",
        "of_warp[column][threadIdx.x / kWarpSize] = value;\n  }\n  __syncthreads();",
        "of_warp[column][threadIdx.x / kWarpSize] = value;\n  }",
        "modes/float32-float32/local/plain",
        "ThreadSanitizer: data race",
    ),
    "no barrier after computing the coefficients": Fault(
        "thread",
        "element_kernels.cuh",
        "arguments.grad_scale, *record.lr_scale);\n  }\n  __syncthreads();",
        "arguments.grad_scale, *record.lr_scale);\n  }",
        "modes/float32-float32/local/plain",
        "ThreadSanitizer: ",  # a race, or an address that is not there yet
    ),
    "blocks that count without an atomic": Fault(
        "thread",
        "scalar_kernels.cuh",
        "atomicAdd(arrivals, 1u)",
        "(*arrivals)++",
        "modes/float32-float32/global/plain",
        "ThreadSanitizer: data race",
    ),
    "a barrier that half of the block skips": Fault(
        "address",
        "block.cuh",
        "= value;\n  }\n  __syncthreads();",
        "= value;\n  }\n  if (threadIdx.x < kThreads / 2) __syncthreads();",
        "modes/float32-float32/local/plain",
        "emulation: threads of a block wait at a barrier",
    ),
}


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        pytest.skip("g++ is needed to compile the kernels for the host")
    return found


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=840, **options)  # type: ignore[call-overload]


def compile_all(folder: Path, sources: list[Path], flags: list[str]) -> list[Path]:
    """Compile `sources` into `folder`, two at a time."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        include = folder / "tests" / "emulation" / "include"
        command = [compiler(), *COMPILE, *flags, f"-I{include}", "-x", "c++", "-c", str(source), "-o", str(target)]
        done = run(command)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def copy_sources(folder: Path) -> None:
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, folder / part, dirs_exist_ok=True)


def link(folder: Path, objects: list[Path], flags: list[str]) -> Path:
    program = folder / "conformance"
    done = run([compiler(), *flags, *map(str, objects), "-pthread", "-o", str(program)])
    assert done.returncode == 0, done.stderr
    return program


@cache
def fingerprint() -> str:
    """Changes with everything that the built programs depend on."""
    digest = hashlib.sha256(repr((COMPILE, SANITIZERS)).encode())
    digest.update(run([compiler(), "--version"]).stdout.encode())
    for part in ("csrc", "tests/emulation"):
        for path in sorted((ROOT / part).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def built(sanitizer: str) -> Path:
    """The conformance program under a sanitizer, built unless there is one of the same sources.

    Tests in other processes that need it meanwhile wait for it.
    """
    folder = BUILD / f"{sanitizer}-{fingerprint()}"
    program = folder / "conformance"
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / f"{sanitizer}.lock"):
        if not program.exists():
            for old in BUILD.glob(f"{sanitizer}-*"):
                shutil.rmtree(old)
            copy_sources(folder)
            sources = [folder / "tests/emulation" / PROGRAM, *(folder / "csrc/cuda" / unit for unit in UNITS)]
            link(folder, compile_all(folder, sources, SANITIZERS[sanitizer]), SANITIZERS[sanitizer])
    return program


def conformance(program: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    # Leaks are of no interest here, and looking for them needs rights that containers may not give.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = run([str(program), *tests], env=environment)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        # Old ThreadSanitizers cannot live with much address space randomization.
        done = run(["setarch", "-R", str(program), *tests], env=environment)
    return done


def require_passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:4000]}"
    print(done.stdout)


@pytest.mark.parametrize("tests", [["modes/"], ["borders/"], [" "]], ids=["modes", "borders", "special"])
def test_kernels_under_address_and_undefined_behavior_sanitizers(tests: list[str]) -> None:
    require_passed(conformance(built("address"), *tests))


def test_kernels_under_thread_sanitizer() -> None:
    require_passed(conformance(built("thread"), *UNDER_THREAD_SANITIZER))


@pytest.mark.parametrize("name", list(FAULTS))
def test_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    flags = SANITIZERS[fault.sanitizer]
    clean = built(fault.sanitizer)
    require_passed(conformance(clean, fault.tests))

    copy_sources(tmp_path)
    header = tmp_path / "csrc/cuda" / fault.file
    text = header.read_text()
    assert text.count(fault.correct) == 1
    header.write_text(text.replace(fault.correct, fault.wrong))
    # The tests that are to fail use float32 alone; the rest is as it was.
    faulty_units = ["float32.cu", "cuda_backend.cu"]
    faulty = compile_all(tmp_path, [tmp_path / "csrc/cuda" / unit for unit in faulty_units], flags)
    others = [clean.parent / "conformance.o", clean.parent / "bfloat16.o", clean.parent / "float16.o"]
    done = conformance(link(tmp_path, [*faulty, *others], flags), fault.tests)
    assert done.returncode != 0
    assert fault.symptom in done.stdout + done.stderr
