"""The training loop: the same run whatever interrupts it, and options that do what they say.

Runs are of a head with some thousand parameters on 72 cells (see tiny.py). Checkpoints are compared byte by byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tiny import Notes, tiny_config, tiny_group, write_store
from torch import Tensor

import sest.train
from sest.cell_store import Batch, store_cells
from sest.checkpoint import BEST, LAST, MODEL, OPTIMIZER, STATE, load_model, open_checkpoint, step_folder
from sest.cli.main import main
from sest.config import TrainConfig
from sest.dataset import read_dataset
from sest.errors import InputError, TrainingFailed
from sest.loss import energy_distance, make_loss
from sest.model import StateTransition, new_model
from sest.progress import Silent
from sest.run_folder import CONFIG, METRICS, SPLITS, read_run_config, resumed_config
from sest.sampler import SetSampler
from sest.signals import Interrupted
from sest.splits import TRAIN
from sest.train import train
from sest.validate import Validator
from sest.window import MEASURED

TINY = {k: v for k, v in tiny_config().to_values().items() if v != getattr(TrainConfig(), k)}
CHECKPOINTS = [step_folder(4), step_folder(8), step_folder(12), BEST, LAST]


@pytest.fixture(autouse=True)
def _quick_disk() -> Iterator[None]:
    """Durability is for tests/faults; fsync takes most of the time of runs as small as these."""
    with mock.patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "s.zarr", [tiny_group()])


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps with dropout; validated and kept at 4, 8 and 12."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with mock.patch("os.fsync"):
        train(store, run, tiny_config(), Silent())
    return run


def files(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint of a run, hidden ones too."""
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in sorted(run.glob("*/*")) if file.is_file()}


