"""Measure and apply in plain PyTorch: runs everywhere, and is what the compiled core is tested against.

Temporary memory is bounded by working on pieces of tensors: see `Chunk`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import adaptation
from .batches import Location, StepInputs, TensorWork, moved
from .options import GroupOptions, Variant
from .profiling import profiler_range
from .state import moment_dtype

# Arithmetic-dtype temporaries alive at once per element of a chunk: direction and denominator or scaled gradient,
# plus squares; with a GradScaler's found_inf also copies of parameter, moments and path to go back to.
_TEMPORARIES = 3
_TEMPORARIES_WITH_UNDO = 8
# Below this a bound would only cost time.
_MIN_TEMPORARY_BYTES = 1 << 18
# On the CPU pieces that stay in a core's cache are faster than whole tensors; a GPU wants few, large launches.
_DEFAULT_TEMPORARY_BYTES = {"cpu": 4 << 20}
_DEFAULT_TEMPORARY_BYTES_ELSEWHERE = 256 << 20
_NORM_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """Equally shaped pieces (views) of tensors, small enough together to bound the temporaries of working on them.

    `rows[j]` is the index in its batch of the tensor that piece j belongs to.
    """

    rows: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    paths: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad

    @property
    def second_moments(self) -> list[Tensor]:
        """What the denominator is made from."""
        return self.max_exp_avg_sqs or self.exp_avg_sqs


def split_pieces(tensors: Sequence[Tensor], max_elements: int) -> Iterator[Sequence[Tensor]]:
    """Cut equally shaped tensors, of any strides, into views of at most `max_elements` (at least 1) elements each."""
    first = tensors[0]
    if first.numel() <= max_elements:
        yield tensors
        return
    dim = max(range(first.dim()), key=lambda d: first.shape[d])
    size = first.shape[dim]
    rows = max(1, max_elements * size // first.numel())
    for start in range(0, size, rows):
        piece = [t.narrow(dim, start, min(rows, size - start)) for t in tensors]
        yield from split_pieces(piece, max_elements) if rows == 1 else (piece,)


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Sum of squares in float64: blocks in the tensor's own precision, float64 across blocks, in a fixed order.

    Returns:
        0-dim float64 (float32 where the device has no float64).
    """
    squares = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    torch.mul(tensor, tensor, out=squares)
    squares = squares.view(-1)
    whole = squares.numel() // _NORM_BLOCK * _NORM_BLOCK
    blocks = torch.cat([squares[:whole].view(-1, _NORM_BLOCK).sum(1), squares[whole:].sum(0, keepdim=True)])
    return adaptation.fixed_order_sum(blocks.to(_scalar_dtype(tensor.device)))


def _totals(pieces: Sequence[Sequence[Tensor]]) -> Tensor:
    """The sum of each tensor's pieces, [n]."""
    return torch.stack([adaptation.fixed_order_sum(torch.stack(list(norms))) for norms in pieces])


def _scalar_dtype(device: torch.device) -> torch.dtype:
    """Dtype of per-tensor scalars: a few numbers, so full precision wherever there is any."""
    return torch.float32 if device.type == "mps" else torch.float64


def _bias_correction(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^t; expm1 keeps its relative accuracy also in float32."""
    if beta == 0.0:
        return torch.ones_like(steps)
    return -torch.expm1(steps * math.log(beta))


def _as(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors themselves if they have this dtype, else copies that do."""
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]


