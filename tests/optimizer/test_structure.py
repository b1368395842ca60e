"""What keeps the package easy to change: every option written once, variants as values, a step that reads like one."""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GLOBAL_OPTIONS, LIVELY, VARIANTS, core_available, parameters, results, set_gradients, train

import clara_fused
from clara_fused import options as option_table
from clara_fused.options import OPTIONS, GroupOptions

PACKAGE = Path(clara_fused.__file__).parent
CSRC = next((p for p in (PACKAGE.parent / "csrc", Path(__file__).resolve().parents[2] / "csrc") if p.is_dir()), None)

NOT_OPTIONS = {"self", "params", "fused", "process_group"}

# ---------------------------------------------------------------------------------------------------------------------
# Options


def arguments_of(variant: str) -> dict[str, inspect.Parameter]:
    found = inspect.signature(VARIANTS[variant]).parameters
    return {n: p for n, p in found.items() if n not in NOT_OPTIONS and p.kind is not p.VAR_KEYWORD}


def test_constructors_take_the_options_of_the_table(variant: str) -> None:
    expected = [name for name in OPTIONS if name != "lr_smoothing" or variant == "Smoothed"]
    assert sorted(arguments_of(variant)) == sorted(expected)
    groups = VARIANTS[variant](parameters()).param_groups
    assert set(groups[0]) - {"params"} == set(expected)


def test_variants_differ_in_the_rule_alone() -> None:
    assert {n: p.default for n, p in arguments_of("Global").items()} == {
        n: p.default for n, p in arguments_of("Local").items()
    }
    smoothed = {n: p.default for n, p in arguments_of("Smoothed").items()}
    differ = {n for n, p in arguments_of("Local").items() if p.default != smoothed[n]}
    assert differ <= {"damping", "clip"}


def test_every_option_is_documented() -> None:
    text = inspect.getdoc(VARIANTS["Local"].__init__) or ""
    text += inspect.getdoc(VARIANTS["Smoothed"].__init__) or ""
    for name in [*OPTIONS, "fused", "process_group"]:
        assert re.search(rf"^\s*{name}: ", text, re.M), name


def test_defaults_pass_their_own_checks(variant: str) -> None:
    for name, argument in arguments_of(variant).items():
        OPTIONS[name].read(name, argument.default)


def test_options_of_the_one_scale() -> None:
    assert {name for name, option in OPTIONS.items() if option.one_for_all} == set(GLOBAL_OPTIONS)


def test_the_core_reads_options_by_the_names_of_the_table() -> None:
    """One list in adam_clara.h; what Python fills in comes from GroupOptions."""
    if CSRC is None:
        pytest.skip("needs the sources")
    text = (CSRC / "adam_clara.h").read_text()
    listed = text[text.index("#define CLARA_GROUP_OPTIONS") : text.index("struct GroupOptions")]
    names = [name for name in re.findall(r"X\((\w+)\)", listed) if name != "X"]
    known = set(GroupOptions.__dataclass_fields__)
    assert set(names) <= known
    # Which elements have a path and where a scale starts is settled in Python.
    assert known - set(names) <= {"amsgrad", "initial_scale", "path_fraction"}


