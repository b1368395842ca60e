"""The learning-rate study: runs that repeat and resume, measures that say what they claim, tables from records."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from study import figures, measures, plans, random_walk, report, runs, sweep_report, tasks
from study.contenders import CONTENDERS, clara, variation

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "learning_rate"


def short_run(task: str = "mlp-iris", optimizer: str = "smoothed", lr: float = 1e-3, steps: int = 12) -> runs.Run:
    return runs.Run(replace(tasks.TASKS[task], steps=steps), CONTENDERS[optimizer], lr, seed=0)


def record(
    task: str = "mlp-iris", optimizer: str = "adam", lr: float = 1e-3, loss: float | None = 1.0, seed: int = 0
) -> dict[str, Any]:
    return {
        "task": task, "optimizer": optimizer, "lr": lr, "seed": seed, "steps": 10, "optimizer_seconds": 1e-3,
        "initial_training_loss": 2.0, "training_loss": loss, "validation_loss": loss,
        "diverged": loss is None or loss > 2.0,
    }  # fmt: skip


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["logistic-wine", "mlp-iris", "conv-digits", "quadratic", "rosenbrock-noise"])
def test_a_run_repeats_and_is_json(task: str) -> None:
    first, second = runs.perform(short_run(task)), runs.perform(short_run(task))
    for timed in ("seconds", "optimizer_seconds"):
        assert first.pop(timed) > 0
        second.pop(timed)
    assert first == second
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_every_optimizer_gets_the_same_batches() -> None:
    one, other = (runs.perform(short_run(optimizer=name, lr=0.0)) for name in ("adam", "global"))
    assert one["snapshots"]["loss"] == other["snapshots"]["loss"]


def test_a_run_that_blows_up_is_recorded_as_diverged() -> None:
    found = runs.perform(short_run("rosenbrock", "adam", lr=1e100))
    assert found["diverged"] and found["training_loss"] is None


def test_other_options_are_another_run() -> None:
    base = short_run()
    changed = replace(base, contender=clara("smoothed", damping=0.7))
    scheduled = replace(base, contender=clara("smoothed", schedule="cosine"))
    keys = {each.key for each in (base, changed, scheduled, replace(base, seed=1), replace(base, lr=1e-2))}
    assert len(keys) == 5
    assert replace(base, seed=0).key == base.key


def test_only_missing_runs_are_made_and_a_cut_line_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    done, cut, todo = (short_run(lr=lr) for lr in (1e-3, 1e-2, 1e-1))
    runs.append_record(path, {"key": done.key})
    with path.open("a") as file:
        file.write('{"key":"' + cut.key)  # the process died here
    assert [run.key for run in runs.missing([done, cut, todo, todo], path)] == [cut.key, todo.key]
    runs.append_record(path, {"key": cut.key})
    assert [run.key for run in runs.missing([done, cut, todo], path)] == [todo.key]


@pytest.mark.parametrize("name", list(plans.PLANS))
def test_plans_hold_no_run_twice(name: str) -> None:
    keys = [run.key for run in plans.PLANS[name]()]
    assert len(keys) == len(set(keys))


def test_the_plans_together_give_every_optimizer_all_decades_and_seeds() -> None:
    planned = (*plans.full(), *plans.measured(), *plans.cautious())
    made = {(run.task.name, run.contender.name, run.lr, run.seed) for run in planned}
    for task in tasks.TASKS:
        for optimizer in CONTENDERS:
            for lr in plans.DECADES:
                assert all((task, optimizer, lr, seed) in made for seed in plans.SEEDS)


def test_the_sweep_covers_what_the_defaults_are_chosen_by() -> None:
    needed = {"smoothing", "damping", "clip", "initial_scale", "scale_bounds"}
    for base, changes in plans.SWEPT.items():
        swept = {option for change in changes for option in change}
        if not base.startswith("smoothed"):
            assert swept >= needed, base
        else:
            assert "lr_smoothing" in swept, base
    assert {option for change in plans.SWEPT["smoothed"] for option in change} >= needed
    for run in plans.sweep():
        assert (run.task, run.lr) in plans.swept_pairs(run.contender.name.split(",")[0])


def test_every_setting_of_the_sweep_differs_from_what_it_is_compared_with() -> None:
    for base in plans.SWEPT:
        made = [CONTENDERS[base], *plans.variations(base)]
        assert len({json.dumps(dict(contender.options), sort_keys=True) for contender in made}) == len(made)
        assert len({contender.name for contender in made}) == len(made)


def test_a_variation_keeps_what_it_does_not_change() -> None:
    base, changed = CONTENDERS["smoothed-measured"], variation("smoothed-measured", damping=0.1)
    assert (base.options["damping"], changed.options["damping"]) == ("0.25", "0.1")
    assert {**changed.options, "damping": "0.25"} == base.options
    assert changed.name == "smoothed-measured,damping=0.1"
    assert changed.label == "AdamClaraSmoothed, measured walk,damping=0.1"


# --- tasks and contenders --------------------------------------------------------------------------------------------


def test_the_functions_have_their_minimum_where_they_should() -> None:
    for problem, minimum in (
        (tasks.ill_conditioned_quadratic(0, 0.0), torch.zeros(64, dtype=torch.float64)),
        (tasks.rosenbrock(0, 0.0), torch.ones(16, dtype=torch.float64)),
    ):
        with torch.no_grad():
            problem.parameters[0].copy_(minimum)
        loss = problem.next_loss()
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-20)
        assert problem.parameters[0].grad.abs().max() < 1e-10


def test_multiplicative_noise_has_mean_one_and_the_stated_spread() -> None:
    noisy, exact = tasks.rosenbrock(0, 0.5), tasks.rosenbrock(0, 0.0)
    exact.next_loss().backward()
    ratios = []
    for _ in range(500):
        noisy.parameters[0].grad = None
        noisy.next_loss().backward()
        ratios.append(noisy.parameters[0].grad / exact.parameters[0].grad)
    found = torch.stack(ratios)
    assert found.mean().item() == pytest.approx(1.0, abs=0.03)
    assert found.std().item() == pytest.approx(0.5, abs=0.03)


def test_held_out_samples_are_not_trained_on() -> None:
    training, validation = tasks.classification_data("iris")
    assert len(training.inputs) + len(validation.inputs) == 150
    assert len(validation.inputs) == 30
    assert len(set(validation.classes.tolist())) == 3


def test_the_cosine_ends_at_zero_and_estimators_start_at_the_initial_rate() -> None:
    parameter = torch.ones(3, requires_grad=True)
    trainer = CONTENDERS["adamw-cosine"].build([parameter], 0.1, 5)
    for _ in range(5):
        parameter.grad = torch.ones(3)
        trainer.step()
    assert trainer.rates().item() == pytest.approx(0.0, abs=1e-12)
    for name, module in (("prodigy", "prodigyopt"), ("dadaptation", "dadaptation")):
        pytest.importorskip(module)
        assert CONTENDERS[name].build([parameter], 1e-4, 5).rates().item() == pytest.approx(1e-4)


def test_a_schedule_and_a_bound_of_the_gradient_norm_act_on_the_training() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    trainer = clara("local", schedule="warm-up", max_grad_norm=1.0).build([parameter], 0.1, 100)
    rates = []
    for _ in range(12):
        parameter.grad = torch.tensor([3.0, 4.0])
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.step()
        assert parameter.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    assert rates[0] == pytest.approx(0.001)
    assert rates[10] == rates[11] == pytest.approx(0.1)  # a tenth of the steps


# --- measures --------------------------------------------------------------------------------------------------------


def test_span_and_regret_are_measured_against_tuned_adam() -> None:
    adam = {1e-6: 1.9, 1e-5: 1.8, 1e-4: 1.5, 1e-3: 1.0, 1e-2: 1.05, 1e-1: 1.5, 1.0: None}
    ours = {1e-6: 1.2, 1e-5: 1.09, 1e-4: 1.0, 1e-3: 1.02, 1e-2: 1.04, 1e-1: 1.11, 1.0: None}
    study = measures.Study(
        [record(lr=lr, loss=loss) for lr, loss in adam.items()]
        + [record(optimizer="local", lr=lr, loss=loss) for lr, loss in ours.items()]
    )
    assert study.tuned_baseline("mlp-iris", "validation") == (1e-3, 1.0)
    assert study.measures("mlp-iris", "adam", "validation").span == 2
    found = study.measures("mlp-iris", "local", "validation")
    assert (found.span, found.decades) == (4, 7)
    assert found.regret == pytest.approx(0.02)
    assert (found.diverged, found.runs) == (0, 5)  # the divergence from lr 1 is above the rates that must be safe
    assert found.step_microseconds == pytest.approx(100.0)


def test_one_bad_seed_spoils_its_rate() -> None:
    study = measures.Study(
        [record(seed=seed) for seed in (0, 1)]
        + [record(optimizer="local", loss=loss, seed=seed) for seed, loss in enumerate((1.0, None))]
    )
    found = study.measures("mlp-iris", "local", "training")
    assert (found.span, found.diverged, found.runs) == (0, 1, 2)
    assert found.regret == math.inf


def test_functions_count_decimal_digits() -> None:
    study = measures.Study(
        [
            record("quadratic", loss=2e-8),
            record("quadratic", "local", loss=2e-7, lr=1e-3),  # 7 digits where Adam gains 8
            record("quadratic", "local", loss=2e-9, lr=1e-2),
            record("quadratic", "local", loss=None, lr=1e-1),
        ]
    )
    assert study.tuned_baseline("quadratic", "validation") == (1e-3, pytest.approx(-8.0))
    found = study.measures("quadratic", "local", "validation")
    assert found.span == 1
    assert found.regret == pytest.approx(1 / 8)
    assert measures.digits_gained(record("quadratic", loss=5.0)) == 0.0


def test_the_summary_counts_tasks_with_all_decades_only() -> None:
    complete = [record(lr=lr) for lr in plans.DECADES]
    study = measures.Study([*complete, record("mlp-wine")])
    summary = measures.summarize(study, "adam", "training", study.tasks)
    assert (summary.tasks, summary.wide, summary.mean_span, summary.small_regret) == (1, 1, 7.0, 1)


def test_small_regrets_are_counted_among_the_known_ones() -> None:
    tuned_between = [record(lr=lr) for lr in plans.DECADES] + [record(lr=3e-3, loss=0.5)]
    tuned_at_decade = [record("mlp-wine", lr=lr, loss=0.5 if lr == 1e-3 else 1.0) for lr in plans.DECADES]
    study = measures.Study(
        [*tuned_between, *tuned_at_decade]
        + [record(task, "prodigy", lr=lr, loss=0.5) for task in ("mlp-iris", "mlp-wine") for lr in plans.DECADES]
    )
    table = report.summary_table(study, "training", ["adam", "prodigy"])
    small_regret = table.header.index("regret ≤ 1%")
    assert [row[small_regret] for row in table.rows] == ["2 of 2", "1 of 1"]


def test_one_rate_counts_tasks_near_their_own_tuned_baseline() -> None:
    adam = [record(lr=1e-3), record("mlp-wine", loss=0.5, lr=1e-2), record("mlp-wine", loss=2.0, lr=1e-3)]
    ours = [record("mlp-wine", "local", loss=0.54, lr=1e-3), record(optimizer="local", loss=1.2, lr=1e-3)]
    diverged = {**record(optimizer="local", loss=0.9, lr=1e-1), "diverged": True}
    table = report.one_rate_table(measures.Study([*adam, *ours, diverged]), "training", ["adam", "local"])
    at = {lr: table.header.index(report.lr_text(lr)) for lr in (1e-3, 1e-2, 1e-1)}
    assert [table.rows[0][at[lr]] for lr in (1e-3, 1e-2)] == ["1", "1 of 1"]
    assert [table.rows[1][at[lr]] for lr in (1e-3, 1e-1)] == ["1", "0 of 1"]


def swept_study(losses: dict[str, float], skip: set[str] | None = None) -> measures.Study:
    """Adam's loss is 1 everywhere. `losses` are those of the others from 1e-3, and ten times it from other rates."""
    return measures.Study(
        record(task, name, lr, loss if name == "adam" or lr == 1e-3 else 10 * loss, seed)
        for task in tasks.TASKS
        for name, loss in {"adam": 1.0, **losses}.items()
        for lr in plans.SWEEP_LRS
        for seed in plans.SEEDS
        if not (task == "mlp-iris" and name in (skip or set()))
    )


