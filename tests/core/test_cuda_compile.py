"""nvcc compiles the kernels for every architecture without a warning, and ptxas keeps everything in registers.

A spilled register or an array in local memory is traffic that no test of results would notice.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-compile"
UNITS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
# What as many threads of a multiprocessor may have as csrc/cuda/tuning.h asks for: enough of them to keep its share of
# the memory busy. Of the kernels that touch elements; the others do little.
REGISTERS = 65_536
THREADS = 1024
ELEMENT_KERNELS = ("measure_kernel", "update_kernel")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("nvcc")]  # one process compiles for all of them


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel on one architecture; sizes in bytes."""

    name: str
    architecture: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int


def parse_ptxas(log: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`.

    Raises:
        ValueError: a line about an entry function is not followed by what it uses.
    """
    kernels = []
    for part in re.split(r"(?=Compiling entry function)", log)[1:]:
        head = re.match(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?f?'", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        if head is None or memory is None or used is None:
            raise ValueError(f"not understood: {part[:500]}")
        shared = re.search(r"(\d+) bytes smem", used.group(2))
        kernels.append(
            Kernel(
                name=head.group(1),
                architecture=head.group(2),
                stack=int(memory.group(1)),
                spill_stores=int(memory.group(2)),
                spill_loads=int(memory.group(3)),
                registers=int(used.group(1)),
                shared=int(shared.group(1)) if shared else 0,
            )
        )
    return kernels


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        pytest.skip("nvcc is needed to compile the CUDA kernels")
    return nvcc


def compile_unit(nvcc: str, architectures: list[str], unit: Path, folder: Path) -> str:
    """The compiler's output for a unit and all architectures; warnings are errors."""
    command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    command += ["-Xptxas", "-v", *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures)]
    done = subprocess.run(
        [*command, "-c", str(unit), "-o", str(folder / f"{unit.stem}.o")], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{unit.name}:\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """All kernels on all architectures that nvcc knows; from the last run's output if nothing has changed."""
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    architectures = [arch for arch in ARCHITECTURES if f"compute_{arch}\n" in known]
    digest = hashlib.sha256(repr((version, architectures, Path(__file__).read_bytes())).encode())
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cuh", ".cu"):
            digest.update(path.read_bytes())
    log = BUILD / f"ptxas-{digest.hexdigest()[:16]}.log"
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "compiling.lock"):
        if not log.exists():
            for old in (*BUILD.glob("*.o"), *BUILD.glob("ptxas-*.log")):
                old.unlink()
            with ThreadPoolExecutor(2) as pool:
                outputs = list(pool.map(lambda unit: compile_unit(nvcc, architectures, unit, BUILD), UNITS))
            log.write_text("".join(outputs))
    found = parse_ptxas(log.read_text())
    assert {kernel.architecture for kernel in found} == set(architectures)
    return found


def test_compiles_for_every_architecture_without_warnings(kernels: list[Kernel]) -> None:
    names = {kernel.name for kernel in kernels}
    for part in ("measure_kernel", "update_kernel", "reduce_kernel", "adapt_kernel"):
        assert any(part in name for name in names), part
    architectures = {kernel.architecture for kernel in kernels}
    assert len(kernels) == len(names) * len(architectures)


def test_no_kernel_spills_or_uses_local_memory(kernels: list[Kernel]) -> None:
    offenders = [k for k in kernels if k.stack or k.spill_stores or k.spill_loads]
    assert not offenders


def test_registers_leave_room_for_enough_loads_in_flight(kernels: list[Kernel]) -> None:
    on_elements = [k for k in kernels if any(name in k.name for name in ELEMENT_KERNELS)]
    assert on_elements
    assert not [k for k in on_elements if k.registers > REGISTERS // THREADS]


def test_parser_sees_spills_and_stack_frames() -> None:
    log = """
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes cumulative stack size, 84 bytes smem
"""
    assert parse_ptxas(log) == [Kernel("_Z1fv", "90", 24, 8, 12, 64, 84)]
    with pytest.raises(ValueError, match="not understood"):
        parse_ptxas("ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'\n")