def words_of_python(path: Path) -> set[str]:
    """Names, and strings that are exactly a name; neither comments nor docstrings."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            found.add(token.string)
        elif token.type == tokenize.STRING:
            value = token.string.strip("rbf\"'")
            if value.isidentifier():
                found.add(value)
    return found


def words_of_cpp(path: Path) -> set[str]:
    text = re.sub(r"//.*|/\*.*?\*/", "", path.read_text())
    return set(re.findall(r"\w+", text))


def files_with(name: str) -> set[str]:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if name in words_of_python(path)}
    if CSRC is not None:
        sources = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
        found |= {f"csrc/{path.relative_to(CSRC)}" for path in sources if name in words_of_cpp(path)}
    return found - {"distributed/selftest.py"}


RULE = {"options.py", "adaptation.py", "csrc/adam_clara.h"}
ELEMENTS = {"options.py", "torch_backend.py", "csrc/adam_clara.h"}
STATE = {"options.py", "state.py", "optimizers.py"}

# A new option of each kind touches the files listed, and no other. (`lr`, `betas`, `amsgrad` and `adapt_lr` are more:
# tensors, walks, an entry of the state, the cautious scale.)
FILES: dict[str, set[str]] = {
    "damping": RULE,
    "reference": RULE,
    "clip": RULE,
    "clip_low": RULE,
    "scale_low": RULE | {"state.py"},  # where the cautious scale starts
    "lr_smoothing": RULE,
    "smoothing": RULE | ELEMENTS,
    "eps": ELEMENTS,
    "weight_decay": ELEMENTS,
    "maximize": ELEMENTS,
    "decoupled_weight_decay": ELEMENTS,
    "path_fraction": STATE,
    "initial_scale": STATE,
}
# Names that version 1's checkpoints have, what a class says of an option, and other packages' names for it are no work
# for a new one.
TOLERATED = {"state.py", "optimizers.py", "integrations/transformers.py"}


@pytest.mark.parametrize("name", FILES)
def test_an_option_is_known_to_few_files(name: str) -> None:
    found = files_with(name) - TOLERATED
    assert found <= FILES[name], sorted(found - FILES[name])
    assert len(found) <= 4


# ---------------------------------------------------------------------------------------------------------------------
# Variants


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_local_is_smoothed_without_memory(dtype: torch.dtype, fused: bool) -> None:
    """Bit for bit, in every step."""
    shapes = [(5, 3), (7,), (), (64, 1024)]
    local = VARIANTS["Local"](parameters(shapes, dtype), fused=fused, **LIVELY["Local"])
    options = {**LIVELY["Local"], "lr_smoothing": 0.0}
    smoothed = VARIANTS["Smoothed"](parameters(shapes, dtype), fused=fused, **options)
    for step in range(6):
        for optimizer in (local, smoothed):
            train(optimizer, 1, first=step)
        assert results(local) == results(smoothed)


def test_local_is_smoothed_without_memory_at_the_defaults(fused: bool) -> None:
    local = VARIANTS["Local"](parameters(), fused=fused)
    defaults = {name: local.param_groups[0][name] for name in ("damping", "clip")}
    smoothed = VARIANTS["Smoothed"](parameters(), fused=fused, lr_smoothing=0.0, **defaults)
    for optimizer in (local, smoothed):
        train(optimizer, 30)
    assert results(local) == results(smoothed)


# ---------------------------------------------------------------------------------------------------------------------
# The step


def code_lines(function: Any) -> int:
    """Lines of the body, without docstring, blank lines and comments."""
    lines = textwrap.dedent(inspect.getsource(inspect.unwrap(function))).splitlines()
    tree = ast.parse("\n".join(lines)).body[0]
    assert isinstance(tree, ast.FunctionDef)
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    counted = lines[body[0].lineno - 1 : tree.end_lineno]
    return sum(1 for line in counted if line.strip() and not line.strip().startswith("#"))


def test_step_is_short() -> None:
    step = clara_fused.AdamClara.__dict__["step"]
    assert code_lines(step) <= 25


def test_every_variant_has_the_same_step(variant: str) -> None:
    # torch.optim wraps it anew for every class.
    assert inspect.unwrap(VARIANTS[variant].step) is inspect.unwrap(clara_fused.AdamClara.step)


def calls_of_a_steady_step(variant: str, tensors: int, plain: bool = False) -> list[str]:
    """Python functions of ours that it passes; `plain`: of leaf tensors that are no nn.Parameter."""
    params: list[torch.Tensor] = [*parameters([(5, 3)] * tensors)]
    if plain:
        params = [param.detach().requires_grad_() for param in params]
    optimizer = VARIANTS[variant](params, fused=True)
    train(optimizer, 3)
    set_gradients(optimizer.param_groups[0]["params"], 3)
    called: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            called.append(f"{Path(code.co_filename).name}:{code.co_name}")

    sys.setprofile(note)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return called


MOST_FUNCTIONS = 8  # version 1 passed 35


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
def test_a_steady_step_passes_few_functions(variant: str) -> None:
    called = {name for name in calls_of_a_steady_step(variant, 20) if "<" not in name}
    assert len(called) <= MOST_FUNCTIONS, sorted(called)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
def test_no_python_runs_for_each_tensor(plain: bool, variant: str) -> None:
    """The host's budget is a microsecond a tensor: the walk over them is the core's."""
    few, many = (calls_of_a_steady_step(variant, count, plain) for count in (2, 40))
    assert len(many) <= len(few), sorted(name for name in set(many) if many.count(name) > few.count(name))


def test_the_options_module_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(option_table.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]
    assert not imports
