"""The example programs and the self-test, run as a user runs them; all their processes are gone afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TIMEOUT = 150.0


def run(*command: str) -> str:
    """Output of a program in a session of its own, which ends with it, on loopback."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    assert process.returncode == 0, output
    return output


def torchrun(*arguments: str) -> str:
    return run("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", *arguments)


def test_fsdp2_example_saves_and_resumes_on_fewer_ranks(tmp_path: Path) -> None:
    program = (str(EXAMPLES / "fsdp2.py"), "--checkpoint", str(tmp_path))
    first = torchrun("--nproc-per-node", "2", *program, "--steps", "10")
    assert "2 ranks on cpu, from step 0 to 10" in first
    assert "step   10  loss" in first
    second = torchrun("--nproc-per-node", "1", *program, "--steps", "20")
    assert "1 ranks on cpu, from step 10 to 20" in second
    assert "step   20  loss" in second


def histograms(folder: Path) -> dict[str, int]:
    """What TensorBoard would show: the number of histograms by name, in all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, int] = {}
    for file in folder.glob("**/events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["histograms"]:
            found[tag] = found.get(tag, 0) + len(events.Histograms(tag))
    return found


def test_hf_trainer_example(tmp_path: Path) -> None:
    for framework in ("transformers", "accelerate", "tensorboard"):
        pytest.importorskip(framework)
    program = (str(EXAMPLES / "hf_trainer.py"), "--folder", str(tmp_path))
    assert "clara/group0/lr_scale/median" in run(*program, "--steps", "10")
    assert "clara/group0/lr_scale" in histograms(tmp_path)
    assert (tmp_path / "checkpoint-5").is_dir()
    run(*program, "--steps", "12", "--resume")
    assert (tmp_path / "checkpoint-12").is_dir()


def test_lightning_example(tmp_path: Path) -> None:
    for framework in ("lightning", "tensorboard"):
        pytest.importorskip(framework)
    program = (str(EXAMPLES / "lightning_trainer.py"), "--folder", str(tmp_path))
    assert "loss" in run(*program, "--steps", "10")
    assert histograms(tmp_path) == {"clara/group0/lr_scale": 1}
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    assert "Restored all states" in run(*program, "--steps", "12", "--resume", str(checkpoint))


def test_self_test_agrees() -> None:
    output = run("-m", "clara_fused.selftest_distributed", "--ranks", "2", "--steps", "3")
    assert output.count("ok   FSDP2") == 6
    assert "all agree" in output
