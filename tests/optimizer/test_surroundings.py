"""What else goes on in the process: default devices and dtypes, fake tensors, threads, compilers, odd weights.

torch.optim.Adam does the right thing in all of these. Each test names the failure of version 1 that it prevents.
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import pkgutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import (
    LIVELY,
    MOMENTS,
    VARIANTS,
    WALK,
    StepCheck,
    UnreadByTheHost,
    all_params,
    clones,
    frozen,
    parameters,
    results,
    set_gradients,
    snapshot,
    train,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import clara_fused

# ---------------------------------------------------------------------------------------------------------------------
# Default device and dtype

SHAPES = [(5, 3), (7,), (), (64, 1024), (0, 2)]


def whole_life(variant: str, fused: bool, params: list[torch.Tensor], grads: list[list[torch.Tensor]]) -> Any:
    """Everything an optimizer lives through; on parameters and gradients that were made before."""
    taken = []

    def step(optimizer: torch.optim.Optimizer, number: int) -> None:
        for param, grad in zip(all_params(optimizer), grads[number], strict=False):
            param.grad = grad.clone()
        optimizer.step()
        taken.extend([optimizer.lr_scales(), optimizer.effective_lrs()])

    optimizer = VARIANTS[variant](params[:3], lr=0.05, amsgrad=True, weight_decay=0.01, fused=fused)
    taken.append(optimizer.lr_scales())
    step(optimizer, 0)
    optimizer.add_param_group({"params": params[3:], "lr": torch.tensor(0.5, device="cpu", dtype=torch.float32)})
    step(optimizer, 1)
    optimizer.grad_scale = torch.tensor(4.0, device="cpu", dtype=torch.float32)
    for number, found in ((2, 0.0), (3, 1.0)):
        optimizer.found_inf = torch.tensor(found, device="cpu", dtype=torch.float32)
        step(optimizer, number)
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.load_state_dict(optimizer.state_dict())
    copied = copy.deepcopy(optimizer)
    fresh = VARIANTS[variant](
        [{"params": clones(g["params"]), "lr": g["lr"]} for g in optimizer.param_groups], fused=fused
    )
    fresh.load_state_dict(optimizer.state_dict())
    adam = torch.optim.Adam(clones(params[:3]), lr=0.05)
    step_of_adam = copy.deepcopy(adam.state_dict())
    adopted = VARIANTS[variant](clones(params[:3]), lr=0.05, fused=fused)
    adopted.load_state_dict(step_of_adam)
    for each in (optimizer, copied, fresh, adopted):
        step(each, 4)
        step(each, 5)
    lives = (optimizer, copied, fresh, adopted)
    return frozen(taken), *(frozen([p.detach() for p in all_params(each)]) for each in lives)


@pytest.fixture
def default_device() -> Iterator[Callable[[str | None], None]]:
    yield torch.set_default_device
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [None, "meta"])
def test_whole_life_under_other_defaults(
    device: str | None, dtype: torch.dtype, variant: str, fused: bool, default_device: Callable[[str | None], None]
) -> None:
    """Tensors made without a device landed on the default one; scales of float64 differed between ranks."""
    grads = [[torch.randn(shape, generator=torch.Generator().manual_seed(n)) for shape in SHAPES] for n in range(6)]
    expected = whole_life(variant, fused, parameters(SHAPES), grads)
    given = parameters(SHAPES)
    torch.set_default_dtype(dtype)
    default_device(device)
    actual = whole_life(variant, fused, given, grads)
    assert actual == expected


# ---------------------------------------------------------------------------------------------------------------------
# Fake tensors


def fake_training(variant: str, fused: bool | None) -> None:
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = VARIANTS[variant](params, lr=0.05, fused=fused, amsgrad=True)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
            optimizer.lr_scales()
        assert optimizer.state[params[0]]["path"].shape == (5, 3)


@pytest.mark.parametrize("fused", [None, False], ids=["any", "torch"])
def test_fake_tensors_leave_nothing_behind(fused: bool | None, variant: str) -> None:
    """A fake tensor stayed in a process-wide table: the next real step raised, and so did a second fake mode."""

    def real() -> Any:
        optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
        train(optimizer, 3)
        return results(optimizer)

    expected = real()
    for _ in range(2):
        fake_training(variant, fused)
        assert real() == expected


@pytest.fixture
def ranks_that_are_not_there() -> Iterator[Any]:
    """A mesh of two ranks of which this one sends to nobody."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("values", [False, True], ids=["fake tensors", "real tensors"])
