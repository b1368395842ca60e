"""The frameworks people use, really run on the CPU: Hugging Face Trainer, accelerate, Lightning, AveragedModel.

A framework that is not installed (`pip install clara-fused[frameworks]`) skips its tests.
"""

from __future__ import annotations

import copy
import csv
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from sharded_models import LAYOUTS, LIVELY, VARIANTS, data, full_parameters, make_model, on_all_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import clara_fused
from clara_fused.integrations.telemetry import find_optimizer

# Frameworks warn about each other and about machines without accelerators; that is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")


def assert_equal_tensors(got: Any, expected: Any) -> None:
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- Hugging Face Trainer --------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = data(index, torch.float32)
        return {"x": x[0], "labels": y[0]}


class Regression(nn.Module):
    """What the Trainer wants of a model: a loss among its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model(torch.float32)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        prediction = self.inner(x)
        return {"loss": nn.functional.mse_loss(prediction, labels), "logits": prediction}


def hf_trainer(folder: Path, variant: str, max_steps: int = 12, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    from clara_fused.integrations.transformers import AdamClaraCallback, adam_clara

    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=0.02,
        weight_decay=0.1,
        adam_beta2=0.99,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=2,
        save_steps=6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        **arguments,
    )
    return transformers.Trainer(
        model=Regression(),
        args=args,
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=adam_clara(VARIANTS[variant], args, smoothing=0.3, damping=0.7, initial_scale=1.0),
        callbacks=[AdamClaraCallback()],
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_trainer_trains_logs_and_resumes(tmp_path: Path, variant: str) -> None:
    whole = hf_trainer(tmp_path / "whole", variant)
    result = whole.train()
    assert result.training_loss < 1.0
    logs = [entry for entry in whole.state.log_history if "learning_rate" in entry]
    assert len(logs) == 6
    for entry in logs:
        assert entry["clara/group0/lr_scale/min"] <= entry["clara/group0/lr_scale/median"]
        assert entry["clara/group0/effective_lr/max"] >= entry["clara/group0/effective_lr/median"] >= 0.0
        # The rate of the step just taken, like the Trainer's own figure: not what the scheduler has made of it since.
        rate = entry["learning_rate"] * entry["clara/group0/lr_scale/median"]
        assert entry["clara/group0/effective_lr/median"] == pytest.approx(rate, rel=1e-6)
    assert logs[-1]["clara/group0/lr_scale/max"] != logs[0]["clara/group0/lr_scale/max"]
    # The Trainer keeps decaying and other parameters in two groups.
    assert "clara/group1/lr_scale/max" in logs[-1]

    resumed = hf_trainer(tmp_path / "whole", variant)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_equal_tensors(resumed.model.parameters(), whole.model.parameters())
    assert resumed.state.log_history[-2] | {"loss": 0} == whole.state.log_history[-2] | {"loss": 0}


def test_hf_trainer_hands_its_arguments_over(tmp_path: Path) -> None:
    optimizer = hf_trainer(tmp_path, "Local").create_optimizer()
    decaying, others = optimizer.param_groups
    assert decaying["lr"] == others["lr"] == 0.02
    assert decaying["betas"] == (0.9, 0.99)
    assert decaying["decoupled_weight_decay"]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert decaying["smoothing"] == 0.3


def test_hf_trainer_in_bfloat16(tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, "Smoothed", max_steps=4, bf16=True)
    assert trainer.train().training_loss < 2.0


# --- accelerate ------------------------------------------------------------------------------------------------------


def accelerator_of(**arguments: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    # It keeps one configuration for all accelerators of a process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **arguments)


def test_accelerate_is_the_plain_run() -> None:
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    models = [make_model() for _ in range(2)]
    prepared, plain = (clara_fused.AdamClaraSmoothed(model.parameters(), **LIVELY) for model in models)
    model, prepared = accelerator.prepare(models[0], prepared)
    for step in range(8):
        x, y = data(step)
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            prepared.step()
            prepared.zero_grad()
        (nn.functional.mse_loss(models[1](x), y) / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
            plain.step()
            plain.zero_grad()
    assert_equal_tensors(models[0].parameters(), models[1].parameters())
    # The wrapper hides what torch.optim.Optimizer has not; it is inside.
    assert find_optimizer(prepared) is prepared.optimizer
    assert_equal_tensors(prepared.optimizer.effective_lrs(), plain.effective_lrs())
    prepared.optimizer.enable_fused_amp()


def test_accelerate_in_bfloat16() -> None:
    accelerator = accelerator_of(mixed_precision="bf16")
    module = make_model(torch.float32)
    model, optimizer = accelerator.prepare(module, clara_fused.AdamClaraGlobal(module.parameters(), lr=0.02))
    losses = []
    for step in range(20):
        x, y = data(step, torch.float32)
        with accelerator.autocast():
            loss = nn.functional.mse_loss(model(x).float(), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


FIRST_LOSS_SCALE = 2.0**18  # overflows float16 in the first steps, whose updates must not happen


def accelerator_in_float16() -> Any:
    """accelerate itself refuses fp16 on the CPU; with a scaler for the CPU it does all that it does on a GPU."""
    accelerator = accelerator_of()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_LOSS_SCALE, growth_interval=1000)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


@pytest.mark.parametrize("fused_amp", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_accelerate_in_float16(variant: str, fused_amp: bool) -> None:
    accelerator = accelerator_in_float16()
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_LOSS_SCALE, growth_interval=1000)
    modules = [make_model(torch.float32) for _ in range(2)]
    inner, plain = (VARIANTS[variant](module.parameters(), **LIVELY) for module in modules)
    inner.enable_fused_amp(fused_amp)

    def decay(step: int) -> float:
        return 1.0 / (1.0 + step)

    schedule = torch.optim.lr_scheduler.LambdaLR(inner, decay)
    model, prepared, schedule = accelerator.prepare(modules[0], inner, schedule)
    skipped = []
    for step in range(12):
        x, y = data(step, torch.float32)
        prepared.zero_grad()
        with torch.autocast("cpu", torch.float16):
            accelerator.backward(nn.functional.mse_loss(model(x).float(), y))
        if not fused_amp:
            # Unscales the gradients, which the optimizer must not do once more.
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        prepared.step()
        schedule.step()
        skipped.append(prepared.step_was_skipped)

        plain.zero_grad()
        with torch.autocast("cpu", torch.float16):
            scaler.scale(nn.functional.mse_loss(modules[1](x).float(), y)).backward()
        scaler.unscale_(plain)
        if not fused_amp:
            nn.utils.clip_grad_norm_(modules[1].parameters(), 0.5)
        before = modules[1].gain.item()
        scaler.step(plain)
        scaler.update()
        # Without accelerate's sight of the skipped steps (`enable_fused_amp`) the schedule goes on over them.
        if fused_amp or modules[1].gain.item() != before:
            plain.param_groups[0]["lr"] = LIVELY["lr"] * decay(step + 1 - sum(skipped))
    overflows = 12 - int(plain.state[modules[1].gain]["step"])
    assert 0 < overflows < 12
    assert sum(skipped) == (0 if fused_amp else overflows)
    assert_equal_tensors(modules[0].parameters(), modules[1].parameters())
    assert_equal_tensors(inner.lr_scales(), plain.lr_scales())
    assert inner.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def accelerate_fsdp2(checkpoint: str) -> tuple[float, bool]:
    import accelerate

    os.environ.update(
        RANK=str(dist.get_rank()),
        LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_WORLD_SIZE=str(dist.get_world_size()),
    )
    try:
        plugin = accelerate.utils.FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="NO_WRAP", state_dict_type="SHARDED_STATE_DICT"
        )
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        # accelerate turns its FSDP2 code on for accelerators only, though it runs on the CPU as well.
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        model = make_model()
        alone = copy.deepcopy(model)
        # Made before the model is sharded: accelerate puts DTensors in its groups.
        optimizer: Any = clara_fused.AdamClaraSmoothed(model.parameters(), **LIVELY)
        alone_optimizer = clara_fused.AdamClaraSmoothed(alone.parameters(), **LIVELY)
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(6):
            x, y = data(step)
            mine = slice(dist.get_rank() * len(x) // 2, (dist.get_rank() + 1) * len(x) // 2)
            accelerator.backward(nn.functional.mse_loss(model(x[mine]), y[mine]))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            nn.functional.mse_loss(alone(x), y).backward()
            nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
            alone_optimizer.step()
            alone_optimizer.zero_grad()
        difference = max(
            (sharded.full_tensor() - whole).abs().max().item()
            for sharded, whole in zip(model.parameters(), alone.parameters(), strict=True)
        )
        scales = optimizer.optimizer.lr_scales()[0].tolist()
        files = accelerate.utils.fsdp_utils
        files.save_fsdp_optimizer(plugin, accelerator, optimizer.optimizer, model, checkpoint)
        before = [p.full_tensor().detach().clone() for p in model.parameters()]
        optimizer.step()  # no gradients: takes part in the sum, changes nothing
        for entry in optimizer.optimizer.state.values():
            entry["lr_scale"].fill_(7.0)
        files.load_fsdp_optimizer(plugin, accelerator, optimizer.optimizer, model, checkpoint)
        assert_equal_tensors([p.full_tensor() for p in model.parameters()], before)
        assert optimizer.optimizer.lr_scales()[0].tolist() == scales
        return difference, all(other == scales for other in on_all_ranks(scales))
    finally:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


def test_accelerate_fsdp2_plugin(world2: World, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for difference, ranks_agree in world2.run(accelerate_fsdp2, str(tmp_path / "state")):
        assert difference < 5e-8
        assert ranks_agree


# --- Lightning -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning")


def lightning_trainer(
    lightning: Any, folder: Path, variant: str, max_steps: int, fused_amp: bool = False, **arguments: Any
) -> tuple[Any, Any, Any]:
    from lightning.pytorch.loggers import CSVLogger

    from clara_fused.integrations.lightning import AdamClaraCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model(torch.float32)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.mse_loss(self.inner(batch["x"]).float(), batch["labels"])

        def configure_optimizers(self) -> Any:
            optimizer = VARIANTS[variant](self.parameters(), **LIVELY)
            optimizer.enable_fused_amp(fused_amp)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Every batch is the same: Lightning goes on with the first one of an epoch, whatever batch came before.
    rows = torch.utils.data.Subset(Rows(), [0, 1, 2, 3] * 16)
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=2,
        logger=CSVLogger(str(folder)),
        callbacks=[AdamClaraCallback()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(folder),
        **{"gradient_clip_val": 0.5, **arguments},
    )
    return trainer, Module(), torch.utils.data.DataLoader(rows, batch_size=4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_trains_logs_and_resumes(lightning: Any, tmp_path: Path, variant: str) -> None:
    whole_trainer, whole, loader = lightning_trainer(lightning, tmp_path / "whole", variant, 12)
    whole_trainer.fit(whole, loader)
    whole_trainer.logger.save()
    with open(Path(whole_trainer.logger.log_dir) / "metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["clara/group0/lr_scale/median"]]
    assert [int(row["step"]) for row in logged] == [1, 3, 5, 7, 9, 11]  # counted from 0, as Lightning does
    assert logged[-1]["clara/group0/lr_scale/max"] != logged[0]["clara/group0/lr_scale/max"]
    for row in logged:  # the rate of the step just taken, not what the scheduler has made of it since
        rate = LIVELY["lr"] / (1.0 + 0.1 * int(row["step"])) * float(row["clara/group0/lr_scale/median"])
        assert float(row["clara/group0/effective_lr/median"]) == pytest.approx(rate, rel=1e-5)

    first_trainer, first, loader = lightning_trainer(lightning, tmp_path / "first", variant, 6)
    first_trainer.fit(first, loader)
    first_trainer.save_checkpoint(tmp_path / "half.ckpt")
    second_trainer, second, loader = lightning_trainer(lightning, tmp_path / "second", variant, 12)
    second_trainer.fit(second, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert_equal_tensors(second.parameters(), whole.parameters())


def logged_steps(trainer: Any, column: str) -> list[int]:
    trainer.logger.save()
    with open(Path(trainer.logger.log_dir) / "metrics.csv") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get(column)]


def test_lightning_logs_nothing_before_a_step(lightning: Any, tmp_path: Path) -> None:
    """Under accumulation there are batches without one."""
    trainer, module, loader = lightning_trainer(lightning, tmp_path, "Local", 5, accumulate_grad_batches=3)
    trainer.fit(module, loader)
    assert logged_steps(trainer, "clara/group0/lr_scale/median") == [1, 3]


def test_lightning_logs_once_per_optimizer(lightning: Any, tmp_path: Path) -> None:
    trainer, module, loader = lightning_trainer(lightning, tmp_path, "Local", 12, gradient_clip_val=None)

    class TwoOptimizers(type(module)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            halves = [list(self.inner.up.parameters()), list(self.inner.down.parameters())]
            return [VARIANTS["Local"](params, **LIVELY) for params in halves]

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            for optimizer in self.optimizers():
                optimizer.step()

    trainer.fit(TwoOptimizers(), loader)
    for index in range(2):  # 12 steps of two optimizers are 6 batches
        assert logged_steps(trainer, f"clara/optimizer{index}/group0/lr_scale/median") == [1, 3, 5]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lightning_precision_plugins(lightning: Any, tmp_path: Path, precision: str) -> None:
    trainer, module, loader = lightning_trainer(lightning, tmp_path, "Smoothed", 6, precision=precision)
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, loader)
    assert not any(torch.equal(p.detach().to(b.dtype), b) for p, b in zip(module.parameters(), before, strict=True))
    (optimizer,) = trainer.optimizers
    assert {entry["exp_avg"].dtype for entry in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("fused_amp", [False, True])
def test_lightning_in_float16(lightning: Any, tmp_path: Path, fused_amp: bool) -> None:
    """Its plugin with a scaler for the CPU; clipping unscales first, and is refused where the optimizer unscales."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_LOSS_SCALE, growth_interval=1000)
    trainer, module, loader = lightning_trainer(
        lightning,
        tmp_path,
        "Smoothed",
        10,
        gradient_clip_val=None if fused_amp else 0.5,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        fused_amp=fused_amp,
    )
    trainer.fit(module, loader)
    (optimizer,) = trainer.optimizers
    steps = {int(entry["step"]) for entry in optimizer.state.values()}
    overflows = round(torch.log2(torch.tensor(FIRST_LOSS_SCALE / scaler.get_scale())).item())
    assert overflows > 0
    assert steps == {10 - overflows}


