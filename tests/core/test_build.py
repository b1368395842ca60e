"""The build: what setup.py finds and refuses, and what the module it makes needs from the machine it lands on."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from helpers import core_available

from clara_fused import AdamClaraLocal, __version__
from clara_fused.core import loading

ROOT = Path(__file__).resolve().parents[2]
BUILD_VARIABLES = ("CLARA_BUILD", "CLARA_CUDA_ARCHS", "CUDA_HOME", "CXX")

pytestmark = pytest.mark.slow


@pytest.fixture
def load_setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py's names, with these environment variables and without building anything."""

    def load(root: str = str(ROOT), **variables: str) -> SimpleNamespace:
        for name in BUILD_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        return SimpleNamespace(**runpy.run_path(f"{root}/setup.py"))

    return load


# What the real nvcc does with setup.py's probe: makes a program that names the GPUs.
PROBE_ANSWER = "for last; do :; done; printf '#!/bin/sh\\necho {gpus}\\n' > $last; chmod +x $last"


@pytest.fixture
def fake_toolkit(tmp_path: Path) -> Any:
    """A CUDA toolkit whose nvcc answers as the real one does, reached through a wrapper script elsewhere."""

    def make(
        version: str = "12.8",
        archs: str = "compute_75\ncompute_80\ncompute_90\ncompute_120",
        gpus: str = "sm_90",
        compiling: str = PROBE_ANSWER,
    ) -> Path:
        home = tmp_path / "toolkit"
        (home / "bin").mkdir(parents=True)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(
            "#!/bin/sh\ncase $1 in\n"
            f"--version) echo 'Cuda compilation tools, release {version}, V{version}.1' ;;\n"
            f"--list-gpu-arch) printf '{archs}\\n' ;;\n"
            f"*) {compiling.format(gpus=gpus)} ;;\nesac\n"
        )
        nvcc.chmod(0o755)
        wrapper = tmp_path / "path" / "nvcc"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
        wrapper.chmod(0o755)
        return home

    return make


def test_an_unknown_kind_is_refused(load_setup: Any) -> None:
    with pytest.raises(SystemExit, match=r"CLARA_BUILD=gpu: expected one of python, cpu, cuda"):
        load_setup(CLARA_BUILD="gpu").make_plan()


def test_a_kind_that_cannot_be_built_is_refused(load_setup: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"CLARA_BUILD=cpu: no C\+\+17 compiler works \(tried .*no-such-compiler"):
        load_setup(CLARA_BUILD="cpu", CXX="no-such-compiler").make_plan()
    with pytest.raises(SystemExit, match=r"CLARA_BUILD=cuda: no nvcc in CUDA_HOME"):
        load_setup(CLARA_BUILD="cuda", CUDA_HOME=str(tmp_path)).make_plan()


def test_without_a_compiler_the_default_is_pure_python(load_setup: Any) -> None:
    plan = load_setup(CXX="no-such-compiler").make_plan()
    assert plan.kind == "python"
    assert "no C++17 compiler works" in str(plan)


@pytest.mark.parametrize("tool", ["pybind11", "ninja"])
def test_without_a_build_tool_the_default_is_pure_python(
    tool: str, load_setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tool else find_spec(name))
    assert f"{tool} is missing: pip install {tool}" in str(load_setup().make_plan())
    with pytest.raises(SystemExit, match=f"CLARA_BUILD=cpu: {tool} is missing"):
        load_setup(CLARA_BUILD="cpu").make_plan()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_without_nvcc_the_default_is_the_cpu(load_setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "g++").symlink_to(str(shutil.which("g++")))
    monkeypatch.setenv("PATH", str(tmp_path))
    plan = load_setup().make_plan()
    assert plan.kind == "cpu"
    assert "no nvcc on the path" in str(plan)


@pytest.mark.parametrize("declaration", ["clara_fused/core/_core.pyi", "clara_fused/elsewhere/_core.pyi"])
def test_the_core_lies_beside_its_declaration(
    declaration: str, tmp_path: Path, load_setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / declaration).parent.mkdir(parents=True)
    (tmp_path / declaration).touch()
    module = load_setup(root=str(tmp_path)).CORE.name
    assert module == declaration.removesuffix(".pyi").replace("/", ".")


