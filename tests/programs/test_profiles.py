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

import device_report
import profile_ncu

from harness import tables
from harness.report import DEFAULT_RESULTS, NOTHING_MEASURED

SAMPLE = Path(__file__).parents[1] / "profiles" / "ncu-sample.csv"
BENCHMARKS = Path(profile_ncu.__file__).parent


def test_ncu_summary_of_the_sample():
    kernels = profile_ncu.read_ncu(SAMPLE)
    assert [kernel.launches for kernel in kernels] == [1, 1, 1]
    assert (kernels[0].read_bytes, kernels[0].written_bytes) == (16_000_000, 12_000_000)
    assert kernels[0].seconds == pytest.approx(7e-6)
    assert kernels[2].registers == 32
    document = profile_ncu.record(SAMPLE, "gpt2-small", "smoothed", "float32")
    shown = tables.traffic_table({**document, "elements": 1_000_000, "bytes_per_element_that_must_move": 44})
    assert "AdamClaraSmoothed, GPT-2 small, float32:" in shown
    assert "| clara::cuda::measure_kernel<float, float> | 1 | 7 µs | 16.00 | 12.00 | 4000 | 40 |" in shown
    assert "moved 44.01 bytes per element; 44 must move: 1.000×" in shown


def test_kernels_are_named_without_what_is_not_their_name():
    assert tables.short_kernel_name("void at::(anonymous namespace)::copy<4>(float*, int)") == "at::copy<4>"


FAKE_NCU = """#!/bin/bash
# Answers as ncu does that profiled the program, and tells what it was to do.
while [ "$1" != --log-file ]; do shift; done
cp "$SAMPLE" "$2"
echo "profiled: ${*:3}"
"""


def test_the_program_writes_what_it_prints(tmp_path, capfd, monkeypatch):
    (tmp_path / "ncu").write_text(FAKE_NCU)
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SAMPLE", str(SAMPLE))
    # In place of the program that needs a device.
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    out = tmp_path / "new folder"
    assert profile_ncu.main(["gpt2-small", "smoothed", "--dtype", "bfloat16", "--out", str(out)]) == 0
    document = json.loads((out / "ncu-gpt2-small-smoothed-bfloat16.json").read_text())
    assert (document["profiler"], document["optimizer"], document["dtype"]) == ("ncu", "smoothed", "bfloat16")
    assert len(document["kernels"]) == 3
    recorded = json.loads((DEFAULT_RESULTS / "ncu-gpt2-small-local-float32.json").read_text())
    assert list(document) == list(recorded)
    assert list(document["kernels"][0]) == list(recorded["kernels"][0])
    shown = capfd.readouterr().out
    assert "profile_target.py gpt2-small smoothed --dtype bfloat16 --steps 1" in shown
    assert "clara::cuda::measure_kernel" in shown


def test_what_the_profiled_program_cannot_do_is_told_without_ncu(tmp_path, monkeypatch):
    (tmp_path / "ncu").symlink_to(shutil.which("true"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert profile_ncu.main(["gpt2-small", "smoothed", "--out", str(tmp_path)]) == 1


def test_scaled_units_and_missing_counters_are_refused(tmp_path):
    text = SAMPLE.read_text()
    path = tmp_path / "ncu.csv"
    path.write_text(text.replace('"byte"', '"Mbyte"'))
    with pytest.raises(profile_ncu.ReportError, match="--print-units base"):
        profile_ncu.read_ncu(path)
    path.write_text(re.sub(r'"byte","[\d,]+"', '"byte","n/a"', text))
    with pytest.raises(profile_ncu.ReportError, match="allowed to read the counters"):
        profile_ncu.read_ncu(path)


def test_profiling_without_the_profiler_is_a_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as exit_info:
        profile_ncu.main(["gpt2-small", "smoothed", "--out", str(tmp_path)])
    assert exit_info.value.code == 4
    assert "ncu not found" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        profile_ncu.main(["gpt2-small"])
    assert exit_info.value.code == 2
    assert "usage:" in capsys.readouterr().err


FAKE_PYTHON = """#!/bin/bash
# Answers device_pass.sh as a machine with a device would, and takes its time over everything else.
case "$*" in
    *is_available*) exit 0 ;;
    *device_report.py*) cat >"${@: -1}/device-pass.json" ;;
    *get_device_capability*) echo 90 ;;
    *build_ext*) sleep "$BUILD_SECONDS" ;;
    *"-m clara_fused"*) echo "cuda:0 (float32): $BACK_END" ;;
    *"-m pytest"*"not Global"*) echo one of the tests failed; exit 3 ;;
    *"-m pytest"*) sleep "$TEST_SECONDS" ;;
esac
"""


def run_device_pass(folder, *arguments, build_seconds=0, test_seconds=0, back_end="compiled core"):
    (folder / "benchmarks").mkdir()
    shutil.copy(BENCHMARKS / "device_pass.sh", folder / "benchmarks")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{python.parent}:/usr/bin:/bin", "BACK_END": back_end,
        "BUILD_SECONDS": str(build_seconds), "TEST_SECONDS": str(test_seconds),
    }  # fmt: skip
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


def test_what_a_part_said_is_kept_where_it_ran_out_of_time(tmp_path):
    done = run_device_pass(tmp_path, "--seconds", "27", "tests", test_seconds=100)
    assert done.returncode == 1, done.stderr
    assert "tests|ran out of time" in (tmp_path / "out" / "device-pass.json").read_text()
    assert (tmp_path / "out" / "device-pass-tests-3.log").read_text() == "one of the tests failed\n"


def test_a_build_that_does_not_serve_the_device_has_failed(tmp_path):
    done = run_device_pass(tmp_path, "build", back_end="PyTorch")
    assert done.returncode == 1, done.stderr
    assert "build|failed" in (tmp_path / "out" / "device-pass.json").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_tests_that_are_required_are_not_skipped():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", "tests/gpu"]
    done = subprocess.run(
        command, cwd=BENCHMARKS.parent, env={**os.environ, "CLARA_REQUIRE_GPU": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "CUDA" in done.stdout


@pytest.mark.parametrize("arguments", [["--seconds", "0.5"], ["--seconds"], ["no-such-part"]])
def test_bad_arguments_of_the_device_pass_are_refused(arguments, tmp_path):
    done = run_device_pass(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr


def test_the_device_pass_ends_with_the_tables_of_what_its_parts_left(tmp_path):
    assert list(device_report.tables_of(tmp_path)) == []
    for name in ("step_time-cuda.json", "ncu-gpt2-small-local-float32.json"):
        shutil.copy(DEFAULT_RESULTS / name, tmp_path)
    runs = [
        {"optimizer": "local", "label": "AdamClara Local", "rate": 1e-3, "validation_loss": 4.25},
        {"optimizer": "adam", "label": "torch Adam", "rate": 1e-1, "validation_loss": None},
    ]
    document = json.loads((DEFAULT_RESULTS / "train_gpt-cuda.json").read_text()) | {"runs": runs}
    (tmp_path / "train_gpt-cuda.json").write_text(json.dumps(document))
    times, traffic, losses = device_report.tables_of(tmp_path)
    assert "**float32**, time per step and ratio:" in times
    assert "share of the simple loop's bandwidth (copy 4230 GB/s, in-place update 4197 GB/s)" in times
    assert "moved 29.01 bytes per element; 29.27 must move: 0.991×" in traffic
    assert losses.splitlines()[0] == "| optimizer | from 1e-03 | from 1e-01 |"
    assert "| AdamClara Local | 4.2500 | – |" in losses
    assert "| torch Adam | – | diverged |" in losses


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