def test_the_sweep_compares_each_setting_with_the_unchanged_one() -> None:
    better, equal = "local,damping=0.5", "local,damping=5.0"
    study = swept_study({"local": 0.2, better: 0.05, equal: 0.202})
    table = sweep_report.sweep_table(study, "local")
    assert [line[0] for line in table.rows] == ["nothing", "damping=0.5", "damping=5.0"]
    near = table.header.index("within 10% of tuned Adam, training")
    assert [line[near] for line in table.rows] == ["14", "41", "14"]
    # Of one seed; from 1e-5, since 1e-1 may diverge.
    assert [line[-1] for line in table.rows] == ["0 of 28", "0 of 28", "14 of 28"]
    won_and_lost = table.header.index("better : worse, training")
    from_1e3 = table.header.index("from 1e-3")
    assert [line[won_and_lost] for line in table.rows] == ["–", "41 : 0", "0 : 0"]
    assert [line[from_1e3] for line in table.rows[1:]] == ["-75.0%", "+1.0%"]


def test_the_sweep_shows_no_setting_that_was_not_run_everywhere() -> None:
    study = swept_study({"local": 0.1, "local,damping=0.5": 0.1}, skip={"local,damping=0.5"})
    assert [line[0] for line in sweep_report.sweep_table(study, "local").rows] == ["nothing"]


