"""Measure and update in plain PyTorch: runs everywhere, and is what the compiled core is tested against.

Works on blocks: a piece of one large tensor, in its own memory where that can be viewed flat, or a stack of small
tensors of equal shape, copied together because a call for each of them would cost more than the copies. So temporary
memory is bounded, and on a CPU a block stays in the last cache from its first operation to its last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import adaptation, profiling, tensors
from .options import GroupOptions, StepInputs, readable
from .scalars import TensorScalars, distribute
from .state import MOMENTS, WHOLE, Sample, in_storage_order, moment_dtype, sample_of_path
from .step import Location, TensorWork, adapt_one_scale, moved

# Bytes of an array of a block. On the CPU all of them, about a dozen, are to stay in the last cache; a GPU wants few,
# large launches.
_BLOCK_BYTES = {"cpu": 1 << 20}
_BLOCK_BYTES_ELSEWHERE = 1 << 26
_SMALL = 1 << 14  # tensors up to this size are stacked
_SUM_BLOCK = 1024  # elements whose sum is taken in the arithmetic type, and in float64 across


@dataclass(frozen=True, slots=True)
class _Block:
    """Pieces (views) of tensors, all of one shape; `rows` says which tensors of the bucket they belong to."""

    rows: slice
    params: list[Tensor]
    grads: list[Tensor]
    moments: list[list[Tensor]]  # m, v, and v's running maximum if there is one
    paths: list[Tensor]
    sample: Sample


class TorchBucket:
    """Tensors of one param group that share device and dtypes; implements `step.Bucket`."""

    def __init__(self, works: Sequence[TensorWork], inputs: StepInputs) -> None:
        first = works[0]
        group_index = first.location.group_index
        self.options: GroupOptions = inputs.options[group_index]
        self.device = first.param.device
        self._inputs = inputs
        self._dtype = moment_dtype(first.param)
        self._units = _units_of(works)
        self._works = [work for unit in self._units for work in unit]
        self.locations: Sequence[Location] = [work.location for work in self._works]
        # Whether reading scalars does not wait: they become plain numbers then.
        self._on_host = readable(first.state["step"])
        self._lr = self._scalar(inputs.lrs[group_index])
        self._moves = self._lr != 0.0
        self._grad_scale = self._scalar(inputs.grad_scale)
        found_inf = self._scalar(inputs.found_inf)
        self._skipped = isinstance(found_inf, float) and found_inf != 0.0
        self._undo = found_inf != 0.0 if isinstance(found_inf, Tensor) else None  # decided on the device
        self._scalars = TensorScalars([work.state for work in self._works], self.options, self._moves, self._undo)

    def _scalar(self, value: float | Tensor | None) -> Any:
        """A number where the host has it, else a 0-dim tensor on the bucket's device; None stays None."""
        if not isinstance(value, Tensor):
            return value
        value = moved(value.detach(), self.device).reshape(()).to(adaptation.scalar_dtype(self.device))
        return float(value) if self._on_host and readable(value) else value

    # --- the verbs ---

    def step(self) -> None:
        evidence = self.adapt(self.measure())
        if self._inputs.one_scale and not self._skipped:
            adapt_one_scale(adaptation.total_evidence([evidence]), [self._works[0].state["lr_scale"]], self._inputs)
        self.update()

    def measure(self) -> Tensor:
        with profiling.range_of("measure", len(self._works)):
            if self._skipped:
                return self._nothing(adaptation.PathSums)
            coefficients = _Coefficients(self, *self._bias_corrections, self._scalars.column("walk_moment_sq"))
            sums = torch.cat([self._measure_unit(unit, coefficients) for unit in self._blocks(sampled=True)], dim=1)
            # Filled in by kernels that have the number as an argument: a copy from the host would wait, and a CUDA
            # graph would repeat it from memory that by then belongs to something else.
            numels = [sums.new_full((len(unit),), unit[0].param.numel()) for unit in self._units]
            return torch.cat([sums, torch.cat(numels).unsqueeze(0)]).T

    def adapt(self, sums: Tensor) -> Tensor:
        with profiling.range_of("adapt", len(self._works)):
            if self._skipped:
                return self._nothing(adaptation.Evidence)
            return self._scalars.adapt(moved(sums, self.device), self._inputs.one_scale)

    def _nothing(self, columns: type[Any]) -> Tensor:
        shape = len(self._works), len(columns._fields)
        return torch.zeros(shape, dtype=adaptation.scalar_dtype(self.device), device=self.device)

    def update(self) -> None:
        if self._skipped:
            return
        with profiling.range_of("update", len(self._works)):
            rates = self._scalars.column("lr_scale").to(adaptation.scalar_dtype(self.device)) * self._lr
            coefficients = _Coefficients(self, *self._bias_corrections, rates)
            for unit in self._blocks(sampled=False):
                for block in unit:
                    self._update_block(block, coefficients)

    # --- scalars ---

    @cached_property
    def _bias_corrections(self) -> tuple[Tensor, Tensor]:
        """1 / (1 - beta1^t) and sqrt(1 - beta2^t), [n]."""
        steps = self._scalars.steps
        bias1 = adaptation.bias_correction(self.options.log_beta1, steps)
        return 1.0 / bias1, adaptation.bias_correction(self.options.log_beta2, steps).sqrt()

    # --- blocks ---

    def _blocks(self, sampled: bool) -> Iterator[list[_Block]]:
        """The blocks of each unit; `sampled`: sized by the elements that have a path."""
        limit = _BLOCK_BYTES.get(self.device.type, _BLOCK_BYTES_ELSEWHERE) // self._dtype.itemsize
        names = MOMENTS[: 3 if self.options.amsgrad else 2]
        start = 0
        for unit in self._units:
            if len(unit) == 1:
                yield list(_pieces(unit[0], start, limit, sampled, names))
            else:
                yield list(_stacks(unit, start, limit, names))
            start += len(unit)

    def _load(self, pieces: list[Tensor], sample: Sample = WHOLE, copy: bool = False) -> Tensor:
        """Pieces as an array [number of pieces, elements] in the arithmetic dtype; of one piece a view, if possible."""
        if len(pieces) == 1:
            flat = pieces[0].resolve_neg().reshape(-1)
            flat = flat if sample == WHOLE else sample.view(flat).reshape(-1)
            array = flat.unsqueeze(0)
        else:
            array = torch.stack(pieces).reshape(len(pieces), pieces[0].numel())  # of channels_last ones not contiguous
        return array.to(self._dtype, copy=copy and len(pieces) == 1)

    def _store(self, values: Tensor, pieces: list[Tensor], keep: Tensor | None) -> None:
        """Write an array back to its pieces, unless it is their memory; `keep`: leave them as they were where set."""
        if keep is not None:
            values = torch.where(keep, self._load(pieces), values)
        if len(pieces) > 1:
            distribute(values.view(len(pieces), *pieces[0].shape), pieces)
        elif not torch._C._is_alias_of(values, pieces[0]):  # type: ignore[attr-defined]
            pieces[0].copy_(values.view(pieces[0].shape))

    def _gradient(self, block: _Block, sample: Sample) -> Tensor:
        """The unscaled, signed and coupled-decayed gradient; never written into the user's."""
        options, param = self.options, block.params[0]
        coupled = options.weight_decay != 0.0 and not options.decoupled_weight_decay
        own_shape = coupled and tensors.is_wrapper(param)
        grad = self._load(block.grads, WHOLE if own_shape else sample)
        if self._grad_scale is not None:
            grad = grad / self._grad_scale
        if options.maximize:
            grad = grad.neg()
        if own_shape:
            grad = self._load([grad.view(param.shape).add(param, alpha=options.weight_decay)], sample)
        elif coupled:
            grad = grad.add(self._load(block.params, sample), alpha=options.weight_decay)
        return grad

    def _new_moments(self, moments: list[Tensor], grad: Tensor, in_place: bool) -> list[Tensor]:
        m, v, *maximum = moments
        beta1, beta2 = self.options.beta1, self.options.beta2
        m = m.lerp_(grad, 1.0 - beta1) if in_place else m.lerp(grad, 1.0 - beta1)
        v = (v.mul_(beta2) if in_place else v.mul(beta2)).addcmul_(grad, grad, value=1.0 - beta2)
        return [m, v, *(torch.maximum(each, v, out=each if in_place else None) for each in maximum)]

    # --- measure ---

    def _measure_unit(self, blocks: list[_Block], coefficients: _Coefficients) -> Tensor:
        """The columns of `adaptation.PathSums` but the last, [8, tensors of the unit]."""
        parts = [self._measure_block(block, coefficients) for block in blocks]
        if len(parts) == 1:
            return parts[0]
        if blocks[0].rows != blocks[1].rows:  # stacks
            return torch.cat(parts, dim=1)
        return adaptation.fixed_order_sum(torch.stack(parts))

    def _measure_block(self, block: _Block, coefficients: _Coefficients) -> Tensor:
        sample, options = block.sample, self.options
        inverse_bias1, root_bias2, walk_moment_sq = coefficients.of(block.rows)
        grad = self._gradient(block, sample)
        moments_before = [self._load(pieces, sample) for pieces in block.moments]
        moments = self._new_moments(moments_before, grad, in_place=False)
        m, second, m_before, second_before = moments[0], moments[-1], moments_before[0], moments_before[-1]
        del moments  # under amsgrad one more than is needed
        terms, padded_terms = self._terms(*grad.shape)
        # The first four are squared, the others but the last two multiplied with the weight, when all is known.
        path, step, unit_grad, before, expected, path_grad, denominator, denominator_before = terms
        torch.sqrt(second, out=denominator)
        torch.sqrt(second_before, out=denominator_before)
        terms[-2:].div_(root_bias2).add_(options.eps)
        unit_m = m.div_(denominator)
        torch.div(grad, denominator, out=unit_grad)
        torch.mul(unit_m, inverse_bias1, out=step)
        adaptation.expected_moment_sq(
            m_before, denominator_before, unit_m, unit_grad, walk_moment_sq, options.beta1, out=expected
        )
        before.copy_(self._load(block.paths))
        torch.mul(before, unit_grad, out=path_grad)
        self._extend_path(before, step, out=path)
        self._store(path, block.paths, self._undo)
        terms[:4].square_()
        weight, weight_sq = terms[-2:]
        if adaptation.in_adams_metric(options):  # of an element whose v has overflowed 0: it moves no more
            torch.nan_to_num(denominator, nan=math.nan, posinf=0.0, out=weight)
            terms[:-2].mul_(weight)
        else:
            weight.fill_(1.0)
        torch.mul(weight, weight, out=weight_sq)
        sums = self._row_sums(padded_terms)
        share = sample.kept / sample.run
        sums /= share
        sums[-1] /= share
        return sums

    def _terms(self, rows: int, numel: int) -> tuple[Tensor, Tensor]:
        """Memory for what is summed, [sums, rows, numel]; and the same padded with zeros to whole blocks of sums."""
        padded = numel if numel <= _SUM_BLOCK else math.ceil(numel / _SUM_BLOCK) * _SUM_BLOCK
        terms = torch.empty(len(adaptation.PathSums._fields) - 1, rows, padded, dtype=self._dtype, device=self.device)
        terms[:, :, numel:] = 0.0
        return terms[:, :, :numel], terms

    def _row_sums(self, terms: Tensor) -> Tensor:
        """Sums over the last dimension, of at most `_SUM_BLOCK` elements or a multiple of it."""
        if terms.shape[-1] == 0:
            return terms.sum(-1, dtype=adaptation.scalar_dtype(self.device))
        # Rows of a bounded length, which PyTorch does not split over threads; then rows of doubles.
        blocks = terms.view(*terms.shape[:-1], -1, min(terms.shape[-1], _SUM_BLOCK)).sum(-1)
        return blocks.to(adaptation.scalar_dtype(self.device)).sum(-1)

    def _extend_path(self, before: Tensor, step: Tensor, out: Tensor) -> None:
        """The path with this step; where lr is 0 nothing has moved."""
        smoothing = self.options.smoothing
        torch.mul(before, 1.0 - smoothing, out=out).add_(step, alpha=adaptation.path_gain(smoothing))
        if self._moves is not True:
            out.copy_(torch.where(self._moves, out, before) if isinstance(self._moves, Tensor) else before)

    # --- update ---

    def _update_block(self, block: _Block, coefficients: _Coefficients) -> None:
        grad, moments = self._gradient(block, WHOLE), [self._load(pieces) for pieces in block.moments]
        numbers = coefficients.of(block.rows)
        has_memory = not any(map(tensors.is_wrapper, (block.params[0], grad))) and not grad._is_zerotensor()
        if self._undo is None and isinstance(numbers[-1], float) and has_memory:
            moments = self._fused_update(block, grad, moments, numbers[-1])
        else:
            moments = self._composed_update(block, grad, moments, *numbers)
        for values, pieces in zip(moments, block.moments, strict=True):
            self._store(values, pieces, self._undo)

    def _fused_update(self, block: _Block, grad: Tensor, moments: list[Tensor], rate: float) -> list[Tensor]:
        """Of one tensor of the CPU, at a rate that is known, with the kernel that torch.optim.AdamW(fused=True) calls.

        Returns the new moments.
        """
        options = self.options
        # The kernel takes memory to be without gaps.
        param, grad, *moments = [each.contiguous() for each in (self._load(block.params), grad, *moments)]
        torch._fused_adamw_(
            [param],
            [grad],
            moments[:1],
            moments[1:2],
            moments[2:],
            [self._works[block.rows.start].state["step"]],
            lr=rate,
            beta1=options.beta1,
            beta2=options.beta2,
            weight_decay=options.weight_decay if options.decoupled_weight_decay else 0.0,
            eps=options.eps,
            amsgrad=options.amsgrad,
            maximize=False,  # `_gradient` has seen to it
        )
        torch.autograd.graph.increment_version(param)  # else a backward pass would not notice; see CoreBucket.update
        self._store(param, block.params, None)
        return moments

    def _composed_update(
        self, block: _Block, grad: Tensor, moments: list[Tensor], inverse_bias1: Any, root_bias2: Any, rate: Any
    ) -> list[Tensor]:
        """Of any tensors, operation by operation; returns the new moments."""
        options, undo = self.options, self._undo
        moments = self._new_moments(moments, grad, in_place=undo is None)
        m, second = moments[0], moments[-1]
        # theta - rate * (m / bias1) / (sqrt(v) / root_bias2 + eps), with root_bias2 moved out of the denominator.
        denominator = second.sqrt().add_(options.eps * root_bias2)
        gain = -rate * inverse_bias1 * root_bias2
        if tensors.is_wrapper(block.params[0]):
            self._move_wrapper(block.params[0], m, denominator, gain, rate)
            return moments
        param = self._load(block.params, copy=undo is not None)
        if options.weight_decay and options.decoupled_weight_decay:
            param.mul_(1.0 - rate * options.weight_decay)
        param.add_(torch.div(m, denominator, out=denominator).mul_(gain))
        self._store(param, block.params, undo)
        return moments

    def _move_wrapper(self, param: Tensor, m: Tensor, denominator: Tensor, gain: Any, rate: Any) -> None:
        """With the operations that torch.optim.Adam uses, in the parameter's own shape: a subclass knows no others."""
        options, step = self.options, m * gain
        if self._undo is not None:  # inf - inf and inf * 0 are no steps of 0; -0.0 leaves the sign of a 0
            step, denominator = torch.where(self._undo, -0.0, step), torch.where(self._undo, 1.0, denominator)
            rate = torch.where(self._undo, 0.0, rate)
        if options.weight_decay and options.decoupled_weight_decay:
            decay = 1.0 - rate * options.weight_decay
            param.mul_(decay.reshape(()) if isinstance(decay, Tensor) else decay)
        param.addcdiv_(step.view(param.shape), denominator.view(param.shape))


