"""One step: what PyTorch does with the same sets, whatever memory, precision or a bad loss do to it."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import sest.training.prepare
import sest.training.trainer
from helpers.configs import small_config
from helpers.notes import Notes
from helpers.runs import files, metrics, nan_at, same, scripted, signal_after, steps, weights
from sest.cells.split_file import TRAIN, VAL
from sest.config import TrainConfig
from sest.data.dataset import Dataset, read_dataset
from sest.data.resident import Batch, resident_cells
from sest.data.sampler import SetSampler
from sest.errors import InputError, TrainingFailed
from sest.evaluation.pairs import held_out, mean_scores, pair_metrics, predicted_means
from sest.head.adamw import AdamW
from sest.head.loss import energy_distance, make_loss
from sest.head.model import StateTransition, new_model
from sest.machine.signals import Interrupted
from sest.machine.team import ALONE
from sest.progress import reporting
from sest.runs.checkpoint import open_checkpoint, step_folder
from sest.runs.schema import LAST, MODEL, OPTIMIZER
from sest.training.prepare import prepare
from sest.training.train import train
from sest.training.trainer import Trainer


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert float((value - b[name]).abs().max()) <= atol, name


def first_batch(cache: Path, config: TrainConfig, n_sets: int) -> tuple[StateTransition, Batch]:
    """The first weights and the first sets of a run (perturbation: features), put together by hand."""
    data = read_dataset(cache, config)
    sampler = SetSampler(
        data.labels,
        data.in_split(TRAIN),
        config.set_size,
        config.seed,
        same_batch=config.match_controls == "batch",
        control_targets=config.control_targets,
    )
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, torch.device("cpu"))
    batch = cells.batch(sampler.sets(np.arange(n_sets)))
    batch["perturbation"] = torch.from_numpy(data.features.matrix)[batch["perturbation"]]
    model = new_model(sest.training.prepare.head_sizes(data, config), config.seed)
    torch.nn.init.zeros_(model.pert_encoder.get_parameter("0.weight"))  # one-hot columns start at zero
    return model, batch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "mse"},
        {"loss": "energy+sinkhorn"},
        {"match_controls": "batch"},
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
    cache: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "sinkhorn" in changes.get("loss", ""):
        pytest.importorskip("geomloss")
    config = small_config(max_steps=1, dropout=0.0, **changes)
    train(cache, tmp_path / "run", config)
    model, batch = first_batch(cache, config, config.batch_size * config.accumulate)
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


def test_k_batches_of_b_are_one_batch_of_k_times_b(cache: Path, tmp_path: Path) -> None:
    results = {}
    for batch_size, accumulate in ((6, 1), (3, 2), (1, 6)):
        run = tmp_path / f"{batch_size}"
        config = small_config(batch_size=batch_size, accumulate=accumulate, dropout=0.3, val_sets=1)
        train(cache, run, config)
        results[batch_size] = weights(run / LAST), [line["loss"] for line in metrics(run) if "loss" in line]
    for batch_size in (3, 1):
        # sums of float32 gradients in another order; Adam turns a gradient's relative error into one of lr
        assert_close(results[batch_size][0], results[6][0], atol=2e-5)
        assert results[batch_size][1] == pytest.approx(results[6][1], rel=1e-5)


def test_dropout_differs_between_steps_sets_and_seeds_and_not_between_runs(cache: Path, tmp_path: Path) -> None:
    config = small_config(max_steps=2, accumulate=2, dropout=0.5)
    seen: list[Tensor] = []
    original = StateTransition.forward

    def forward(self: StateTransition, basal: Tensor, perturbation: Tensor, keys: Tensor | None = None) -> Tensor:
        if self.training:
            assert keys is not None
            seen.append(self.basal_encoder[2](torch.ones(len(basal), 4, 50), keys))
        return original(self, basal, perturbation, keys)

    with mock.patch.object(StateTransition, "forward", forward):
        for name, seed in (("a", 0), ("b", 1), ("c", 0)):
            train(cache, tmp_path / name, dataclasses.replace(config, seed=seed))
    first, second, again = torch.cat(seen[:4]), torch.cat(seen[4:8]), torch.cat(seen[8:])
    assert torch.equal(first, again) and len(first) == 4 * config.batch_size
    masks = {mask.numpy().tobytes() for mask in torch.cat([first, second])}
    assert len(masks) == 8 * config.batch_size  # no two sets have the same


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
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_sets: int
) -> None:
    config = small_config(batch_size=5, dropout=0.3, accumulate=2)
    train(cache, tmp_path / "whole", config)
    notes = Notes()
    out_of_memory_for(monkeypatch, n_sets)
    with reporting(notes):
        train(cache, tmp_path / "parts", config)
    told = [text for text in notes.notes if text.startswith("Out of GPU memory")]
    sizes = {5: [2], 3: [2], 2: [2, 1]}[n_sets]
    assert [int(text.split()[4]) for text in told] == sizes
    assert_close(weights(tmp_path / "parts" / LAST), weights(tmp_path / "whole" / LAST), atol=2e-5)
    expected = [line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert [line["loss"] for line in metrics(tmp_path / "parts") if "loss" in line] == pytest.approx(expected, rel=1e-5)


def test_running_out_of_memory_half_way_through_a_batch_leaves_no_gradient_behind(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(batch_size=4, accumulate=2, dropout=0.3)
    train(cache, tmp_path / "whole", config)
    original, calls = StateTransition.forward, 0

    def forward(self: StateTransition, basal: Tensor, perturbation: Tensor, keys: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += self.training
        if self.training and calls == 4:  # the second batch of step 2
            raise torch.OutOfMemoryError
        return original(self, basal, perturbation, keys)

    monkeypatch.setattr(StateTransition, "forward", forward)
    train(cache, tmp_path / "parts", config)
    assert_close(weights(tmp_path / "parts" / LAST), weights(tmp_path / "whole" / LAST), atol=2e-5)


def test_too_little_memory_for_one_set_is_an_error_that_says_what_to_make_smaller(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_for(monkeypatch, 1)
    with pytest.raises(InputError, match=r"one set at a time. Use a smaller --set-size or --hidden"):
        train(cache, tmp_path / "run", small_config())


def test_a_step_with_a_nan_loss_is_skipped_and_counted_and_moves_nothing(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {3, 4, 7})
    run = tmp_path / "run"
    config = small_config(checkpoint_every=1, max_bad_steps=3)
    train(cache, run, config)
    for step in range(2, 13):
        before, after = run / step_folder(step - 1), run / step_folder(step)
        skipped = step in (3, 4, 7)
        assert same(weights(before), weights(after)) == skipped, step
        assert same(weights(before, OPTIMIZER), weights(after, OPTIMIZER)) == skipped, step  # Adam's step number too
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [line["step"] for line in lines if line["loss"] is None and line["grad_norm"] is None] == [3, 4, 7]
    assert open_checkpoint(run / LAST).state["run"]["skipped_steps"] == 3
    assert same(weights(run / step_folder(2)), weights_after_two_steps(cache, tmp_path))


def weights_after_two_steps(cache: Path, folder: Path) -> dict[str, Tensor]:
    train(cache, folder / "two", small_config(max_steps=2))
    return weights(folder / "two" / LAST)


def test_one_set_that_is_not_finite_skips_the_whole_step(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {2})
    config = small_config(accumulate=3, max_steps=3, checkpoint_every=1)  # call 2 is the second of step 1's batches
    train(cache, tmp_path / "run", config)
    first, _ = first_batch(cache, config, 1)
    assert same(weights(tmp_path / "run" / step_folder(1)), dict(first.state_dict()))
    assert not same(weights(tmp_path / "run" / step_folder(2)), dict(first.state_dict()))


def test_skipped_steps_between_log_lines_are_counted_once_also_when_resumed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {2, 3, 6})
    run = tmp_path / "run"
    config = small_config(log_every=5, checkpoint_every=3)
    train(cache, run, config)
    lines = [line for line in metrics(run) if "loss" in line]
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [(5, 2), (10, 3), (12, 3)]
    assert open_checkpoint(run / step_folder(3)).state["run"]["skipped_steps"] == 2  # not yet in a line
    nan_at(monkeypatch, {3})  # the same batch of step 6
    shutil.rmtree(run / step_folder(6))
    train(cache, run, config, resume=str(run / step_folder(3)))
    lines = [line for line in metrics(run) if "loss" in line]
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [(5, 2), (10, 3), (12, 3)]


@pytest.mark.parametrize("log_every", [1, 2, 5])
def test_too_many_bad_steps_in_a_row_end_training_with_the_last_checkpoint_kept(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    run = tmp_path / "run"
    config = small_config(max_bad_steps=3, log_every=log_every)
    with monkeypatch.context() as patch:
        nan_at(patch, {1, 3, *range(6, 99)})
        with pytest.raises(
            TrainingFailed, match=r"steps in a row .*non-finite.*last checkpoint is kept.*--resume auto"
        ):
            train(cache, run, config)
    stopped_at = metrics(run)[-1]["step"]
    assert stopped_at == {1: 8, 2: 8, 5: 10}[log_every]  # noticed with the next line
    assert open_checkpoint(run / step_folder(4)).state["step"] == 4
    assert not (run / LAST).exists()
    # without the cause it goes on, and the lines of the failed steps are made again
    train(cache, run, config, resume=str(run / step_folder(4)))
    assert steps(run, validations=True) == [4, 8, 12]
    assert metrics(run)[-2]["skipped_steps"] == 2


def test_bad_steps_that_are_not_in_a_row_do_not_end_training(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {1, 2, 4, 5, 7, 8, 10, 11})
    train(cache, tmp_path / "run", small_config(max_bad_steps=3, log_every=4))
    assert open_checkpoint(tmp_path / "run" / LAST).state["run"]["skipped_steps"] == 8


def test_a_nan_gradient_is_skipped_though_the_loss_is_finite(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, gram: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        def criterion(predicted: Tensor, target: Tensor) -> Tensor:
            loss = energy_distance(predicted, target)
            return loss + (predicted * 0).sqrt().sum((1, 2))  # the slope of a root at 0

        return criterion

    monkeypatch.setattr(sest.training.prepare, "make_loss", make)
    with pytest.raises(TrainingFailed, match=r"4 steps in a row before step 5"):
        train(cache, tmp_path / "run", small_config(max_bad_steps=4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_is_a_failure_not_patience(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        scripted(patch, {2: value})
        with pytest.raises(TrainingFailed, match=rf"validation loss is {value} at step 8. The last checkpoint is kept"):
            train(cache, run, small_config(early_stopping=True))
    assert steps(run, validations=True) == [4]
    assert open_checkpoint(run / step_folder(4)).state["step"] == 4 and not (run / step_folder(8)).exists()
    train(cache, run, small_config(), resume="auto")
    # the first validation was scripted, so what was best differs; the weights do not
    assert same(weights(run / LAST, OPTIMIZER), weights(whole / LAST, OPTIMIZER))


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e9])
def test_clip_bounds_the_gradient_and_the_logged_norm_is_the_one_before(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    norms: list[float] = []
    original = AdamW.step

    def step(self: AdamW) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm()))
        original(self)

    monkeypatch.setattr(AdamW, "step", step)
    train(cache, tmp_path / "run", small_config(clip=clip))
    logged = [line["grad_norm"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert min(logged) > 0.3
    expected = [0.3] * 12 if clip == 0.3 else logged
    assert norms == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("clip", [1e-3, 1e3])  # far below the gradients' norms, and far above them
def test_clipping_within_adamw_is_clipping_before_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    def moments(folder: str) -> dict[str, Tensor]:
        trainer = prepare(cache, tmp_path / folder, small_config(clip=clip), torch.device("cpu"), ALONE, None)
        for _ in range(5):
            trainer.step()
        names = [name for name, _ in trainer.model.named_parameters()]
        return trainer.optimizer.to_tensors(names) | dict(trainer.model.state_dict())

    before, original = moments("before"), Trainer._clip

    def as_on_a_gpu(self: Trainer) -> Tensor:
        here, self.device = self.device, torch.device("cuda")
        norm = original(self)
        self.device = here
        assert self.optimizer.grad_scale is not None
        return norm

    monkeypatch.setattr(Trainer, "_clip", as_on_a_gpu)
    within = moments("within")
    for name, value in before.items():  # a division for a product: rounding, which Adam's root may enlarge
        torch.testing.assert_close(within[name], value, rtol=1e-4, atol=1e-9 if name.startswith("exp_avg") else 1e-6)


def test_weight_decay_shrinks_weights_by_lr_times_it(cache: Path, tmp_path: Path) -> None:
    for decay in (0.0, 0.5):
        config = small_config(max_steps=1, weight_decay=decay, lr=1e-2)
        train(cache, tmp_path / f"{decay}", config)
    before, _ = first_batch(cache, small_config(), 1)
    without, with_decay = (weights(tmp_path / f"{decay}" / LAST) for decay in (0.0, 0.5))
    for name, value in before.state_dict().items():
        torch.testing.assert_close(with_decay[name], without[name] - 1e-2 * 0.5 * value, rtol=0, atol=1e-6)


def test_the_rate_rises_in_the_warm_up_and_falls_as_half_a_cosine(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cache, run, small_config(schedule="cosine", warmup=3))
    rates = [line["lr"] for line in metrics(run) if "loss" in line]
    by_hand = [1 / 3, 2 / 3, 1, *((1 + math.cos(math.pi * k / 9)) / 2 for k in range(9))]
    assert rates == pytest.approx([1e-3 * rate for rate in by_hand], rel=1e-12)
    train(cache, tmp_path / "first", small_config(max_steps=1, schedule="cosine", warmup=3))
    first, whole_rate = weights(tmp_path / "first" / LAST), tmp_path / "whole_rate"
    train(cache, whole_rate, small_config(max_steps=1, weight_decay=0.0))
    before, _ = first_batch(cache, small_config(), 1)
    moved = weights(whole_rate / LAST)
    for name, value in before.state_dict().items():  # the optimizer steps with the rate that is logged
        torch.testing.assert_close(3 * (first[name] - value), moved[name] - value, rtol=0, atol=1e-5)


def test_a_schedule_and_an_average_stopped_and_resumed_are_the_run(cache: Path, tmp_path: Path) -> None:
    config = small_config(schedule="cosine", warmup=3, ema=0.9)
    train(cache, tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        train(cache, tmp_path / "run", config, on_log=signal_after(6))
    train(cache, tmp_path / "run", config, resume="auto")
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    with pytest.raises(InputError, match=r"later checkpoints .* made with another --max-steps"):
        train(
            cache, tmp_path / "run", dataclasses.replace(config, max_steps=20),
            resume=str(tmp_path / "run" / step_folder(4)))  # fmt: skip


def test_the_average_validates_and_becomes_best_and_the_weights_train_on(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {3: 0.5})  # the last validation is the best
    run = tmp_path / "run"
    train(cache, run, small_config(ema=0.9))
    assert same(weights(run / LAST), weights(whole / LAST))
    tensors = weights(run / LAST, OPTIMIZER)
    average = {name.removeprefix("ema/"): value for name, value in tensors.items() if name.startswith("ema/")}
    assert same(weights(run / "best"), average) and not same(average, weights(run / LAST))
    train(cache, tmp_path / "first", small_config(ema=0.9, max_steps=4))
    validated = metrics(tmp_path / "first")[-1]["mae"]
    best = read_dataset(cache, small_config()), open_checkpoint(tmp_path / "first" / "best").model()
    assert validated == pytest.approx(float(held_out_mae(*best)), rel=1e-5)


def held_out_mae(data: Dataset, model: StateTransition) -> float:
    """By another way: `sest.evaluation.pairs` on the checkpoint's head."""
    held = held_out(data, small_config(), VAL, 0)
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, torch.device("cpu"))
    features = torch.from_numpy(data.features.matrix)
    means = predicted_means(model.eval(), cells, held, features, 3, nullcontext)
    return mean_scores(pair_metrics(data, held.pairs, means))["mae"]


