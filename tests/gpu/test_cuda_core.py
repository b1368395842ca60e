"""The CUDA kernels on a device.

- results: every variant, storage type and option against float64 formulas; samples, layouts and alignments; bitwise
  repeats; an element count beyond 2^31; several devices
- cost: launches per step, no host synchronization, no allocation
- how steps are run: CUDA graphs, streams, two optimizers, a default device, GradScaler, resumed training
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import (
    LIVELY,
    VARIANTS,
    StepCheck,
    all_params,
    results,
    set_gradients,
    snapshot,
    through_file,
    train,
)
from helpers import parameters as cpu_parameters

from clara_fused.adaptation import total_evidence
from clara_fused.step import adapt_one_scale

# Around the vectors of 4, the block's run of 1024 and the chunks of 2048 and 4096 elements that the kernels work in.
BORDER_SHAPES = [(0,), (), (1,), (3,), (4,), (5, 3), (127,), (1023,), (1024,), (1025,), (2047,), (2048,), (2049,)]
BORDER_SHAPES += [(4095,), (4096,), (4097,), (8193,), (2, 4096), (16389,), (0, 7)]
# With a sample of their elements: runs of 1024, 64 and 512 elements; and one that is large, but odd.
SAMPLED_SHAPES = [(65, 1024), (1100, 64), (69_632,), (24, 3, 32, 32), (257, 257)]
FEW_SHAPES = [(7,), (33, 5), (0,), (8195,), (1100, 64)]


def parameters(
    device: torch.device, shapes: Iterable[Any] = FEW_SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().to(device)) for p in cpu_parameters(shapes, dtype, seed)]


def optimizer_for(variant: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    return VARIANTS[variant](params, **{**LIVELY[variant], "fused": True, **options})


# ---------------------------------------------------------------------------------------------------------------------
# Results

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no decay": {"weight_decay": 0.0},
    "decoupled decay": {"decoupled_weight_decay": True},
    "decoupled decay, amsgrad": {"decoupled_weight_decay": True, "amsgrad": True},
    "no rate": {"lr": 0.0},
    "fixed reference": {"reference": 1.0},
    "not clipped": {"clip": None},
    "bounded": {"scale_bounds": (0.9, 1.1)},
    "not adapted": {"adapt_lr": False},
    "all elements have a path": {"path_fraction": 1.0},
    "two elements in 64": {"path_fraction": 1 / 32},
    "one element in 64": {"path_fraction": 1 / 64},
}


@pytest.mark.parametrize("options", list(OPTIONS))
def test_options_against_the_formulas(variant: str, options: str, device: torch.device) -> None:
    optimizer = optimizer_for(variant, parameters(device), **OPTIONS[options])
    check = StepCheck(variant, optimizer)
    for step in range(4):
        set_gradients(all_params(optimizer), step)
        check.step()


@pytest.mark.parametrize("shapes", ["borders", "sampled"])
@pytest.mark.parametrize("wide_grad", [False, True], ids=["same-grad", "float32-grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_types_against_the_formulas(
    dtype: torch.dtype, wide_grad: bool, shapes: str, variant: str, device: torch.device
) -> None:
    params = parameters(device, BORDER_SHAPES if shapes == "borders" else SAMPLED_SHAPES, dtype)
    if wide_grad:
        if dtype == torch.float32:
            pytest.skip("the same as same-grad")
        if not hasattr(params[0], "grad_dtype"):
            pytest.skip("this torch has no grad_dtype (new in 2.10)")
        for param in params:
            param.grad_dtype = torch.float32
    optimizer = optimizer_for(variant, params)
    check = StepCheck(variant, optimizer)
    for step in range(3):
        if wide_grad:
            generator = torch.Generator().manual_seed(step)
            for param in params:
                # Values that the parameter's type could not hold.
                param.grad = (torch.randn(param.shape, generator=generator) + 0.7).to(device)
        else:
            set_gradients(params, step)
        check.step()


def test_samples_have_their_shapes(device: torch.device) -> None:
    params = parameters(device, SAMPLED_SHAPES)
    optimizer = optimizer_for("Local", params)
    train(optimizer, 1)
    shapes = [tuple(optimizer.state[p]["path"].shape) for p in params]
    assert shapes == [(65, 64), (1100, 4), (69_632 // 16,), (24, 192), (257, 257)]


def test_groups_and_joining_parameters_against_the_formulas(variant: str, device: torch.device) -> None:
    shared = {"smoothing": 0.3, "damping": 0.7, "clip": (0.5, 1.6)}
    groups = [
        {"params": parameters(device, seed=1), "lr": 0.1, "betas": (0.8, 0.99)},
        {"params": parameters(device, seed=2, dtype=torch.bfloat16), "weight_decay": 0.2, "amsgrad": True},
        {"params": parameters(device, seed=3), "lr": torch.tensor(0.02, device=device), "maximize": True},
        {"params": parameters(device, seed=4), "lr": torch.tensor(0.02, dtype=torch.float64)},
    ]
    optimizer = optimizer_for(variant, groups, **shared)
    check = StepCheck(variant, optimizer)
    for step in range(4):
        set_gradients(all_params(optimizer), step)
        if step < 2:
            groups[2]["params"][0].grad = None
        check.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_alignments_against_the_formulas(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    flat = torch.randn(200_000, device=device).to(dtype)
    views = [
        flat[1:1026],
        flat[2000:12003].view(-1),
        flat[12_003 : 12_003 + 60 * 70].view(60, 70).t(),
        flat[20_002 : 20_002 + 2 * 3 * 20 * 30].view(2, 20, 30, 3).permute(0, 3, 1, 2),
        flat[30_001 : 30_001 + 70 * 1024].view(70, 1024),
    ]
    optimizer = optimizer_for(variant, [torch.nn.Parameter(view) for view in views])
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(all_params(optimizer), step)
        # Laid out as their parameters, and every other one at another alignment.
        for index, param in enumerate(all_params(optimizer)):
            memory = torch.empty(param.numel() + 1, dtype=dtype, device=device)
            param.grad = memory.as_strided(param.size(), param.stride(), index % 2).copy_(param.grad)
        check.step()


def test_what_the_core_cannot_take_goes_to_pytorch(variant: str, device: torch.device) -> None:
    with_gaps = torch.nn.Parameter(torch.randn(4000, device=device)[::2])
    optimizer = optimizer_for(variant, [with_gaps, *parameters(device)], fused=None)
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(all_params(optimizer), step)
        check.step()


def test_same_bits_every_time_on_any_stream_in_any_order(variant: str, device: torch.device) -> None:
    shapes = [(300, 400), (12_345,), (7,), (8192,), (90, 1024)] * 5

    def run(stream: torch.cuda.Stream, reverse: bool) -> Any:
        params = parameters(device, shapes)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            order = params[::-1] if reverse else params
            optimizer = optimizer_for(variant, order)
            for step in range(10):
                set_gradients(params, step)
                optimizer.step()
        torch.cuda.synchronize()
        state = [optimizer.state[p] for p in params]
        return [p.detach().cpu() for p in params], [{k: v.cpu() for k, v in s.items()} for s in state]

    first = run(torch.cuda.current_stream(), False)
    for again in (run(torch.cuda.current_stream(), False), run(torch.cuda.Stream(), True)):
        assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
        for a, b in zip(first[1], again[1], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_verbs_one_by_one_do_what_a_step_does(variant: str, device: torch.device) -> None:
    """As sharded parameters have them."""
    outcomes = []
    for apart in (False, True):
        optimizer = optimizer_for(variant, parameters(device))
        train(optimizer, 1)
        for step in range(1, 4):
            set_gradients(all_params(optimizer), step)
            if not apart:
                optimizer.step()
                continue
            with torch.no_grad():
                inputs = optimizer._options.read(optimizer.param_groups)
                (bucket,) = optimizer._gather(inputs)
                evidence = bucket.adapt(bucket.measure())
                if variant == "Global":
                    adapt_one_scale(total_evidence([evidence]), optimizer._shared_scales().values(), inputs)
                bucket.update()
        outcomes.append(results(optimizer))
    assert outcomes[0] == outcomes[1]


def test_more_tensors_than_a_launch_takes(variant: str, device: torch.device) -> None:
    outcomes = []
    for fused in (True, False):
        params = parameters(device, [(5,), (130,)] * 2100)
        optimizer = optimizer_for(variant, params, fused=fused)
        train(optimizer, 2)
        outcomes.append(torch.cat([param.detach().flatten() for param in params]))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [(2**31 + 3,), (2**21 + 9, 1024)], ids=["whole path", "sample"])
def test_more_elements_than_32_bits_count(shape: tuple[int, ...], device: torch.device) -> None:
    """Some rows against the same rows in small tensors, bit for bit; the scale against PyTorch's norm of the path."""
    count = math.prod(shape)
    sampled = len(shape) == 2
    needed = (12.5 if sampled else 16) * count + 2**31
    if torch.cuda.mem_get_info(device)[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    rows = 8 if sampled else 9000
    windows = [slice(0, rows), slice(shape[0] // 2, shape[0] // 2 + rows), slice(shape[0] - rows, shape[0])]
    values = torch.linspace(-1.0, 1.0, rows * math.prod(shape[1:]), dtype=torch.bfloat16, device=device)
    values = values.view(rows, *shape[1:])
    large = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device))
    large.grad = torch.full_like(large, 0.5)
    for window in windows:
        large.data[window] = values
        large.grad[window] = values.flip(0)
    small = []
    for window in windows:
        small.append(torch.nn.Parameter(large.data[window].clone()))
        small[-1].grad = large.grad[window].clone()

    smoothing, damping, of_walk = 0.3, 0.7, 0.5
    options = {"smoothing": smoothing, "damping": damping, "clip": None, "reference": of_walk}
    optimizer = optimizer_for("Local", [large], **options, adapt_lr=False)
    reference = optimizer_for("Local", small, **options, adapt_lr=False)
    for _ in range(2):
        optimizer.step()
        reference.step()
        for window, param in zip(windows, small, strict=True):
            assert torch.equal(large.detach()[window], param.detach())
            for key in ("exp_avg", "exp_avg_sq", "path"):
                expected = reference.state[param][key]
                if key == "path" and sampled:
                    expected = expected[:, :64]
                assert torch.equal(optimizer.state[large][key][window], expected)

    optimizer.param_groups[0]["adapt_lr"] = True
    optimizer.step()
    path = optimizer.state[large]["path"].view(-1)
    norm = sum(path[i : i + 2**26].double().square().sum().item() for i in range(0, path.numel(), 2**26))
    factor = math.exp(smoothing / (2 * damping) * (norm / (path.numel() * of_walk) - 1))
    assert optimizer.state[large]["lr_scale"].item() == pytest.approx(factor, rel=1e-6)


def test_several_devices_share_the_global_scale_and_keep_the_current_one(variant: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.cuda.set_device(0)
    params = parameters(torch.device("cuda:1"), seed=1) + parameters(torch.device("cuda:0"), seed=2)
    optimizer = optimizer_for(variant, params)
    check = StepCheck(variant, optimizer)
    for step in range(4):
        set_gradients(params, step)
        check.step()
        assert torch.cuda.current_device() == 0
    if variant == "Global":
        assert len({optimizer.state[p]["lr_scale"].item() for p in params}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def kernels_of(step: Callable[[], Any]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # Some versions also tell of annotations, and of synchronizations.
    return [name for name in on_device if not name.startswith(("clara.", "Optimizer.")) and not name.endswith(" Sync")]


@pytest.mark.parametrize("count", [1, 300, 3000])
def test_launches_do_not_grow_with_the_tensors(count: int, variant: str, device: torch.device) -> None:
    params = parameters(device, [(5,)] * count)
    optimizer = optimizer_for(variant, params)
    set_gradients(params, 0)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    kernels = kernels_of(optimizer.step)
    assert 0 < len(kernels) <= 3, kernels
    assert all("clara" in kernel for kernel in kernels), kernels


def test_a_step_neither_waits_for_the_device_nor_allocates(variant: str, device: torch.device) -> None:
    params = parameters(device) + parameters(device, dtype=torch.bfloat16)
    optimizer = optimizer_for(variant, params, lr=torch.tensor(0.01, device=device))
    set_gradients(params, 0)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()

    def memory() -> tuple[int, int]:
        statistics = torch.cuda.memory_stats(device)
        # Global adds the evidence of its two buckets with PyTorch, which allocates from torch's pool, and frees again.
        counted = "allocation.all.current" if variant == "Global" else "allocation.all.allocated"
        return statistics[counted], statistics["reserved_bytes.all.current"]

    before = memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            optimizer.param_groups[0]["betas"] = (0.9, 0.999 - 0.001 * step)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert memory() == before


def test_fresh_gradients_and_telemetry_do_not_wait_for_the_device(variant: str, device: torch.device) -> None:
    params = parameters(device)
    optimizer = optimizer_for(variant, params)
    fresh = []
    for step in range(4):
        set_gradients(params, step)
        fresh.append([p.grad for p in params])
    torch.cuda.synchronize()
    for param, grad in zip(params, fresh[0], strict=True):
        param.grad = grad
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grads in fresh[1:]:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
            optimizer.effective_lrs()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------
# How steps are run


def test_a_captured_step_replays_with_new_gradients_and_learning_rates(variant: str, device: torch.device) -> None:
    def prepared() -> tuple[list[torch.nn.Parameter], torch.Tensor, torch.optim.Optimizer]:
        params = parameters(device) + parameters(device, dtype=torch.bfloat16)
        lr = torch.tensor(0.01, device=device)
        optimizer = optimizer_for(variant, params, lr=lr)
        for param in params:
            param.grad = torch.zeros_like(param)
        return params, lr, optimizer

    def load(params: list[torch.nn.Parameter], step: int) -> None:
        shadows = [torch.nn.Parameter(p.detach()) for p in params]
        set_gradients(shadows, step)
        for param, shadow in zip(params, shadows, strict=True):
            param.grad.copy_(shadow.grad)

    eager_params, eager_lr, eager = prepared()
    graph_params, graph_lr, graphed = prepared()
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for step in range(3):
            load(graph_params, step)
            graphed.step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for step in range(3):
        load(eager_params, step)
        eager.step()
    for step in range(3, 9):
        for lr in (eager_lr, graph_lr):
            lr.fill_(0.01 / step)
        load(eager_params, step)
        eager.step()
        load(graph_params, step)
        graph.replay()
    torch.cuda.synchronize()
    assert results(graphed) == results(eager)


def captured_step(optimizer: torch.optim.Optimizer) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def test_a_graph_survives_steps_with_other_gradients(variant: str, device: torch.device) -> None:
    """The table that a captured step uses stays, whatever other steps need."""
    outcomes = []
    for replayed in (True, False):
        params = parameters(device)
        optimizer = optimizer_for(variant, params)
        set_gradients(params, 0)
        optimizer.step()
        step = captured_step(optimizer).replay if replayed else optimizer.step
        step()
        grad, params[0].grad = params[0].grad, None
        optimizer.step()
        params[0].grad = grad
        torch.cuda.synchronize()
        # Whatever has been freed is handed out again, and overwritten.
        waste = [torch.full((size,), 0x7F, dtype=torch.uint8, device=device) for size in (512, 1024, 2048, 4096) * 50]
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        del waste
        outcomes.append(results(optimizer))
    assert outcomes[0] == outcomes[1]


def test_a_first_step_cannot_be_captured(variant: str, device: torch.device) -> None:
    params = parameters(device)
    optimizer = optimizer_for(variant, params)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        captured_step(optimizer)
    torch.cuda.synchronize()
    check = StepCheck(variant, optimizer)
    check.step()


def test_steps_of_pytorch_operations_can_be_captured(variant: str, device: torch.device) -> None:
    outcomes = []
    for replayed in (True, False):
        params = parameters(device, FEW_SHAPES, torch.float64)
        optimizer = optimizer_for(variant, params, fused=False)
        set_gradients(params, 0)
        optimizer.step()
        step = captured_step(optimizer).replay if replayed else optimizer.step
        torch.empty(64, pin_memory=True).fill_(float("nan"))  # freed pinned memory is somebody else's
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        outcomes.append(results(optimizer))
    assert outcomes[0] == outcomes[1]


def test_an_optimizer_moves_from_stream_to_stream(variant: str, device: torch.device) -> None:
    outcomes = []
    for streams in ([torch.cuda.current_stream()], [torch.cuda.Stream() for _ in range(3)]):
        optimizer = optimizer_for(variant, parameters(device))
        for step in range(6):
            set_gradients(all_params(optimizer), step % 2)
            torch.cuda.synchronize()
            with torch.cuda.stream(streams[step % len(streams)]):
                optimizer.step()
            torch.cuda.synchronize()
        outcomes.append(results(optimizer))
    assert outcomes[0] == outcomes[1]


def test_two_optimizers_at_once_do_not_meet(variant: str, device: torch.device) -> None:
    outcomes = []
    for together in (True, False):
        optimizers = [optimizer_for(variant, parameters(device, seed=seed)) for seed in (1, 2)]
        streams = [torch.cuda.Stream() for _ in optimizers]
        for optimizer in optimizers:
            set_gradients(all_params(optimizer), 0)
        torch.cuda.synchronize()
        if together:
            for _ in range(20):
                for optimizer, stream in zip(optimizers, streams, strict=True):
                    with torch.cuda.stream(stream):
                        optimizer.step()
        else:
            for optimizer in optimizers:
                for _ in range(20):
                    optimizer.step()
        torch.cuda.synchronize()
        outcomes.append([results(optimizer) for optimizer in optimizers])
    assert outcomes[0] == outcomes[1]


def test_a_default_device_changes_nothing(variant: str, device: torch.device) -> None:
    outcomes = []
    for default in ("cuda", "cpu"):
        params = parameters(device, seed=1)
        for step in range(3):
            set_gradients(params, step)
            with torch.device(default):
                if step == 0:
                    optimizer = optimizer_for(variant, params, lr=torch.tensor(0.01, device="cpu"))
                optimizer.step()
                assert all(scales.device == device for scales in optimizer.lr_scales())
                optimizer.load_state_dict(optimizer.state_dict())
        outcomes.append(results(optimizer))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("fused_amp", [False, True], ids=["skipped by the scaler", "skipped on the device"])
def test_gradient_scaler_with_an_overflow(variant: str, fused_amp: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).to(device)
    inputs = torch.randn(256, 20, device=device)
    targets = inputs[:, :1] * 2 - inputs[:, 1:2]
    optimizer = VARIANTS[variant](model.parameters(), lr=3e-3, initial_scale=1.0, fused=True)
    optimizer.enable_fused_amp(fused_amp)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1000)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
        scaler.scale(loss).backward()
        if step == 30:
            next(model.parameters()).grad[0, 0] = float("inf")
            before, scale = snapshot(optimizer), scaler.get_scale()
        scaler.step(optimizer)
        if step == 30:
            after = snapshot(optimizer)
            assert after["params"] == before["params"] and after["state"] == before["state"]
        scaler.update()
        if step == 30:
            assert scaler.get_scale() == scale / 2
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state[next(model.parameters())]["step"].item() == 59


def test_a_resumed_run_ends_with_the_same_bits(variant: str, device: torch.device) -> None:
    params = parameters(device) + parameters(device, dtype=torch.bfloat16, seed=5)
    whole = optimizer_for(variant, params)
    train(whole, 5)
    saved = through_file(whole.state_dict())
    resumed_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    train(whole, 5, first=5)
    resumed = optimizer_for(variant, resumed_params)
    resumed.load_state_dict(copy.deepcopy(saved))
    train(resumed, 5, first=5)
    assert results(resumed) == results(whole)


def test_the_core_agrees_with_pytorch_operations(variant: str, device: torch.device) -> None:
    fused = optimizer_for(variant, parameters(device, BORDER_SHAPES + SAMPLED_SHAPES))
    plain = optimizer_for(variant, parameters(device, BORDER_SHAPES + SAMPLED_SHAPES), fused=False)
    for optimizer in (fused, plain):
        train(optimizer, 20)
    for a, b in zip(all_params(fused), all_params(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
