"""AdamClara written the straightforward way, as the method was first published: a yardstick, not for use.

One parameter tensor after the other, the path norm brought to the host by `.item()`, one learning rate per tensor kept
on the host. Formulas as in docs/algorithm.md, so that it does the same work as AdamClaraLocal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from clara_fused import random_walk_reference


class PerTensorAdamClara(Optimizer):
    """AdamClaraLocal with one host synchronization per tensor and step."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        smoothing: float = 0.05,
        damping: float = 2.5,
        clip: tuple[float, float] = (0.5, 1.05),
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "smoothing": smoothing, "damping": damping, "clip": clip}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_tensor(param, param.grad.float(), group)

    def _step_tensor(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"], state["scale"] = 0, 1.0
            for name in ("exp_avg", "exp_avg_sq", "path"):
                state[name] = torch.zeros_like(grad)
        state["step"] += 1
        (beta1, beta2), smoothing = group["betas"], group["smoothing"]

        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrected = state["exp_avg"] / (1 - beta1 ** state["step"])
        direction = corrected / ((state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"])
        state["path"].mul_(1 - smoothing).add_(direction, alpha=math.sqrt(smoothing * (2 - smoothing)))

        norm_sq = (state["path"] ** 2).sum().item()
        ratio = norm_sq / (param.numel() * random_walk_reference(state["step"], beta1, smoothing))
        low, high = group["clip"]
        state["scale"] *= min(max(math.exp(smoothing / (2 * group["damping"]) * (ratio - 1)), low), high)
        param.sub_(direction * (group["lr"] * state["scale"]))
