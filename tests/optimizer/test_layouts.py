"""Every stride layout of parameters and gradients gives what the contiguous one gives.

The core takes dense tensors in one common layout, so that fused=None sends the others to PyTorch, each on its own.

torch.optim.Adam(fused=True) on the CPU updates the wrong elements where a gradient or parameter has other strides
(transposed, channels_last, slices); bitsandbytes does for some. These tests prevent that.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    LIVELY,
    VARIANTS,
    StepCheck,
    as_array,
    frozen,
    parameters,
    results,
    set_gradients,
    snapshot,
    train,
    unforced,
    why_not_core,
)
from hypothesis import given
from hypothesis import strategies as st

Layout = Callable[[torch.Tensor], torch.Tensor]


def holding(view: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    view.copy_(values)
    return view


# Each returns a tensor of the same values and shape (4 dimensions of size > 1) in another layout.
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: holding(x.new_empty(x.shape[::-1]).permute(*reversed(range(x.dim()))), x),
    "permuted": lambda x: holding(x.new_empty([x.shape[i] for i in (2, 0, 3, 1)]).permute(1, 3, 0, 2), x),
    "every second": lambda x: holding(x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7.0)[..., ::2], x),
    "narrowed": lambda x: holding(x.new_full((x.shape[0] + 2, *x.shape[1:]), 7.0)[1:-1], x),
    "inner narrowed": lambda x: holding(x.new_full((*x.shape[:-1], x.shape[-1] + 3), 7.0)[..., 1:-2], x),
    "misaligned": lambda x: holding(x.new_full((x.numel() + 5,), 7.0)[1 : 1 + x.numel()].view(x.shape), x),
    "misaligned by 3": lambda x: holding(x.new_full((x.numel() + 5,), 7.0)[3 : 3 + x.numel()].view(x.shape), x),
}


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(param_layout: str, grad_layout: str, dtype: torch.dtype, fused: bool) -> None:
    """Each layout of the parameter with each of the gradient; memory between the elements is not touched."""
    if fused and (reason := why_not_core("cpu", dtype)):
        pytest.skip(f"the compiled core cannot serve {dtype}: {reason}")
    for variant in VARIANTS:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn((3, 4, 5, 6), generator=generator).to(dtype)
        param = torch.nn.Parameter(LAYOUTS[param_layout](values))
        strides = param.stride()
        used = torch.zeros(storage_of(param.data).shape, dtype=torch.bool)
        used.as_strided(param.shape, strides, param.storage_offset()).fill_(True)
        gaps = storage_of(param.data)[~used].clone()
        check = StepCheck(variant, VARIANTS[variant]([param], fused=unforced(fused), **LIVELY[variant]))
        for _ in range(3):
            param.grad = LAYOUTS[grad_layout](torch.randn(values.shape, generator=generator).to(dtype))
            gradient = frozen(storage_of(param.grad))
            check.step()
            assert frozen(storage_of(param.grad)) == gradient
        assert param.stride() == strides
        assert torch.equal(storage_of(param.data)[~used], gaps)


@pytest.mark.parametrize("layout", [*LAYOUTS, "each its own"])
def test_several_of_one_shape(layout: str, variant: str, fused: bool) -> None:
    """The PyTorch back end stacks small ones; a stack of channels_last tensors is no contiguous one."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((3, 4, 5, 6), generator=generator)
    chosen = list(LAYOUTS.values()) if layout == "each its own" else [LAYOUTS[layout]] * 3
    params = [torch.nn.Parameter(lay_out(values)) for lay_out in chosen]
    optimizer = VARIANTS[variant](params, fused=unforced(fused), amsgrad=True, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for _ in range(3):
        for param, lay_out in zip(params, chosen, strict=True):
            param.grad = lay_out(torch.randn(values.shape, generator=generator))
        check.step()


@pytest.mark.parametrize("layout", ["transposed", "every second"])
def test_the_core_alone_refuses_other_layouts(layout: str, variant: str, fused: bool) -> None:
    """fused=True says which tensor, and that fused=None would serve it; nothing has changed."""
    if not fused:
        pytest.skip("PyTorch takes all layouts")
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn((3, 4, 5, 6), generator=generator)) for _ in range(2)]
    optimizer = VARIANTS[variant](params, fused=True, **LIVELY[variant])
    set_gradients(params, 0)
    optimizer.step()
    params[1].grad = LAYOUTS[layout](params[1].grad)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"param group 0, parameter 1 .*fused=True"):
        optimizer.step()
    assert snapshot(optimizer) == before


