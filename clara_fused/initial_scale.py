"""How carefully to start where the learning rate may be far too large."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import dtensors


def cautious_initial_scale(params: Iterable[Tensor], lr: float | Tensor, relative_step: float = 0.01) -> float:
    """An `initial_scale` with which the first step is small beside the parameters, however large `lr` is.

    Adam's first step changes every element by the learning rate in force, whatever the gradient. A rate that is far too
    large destroys the initial values in the first steps, before there is a path to judge it by. With the returned scale
    the first step is at most `relative_step` of the parameters' root mean square; from there the scale finds its way.
    A rate that is not too large stays as it is.

    Steps relative to the size of what they change are those of LARS (You et al., arXiv 1708.03888), Adafactor (Shazeer
    and Stern, arXiv 1804.04235, section 8) and LAMB (You et al., arXiv 1904.00962), which take them all along.

    ::

        params = list(model.parameters())
        optimizer = AdamClaraSmoothed(params, lr=lr, initial_scale=cautious_initial_scale(params, lr))

    Args:
        params: the parameters as they are before training, of any shapes, floating-point dtypes and devices. Of
            DTensors the whole tensors count, so that all ranks get the same scale (all must call this); with other
            kinds of shards call it before sharding. Reads their values, so it waits for their devices.
        lr: the learning rate that the optimizer starts from; under AdamClaraGlobal the largest of all param groups.
        relative_step: largest size of the first step, as a fraction of the parameters' root mean square.

    Returns:
        min(1, relative_step x root mean square / lr); 1 if all parameters are 0. With the default `relative_step`, a
        rate above 100 times the root mean square gives a scale below 1e-4, which the optimizers' default `scale_bounds`
        do not admit: widen them there.

    Raises:
        ValueError: there is no parameter with an element, one is not finite, or `lr` or `relative_step` is not a finite
            number > 0.
    """
    for name, value in (("lr", float(lr)), ("relative_step", relative_step)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"Invalid {name} value: {value} (expected a finite number > 0)")
    filled = [param.detach() for param in params if param.numel() > 0]
    if not filled:
        raise ValueError("no parameter has an element, so there is no size to compare a step with")
    root_mean_square = math.hypot(*map(_norm, filled)) / math.sqrt(sum(param.numel() for param in filled))
    if not math.isfinite(root_mean_square):
        raise ValueError("a parameter is not finite, so there is no size to compare a step with")
    return min(1.0, relative_step * root_mean_square / float(lr)) if root_mean_square > 0.0 else 1.0


def _norm(tensor: Tensor) -> float:
    norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return float(dtensors.whole(norm))
