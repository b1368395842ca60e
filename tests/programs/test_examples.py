"""examples/train.py: data, models, every command line option, and runs that stop and go on bit for bit."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train

from training.data import HELD_OUT_BLOCK, DigitsData, TextData, load_data, read_text
from training.files import atomic_write
from training.history import History
from training.models import CharGPT, digits_mlp
from training.optimizers import OPTIMIZERS, effective_lrs, parse_option
from training.report import Result

CPU = torch.device("cpu")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def restore_global_settings() -> Iterator[None]:
    """The program makes torch deterministic for its own process; other tests keep what they had."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(1)  # conftest.py restores it; these models are too small for more
    with torch.random.fork_rng(devices=[]):
        yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def pictures() -> None:
    """For tests that look at the curves; in all others, drawing them would take most of the time."""


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(train, "plot_results", lambda *arguments: None)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """About 100,000 characters with structure to learn and a few that the vocabulary cannot hold."""
    generator = torch.Generator().manual_seed(1)
    words = ["learning", "rate", "path", "random", "walk", "of", "the", "step", "Größe\n"]
    chosen = torch.randint(len(words), (20_000,), generator=generator).tolist()
    rare = "".join(chr(0x4E00 + index) for index in range(100))
    path = tmp_path / "words.txt"
    path.write_text(" ".join(words[index] for index in chosen) + string.ascii_letters + rare, encoding="utf-8")
    return path