def test_a_lost_run_changes_all_or_nothing() -> None:
    assert sweep_report.change(1.0, math.inf) == -1.0
    assert sweep_report.change(math.inf, 1.0) == math.inf
    assert sweep_report.change(math.inf, math.inf) == 0.0
    assert sweep_report.change(-3.0, 0.0) == -1.0  # three digits gained instead of none
    assert sweep_report.change(-3.0, -4.0) == pytest.approx(0.25)


# --- random walk, tables, pictures -----------------------------------------------------------------------------------


def test_the_closed_form_explains_the_papers_monte_carlo_means() -> None:
    limit = random_walk.normalized_limit(random_walk.BETA1, random_walk.PAPER_SMOOTHING)
    for mean in random_walk.PAPER_MEANS.values():
        assert mean == pytest.approx(limit, abs=2e-4)


def test_normalized_steps_walk_as_the_closed_form_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_walk.NORMALIZED_STEPS, 650, 3000)
    found = random_walk.normalized_path(650, torch.Generator().manual_seed(0))
    assert found == pytest.approx(random_walk.normalized_limit(0.9, 0.2), rel=0.01)


def test_unknown_marks_in_the_text_are_errors() -> None:
    empty = measures.Study([])
    with pytest.raises(KeyError, match="no-such-table"):
        nothing = figures.Recorded(*[empty] * 5, {})
        figures.with_tables("<!-- study: no-such-table -->\n<!-- end of study -->", nothing)


