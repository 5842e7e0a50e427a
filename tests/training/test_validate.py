"""Validation: the loss over all validation sets and the pseudobulk metrics, each beside the baselines."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.caches import SIZES, small_screen
from helpers.configs import small_config
from helpers.datasets import dataset_of
from sest.baselines.all import Baselines, baseline_pseudobulks
from sest.baselines.effects import BASELINES
from sest.cells.split_file import VAL
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.resident import ResidentCells, resident_cells
from sest.evaluation.ceiling import independent_pearson_delta
from sest.evaluation.means import query_of, split_ceilings, split_pairs, training_effects
from sest.evaluation.metrics import discrimination_score, mean_absolute_error, pearson_delta
from sest.head.loss import energy_distance, mean_squared_error
from sest.head.model import HeadSizes, new_model
from sest.runs.curves import METRICS, NOT_MEASURABLE, VAL_PAIRS, WITH_CELLS, is_no_measure
from sest.training.validate import Validator

CPU = torch.device("cpu")
SPLITS = """
[datasets]
screen = "screen.h5ad"
[training]
screen = "train"
[fewshot."screen.x"]
val = ["P", "Q", "T"]
[fewshot."screen.y"]
val = ["R"]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """P, Q and T (8, 5 and 9 cells: 2, 2 and 3 sets of 4) of x and R (1 cell) of y validate."""
    return dataset_of(tmp_path_factory.mktemp("validate"), [small_screen()], SPLITS)


@pytest.fixture(scope="module")
def resident(data: Dataset) -> ResidentCells:
    return resident_cells(data.targets, data.embeddings, data.control_rows, CPU)


def validator(data: Dataset, resident: ResidentCells, criterion: Any = energy_distance, **changes: Any) -> Validator:
    config: TrainConfig = small_config(**changes)
    return Validator(data, resident, config, CPU, criterion)


def head(data: Dataset) -> nn.Module:
    sizes = HeadSizes(
        dim=data.cache.dim,
        n_features=data.features.width,
        n_genes=len(data.targets.genes),
        hidden=16,
        n_layers=1,
        n_heads=2,
        ffn=32,
        n_encoder_layers=2,
        n_decoder_layers=2,
    )
    return new_model(sizes, 0)


def without_own(
    x: Tensor, y: Tensor, controls: np.ndarray, targets: np.ndarray, other: Tensor | None = None, others: Any = None
) -> float:
    """The energy distance of two sets of cells, none compared with itself or a copy, from all distances in float64.

    `controls`, `targets`: which cell those of x are from, and those of y are. `other`: cells that those of x are
    compared with instead of each other, from the controls `others`.
    """

    def mean(a: Tensor, b: Tensor, of_a: np.ndarray, of_b: np.ndarray) -> Tensor:
        return torch.cdist(a, b)[torch.from_numpy(of_a[:, None] != of_b)].mean()

    x, y = x.double(), y.double()
    within = mean(x, x, controls, controls) if other is None else mean(x, other.double(), controls, others)
    return float(torch.cdist(x, y).mean() - 0.5 * within - 0.5 * mean(y, y, targets, targets))