@contextmanager
def _undone_if(found_inf: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the tensors back, bit for bit, if `found_inf` is set; decided on the device."""
    if found_inf is None:
        yield
        return
    before = [t.clone() for t in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(found_inf != 0, old, tensor))


class TorchBatch:
    """Tensors of one param group that share device and dtypes; implements `batches.Batch`."""

    def __init__(
        self,
        works: Sequence[TensorWork],
        inputs: StepInputs,
        variant: Variant,
        max_temporary_bytes: int | None,
    ) -> None:
        self.works = works
        self.locations: Sequence[Location] = [work.location for work in works]
        self.variant = variant
        first = works[0]
        self.options: GroupOptions = inputs.options[first.group_index]
        self.device = first.param.device
        self.arithmetic = moment_dtype(first.param)
        self.lr = inputs.lrs[first.group_index]
        self.grad_scale = self._scalar(inputs.grad_scale)
        self.found_inf = self._scalar(inputs.found_inf)
        self.max_temporary_bytes = max_temporary_bytes

    def _scalar(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else moved(value, self.device).reshape(())

    # --- measure ---

    def measure(self) -> Tensor:
        """See `batches.Batch.measure`."""
        with self._profiled("measure_and_apply" if self.options.deferred else "measure"):
            return self._measure()

    def _profiled(self, verb: str) -> AbstractContextManager[Any]:
        return profiler_range(verb, self.variant, len(self.works))

    def _measure(self) -> Tensor:
        path_norms: list[list[Tensor]] = [[] for _ in self.works]
        step_norms: list[list[Tensor]] = [[] for _ in self.works]
        for chunk in self._chunks():
            of_path, of_step = self._measure_chunk(chunk)
            for row, norm in zip(chunk.rows, of_path, strict=True):
                path_norms[row].append(norm)
            if self.options.measured_walk:
                for row, norm in zip(chunk.rows, of_step, strict=True):
                    step_norms[row].append(norm)
        return torch.stack([_totals(path_norms), self._expected_path_sq(step_norms)], dim=-1)

    def _expected_path_sq(self, step_norms: list[list[Tensor]]) -> Tensor:
        """What a walk in place of the path is expected to give, [n]."""
        reference = adaptation.reference_at(self._step_numbers, self.options)
        if self.options.measured_walk:
            return _totals(step_norms) * reference
        # As arguments of kernels: a copy from the host would be repeated by a CUDA graph that has captured it, from
        # memory that has long been somebody else's.
        return torch.stack(torch._foreach_mul(list(reference.unbind()), [work.param.numel() for work in self.works]))

    def _measure_chunk(self, chunk: Chunk) -> tuple[list[Tensor], list[Tensor]]:
        """Update moments and path of a chunk.

        Returns:
            the squared norm of each piece of the path; that of each piece of the step, or nothing if nobody asks.
        """
        changed = [*chunk.exp_avgs, *chunk.exp_avg_sqs, *chunk.paths, *chunk.max_exp_avg_sqs]
        if self.options.deferred:
            changed += chunk.params
        with _undone_if(self.found_inf, changed):
            self._update_moments(chunk)
            direction = self._direction(chunk)
            self._extend_path(chunk, direction)
            step_norms = [sum_of_squares(step) for step in direction] if self.options.measured_walk else []
            if self.options.deferred:
                self._move_params(chunk, direction)
            del direction
        return [sum_of_squares(path) for path in _as(chunk.paths, self.arithmetic)], step_norms

    def _update_moments(self, chunk: Chunk) -> None:
        options, grads = self.options, self._effective_gradients(chunk)
        torch._foreach_mul_(chunk.exp_avgs, options.beta1)
        torch._foreach_add_(chunk.exp_avgs, grads, alpha=1.0 - options.beta1)
        torch._foreach_mul_(chunk.exp_avg_sqs, options.beta2)
        torch._foreach_addcmul_(chunk.exp_avg_sqs, grads, grads, 1.0 - options.beta2)
        if chunk.max_exp_avg_sqs:
            torch._foreach_maximum_(chunk.max_exp_avg_sqs, chunk.exp_avg_sqs)

    def _effective_gradients(self, chunk: Chunk) -> list[Tensor]:
        """Unscaled, signed and coupled-decayed gradients; never written into the user's."""
        options, grads = self.options, _as(chunk.grads, self.arithmetic)
        if self.grad_scale is not None:
            grads = list(torch._foreach_div(grads, self.grad_scale.to(self.arithmetic)))
        if options.maximize:
            grads = list(torch._foreach_neg(grads))
        if options.weight_decay and not options.decoupled_weight_decay:
            grads = list(torch._foreach_add(grads, _as(chunk.params, self.arithmetic), alpha=options.weight_decay))
        return grads

    def _direction(self, chunk: Chunk) -> list[Tensor]:
        """Adam's step u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)."""
        denominators = torch._foreach_div(chunk.second_moments, [self._bias_corrections2[row] for row in chunk.rows])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, self.options.eps)
        torch._foreach_mul_(denominators, [self._bias_corrections1[row] for row in chunk.rows])
        return list(torch._foreach_div(chunk.exp_avgs, denominators))

    def _extend_path(self, chunk: Chunk, direction: list[Tensor]) -> None:
        paths = _as(chunk.paths, self.arithmetic)
        torch._foreach_mul_(paths, self.options.path_decay)
        torch._foreach_add_(paths, direction, alpha=self.options.path_gain)
        if paths is not chunk.paths:
            torch._foreach_copy_(chunk.paths, paths)

    # --- adapt ---

    def adapt(self, sums: Tensor | None) -> None:
        """See `batches.Batch.adapt`."""
        states = [work.state for work in self.works]
        with self._profiled("adapt"):
            if sums is not None:
                self._write([state["lr_scale"] for state in states], self._adapted_scales(sums))
            self._write([state["step"] for state in states], self._step_numbers)

    def _adapted_scales(self, sums: Tensor) -> Tensor:
        scales = torch.stack([work.state["lr_scale"] for work in self.works])
        return adaptation.adapted_scales(scales, sums, self.options, self.variant)

    def _write(self, targets: list[Tensor], values: Tensor) -> None:
        with _undone_if(self.found_inf, targets):
            torch._foreach_copy_(targets, list(values.unbind()))

    # --- apply ---

    def apply(self) -> None:
        """See `batches.Batch.apply`."""
        if self.options.deferred:
            return
        with self._profiled("apply"):
            for chunk in self._chunks():
                with _undone_if(self.found_inf, chunk.params):
                    self._move_params(chunk, self._direction(chunk))

    def _move_params(self, chunk: Chunk, direction: list[Tensor]) -> None:
        """theta <- theta - lr mu (u + lambda theta); consumes `direction`."""
        options, params = self.options, _as(chunk.params, self.arithmetic)
        if options.weight_decay and options.decoupled_weight_decay:
            torch._foreach_add_(direction, params, alpha=options.weight_decay)
        rates = self._rates()
        torch._foreach_mul_(direction, [rates[row] for row in chunk.rows])
        torch._foreach_sub_(params, direction)
        if params is not chunk.params:
            torch._foreach_copy_(chunk.params, params)

    def _rates(self) -> Sequence[Tensor]:
        """lr * mu per tensor; lr is read here, on the device if it is a tensor."""
        scales = torch.stack([work.state["lr_scale"] for work in self.works]).to(_scalar_dtype(self.device))
        if isinstance(self.lr, Tensor):
            rates = scales * moved(self.lr, self.device).reshape(()).to(scales.dtype)
        else:
            rates = scales * self.lr
        return rates.to(self.arithmetic).unbind()

    # --- per-tensor scalars of the step ---

    @cached_property
    def _step_numbers(self) -> Tensor:
        """t of the step being taken, [n]."""
        steps = torch.stack([work.state["step"] for work in self.works])
        return steps.to(_scalar_dtype(self.device)) + 1.0

    @cached_property
    def _bias_corrections1(self) -> Sequence[Tensor]:
        return _bias_correction(self.options.beta1, self._step_numbers).to(self.arithmetic).unbind()

    @cached_property
    def _bias_corrections2(self) -> Sequence[Tensor]:
        return _bias_correction(self.options.beta2, self._step_numbers).to(self.arithmetic).unbind()

    # --- chunks ---

    def _temporary_bytes(self) -> int:
        """Scratch budget: what the user allows, and never more than one copy of the batch's parameters."""
        allowed = self.max_temporary_bytes
        if allowed is None:
            allowed = _DEFAULT_TEMPORARY_BYTES.get(self.device.type, _DEFAULT_TEMPORARY_BYTES_ELSEWHERE)
        params = sum(work.param.numel() * work.param.element_size() for work in self.works)
        return min(allowed, max(params, _MIN_TEMPORARY_BYTES))

    def _chunks(self) -> Iterator[Chunk]:
        temporaries = _TEMPORARIES if self.found_inf is None else _TEMPORARIES_WITH_UNDO
        max_elements = max(1, self._temporary_bytes() // (temporaries * self.arithmetic.itemsize))
        names = ["exp_avg", "exp_avg_sq", "path"] + (["max_exp_avg_sq"] if self.options.amsgrad else [])
        rows: list[int] = []
        pieces: list[Sequence[Tensor]] = []
        elements = 0
        for row, work in enumerate(self.works):
            tensors = [work.param.detach(), work.grad, *(work.state[name] for name in names)]
            for piece in split_pieces(tensors, max_elements):
                if rows and elements + piece[0].numel() > max_elements:
                    yield self._chunk(rows, pieces)
                    rows, pieces, elements = [], [], 0
                rows.append(row)
                pieces.append(piece)
                elements += piece[0].numel()
        if rows:
            yield self._chunk(rows, pieces)

    def _chunk(self, rows: list[int], pieces: list[Sequence[Tensor]]) -> Chunk:
        params, grads, exp_avgs, exp_avg_sqs, paths, *maximum = (list(column) for column in zip(*pieces, strict=True))
        return Chunk(rows, params, grads, exp_avgs, exp_avg_sqs, paths, maximum[0] if maximum else [])


def batches_of(
    works: Sequence[TensorWork], inputs: StepInputs, variant: Variant, max_temporary_bytes: int | None
) -> list[TorchBatch]:
    """Sort the tensors of a step into batches of equal group, device and dtypes."""
    sorted_works: dict[tuple[object, ...], list[TensorWork]] = {}
    for work in works:
        key = (work.group_index, work.param.device, work.param.dtype, work.grad.dtype)
        sorted_works.setdefault(key, []).append(work)
    return [TorchBatch(batch, inputs, variant, max_temporary_bytes) for batch in sorted_works.values()]