def test_tables_name_losses_that_are_not_finite() -> None:
    study = measures.Study([record(loss=None), record(lr=1e-2, loss=0.5), record(optimizer="local", lr=1e-1)])
    table = report.loss_table(study, "mlp-iris", "validation", ["adam"])
    assert table.header == ["optimizer", "1e-3", "1e-2", "1e-1"]
    assert table.rows[0] == ["Adam", "∞", "0.5", "–"]
    assert table.markdown().count("\n") == 3


def test_the_report_of_a_part_of_the_decades_has_a_result_and_no_empty_table(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for lr in (1e-4, 1e-2):
        for optimizer in ("adam", "local"):
            runs.append_record(path, record(optimizer=optimizer, lr=lr, loss=1.0 if lr == 1e-2 else 1.05))
    console = Console(width=120, record=True)
    report.print_report(console, path)
    shown = " ".join(console.export_text().split())  # titles are wrapped to the width of their tables
    assert "tasks of 1 that end within 10% of tuned Adam, by training loss" in shown
    assert "mean span" not in shown  # it needs all decades
    assert "4 settings, 1 seed each" in shown


def test_pictures_are_drawn_from_few_records() -> None:
    made = [runs.perform(short_run("mlp-digits", name, lr)) for name in ("adam", "smoothed") for lr in (1e-3, 1.0)]
    study = measures.Study(made)
    for figure in (figures.draw_losses(study, figures.STYLES), figures.draw_trajectories(study, plans.OURS)):
        figure.canvas.draw()
        figures.plt.close(figure)


@pytest.mark.skipif(not (DOCS / "learning_rate.md").exists(), reason="no text to compare with")
def test_the_text_shows_the_recorded_results() -> None:
    text = (DOCS / "learning_rate.md").read_text(encoding="utf-8")
    assert figures.with_tables(text, figures.Recorded.read(RESULTS)) == text