def metrics(run: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without how fast the machine was."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return lines if timed else [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def steps(run: Path, *, validations: bool = False) -> list[int]:
    return [line["step"] for line in metrics(run) if ("val_loss" in line) == validations]


def weights(folder: Path, which: str = MODEL) -> dict[str, Tensor]:
    opened = open_checkpoint(folder)
    return opened.model_tensors() if which == MODEL else opened.optimizer_tensors()


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert float((value - b[name]).abs().max()) <= atol, name


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def signal_after(step: int, number: int = signal.SIGTERM) -> Callable[[dict[str, Any]], None]:
    """An `on_log` that sends this process a signal when a step is logged (with log_every = 1: every step)."""

    def on_log(line: dict[str, Any]) -> None:
        if line["step"] == step and "loss" in line:
            signal.raise_signal(number)

    return on_log


class Crash(Exception):
    """Stands for anything that ends the process without warning."""


def crash_after(step: int) -> Callable[[dict[str, Any]], None]:
    """An `on_log` that raises at the first line after a step."""

    def on_log(line: dict[str, Any]) -> None:
        if line["step"] > step:
            raise Crash

    return on_log


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Validations give the listed val_loss at their n-th call, 1 at others."""
    original, calls = Validator.run, 0

    def run(self: Validator, *args: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {**original(self, *args), "val_loss": losses.get(calls, 1.0)}

    monkeypatch.setattr(Validator, "run", run)


def nan_at(monkeypatch: pytest.MonkeyPatch, calls_of_training: set[int]) -> None:
    """The loss of a training batch is NaN at the listed calls (1, 2 ...); validation is left alone."""
    calls = 0

    def make(name: str, gram: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        def criterion(predicted: Tensor, target: Tensor) -> Tensor:
            nonlocal calls
            loss = energy_distance(predicted, target)
            if torch.is_grad_enabled() and predicted.requires_grad:
                calls += 1
                loss = loss * (math.nan if calls in calls_of_training else 1.0)
            return loss

        return criterion

    monkeypatch.setattr(sest.train, "make_loss", make)


# ---- the same run


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    result = train(store, tmp_path / "again", tiny_config(), Silent())
    assert sorted({name.split("/")[0] for name in files(whole)}) == sorted(CHECKPOINTS)
    assert files(tmp_path / "again") == files(whole)
    assert metrics(tmp_path / "again") == metrics(whole)
    assert result.step == 12 and result.reason == "max_steps" and result.n_parameters == 5508
    train(store, tmp_path / "other", tiny_config(seed=1), Silent())
    assert not same(weights(tmp_path / "other" / LAST), weights(whole / LAST))


def test_the_callers_random_state_changes_nothing(store: Path, whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    train(store, tmp_path / "run", tiny_config(num_workers=3), Silent())
    assert files(tmp_path / "run") == files(whole)  # and neither do threads that prepare batches


@pytest.mark.parametrize("step", [1, 5, 8, 11])
def test_a_stopped_run_that_is_resumed_is_the_uninterrupted_run(
    store: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match=rf"Stopped after step {step}, saved in .*last") as stopped:
        train(store, run, tiny_config(), Silent(), on_log=signal_after(step))
    assert stopped.value.signum == signal.SIGTERM
    assert open_checkpoint(run / LAST).state["step"] == step
    notes = Notes()
    train(store, run, tiny_config(), notes, resume="auto")
    assert f"Resuming from {run / LAST} at step {step}." in notes.texts
    assert files(run) == files(whole)
    assert metrics(run) == metrics(whole)


def test_ctrl_c_stops_as_sigterm_does_and_a_second_one_stops_at_once(store: Path, whole: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train(store, tmp_path / "once", tiny_config(), Silent(), on_log=signal_after(3, signal.SIGINT))
    assert stopped.value.signum == signal.SIGINT

    def twice(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(store, tmp_path / "twice", tiny_config(), Silent(), on_log=twice)
    assert signal.getsignal(signal.SIGINT) is before
    train(store, tmp_path / "twice", tiny_config(), Silent(), resume="auto")
    assert files(tmp_path / "twice") == files(whole)


def test_a_run_stopped_again_and_again_is_the_uninterrupted_run(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 3, 4, 7, 12):
        with pytest.raises(Interrupted):
            train(store, run, tiny_config(), Silent(), resume="auto", on_log=signal_after(step))
    train(store, run, tiny_config(), Silent(), resume="auto")  # at the last step there is nothing left to do
    assert files(run) == files(whole) and metrics(run) == metrics(whole)


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_run_resumed_from_a_kept_checkpoint_is_the_uninterrupted_run(
    store: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    train(store, run, tiny_config(), Silent(), resume=str(run / step_folder(step)))
    assert files(run) == files(whole) and metrics(run) == metrics(whole)


def test_a_kept_checkpoint_can_be_continued_in_another_run_folder(store: Path, whole: Path, tmp_path: Path) -> None:
    train(store, tmp_path / "run", tiny_config(), Silent(), resume=str(whole / step_folder(8)))
    assert same(weights(tmp_path / "run" / LAST), weights(whole / LAST))
    assert steps(tmp_path / "run") == [9, 10, 11, 12]


def test_a_staged_plan_ends_with_the_weights_of_one_run(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(store, run, tiny_config(max_steps=4), Silent())
    for last in (8, 12):
        train(store, run, tiny_config(max_steps=last), Silent(), resume="auto")
    for which in (MODEL, OPTIMIZER):
        assert same(weights(run / LAST, which), weights(whole / LAST, which))
    assert steps(run) == list(range(1, 13))


def test_a_stage_between_validations_adds_one_and_changes_no_weight(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(store, run, tiny_config(max_steps=5), Silent())
    train(store, run, tiny_config(), Silent(), resume="auto")
    assert steps(run, validations=True) == [4, 5, 8, 12]
    assert same(weights(run / LAST, OPTIMIZER), weights(whole / LAST, OPTIMIZER))


def test_resuming_a_finished_run_changes_nothing(store: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    result = train(store, tmp_path / "run", tiny_config(max_steps=6), Silent(), resume="auto")
    assert result.step == 12 and files(tmp_path / "run") == files(whole)


def test_resume_auto_without_any_checkpoint_starts_at_step_0(store: Path, whole: Path, tmp_path: Path) -> None:
    for name, step in (("none", 2), ("best", 4)):  # best/ alone has no moments
        run = tmp_path / name
        with pytest.raises(Crash):
            train(store, run, tiny_config(checkpoint_every=100), Silent(), on_log=crash_after(step))
        notes = Notes()
        train(store, run, tiny_config(), notes, resume="auto")
        assert f"{run} has no checkpoint yet: training starts at step 0." in notes.texts
        assert files(run) == files(whole) and metrics(run) == metrics(whole)
    train(store, tmp_path / "new", tiny_config(), Silent(), resume="auto")  # not even a folder
    assert files(tmp_path / "new") == files(whole)


def test_a_continued_stage_killed_before_its_first_checkpoint_begins_where_it_began(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stage2"
    with pytest.raises(Crash):
        train(
            store, run, tiny_config(checkpoint_every=100), Silent(), resume=str(whole / step_folder(4)),
            on_log=crash_after(9),
        )  # fmt: skip
    train(store, run, tiny_config(), Silent(), resume="auto")
    assert same(weights(run / LAST, OPTIMIZER), weights(whole / LAST, OPTIMIZER))
    assert steps(run) == list(range(5, 13))


def test_two_processes_do_not_train_in_one_run_folder(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def second(line: dict[str, Any]) -> None:
        if line["step"] == 5 and "loss" in line:
            with pytest.raises(InputError, match="Another process trains in"):
                train(store, run, tiny_config(), Silent(), resume="auto")

    train(store, run, tiny_config(), Silent(), on_log=second)
    assert files(run) == files(whole) and metrics(run) == metrics(whole)
    train(store, run, tiny_config(), Silent(), resume="auto")  # it is free again


def test_metrics_have_no_step_twice_and_survive_a_torn_line(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with open(run / METRICS, "a") as file:
        file.write('12\n{"step": 13, "lo')
    train(store, run, tiny_config(), Silent(), resume=str(run / step_folder(4)))
    assert metrics(run) == metrics(whole)
    assert steps(run) == list(range(1, 13)) and steps(run, validations=True) == [4, 8, 12]


# ---- batches and accumulation


def first_batch(store: Path, config: TrainConfig, n_sets: int) -> tuple[StateTransition, Batch]:
    """The first weights and the first sets of a run (perturbation: features), put together by hand."""
    data = read_dataset(store, config, Silent())
    sampler = SetSampler(
        data.labels,
        data.in_split(TRAIN),
        config.set_size,
        config.seed,
        same_batch=config.controls == "batch",
        control_targets=config.control_targets,
    )
    cells = store_cells(data.targets, data.embeddings, data.embedding_row, torch.device("cpu"))
    batch = cells.batch(sampler.sets(np.arange(n_sets)))
    batch["perturbation"] = torch.from_numpy(data.features.matrix)[batch["perturbation"]]
    return new_model(sest.train._sizes(data, config), config.seed), batch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "mse"},
        {"loss": "energy+sinkhorn"},
        {"controls": "batch"},
        {"control_targets": True},
        {"target_sum": "median"},
        {"set_size": 6, "batch_size": 2, "accumulate": 3},
        {"hidden": 8, "n_heads": 4, "n_layers": 2, "ffn": 20, "n_encoder_layers": 1, "n_decoder_layers": 3},
        {"weight_decay": 0.5, "lr": 1e-2},
        {"clip": 0.0},
    ],
    ids=str,
)
def test_the_first_step_is_what_pytorch_does_with_the_same_sets(
    store: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "sinkhorn" in changes.get("loss", ""):
        pytest.importorskip("geomloss")
    config = tiny_config(max_steps=1, dropout=0.0, **changes)
    train(store, tmp_path / "run", config, Silent())
    model, batch = first_batch(store, config, config.batch_size * config.accumulate)
    loss = make_loss(config.loss)(model(batch["basal"], batch["perturbation"]), batch["target"]).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    if config.clip:
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, config.clip / float(norm))
    torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay).step()
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    # Adam's first step is lr times the sign of the gradient: where a gradient is rounding, its sign is chance. Moments
    # do not have that: (1 - beta1) times the clipped gradient.
    moments = weights(tmp_path / "run" / LAST, OPTIMIZER)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(moments[f"exp_avg/{name}"], 0.1 * p.grad, rtol=1e-3, atol=1e-7)
    for name, value in weights(tmp_path / "run" / LAST).items():
        clear = moments[f"exp_avg/{name}"].abs() > 1e-6
        torch.testing.assert_close(value[clear], model.state_dict()[name][clear], rtol=0, atol=1e-5 * config.lr / 1e-3)


def test_k_batches_of_b_are_one_batch_of_k_times_b(store: Path, tmp_path: Path) -> None:
    results = {}
    for batch_size, accumulate in ((6, 1), (3, 2), (1, 6)):
        run = tmp_path / f"{batch_size}"
        config = tiny_config(batch_size=batch_size, accumulate=accumulate, dropout=0.3, val_sets=1)
        train(store, run, config, Silent())
        results[batch_size] = weights(run / LAST), [line["loss"] for line in metrics(run) if "loss" in line]
    for batch_size in (3, 1):
        # sums of float32 gradients in another order; Adam turns a gradient's relative error into one of lr
        assert_close(results[batch_size][0], results[6][0], atol=2e-5)
        assert results[batch_size][1] == pytest.approx(results[6][1], rel=1e-5)


def test_dropout_differs_between_steps_sets_and_seeds_and_not_between_runs(store: Path, tmp_path: Path) -> None:
    config = tiny_config(max_steps=2, accumulate=2, dropout=0.5)
    seen: list[Tensor] = []
    original = StateTransition.forward

    def forward(self: StateTransition, basal: Tensor, perturbation: Tensor, keys: Tensor | None = None) -> Tensor:
        if self.training:
            assert keys is not None
            seen.append(self.basal_encoder[2](torch.ones(len(basal), 4, 50), keys))
        return original(self, basal, perturbation, keys)

    with mock.patch.object(StateTransition, "forward", forward):
        for name, changes in {"a": {}, "b": {"seed": 1}, "c": {}}.items():
            train(store, tmp_path / name, dataclasses.replace(config, **changes), Silent())
    first, second, again = torch.cat(seen[:4]), torch.cat(seen[4:8]), torch.cat(seen[8:])
    assert torch.equal(first, again) and len(first) == 4 * config.batch_size
    masks = {mask.numpy().tobytes() for mask in torch.cat([first, second])}
    assert len(masks) == 8 * config.batch_size  # no two sets have the same


# ---- out of memory


def out_of_memory_for(monkeypatch: pytest.MonkeyPatch, n_sets: int) -> None:
    """Training on `n_sets` sets or more at once runs out of memory."""
    original = StateTransition.forward

    def forward(self: StateTransition, basal: Tensor, perturbation: Tensor, keys: Tensor | None = None) -> Tensor:
        if self.training and len(basal) >= n_sets:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, basal, perturbation, keys)

    monkeypatch.setattr(StateTransition, "forward", forward)


@pytest.mark.parametrize("n_sets", [5, 3, 2])
def test_running_out_of_memory_halves_the_forward_pass_and_keeps_the_batch(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_sets: int
) -> None:
    config = tiny_config(batch_size=5, dropout=0.3, accumulate=2)
    train(store, tmp_path / "whole", config, Silent())
    notes = Notes()
    out_of_memory_for(monkeypatch, n_sets)
    train(store, tmp_path / "parts", config, notes)
    told = [text for text in notes.texts if text.startswith("Out of GPU memory")]
    sizes = {5: [2], 3: [2], 2: [2, 1]}[n_sets]
    assert [int(text.split()[4]) for text in told] == sizes
    assert_close(weights(tmp_path / "parts" / LAST), weights(tmp_path / "whole" / LAST), atol=2e-5)
    expected = [line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert [line["loss"] for line in metrics(tmp_path / "parts") if "loss" in line] == pytest.approx(expected, rel=1e-5)


def test_running_out_of_memory_half_way_through_a_batch_leaves_no_gradient_behind(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(batch_size=4, accumulate=2, dropout=0.3)
    train(store, tmp_path / "whole", config, Silent())
    original, calls = StateTransition.forward, 0

    def forward(self: StateTransition, basal: Tensor, perturbation: Tensor, keys: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += self.training
        if self.training and calls == 4:  # the second batch of step 2
            raise torch.OutOfMemoryError
        return original(self, basal, perturbation, keys)

    monkeypatch.setattr(StateTransition, "forward", forward)
    train(store, tmp_path / "parts", config, Silent())
    assert_close(weights(tmp_path / "parts" / LAST), weights(tmp_path / "whole" / LAST), atol=2e-5)


def test_too_little_memory_for_one_set_is_an_error_that_says_what_to_make_smaller(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_for(monkeypatch, 1)
    with pytest.raises(InputError, match=r"one set at a time. Use a smaller --set-size or --hidden"):
        train(store, tmp_path / "run", tiny_config(), Silent())


# ---- steps that are not finite


def test_a_step_with_a_nan_loss_is_skipped_and_counted_and_moves_nothing(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {3, 4, 7})
    run = tmp_path / "run"
    config = tiny_config(checkpoint_every=1, max_bad_steps=3)
    train(store, run, config, Silent())
    for step in range(2, 13):
        before, after = run / step_folder(step - 1), run / step_folder(step)
        skipped = step in (3, 4, 7)
        assert same(weights(before), weights(after)) == skipped, step
        assert same(weights(before, OPTIMIZER), weights(after, OPTIMIZER)) == skipped, step  # Adam's step number too
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [line["step"] for line in lines if line["loss"] is None and line["grad_norm"] is None] == [3, 4, 7]
    assert open_checkpoint(run / LAST).state["run"]["skipped_steps"] == 3
    assert same(weights(run / step_folder(2)), weights_after_two_steps(store, tmp_path))


def weights_after_two_steps(store: Path, folder: Path) -> dict[str, Tensor]:
    train(store, folder / "two", tiny_config(max_steps=2), Silent())
    return weights(folder / "two" / LAST)


def test_one_set_that_is_not_finite_skips_the_whole_step(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {2})
    config = tiny_config(accumulate=3, max_steps=3, checkpoint_every=1)  # call 2 is the second of step 1's batches
    train(store, tmp_path / "run", config, Silent())
    first, _ = first_batch(store, config, 1)
    assert same(weights(tmp_path / "run" / step_folder(1)), dict(first.state_dict()))
    assert not same(weights(tmp_path / "run" / step_folder(2)), dict(first.state_dict()))


def test_skipped_steps_between_log_lines_are_counted_once_also_when_resumed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {2, 3, 6})
    run = tmp_path / "run"
    config = tiny_config(log_every=5, checkpoint_every=3)
    train(store, run, config, Silent())
    lines = [line for line in metrics(run) if "loss" in line]
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [(5, 2), (10, 3), (12, 3)]
    assert open_checkpoint(run / step_folder(3)).state["run"]["skipped_steps"] == 2  # not yet in a line
    nan_at(monkeypatch, {3})  # the same batch of step 6
    shutil.rmtree(run / step_folder(6))
    train(store, run, config, Silent(), resume=str(run / step_folder(3)))
    lines = [line for line in metrics(run) if "loss" in line]
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [(5, 2), (10, 3), (12, 3)]


@pytest.mark.parametrize("log_every", [1, 2, 5])
def test_too_many_bad_steps_in_a_row_end_training_with_the_last_checkpoint_kept(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    run = tmp_path / "run"
    config = tiny_config(max_bad_steps=3, log_every=log_every)
    with monkeypatch.context() as patch:
        nan_at(patch, {1, 3, *range(6, 99)})
        with pytest.raises(
            TrainingFailed, match=r"steps in a row .*non-finite.*last checkpoint is kept.*--resume auto"
        ):
            train(store, run, config, Silent())
    stopped_at = metrics(run)[-1]["step"]
    assert stopped_at == {1: 8, 2: 8, 5: 10}[log_every]  # noticed with the next line
    assert open_checkpoint(run / step_folder(4)).state["step"] == 4
    assert not (run / LAST).exists()
    # without the cause it goes on, and the lines of the failed steps are made again
    train(store, run, config, Silent(), resume=str(run / step_folder(4)))
    assert steps(run, validations=True) == [4, 8, 12]
    assert metrics(run)[-2]["skipped_steps"] == 2


def test_bad_steps_that_are_not_in_a_row_do_not_end_training(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {1, 2, 4, 5, 7, 8, 10, 11})
    train(store, tmp_path / "run", tiny_config(max_bad_steps=3, log_every=4), Silent())
    assert open_checkpoint(tmp_path / "run" / LAST).state["run"]["skipped_steps"] == 8


def test_a_nan_gradient_is_skipped_though_the_loss_is_finite(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, gram: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        def criterion(predicted: Tensor, target: Tensor) -> Tensor:
            loss = energy_distance(predicted, target)
            return loss + (predicted * 0).clamp_min(0).sqrt().sum((1, 2))  # the slope of a root at 0

        return criterion

    monkeypatch.setattr(sest.train, "make_loss", make)
    with pytest.raises(TrainingFailed, match=r"4 steps in a row before step 5"):
        train(store, tmp_path / "run", tiny_config(max_bad_steps=4), Silent())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_is_a_failure_not_patience(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        scripted(patch, {2: value})
        with pytest.raises(TrainingFailed, match=rf"validation loss is {value} at step 8. The last checkpoint is kept"):
            train(store, run, tiny_config(early_stopping=True), Silent())
    assert steps(run, validations=True) == [4]
    assert open_checkpoint(run / step_folder(4)).state["step"] == 4 and not (run / step_folder(8)).exists()
    train(store, run, tiny_config(), Silent(), resume="auto")
    # the first validation was scripted, so what was best differs; the weights do not
    assert same(weights(run / LAST, OPTIMIZER), weights(whole / LAST, OPTIMIZER))


# ---- options


def test_log_every_val_every_and_checkpoint_every_set_the_steps(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: list[dict[str, Any]] = []
    config = tiny_config(log_every=5, val_every=3, checkpoint_every=7)
    train(store, run, config, Silent(), on_log=lambda line: seen.append(dict(line)))
    assert steps(run) == [5, 10, 12] and steps(run, validations=True) == [3, 6, 9, 12]
    assert {f.name for f in run.iterdir() if f.is_dir()} == {step_folder(7), BEST, LAST}
    assert seen == metrics(run, timed=True)
    for line in seen:
        if "loss" in line:
            steady = {"step", "loss", "grad_norm", "lr", "skipped_steps"}
            assert set(line) == (steady | set(MEASURED)) - {"device_wait"}  # that is for GPUs
            assert line["limit_it_per_s"] > 0 and line["limited_by"] in ("compute", "memory")
            assert line["memory_bytes"] > 1e8  # torch alone takes that
            assert line["it_per_s"] > 0 and 0 <= line["data_wait"] <= 1 and line["lr"] == config.lr
    assert [line["step"] for line in seen] == sorted(line["step"] for line in seen)


def test_a_line_is_the_mean_over_the_steps_since_the_last_one(store: Path, whole: Path, tmp_path: Path) -> None:
    train(store, tmp_path / "run", tiny_config(log_every=4), Silent())
    every = [line for line in metrics(whole) if "loss" in line]
    for i, line in enumerate(line for line in metrics(tmp_path / "run") if "loss" in line):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(np.mean([one[key] for one in every[4 * i : 4 * i + 4]]), rel=1e-6)


def test_how_often_is_logged_or_saved_changes_no_weight(store: Path, whole: Path, tmp_path: Path) -> None:
    train(store, tmp_path / "run", tiny_config(log_every=50, val_every=5, checkpoint_every=100), Silent())
    assert same(weights(tmp_path / "run" / LAST, OPTIMIZER), weights(whole / LAST, OPTIMIZER))


def test_best_is_the_checkpoint_of_the_lowest_val_loss(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {1: 0.9, 2: 0.7, 3: 0.8, 4: 0.7, 5: 0.75, 6: 0.71})
    run = tmp_path / "run"
    result = train(store, run, tiny_config(val_every=2, checkpoint_every=2), Silent())
    best = open_checkpoint(run / BEST)
    assert (result.best_step, result.best_val_loss, result.metrics["val_loss"]) == (4, 0.7, 0.71)
    assert best.state["step"] == 4 and best.state["run"]["val_loss"] == 0.7
    assert OPTIMIZER not in best.state["files"] and same(weights(run / BEST), weights(run / step_folder(4)))
    last = open_checkpoint(run / LAST).state["run"]
    assert (last["best_step"], last["best_val_loss"], last["val_loss"]) == (4, 0.7, 0.71)
    assert same(dict(load_model(run).state_dict()), weights(run / step_folder(4)))


@pytest.mark.parametrize(
    ("losses", "patience", "stops_at"),
    [
        ([3, 2, 1, 2, 2, 2, 2], 2, 5),
        ([3, 2, 1, 2, 0.5, 2, 2], 2, 7),
        ([1, 1, 1, 1, 1, 1, 1], 3, 4),  # equal is no improvement
        ([7, 6, 5, 4, 3, 2, 1], 1, 12),
    ],
)
def test_early_stopping_waits_for_patience_validations_without_improvement(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], patience: int, stops_at: int
) -> None:
    scripted(monkeypatch, {i + 1: losses[min(i, 6)] / (1 + max(0, i - 6)) for i in range(12)})
    config = tiny_config(early_stopping=True, patience=patience, val_every=1)
    result = train(store, tmp_path / "run", config, Silent())
    assert result.step == stops_at and result.reason == ("early_stopping" if stops_at < 12 else "max_steps")
    assert open_checkpoint(tmp_path / "run" / LAST).state["step"] == stops_at


def test_without_early_stopping_patience_does_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {})
    assert train(store, tmp_path / "run", tiny_config(patience=1, val_every=1), Silent()).step == 12


def test_patience_goes_on_counting_when_a_run_is_resumed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = tiny_config(early_stopping=True, patience=3, val_every=1)
    scripted(monkeypatch, {})  # all equal: the first is best
    with pytest.raises(Interrupted):
        train(store, run, config, Silent(), on_log=signal_after(2))
    result = train(store, run, config, Silent(), resume="auto")
    assert result.step == 4 and result.reason == "early_stopping"


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e9])
def test_clip_bounds_the_gradient_and_the_logged_norm_is_the_one_before(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    norms: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(store, tmp_path / "run", tiny_config(clip=clip), Silent())
    logged = [line["grad_norm"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert min(logged) > 0.3
    expected = [0.3] * 12 if clip == 0.3 else logged
    assert norms == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_takes_the_learning_rate_given_now(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(store, run, tiny_config(max_steps=4), Silent())
    train(store, run, tiny_config(lr=0.0, max_steps=6), Silent(), resume="auto")
    assert same(weights(run / LAST), weights(whole / step_folder(4)))
    assert [line["lr"] for line in metrics(run) if "lr" in line] == [1e-3] * 4 + [0.0] * 2
    assert read_run_config(run)[0]["lr"] == 0.0


def test_weight_decay_shrinks_weights_by_lr_times_it(store: Path, tmp_path: Path) -> None:
    for decay in (0.0, 0.5):
        config = tiny_config(max_steps=1, weight_decay=decay, lr=1e-2)
        train(store, tmp_path / f"{decay}", config, Silent())
    before, _ = first_batch(store, tiny_config(), 1)
    without, with_decay = (weights(tmp_path / f"{decay}" / LAST) for decay in (0.0, 0.5))
    for name, value in before.state_dict().items():
        torch.testing.assert_close(with_decay[name], without[name] - 1e-2 * 0.5 * value, rtol=0, atol=1e-6)


def test_cells_without_a_control_in_their_batch_are_counted_aloud(tmp_path: Path) -> None:
    group = tiny_group(n_controls=2, batches=("b1", "b2", "b3", "b4"))
    store = write_store(tmp_path / "s.zarr", [group])
    notes = Notes()
    train(store, tmp_path / "run", tiny_config(max_steps=1, controls="batch"), notes)
    assert any("training cells have no control in their batch; any of their cell type serves" in n for n in notes.texts)
    notes = Notes()
    train(store, tmp_path / "other", tiny_config(max_steps=1), notes)
    assert not any("in their batch" in text for text in notes.texts)


def test_bf16_trains_on_the_cpu_and_can_be_resumed_in_fp32(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(store, run, tiny_config(precision="bf16", max_steps=8), Silent())
    assert open_checkpoint(run / LAST).state["precision"] == "bf16"
    assert not same(weights(run / LAST), weights(whole / step_folder(8)))
    assert metrics(run)[0]["loss"] == pytest.approx(
        metrics(whole)[0]["loss"], rel=1e-2
    )  # 8 bits of mantissa in the matrix products
    train(store, run, tiny_config(precision="fp32"), Silent(), resume="auto")
    assert open_checkpoint(run / LAST).state["precision"] == "fp32"


def in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in fp16 with its GradScaler, on the CPU, where sest itself refuses it; on older GPUs it is the default."""
    monkeypatch.setattr(sest.train, "choose_precision", lambda name, device, training: "fp16")


def test_fp16_clips_and_logs_unscaled_gradients_and_resumes_with_its_scale(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp16(monkeypatch)
    train(store, tmp_path / "whole", tiny_config(), Silent())
    for ours, fp32 in zip(metrics(tmp_path / "whole")[:3], metrics(whole)[:3], strict=True):
        assert ours["loss"] == pytest.approx(fp32["loss"], rel=1e-3)  # 11 bits of mantissa
        assert ours["grad_norm"] == pytest.approx(fp32["grad_norm"], rel=1e-2)
    ours, fp32 = weights(tmp_path / "whole" / step_folder(4)), weights(whole / step_folder(4))
    for (
        name
    ) in fp32:  # Adam makes steps of lr = 1e-3 also of gradients that are rounding, so single ones differ by more
        assert float((ours[name] - fp32[name]).abs().mean()) < 2e-4, name
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(store, run, tiny_config(), Silent(), on_log=signal_after(6))
    assert open_checkpoint(run / LAST).state["scaler"]["_growth_tracker"] == 6
    train(store, run, tiny_config(), Silent(), resume="auto")
    assert files(run) == files(tmp_path / "whole")


def test_fp16_skips_a_step_that_overflows_and_halves_its_scale(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp16(monkeypatch)
    nan_at(monkeypatch, {3})
    run = tmp_path / "run"
    train(store, run, tiny_config(max_steps=4, checkpoint_every=1), Silent())
    scales = [open_checkpoint(run / step_folder(step)).state["scaler"]["scale"] for step in (1, 2, 3, 4)]
    assert scales == [65536.0, 65536.0, 32768.0, 32768.0]
    for which in (MODEL, OPTIMIZER):
        assert same(weights(run / step_folder(2), which), weights(run / step_folder(3), which))
        assert not same(weights(run / step_folder(3), which), weights(run / step_folder(4), which))
    assert metrics(run)[-2]["skipped_steps"] == 1


def test_progress_is_told_every_step_also_those_done_before(store: Path, whole: Path, tmp_path: Path) -> None:
    class Counted(Silent):
        def __init__(self) -> None:
            self.began: tuple[str, int, str, int] | None = None
            self.advanced = 0

        def begin(self, task: str, total: int, unit: str, done: int = 0, detail: object = None) -> None:
            self.began, self.advanced = (task, total, unit, done), 0

        def advance(self, n: int = 1) -> None:
            self.advanced += n

    progress = Counted()
    train(store, tmp_path / "run", tiny_config(), progress, resume=str(whole / step_folder(8)))
    assert progress.began == ("Training", 12, "it", 8) and progress.advanced == 4


def test_the_caller_is_shown_the_data_and_the_model_once(store: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train(
        store,
        tmp_path / "run",
        tiny_config(max_steps=2),
        Silent(),
        on_start=lambda data, model: seen.append((len(data.labels), model.sizes.n_genes)),
    )
    assert seen == [(72, 20)]


# ---- the run folder


def test_an_existing_run_is_refused_and_stays_as_it_was(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(InputError, match=r"run exists. Continue it with --resume auto, or choose another --run"):
        train(store, run, tiny_config(max_steps=20), Silent())
    assert {f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"exists"):
        train(store, tmp_path / "file", tiny_config(), Silent())


def test_a_folder_that_is_no_run_is_never_written_to(store: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for resume in (None, "auto", str(whole / LAST)):
        with pytest.raises(InputError, match=r"exists"):
            train(store, tmp_path, tiny_config(), Silent(), resume=resume)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_and_one_whose_first_write_was_killed_can_be_used(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml.partial").write_text("max_ste")
    assert resumed_config(run, "auto", {"max_steps": 3}).max_steps == 3
    train(store, run, tiny_config(), Silent())
    assert files(run) == files(whole)
    assert sorted(f.name for f in run.iterdir()) == sorted([*CHECKPOINTS, CONFIG, METRICS])


def test_bad_input_leaves_no_run_folder(store: Path, tmp_path: Path) -> None:
    for changes in (
        {"hidden": 10, "n_heads": 4},
        {"perturbations": str(tmp_path / "none.npz")},
        {"splits": str(tmp_path / "none.toml")},
        {"target_sum": "x"},
        {"device": "cuda:99"},
        {"device": "toaster"},
        {"precision": "fp16"},
        {"data_device": "gpu"},
        {"val_fraction": 0.0},
    ):
        with pytest.raises(InputError):
            train(store, tmp_path / "run", tiny_config(**changes), Silent())
    assert not (tmp_path / "run").exists()


def test_config_toml_of_a_run_gives_the_same_run_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "splits.toml").write_text('[datasets]\nscreen = "s.h5ad"\n[training]\nscreen = "train"\n')
    np.savez(tmp_path / "f.npz", allow_pickle=False, **{n: np.full(3, i, np.float32) for i, n in enumerate("PQRST")})
    monkeypatch.chdir(tmp_path)
    config = tiny_config(splits="splits.toml", perturbations="f.npz", loss="mse", clip=0.5)
    train(store, tmp_path / "run", config, Silent())
    values, provenance = read_run_config(tmp_path / "run")
    assert provenance["cache"] == str(store.resolve()) and provenance["torch_version"] == torch.__version__
    assert values["splits"] == str(tmp_path / "run" / SPLITS) and values["perturbations"] == str(tmp_path / "f.npz")
    monkeypatch.chdir("/")
    (tmp_path / "splits.toml").unlink()  # the run has its own copy
    train(store, tmp_path / "again", TrainConfig.from_values(values, "config.toml"), Silent())
    assert files(tmp_path / "again") == files(tmp_path / "run")


def test_a_run_goes_on_with_its_own_splits_and_with_features_that_were_moved(store: Path, tmp_path: Path) -> None:
    (tmp_path / "splits.toml").write_text('[datasets]\nscreen = "s.h5ad"\n[training]\nscreen = "train"\n')
    vectors = {n: np.full(3, i, np.float32) for i, n in enumerate("PQRST")}
    np.savez(tmp_path / "f.npz", allow_pickle=False, **vectors)
    config = tiny_config(splits=str(tmp_path / "splits.toml"), perturbations=str(tmp_path / "f.npz"))
    train(store, tmp_path / "whole", config, Silent())
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(store, run, config, Silent(), on_log=signal_after(6))
    (tmp_path / "splits.toml").unlink()
    (tmp_path / "f.npz").rename(tmp_path / "moved.npz")
    resumed = resumed_config(run, "auto", {"perturbations": str(tmp_path / "moved.npz")})
    train(store, run, resumed, Silent(), resume="auto")
    for which in (MODEL, OPTIMIZER):
        assert same(weights(run / LAST, which), weights(tmp_path / "whole" / LAST, which))
    vectors["P"] += 1
    np.savez(tmp_path / "moved.npz", allow_pickle=False, **vectors)
    with pytest.raises(InputError, match=r"is of another run \(features.sha256: "):
        train(store, run, resumed, Silent(), resume="auto")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"batch_size": 4}, "config.batch_size: 3 there, 4 now"),
        ({"seed": 1}, "config.seed: 0 there, 1 now"),
        ({"loss": "mse"}, 'config.loss: "energy" there, "mse" now'),
        ({"hidden": 8}, "config.hidden: 16 there, 8 now; sizes.hidden: 16 there, 8 now; sizes.ffn: 64 there, 32 now"),
        ({"val_sets": 1}, "config.val_sets: 0 there, 1 now"),
        ({"dropout": 0.2, "accumulate": 2}, "config.accumulate: 1 there, 2 now; config.dropout: 0.1 there, 0.2 now"),
    ],
)
def test_resuming_with_another_configuration_is_refused_with_the_difference(
    store: Path, whole: Path, tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(InputError) as error:
        train(store, run, tiny_config(**changes), Silent(), resume="auto")
    assert difference in str(error.value) and "another --run folder" in str(error.value)
    assert files(run) == files(whole) and metrics(run) == metrics(whole)
    with pytest.raises(InputError, match=r"--[a-z-]+ .* would make another run; this one has"):
        resumed_config(run, "auto", changes)


def test_resuming_with_another_store_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    other = write_store(tmp_path / "other.zarr", [tiny_group(seed=5)])
    with pytest.raises(InputError, match=r"is of another run \(cache_sha256: "):
        train(other, run, tiny_config(), Silent(), resume="auto")
    narrow = write_store(tmp_path / "narrow.zarr", [tiny_group(sizes={"P": 8, "Q": 5})])
    with pytest.raises(InputError, match=r"one-hot features of other perturbations"):
        train(narrow, run, tiny_config(), Silent(), resume="auto")
    assert files(run) == files(whole)


def test_going_back_with_another_learning_rate_beside_later_checkpoints_is_refused(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = tiny_config(lr=1e-4, clip=0.5)
    with pytest.raises(InputError) as error:
        train(store, run, config, Silent(), resume=str(run / step_folder(4)))
    assert "later checkpoints (last, checkpoint-step-12, checkpoint-step-8), made with another --lr, --clip." in str(
        error.value
    )
    assert "in another --run folder" in str(error.value)
    assert files(run) == files(whole) and metrics(run) == metrics(whole)
    train(store, tmp_path / "branch", config, Silent(), resume=str(run / step_folder(4)))
    assert not same(weights(tmp_path / "branch" / LAST), weights(whole / LAST))
    train(store, run, tiny_config(lr=1e-4, max_steps=13), Silent(), resume=str(run / LAST))  # nothing later


def test_resumed_config_takes_what_may_change_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    config = resumed_config(whole, "auto", {"max_steps": 99, "lr": 0.5, "device": "cpu", "batch_size": 3})
    assert (config.max_steps, config.lr, config.batch_size, config.hidden) == (99, 0.5, 3, 16)
    with pytest.raises(InputError, match=r"--set-size 5 would make another run; this one has 4. Use a new --run"):
        resumed_config(whole, "auto", {"set_size": 5})
    with pytest.raises(InputError, match=r"Unknown key 'steps'"):
        resumed_config(whole, "auto", {"steps": 5})
    assert resumed_config(tmp_path / "new", str(whole / LAST), {}) == resumed_config(whole, "auto", {})
    with pytest.raises(InputError, match=r"is no run folder: it has no config.toml"):
        resumed_config(whole / LAST, "auto", {})


# ---- damage


def spoil(folder: Path, name: str = MODEL) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).unlink()  # last/ and the kept checkpoint of the same step share their files
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_resume_auto_passes_over_damaged_checkpoints_and_makes_them_again(
    store: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for folder in (LAST, step_folder(12)):
        spoil(run / folder, name)
    with pytest.raises(InputError, match=r"damaged.*Sound: .*checkpoint-step-8\. Pass that one instead"):
        train(store, run, tiny_config(), Silent(), resume=str(run / LAST))
    notes = Notes()
    train(store, run, tiny_config(), notes, resume="auto")
    assert sum(text.startswith("Passed over: ") for text in notes.texts) == 2
    assert f"Resuming from {run / step_folder(8)} at step 8." in notes.texts
    assert files(run) == files(whole) and metrics(run) == metrics(whole)


def test_a_damaged_kept_checkpoint_never_becomes_last(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / LAST)
    spoil(run / step_folder(12))
    train(store, run, tiny_config(checkpoint_every=100), Silent(), resume="auto")  # step 12 is not kept this time
    assert weights(run / LAST).keys() and same(weights(run / LAST), weights(whole / LAST))


def test_a_run_with_damaged_checkpoints_only_is_not_started_over(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for folder in CHECKPOINTS:
        spoil(run / folder)
    with pytest.raises(InputError, match=r"no checkpoint to resume from \(.*damaged.*another --run folder"):
        train(store, run, tiny_config(), Silent(), resume="auto")


def test_best_cannot_be_resumed(store: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no optimizer state"):
        train(store, tmp_path / "run", tiny_config(), Silent(), resume=str(whole / BEST))


def test_a_kill_between_the_renames_of_last_is_recovered_from(store: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(store, run, tiny_config(), Silent(), on_log=signal_after(6))
    (run / LAST).rename(run / ".last.old")
    shutil.copytree(run / ".last.old", run / ".last.new")  # the one that was being put in its place
    notes = Notes()
    train(store, run, tiny_config(), notes, resume="auto")
    assert f"Resuming from {run / '.last.old'} at step 6." in notes.texts
    assert files(run) == files(whole)


# ---- the command line


def sest_train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `sest train` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["sest", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_line_trains_resumes_and_repeats_a_run_from_its_config(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text("".join(f"{k.replace('_', '-')} = {json.dumps(v)}\n" for k, v in TINY.items()))
    run = tmp_path / "run"
    assert sest_train(monkeypatch, store, "--run", run, "--config", tmp_path / "tiny.toml", "--max-steps", 4) == 0
    said = capsys.readouterr()
    assert "5,508 trainable parameters" in said.out and "best val_loss" in said.out
    assert "step 4/4: loss" in said.err
    assert sest_train(monkeypatch, store, "--run", run) == 2
    assert "Continue it with --resume auto" in capsys.readouterr().err
    assert sest_train(monkeypatch, store, "--run", run, "--resume", "auto", "--max-steps", 12) == 0
    assert same(weights(run / LAST), weights(whole / LAST))
    assert sest_train(monkeypatch, store, "--run", run, "--resume", "auto", "--hidden", 32) == 2
    assert "--hidden 32 would make another run; this one has 16" in capsys.readouterr().err
    assert sest_train(monkeypatch, store, "-r", tmp_path / "again", "--config", run / CONFIG) == 0
    assert files(tmp_path / "again") == files(whole)
    capsys.readouterr()
    assert sest_train(monkeypatch, store, "--run", tmp_path / "no", "--resume", "auto") == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_run_that_was_never_validated_has_no_best_val_loss_to_show(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train(store, run, tiny_config(checkpoint_every=2, val_every=9), Silent(), on_log=crash_after(2))
    assert sest_train(monkeypatch, store, "--run", run, "--resume", "auto", "--max-steps", 2) == 0
    assert "step 2 (all steps done)." in capsys.readouterr().out


def test_the_command_line_says_what_failed_and_exits_with_1_or_143(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text("".join(f"{k.replace('_', '-')} = {json.dumps(v)}\n" for k, v in TINY.items()))
    arguments = [store, "--config", tmp_path / "tiny.toml", "--max-bad-steps", 2]
    with monkeypatch.context() as patch:
        nan_at(patch, set(range(1, 99)))
        assert sest_train(patch, *arguments, "--run", tmp_path / "bad") == 1
    said = capsys.readouterr().err
    assert "Error: 2 steps in a row before step 3 had a non-finite loss" in said and "Traceback" not in said
    original = sest.train.Window.add

    def add(self: Any, *args: Any) -> None:
        original(self, *args)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sest.train.Window, "add", add)
    assert sest_train(monkeypatch, *arguments, "--run", tmp_path / "stopped") == 143
    assert "Stopped after step 1, saved in" in capsys.readouterr().err


def test_a_cell_type_the_head_never_sees_is_named_unless_its_controls_are_learned(store: Path, tmp_path: Path) -> None:
    (tmp_path / "splits.toml").write_text(
        '[datasets]\nscreen = "s.h5ad"\n[training]\nscreen = "train"\n[zeroshot]\n"screen.y" = "test"\n'
    )
    for control_targets in (False, True):
        notes = Notes()
        config = tiny_config(splits=str(tmp_path / "splits.toml"), control_targets=control_targets, max_steps=1)
        train(store, tmp_path / f"run{control_targets}", config, notes)
        said = any("never sees screen / y in training. With --control-targets" in text for text in notes.texts)
        assert said == (not control_targets)


# ---- where the cells are


def test_cells_in_mapped_files_give_the_same_bytes_and_the_files_go_at_the_end(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    run, notes = tmp_path / "run", Notes()
    config = tiny_config(data_device="disk")
    with pytest.raises(Interrupted):
        train(store, run, config, notes, on_log=signal_after(5))
    assert any(re.fullmatch(rf"Batches from {run}/scratch: \S+ a second\.", text) for text in notes.texts)
    assert (run / "scratch/targets.json").is_file()  # for the run that is resumed
    notes = Notes()
    train(store, run, config, notes, resume="auto")
    assert any("are used again" in text for text in notes.texts)
    assert not (run / "scratch").exists()
    assert files(run) == files(whole)


def test_a_run_killed_while_its_files_are_written_can_be_started_again(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "run", tiny_config(data_device="disk")
    with monkeypatch.context() as kill:
        kill.setattr("sest.targets.write_durably", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(store, run, config, Silent())
    assert [path.name for path in run.iterdir()] == ["scratch"]
    train(store, run, config, Silent())
    assert files(run) == files(whole)


def test_a_scratch_folder_that_was_named_is_kept_for_other_runs(store: Path, tmp_path: Path) -> None:
    config = tiny_config(data_device="disk", scratch=str(tmp_path / "scratch"), max_steps=1)
    train(store, tmp_path / "a", config, Silent())
    notes = Notes()
    train(store, tmp_path / "b", config, notes)
    assert any("are used again" in text for text in notes.texts) and (tmp_path / "scratch").is_dir()
    assert files(tmp_path / "a") == files(tmp_path / "b")


# ---- the compiled head


def test_a_head_that_cannot_be_compiled_is_one_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        def network(*tensors: Tensor) -> Tensor:
            raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nin a long story")

        return network

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(InputError, match=r"^--compile does not work here: No working C\+\+ compiler found\. Leave it"):
        train(store, tmp_path / "run", tiny_config(compile=True), Silent())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own modules, on import
def test_the_compiled_head_takes_the_same_steps_to_rounding(store: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 4, "dropout": 0.2, "accumulate": 2}
    for name, compile_ in (("eager", False), ("compiled", True)):
        train(store, tmp_path / name, tiny_config(compile=compile_, **changes), Silent())
    # sums in another order; Adam turns a gradient's relative error into one of lr
    assert_close(weights(tmp_path / "compiled" / LAST), weights(tmp_path / "eager" / LAST), atol=2e-5)
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not same(weights(tmp_path / "compiled" / LAST), weights(tmp_path / "eager" / LAST))  # it was compiled