def test_bf16_trains_on_the_cpu_and_can_be_resumed_in_fp32(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cache, run, small_config(precision="bf16", max_steps=8))
    assert open_checkpoint(run / LAST).state["precision"] == "bf16"
    assert not same(weights(run / LAST), weights(whole / step_folder(8)))
    assert metrics(run)[0]["loss"] == pytest.approx(
        metrics(whole)[0]["loss"], rel=1e-2
    )  # 8 bits of mantissa in the matrix products
    train(cache, run, small_config(precision="fp32"), resume="auto")
    assert open_checkpoint(run / LAST).state["precision"] == "fp32"


def in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in fp16 with its GradScaler, on the CPU, where sest itself refuses it; on older GPUs it is the default."""
    monkeypatch.setattr(sest.training.prepare, "choose_precision", lambda name, device, training: "fp16")


def test_fp16_clips_and_logs_unscaled_gradients_and_resumes_with_its_scale(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp16(monkeypatch)
    train(cache, tmp_path / "whole", small_config())
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
        train(cache, run, small_config(), on_log=signal_after(6))
    assert open_checkpoint(run / LAST).state["scaler"]["_growth_tracker"] == 6
    train(cache, run, small_config(), resume="auto")
    assert files(run) == files(tmp_path / "whole")


def test_fp16_skips_a_step_that_overflows_and_halves_its_scale(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp16(monkeypatch)
    nan_at(monkeypatch, {3})
    run = tmp_path / "run"
    train(cache, run, small_config(max_steps=4, checkpoint_every=1))
    scales = [open_checkpoint(run / step_folder(step)).state["scaler"]["scale"] for step in (1, 2, 3, 4)]
    assert scales == [65536.0, 65536.0, 32768.0, 32768.0]
    for which in (MODEL, OPTIMIZER):
        assert same(weights(run / step_folder(2), which), weights(run / step_folder(3), which))
        assert not same(weights(run / step_folder(3), which), weights(run / step_folder(4), which))
    assert metrics(run)[-2]["skipped_steps"] == 1


def test_a_head_that_cannot_be_compiled_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        def network(*tensors: Tensor) -> Tensor:
            raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nin a long story")

        return network

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(InputError, match=r"^--compile does not work here: No working C\+\+ compiler found\. Leave it"):
        train(cache, tmp_path / "run", small_config(compile=True))


def test_where_nobody_asked_for_it_a_head_that_cannot_be_compiled_is_not(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(call: Any, **options: Any) -> Any:
        def network(*tensors: Tensor) -> Tensor:
            call(*tensors).sum().backward()  # a half of what it does is done
            raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nin a long story")

        return network

    train(cache, tmp_path / "eager", small_config())
    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(sest.training.prepare, "compiles", lambda asked, device, n_steps: asked is None)
    with caplog.at_level(logging.INFO):
        train(cache, tmp_path / "run", small_config())
    said = "Steps are not compiled, as that does not work here (No working C++ compiler found)."
    assert [record.message for record in caplog.records].count(said) == 1
    assert same(weights(tmp_path / "run" / LAST), weights(tmp_path / "eager" / LAST))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own modules, on import
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
def test_the_compiled_head_and_loss_take_the_same_steps_to_rounding(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two batches a step, each of whose four sets come in two parts, as after running out of memory."""
    changes: dict[str, Any] = {"max_steps": 4, "dropout": 0.2, "accumulate": 2, "batch_size": 4}
    train(cache, tmp_path / "eager", small_config(**changes))
    monkeypatch.setattr(sest.training.trainer.Trainer, "__post_init__", in_parts_of(2))
    torch._dynamo.utils.counters.clear()
    train(cache, tmp_path / "compiled", small_config(compile=True, **changes))
    assert torch._dynamo.utils.counters["graph_break"] == {} and torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # sums in another order; Adam turns a gradient's relative error into one of lr
    assert_close(weights(tmp_path / "compiled" / LAST), weights(tmp_path / "eager" / LAST), atol=2e-5)
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not same(weights(tmp_path / "compiled" / LAST), weights(tmp_path / "eager" / LAST))  # it was compiled


