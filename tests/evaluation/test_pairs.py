"""Held-out pairs: their sets, what a head predicts for them, and how close that comes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.caches import SIZES, small_screen
from helpers.configs import small_config
from helpers.datasets import dataset_of
from sest.baselines.effects import BASELINES, Contexts
from sest.baselines.stack import Stack
from sest.cells.split_file import VAL
from sest.data.dataset import Dataset
from sest.data.resident import ResidentCells, resident_cells
from sest.data.sampler import SetRows
from sest.evaluation.means import Pairs, query_of, split_pairs, training_effects
from sest.evaluation.pairs import (
    head_effects,
    held_out,
    mean_scores,
    metrics_of_some,
    pair_metrics,
    predicted_means,
    some_sets,
)
from sest.head.model import HeadSizes, new_model

SPLITS = """
[datasets]
screen = "screen.h5ad"
[training]
screen = "train"
[fewshot."screen.x"]
val = ["P", "T"]
[fewshot."screen.y"]
val = ["P", "R"]
"""
PAIRS = [("x", "P"), ("x", "T"), ("y", "P"), ("y", "R")]  # 8, 9, 8 and 1 cells: 2, 3, 2 and 1 sets of 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset_of(tmp_path_factory.mktemp("pairs"), [small_screen()], SPLITS)


@pytest.fixture(scope="module")
def cells(data: Dataset) -> ResidentCells:
    return resident_cells(data.targets, data.embeddings, data.control_rows, torch.device("cpu"))


def named(data: Dataset, pairs: Pairs) -> list[tuple[str, str]]:
    labels = data.labels
    codes = zip(pairs.context, pairs.perturbation, strict=True)
    return [(labels.contexts[c][1], labels.perturbations[p]) for c, p in codes]


def test_every_set_belongs_to_the_pair_of_its_cells_and_a_limit_leaves_out_none(data: Dataset) -> None:
    for at_most, n_sets in ((0, 8), (1, 4), (6, 6), (99, 8)):
        held = held_out(data, small_config(), VAL, at_most)
        assert named(data, held.pairs) == PAIRS
        assert len(held.pair) == len(held.sets["targets"]) == n_sets and held.n_sets == 8
        assert set(held.pair.tolist()) == {0, 1, 2, 3}
        for k, rows, code in zip(held.pair, held.sets["targets"], held.sets["perturbation"], strict=True):
            assert set(data.labels.context[rows]) == {held.pairs.context[k]}
            assert set(data.labels.perturbation[rows]) == {code} == {held.pairs.perturbation[k]}


def test_baselines_stand_beside_every_pair_as_they_are_fitted_on_the_training_split(data: Dataset) -> None:
    """P is in no training context: it gets what its context's perturbations do on average; T and R their own."""
    held, train = held_out(data, small_config(), VAL, 0), training_effects(data)
    assert list(held.baselines) == list(BASELINES)
    np.testing.assert_allclose(held.baselines["controls"], held.pairs.control, rtol=1e-6)
    for k, (context, name) in enumerate(PAIRS):
        mine = [i for i, p in enumerate(train.perturbation) if train.perturbations[p] == name]
        if not mine:
            mine = np.flatnonzero(train.context == ["x", "y"].index(context)).tolist()
        weights = train.n_cells[mine] if name != "P" else np.ones(len(mine))
        own = np.average(train.delta[mine], axis=0, weights=weights)
        expected = np.maximum(held.pairs.control[k] + own, 0)
        np.testing.assert_allclose(held.baselines["perturbation_mean"][k], expected, rtol=1e-5, atol=1e-6)
    alone = Stack().fit(train).predict(query_of(data, held.pairs))
    np.testing.assert_allclose(held.baselines["stack"], np.maximum(held.pairs.control + alone, 0), rtol=1e-5, atol=1e-6)


