"""The learning-rate study: runs that repeat and resume, measures that say what they claim, targets, tables."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from study import __main__ as program
from study import contenders, figures, language_tasks, measures, plans, report, runs, small_tasks, targets, tasks
from study.contenders import CONTENDERS, OURS, Contender

CPU = torch.device("cpu")


def short_run(task: str = "mlp-iris", optimizer: str = "smoothed", lr: float = 1e-3, steps: int = 12) -> runs.Run:
    return runs.Run(task, CONTENDERS[optimizer], lr, seed=0, steps=steps)


def record(
    task: str = "mlp-iris", optimizer: str = "adam", lr: float = 1e-3, loss: float | None = 1.0, seed: int = 0,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    options = CONTENDERS[optimizer].settings if optimizer in CONTENDERS else {}
    return {
        "key": f"{task} {optimizer} {lr} {seed}", "task": task, "optimizer": optimizer, "options": options, "lr": lr,
        "seed": seed, "steps": 10, "seconds": 1.0, "parameters": 20_000, "initial_training_loss": 2.0,
        "training_loss": loss, "validation_loss": loss, "diverged": loss is None or loss > 2.0,
        "snapshots": {"step": [5, 10], "lr_median": [lr, lr]}, **more,
    }  # fmt: skip


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["logistic-wine", "mlp-iris", "conv-norm", "temperature", "rosenbrock-noise"])
def test_a_run_repeats_and_is_json(task: str) -> None:
    first, second = runs.perform(short_run(task)), runs.perform(short_run(task))
    assert first.pop("seconds") > 0 and second.pop("seconds") > 0
    assert first == second
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_every_optimizer_gets_the_same_batches() -> None:
    one, other = (runs.perform(short_run(optimizer=name, lr=0.0)) for name in ("adam", "global"))
    assert one["snapshots"]["loss"] == other["snapshots"]["loss"]


def test_a_run_that_blows_up_is_recorded_as_diverged() -> None:
    found = runs.perform(short_run("rosenbrock", "adam", lr=1e100))
    assert found["diverged"] and found["training_loss"] is None


def test_other_settings_are_another_run_and_runs_travel_between_processes() -> None:
    base = short_run()
    changed = Contender("smoothed", "", "smoothed", {"damping": 0.7})
    scheduled = Contender("smoothed", "", "smoothed", warm_up=0.1)
    annealed = Contender("smoothed", "", "smoothed", final=0.0)
    others = [runs.Run(base.task, each, base.lr, base.seed, base.steps) for each in (changed, scheduled, annealed)]
    others += [runs.Run(base.task, base.contender, base.lr, 1, 12), short_run(lr=1e-2), short_run(steps=13)]
    assert len({each.key for each in (base, *others)}) == 7
    assert pickle.loads(pickle.dumps(base)).key == short_run().key == base.key
    # The default by its value is the same run: what counts is what is in force.
    defaults = OURS["smoothed"]([torch.zeros(1)]).defaults
    same = Contender("smoothed", "", "smoothed", {"damping": defaults["damping"]})
    assert runs.Run(base.task, same, base.lr, base.seed, base.steps).key == base.key


def test_only_missing_runs_are_made_and_a_cut_line_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "main.jsonl"
    done, cut, todo = (short_run(lr=lr) for lr in (1e-3, 1e-2, 1e-1))
    runs.append_record(path, {"key": done.key})
    with path.open("a") as file:
        file.write('{"key":"' + cut.key)  # the process died here
    assert [run.key for run in runs.missing([done, cut, todo, todo], runs.read_records(path))] == [cut.key, todo.key]
    runs.append_record(path, {"key": cut.key})
    runs.append_record(tmp_path / "peers.jsonl", {"key": todo.key})
    assert runs.missing([done, cut, todo], runs.read_records(tmp_path)) == []


@pytest.mark.slow
def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In processes of its own, as the program does."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # measured, they take ten times as long to start
    planned = [short_run(lr=lr, steps=3) for lr in (1e-3, 1e-2)]
    monkeypatch.setitem(plans.PLANS, "quick", lambda study: planned)
    program.main(["run", "quick", "--records", str(tmp_path), "--minutes", "0"])
    assert "nothing is recorded" in capsys.readouterr().out
    runs.append_record(tmp_path / "quick.jsonl", runs.perform(planned[0]))
    program.main(["run", "quick", "--records", str(tmp_path), "--jobs", "1"])
    assert [found["key"] for found in runs.read_records(tmp_path)] == [run.key for run in planned]
    assert "2 runs on 1 tasks, 1 seed." in " ".join(capsys.readouterr().out.split())
    program.main(["forget", "smoothed", "--records", str(tmp_path)])
    assert list(runs.read_records(tmp_path)) == []
    with pytest.raises(SystemExit, match="no plan fast"):
        program.main(["run", "fast"])


# --- plans -----------------------------------------------------------------------------------------------------------

NOTHING = measures.Study([])


@pytest.mark.parametrize("name", list(plans.PLANS))
def test_plans_hold_no_run_twice(name: str) -> None:
    keys = [run.key for run in plans.PLANS[name](NOTHING)]
    assert len(keys) == len(set(keys))


def test_the_plan_gives_ours_all_decades_and_seeds_and_the_baselines_half_decades() -> None:
    made = {(run.task, run.contender.name, run.lr, run.seed) for run in plans.main(NOTHING)}
    for task in targets.MAIN:
        for seed in plans.SEEDS:
            assert all((task, name, lr, seed) in made for name in OURS for lr in plans.DECADES)
            assert all((task, name, lr, seed) in made for name in measures.BASELINES for lr in plans.HALF_DECADES)


def test_ours_start_from_tuned_adams_rate_as_well() -> None:
    adam = [record(lr=lr, loss=0.5 if lr == 3e-3 else 1.0) for lr in plans.HALF_DECADES]
    made = plans.tuned(measures.Study(adam))
    assert {(run.task, run.lr) for run in made} == {("mlp-iris", 3e-3)}
    assert len(made) == len(OURS) * len(plans.SEEDS)


def test_the_search_confirms_its_best_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LARGE_FIRST", [tasks.TASKS["mlp-iris"], tasks.TASKS["mlp-wine"]])
    search = plans.single(NOTHING)
    assert len(search) == plans.SEARCHED * 2 and {run.seed for run in search} == {0}
    adam = [record(task) for task in ("mlp-iris", "mlp-wine")]
    found = [record(r.task, r.contender.name, r.lr, 1.0 + int(r.contender.name.split("#")[1]) / 100) for r in search]
    confirmed = plans.single(measures.Study([*adam, *found]))
    assert {run.contender.name for run in confirmed} == {f"adamw#{i}" for i in range(plans.CONFIRMED)}
    assert {run.seed for run in confirmed} == {1, 2}


def test_the_sampling_plan_lowers_the_threshold() -> None:
    run = next(run for run in plans.sampling(NOTHING) if run.contender.name == "local,path=1/16")
    with run.contender.sampling():
        param = torch.zeros(64, 64, requires_grad=True)
        param.grad = torch.ones(64, 64)
        trainer = run.contender.build([param], 1e-3, 1)
        trainer.step()
    assert trainer.optimizer.state[param]["path"].numel() == 64 * 64 // 16


# --- tasks and contenders --------------------------------------------------------------------------------------------


def test_the_functions_have_their_minimum_where_they_should() -> None:
    for problem, minimum in (
        (small_tasks.ill_conditioned_quadratic(0, CPU, 0.0), torch.zeros(64, dtype=torch.float64)),
        (small_tasks.rosenbrock(0, CPU, 0.0), torch.ones(16, dtype=torch.float64)),
    ):
        with torch.no_grad():
            problem.parameters[0].copy_(minimum)
        loss = problem.next_loss()
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-20)
        assert problem.parameters[0].grad.abs().max() < 1e-10


def test_multiplicative_noise_has_mean_one_and_the_stated_spread() -> None:
    noisy, exact = small_tasks.rosenbrock(0, CPU, 0.5), small_tasks.rosenbrock(0, CPU, 0.0)
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
    x, y, held_out_x, held_out_y = small_tasks.classification_data("iris")
    assert (len(x), len(y), len(held_out_x)) == (120, 120, 30)
    assert len(set(held_out_y.tolist())) == 3


def test_the_words_are_many_and_most_are_rare() -> None:
    data = language_tasks.word_data()
    inputs, targets_ = data.training_batch(20_000, torch.Generator().manual_seed(0))
    assert inputs.shape == (20_000, 6) and int(inputs.max()) < data.vocabulary_size == 8192
    counts = torch.bincount(targets_, minlength=8192)
    assert (counts == 0).float().mean() > 0.4  # no gradient of their own in hundreds of batches
    assert len(data.validation[0]) == 2000


@pytest.mark.parametrize("always_run", [False, True])
def test_each_token_goes_to_one_expert_and_a_starving_one_gets_none(always_run: bool) -> None:
    torch.manual_seed(0)
    layer = language_tasks.Experts(8, experts=4, hidden=5, always_run=always_run)
    x = torch.randn(10, 20, 8)
    gates = layer.router(x).softmax(-1)
    gate, chosen = gates.max(-1)
    expected = torch.stack([layer.experts[i](row) for i, row in zip(chosen.flatten(), x.view(-1, 8), strict=True)])
    torch.testing.assert_close(layer(x).view(-1, 8), gate.view(-1, 1) * expected)

    model = torch.nn.Sequential(layer)
    for batch, starves in ((149, False), (150, True), (299, True), (300, False)):
        language_tasks.starve(model, batch)
        model.zero_grad()
        (model(x).square().sum() + layer.balance).backward()
        grads = [parameter.grad for parameter in layer.experts[0].parameters()]
        if not starves:
            assert all(grad.abs().sum() > 0 for grad in grads)
        else:
            assert all(not grad.any() if always_run else grad is None for grad in grads)


def test_adapters_start_as_the_pretrained_model_and_are_all_that_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_tasks, "CACHE", tmp_path)
    base = language_tasks.pretrained_state(steps=2)
    kept = language_tasks.pretrained_state(steps=2)
    assert all(torch.equal(base[name], kept[name]) for name in base) and len(list(tmp_path.iterdir())) == 1
    model, frozen = language_tasks.gpt_with_adapters(base), language_tasks.gpt(language_tasks.prose())
    frozen.load_state_dict(base)
    windows = language_tasks.prose().validation[0][:4]
    assert torch.equal(model(windows), frozen(windows))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 16 and all(name.endswith(("up", "down")) for name in trained)


def test_batches_are_averaged_and_gradients_clipped() -> None:
    task = {t.name: t for t in tasks.MAIN_TASKS}
    assert task["gpt-accumulated"].micro_batches == 4 and task["gpt-clipped"].max_grad_norm == 1.0
    whole = runs.perform(short_run("gpt-accumulated", "adam", lr=0.0, steps=1))
    problem = task["gpt-accumulated"].make(0, CPU)
    with torch.no_grad():
        losses = [problem.next_loss().item() for _ in range(4)]
    assert whole["snapshots"]["loss"] == [pytest.approx(sum(losses) / 4, rel=1e-3)]


def test_the_schedule_warms_up_and_ends_where_it_should() -> None:
    parameter = torch.ones(3, requires_grad=True)
    trainer = Contender("c", "c", "adamw", warm_up=0.2, final=0.1).build([parameter], 1.0, 10)
    rates = []
    for _ in range(10):
        rates.append(trainer.rates().item())
        parameter.grad = torch.ones(3)
        trainer.step()
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert trainer.rates().item() == pytest.approx(0.1)


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_every_contender_takes_steps(name: str) -> None:
    pytest.importorskip(contenders.OPTIMIZERS[CONTENDERS[name].optimizer][0])
    found = runs.perform(short_run("logistic-iris", name, lr=1.0 if name == "prodigy" else 1e-2, steps=20))
    assert found["training_loss"] < found["initial_training_loss"]
    assert all(rate > 0 for rate in found["snapshots"]["lr_median"][:-1])  # a cosine's last is 0


# --- measures and targets --------------------------------------------------------------------------------------------

ADAM = {1e-5: 1.8, 1e-4: 1.5, 1e-3: 1.0, 1e-2: 1.05, 1e-1: 1.5, 1.0: None}


def test_runs_are_compared_with_the_same_seeds() -> None:
    """While a study is on its way a cell may have fewer; seeds differ by more than optimizers do."""
    study = measures.Study(
        [
            *(record(loss=loss, seed=seed) for seed, loss in enumerate((1.0, 3.0))),
            record(lr=1e-2, loss=0.5, seed=1),
            record(optimizer="local", loss=1.1, seed=0),
        ]
    )
    assert study.tuned("mlp-iris", "training") == 0.5
    assert study.regret("mlp-iris", "local", 1e-3, "training") == pytest.approx(0.1)
    assert math.isnan(study.mean("mlp-iris", "local", 1e-3, "training", seeds=(0, 1)))


def test_span_and_regret_are_measured_against_tuned_adam() -> None:
    ours = {1e-6: 1.2, 1e-5: 1.09, 1e-4: 1.0, 1e-3: 1.02, 1e-2: 1.04, 1e-1: 1.11, 1.0: None}
    study = measures.Study(
        [record(lr=lr, loss=loss) for lr, loss in ADAM.items()]
        + [record(optimizer="local", lr=lr, loss=loss) for lr, loss in ours.items()]
    )
    assert study.best("mlp-iris", "adam", "validation") == (1e-3, 1.0)
    assert study.span("mlp-iris", "local", "validation", plans.DECADES) == 4
    assert study.span("mlp-iris", "adam", "validation", plans.DECADES) is None  # not from 1e-6
    assert study.regret("mlp-iris", "local", 1e-3, "training") == pytest.approx(0.02)
    assert math.isnan(study.regret("mlp-iris", "local", 3e-3, "training"))
    assert study.diverged("mlp-iris", "local", 1.0) == 1


def test_one_bad_seed_spoils_its_rate() -> None:
    study = measures.Study(
        [record(seed=seed) for seed in (0, 1)]
        + [record(optimizer="local", loss=loss, seed=seed) for seed, loss in enumerate((1.0, None))]
    )
    assert study.regret("mlp-iris", "local", 1e-3, "training") == math.inf
    assert not study.near("mlp-iris", "local", 1e-3, "training")
    # By luck of few held-out samples the loss of a diverged run may be low.
    lucky = measures.Study([record(), record(optimizer="local", loss=0.5) | {"diverged": True}])
    assert not lucky.near("mlp-iris", "local", 1e-3, "validation")


def test_functions_count_decimal_digits() -> None:
    study = measures.Study([record("quadratic", loss=2e-8), record("quadratic", "local", loss=2e-7)])
    assert study.best("quadratic", "adam", "validation") == (1e-3, pytest.approx(-8.0))
    assert study.regret("quadratic", "local", 1e-3, "training") == pytest.approx(1 / 8)
    assert measures.digits_gained(record("quadratic", loss=5.0)) == 0.0


def test_records_of_defaults_that_are_gone_do_not_count() -> None:
    old = record(optimizer="local") | {"options": {"damping": "17.0"}}
    assert measures.Study([record(), old]).optimizers == ["adam"]


def all_tasks(**losses: Any) -> list[dict[str, Any]]:
    """Records of every task: by optimizer the loss, or a function from rate to loss, at the rates of its plan."""
    made = []
    for task in targets.MAIN:
        for name, loss in losses.items():
            name = name.replace("_", "-")
            for lr in plans.RATES[name]:
                value = loss(lr) if callable(loss) else loss
                # Functions gain as many digits as make the same regret.
                final = 2.0 * 10 ** -(10 / value) if tasks.TASKS[task].goal == "digits" and value else value
                made.append(record(task, name, lr, final))
    return made


def verdicts(study: measures.Study, optimizer: str = "local") -> dict[str, targets.Verdict]:
    return {name: target(study, optimizer) for name, target in targets.TARGETS.items()}


def test_targets_are_met_by_an_optimizer_that_is_as_good_as_tuned_ones_everywhere() -> None:
    adam = lambda lr: 1.0 if lr == 1e-2 else 1.5  # noqa: E731
    study = measures.Study(
        all_tasks(adam=adam, adamw_cosine=adam, local=0.99)
        + [record(task, "adamw#3", 0.02, 1.2, parameters=5) for task in targets.MAIN]
    )
    found = verdicts(study)
    assert all(verdict.met for verdict in found.values()), found
    assert found["no run of the seven decades diverges"].found == f"0 of {7 * len(targets.MAIN)}"


def test_targets_are_missed_for_their_reasons() -> None:
    adam = lambda lr: 1.0 if lr == 1e-2 else 1.5  # noqa: E731
    ours = lambda lr: None if lr == 1.0 else 1.06 if lr in (1e-2, 1e-3) else 1.3  # noqa: E731
    found = verdicts(measures.Study(all_tasks(adam=adam, adamw_cosine=0.9, local=ours)))
    missed = {name for name, verdict in found.items() if verdict.met is False}
    unknown = {name for name, verdict in found.items() if verdict.met is None}
    assert unknown == {name for name in found if "single" in name}
    assert missed == set(found) - unknown  # also the share near the best: 1.06 is 18% above AdamW's 0.9
    networks = next(found[name] for name in found if "networks" in name)
    assert networks.found.startswith("18 of 18 above")


def test_nothing_recorded_is_nothing_known() -> None:
    assert {verdict.met for verdict in verdicts(NOTHING).values()} == {None}


def test_the_best_single_configuration_is_near_the_best_on_most_tasks() -> None:
    made = all_tasks(adam=1.0)
    for task in targets.MAIN:
        made.append(record(task, "adamw#0", 1e-2, 1.0 if task.startswith("mlp") else 1.2))
        made.append(record(task, "adamw#1", 3e-2, 1.05 if tasks.TASKS[task].goal == "loss" else 1.9))
    assert measures.best_single(measures.Study(made)) == ["adamw#1", "adamw#0"]


# --- tables and pictures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_study() -> measures.Study:
    pairs = [(name, lr) for name in ("adam", "local") for lr in (1e-3, 1.0)]
    made = [runs.perform(short_run("conv-digits", name, lr, steps=4)) for name, lr in pairs]
    sampled = [record("words", f"local,path={text}", loss=loss) for text, loss in (("1", 1.0), ("1/16", 1.01))]
    return measures.Study([*made, *sampled, record("gpt-text-long", "adam")])


def test_the_report_tells_what_is_there(small_study: measures.Study) -> None:
    console = Console(width=250, record=True)
    report.print_report(console, small_study)
    shown = " ".join(console.export_text().split())
    assert "targets, at the defaults" in shown and "+1.0%" in shown
    assert "Adam, from 1e-3" in shown and "character GPT, long: training" in shown
    assert "7 runs on 2 tasks" in shown


def test_numbers_as_they_are_shown() -> None:
    assert [report.number(value) for value in (math.nan, math.inf, 0.12345)] == ["–", "∞", "0.123"]
    assert [targets.percent(value) for value in (math.nan, 12.0, -0.031)] == ["–", "> 1000%", "-3.1%"]
    assert report.lr_text(3e-3) == "3e-3"


def test_pictures_and_tables_are_made_from_few_records(small_study: measures.Study, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    names = ("coverage", "summary", "targets", "sampling", "long", "losses", "one-rate-training", "peers-validation")
    text = "".join(f"<!-- study: {name} -->\n<!-- end of study -->\n" for name in names)
    (docs / "learning_rate.md").write_text(text)
    (tmp_path / "README.md").write_text("<!-- study: summary -->\n<!-- end of study -->\n")
    figures.write_figures(small_study, tmp_path)
    written = (docs / "learning_rate.md").read_text()
    assert "| tasks |" in (tmp_path / "README.md").read_text()
    assert "](images/learning_rate_losses.png)" in written and "| target |" in written
    assert (docs / "images" / "learning_rate_trajectories.png").stat().st_size > 5_000
    assert figures.with_tables(text, NOTHING, docs).count("*Not yet recorded.*") == len(names)
    # No table of a header alone.
    part = "<!-- study: long -->\n<!-- end of study -->\n"
    assert "*Not yet recorded.*" in figures.with_tables(part, measures.Study([record()]), docs)
    with pytest.raises(KeyError, match="no-such-table"):
        figures.with_tables("<!-- study: no-such-table -->\n<!-- end of study -->", small_study, docs)


@pytest.mark.parametrize("name", figures.TEXTS)
def test_the_text_shows_the_recorded_results(name: str) -> None:
    text = (program.REPOSITORY / name).read_text(encoding="utf-8")
    study = measures.Study(runs.read_records(program.RECORDS))
    assert "<!-- study: " in text
    assert figures.with_tables(text, study, program.REPOSITORY / "docs") == text