@pytest.mark.parametrize("criterion", [energy_distance, mean_squared_error])
def test_val_loss_is_the_mean_over_all_sets_and_metrics_are_means_over_pairs(
    data: Dataset, resident: ResidentCells, criterion: Any
) -> None:
    checked, model = validator(data, resident, criterion), head(data)
    got = checked.run(model, nullcontext)
    sets, labels = checked.sets, data.labels
    assert len(sets["targets"]) == 2 + 2 + 3 + 1
    model.eval()
    features = torch.from_numpy(data.features.matrix)
    losses: list[float] = []
    distances: list[float] = []
    cells: dict[tuple[int, int], list[np.ndarray]] = {}
    assert not np.array_equal(checked.held.other_controls, sets["controls"])
    for targets, controls, others, p in zip(
        sets["targets"], sets["controls"], checked.held.other_controls, sets["perturbation"], strict=True
    ):
        with torch.no_grad():
            predicted, other = (model(resident.basal(rows)[None], features[p][None]) for rows in (controls, others))
        losses.append(float(criterion(predicted, resident.expression(targets)[None])))
        distances.append(without_own(predicted[0], resident.expression(targets), controls, targets, other[0], others))
        key = (int(labels.context[targets[0]]), int(p))
        cells.setdefault(key, []).append(predicted[0].double().numpy())
    assert got["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)  # float32, other batches
    assert got["energy_distance"] == pytest.approx(np.nanmean(distances), rel=1e-4)  # a small difference of large ones
    pairs = split_pairs(data, VAL)
    keys = list(zip(pairs.context.tolist(), pairs.perturbation.tolist(), strict=True))
    assert sorted(cells) == keys
    means = np.stack([np.concatenate(cells[key]).mean(0) for key in keys])
    assert got["mae"] == pytest.approx(mean_absolute_error(means, pairs.observed).mean(), rel=1e-5)
    expected = pearson_delta(means, pairs.observed, pairs.control).mean()
    assert got["pearson_delta"] == pytest.approx(expected, rel=1e-5)
    pds = []
    for context in (0, 1):  # a cell is told apart from those of its own context
        mine = pairs.context == context
        names = [labels.perturbations[p] for p in pairs.perturbation[mine]]
        pds += discrimination_score(
            means[mine], pairs.observed[mine], pairs.control[mine][0], names, data.targets.genes
        ).tolist()
    assert got["pds"] == pytest.approx(np.nanmean(pds), rel=1e-6)  # a context of one perturbation has none


def test_baselines_are_scored_as_pseudobulks_and_some_as_cells_moved_by_their_effect(
    data: Dataset, resident: ResidentCells
) -> None:
    checked = validator(data, resident)
    pairs, expected = (
        split_pairs(data, VAL),
        baseline_pseudobulks(Baselines().fit(training_effects(data)), query_of(data, split_pairs(data, VAL))),
    )
    for name in BASELINES:
        mae = np.abs(expected[name] - pairs.observed).mean()
        assert checked.baselines[f"mae_{name}"] == pytest.approx(mae, rel=1e-6), name
    assert checked.baselines["pearson_delta_controls"] == pytest.approx(0.0, abs=1e-6)  # no effect predicted
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in WITH_CELLS}
    sets = checked.sets
    for targets, controls, p in zip(sets["targets"], sets["controls"], sets["perturbation"], strict=True):
        k = [(c, q) for c, q in zip(pairs.context, pairs.perturbation, strict=True)].index(
            (data.labels.context[targets[0]], p)
        )
        cells, real = resident.expression(controls), resident.expression(targets)
        for name in WITH_CELLS:
            shift = torch.from_numpy(expected[name][k] - pairs.control[k]).float()
            moved = cells if name == "controls" else (cells + shift).clamp_min(0)
            losses[name].append(
                (float(energy_distance(moved[None], real[None])), without_own(moved, real, controls, targets))
            )
    for name, values in losses.items():
        loss, distance = np.nanmean(values, axis=0)  # a set of one cell, filled with copies, has no distance
        assert checked.baselines[f"val_loss_{name}"] == pytest.approx(loss, rel=1e-5)
        assert checked.baselines[f"energy_distance_{name}"] == pytest.approx(distance, rel=1e-4, abs=1e-4)


def test_every_metric_stands_beside_the_baselines(data: Dataset, resident: ResidentCells) -> None:
    got = validator(data, resident).run(head(data), nullcontext)
    known = [m for m in METRICS if m != "pearson_delta_independent"]  # too few controls here for halves
    scores = {f"{m}_{b}" for m in known for b in (WITH_CELLS if m in METRICS[:2] else BASELINES)} | set(known)
    assert set(got) == scores | {VAL_PAIRS, NOT_MEASURABLE}
    assert all(isinstance(got[name], float) and np.isfinite(got[name]) for name in scores)


class Perfect(nn.Module):
    """Predicts cells of one known pseudobulk for every perturbation code; features are one-hot."""

    def __init__(self, by_code: dict[int, np.ndarray]) -> None:
        super().__init__()
        self.by_code = by_code

    def forward(self, basal: Tensor, perturbation: Tensor) -> Tensor:
        codes = (perturbation.argmax(-1) + 1).tolist()
        means = torch.from_numpy(np.stack([self.by_code[c] for c in codes])).float()
        return means.unsqueeze(1).expand(-1, basal.shape[1], -1)


class Linear(nn.Module):
    """Predicts the cell that an embedding stands for, whatever the perturbation."""

    def __init__(self, embeddings: Tensor, expression: Tensor) -> None:
        super().__init__()
        self.by = torch.linalg.lstsq(embeddings, expression).solution

    def forward(self, basal: Tensor, perturbation: Tensor) -> Tensor:
        return basal @ self.by


def test_a_head_that_predicts_the_real_pseudobulks_scores_one(data: Dataset, resident: ResidentCells) -> None:
    pairs = split_pairs(data, VAL)  # every code is in one context only
    model = Perfect(dict(zip(pairs.perturbation.tolist(), pairs.observed, strict=True)))
    got = validator(data, resident).run(model, nullcontext)
    assert got["pearson_delta"] == pytest.approx(1) and got["pds"] == 1.0 and got["mae"] == pytest.approx(0, abs=1e-6)


def test_batch_size_changes_nothing_beyond_rounding_and_the_model_trains_on(
    data: Dataset, resident: ResidentCells
) -> None:
    model = head(data)
    results = [validator(data, resident, batch_size=size).run(model, nullcontext) for size in (1, 3, 100)]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)
    assert model.training  # dropout is on again
    assert results[0] == validator(data, resident, batch_size=1).run(model, nullcontext)  # no randomness


def test_val_sets_limits_the_sets_but_keeps_every_perturbation(data: Dataset, resident: ResidentCells) -> None:
    for asked, expected in ((0, 8), (1, 4), (4, 4), (6, 6), (99, 8)):
        checked = validator(data, resident, val_sets=asked)
        assert len(checked.sets["targets"]) == expected
        assert set(checked.sets["perturbation"].tolist()) == {data.labels.perturbations.index(p) for p in "PQTR"}
        assert all(np.isfinite(value) for value in checked.run(head(data), nullcontext).values())


