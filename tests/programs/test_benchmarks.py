"""The benchmark programs: what they compute, that they run, and that the docs show what they recorded.

Models and results here are tiny: these are tests of the programs, not of speed.
"""

import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import clara_fused
from clara_fused.options import Variant
from clara_fused.profiling import profiler_range

pytest.importorskip("matplotlib", reason="the benchmarks' extra is not installed")
pytest.importorskip("rich", reason="the benchmarks' extra is not installed")

import compare_runs
import cpu_overhead
import end_to_end
import figures
import nsight_report
import step_time
from helpers import core_available

from harness import models, plots, report
from harness.clocks import CpuClock, StreamLoops
from harness.contenders import BASELINE, CONTENDERS, DEFAULT_CONTENDERS
from harness.environment import OtherWork
from harness.memory import keep_freed_memory, peak_extra_bytes
from harness.published import PerTensorAdamClara
from harness.statistics import BASELINE_SAMPLES, all_seconds, measure_interleaved, ratios, summarize

PROFILES = Path(__file__).parent / "profiles"
BENCHMARKS = Path(step_time.__file__).parent


# --- models and contenders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2-small", 148, 124_439_808),
        ("gpt2-xl", 580, 1_557_611_200),
        ("llama-1b", 146, 1_235_814_400),
        ("llama-8b", 291, 8_030_261_248),
        ("resnet50", 161, 25_557_032),
        ("small-1000x64", 1000, 64_000),
    ],
)
def test_shapes_are_those_of_the_published_models(name, tensors, elements):
    assert len(models.MODELS[name].shapes) == tensors
    assert models.MODELS[name].elements == elements


def test_bytes_per_element_are_those_of_the_algorithm():
    def moved(name, dtype):
        return CONTENDERS[name].traffic(dtype).moved

    assert moved("adam-fused", torch.float32) == 28
    assert moved("smoothed", torch.float32) == 44
    assert moved("smoothed-deferred", torch.float32) == 36
    # Measure: gradient 2, moments and path 12 read, 12 written; apply: parameter 2, moments 8 read, parameter written.
    assert moved("global", torch.bfloat16) == (2 + 12 + 12) + (2 + 8 + 2)
    assert moved("global-deferred", torch.bfloat16) == 2 + 2 + 12 + 2 + 12
    # The table of the docs, which is by kernel, says the same.
    immediate, deferred = (line for line in figures.bytes_table().splitlines() if "step" in line)
    for line, name in ((immediate, "global"), (deferred, "global-deferred")):
        totals = [int(total) for total in re.findall(r"= (\d+)", line)]
        assert totals[:2] == [moved(name, torch.float32), moved(name, torch.bfloat16)]


def test_the_state_counted_is_the_state_kept():
    params = models.small_tensors(2).parameters(torch.bfloat16, torch.device("cpu"))
    for name in ("adam-fused", "adam-foreach", "smoothed@pytorch", "published"):
        optimizer = CONTENDERS[name].build(params)
        optimizer.step()
        kept = [value for value in optimizer.state[params[0]].values() if isinstance(value, torch.Tensor)]
        counted = CONTENDERS[name].traffic(torch.bfloat16).state * params[0].numel()
        assert models.total_bytes([value for value in kept if value.dim()]) == counted, name


