"""Reports of profilers, and the device pass: what they read, and how they end where something is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import clara_fused
from clara_fused.profiling import range_of

pytest.importorskip("matplotlib", reason="the benchmarks' extra is not installed")
pytest.importorskip("rich", reason="the benchmarks' extra is not installed")

import nsight_report

from harness.report import NOTHING_MEASURED

PROFILES = Path(__file__).parents[1] / "profiles"
BENCHMARKS = Path(nsight_report.__file__).parent


def test_nsys_summary_of_the_sample():
    profile = nsight_report.read_nsys(PROFILES / "nsys-sample")
    assert profile.steps == 2
    assert profile.launches_per_step == 3
    assert profile.copies_per_step == 0.5
    assert profile.busy_seconds_per_step == pytest.approx((31 + 31 + 1) / 2 * 1e-6)
    assert profile.busy_share == pytest.approx(63 / (63 + 4 + 5))
    assert profile.gaps == 5
    assert profile.median_gap_seconds == pytest.approx(1e-6)
    assert profile.largest_gap_seconds == pytest.approx(5e-6)
    kernels = {nsight_report.short_kernel_name(kernel.name): kernel for kernel in profile.kernels}
    measure = kernels["clara::cuda::measure_kernel<float, float>"]
    assert measure.launches_per_step == 1
    assert measure.seconds_per_step == pytest.approx(20e-6)
    ranges = {host_range.name: host_range for host_range in profile.ranges}
    assert ranges["clara.measure (smoothed, 148 tensors)"].median_seconds == pytest.approx(1e-5)


def test_ncu_summary_of_the_sample(capsys):
    kernels = nsight_report.read_ncu(PROFILES / "ncu-sample.csv")
    assert [kernel.launches for kernel in kernels] == [1, 1, 1]
    assert kernels[0].moved_bytes == 28_000_000
    assert kernels[0].seconds == pytest.approx(7e-6)
    assert kernels[2].registers == 32
    nsight_report.print_ncu(kernels, elements=1_000_000, must_move=44, title="sample")
    assert "moved 44.01 bytes per element; 44 must move: 1.000×" in capsys.readouterr().out


@pytest.mark.parametrize("profiler", ["nsys", "ncu"])
def test_the_report_program_writes_what_it_prints(profiler, tmp_path, capsys):
    for path in PROFILES.glob(f"{profiler}-sample*.csv"):
        shutil.copy(path, tmp_path)
    base = tmp_path / f"{profiler}-sample"
    status = nsight_report.main([profiler, str(base), "--model", "gpt2-small", "--variant", "smoothed"])
    assert status == 0
    document = json.loads((tmp_path / f"{profiler}-sample.json").read_text())
    assert document["optimizer"] == "smoothed"
    assert len(document["kernels"]) == 3
    assert "clara::cuda::measure_kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("Start (ns)", "Start (us)"), "no column 'Start \\(ns\\)'"),
        (lambda text: text.replace("Duration (ns)", "Duration (us)"), "no column 'Duration \\(ns\\)'"),
        (lambda text: "\n".join(line for line in text.splitlines() if "kernel" not in line), "no kernel was recorded"),
    ],
)
def test_a_trace_of_another_format_is_refused(change, message, tmp_path):
    for path in PROFILES.glob("nsys-sample*.csv"):
        shutil.copy(path, tmp_path)
    trace = tmp_path / "nsys-sample_cuda_gpu_trace.csv"
    trace.write_text(change(trace.read_text()))
    with pytest.raises(nsight_report.ReportError, match=message):
        nsight_report.read_nsys(tmp_path / "nsys-sample")


def test_scaled_units_and_missing_counters_are_refused(tmp_path):
    text = (PROFILES / "ncu-sample.csv").read_text()
    path = tmp_path / "ncu.csv"
    path.write_text(text.replace('"byte"', '"Mbyte"'))
    with pytest.raises(nsight_report.ReportError, match="--print-units base"):
        nsight_report.read_ncu(path)
    path.write_text(re.sub(r'"byte","[\d,]+"', '"byte","n/a"', text))
    with pytest.raises(nsight_report.ReportError, match="allowed to read the counters"):
        nsight_report.read_ncu(path)


@pytest.mark.parametrize(("script", "tool"), [("profile_nsys.sh", "nsys"), ("profile_ncu.sh", "ncu")])
def test_profiling_without_the_profiler_is_a_clear_error(script, tool, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "mkdir", "env", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    environment = {**os.environ, "PATH": str(tools)}
    command = [str(BENCHMARKS / script), "--out", str(tmp_path / "out"), "gpt2-small", "smoothed"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 4, result.stderr
    assert f"{tool} not found" in result.stderr
    result = subprocess.run(command[:-1], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "usage:" in result.stderr


FAKE_PYTHON = """#!/bin/bash
# Answers device_pass.sh as a machine with a device would, and takes its time over everything else.
case "$*" in
    *is_available*) exit 0 ;;
    *describe_environment*) cat >"${@: -1}" ;;
    *get_device_capability*) echo 90 ;;
    *build_ext*) sleep "$BUILD_SECONDS" ;;
    *"-m pytest"*) exit 3 ;;
