"""The benchmark programs: what they compute, that they run, and that the docs show what they recorded.

Models and results here are tiny: these are tests of the programs, not of speed.
"""

import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks' extra is not installed")

import cpu_overhead
import figures
import profile_target
import state_bytes
import step_time
from helpers import core_available

import clara_fused
from harness import models, report, tables
from harness.clocks import CpuClock, StreamLoops
from harness.contenders import BASELINE, CONTENDERS, DEFAULT_CONTENDERS
from harness.environment import OtherWork
from harness.memory import keep_freed_memory, peak_extra_bytes
from harness.statistics import BASELINE_SAMPLES, all_seconds, measure_interleaved, ratios, summarize

BENCHMARKS = Path(step_time.__file__).parent


# --- models and contenders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2-small", 148, 124_439_808),
        ("gpt2-xl", 580, 1_557_611_200),
        ("llama-1b", 146, 1_235_814_400),
        ("resnet50", 161, 25_557_032),
        ("small-1000x64", 1000, 64_000),
    ],
)
def test_shapes_are_those_of_the_published_models(name, tensors, elements):
    assert len(models.MODELS[name].shapes) == tensors
    assert models.MODELS[name].elements == elements


@pytest.mark.parametrize(
    ("name", "dtype", "moved", "state"),
    [
        ("adam-fused", torch.float32, 28, 8),
        ("adam-fused", torch.bfloat16, 14, 4),
        ("apex", torch.bfloat16, 22, 8),
        # Measure, of one element in 16: gradient, moments and path read, path written.
        ("local", torch.float32, 28 + 20 / 16, 8.25),
        ("global@pytorch", torch.bfloat16, 22 + 18 / 16, 8.25),
        ("local-whole", torch.float32, 48, 12),
    ],
)
def test_bytes_per_element_are_those_of_the_algorithm(name, dtype, moved, state):
    traffic = CONTENDERS[name].traffic(dtype)
    assert (traffic.moved, traffic.state) == (moved, state)
    # Small tensors keep their whole path.
    small = CONTENDERS[name].traffic(dtype, [(64,)] * 3)
    assert small.moved == (48 if name == "local" else 40 if name == "global@pytorch" else moved)