def test_the_yardstick_does_the_work_of_the_local_optimizer():
    params = [torch.nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(1)))]
    twins = [torch.nn.Parameter(params[0].detach().clone())]
    ours = clara_fused.AdamClaraLocal(params, lr=1e-2, fused=False)
    published = PerTensorAdamClara(twins, lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        params[0].grad = torch.randn(5, 7, generator=generator) + 0.5
        twins[0].grad = params[0].grad.clone()
        ours.step()
        published.step()
    assert published.state[twins[0]]["scale"] != 1.0
    torch.testing.assert_close(twins[0], params[0], rtol=1e-5, atol=1e-6)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_summary_of_known_samples():
    summary = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (summary.median, summary.quartile_low, summary.quartile_high) == (3.0, 2.0, 4.0)
    assert (summary.minimum, summary.samples) == (1.0, 5)
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_error_of_the_median_covers_it_in_nineteen_of_twenty_cases():
    generator = random.Random(0)
    covered = 0
    for _ in range(400):
        values = sorted(generator.gauss(0, 1) for _ in range(40))
        summary = summarize(values)
        low, high = values[math.floor(20 - 0.98 * math.sqrt(40))], values[math.ceil(20 + 0.98 * math.sqrt(40)) - 1]
        assert summary.error == pytest.approx((high - low) / 2)
        covered += low <= 0 <= high
    assert 0.92 < covered / 400 < 0.99


class FakeClock:
    """A machine that is three times slower half of the time; steps take the time that they name."""

    min_sample_seconds = 1e-3

    def __init__(self):
        self.calls = 0
        self.slow = random.Random(1)

    def seconds_per_step(self, step, steps):
        self.calls += 1
        return step()

    def synchronize(self):
        pass


def test_ratios_are_immune_to_a_machine_that_slows_for_whole_rounds():
    clock = FakeClock()
    rounds = iter(range(10**6))

    def slowdown():
        return 3.0 if (next(rounds) // 40) % 2 else 1.0

    steps = {"base": lambda: 0.010 * slowdown(), "other": lambda: 0.015 * slowdown()}
    samples = measure_interleaved(steps, clock, "base", max_seconds=60, max_rounds=120)
    found = summarize(ratios(samples, "other", "base"))
    assert found.samples == 120
    assert found.median == pytest.approx(1.5)
    assert summarize(all_seconds(samples, "base")).quartile_high > 0.025


def test_slow_contenders_miss_rounds_and_the_baseline_does_not():
    clock = FakeClock()
    steps = {"base": lambda: 0.01, "slow": lambda: 1.0}
    samples = measure_interleaved(steps, clock, "base", max_seconds=60, max_rounds=12)
    assert len(samples["base"]) == 12
    assert sorted(samples["slow"]) == [0, 2, 4, 6, 8, 10]
    # The baseline's noise is in every ratio, so it has several samples in a round.
    assert {len(of_round) for of_round in samples["base"].values()} == {BASELINE_SAMPLES}
    assert {len(of_round) for of_round in samples["slow"].values()} == {1}
    assert len(all_seconds(samples, "base")) == 12 * BASELINE_SAMPLES
    assert ratios(samples, "slow", "base") == [pytest.approx(100)] * 6
    # To another than the baseline: of the rounds in which both took part.
    assert ratios(samples, "base", "slow") == [pytest.approx(0.01)] * 6


def test_peak_memory_of_a_step_counts_what_is_alive_at_once():
    def step():
        first = torch.ones(1000)
        second = first + 1
        del first
        return (second * 2).sum()

    assert 8000 <= peak_extra_bytes(step, torch.device("cpu")) < 9000


@pytest.mark.skipif(not core_available(), reason="needs the compiled core")
@pytest.mark.parametrize(("contender", "share"), [("local", 1), ("global", 0), ("local-deferred", 0)])
def test_extra_bytes_include_what_steps_share_of_memory(contender, share):
    # More than the caches of all threads keep between measure and apply.
    param = torch.nn.Parameter(torch.ones(70_000 * max(2, torch.get_num_threads())))
    param.grad = torch.ones_like(param)
    optimizer = CONTENDERS[contender].build([param])
    optimizer.step()
    extra = peak_extra_bytes(optimizer.step, torch.device("cpu"))
    assert share * param.numel() <= extra <= share * 2 * param.numel()


PAGES_OF_REPEATED_BLOCKS = """
import resource, sys
import torch
from harness.memory import give_back_freed_memory, keep_freed_memory, peak_extra_bytes

if sys.argv[1] == "keep":
    assert keep_freed_memory()
step = lambda: torch.ones(16 << 20)
for _ in range(10):  # until blocks that were freed are large enough for their alignment as well
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
give_back_freed_memory()
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
assert step().data_ptr() % 64 == 0
assert peak_extra_bytes(step, torch.device("cpu")) == 64 << 20
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    def pages(mode):
        command = [sys.executable, "-c", PAGES_OF_REPEATED_BLOCKS, mode]
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        return tuple(map(int, done.stdout.split()))

    block = (64 << 20) / os.sysconf("SC_PAGE_SIZE")
    of_twenty_steps, after_giving_back = pages("keep")
    assert of_twenty_steps < 10 * block
    assert after_giving_back >= block
    # What it is there for: left alone, glibc gives each block back and asks for it anew.
    of_twenty_steps, _ = pages("leave")
    assert of_twenty_steps >= 20 * block


def test_without_glibc_memory_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


WORK_IN_ANOTHER_PROCESS = """
import time
end = time.perf_counter() + 30
while time.perf_counter() < end:
    pass
"""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the kernel does not tell")
def test_other_work_is_the_work_of_others():
    def share_of_two_seconds():
        other_work = OtherWork()
        time.sleep(2)
        return other_work.share()

    with subprocess.Popen([sys.executable, "-c", WORK_IN_ANOTHER_PROCESS]) as busy:
        with_it = share_of_two_seconds()
        busy.kill()
    # Close to a whole core, or what others leave of it, which is other work as well.
    assert with_it > 0.33 / os.cpu_count()


def test_much_other_work_is_told(capsys):
    report.warn_of_other_work(report.MUCH_OTHER_WORK * 1.5, "ran beside this")
    assert "other work (8% of the cores) ran beside this" in capsys.readouterr().out
    report.warn_of_other_work(report.MUCH_OTHER_WORK * 0.9, "ran beside this")
    report.warn_of_other_work(None, "ran beside this")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the kernel does not tell")
def test_other_work_is_not_ones_own(monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")

    def pass_time(seconds_of_everybody, own_seconds):
        text = f"cpu  {round(seconds_of_everybody * ticks)} 0 0 99 0 0 0 0 0 0\n"
        monkeypatch.setattr(Path, "read_text", lambda path: text)
        monkeypatch.setattr(os, "times", lambda: os.times_result((own_seconds, 0.0, 0.0, 0.0, 0.0)))

    pass_time(1000, 10)
    other_work = OtherWork()
    pass_time(1060, 70)
    assert other_work.share() == 0
    pass_time(1061, 70)
    assert other_work.share() > 0


# --- the programs ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(CpuClock, "min_sample_seconds", 1e-4)


@pytest.fixture(autouse=True)
def memory_as_it_is(monkeypatch):
    """The allocator of the process that runs the tests is not to be changed for good."""
    for program in (step_time, cpu_overhead, end_to_end):
        monkeypatch.setattr(program, "keep_freed_memory", lambda: False)


@pytest.fixture
def tiny(monkeypatch):
    """Small models, and simple loops over little memory."""
    monkeypatch.setattr("harness.clocks.CPU_STREAM_BYTES", 1 << 16)
    monkeypatch.setitem(models.MODELS, "small-148x64", models.small_tensors(3))
    assert StreamLoops(torch.device("cpu")).moved_bytes == 1 << 17


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_step_time_runs_end_to_end(tiny, tmp_path, capsys):
    status = step_time.main(
        ["--device", "cpu", "--models", "small-148x64", "--dtypes", "float32", "bfloat16", "--seconds", "0.1",
         "--optimizers", "adam-loop", "published", "local@pytorch", "smoothed-deferred@pytorch", "apex",
         "--out", str(tmp_path)]
    )  # fmt: skip
    assert status == 0
    document = read(tmp_path / "step_time-cpu.json")
    measured = {(row["dtype"], row["optimizer"]) for row in document["results"]}
    names = {BASELINE, "adam-loop", "published", "local@pytorch", "smoothed-deferred@pytorch"}
    assert measured == {(dtype, name) for dtype in ("float32", "bfloat16") for name in names}
    assert {row["optimizer"] for row in document["skipped"]} == {"apex"}
    assert all("CUDA" in row["reason"] for row in document["skipped"])
    for row in document["results"]:
        assert row["seconds"]["median"] > 0
        assert row["ratio"]["samples"] >= 2
        samples_per_round = BASELINE_SAMPLES if row["optimizer"] == BASELINE else 1
        assert row["seconds"]["samples"] == samples_per_round * row["ratio"]["samples"]
        assert row["peak_extra_bytes"] >= 0
        assert row["ratio"]["median"] == 1 or row["optimizer"] != BASELINE
    assert document["machine"]["cpu"] and document["versions"]["torch"] == torch.__version__
    assert document["settings"]["keeps_freed_memory"] is False
    assert document["other_work"] is None or document["other_work"] >= 0
    assert (tmp_path / "step_time-cpu-bfloat16.png").stat().st_size > 10_000
    assert (tmp_path / "roofline-cpu.png").exists()
    assert "AdamClara Smoothed deferred (PyTorch)" in capsys.readouterr().out


def test_lists_too_large_for_memory_are_skipped_with_a_reason(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_time, "available_memory", lambda device: 1000)
    status = step_time.main(["--device", "cpu", "--models", "small-148x64", "--seconds", "0.1", "--out", str(tmp_path)])
    assert status == report.NOTHING_MEASURED
    assert "not enough memory" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_contenders_that_do_not_fit_together_are_measured_in_groups(tiny, tmp_path, monkeypatch):
    elements = models.small_tensors(3).elements
    # Parameters, gradients, a temporary: 12 bytes per element; the baseline's state 8, another's 12.
    monkeypatch.setattr(step_time, "available_memory", lambda device: elements * 33 / step_time.MEMORY_SHARE["cpu"])
    names = ["local@pytorch", "global@pytorch", "smoothed@pytorch"]
    step_time.main(
        ["--device", "cpu", "--models", "small-148x64", "--dtypes", "float32", "--seconds", "0.1", "--no-plots",
         "--optimizers", *names, "--out", str(tmp_path)]
    )  # fmt: skip
    document = read(tmp_path / "step_time-cpu.json")
    assert len(document["bandwidths"]) == 3
    assert [row["optimizer"] for row in document["results"]] == [BASELINE, *names]


def test_kept_memory_is_given_back_where_little_is_left(tiny, tmp_path, monkeypatch):
    left = iter([10**9, 10**9, 10**6])  # at the start; after each of two groups
    given_back = []
    monkeypatch.setattr(step_time, "available_memory", lambda device: next(left))
    monkeypatch.setattr(step_time, "give_back_freed_memory", lambda: given_back.append(1))
    step_time.main(
        ["--device", "cpu", "--models", "small-148x64", "--dtypes", "float32", "bfloat16", "--seconds", "0.1",
         "--no-plots", "--optimizers", "adam-fused", "--out", str(tmp_path)]
    )  # fmt: skip
    assert next(left, "all asked for") == "all asked for"
    assert given_back == [1]


def test_cpu_overhead_runs_end_to_end(tmp_path):
    status = cpu_overhead.main(
        ["--device", "cpu", "--tensors", "2", "20", "--optimizers", "adam-loop", "global@pytorch", "apex",
         "--seconds", "0.1", "--out", str(tmp_path)]
    )  # fmt: skip
    assert status == 0
    document = read(tmp_path / "cpu_overhead-cpu.json")
    assert {row["tensors"] for row in document["results"]} == {2, 20}
    # Whether the fitted cost is positive is up to the machine's other work, its being there is not.
    assert [cost["optimizer"] for cost in document["costs"]] == ["adam-fused", "adam-loop", "global@pytorch"]
    assert all(math.isfinite(cost["seconds_per_tensor"]) for cost in document["costs"])
    assert (tmp_path / "cpu_overhead-cpu.png").exists()


def test_linear_costs_recover_a_line():
    rows = [
        {"optimizer": "x", "label": "X", "tensors": n, "seconds": {"median": 1e-5 + 2e-6 * n}} for n in (10, 100, 1000)
    ]
    (cost,) = cpu_overhead.linear_costs(rows)
    assert cost["seconds_per_step"] == pytest.approx(1e-5, rel=1e-3)
    assert cost["seconds_per_tensor"] == pytest.approx(2e-6, rel=1e-3)


def test_end_to_end_runs_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setitem(end_to_end.SIZES, "tiny", end_to_end.Size(width=8, layers=1, heads=2, context=8, batch=2))
    status = end_to_end.main(
        ["--device", "cpu", "--sizes", "tiny", "--optimizers", "smoothed@pytorch", "--seconds", "0.1",
         "--out", str(tmp_path)]
    )  # fmt: skip
    assert status == 0
    rows = read(tmp_path / "end_to_end-cpu.json")["results"]
    assert [row["optimizer"] for row in rows] == [BASELINE, "smoothed@pytorch"]
    for row in rows:
        assert 0 < row["optimizer_share"] < 1
    assert (tmp_path / "end_to_end-cpu.png").exists()


def test_flushed_and_kept_cache_time_the_step_alone(monkeypatch):
    monkeypatch.setattr("harness.clocks.CPU_STREAM_BYTES", 1 << 16)
    for clock in (CpuClock(), CpuClock(flush_cache=True)):
        calls = []
        seconds = clock.seconds_per_step(lambda calls=calls: calls.append(1), 4)
        assert len(calls) == 4
        assert 0 < seconds < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("program", [step_time, cpu_overhead, end_to_end])
def test_a_missing_gpu_is_a_reason_not_a_crash(program, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        program.main(["--device", "cuda", "--out", str(tmp_path)])
    assert exit_info.value.code == report.NOTHING_MEASURED
    assert "no usable CUDA device" in capsys.readouterr().out


def test_unknown_names_are_told_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit_info:
        step_time.main(["--optimizers", "adan"])
    assert exit_info.value.code == 2
    assert "no optimizer 'adan'; there are adam-fused" in capsys.readouterr().err


def test_default_contenders_exist():
    assert set(DEFAULT_CONTENDERS) <= set(CONTENDERS)
    assert BASELINE in DEFAULT_CONTENDERS


# --- profiles --------------------------------------------------------------------------------------------------------


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
    document = read(tmp_path / f"{profiler}-sample.json")
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
    assert result.returncode == report.NOTHING_MEASURED, result.stderr
    assert "no usable CUDA device" in result.stdout


@pytest.mark.parametrize("deferred", [False, True])
def test_the_steps_parts_have_names_in_pytorchs_profiler(deferred):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = clara_fused.AdamClaraSmoothed(params, fused=False, deferred=deferred)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    named = {event.key for event in profiler.key_averages() if event.key.startswith("clara.")}
    parts = ["measure_and_apply", "adapt"] if deferred else ["measure", "adapt", "apply"]
    assert named == {f"clara.{part} (smoothed, 2 tensors)" for part in parts}


def test_ranges_go_to_nvtx_once_cuda_is_in_use_and_nowhere_before(monkeypatch):
    ranges = []
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: ranges.append(name) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with profiler_range("measure", Variant.LOCAL, 3):
        pass
    assert ranges == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with profiler_range("measure", Variant.LOCAL, 3):
        pass
    assert ranges == ["clara.measure (local, 3 tensors)"]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_in_the_docs_are_those_of_the_recorded_results():
    outdated = figures.Figures(figures.DEFAULT_RESULTS, figures.REPOSITORY).outdated()
    assert not outdated, f"run `make figures`: {', '.join(outdated)}"


@pytest.fixture
def recorded(tiny, tmp_path):
    """A repository of one text and the results of one tiny run."""
    results = tmp_path / "results"
    step_time.main(
        ["--device", "cpu", "--models", "small-148x64", "--dtypes", "float32", "--optimizers", "local@pytorch",
         "--seconds", "0.1", "--no-plots", "--out", str(results)]
    )  # fmt: skip
    (tmp_path / "docs").mkdir()
    return figures.Figures(results, tmp_path)


def test_figures_are_generated_between_their_markers(recorded, tmp_path):
    readme, guide = tmp_path / "README.md", tmp_path / "docs" / "guide.md"
    readme.write_text("before\n<!-- figure: step-time-float32-cpu -->\n<!-- end of figure -->\nafter\n")
    names = ("table-step-time-cpu", "step-time-float32-cpu", "table-end-to-end-cuda")
    guide.write_text("".join(f"<!-- figure: {name} -->\nold\n<!-- end of figure -->\n" for name in names))
    assert recorded.outdated() == [
        "README.md", "docs/images/step-time-float32-cpu.png", "docs/guide.md", "docs/images/step-time-float32-cpu.png",
    ]  # fmt: skip
    assert set(recorded.update()) == {"README.md", "docs/guide.md", "docs/images/step-time-float32-cpu.png"}
    assert recorded.outdated() == []

    assert readme.read_text().startswith("before\n<!-- figure: step-time-float32-cpu -->\n![Time per optimizer step")
    assert "(docs/images/step-time-float32-cpu.png)" in readme.read_text()
    text = guide.read_text()
    assert "(images/step-time-float32-cpu.png)" in text
    assert "*Not measured yet on a GPU.*" in text
    assert "old" not in text
    (row,) = [row for row in plots.load(recorded.source("step_time", "cpu"))["results"] if row["optimizer"] != BASELINE]
    assert f"| {row['ratio']['median']:.2f} |" in text


def test_runs_are_compared_ratio_by_ratio(recorded, tmp_path, capsys):
    second = tmp_path / "second"
    second.mkdir()
    document = plots.load(recorded.source("step_time", "cpu"))
    document["results"][1]["ratio"]["median"] *= 1.2
    (second / "step_time-cpu.json").write_text(json.dumps(document))
    assert compare_runs.main([str(recorded.results), str(second)]) == 1
    output = capsys.readouterr().out
    assert "+20.0%" in output and "1 of 2 ratios are within 10%" in output
    assert compare_runs.main([str(recorded.results), str(second), "--within", "0.25"]) == 0


def test_a_number_changed_by_hand_and_a_picture_of_other_results_are_found(recorded, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "<!-- figure: table-step-time-cpu -->\n<!-- end of figure -->\n"
        "<!-- figure: roofline-cpu -->\n<!-- end of figure -->\n"
    )
    recorded.update()
    readme.write_text(readme.read_text().replace("| 1.00 |", "| 0.50 |"))
    assert recorded.outdated() == ["README.md"]
    recorded.update()
    source = recorded.source("step_time", "cpu")
    source.write_text(source.read_text() + "\n")
    assert recorded.outdated() == ["docs/images/roofline-cpu.png"]


def test_an_unknown_figure_is_told_with_the_known_ones(recorded, tmp_path):
    (tmp_path / "README.md").write_text("<!-- figure: nonsense-cpu -->\n<!-- end of figure -->\n")
    with pytest.raises(KeyError, match="no figure 'nonsense-cpu'; there are table-bytes, step-time-headline-cpu"):
        recorded.outdated()