def build(names: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip asks of setup.py, but for the compiler."""
    distribution = setuptools.Distribution({"name": "clara-fused", "version": "9.9", "ext_modules": [names.CORE]})
    command = names.BuildCore(distribution)
    command.build_lib = "lib"
    command.ensure_finalized()
    command.build_extension(names.CORE)


def test_without_a_core_that_of_an_earlier_build_is_not_used(
    load_setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = load_setup(CLARA_BUILD="python")
    monkeypatch.setitem(names.BuildCore.build_extension.__globals__, "DECLARATION", tmp_path / "_core.pyi")
    core, of_another_python = (
        tmp_path / f"_core{suffix}" for suffix in (sysconfig.get_config_var("EXT_SUFFIX"), ".other.so")
    )
    core.touch()
    of_another_python.touch()
    build(names, monkeypatch)
    assert not core.exists()
    assert of_another_python.exists()
    assert "building pure Python, without the compiled core (CLARA_BUILD=python)" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_source_is_compiled_and_paths_may_hold_spaces(
    load_setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = load_setup(CLARA_BUILD="cpu")
    text = names.ninja_file(names.make_plan(), "9.9", tmp_path / "a $ b" / "_core.so", tmp_path)
    for source in (ROOT / "csrc").rglob("*.cpp"):
        assert str(source) in text
    assert text.count("cpu/kernels.cpp") == len(names.INSTRUCTION_SETS)
    (tmp_path / "build.ninja").write_text(text)
    dry_run = subprocess.run(
        [sys.executable, "-m", "ninja", "-n", "-v", "-C", str(tmp_path)], capture_output=True, text=True
    )
    assert dry_run.returncode == 0, dry_run.stdout
    assert "/a $ b/_core.so'" in dry_run.stdout


def test_a_compiler_that_fails_says_what_to_do(
    load_setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = load_setup(CLARA_BUILD="python")
    globals_ = names.BuildCore.build_extension.__globals__
    monkeypatch.setitem(globals_, "ROOT", tmp_path)
    monkeypatch.setitem(globals_, "make_plan", lambda: names.Plan("cpu", "", ["false"]))
    with pytest.raises(SystemExit, match="CLARA_BUILD=python installs without it"):
        build(names, monkeypatch)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
class TestToolkit:
    def test_nvcc_may_be_a_wrapper(
        self, load_setup: Any, fake_toolkit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        fake_toolkit()
        monkeypatch.setenv("PATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}")
        names = load_setup()
        plan = names.make_plan()
        assert plan.cuda.nvcc[0] == str(tmp_path / "path" / "nvcc")
        assert names.link_command(plan, tmp_path / "exports")[0] == plan.cuda.nvcc[0]

    def test_cuda_home_wins(
        self, load_setup: Any, fake_toolkit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        home = fake_toolkit()
        monkeypatch.setenv("PATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}")
        assert load_setup(CUDA_HOME=str(home)).make_plan().cuda.nvcc[0] == str(home / "bin" / "nvcc")

    def test_an_old_toolkit_is_refused(self, load_setup: Any, fake_toolkit: Any) -> None:
        home = str(fake_toolkit(version="12.3"))
        with pytest.raises(SystemExit, match=r"CUDA 12\.3, which is too old: 12\.4 or newer"):
            load_setup(CLARA_BUILD="cuda", CUDA_HOME=home).make_plan()
        assert load_setup(CUDA_HOME=home).make_plan().kind == "cpu"

    def test_a_toolkit_that_does_not_work_with_the_compiler_is_refused(
        self, load_setup: Any, fake_toolkit: Any
    ) -> None:
        home = str(fake_toolkit(compiling="echo 'host_config.h: fatal error: unsupported GNU version!' >&2; exit 1"))
        plan = load_setup(CUDA_HOME=home).make_plan()
        assert plan.kind == "cpu"
        assert "unsupported GNU version" in str(plan)
        with pytest.raises(SystemExit, match=r"CLARA_BUILD=cuda: .*nvcc with g\+\+ cannot compile .* unsupported GNU"):
            load_setup(CLARA_BUILD="cuda", CUDA_HOME=home).make_plan()

    def test_it_compiles_for_the_gpus_that_are_there(self, load_setup: Any, fake_toolkit: Any) -> None:
        plan = load_setup(CUDA_HOME=str(fake_toolkit(gpus="sm_90 sm_80 sm_90"))).make_plan()
        assert plan.cuda.archs == ["80", "90"]
        assert str(plan) == "the compiled core for the CPU and CUDA 12.8 (sm_80, sm_90)"

    def test_a_gpu_newer_than_the_toolkit_gets_the_newest_code(self, load_setup: Any, fake_toolkit: Any) -> None:
        names = load_setup(CUDA_HOME=str(fake_toolkit(gpus="sm_130")))
        plan = names.make_plan()
        assert plan.cuda.archs == ["120"]
        flags = next(command for _, source, command in names.compilations(plan, "9.9") if source.suffix == ".cu")
        assert flags[-2:] == ["-gencode=arch=compute_120,code=sm_120", "-gencode=arch=compute_120,code=compute_120"]

    def test_without_a_gpu_cuda_is_built_only_when_asked_for(self, load_setup: Any, fake_toolkit: Any) -> None:
        home = str(fake_toolkit(gpus=""))
        plan = load_setup(CUDA_HOME=home).make_plan()
        assert plan.kind == "cpu"
        assert "no GPU answers here; CLARA_CUDA_ARCHS=all" in str(plan)
        supported = ["75", "80", "90", "120"]
        assert load_setup(CUDA_HOME=home, CLARA_BUILD="cuda").make_plan().cuda.archs == supported
        assert load_setup(CUDA_HOME=home, CLARA_CUDA_ARCHS="all").make_plan().cuda.archs == supported
        with pytest.raises(SystemExit, match="no GPU answers here"):
            load_setup(CUDA_HOME=home, CLARA_BUILD="cuda", CLARA_CUDA_ARCHS="native").make_plan()

    def test_architectures_can_be_chosen(self, load_setup: Any, fake_toolkit: Any) -> None:
        home = str(fake_toolkit())
        assert load_setup(CUDA_HOME=home, CLARA_CUDA_ARCHS="8.0;90").make_plan().cuda.archs == ["80", "90"]
        with pytest.raises(SystemExit, match="does not know 61; it knows 75, 80, 90, 120"):
            load_setup(CUDA_HOME=home, CLARA_CUDA_ARCHS="61").make_plan()

    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
    def test_of_a_command_of_several_words_nvcc_gets_the_compiler(
        self, load_setup: Any, fake_toolkit: Any, tmp_path: Path
    ) -> None:
        """A launcher before it, as ccache, or flags behind it: nvcc's -ccbin takes one word."""
        names = load_setup(CUDA_HOME=str(fake_toolkit()), CXX="env g++ -pipe -isystem /usr/include", CLARA_BUILD="cuda")
        plan = names.make_plan()
        commands = {source.suffix: command for _, source, command in names.compilations(plan, "9.9")}
        assert commands[".cpp"][:3] == ["env", "g++", "-pipe"]
        assert commands[".cu"][1:3] == ["-ccbin", "g++"]
        link = names.link_command(plan, tmp_path / "exports")
        assert link[link.index("-ccbin") + 1] == "g++"


# --- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
class TestModule:
    def test_it_needs_neither_torch_nor_a_driver(self) -> None:
        """Undefined symbols after a torch upgrade are the field's most reported failure."""
        if sys.platform != "linux" or shutil.which("objdump") is None:
            pytest.skip("needs objdump")
        headers = subprocess.run(
            ["objdump", "-p", loading.core_or_warning().__file__], capture_output=True, text=True, check=True
        ).stdout
        needed = re.findall(r"NEEDED\s+(\S+)", headers)
        assert needed
        foreign = [lib for lib in needed if re.search(r"torch|c10|cuda|nv|gomp|stdc\+\+", lib)]
        assert not foreign

    def test_its_cxx_runtime_asks_for_no_newer_glibc(self) -> None:
        """Unused parts of the static C++ runtime (std::random_device) need 2.36, its unwinder 2.35."""
        if sys.platform != "linux" or shutil.which("objdump") is None:
            pytest.skip("needs objdump")
        table = subprocess.run(
            ["objdump", "-T", loading.core_or_warning().__file__], capture_output=True, text=True, check=True
        ).stdout
        assert "PyInit__core" in table
        assert not re.findall(r"arc4random|getentropy|_dl_find_object", table)

    def test_it_exports_its_entry_point_alone(self) -> None:
        if sys.platform != "linux" or shutil.which("objdump") is None:
            pytest.skip("needs objdump")
        table = subprocess.run(
            ["objdump", "-T", loading.core_or_warning().__file__], capture_output=True, text=True, check=True
        ).stdout
        lines = [line.split() for line in table.splitlines() if re.match(r"^[0-9a-f]{8,}", line)]
        exported = {words[-1] for words in lines if "*UND*" not in words}
        assert exported == {"PyInit__core"}

    def test_the_kernels_of_an_instruction_set_stay_in_their_namespace(self) -> None:
        """A function that the linker shared between the kernels' objects could hold instructions a CPU lacks."""
        objects = list(ROOT.glob("build/temp*/*/kernels_avx512.o"))
        if not objects or shutil.which("nm") is None:
            pytest.skip("needs the object files of a build in this tree")
        for path in objects:
            symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
            assert not re.findall(r"^\S+ [WVu] \S+", symbols, re.MULTILINE)

    def test_python_dash_m_says_what_is_installed(self) -> None:
        text = subprocess.run(
            [sys.executable, "-m", "clara_fused"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
        assert re.search(r"^compiled core: (baseline|avx2|avx512) kernels", text, re.MULTILINE)
        assert re.search(r"^cpu \(float32, bfloat16, float16, float64\): compiled core$", text, re.MULTILINE)


# An editable install would lend the copy of the package its module.
WITHOUT_EDITABLE_INSTALLS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""
BROKEN = """
import warnings
import torch
import clara_fused
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for fused in (None, None, False):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = clara_fused.AdamClaraLocal([param], fused=fused)
        optimizer.step()
        assert param[0] < 1
print(len(caught), caught[0].message)
try:
    clara_fused.AdamClaraLocal([param], fused=True).step()
except RuntimeError as error:
    print(error)
"""


CORE_FILE = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"


def _no_core(package: Path) -> None:
    pass


def _broken_core(package: Path) -> None:
    (package / "core" / CORE_FILE).write_bytes(b"\x7fELF broken")


def _core_of_older_sources(package: Path) -> None:
    """As after `git pull` in an editable install."""
    if not core_available():
        pytest.skip("needs the compiled core")
    shutil.copy(loading.core_or_warning().__file__, package / "core" / CORE_FILE)
    with (package / "core" / "_core.pyi").open("a") as declaration:
        declaration.write("def new() -> None: ...\n")


def _run_beside(package: Path, program: str) -> subprocess.CompletedProcess[str]:
    program = WITHOUT_EDITABLE_INSTALLS + program
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=package.parent)


@pytest.mark.parametrize(
    ("put_core", "message"),
    [
        (_no_core, "the compiled core is not installed"),
        (_broken_core, "the compiled core cannot be loaded"),
        (_core_of_older_sources, "built from other sources than this clara_fused and has to be rebuilt"),
    ],
)
def test_a_core_that_cannot_be_used_is_one_warning(
    put_core: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    package = tmp_path / "clara_fused"
    shutil.copytree(ROOT / "clara_fused", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    put_core(package)
    run = _run_beside(package, BROKEN)
    assert run.returncode == 0, run.stderr
    warning, error = run.stdout.splitlines()
    assert warning.startswith("1 clara_fused runs on PyTorch operations")
    assert message in warning
    assert error.startswith("param group 0, parameter 0") and message in error and "reinstall" in error


def test_a_package_without_its_declaration_uses_its_core(tmp_path: Path) -> None:
    """Tools that freeze an application leave *.pyi out."""
    if not core_available():
        pytest.skip("needs the compiled core")
    package = tmp_path / "clara_fused"
    shutil.copytree(ROOT / "clara_fused", package, ignore=shutil.ignore_patterns("*.so", "*.pyi", "__pycache__"))
    shutil.copy(loading.core_or_warning().__file__, package / "core" / CORE_FILE)
    run = _run_beside(package, "from clara_fused.core import core_status; print(core_status('cpu', None))")
    assert run.stdout.strip() == "None", run.stderr


def _signature(declaration: str | ast.FunctionDef, owner: str = "") -> str:
    """Names, order, kinds and defaults of a function's parameters."""
    function = declaration
    if isinstance(declaration, str):
        function = ast.parse(f"def {declaration}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    for argument in (*function.args.args, *function.args.kwonlyargs):
        argument.annotation = None
    return f"{owner}{function.name}({ast.unparse(function.args)})"


def _declared_interface() -> set[str]:
    """What _core.pyi declares, but for the shape of what its functions return."""
    found = set()

    def visit(body: list[ast.stmt], owner: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                found.add(owner + node.name if node.decorator_list else _signature(node, owner))
            elif isinstance(node, ast.ClassDef) and "TypedDict" not in map(ast.unparse, node.bases):
                visit(node.body, f"{owner}{node.name}.")
            elif isinstance(node, ast.AnnAssign):
                found.add(owner + ast.unparse(node.target))
            elif isinstance(node, ast.Assign):
                found.add(owner + ast.unparse(node.targets[0]))

    visit(ast.parse((ROOT / "clara_fused" / "core" / "_core.pyi").read_text()).body, "")
    return found


def _compiled_interface() -> set[str]:
    """The same of the module; pybind11 writes signatures into docstrings."""
    core = loading.core_or_warning()
    found = set()

    def visit(owner: str, members: dict[str, Any]) -> None:
        for name, value in members.items():
            if name in ("__doc__", "__module__") or name.startswith("_pybind11"):
                continue
            if name == "__init__" and not value.__doc__.startswith("__init__("):
                continue  # of a class that Python does not make
            if hasattr(value, "__members__"):
                found.update(f"{owner}{name}.{member}" for member in value.__members__)
            elif isinstance(value, type):
                visit(f"{owner}{name}.", dict(vars(value)))
            elif callable(value):
                found.add(_signature(value.__doc__.splitlines()[0], owner))
            else:
                found.add(owner + name)

    visit("", {name: value for name, value in vars(core).items() if not name.startswith("__")})
    return found


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
def test_the_declaration_is_that_of_the_core() -> None:
    """The core is told from one of older sources by the declaration's text, so a change has to show in it."""
    assert _declared_interface() == _compiled_interface()


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
@pytest.mark.usefixtures("fresh_core_status")
def test_a_core_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "__version__", "9.9")
    assert "of version" in (loading.core_status("cpu", torch.float32) or "")


# ---------------------------------------------------------------------------------------------------------------------
# Which back end serves what


@pytest.fixture
def fresh_core_status() -> Iterator[None]:
    """What the process found out about its core is found out again, before and after the test."""
    caches = (loading.load, loading.core_or_warning, loading.core_status)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("fresh_core_status")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named _core"), "is not installed"),
        (ImportError("undefined symbol"), "cannot be loaded (undefined symbol)"),
    ],
    ids=["missing", "broken"],
)
def test_without_a_core_everything_names_the_reason(
    error: ImportError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(loading.importlib, "import_module", refuse)
    assert message in (loading.core_status("cpu", torch.float32) or "")
    text = loading.describe_installation()
    assert f"compiled core: none (the compiled core {message}" in text
    assert "PyTorch operations: the compiled core " + message in text
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = AdamClaraLocal([param])
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        for _ in range(2):
            optimizer.step()
    assert len(caught) == 1
    assert optimizer.state[param]["step"] == 2


class _CudaCore:
    """As much of a compiled core as deciding on a back end asks for."""

    version = __version__
    interface = loading.interface_stamp()

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def cuda_problem(self, index: int) -> str:
        return self._problem and f"device {index}: {self._problem}"


@pytest.mark.usefixtures("fresh_core_status")
@pytest.mark.parametrize(
    ("problem", "device", "dtype", "reason"),
    [
        ("", "cuda", torch.float32, None),
        ("", "cuda:1", torch.bfloat16, None),
        ("no driver", "cuda:1", torch.float32, "device 1: no driver"),
        ("no driver", "cuda", torch.float64, "device 0: no driver"),
        ("", "cuda", torch.float64, "do not serve float64"),
        ("", "mps", torch.float32, "no kernels for mps devices"),
        ("no driver", "cpu", torch.float64, None),
    ],
)
def test_the_reason_why_a_device_or_dtype_is_not_served(
    problem: str,
    device: str,
    dtype: torch.dtype,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading.importlib, "import_module", lambda *_: _CudaCore(problem))
    status = loading.core_status(device, dtype)
    if reason is None:
        assert status is None
    else:
        assert status is not None and reason in status


@pytest.mark.usefixtures("fresh_core_status")
@pytest.mark.parametrize("device", ["meta", "cuda"])  # without kernels, and with a core that has none of this dtype
def test_an_error_says_once_what_to_do(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib, "import_module", lambda *_: _CudaCore(""))
    problem = loading.core_status(device, torch.float64)
    monkeypatch.setattr(loading, "core_status", lambda *_: problem)
    param = torch.empty(3, dtype=torch.float64, device="meta")
    with pytest.raises(RuntimeError, match="fused=True") as error:
        loading.require(param, param, 0, 0)
    assert str(error.value).count("use fused=None or fused=False") == 1


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
def test_a_core_without_cuda_says_so() -> None:
    if loading.core_or_warning().build_info()["cuda"]:
        pytest.skip("this core is built with CUDA")
    assert "built without CUDA" in (loading.core_status("cuda", torch.float32) or "")


def test_source_distributions_hold_all_that_is_compiled(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    needed = [path for folder in ("csrc", "clara_fused") for path in (ROOT / folder).rglob("*") if path.is_file()]
    sources = {str(path.relative_to(ROOT)) for path in needed if path.suffix not in (".so", ".pyc")}
    assert len(sources) > 30
    assert sources <= names