class OwnParameter(torch.nn.Parameter):
    """A class without any behaviour of its own."""


def test_the_core_alone_refuses_parameters_of_other_classes(variant: str, fused: bool) -> None:
    """It said that they share memory."""
    param = OwnParameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = VARIANTS[variant]([param], fused=fused or None)
    if not fused:
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match="parameters of a class of their own"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "every second", "inner narrowed"])
def test_a_sampled_path_of_any_layout(layout: str, dtype: torch.dtype, variant: str, fused: bool) -> None:
    outcomes = []
    for changed in (False, True):
        optimizer = VARIANTS[variant](parameters([(1100, 64)]), fused=unforced(fused), **LIVELY[variant])
        train(optimizer, 2)
        (entry,) = optimizer.state.values()
        assert entry["path"].shape == (1100, 4)
        if changed:
            entry["path"] = LAYOUTS[layout](entry["path"].to(dtype))
            assert not entry["path"].is_contiguous()
        train(optimizer, 2, first=2)
        outcomes.append(results(optimizer))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("layout", ["transposed", "every second", "misaligned"])
def test_state_of_any_layout(layout: str, variant: str, fused: bool) -> None:
    """State arrives from checkpoints in the layout that its writer chose."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((3, 4, 5, 6), generator=generator)
    param = torch.nn.Parameter(values.clone())
    optimizer = VARIANTS[variant]([param], fused=unforced(fused), **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    param.grad = torch.randn(values.shape, generator=generator)
    check.step()
    state = optimizer.state[param]
    for key in ("exp_avg", "exp_avg_sq", "path"):
        state[key] = LAYOUTS[layout](state[key])
        param.grad = torch.randn(values.shape, generator=generator)
        check.step()
    reloaded = VARIANTS[variant]([param], fused=unforced(fused), **LIVELY[variant])
    taken = optimizer.state_dict()
    for key in ("exp_avg", "exp_avg_sq", "path"):
        taken["state"][0][key] = LAYOUTS[layout](taken["state"][0][key])
    reloaded.load_state_dict(taken)
    check = StepCheck(variant, reloaded)
    param.grad = torch.randn(values.shape, generator=generator)
    check.step()


def test_expanded_gradient(variant: str, fused: bool) -> None:
    """sum().backward() gives an expanded scalar as the gradient, stride 0."""
    params = parameters([(6, 5), (9,)])
    optimizer = VARIANTS[variant](params, fused=unforced(fused), **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(3):
        for param in params:
            param.grad = torch.tensor(0.5 + step).expand(param.shape)
        check.step()


def test_gradient_in_another_layout_at_every_step(variant: str, fused: bool) -> None:
    """Caches of pointers must see a gradient replaced by one with other strides, another offset, the same address."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn((3, 4, 5, 6), generator=generator))
    optimizer = VARIANTS[variant]([param], fused=unforced(fused), **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for layout in [*LAYOUTS.values(), *reversed(LAYOUTS.values())]:
        param.grad = layout(torch.randn(param.shape, generator=generator))
        check.step()


@pytest.mark.parametrize("place", ["first", "middle", "last", "alone"])
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)], ids=str)
def test_empty_tensors_anywhere(shape: tuple[int, ...], place: str, variant: str, fused: bool) -> None:
    """apex loses pending updates when the last tensor is empty. An empty tensor's scale stays: it has no path."""
    shapes: list[tuple[int, ...]] = {
        "first": [shape, (5,), (4, 3)],
        "middle": [(5,), shape, (4, 3)],
        "last": [(5,), (4, 3), shape],
        "alone": [shape],
    }[place]
    params = parameters(shapes)
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(3):
        set_gradients(params, step)
        check.step()
    empty = params[shapes.index(shape)]
    assert optimizer.state[empty]["step"].item() == 3
    if variant != "Global" or place == "alone":
        assert optimizer.state[empty]["lr_scale"].item() == 1.0


@pytest.mark.parametrize(
    "numel", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1025]
)
def test_sizes_around_vector_widths(numel: int, fused: bool) -> None:
    for variant in VARIANTS:
        params = parameters([(numel,), (numel + 1,)])
        optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
        check = StepCheck(variant, optimizer)
        for step in range(2):
            set_gradients(params, step)
            check.step()