class _Coefficients:
    """Numbers of each tensor, for a block: plain ones where the host has them and there is one tensor, else columns."""

    def __init__(self, bucket: TorchBucket, *numbers: Tensor) -> None:
        self._columns = [each.to(bucket._dtype).unsqueeze(1) for each in numbers]
        self._numbers = [each.tolist() for each in numbers] if bucket._on_host else None

    def of(self, rows: slice) -> list[Any]:
        if self._numbers is not None and rows.stop - rows.start == 1:
            return [each[rows.start] for each in self._numbers]
        return [each[rows] for each in self._columns]


def _units_of(works: Sequence[TensorWork]) -> list[list[TensorWork]]:
    """Small tensors of equal shape together, all others alone."""
    units: dict[Any, list[TensorWork]] = {}
    for index, work in enumerate(works):
        param, path = work.param, work.state["path"]
        plain = tensors.is_plain(param) and tensors.is_plain(work.grad) and not param.is_neg()
        key = param.shape if plain and param.numel() <= _SMALL and path.shape == param.shape else index
        units.setdefault(key, []).append(work)
    return list(units.values())


def _stacks(unit: list[TensorWork], start: int, limit: int, names: Sequence[str]) -> Iterator[_Block]:
    count = max(1, limit // max(1, unit[0].param.numel()))
    for first in range(0, len(unit), count):
        works = unit[first : first + count]
        rows = slice(start + first, start + first + len(works))
        params, grads = [work.param for work in works], [work.grad for work in works]
        *moments, paths = [[work.state[name] for work in works] for name in (*names, "path")]
        yield _Block(rows, params, grads, moments, paths, WHOLE)


def _pieces(work: TensorWork, row: int, limit: int, sampled: bool, names: Sequence[str]) -> Iterator[_Block]:
    """Cut a tensor into views: flat ones where all of its tensors lie in memory alike, else along the outermost
    dimension of the moments."""
    views = [work.param.detach(), work.grad.detach(), *(work.state[name] for name in names)]
    path = work.state["path"]
    sample = sample_of_path(work.param, path) or WHOLE
    if sample == WHOLE:
        views.append(path)
    else:
        path = path.view(-1)
    size, per_row = work.param.numel(), 1  # of the dimension that is cut, and elements of one of its indices
    if tensors.is_wrapper(work.param):
        size, per_row, limit = 1, size, size  # whole, in its own shape
    else:
        m = views[2]
        if all(view.stride() == m.stride() and not view.is_neg() for view in views) and tensors.is_dense(m):
            views = [in_storage_order(view) for view in views]
        elif m.dim():
            order = sorted(range(m.dim()), key=lambda dim: (m.stride(dim), m.shape[dim]), reverse=True)
            views = [view.permute(order) for view in views]
            size, per_row = views[0].shape[0], size // max(1, views[0].shape[0])
    elements = limit * sample.run // sample.kept if sampled else limit
    step = max(1, elements // max(1, per_row))
    if per_row % sample.run:  # indices of the first dimension make a run
        step = max(sample.run, step // sample.run * sample.run)
    rows = slice(row, row + 1)
    for first in range(0, max(size, 1), step):
        count = min(step, size - first)
        pieces = views if count == size else [view.narrow(0, first, count) for view in views]
        if sample != WHOLE:
            scale = per_row * sample.kept
            pieces = [*pieces, path.narrow(0, first * scale // sample.run, count * scale // sample.run)]
        params, grads, *moments, paths = [[piece] for piece in pieces]
        yield _Block(rows, params, grads, moments, paths, sample)


def buckets_of(works: Sequence[TensorWork], inputs: StepInputs) -> list[TorchBucket]:
    """Sort the tensors of a step into buckets of equal group, device and dtypes.

    Parameters that share memory with another one come alone, and in order, so that one step follows the other.
    """
    alone = tensors.overlapping([work.param for work in works])
    sorted_works: dict[Any, list[TensorWork]] = {}
    for index, work in enumerate(works):
        key = (work.location.group_index, work.param.device, work.param.dtype, work.grad.dtype)
        sorted_works.setdefault(index if index in alone else key, []).append(work)
    return [TorchBucket(bucket, inputs) for bucket in sorted_works.values()]
