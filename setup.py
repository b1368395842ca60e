"""Builds the compiled core (csrc/) with ninja: the most that this machine can build and use, or what is asked for.

CLARA_BUILD       python: no core; cpu: the CPU kernels; cuda: those and the CUDA kernels. It is an error if what is
                  asked for cannot be built.
CLARA_CUDA_ARCHS  native: for the GPUs of this machine; all: for every GPU served, as in wheels; or a list such as
                  "80;90". Not set: native. Where there is no GPU, all with CLARA_BUILD=cuda, else the CPU core alone.
CUDA_HOME         the CUDA toolkit. Not set: the one of the nvcc on the path.
CXX               the C++ compiler. Not set: the first of g++, c++ and clang++ that works.
NINJAFLAGS        goes to ninja, such as -j1 where memory is short.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
DECLARATION = next(ROOT.glob("clara_fused/**/_core.pyi"))  # the module goes beside it

CUDA_ARCHS = ("75", "80", "86", "89", "90", "100", "120")  # what CLARA_CUDA_ARCHS=all stands for, where nvcc knows it
MIN_CUDA = (12, 4)
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-DNDEBUG"]
CXX_FLAGS += ["-DCLARA_CPU_X86_KERNELS"] if IS_X86 else []
# errno and floating-point traps are observed by nobody here, and forbid vector square roots and selections.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# csrc/cpu/kernels.cpp is compiled once for each of these; the core chooses at run time.
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if IS_X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [*INSTRUCTION_SETS["avx2"], *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq"))]


class CannotBuild(Exception):
    """A reason, in one sentence for the user, why a part of the core cannot be built here."""


# --- what this machine has -------------------------------------------------------------------------------------------


def check_build_tools() -> None:
    for tool in ("ninja", "pybind11"):
        if importlib.util.find_spec(tool) is None:
            raise CannotBuild(f"{tool} is missing: pip install {tool}")


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, candidates):
        try:
            check = [*command, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
            subprocess.run(check, input=b"#include <vector>\n", capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return command
    raise CannotBuild(f"no C++17 compiler works (tried {', '.join(candidates)}): install g++, or set CXX")


@dataclass
class Cuda:
    """A CUDA toolkit. nvcc may be a wrapper that lies elsewhere; as it knows its libraries, it links as well."""

    nvcc: list[str]
    version: str
    archs: list[str]


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def find_cuda(compiler: list[str], required: bool) -> Cuda:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on the path"
        raise CannotBuild(f"no nvcc {where}: install the CUDA toolkit (12.4 or newer), or set CUDA_HOME")
    release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if release is None:
        raise CannotBuild(f"{nvcc} --version does not name a release: set CUDA_HOME")
    version = ".".join(release.groups())
    if tuple(map(int, release.groups())) < MIN_CUDA:
        raise CannotBuild(f"{nvcc} is of CUDA {version}, which is too old: 12.4 or newer is needed")
    # One word, without a launcher before it (ccache g++) or flags behind it.
    host = list(takewhile(lambda word: not word.startswith("-"), compiler))[-1]
    return Cuda([nvcc, "-ccbin", host], version, find_archs(nvcc, gpus_of_this_machine(nvcc, host), required))


def gpus_of_this_machine(nvcc: str, compiler: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "probe")
        answer = output_of(nvcc, "-std=c++17", "-ccbin", compiler, str(SOURCES / "probe.cu"), "-o", str(program))
        if not program.is_file():
            message = next((line for line in answer.splitlines() if "error" in line), "no message")
            raise CannotBuild(f"{nvcc} with {compiler} cannot compile a small program: {message.strip()}")
        return re.findall(r"sm_(\d+)", output_of(str(program)))


def find_archs(nvcc: str, gpus: list[str], required: bool) -> list[str]:
    known = sorted(re.findall(r"compute_(\d+)$", output_of(nvcc, "--list-gpu-arch"), re.MULTILINE), key=int)
    wanted = os.environ.get("CLARA_CUDA_ARCHS") or ("all" if required and not gpus else "native")
    if wanted == "native" and not gpus:
        raise CannotBuild("no GPU answers here; CLARA_CUDA_ARCHS=all compiles for those of other machines")
    if wanted == "native":  # a GPU newer than the toolkit runs what its driver makes of the newest code
        archs = {gpu if gpu in known else known[-1] for gpu in gpus}
    elif wanted == "all":
        archs = set(CUDA_ARCHS).intersection(known)
    else:
        archs = set(re.split(r"[;,\s]+", wanted.replace(".", "").strip()))
    if unknown := archs.difference(known):
        problem = f"{nvcc} does not know {', '.join(sorted(unknown))}; it knows {', '.join(known)}"
        raise SystemExit(f"CLARA_CUDA_ARCHS={wanted}: {problem}")
    return sorted(archs, key=int)


# --- what is built ---------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    kind: str  # "python", "cpu" or "cuda"
    why_not_more: str
    compiler: list[str] = field(default_factory=list)
    cuda: Cuda | None = None

    def __str__(self) -> str:
        if self.kind == "python":
            return f"pure Python, without the compiled core ({self.why_not_more})"
        if self.cuda is None:
            return f"the compiled core for the CPU, not for CUDA ({self.why_not_more})"
        return f"the compiled core for the CPU and CUDA {self.cuda.version} (sm_{', sm_'.join(self.cuda.archs)})"


def make_plan() -> Plan:
    wanted = os.environ.get("CLARA_BUILD", "")
    if wanted not in ("", "python", "cpu", "cuda"):
        raise SystemExit(f"CLARA_BUILD={wanted}: expected one of python, cpu, cuda")
    plan = Plan("python", f"CLARA_BUILD={wanted}")
    try:
        if wanted != "python":
            check_build_tools()
            plan.compiler, plan.kind = find_compiler(), "cpu"
        if wanted in ("", "cuda"):
            plan.cuda, plan.kind = find_cuda(plan.compiler, required=wanted == "cuda"), "cuda"
    except CannotBuild as reason:
        if wanted:
            raise SystemExit(f"CLARA_BUILD={wanted}: {reason}") from None
        plan.why_not_more = str(reason)
    return plan


def compilations(plan: Plan, version: str) -> Iterator[tuple[str, Path, list[str]]]:
    """For every object its name, its source and the command that compiles it."""
    import pybind11

    cxx, cuda = [*plan.compiler, *CXX_FLAGS], plan.cuda or Cuda("", "", [])
    facts = {"VERSION": version, "CUDA_TOOLKIT": cuda.version, "CUDA_ARCHITECTURES": ";".join(cuda.archs)}
    facts["WHY_NOT_MORE"] = "" if plan.cuda else plan.why_not_more
    facts["INTERFACE"] = sha256(DECLARATION.read_bytes()).hexdigest()[:16]  # compared in core/loading.py
    built = [f"-DCLARA_{name}={json.dumps(fact)}" for name, fact in facts.items()]  # quoted as in C
    python = ["-isystem", sysconfig.get_paths()["include"], "-isystem", pybind11.get_include()]
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("python/*.cpp")]):
        yield source.stem, source, cxx + built + python
    for source in sorted(SOURCES.glob("cpu/*.cpp")):
        if source.stem != "kernels":
            yield source.stem, source, cxx
            continue
        for name, flags in INSTRUCTION_SETS.items():
            yield f"kernels_{name}", source, [*cxx, *KERNEL_FLAGS, f"-DCLARA_CPU_ISA={name}", *flags]
    nvcc = [*cuda.nvcc, *built, "-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC"]
    nvcc += ["--threads=2", *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda.archs)]
    nvcc += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in cuda.archs[-1:]]  # for GPUs to come
    for source in sorted(SOURCES.glob("cuda/*.cu" if plan.cuda else "cuda/*.cpp")):
        yield f"cuda_{source.stem}", source, nvcc if plan.cuda else cxx


def link_command(plan: Plan, exports: Path) -> list[str]:
    """Lets nothing but Python's entry point out of the module, as torch brings a C++ runtime of its own.

    On Linux ours comes along, so that a wheel does not depend on the one of the machine it lands on; but only what is
    used of it: other parts ask for a newer glibc. So would libgcc, and torch needs it anyway.
    """
    if sys.platform == "darwin":
        return [*plan.compiler, "-shared", "-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__core"]
    exports.write_text("{ global: PyInit__core; local: *; };\n")
    linker = f"--gc-sections,--version-script={exports},--as-needed"
    if plan.cuda is None:
        return [*plan.compiler, "-shared", "-static-libstdc++", f"-Wl,{linker}"]
    return [*plan.cuda.nvcc, "-shared", "-cudart=static", "-Xcompiler=-static-libstdc++", f"-Xlinker={linker}"]


def ninja_file(plan: Plan, version: str, target: Path, folder: Path) -> str:
    escapes = str.maketrans({"$": "$$", " ": "$ ", ":": "$:"})
    lines = ["rule compile", "  command = $run -MMD -MF $out.d -c $in -o $out", "  description = compiling $out"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $run $in -o $out -ldl -lpthread", "  description = linking $out"]
    objects = []
    for name, source, command in compilations(plan, version):
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: compile {str(source).translate(escapes)}")
        lines.append(f"  run = {shlex.join(command).replace('$', '$$')}")
    lines.append(f"build {str(target).translate(escapes)}: link {' '.join(objects)}")
    lines.append(f"  run = {shlex.join(link_command(plan, folder / 'exports.map')).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


class BuildCore(build_ext):
    """Hands the one extension to ninja, which recompiles only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        plan = make_plan()
        print(f"clara_fused: building {plan}", file=sys.stderr, flush=True)
        if plan.kind == "python":
            # The core of an earlier build, beside the sources, would go on being used.
            DECLARATION.with_name(f"_core{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
            return
        # Not setuptools' own folder, which does not outlive an editable install.
        folder = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}" / plan.kind
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        (folder / "build.ninja").write_text(ninja_file(plan, self.distribution.get_version(), target, folder))
        ninja = [sys.executable, "-m", "ninja", *os.environ.get("NINJAFLAGS", "").split(), "-C", str(folder)]
        if subprocess.run(ninja, stdout=sys.stderr).returncode != 0:
            raise SystemExit("The core was not compiled, as said above. CLARA_BUILD=python installs without it.")


CORE = Extension(".".join(DECLARATION.relative_to(ROOT).with_suffix("").parts), [], optional=True)
setup(ext_modules=[CORE], cmdclass={"build_ext": BuildCore})