@pytest.mark.parametrize("numel", [4096, 8191, 16_385, 32_768, 65_537, 131_071, 196_608, 262_145])
def test_sizes_around_blocks_and_chunks(numel: int, variant: str, fused: bool) -> None:
    params = parameters([(numel,), (3,)])
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(2):
        set_gradients(params, step)
        check.step()


@pytest.mark.slow
def test_many_tensors(variant: str, fused: bool) -> None:
    """More tensors in one step than one list of arguments, or one block of a sum (1024), holds."""
    params = parameters([(1 + i % 5,) for i in range(1100)])
    optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(2):
        set_gradients(params, step)
        for param in params[step::7]:
            param.grad = None
        check.step()


def test_dtypes_mixed_in_one_optimizer(variant: str, fused: bool) -> None:
    """fused=None sends each type to whoever serves it; Global's one scale spans all of them."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    params = [parameters([(6, 5)], dtype, seed)[0] for seed, dtype in enumerate(dtypes)]
    optimizer = VARIANTS[variant](params, fused=unforced(fused), **LIVELY[variant])
    check = StepCheck(variant, optimizer)
    for step in range(4):
        set_gradients(params, step)
        check.step()
    scales = {optimizer.state[p]["lr_scale"].item() for p in params}
    assert (len(scales) == 1) == (variant == "Global")


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    order=st.permutations(range(4)),
    grad_order=st.permutations(range(4)),
    step=st.integers(1, 3),
    offset=st.integers(0, 3),
)
def test_random_views(
    fused: bool, shape: tuple[int, ...], order: list[int], grad_order: list[int], step: int, offset: int
) -> None:
    """Random permutation, stride and storage offset, sizes of one included (their strides mean nothing)."""

    def view(values: torch.Tensor, order: list[int]) -> torch.Tensor:
        axes = [axis for axis in order if axis < values.dim()]
        inverse = [axes.index(axis) for axis in range(values.dim())]
        sizes = [values.shape[axis] for axis in axes]
        size = torch.Size(sizes).numel() * step
        flat = torch.full((offset + size,), 7.0)[offset:].view(*sizes[:-1], sizes[-1] * step)[..., ::step]
        return holding(flat.permute(inverse), values)

    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(view(torch.randn(shape, generator=generator), order))
    optimizer = clara_local(param, fused)
    check = StepCheck("Local", optimizer)
    for _ in range(2):
        param.grad = view(torch.randn(shape, generator=generator), grad_order)
        check.step()


def clara_local(param: torch.nn.Parameter, fused: bool) -> torch.optim.Optimizer:
    return VARIANTS["Local"]([param], fused=unforced(fused), **LIVELY["Local"])


LARGE_LAYOUTS = ["contiguous", "channels_last", "transposed", "permuted", "every second", "misaligned"]


@pytest.mark.parametrize("grad_layout", LARGE_LAYOUTS)
@pytest.mark.parametrize("param_layout", LARGE_LAYOUTS)
def test_layouts_of_sampled_tensors(param_layout: str, grad_layout: str, fused: bool) -> None:
    """Which elements have a path is a matter of the parameter's memory, whatever the gradient's is."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((64, 32, 8, 8), generator=generator)
    param = torch.nn.Parameter(LAYOUTS[param_layout](values))
    check = StepCheck("Local", VARIANTS["Local"]([param], fused=unforced(fused), **LIVELY["Local"]))
    for _ in range(2):
        param.grad = LAYOUTS[grad_layout](torch.randn(values.shape, generator=generator))
        check.step()


def test_parameters_that_share_one_storage(variant: str, fused: bool) -> None:
    """Flattened models (FSDP1, DDP buckets): views side by side, of odd sizes, so that most are misaligned."""
    flat = torch.randn(50, generator=torch.Generator().manual_seed(0))
    alone = [torch.nn.Parameter(part.clone()) for part in flat.split([7, 1, 13, 29])]
    views = [torch.nn.Parameter(part) for part in flat.split([7, 1, 13, 29])]
    runs = []
    for params in (alone, views):
        optimizer = VARIANTS[variant](params, fused=fused, **LIVELY[variant])
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1]
    assert (as_array(flat[7]) == as_array(views[1])).all()
