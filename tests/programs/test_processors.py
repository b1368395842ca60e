"""The C++ core on other compilers and processors than the usual ones, without Python: tests/cpp/cpu_core.cpp.

clang++ for this processor; g++ for Arm, run in an emulator. Where a compiler or the emulator is missing a test says so.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
ARM = "aarch64-linux-gnu-"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def needs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """setup.py's names: what is tested is compiled as what is shipped."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def build(compiler: str, flags: list[str], kernels: dict[str, list[str]], names: Any, folder: Path) -> Path:
    """The core's own test as a program; `kernels`: instruction sets, and the flags of each."""

    def commands() -> Iterator[list[str]]:
        for source in (*(ROOT / "csrc/cpu").glob("*.cpp"), ROOT / "tests/cpp/cpu_core.cpp"):
            if source.stem != "kernels":
                yield [*flags, str(source), "-o", f"{source.stem}.o"]
                continue
            for name, extra in kernels.items():
                isa = [*names.KERNEL_FLAGS, f"-DCLARA_CPU_ISA={name}", *extra]
                yield [*flags, *isa, str(source), "-o", f"kernels_{name}.o"]

    def compile_one(arguments: list[str]) -> str:
        done = subprocess.run([compiler, "-c", *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "warning" not in done.stderr, done.stderr[-3000:]
        return arguments[-1]

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, commands()))
    program = folder / "cpu_core"
    linked = [compiler, *objects, "-o", str(program), "-ldl", "-lpthread"]
    subprocess.run([*linked, *(["-static"] if compiler.startswith(ARM) else [])], cwd=folder, check=True)
    return program


def check(command: list[str], kernels: str) -> None:
    environment = os.environ | {"CLARA_CPU_ISA": kernels}
    run = subprocess.run([*command, "brief"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "0 failures" in run.stdout


def test_the_core_with_clang(names: Any, tmp_path: Path) -> None:
    needs("clang++")
    program = build("clang++", names.CXX_FLAGS, names.INSTRUCTION_SETS, names, tmp_path)
    for kernels in names.INSTRUCTION_SETS:  # those that this processor lacks run as the baseline
        check([str(program)], kernels)


def test_the_core_for_aarch64(names: Any, tmp_path: Path) -> None:
    """NEON comes from the compiler's vector types: seen in the code, and run."""
    needs(f"{ARM}g++", f"{ARM}objdump", "qemu-aarch64")
    flags = [flag for flag in names.CXX_FLAGS if flag != "-DCLARA_CPU_X86_KERNELS"]
    program = build(f"{ARM}g++", flags, {"baseline": []}, names, tmp_path)
    disassembly = subprocess.run(
        [f"{ARM}objdump", "--disassemble", "--no-show-raw-insn", "kernels_baseline.o"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for instruction in ("fmul", "fmla", "fsqrt", "fdiv"):
        for lanes in ("4s", "2d"):
            assert re.search(rf"\b{instruction}\s+v\d+\.{lanes}", disassembly), f"{instruction} of {lanes}"
    # Roots and quotients are what scalars would cost most: nearly all of them are of whole vectors.
    whole = len(re.findall(r"\bf(?:sqrt|div)\s+v", disassembly))
    single = len(re.findall(r"\bf(?:sqrt|div)\s+[sd]\d", disassembly))
    assert single < whole / 4, f"{single} scalar roots and quotients beside {whole} of vectors"
    check(["qemu-aarch64", str(program)], "baseline")


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_core_compiles_as_on_macos(compiler: str, names: Any) -> None:
    """There is no OpenMP to borrow outside of Linux, and on Arm no x86 kernels; macOS itself is for the pipelines."""
    needs(compiler)
    flags = [flag for flag in names.CXX_FLAGS if flag != "-DCLARA_CPU_X86_KERNELS"]
    flags += ["-U__linux__", "-Werror", "-Wno-unused-function", "-DCLARA_CPU_ISA=baseline", "-fsyntax-only"]
    for source in (ROOT / "csrc/cpu").glob("*.cpp"):
        done = subprocess.run([compiler, *flags, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