def test_sharded_training_is_rehearsed(values: bool, variant: str, ranks_that_are_not_there: Any) -> None:
    """Estimates of memory for FSDP2; the ranks were compared, and these are not there to answer."""
    with nullcontext() if values else FakeTensorMode():
        model = torch.distributed.fsdp.fully_shard(torch.nn.Linear(8, 8), mesh=ranks_that_are_not_there)
        optimizer = VARIANTS[variant](model.parameters())
        for _ in range(2):
            model(torch.randn(2, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(optimizer.state) == 2


@pytest.mark.slow
def test_memory_estimates_run_twice(variant: str) -> None:
    """torch.distributed._tools measures a training step under fake tensors before a run."""
    tools = pytest.importorskip("torch.distributed._tools.mem_tracker")
    for _ in range(2):
        with FakeTensorMode():
            model = torch.nn.Linear(32, 16)
            optimizer = VARIANTS[variant](model.parameters())
            tracker = tools.MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                for _ in range(2):
                    model(torch.randn(4, 32)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    tracker.reset_mod_stats()  # else it refuses the second pass through the model
    train(VARIANTS[variant](parameters()), 2)


def test_no_tensor_lives_in_the_modules(variant: str, fused: bool) -> None:
    """What one mode, device or thread has made must not be met by another."""
    optimizer = VARIANTS[variant](parameters(), fused=fused)
    train(optimizer, 2)
    names = [m.name for m in pkgutil.walk_packages(clara_fused.__path__, "clara_fused.")]
    others = ("__main__", "selftest", "._core", "integrations")
    for module in [importlib.import_module(name) for name in names if not any(part in name for part in others)]:
        held = [value for value in vars(module).values() if not isinstance(value, type(module))]
        found = [value for value in held if isinstance(value, torch.Tensor)]
        for container in held:
            if isinstance(container, (dict, list, set, tuple)):
                found += [x for x in gc.get_referents(container) if isinstance(x, torch.Tensor)]
            if hasattr(container, "cache_info"):
                # Kept by an lru_cache: reachable from the function object.
                found += [x for x in gc.get_referents(container) if isinstance(x, torch.Tensor)]
        assert not found, module.__name__


# ---------------------------------------------------------------------------------------------------------------------
# Shared memory


@pytest.mark.parametrize("fused", [None, False], ids=["any", "torch"])
@pytest.mark.parametrize("adapt_lr", [False, True])
def test_parameters_that_share_memory(adapt_lr: bool, fused: bool | None, variant: str) -> None:
    """Sixteen parameters over one buffer, two threads: updates were lost, three steps' worth of them."""
    torch.set_num_threads(2)
    steps, count, rate = 6, 16, 1e-3
    memory = torch.zeros(20_000)
    params = [torch.nn.Parameter(memory) for _ in range(count)]
    optimizer = VARIANTS[variant](params, lr=rate, adapt_lr=adapt_lr, initial_scale=1.0, fused=fused)
    gradient = torch.ones(20_000)
    moved = 0.0
    for _ in range(steps):
        for param in params:
            param.grad = gradient
        optimizer.step()
        moved += rate * float(optimizer.lr_scales()[0].double().sum())
    # Adam's step is one for a gradient that stays the same.
    torch.testing.assert_close(memory, torch.full_like(memory, -moved), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fused", [None, False], ids=["any", "torch"])
def test_parameters_that_overlap_in_part(fused: bool | None, variant: str) -> None:
    torch.set_num_threads(2)
    memory = torch.zeros(90_000)
    params = [torch.nn.Parameter(memory[start : start + 50_000]) for start in (0, 20_000, 40_000)]
    optimizer = VARIANTS[variant](params, lr=1e-3, adapt_lr=False, fused=fused)
    for _ in range(20):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    times = torch.ones(90_000)
    times[20_000:50_000] += 1
    times[40_000:70_000] += 1
    torch.testing.assert_close(memory, -20e-3 * times, rtol=1e-4, atol=0)


def test_parameters_that_overlap_are_refused_before_they_have_a_state(variant: str) -> None:
    memory = torch.zeros(90)
    params = [torch.nn.Parameter(memory[start : start + 50]) for start in (0, 40)]
    optimizer = VARIANTS[variant](params, fused=True)
    set_gradients(params[:1], 0)
    optimizer.step()  # this one alone is nobody's business
    set_gradients(params, 1)
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    assert list(optimizer.state) == params[:1]


@pytest.mark.parametrize("change", ["to", "load_state_dict"])
def test_modules_may_exchange_their_parameters(change: str, variant: str, fused: bool) -> None:
    """As `Module.to` does with sharded ones; it cannot where something holds a weak reference to a parameter."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = torch.nn.Linear(4, 3)
        optimizer = VARIANTS[variant](module.parameters(), fused=fused)
        for dtype in (torch.float32, torch.float64, torch.float32):
            if change == "to":
                module.to(dtype)
            else:
                module.load_state_dict(torch.nn.Linear(4, 3).state_dict())
            train(optimizer, 2)
            optimizer.zero_grad()
            assert all(state["exp_avg"].dtype == param.dtype for param, state in optimizer.state.items())
        assert [int(state["step"]) for state in optimizer.state.values()] == [6, 6]
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_optimizers_in_several_threads(variant: str, fused: bool) -> None:
    """Nothing is shared between optimizers; the core works without the GIL."""

    def run(out: list[Any], seed: int) -> None:
        optimizer = VARIANTS[variant](parameters(SHAPES, seed=seed), fused=fused, **LIVELY[variant])
        train(optimizer, 15)
        out.append((seed, results(optimizer)))

    together: list[Any] = []
    threads = [threading.Thread(target=run, args=(together, seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone: list[Any] = []
    for seed in range(3):
        run(alone, seed)
    assert sorted(together, key=lambda r: r[0]) == alone


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.slow
def test_compiled_training_steps(variant: str, fused: bool) -> None:
    """The first compiled step took half a minute, with 52 graph breaks: the optimizer is none of Dynamo's business."""
    from torch._dynamo.utils import counters

    optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    plain = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
    (param, *_), (twin, *_) = all_params(optimizer), all_params(plain)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def training_step(opt: torch.optim.Optimizer, tensor: torch.Tensor) -> torch.Tensor:
        before = tensor.detach() * 2
        opt.step()
        return before + tensor.detach()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(training_step, backend=backend)
    for step in range(3):
        set_gradients(all_params(optimizer), step)
        set_gradients(all_params(plain), step)
        torch.testing.assert_close(compiled(optimizer, param), training_step(plain, twin), rtol=0, atol=0)
    assert results(optimizer) == results(plain)
    assert sum(counters["graph_break"].values()) <= 1, dict(counters["graph_break"])
    assert len(graphs) <= 2
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are not plain tensors


class Quantized(torch.Tensor):
    """As torchao's weights for int8 training: it does single operations, and none of `torch._foreach_*`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach" in func._schema.name:
            raise NotImplementedError(f"{cls.__name__} has no {func}")
        args, kwargs = tree_map_only(Quantized, lambda wrapper: wrapper.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if func._schema.name in ("aten::detach", "aten::copy_", "aten::clone", "aten::alias"):
            return tree_map_only(torch.Tensor, Quantized, result)
        return result


@pytest.mark.parametrize("shape", [(7,), (64, 1024), (1024, 64)], ids=str)
@pytest.mark.parametrize("fused", [None, False], ids=["any", "torch"])
def test_weights_without_foreach(fused: bool | None, shape: tuple[int, ...], variant: str) -> None:
    """It was an error in the middle of a step, with the step already counted."""
    plain, odd = parameters([(5, 3), shape, (2, 3, 4)]), parameters([(5, 3), shape, (2, 3, 4)])
    odd[1] = torch.nn.Parameter(Quantized(odd[1].detach().clone()))
    expected = VARIANTS[variant](plain, fused=False, **LIVELY[variant])
    optimizer = VARIANTS[variant](odd, fused=fused, **LIVELY[variant])
    for step in range(4):
        set_gradients(plain, step)
        for param, other in zip(odd, plain, strict=True):
            param.grad = other.grad.clone()
        expected.step()
        optimizer.step()
        assert optimizer.state[odd[1]]["step"].item() == step + 1
        torch.testing.assert_close(odd[1].detach().inner, plain[1].detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(odd[0], plain[0], rtol=1e-6, atol=1e-6)


class Wrapped(Quantized):
    """Stays what it is in views of it, and sees itself among arguments, not in lists of them."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*(each.inner if isinstance(each, cls) else each for each in args), **(kwargs or {}))
        return cls(result) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("fused", [None, False], ids=["any", "torch"])
def test_gradients_without_foreach(fused: bool | None, variant: str) -> None:
    """Of a plain parameter: PyTorch's fused kernel, which takes lists, would not see into such a gradient."""
    plain, odd = parameters([(40,), (40,), (5, 3)]), parameters([(40,), (40,), (5, 3)])
    expected = VARIANTS[variant](plain, fused=False, **LIVELY[variant])
    optimizer = VARIANTS[variant](odd, fused=fused, **LIVELY[variant])
    for step in range(3):
        set_gradients(plain, step)
        for param, other in zip(odd, plain, strict=True):
            param.grad = Wrapped(other.grad.clone())
        expected.step()
        optimizer.step()
    torch.testing.assert_close(odd, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [None, False], ids=["any", "torch"])
def test_small_negative_views_of_equal_shape(fused: bool | None, variant: str) -> None:
    """Imaginary parts of a conjugate: stacked they were an error in the middle of a step."""
    plain = parameters([(40,), (40,)])
    views = [torch.zeros(40, dtype=torch.complex64).conj().imag for _ in plain]
    for view, param in zip(views, plain, strict=True):
        view.copy_(param.detach())
    odd = [torch.nn.Parameter(view) for view in views]
    assert all(param.is_neg() for param in odd)
    for params in (plain, odd):
        optimizer = VARIANTS[variant](params, fused=fused if params is odd else False, **LIVELY[variant])
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
    torch.testing.assert_close([each.detach() for each in odd], [each.detach() for each in plain], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decides", [nullcontext, UnreadByTheHost], ids=["host", "device"])
def test_overflow_leaves_weights_without_foreach(decides: Any, variant: str) -> None:
    """Decided on a device it was a step of inf times 0, so nan."""
    (param,) = parameters([(7,)])
    param.data[3] = -0.0
    odd = torch.nn.Parameter(Quantized(param.detach().clone()))
    optimizer = VARIANTS[variant]([odd], **{**LIVELY[variant], "weight_decay": 0.1}, decoupled_weight_decay=True)
    odd.grad = torch.tensor([math.inf, math.nan, 1.0, 1.0, 1.0, -math.inf, 0.0])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    with decides():
        optimizer.step()
    assert torch.equal(odd.detach().inner.view(torch.int32), param.detach().view(torch.int32))


# ---------------------------------------------------------------------------------------------------------------------
# Surgery on parameters and state


@pytest.mark.parametrize("shape", [(40, 3), (256, 512)], ids=["whole path", "sampled"])
def test_points_are_pruned_and_added(shape: tuple[int, int], variant: str, fused: bool) -> None:
    """As 3D Gaussian splatting does: what has the parameter's shape is resized by a mask, what is 0-dim stays; a path
    of a sample and its walk are dropped and start anew."""
    (param,) = parameters([shape])
    optimizer = VARIANTS[variant]([param], fused=fused, **LIVELY[variant])
    train(optimizer, 3)
    keep = torch.arange(shape[0]) % 3 != 0
    state = optimizer.state.pop(param)
    new = torch.nn.Parameter(param.detach()[keep].clone())
    for key in (*MOMENTS, "path"):
        if key in state and state[key].shape == param.shape:
            state[key] = state[key][keep]
    if state["path"].shape != new.shape:
        for key in ("path", *WALK):
            del state[key]
    optimizer.state[new] = state
    optimizer.param_groups[0]["params"][0] = new
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients([new], step)
        check.step()
    assert optimizer.state[new]["step"].item() == 6


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "path"])
def test_state_whose_dtype_was_changed_in_place(name: str, variant: str, fused: bool) -> None:
    """As offloading recipes write it, `value.data = ...`: the same object, so its address tells nothing."""
    params = parameters([(5, 3)])
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    entry = optimizer.state[params[0]]
    entry[name].data = entry[name].data.double()
    train(optimizer, 1, first=2)
    assert entry[name].dtype == torch.float32


def test_a_step_that_fails_half_way_is_as_if_it_had_not_been(variant: str, fused: bool) -> None:
    """Whatever raises does so before anything is written, also where the fault is in the last tensor's state."""
    params = parameters([(5, 3), (64, 1024), (7,)])
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    train(optimizer, 2)
    set_gradients(params, 2)
    optimizer.state[params[2]]["exp_avg"] = torch.ones(8)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="param group 0, parameter 2"):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("kind", [list, tuple])
def test_params_of_a_group_are_any_sequence(kind: Any, variant: str, fused: bool) -> None:
    outcomes = []
    for each in (list, kind):
        optimizer = VARIANTS[variant](parameters(), fused=fused, **LIVELY[variant])
        optimizer.param_groups[0]["params"] = each(optimizer.param_groups[0]["params"])
        train(optimizer, 2)
        outcomes.append(results(optimizer))
    assert outcomes[0] == outcomes[1]


def test_a_parameter_that_joins_in_the_memory_of_one_in_training(variant: str) -> None:
    """The core gives both back once the second has its state."""
    results = []
    for fused in (None, False):
        base = torch.linspace(1.0, 2.0, 8)
        first, second = torch.nn.Parameter(base), torch.nn.Parameter(base.view(2, 4))
        optimizer = VARIANTS[variant]([first, second], fused=fused)
        first.grad = torch.ones(8)
        optimizer.step()
        second.grad = torch.full((2, 4), 0.5)
        for _ in range(3):
            optimizer.step()
        results.append(base)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0.0)


def test_a_step_that_the_host_skips_writes_nothing(variant: str) -> None:
    """Not even what would be written back as it was: no version counter moves, and a wrapper keeps its own bits."""
    optimizer = VARIANTS[variant](parameters(), fused=False)
    train(optimizer, 2)
    params = all_params(optimizer)
    versions = [tensor._version for param in params for tensor in (param, *optimizer.state[param].values())]
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    assert versions == [tensor._version for param in params for tensor in (param, *optimizer.state[param].values())]
