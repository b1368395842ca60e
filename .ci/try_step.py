"""A few steps of each optimizer on the compiled core, or an error: what a wheel is tried with."""

import torch

import clara_fused

for optimizer_class in (clara_fused.AdamClaraGlobal, clara_fused.AdamClaraLocal, clara_fused.AdamClaraSmoothed):
    model = torch.nn.Linear(64, 64)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, fused=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().sum().backward()
        optimizer.step()
    assert all((new != old).any() for new, old in zip(model.parameters(), before, strict=True))
    print(f"{optimizer_class.__name__}: scales {torch.cat(optimizer.lr_scales()).tolist()}")
