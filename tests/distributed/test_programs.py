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
TIMEOUT = 270.0  # seconds, for programs that hang


def run(*command: str, **environment: str) -> str:
    """Output of a program in a session of its own, which ends with it, on loopback."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "GLOO_SOCKET_IFNAME": loopback,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
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


def run_alone(*command: str) -> str:
    """As torchrun starts a single rank, without torchrun's own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return run(*command, **ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def run_main_twice(example: str, first: list[str], second: list[str]) -> tuple[str, str]:
    """Outputs of an example's `main` with one command line and then with another; its imports take the longest."""
    between = "-- second --"
    code = (
        f"import sys, {example}\n"
        f"for arguments in ({first!r}, {second!r}):\n"
        f"    sys.argv = [{example!r}, *arguments]\n"
        f"    {example}.main()\n"
        f"    print({between!r}, flush=True)\n"
    )
    outputs = run("-c", code, PYTHONPATH=os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))
    first_output, second_output, _ = outputs.split(between)
    return first_output, second_output


def test_fsdp2_example_saves_and_resumes_on_fewer_ranks(tmp_path: Path) -> None:
    program = (str(EXAMPLES / "fsdp2.py"), "--checkpoint", str(tmp_path))
    first = torchrun("--nproc-per-node", "2", *program, "--steps", "10")
    assert "2 ranks on cpu, from step 0 to 10" in first
    assert "step   10  loss" in first
    second = run_alone(*program, "--steps", "20")
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
    folder = ["--folder", str(tmp_path)]
    first, second = run_main_twice("hf_trainer", [*folder, "--steps", "10"], [*folder, "--steps", "12", "--resume"])
    assert "clara/group0/lr_scale/median" in first
    assert "clara/group0/lr_scale" in histograms(tmp_path)
    assert (tmp_path / "checkpoint-5").is_dir()
    assert "'train_runtime'" in second
    assert (tmp_path / "checkpoint-12").is_dir()


def test_lightning_example(tmp_path: Path) -> None:
    for framework in ("lightning", "tensorboard"):
        pytest.importorskip(framework)
    folder = ["--folder", str(tmp_path)]
    checkpoint = tmp_path / "lightning_logs/version_0/checkpoints/epoch=0-step=10.ckpt"
    resume = ["--steps", "12", "--resume", str(checkpoint)]
    first, second = run_main_twice("lightning_trainer", [*folder, "--steps", "10"], [*folder, *resume])
    assert "loss" in first
    assert histograms(tmp_path / "lightning_logs/version_0") == {"clara/group0/lr_scale": 1}
    assert "Restored all states" in second


def test_self_test_agrees() -> None:
    output = run("-m", "clara_fused.distributed.selftest", "--ranks", "2", "--steps", "3")
    assert output.count("ok   FSDP2") == 3
    assert "all agree" in output