esac
"""


def run_device_pass(folder, *arguments, build_seconds=0):
    (folder / "benchmarks").mkdir()
    shutil.copy(BENCHMARKS / "device_pass.sh", folder / "benchmarks")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:/usr/bin:/bin", "BUILD_SECONDS": str(build_seconds)}
    command = ["bash", folder / "benchmarks" / "device_pass.sh", "--out", folder / "out", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_device_pass_tells_how_each_part_ended(tmp_path):
    done = run_device_pass(tmp_path, "build", "tests", "sanitizer", "overhead")
    assert done.returncode == 1, done.stderr
    records = [line.rsplit("|", 1)[0] for line in (tmp_path / "out" / "device-pass.json").read_text().splitlines()]
    assert records == ["build|passed", "tests|failed (3)", "sanitizer|not run: no profiler", "overhead|passed"]
    assert "compute-sanitizer not found" in (tmp_path / "out" / "device-pass-sanitizer.log").read_text()


def test_the_device_pass_ends_in_the_time_it_is_given(tmp_path):
    done = run_device_pass(tmp_path, "--seconds", "26", "build", "tests", build_seconds=100)
    assert done.returncode == 1, done.stderr
    records = [line.rsplit("|", 1) for line in (tmp_path / "out" / "device-pass.json").read_text().splitlines()]
    assert [record for record, _ in records] == ["build|ran out of time", "tests|not run: no time left"]
    assert int(records[0][1]) < 26


@pytest.mark.parametrize("arguments", [["--seconds", "0.5"], ["--seconds"], ["no-such-part"]])
def test_bad_arguments_of_the_device_pass_are_refused(arguments, tmp_path):
    done = run_device_pass(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_profiled_program_says_why_it_does_not_run():
    command = [sys.executable, str(BENCHMARKS / "profile_target.py"), "small-148x64", "smoothed"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == NOTHING_MEASURED, result.stderr
    assert "no usable CUDA device" in result.stdout


def test_the_steps_parts_have_names_in_pytorchs_profiler():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = clara_fused.AdamClaraSmoothed(params, fused=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    named = {event.key for event in profiler.key_averages() if event.key.startswith("clara.")}
    assert {f"clara.{verb} (2 tensors)" for verb in ("measure", "adapt", "update")} <= named


def test_ranges_go_to_nvtx_once_cuda_is_in_use_and_nowhere_before(monkeypatch):
    ranges = []
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: ranges.append(name) or nullcontext())
    for initialized, expected in ((False, []), (True, ["clara.measure (3 tensors)"])):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda initialized=initialized: initialized)
        with range_of("measure", 3):
            pass
        assert ranges == expected