# --- torch itself ----------------------------------------------------------------------------------------------------


def test_averaged_model() -> None:
    model = make_model()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = clara_fused.AdamClaraSmoothed(model.parameters(), **LIVELY)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(5):
        x, y = data(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        expected = now if step == 0 else [0.9 * e + 0.1 * p for e, p in zip(expected, now, strict=True)]
    torch.testing.assert_close([p.detach() for p in average.module.parameters()], expected)


def average_of_dtensors() -> float:
    """An AveragedModel of a model with DTensors and plain parameters."""
    make = functools.partial(clara_fused.AdamClaraSmoothed, **LIVELY)
    sharded = LAYOUTS["tp-2"][1](make_model(), make)
    alone = make_model()
    optimizer = make(alone.parameters())
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in (sharded.model, alone)]
    for step in range(6):
        sharded.step(step)
        optimizer.zero_grad()
        x, y = data(step)
        nn.functional.mse_loss(alone(x), y).backward()
        optimizer.step()
        for average, model in zip(averages, (sharded.model, alone), strict=True):
            average.update_parameters(model)
    assert any(isinstance(p, DTensor) for p in averages[0].parameters())
    pairs = zip(*(average.module.parameters() for average in averages), strict=True)
    return max((p.full_tensor() if isinstance(p, DTensor) else p).sub(q).abs().max().item() for p, q in pairs)


def test_averaged_model_of_dtensors(world2: World) -> None:
    assert max(world2.run(average_of_dtensors)) < 5e-8


def clipped() -> float:
    make = functools.partial(clara_fused.AdamClaraSmoothed, **LIVELY)
    sharded = LAYOUTS["fsdp2-2"][1](make_model(), make)
    alone = make_model()
    optimizer = make(alone.parameters())
    for step in range(6):
        sharded.backward(step)
        nn.utils.clip_grad_norm_(sharded.model.parameters(), 0.1)
        sharded.optimizer.step()
        optimizer.zero_grad()
        x, y = data(step)
        nn.functional.mse_loss(alone(x), y).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        optimizer.step()
    params = full_parameters(sharded)
    return max((params[name] - p).abs().max().item() for name, p in alone.named_parameters())


def test_gradient_clipping_with_dtensors(world2: World) -> None:
    assert max(world2.run(clipped)) < 5e-8
