"""Pseudobulks of a run's cells: of groups, of the pairs of a split, and the effects in training."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.caches import SIZES
from helpers.datasets import TWO_SCREENS, dataset_of, two_screens
from sest.cells.split_file import TEST, TRAIN
from sest.data.dataset import Dataset
from sest.evaluation.means import pseudobulks, split_pairs, training_means


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset_of(tmp_path_factory.mktemp("means"), two_screens(), TWO_SCREENS)


def test_pseudobulks_are_means_of_log1p_cells(data: Dataset) -> None:
    code = np.where(data.labels.perturbation == 2, -1, data.labels.perturbation % 2)
    got = pseudobulks(data.targets, code, 2)
    dense = data.targets.log1p(np.arange(len(code))).toarray().astype(np.float64)
    np.testing.assert_allclose(got, [dense[code == 0].mean(0), dense[code == 1].mean(0)], rtol=1e-12)


def test_pseudobulks_in_blocks_are_the_same(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pseudobulks(data.targets, data.labels.context, 4)
    monkeypatch.setattr("sest.evaluation.means.ROWS_PER_BLOCK", 9)
    np.testing.assert_allclose(pseudobulks(data.targets, data.labels.context, 4), whole, rtol=1e-12)


def test_the_pairs_of_a_split_stand_beside_the_controls_of_their_context(data: Dataset) -> None:
    labels = data.labels
    pairs = split_pairs(data, TEST)
    assert [labels.contexts[c] for c in pairs.context] == [("other", "y")] * 5
    assert [labels.perturbations[p] for p in pairs.perturbation] == list(SIZES)
    assert pairs.n_cells.tolist() == list(SIZES.values())
    dense = data.targets.log1p(np.arange(len(labels))).toarray().astype(np.float64)
    for k, (c, p) in enumerate(zip(pairs.context, pairs.perturbation, strict=True)):
        mine = (labels.context == c) & (labels.perturbation == p)
        np.testing.assert_allclose(pairs.observed[k], dense[mine].mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            pairs.control[k], dense[(labels.context == c) & labels.is_control].mean(0), rtol=1e-12
        )


def test_training_means_are_effects_against_the_context_s_own_controls(data: Dataset) -> None:
    means, pairs = training_means(data), split_pairs(data, TRAIN)
    assert len(means.delta) == 4 + 5 + 5  # P of screen/x validates, other/y is for the test
    expression, labels = data.targets.log1p(np.arange(len(data.labels))).toarray(), data.labels
    for delta, context, perturbation in zip(means.delta, pairs.context, pairs.perturbation, strict=True):
        cells = data.in_split(TRAIN) & (labels.context == context)
        perturbed, controls = cells & (labels.perturbation == perturbation), cells & labels.is_control
        # means of at most 9 float32 values of up to 9
        np.testing.assert_allclose(delta, expression[perturbed].mean(0) - expression[controls].mean(0), atol=1e-5)
    assert means.contexts == ("screen/x", "screen/y", "other/x") and means.perturbations == tuple(SIZES)
    first = means.pair_context.tolist().index(1)
    assert means.perturbations[means.pair_perturbation[first]] == "P"