def test_validation_looks_at_validation_cells_and_their_own_controls_only(
    data: Dataset, resident: ResidentCells
) -> None:
    for controls in ("context", "batch"):
        sets = validator(data, resident, match_controls=controls).sets
        assert data.in_split(VAL)[sets["targets"]].all() and data.in_split(VAL)[sets["controls"]].all()
        assert not data.labels.is_control[sets["targets"]].any()
        assert set(sets["targets"].ravel().tolist()) == set(
            np.flatnonzero(data.in_split(VAL) & ~data.labels.is_control).tolist()
        )
    assert sum(SIZES[name] for name in "PQTR") == len(set(sets["targets"].ravel().tolist()))


def test_predictions_that_are_not_finite_give_a_val_loss_that_is_not_finite(
    data: Dataset, resident: ResidentCells
) -> None:
    pairs = split_pairs(data, VAL)
    bad = {int(p): np.full(len(data.targets.genes), np.nan) for p in pairs.perturbation}
    assert np.isnan(validator(data, resident).run(Perfect(bad), nullcontext)["val_loss"])


def test_with_independent_controls_even_the_real_pseudobulks_do_not_score_one(tmp_path: Path) -> None:
    """The noise of a control mean is in both effects otherwise."""
    splits = SPLITS.replace('[fewshot."screen.y"]\nval = ["R"]\n', "")
    data = dataset_of(tmp_path, [small_screen(sizes=dict.fromkeys(SIZES, 30), n_controls=60)], splits)
    pairs = split_pairs(data, VAL)
    model = Perfect(dict(zip(pairs.perturbation.tolist(), pairs.observed, strict=True)))
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, CPU)
    got = validator(data, cells).run(model, nullcontext)
    assert got["pearson_delta"] == pytest.approx(1) and 0.9 < got["pearson_delta_independent"] < 0.999


def test_how_far_a_head_follows_its_controls_is_a_line_through_what_it_predicts_from_other_ones(tmp_path: Path) -> None:
    splits = SPLITS.replace('[fewshot."screen.y"]\nval = ["R"]\n', "")
    data = dataset_of(tmp_path, [small_screen(sizes=dict.fromkeys(SIZES, 30), n_controls=60)], splits)
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, CPU)
    checked, rows = validator(data, cells), np.flatnonzero(data.labels.is_control)
    model = Linear(cells.basal(rows[None])[0], cells.expression(rows[None])[0])
    got = checked.run(model, nullcontext)
    features, pairs, sets = torch.from_numpy(data.features.matrix), split_pairs(data, VAL), checked.sets
    means, changes = np.zeros_like(pairs.observed), []
    for p, *controls in zip(sets["perturbation"], sets["controls"], checked.held.other_controls, strict=True):
        with torch.no_grad():
            one, other = (model(cells.basal(rows)[None], features[p][None])[0].double().mean(0) for rows in controls)
        of = [cells.expression(rows).double().mean(0) for rows in controls]
        changes.append(torch.stack([one - other, of[0] - of[1]]).numpy())
        means[pairs.perturbation == p] += one.numpy() / (sets["perturbation"] == p).sum()
    by, of_controls = np.concatenate(changes, axis=1)
    follows = float(np.linalg.lstsq(of_controls[:, None], by, rcond=None)[0][0])
    (ceiling,) = split_ceilings(data, VAL, small_config().seed)
    expected = independent_pearson_delta(ceiling.controls, 0, means, pairs.observed, pairs.control[0], follows).mean()
    assert 0.02 < follows < 1 and got["pearson_delta_independent"] == pytest.approx(expected, rel=1e-4)


def test_real_halves_stand_beside_the_scores_and_noise_is_called_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One screen with effects, and the same with its labels shuffled among perturbations and controls."""
    splits = SPLITS.replace('[fewshot."screen.y"]\nval = ["R"]\n', "")
    screen = small_screen(sizes=dict.fromkeys(SIZES, 30), n_controls=60)
    for shuffled in (False, True):
        if shuffled:
            obs = screen.obs.copy()
            for cell_type in ("x", "y"):
                mine = (obs["cell_type"] == cell_type).to_numpy()
                obs.loc[mine, "perturbation"] = np.random.default_rng(0).permutation(obs.loc[mine, "perturbation"])
            screen = dataclasses.replace(screen, obs=obs)
        (tmp_path / str(shuffled)).mkdir()
        data = dataset_of(tmp_path / str(shuffled), [screen], splits)
        caplog.clear()
        found = validator(data, resident_cells(data.targets, data.embeddings, data.control_rows, CPU)).baselines
        assert found[VAL_PAIRS] == 3
        assert found[NOT_MEASURABLE] == (3 if shuffled else 0)
        assert ("x: no measurable effect here" in caplog.text) == shuffled
        assert (found["pearson_delta_independent_real_half"] > 0.5) != shuffled
        assert found["pearson_delta_independent_controls"] == 0.0  # their effect is none, whatever the controls
        assert found["pearson_delta_independent_stack"] != found["pearson_delta_stack"]
        assert is_no_measure(found) == shuffled
