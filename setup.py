"""Builds clara_fused.core._core, the compiled core, with ninja: as much of it as this machine can.

CLARA_BUILD         python: no core; cpu: the CPU kernels; cuda: those and the CUDA kernels. What is asked for and
                    cannot be built is an error. Not set: the most that can be built.
CLARA_CUDA_ARCHS    CUDA architectures, such as "90" or "80;90". Not set: all supported ones that nvcc knows, and PTX
                    of the newest for those to come.
CUDA_HOME           the CUDA toolkit. Not set: the one of the nvcc on the path.
CXX                 the C++ compiler; default g++ or c++.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
KINDS = ("python", "cpu", "cuda")
CUDA_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
MIN_CUDA = (12, 4)

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-DNDEBUG"]
# errno and floating-point traps are observed by nobody here, and forbid vector square roots and selections.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# One translation unit of csrc/cpu/kernels.cpp per instruction set, chosen from at run time.
X86_INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


class CannotBuild(Exception):
    """A reason, in one sentence for the user, why a part of the core cannot be built here."""


# --- tools -----------------------------------------------------------------------------------------------------------


def find_ninja() -> list[str]:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise CannotBuild("ninja is missing: pip install ninja") from None
        return [found]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def pybind11_headers() -> str:
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 is missing: pip install pybind11") from None
    return pybind11.get_include()


def find_compiler() -> list[str]:
    """The C++ compiler, tried on a small program."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <vector>\nint main() { return static_cast<int>(std::vector<int>().size()); }\n")
            try:
                program = [*command, "-std=c++17", str(source), "-o", f"{source}.out"]
                subprocess.run(program, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                continue
        return command
    raise CannotBuild(f"no C++17 compiler works (tried {', '.join(candidates)}): install g++, or set CXX")


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit, and the architectures to compile for."""

    nvcc: Path
    home: Path
    version: tuple[int, int]
    archs: tuple[str, ...]

    def libraries(self) -> list[Path]:
        return [path for path in (self.home / "lib64", self.home / "lib") if path.is_dir()]

    def code_flags(self) -> list[str]:
        newest = max(self.archs, key=lambda arch: int(re.sub(r"\D", "", arch)))
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def toolkit_home(nvcc: str) -> Path:
    """Ask nvcc where its toolkit lies: the program on the path may be a wrapper or a link."""
    with tempfile.TemporaryDirectory() as folder:
        answer = subprocess.run([nvcc, "--dryrun", "probe.cu"], cwd=folder, capture_output=True, text=True)
    match = re.search(r"^#\$ TOP=(.*)$", answer.stderr + answer.stdout, re.MULTILINE)
    if match is None:
        raise CannotBuild(f"{nvcc} does not say where its toolkit lies: set CUDA_HOME")
    return Path(match.group(1).strip()).resolve()


def find_cuda() -> CudaToolkit:
    if os.environ.get("CUDA_HOME"):
        home = Path(os.environ["CUDA_HOME"])
        nvcc = home / "bin" / "nvcc"
        if not nvcc.is_file():
            raise CannotBuild(f"there is no bin/nvcc in CUDA_HOME={home}")
    else:
        on_path = shutil.which("nvcc")
        if on_path is None:
            raise CannotBuild("no nvcc on the path: install the CUDA toolkit (12.4 or newer), or set CUDA_HOME")
        home = toolkit_home(on_path)
        nvcc = Path(on_path)
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise CannotBuild(f"{nvcc} --version does not name a release: {text.strip()[:200]!r}")
    version = (int(match.group(1)), int(match.group(2)))
    if version < MIN_CUDA:
        raise CannotBuild(f"CUDA {version[0]}.{version[1]} at {home} is too old: 12.4 or newer is needed")
    return CudaToolkit(nvcc, home, version, cuda_archs(nvcc))


# What the kernels need of a toolkit; installations from packages can lack any of it.
CUDA_PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>
int main() { return cudaSetDevice(0); }
"""


def try_nvcc(cuda: CudaToolkit, compiler: list[str]) -> None:
    """Compile and link a small program: an nvcc that is there may still not work with the C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(CUDA_PROBE)
        command = [str(cuda.nvcc), "-std=c++17", "-cudart", "static", "-ccbin", compiler[0], str(source)]
        command += [f"-L{path}" for path in cuda.libraries()]
        done = subprocess.run([*command, "-o", f"{source}.out"], capture_output=True, text=True)
    if done.returncode != 0:
        message = next((line for line in (done.stderr + done.stdout).splitlines() if "error" in line), "no message")
        raise CannotBuild(f"{cuda.nvcc} with {compiler[0]} cannot compile a small program: {message.strip()}")


def cuda_archs(nvcc: Path) -> tuple[str, ...]:
    text = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\w+)", text))
    wanted = os.environ.get("CLARA_CUDA_ARCHS")
    if not wanted:
        return tuple(arch for arch in CUDA_ARCHS if arch in known)
    archs = tuple(arch.replace(".", "") for arch in re.split(r"[;,\s]+", wanted.strip()))
    unknown = [arch for arch in archs if arch not in known]
    if unknown:
        raise CannotBuild(
            f"CLARA_CUDA_ARCHS={wanted}: {nvcc} does not know {', '.join(unknown)}; it knows {', '.join(sorted(known))}"
        )
    return archs


# --- plan ------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is built, and why not more."""

    kind: str
    compiler: list[str] = field(default_factory=list)
    ninja: list[str] = field(default_factory=list)
    pybind11: str = ""  # its headers
    cuda: CudaToolkit | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == "python":
            return f"pure Python, without the compiled core ({self.reason})"
        if self.cuda is None:
            return f"the compiled core for the CPU, not for CUDA ({self.reason})"
        version = ".".join(map(str, self.cuda.version))
        return f"the compiled core for the CPU and for CUDA {version} (sm_{', sm_'.join(self.cuda.archs)} and PTX)"


def package_names(file: str) -> dict[str, Any]:
    """What a file of the package defines. To import the package would take torch."""
    return runpy.run_path(str(ROOT / "clara_fused" / file))


def cuda_sources() -> list[Path]:
    return sorted((SOURCES / "cuda").glob("*.cu"))


def make_plan() -> Plan:
    wanted = os.environ.get("CLARA_BUILD") or None
    if wanted is not None and wanted not in KINDS:
        raise SystemExit(f"CLARA_BUILD={wanted}: expected one of {', '.join(KINDS)}")
    if wanted == "python":
        return Plan("python", reason="CLARA_BUILD=python")
    try:
        plan = Plan("cpu", find_compiler(), find_ninja(), pybind11_headers())
    except CannotBuild as error:
        if wanted is not None:
            raise SystemExit(f"CLARA_BUILD={wanted}: {error}") from None
        return Plan("python", reason=str(error))
    if wanted == "cpu":
        plan.reason = "CLARA_BUILD=cpu"
        return plan
    try:
        if not cuda_sources():
            raise CannotBuild("this source tree has no CUDA kernels")
        cuda = find_cuda()
        try_nvcc(cuda, plan.compiler)
        plan.cuda, plan.kind = cuda, "cuda"
    except CannotBuild as error:
        if wanted == "cuda":
            raise SystemExit(f"CLARA_BUILD=cuda: {error}") from None
        plan.reason = str(error)
    return plan


# --- ninja -----------------------------------------------------------------------------------------------------------


class NinjaFile:
    """build.ninja for the core. Paths in it are escaped, so that they may hold spaces."""

    def __init__(self, plan: Plan, target: Path, build_dir: Path) -> None:
        self.plan = plan
        self.target = target
        self.build_dir = build_dir
        self.objects: list[str] = []
        self.lines: list[str] = []
        self._write()

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    @staticmethod
    def _path(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    @staticmethod
    def _flags(flags: list[str]) -> str:
        return " ".join(shlex.quote(flag).replace("$", "$$") for flag in flags)

    def _write(self) -> None:
        plan = self.plan
        compiler = self._flags(plan.compiler)
        self.lines += [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $out",
        ]
        python_headers = ["-isystem", sysconfig.get_paths()["include"], "-isystem", plan.pybind11]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        defines = ["-DCLARA_CPU_X86_KERNELS"] if x86 else []
        if plan.cuda:
            version = ".".join(map(str, plan.cuda.version))
            defines += [
                f'-DCLARA_CUDA_TOOLKIT="{version}"',
                f'-DCLARA_CUDA_ARCHITECTURES="{";".join(plan.cuda.archs)}"',
            ]
        identity = [
            f'-DCLARA_VERSION="{package_names("_version.py")["__version__"]}"',
            f'-DCLARA_INTERFACE="{package_names("core/_interface.py")["interface_stamp"]()}"',
        ]
        for name in ("bindings", "gather"):
            self._compile(name, SOURCES / "python" / f"{name}.cpp", [*CXX_FLAGS, *defines, *identity, *python_headers])
        if not plan.cuda:
            self._compile("absent", SOURCES / "cuda" / "absent.cpp", [*CXX_FLAGS, *defines])
        for name in ("cpu_backend", "dispatch", "team"):
            self._compile(name, SOURCES / "cpu" / f"{name}.cpp", [*CXX_FLAGS, *defines])
        for name, flags in (X86_INSTRUCTION_SETS if x86 else {"baseline": []}).items():
            kernel_flags = [*CXX_FLAGS, *KERNEL_FLAGS, *defines, f"-DCLARA_CPU_ISA={name}", *flags]
            self._compile(f"kernels_{name}", SOURCES / "cpu" / "kernels.cpp", kernel_flags)
        if plan.cuda:
            self._compile_cuda(plan.cuda)
        self._link()

    def _compile(self, name: str, source: Path, flags: list[str], rule: str = "cxx") -> None:
        self.objects.append(f"{name}.o")
        self.lines += [f"build {name}.o: {rule} {self._path(source)}", f"  flags = {self._flags(flags)}"]

    def _compile_cuda(self, cuda: CudaToolkit) -> None:
        self.lines += [
            "rule nvcc",
            f"  command = {self._flags([str(cuda.nvcc)])} -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $out",
        ]
        host_flags = ",".join(flag for flag in CXX_FLAGS if flag.startswith("-f"))
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-cudart", "static", "-ccbin", self.plan.compiler[0]]
        flags += [f"-Xcompiler={host_flags}", "--threads=2", *cuda.code_flags()]
        for source in cuda_sources():
            self._compile(f"cuda_{source.stem}", source, flags, "nvcc")

    def _link(self) -> None:
        flags = ["-shared"]
        if sys.platform == "darwin":
            flags += ["-undefined", "dynamic_lookup"]
        else:
            # The C++ runtime comes along, so that a wheel does not depend on the one of the machine it lands on; but
            # only what is used of it: other parts ask for a newer glibc. So would libgcc, and torch needs it anyway.
            # Nothing but Python's entry point leaves the module: torch brings a C++ runtime of its own.
            exports = self.build_dir / "exports.map"
            exports.write_text("{ global: PyInit__core; local: *; };\n")
            flags += ["-static-libstdc++", "-Wl,--gc-sections", f"-Wl,--version-script={exports}", "-Wl,--as-needed"]
        libraries: list[str] = []
        if self.plan.cuda:
            libraries += [f"-L{path}" for path in self.plan.cuda.libraries()] + ["-lcudart_static", "-lrt"]
        if sys.platform != "darwin":
            libraries += ["-ldl", "-lpthread"]
        self.lines += [
            "rule link",
            f"  command = {self._flags(self.plan.compiler)} $flags $in -o $out $libraries",
            "  description = linking $out",
            f"build {self._path(self.target)}: link {' '.join(self.objects)}",
            f"  flags = {self._flags(flags)}",
            f"  libraries = {self._flags(libraries)}",
            f"default {self._path(self.target)}",
        ]


class BuildCore(build_ext):
    """Hands the one extension to ninja, which recompiles only what has changed."""

    def object_folder(self) -> Path:
        """Where objects are kept from build to build. For an editable install setuptools would throw them away."""
        if self.editable_mode:
            return ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}" / PLAN.kind
        return Path(self.build_temp).resolve() / PLAN.kind

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = self.object_folder()
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = NinjaFile(PLAN, target, build_dir).text()
        file = build_dir / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        if subprocess.run([*PLAN.ninja, *os.environ.get("NINJAFLAGS", "").split(), "-C", str(build_dir)], stdout=sys.stderr).returncode != 0:
            raise SystemExit(
                "compiling the core failed; see the compiler's message above. "
                "CLARA_BUILD=python installs clara_fused without it."
            )


class FinishBuild(Command):
    """Says what was built, with a core or without one."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if PLAN.kind == "python" and self.editable_mode:
            # The core of an earlier build would go on being used.
            (ROOT / self.get_finalized_command("build_ext").get_ext_filename(CORE)).unlink(missing_ok=True)
        print(f"clara_fused: built {PLAN}", file=sys.stderr, flush=True)

    # setuptools asks every step of a build.
    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("finish_build", None)]


CORE = "clara_fused.core._core"
PLAN = make_plan()
setup(
    ext_modules=[] if PLAN.kind == "python" else [Extension(CORE, [])],
    cmdclass={"build": Build, "build_ext": BuildCore, "finish_build": FinishBuild},
)