@pytest.mark.parametrize(
    ("shape", "path"),
    [
        ((64,), 64),
        ((65_535,), 65_535),
        ((65_536,), 4096),
        ((768, 3072), 768 * 192),
        ((1024, 80), 1024 * 80),  # rows of 5 x 16: no run of 64
        ((512, 64, 3, 3), 512 * 36),
        ((100_000_000,), 100_000_000 // 16),  # 2^8 divides it: runs of 256
    ],
)
def test_elements_with_a_path_are_those_that_get_one(shape, path):
    assert models.path_elements(shape, 1 / 16) == path
    if math.prod(shape) < 10_000_000:
        param = torch.zeros(shape, requires_grad=True)
        param.grad = torch.ones_like(param)
        optimizer = CONTENDERS["local@pytorch"].build([param])
        optimizer.step()
        assert optimizer.state[param]["path"].numel() == path


def test_state_is_counted_on_fewer_rows_as_on_all():
    assert state_bytes.shortened((50257, 768)) == ((50257, 768), 1)
    assert state_bytes.shortened((4096, 4096)) == ((256, 4096), 16)
    model = models.ModelShapes("m", "M", ((2048, 1024), (64,), (64,)))
    assert state_bytes.state_bytes(state_bytes.OPTIMIZERS["torch Adam"], model, torch.float32) == (
        8 * model.elements + 4 * 3
    )
    ours = state_bytes.state_bytes(state_bytes.OPTIMIZERS["AdamClaraLocal"], model, torch.float32)
    # Moments and a sixteenth of a path; small tensors' whole paths; count, scale and walk of every tensor.
    assert ours == 8.25 * 2048 * 1024 + 12 * 128 + 3 * 9 * 4
    for label in ("Prodigy", "Schedule-free AdamW"):
        pytest.importorskip("prodigyopt")
        pytest.importorskip("schedulefree")
        found = state_bytes.state_bytes(state_bytes.OPTIMIZERS[label], model, torch.float32) / model.elements
        assert found == pytest.approx({"Prodigy": 16, "Schedule-free AdamW": 8}[label], rel=1e-3)


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
    """Steps take the time that they name."""

    min_sample_seconds = 1e-3

    def seconds_per_step(self, step, steps):
        return step()


def test_ratios_are_immune_to_a_machine_that_slows_for_whole_rounds():
    rounds = iter(range(10**6))

    def slowdown():
        return 3.0 if (next(rounds) // 40) % 2 else 1.0

    steps = {"base": lambda: 0.010 * slowdown(), "other": lambda: 0.015 * slowdown()}
    samples = measure_interleaved(steps, FakeClock(), "base", max_seconds=60, max_rounds=120)
    found = summarize(ratios(samples, "other", "base"))
    assert found.samples == 120
    assert found.median == pytest.approx(1.5)
    assert summarize(all_seconds(samples, "base")).quartile_high > 0.025


def test_the_baseline_has_several_samples_in_a_round_and_the_others_one():
    steps = {"base": lambda: 0.01, "other": lambda: 1.0}
    samples = measure_interleaved(steps, FakeClock(), "base", max_seconds=60, max_rounds=12)
    assert [len(of_round) for of_round in samples["base"]] == [BASELINE_SAMPLES] * 12
    assert [len(of_round) for of_round in samples["other"]] == [1] * 12
    assert ratios(samples, "other", "base") == [pytest.approx(100)] * 12
    assert ratios(samples, "base", "other") == [pytest.approx(0.01)] * 12


# --- memory and other work -------------------------------------------------------------------------------------------


def test_peak_memory_of_a_step_counts_what_is_alive_at_once():
    def step():
        first = torch.ones(1000)
        second = first + 1
        del first
        return (second * 2).sum()

    assert 8000 <= peak_extra_bytes(step, torch.device("cpu")) < 9000


PAGES_OF_REPEATED_BLOCKS = """
import resource, sys
import torch
from harness.memory import give_back_freed_memory, keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
step = lambda: torch.ones(16 << 20)

def pages(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages(10)  # until blocks that were freed are large enough for their alignment as well
of_many = pages(20)
give_back_freed_memory()
print(of_many, pages(1))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    def pages(mode):
        command = [sys.executable, "-c", PAGES_OF_REPEATED_BLOCKS, mode]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        return tuple(map(int, done.stdout.split()))

    block = (64 << 20) / os.sysconf("SC_PAGE_SIZE")
    of_twenty_steps, after_giving_back = pages("keep")
    assert of_twenty_steps < 10 * block
    assert after_giving_back >= block
    # What it is there for: left alone, glibc gives each block back and asks for it anew.
    assert pages("leave")[0] >= 20 * block


def test_without_glibc_memory_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the kernel does not tell")
def test_other_work_is_the_work_of_others():
    work = "import time; end = time.perf_counter() + 30\nwhile time.perf_counter() < end: pass"
    with subprocess.Popen([sys.executable, "-c", work]) as busy:
        other_work = OtherWork()
        time.sleep(2)
        with_it = other_work.share()
        busy.kill()
    # Close to a whole core, or what others leave of it, which is other work as well.
    assert with_it > 0.33 / os.cpu_count()


def test_much_other_work_is_told(capsys):
    report.warn_of_other_work(report.MUCH_OTHER_WORK * 1.5, "ran beside this")
    assert "other work (8% of the cores) ran beside this" in capsys.readouterr().out
    report.warn_of_other_work(report.MUCH_OTHER_WORK * 0.9, "ran beside this")
    report.warn_of_other_work(None, "ran beside this")
    assert capsys.readouterr().out == ""


# --- the programs ----------------------------------------------------------------------------------------------------


def make_short(monkeypatch):
    """Small models and loops, short samples; the allocator of the process that runs the tests is left as it is."""
    monkeypatch.setattr(CpuClock, "min_sample_seconds", 1e-4)
    monkeypatch.setattr(cpu_overhead.HostClock, "min_sample_seconds", 1e-4)
    monkeypatch.setattr("harness.report.keep_freed_memory", lambda: False)
    monkeypatch.setattr("harness.clocks.CPU_STREAM_BYTES", 1 << 16)
    monkeypatch.setitem(models.MODELS, "small-148x64", models.small_tensors(3))
    assert StreamLoops(torch.device("cpu")).moved_bytes == 1 << 17


@pytest.fixture(autouse=True)
def as_short_as_can_be(monkeypatch):
    make_short(monkeypatch)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def run(program, folder, *arguments):
    return program.main(["--device", "cpu", "--seconds", "0.1", "--out", str(folder), *arguments])


def test_step_time_runs_end_to_end(tmp_path, capsys):
    status = run(
        step_time, tmp_path, "--models", "small-148x64", "--dtypes", "float32", "bfloat16",
        "--optimizers", "adam-loop", "local@pytorch", "local-whole@pytorch", "apex",
    )  # fmt: skip
    assert status == 0
    document = read(tmp_path / "step_time-cpu.json")
    measured = {(row["dtype"], row["optimizer"]) for row in document["results"]}
    names = {BASELINE, "adam-loop", "local@pytorch", "local-whole@pytorch"}
    assert measured == {(dtype, name) for dtype in ("float32", "bfloat16") for name in names}
    assert {(row["optimizer"], row["where"]) for row in document["skipped"]} == {
        ("apex", "small-3x64 float32"), ("apex", "small-3x64 bfloat16")
    }  # fmt: skip
    assert all("CUDA" in row["reason"] for row in document["skipped"])
    for row in document["results"]:
        assert row["seconds"]["median"] > 0
        assert row["ratio"]["samples"] >= 2
        samples_per_round = BASELINE_SAMPLES if row["optimizer"] == BASELINE else 1
        assert row["seconds"]["samples"] == samples_per_round * row["ratio"]["samples"]
        assert row["peak_extra_bytes"] >= 0
        assert row["ratio"]["median"] == 1 or row["optimizer"] != BASELINE
    assert document["machine"]["cpu"] and document["versions"]["torch"] == torch.__version__
    assert document["other_work"] is None or document["other_work"] >= 0
    shown = capsys.readouterr().out
    assert "**bfloat16**, time per step and ratio:" in shown
    assert "AdamClaraLocal, whole path (PyTorch)" in shown
    assert "not measured: apex FusedAdam" in shown


def test_lists_too_large_for_memory_are_skipped_with_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_time, "available_memory", lambda device: 1000)
    assert run(step_time, tmp_path, "--models", "small-148x64") == report.NOTHING_MEASURED
    assert "not enough memory" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_contenders_that_do_not_fit_together_are_measured_in_groups(tmp_path, monkeypatch):
    elements = models.small_tensors(3).elements
    # Parameters, gradients, a temporary: 12 bytes per element; the baseline's state 8, another's 12.
    monkeypatch.setattr(step_time, "available_memory", lambda device: elements * 33 / step_time.MEMORY_SHARE["cpu"])
    names = ["local@pytorch", "global@pytorch", "smoothed@pytorch"]
    run(step_time, tmp_path, "--models", "small-148x64", "--dtypes", "float32", "--optimizers", *names)
    document = read(tmp_path / "step_time-cpu.json")
    assert [row["optimizer"] for row in document["results"]] == [BASELINE, *names]
    assert len(document["bandwidths"]) == 1
    assert all(row["ratio"]["samples"] >= 2 for row in document["results"])


def test_cpu_overhead_runs_end_to_end(tmp_path):
    assert run(cpu_overhead, tmp_path, "--tensors", "2", "20", "--optimizers", "adam-loop", "global@pytorch") == 0
    document = read(tmp_path / "cpu_overhead-cpu.json")
    assert {(row["tensors"], row["stepped"]) for row in document["results"]} == {(2, 2), (20, 20), (2, 1), (20, 10)}
    # Whether the fitted cost is positive is up to the machine's other work, its being there is not.
    names = ["adam-fused", "adam-loop", "global@pytorch"]
    found = [(cost["gradients"], cost["optimizer"]) for cost in document["costs"]]
    assert sorted(found) == [(gradients, name) for gradients in ("all", "changing") for name in names]
    assert all(math.isfinite(cost["seconds_per_tensor"]) for cost in document["costs"])


def test_gradients_come_and_go_at_random_and_half_of_them_are_there():
    params = models.small_tensors(10).parameters(torch.float32, torch.device("cpu"))
    change, seen = cpu_overhead.Gradients(params, changing=True), set()
    for _ in range(10):
        change()
        seen.add(tuple(param.grad is not None for param in params))
    assert {sum(each) for each in seen} == {5} and len(seen) > 5


def test_linear_costs_recover_a_line():
    rows = [
        {"optimizer": "x", "label": "X", "gradients": "all", "stepped": n, "seconds": {"median": 1e-5 + 2e-6 * n}}
        for n in (10, 100, 1000)
    ]
    (cost,) = cpu_overhead.linear_costs(rows)
    assert cost["seconds_per_step"] == pytest.approx(1e-5, rel=1e-3)
    assert cost["seconds_per_tensor"] == pytest.approx(2e-6, rel=1e-3)


def test_state_bytes_runs_end_to_end(tmp_path):
    assert run(state_bytes, tmp_path, "--models", "small-148x64") == 0
    rows = read(tmp_path / "state_bytes-cpu.json")["results"]
    found = {(row["dtype"], row["optimizer"]): row["bytes_per_parameter"] for row in rows}
    assert found["float32", "torch Adam"] == pytest.approx(8 + 4 / 64, abs=1e-3)
    assert found["bfloat16", "torch Adam"] == pytest.approx(4 + 4 / 64, abs=1e-3)
    assert found["bfloat16", "AdamClaraLocal"] > 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("program", [step_time, cpu_overhead])
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


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_in_the_docs_are_those_of_the_recorded_results():
    outdated = figures.Figures(figures.DEFAULT_RESULTS, figures.REPOSITORY).update(check=True)
    assert not outdated, f"run `make figures`: {', '.join(outdated)}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of a tiny run."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        make_short(patch)
        run(step_time, results, "--models", "small-148x64", "--dtypes", "float32", "--optimizers", "local@pytorch")
    return results


@pytest.fixture
def recorded(measured, tmp_path):
    """A repository of one text and the results of one tiny run."""
    (tmp_path / "docs" / "log").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    source = measured / "step_time-cpu.json"
    (tmp_path / "results" / source.name).write_text(source.read_text())
    return figures.Figures(tmp_path / "results", tmp_path)


def marked(*names):
    return "".join(f"<!-- figure: {name} -->\nold\n<!-- end of figure -->\n" for name in names)


def test_figures_are_generated_between_their_markers(recorded, tmp_path):
    readme, guide, log = (tmp_path / path for path in ("README.md", "docs/guide.md", "docs/log/old.md"))
    readme.write_text(f"before\n{marked('step-time-float32-cpu')}after\n")
    guide.write_text(marked("table-step-time-cpu", "step-time-float32-cpu", "table-host-cost-cuda"))
    log.write_text(marked("step-time-float32-cpu"))
    changed = ["README.md", "docs/images/step-time-float32-cpu.png", "docs/guide.md", "docs/log/old.md"]
    assert recorded.update(check=True) == changed
    assert recorded.update() == changed
    assert recorded.update(check=True) == []

    assert readme.read_text().startswith("before\n<!-- figure: step-time-float32-cpu -->\n![Time per optimizer step")
    for path, link in ((readme, "docs/images"), (guide, "images"), (log, "../images")):
        assert f"({link}/step-time-float32-cpu.png)" in path.read_text()
    text = guide.read_text()
    assert "*Not yet measured on a GPU.*" in text
    assert "old" not in text
    rows = read(recorded.source("step_time", "cpu"))["results"]
    (row,) = [row for row in rows if row["optimizer"] != BASELINE]
    assert f"({row['ratio']['median']:.2f}×)" in text


def test_a_number_changed_by_hand_and_a_picture_of_other_results_are_found(recorded, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(marked("table-step-time-cpu", "step-time-float32-cpu"))
    recorded.update()
    readme.write_text(readme.read_text().replace("(1.00×)", "(0.50×)"))
    assert recorded.update(check=True) == ["README.md"]
    recorded.update()
    source = recorded.source("step_time", "cpu")
    source.write_text(source.read_text() + "\n")
    assert recorded.update(check=True) == ["docs/images/step-time-float32-cpu.png"]


def test_an_unknown_figure_is_told_with_the_known_ones(recorded, tmp_path):
    (tmp_path / "README.md").write_text(marked("nonsense-cpu"))
    with pytest.raises(KeyError, match="no figure 'nonsense-cpu'; there are table-bytes, step-time-float32-cpu"):
        recorded.update()


def test_the_bytes_of_the_docs_are_those_of_the_contenders():
    lines = {line.split(" | ")[0]: line.strip("|").split(" | ")[1:] for line in tables.bytes_table().splitlines()}
    assert lines["| these, a path for 1 element in 16"] == ["29.25", "8.25", "23.125", "8.25 "]


def test_tables_are_aligned_on_a_terminal():
    text = "times:\n\n" + tables.markdown_table(["optimizer", "ms"], [["x", "10"], ["y", "1,000"]]) + "\nend\n"
    assert tables.aligned(text).splitlines() == [
        "times:",
        "",
        "| optimizer |    ms |",
        "| ---       |  ---: |",
        "| x         |    10 |",
        "| y         | 1,000 |",
        "",
        "end",
    ]


def test_the_canary_of_the_sanitizers_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one tensor, whose sums have room: what is to fail on a GPU must fail there for the overrun alone."""
    if not core_available():
        pytest.skip("needs the compiled core")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = clara_fused.AdamClaraLocal([param])
    param.grad = torch.ones(3)
    optimizer.step()
    profile_target.overrun(optimizer)