def run(tmp_path: Path, *arguments: str, out: str = "out") -> list[Result]:
    return train.main(["--data", "digits", "--out", str(tmp_path / out), *arguments])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the program says when it refuses; it must exit with status 2, as argparse does."""
    with pytest.raises(SystemExit) as exit_info:
        train.main(list(arguments))
    assert exit_info.value.code == 2
    return capsys.readouterr().err


class TestData:
    def test_digits_are_split_without_overlap(self) -> None:
        data = DigitsData(CPU)
        inputs, targets = data.validation
        assert inputs.shape == (359, 64) and targets.shape == (359,)
        assert data.inputs.shape == (1438, 64)
        assert inputs.min() == 0 and inputs.max() == 1
        assert set(targets.tolist()) == set(range(10))

    def test_digits_batch(self) -> None:
        inputs, targets = DigitsData(CPU).training_batch(32, torch.Generator().manual_seed(0))
        assert inputs.shape == (32, 64) and inputs.dtype == torch.float32
        assert targets.shape == (32,) and targets.dtype == torch.int64

    def test_text_targets_are_the_next_characters(self, text_file: Path) -> None:
        data = TextData(CPU, text_file, context=16)
        inputs, targets = data.training_batch(8, torch.Generator().manual_seed(0))
        assert inputs.shape == targets.shape == (8, 16)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])

    def test_text_holds_out_every_tenth_block(self, text_file: Path) -> None:
        data = TextData(CPU, text_file)
        blocks = len(text_file.read_text(encoding="utf-8")) // HELD_OUT_BLOCK
        assert len(data.characters) == (blocks - blocks // 10) * HELD_OUT_BLOCK
        index_of = {character: index for index, character in enumerate(data.vocabulary, start=1)}
        tenth = text_file.read_text(encoding="utf-8")[9 * HELD_OUT_BLOCK : 10 * HELD_OUT_BLOCK]
        expected = torch.tensor([index_of.get(character, 0) for character in tenth])
        inputs, targets = data.validation
        assert torch.equal(inputs[0], expected[:64]) and torch.equal(targets[0], expected[1:65])

    def test_rare_characters_share_index_zero(self, text_file: Path) -> None:
        data = TextData(CPU, text_file)
        assert data.vocabulary_size == 128
        assert "ö" in data.vocabulary and chr(0x4E00 + 99) not in data.vocabulary

    def test_batches_follow_the_generator(self, text_file: Path) -> None:
        data = TextData(CPU, text_file)
        batches = [data.training_batch(4, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
        assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])

    def test_standard_library_is_long_enough_and_capped(self) -> None:
        text = read_text(None)
        assert 1_000_000 < len(text) <= 4_000_000
        assert "import" in text

    def test_folder_is_read_in_order_without_binary_and_hidden_files(self, tmp_path: Path) -> None:
        (tmp_path / "b.txt").write_text("second")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "a.txt").write_text("first ")
        (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
        (tmp_path / ".hidden").write_text("hidden")
        assert read_text(tmp_path) == "first second"

    def test_load_data_by_name_and_path(self, text_file: Path) -> None:
        assert isinstance(load_data("digits", CPU), DigitsData)
        assert load_data(str(text_file), CPU).name == "words"


class TestModels:
    def test_mlp_layers(self) -> None:
        model = digits_mlp()
        shapes = [tuple(parameter.shape) for parameter in model.parameters()]
        assert shapes == [(256, 64), (256,), (128, 256), (128,), (10, 128), (10,)]
        assert model(torch.zeros(3, 64)).shape == (3, 10)

    def test_gpt_shapes(self) -> None:
        model = CharGPT(vocabulary_size=100)
        assert len(model.blocks) == 2 and model.positions.weight.shape == (64, 64)
        assert model(torch.zeros(2, 64, dtype=torch.int64)).shape == (2, 64, 100)

    def test_gpt_sees_no_later_character(self) -> None:
        model = CharGPT(vocabulary_size=50)
        characters = torch.randint(50, (1, 20))
        changed = characters.clone()
        changed[0, 12] = (changed[0, 12] + 1) % 50
        before, after = model(characters), model(changed)
        assert torch.equal(before[:, :12], after[:, :12])
        assert not torch.equal(before[:, 12:], after[:, 12:])


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("smoothing=0.1", ("smoothing", 0.1)),
            ("clip=0.5,1.02", ("clip", (0.5, 1.02))),
            ("clip=None", ("clip", None)),
            ("amsgrad=True", ("amsgrad", True)),
            ("maximize=true", ("maximize", True)),
            ("adapt_lr=false", ("adapt_lr", False)),
            ("initial_scale=cautious", ("initial_scale", "cautious")),
        ],
    )
    def test_values(self, text: str, expected: tuple[str, Any]) -> None:
        assert parse_option(text) == expected

    def test_options_go_to_the_optimizers_that_have_them(self, tmp_path: Path) -> None:
        options = ("--set", "smoothing=0.1", "--set", "betas=0.8,0.9")
        adam, clara = run(tmp_path, "--optimizer", "adam", "global", "--steps", "2", *options)
        assert adam.settings["options"] == {"betas": "(0.8, 0.9)"}
        assert clara.settings["options"] == {"smoothing": "0.1", "betas": "(0.8, 0.9)"}

    def test_option_changes_the_training(self, tmp_path: Path) -> None:
        [plain] = run(tmp_path, "--optimizer", "local", "--steps", "3")
        [frozen] = run(tmp_path, "--optimizer", "local", "--steps", "3", "--set", "adapt_lr=False")
        [adam] = run(tmp_path, "--optimizer", "adam", "--steps", "3")
        assert frozen.history.lr_max == pytest.approx([1e-3] * 3)
        assert frozen.history.training_loss == pytest.approx(adam.history.training_loss, rel=1e-5)
        assert plain.history.training_loss != frozen.history.training_loss

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_effective_lrs_has_one_entry_per_tensor(self, name: str) -> None:
        optimizer = OPTIMIZERS[name](digits_mlp().parameters(), lr=1e-4)  # type: ignore[call-arg]
        assert torch.equal(effective_lrs(optimizer), torch.full((6,), 1e-4))


class TestRuns:
    def test_every_optimizer_from_every_lr(
        self, tmp_path: Path, pictures: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = run(
            tmp_path, "--optimizer", *OPTIMIZERS, "--lr", "1e-4", "1e-3", "--steps", "4", "--evaluate-every", "2"
        )  # fmt: skip
        assert {(result.optimizer, result.lr) for result in results} == {
            (name, lr) for name in OPTIMIZERS for lr in (1e-4, 1e-3)
        }
        output = capsys.readouterr().out
        for name in OPTIMIZERS:
            assert len(re.findall(rf"^ *{name} +0[.]", output, re.MULTILINE)) == 2  # a row of the table per initial lr
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"curves.png"} | {f"{result.name}.json" for result in results}
        assert (tmp_path / "out" / "curves.png").read_bytes().startswith(PNG_SIGNATURE)

    def test_json_log(self, tmp_path: Path) -> None:
        [result] = run(tmp_path, "--optimizer", "smoothed", "--steps", "5", "--evaluate-every", "2", "--seed", "3")
        log = json.loads((tmp_path / "out" / "digits-smoothed-lr0.001.json").read_text())
        assert log["optimizer"] == "smoothed" and log["lr"] == 1e-3 and log["seed"] == 3 and log["batch_size"] == 64
        assert log["parameters"] == 64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10
        for curve in ("training_loss", "lr_min", "lr_median", "lr_max"):
            assert log[curve] == getattr(result.history, curve) and len(log[curve]) == 5
        assert log["validation_steps"] == [0, 2, 4, 5]
        assert len(log["validation_loss"]) == len(log["validation_accuracy"]) == 4

    def test_numbers_that_are_not_finite_become_null(self, tmp_path: Path) -> None:
        history = History(training_loss=[float("nan"), 1.0], lr_min=[float("inf")])
        Result("run", "adam", 1.0, {}, history, 0.0).write_json(tmp_path / "run.json")
        log = json.loads((tmp_path / "run.json").read_text())
        assert log["training_loss"] == [None, 1.0] and log["lr_min"] == [None]

    def test_a_run_that_diverges_is_reported(self, tmp_path: Path, pictures: None) -> None:
        [result] = run(tmp_path, "--optimizer", "adam", "--lr", "1e30", "--steps", "4")
        assert not all(map(torch.isfinite, torch.tensor(result.history.training_loss)))
        assert (tmp_path / "out" / "curves.png").exists()

    def test_digits_are_learned(self, tmp_path: Path) -> None:
        for result in run(tmp_path, "--optimizer", "global", "local", "smoothed", "--steps", "150"):
            assert result.history.validation_accuracy[-1] > 0.85

    def test_text_is_learned(self, tmp_path: Path, text_file: Path) -> None:
        [result] = run(
            tmp_path, "--data", str(text_file), "--optimizer", "smoothed", "--steps", "30", "--batch-size", "8"
        )  # fmt: skip
        assert result.history.validation_loss[-1] < 0.75 * result.history.validation_loss[0]

    def test_seed_decides_everything(self, tmp_path: Path) -> None:
        losses = [
            run(tmp_path, "--optimizer", "local", "--steps", "4", "--seed", seed)[0].history.training_loss
            for seed in ("0", "0", "1")
        ]
        assert losses[0] == losses[1] != losses[2]

    def test_optimizers_see_the_same_batches_and_weights(self, tmp_path: Path) -> None:
        results = run(tmp_path, "--optimizer", "adam", "global", "--steps", "1", "--batch-size", "5")
        assert results[0].history.training_loss == results[1].history.training_loss

    def test_device(self, tmp_path: Path) -> None:
        [result] = run(tmp_path, "--optimizer", "global", "--steps", "1", "--device", "cpu")
        assert len(result.history.training_loss) == 1

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda(self, tmp_path: Path) -> None:
        [result] = run(tmp_path, "--optimizer", "smoothed", "--steps", "150", "--device", "cuda")
        assert result.history.validation_accuracy[-1] > 0.85

    def test_curves_are_fetched_once_per_flush(self) -> None:
        history = History()
        for step in range(3):
            history.record(torch.tensor(float(step)), torch.tensor([1.0, 5.0, 2.0]) * (step + 1))
        assert history.training_loss == []
        history.flush()
        history.flush()
        assert history.training_loss == [0, 1, 2]
        assert history.lr_min == [1, 2, 3] and history.lr_median == [2, 4, 6] and history.lr_max == [5, 10, 15]


class TestResume:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_continues_bit_for_bit(self, tmp_path: Path, name: str) -> None:
        common = ("--optimizer", name, "--evaluate-every", "3")
        save = ("--save", str(tmp_path / "whole"))
        [whole] = run(tmp_path, *common, "--steps", "9", *save)
        run(tmp_path, *common, "--steps", "6", "--save", str(tmp_path / "parts"))
        [resumed] = run(
            tmp_path, *common, "--steps", "9", "--save", str(tmp_path / "parts"), "--resume", str(tmp_path / "parts")
        )  # fmt: skip
        assert resumed.history.state_dict() == whole.history.state_dict()
        file = f"digits-{name}-lr0.001.pt"
        assert_bitwise_equal(
            torch.load(tmp_path / "whole" / file, weights_only=True),
            torch.load(tmp_path / "parts" / file, weights_only=True),
        )

    def test_text_continues_from_a_periodic_checkpoint(self, tmp_path: Path, text_file: Path) -> None:
        common = ("--data", str(text_file), "--optimizer", "global", "--batch-size", "4")
        [whole] = run(tmp_path, *common, "--steps", "5")
        folder = str(tmp_path / "checkpoints")
        run(tmp_path, *common, "--steps", "3", "--save", folder, "--save-every", "2")
        [resumed] = run(tmp_path, *common, "--steps", "5", "--resume", folder)
        assert resumed.history.training_loss == whole.history.training_loss
        assert resumed.history.validation_loss[-1] == whole.history.validation_loss[-1]

    def test_stopped_run_leaves_its_last_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = str(tmp_path / "checkpoints")
        real_batch = DigitsData.training_batch
        batches_left = iter(range(5))

        def stop_after_five(*arguments: Any) -> Any:
            if next(batches_left, None) is None:
                raise KeyboardInterrupt
            return real_batch(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(DigitsData, "training_batch", stop_after_five)
            run(tmp_path, "--optimizer", "local", "--steps", "8", "--save", folder, "--save-every", "2")
        [resumed] = run(tmp_path, "--optimizer", "local", "--steps", "8", "--resume", folder)
        [whole] = run(tmp_path, "--optimizer", "local", "--steps", "8")
        assert resumed.history.state_dict() == whole.history.state_dict()

    def test_resuming_a_finished_run_changes_nothing(self, tmp_path: Path) -> None:
        folder = str(tmp_path / "checkpoints")
        [first] = run(tmp_path, "--optimizer", "smoothed", "--steps", "3", "--save", folder)
        [again] = run(tmp_path, "--optimizer", "smoothed", "--steps", "3", "--resume", folder)
        assert again.history.state_dict() == first.history.state_dict()

    def test_runs_without_a_checkpoint_start_from_the_beginning(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = str(tmp_path / "checkpoints")
        run(tmp_path, "--optimizer", "adam", "--steps", "2", "--save", folder)
        results = run(tmp_path, "--optimizer", "adam", "local", "--steps", "3", "--resume", folder)
        assert [len(result.history.training_loss) for result in results] == [3, 3]
        assert "no checkpoint of digits-local-lr0.001" in capsys.readouterr().out

    def test_failed_write_keeps_the_file_before(self, tmp_path: Path) -> None:
        path = tmp_path / "file.txt"
        path.write_text("before")
        with pytest.raises(RuntimeError, match="disk full"), atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
            (["--lr", "fast"], "invalid float value: 'fast'"),
            (["--lr", "-1"], "-1"),
            (["--steps", "0"], "'0' is not a positive whole number"),
            (["--batch-size", "-4"], "'-4' is not a positive whole number"),
            (["--seed", "x"], "invalid int value: 'x'"),
            (["--device", "abacus"], "device 'abacus' cannot be used"),
            (["--data", "no/such/file"], "no such file or folder"),
            (["--optimizer", "global", "--set", "smoothing"], "'smoothing' is not of the form name=value"),
            (["--optimizer", "global", "--set", "momentum=1"], "no option 'momentum' in global"),
            (["--optimizer", "adam", "--set", "smoothing=0.1"], "no option 'smoothing' in adam"),
            (["--optimizer", "global", "--set", "lr=1"], "no option 'lr'"),
            (["--optimizer", "global", "--set", "smoothing=2"], "smoothing"),
            (["--optimizer", "adam", "global", "--set", "clip=2,1"], "clip"),
            (["--resume", "no/such/folder"], "no checkpoint"),
        ],
    )
    def test_message(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert message in error_of(capsys, "--data", "digits", "--out", str(tmp_path), "--steps", "1", *arguments)
        assert list(tmp_path.iterdir()) == []

    def test_text_too_short(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "short.txt"
        path.write_text("short")
        assert "holds 5 characters" in error_of(capsys, "--data", str(path))

    def test_binary_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "data.bin"
        path.write_bytes(b"\xff\xfe\x00")
        assert "is not UTF-8 text" in error_of(capsys, "--data", str(path))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (["--seed", "1"], "seed = 0, this run has 1"),
            (["--batch-size", "7"], "batch_size = 64, this run has 7"),
            (["--set", "eps=1e-6"], "options"),
            (["--steps", "1"], "is at step 2, beyond --steps 1"),
        ],
    )
    def test_checkpoint_of_another_run(
        self, changed: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = str(tmp_path / "checkpoints")
        common = ["--data", "digits", "--optimizer", "adam", "--out", str(tmp_path), "--steps", "2"]
        train.main([*common, "--save", folder])
        assert message in error_of(capsys, *common, "--resume", folder, *changed)

    def test_broken_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "digits-adam-lr0.001.pt").write_bytes(b"not a checkpoint")
        common = ["--data", "digits", "--optimizer", "adam", "--out", str(tmp_path / "out")]
        assert "is not a checkpoint" in error_of(capsys, *common, "--resume", str(tmp_path))


def assert_bitwise_equal(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_bitwise_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_bitwise_equal(one, other)
    else:
        assert first == second