def in_parts_of(n_sets: int) -> Callable[[Any], None]:
    """`Trainer.__post_init__`, as if more than so many sets did not fit the memory."""
    original = sest.training.trainer.Trainer.__post_init__

    def post_init(self: Any) -> None:
        original(self)
        self._micro_size = n_sets
        self._compile()

    return post_init


@pytest.mark.parametrize(
    ("changes", "n_sets", "mode"),
    [({}, 3, "reduce-overhead"), ({"accumulate": 2}, 3, None), ({}, 2, None)],
    ids=["one backward pass", "two batches", "parts"],
)
def test_a_gpu_makes_graphs_only_where_one_of_them_makes_all_gradients_of_a_step(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    n_sets: int,
    mode: str | None,
) -> None:
    made: list[dict[str, Any]] = []

    def compile_(network: Any, **options: Any) -> Any:
        made.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    config = small_config(compile=True, **changes)
    trainer = prepare(cache, tmp_path / "run", config, torch.device("cpu"), ALONE, None)
    trainer.device, trainer._micro_size = torch.device("cuda"), n_sets
    trainer._compile()
    assert made[-1] == {"mode": mode, "dynamic": False}


def test_moments_are_there_before_a_batch_takes_their_memory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory for them the sets are halved, as without memory for a batch, and nothing is half there."""
    calls = 0
    original = AdamW.new_moments

    def moments(optimizer: AdamW) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError
        original(optimizer)
        if calls == 2:
            seen.append({kind: v.clone() for state in optimizer.state.values() for kind, v in state.items()})

    seen: list[dict[str, Tensor]] = []
    train(cache, tmp_path / "whole", small_config())
    monkeypatch.setattr(AdamW, "new_moments", moments)
    train(cache, tmp_path / "parts", small_config())
    assert not any(tensor.any() for tensor in seen[0].values())
    assert_close(weights(tmp_path / "parts" / LAST), weights(tmp_path / "whole" / LAST), atol=2e-5)