def test_other_controls_are_drawn_with_another_seed_and_of_the_batch_where_asked(data: Dataset) -> None:
    first, again, other = (held_out(data, small_config(seed=seed), VAL, 0).sets for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["controls"], again["controls"])
    assert not np.array_equal(np.sort(first["controls"]), np.sort(other["controls"]))
    same_batch = held_out(data, small_config(match_controls="batch"), VAL, 0).sets
    batches = data.labels.batch[same_batch["targets"]]
    assert (data.labels.batch[same_batch["controls"]] == batches).all()
    assert (data.labels.batch[first["controls"]] != data.labels.batch[first["targets"]]).any()


class Counting(nn.Module):
    """Predicts, for every set in the order they come, cells with the values 1, 2, .. S times the number of the set."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.n_genes, self.seen = n_genes, 0

    def forward(self, basal: Tensor, perturbation: Tensor) -> Tensor:
        assert not self.training
        numbers = torch.arange(self.seen, self.seen + len(basal)) + 1.0  # (B,)
        self.seen += len(basal)
        cells = torch.arange(basal.shape[1]) + 1.0  # (S,)
        return (numbers[:, None] * cells)[:, :, None].expand(-1, -1, self.n_genes)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_predicted_mean_of_a_pair_is_over_the_cells_of_all_its_sets(
    data: Dataset, cells: ResidentCells, size: int
) -> None:
    held, model = held_out(data, small_config(), VAL, 0), Counting(cells.n_genes).train()
    features, seen = torch.from_numpy(data.features.matrix), []

    def each(sets: SetRows, predicted: Tensor) -> None:
        assert predicted.shape == (len(sets["targets"]), 4, 20)
        seen.append(sets["targets"])

    means = predicted_means(model, cells, held, features, size, nullcontext, each=each)
    assert means.dtype == np.float64
    # 2.5 is the mean of 1 .. 4; sets come as the first of every pair, then the second, then the third
    assert held.pair.tolist() == [0, 1, 2, 3, 0, 1, 2, 1]
    expected = [2.5 * np.mean(numbers) for numbers in ([1, 5], [2, 6, 8], [3, 7], [4])]
    np.testing.assert_allclose(means, np.tile(np.array(expected)[:, None], 20))
    np.testing.assert_array_equal(np.concatenate(seen), held.sets["targets"])
    assert model.training  # as it was


def test_a_head_sees_the_controls_and_the_features_of_each_set(data: Dataset, cells: ResidentCells) -> None:
    held, features = held_out(data, small_config(), VAL, 0), torch.from_numpy(data.features.matrix)

    class Sums(nn.Module):
        def forward(self, basal: Tensor, perturbation: Tensor) -> Tensor:
            code = perturbation.argmax(-1) + 1.0  # one-hot
            return (basal.sum(-1) + 1000 * code[:, None])[:, :, None].expand(-1, -1, cells.n_genes)

    means = predicted_means(Sums(), cells, held, features, 3, nullcontext)
    of_sets = np.searchsorted(data.control_rows, held.sets["controls"])
    embeddings = data.embeddings.astype(np.float64)[of_sets].sum(-1).mean(-1)
    for k, (code, mean) in enumerate(zip(held.pairs.perturbation, means[:, 0], strict=True)):
        expected = embeddings[held.pair == k].mean() + 1000 * code
        assert mean == pytest.approx(expected, abs=1e-3)  # float32 of values up to 5,000


def test_sets_that_are_alike_are_predicted_once(data: Dataset, cells: ResidentCells) -> None:
    held, features = held_out(data, small_config(), VAL, 0), torch.from_numpy(data.features.matrix)
    alike, counted = np.array([0, 1, 0, 1, 0, 1, 0, 1]), list[int]()
    controls = held.sets["controls"][alike]
    sets = SetRows(**{**held.sets, "controls": controls, "perturbation": np.ones_like(held.sets["perturbation"])})
    head = new_model(
        HeadSizes(cells.embeddings.shape[1], features.shape[1], cells.n_genes, hidden=8, n_layers=1, n_heads=2, ffn=8),
        seed=0,
    )
    same = replace(held, sets=sets)
    every = predicted_means(head, cells, same, features, 3, nullcontext, each=lambda *_: None)
    for size in (1, 3):
        counted.clear()
        found = predicted_means(head, cells, same, features, size, nullcontext, advance=counted.append, alike=alike)
        assert sum(counted) == 2
        np.testing.assert_allclose(found, every, atol=1e-6)


def test_some_sets_are_the_same_rows_of_every_part(data: Dataset) -> None:
    sets = held_out(data, small_config(), VAL, 0).sets
    part = some_sets(sets, slice(2, 5))
    assert part["number"].tolist() == [2, 3, 4]
    for key, values in part.items():
        np.testing.assert_array_equal(values, sets[key][2:5])  # type: ignore[literal-required]


def test_metrics_of_pairs_by_hand(data: Dataset) -> None:
    """Three genes are enough: the others are zero on both sides."""
    pairs = split_pairs(data, VAL)
    assert pairs.n_cells.tolist() == [SIZES[name] for _, name in PAIRS]
    observed, predicted = np.zeros((4, 20)), np.zeros((4, 20))
    observed[:, :3] = [[1, 0, 0], [0, 1, 0], [3, 0, 0], [0, 0, 2]]
    predicted[:, :3] = [[2, 0, 0], [1, 0, 0], [3, 0, 0], [0, 0, 2]]
    controls = Contexts(("screen/x", "screen/y"), np.zeros((2, 20)), np.ones((2, 20)), np.array([9, 9]))
    made = Pairs(pairs.context, pairs.perturbation, pairs.n_cells, observed, controls, pairs.own)
    scores = pair_metrics(data, made, predicted)
    assert scores["mae"].tolist() == [1 / 20, 2 / 20, 0, 0]
    np.testing.assert_allclose(scores["pearson_delta"], [1, -1 / 19, 1, 1])  # unit vectors of 20 genes: r = -1/19
    # x/P: nearest to its own. x/T: predicted like x/P, whose observed effect is nearer: rank 1 of 2.
    # A pair of another cell type never counts: x/P's prediction lies as near to y/P's effect as to its own.
    assert scores["pds"].tolist() == [1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("most_ranked", [None, 1, 2])
def test_pairs_are_scored_the_same_some_at_a_time(data: Dataset, most_ranked: int | None) -> None:
    """x/P and x/T are ranked beside each other though they come in different parts, or of each context one is drawn."""
    held = held_out(data, small_config(), VAL, 0)
    whole = {n: pair_metrics(data, held.pairs, m, most_ranked=most_ranked) for n, m in held.baselines.items()}
    assert int(np.isnan(whole["ridge"]["pds"]).sum()) == (4 if most_ranked == 1 else 0)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        some = {name: means[rows] for name, means in held.baselines.items()}
        found = metrics_of_some(data, held.pairs, rows, some, most_ranked=most_ranked)
        for name, scores in found.items():
            for metric, values in scores.items():
                np.testing.assert_array_equal(values, whole[name][metric][rows])


def test_the_mean_pds_is_that_of_pairs_that_have_one() -> None:
    scores = {"mae": np.array([1.0, 3.0]), "pds": np.array([np.nan, 0.5])}
    assert mean_scores(scores) == {"mae": 2.0, "pds": 0.5}


def test_effects_of_a_head_are_against_the_controls_or_against_what_it_predicts_for_them(
    data: Dataset, cells: ResidentCells
) -> None:
    """A head that adds 1 to a gene for every perturbation, and 5 to all genes for whatever it is given."""
    held = held_out(data, small_config(), VAL, 0)
    n_genes = len(data.targets.genes)

    class Biased(nn.Module):
        def forward(self, basal: Tensor, perturbation: Tensor) -> Tensor:
            effect = 5.0 + (perturbation.abs().sum(1) > 0).float()[:, None, None] * torch.eye(n_genes)[3]
            return effect.expand(len(basal), basal.shape[1], n_genes)

    found = head_effects(Biased(), data, cells, held, 3, nullcontext)
    np.testing.assert_allclose(found["anchored"], np.eye(n_genes)[[3] * len(PAIRS)], atol=1e-6)
    expected = 5.0 + np.eye(n_genes)[[3] * len(PAIRS)] - held.pairs.control
    np.testing.assert_allclose(found["head"], expected, atol=1e-6)
