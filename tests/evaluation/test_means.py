"""Pseudobulks of a run's cells: of groups, of the pairs of a split, and the effects in training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from helpers.caches import SIZES, small_screen
from helpers.configs import small_config
from helpers.datasets import TWO_SCREENS, dataset_of, two_screens
from sest.cells.split_file import TEST, TRAIN, VAL
from sest.data.dataset import Dataset, read_dataset
from sest.evaluation.ceiling import FOLDS, Folds, ceiling, deal, score_halves
from sest.evaluation.means import Means, means_of, query_of, split_ceilings, split_pairs, training_effects


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset_of(tmp_path_factory.mktemp("means"), two_screens(), TWO_SCREENS)


def test_the_pairs_of_a_split_stand_beside_the_controls_of_their_context(data: Dataset) -> None:
    labels = data.labels
    pairs = split_pairs(data, TEST)
    assert [labels.contexts[c] for c in pairs.context] == [("other", "y")] * 5
    assert [labels.perturbations[p] for p in pairs.perturbation] == list(SIZES)
    assert pairs.n_cells.tolist() == list(SIZES.values())
    dense = data.targets.log1p(np.arange(len(labels))).toarray().astype(np.float64)
    for k, (c, p) in enumerate(zip(pairs.context, pairs.perturbation, strict=True)):
        mine = (labels.context == c) & (labels.perturbation == p)
        np.testing.assert_allclose(pairs.observed[k], dense[mine].mean(0), rtol=1e-7)  # rounded to float32 once
        controls = dense[(labels.context == c) & labels.is_control]
        np.testing.assert_allclose(pairs.control[k], controls.mean(0), rtol=1e-12)
        np.testing.assert_allclose(pairs.controls.variance[pairs.own[k]], controls.var(0), rtol=1e-9, atol=1e-12)
        assert pairs.controls.n_cells[pairs.own[k]] == len(controls)


def test_means_are_kept_beside_the_cache_and_read_for_any_split_until_they_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dataset_of(tmp_path, two_screens(), TWO_SCREENS)
    made = Means(**{name: values.copy() for name, values in vars(means_of(first)).items()})  # not the mapped files
    (kept,) = (tmp_path / "s.zarr" / ".derived").glob("means-*")
    with monkeypatch.context() as none:
        none.setattr("sest.evaluation.means.group_sums", None)  # nothing is computed again
        (tmp_path / "splits.toml").write_text(TWO_SCREENS.replace('"P"', '"Q"'))
        other = read_dataset(tmp_path / "s.zarr", small_config(splits=str(tmp_path / "splits.toml")))
        for name, values in vars(means_of(other)).items():
            np.testing.assert_array_equal(values, vars(made)[name], err_msg=name)
    data = bytearray((kept / "mean.bin").read_bytes())
    data[5] ^= 1
    (kept / "mean.bin").write_bytes(data)
    again = read_dataset(tmp_path / "s.zarr", small_config(splits=str(tmp_path / "splits.toml")))
    np.testing.assert_array_equal(means_of(again).mean, made.mean)
    per_thousand = read_dataset(tmp_path / "s.zarr", small_config(target_sum=1000.0))
    assert not np.array_equal(means_of(per_thousand).mean, made.mean)
    assert len(list((tmp_path / "s.zarr" / ".derived").glob("means-*"))) == 2


def test_without_the_values_of_perturbed_cells_their_means_are_read_or_computed_from_all(tmp_path: Path) -> None:
    whole = dataset_of(tmp_path, two_screens(), TWO_SCREENS)
    config = small_config(splits=str(tmp_path / "splits.toml"))
    part = read_dataset(tmp_path / "s.zarr", config, only_controls=True)
    assert whole.targets.held is None and part.targets.held is not None
    np.testing.assert_array_equal(means_of(part).mean, means_of(whole).mean)
    controls, perturbed = (np.flatnonzero(part.labels.is_control == is_control) for is_control in (True, False))
    assert (part.targets.log1p(controls) != whole.targets.log1p(controls)).nnz == 0
    np.testing.assert_array_equal(part.targets.factor, whole.targets.factor)
    with pytest.raises(AssertionError, match="values of cells that were not read"):
        part.targets.log1p(perturbed[:1])


def test_training_effects_are_against_the_context_s_own_controls(data: Dataset) -> None:
    effects, pairs = training_effects(data), split_pairs(data, TRAIN)
    assert len(effects) == 4 + 5 + 5  # P of screen/x validates, other/y is for the test
    expression, labels = data.targets.log1p(np.arange(len(data.labels))).toarray(), data.labels
    for delta, context, perturbation in zip(effects.delta, pairs.context, pairs.perturbation, strict=True):
        cells = data.in_split(TRAIN) & (labels.context == context)
        perturbed, controls = cells & (labels.perturbation == perturbation), cells & labels.is_control
        # means of at most 9 float32 values of up to 9
        np.testing.assert_allclose(delta, expression[perturbed].mean(0) - expression[controls].mean(0), atol=1e-5)
    assert effects.controls.names == ("screen/x", "screen/y", "other/x") and effects.perturbations == tuple(SIZES)
    first = effects.context.tolist().index(1)
    assert effects.perturbations[effects.perturbation[first]] == "P"
    for name, features in zip(effects.perturbations, effects.features, strict=True):
        np.testing.assert_array_equal(features, data.features.as_mapping()[name])


def test_what_is_asked_of_baselines_is_known_by_the_names_of_training(data: Dataset) -> None:
    effects, asked = training_effects(data), query_of(data, split_pairs(data, VAL))
    assert asked.perturbations == ("P",) and asked.controls.names == ("screen/x",)
    assert effects.contexts_of(asked).tolist() == [0] and effects.perturbations_of(asked).tolist() == [0]
    new = query_of(data, split_pairs(data, TEST))
    assert set(effects.contexts_of(new).tolist()) == {-1}


LARGE = dict.fromkeys(SIZES, 24)
ONE_SPLIT = """
[datasets]
screen = "screen.h5ad"
[training]
screen = "train"
[fewshot."screen.x"]
val = ["P", "Q"]
test = ["T"]
"""


def test_ceilings_of_a_split_are_those_of_its_cells_and_never_see_the_test_s(tmp_path: Path) -> None:
    data = dataset_of(tmp_path, [small_screen(sizes=LARGE, n_controls=40)], ONE_SPLIT)
    (found,) = split_ceilings(data, VAL, 3)
    assert (found.n_pairs, found.verdict) == (2, "")  # every perturbation of the simulated screen has an effect
    labels, dense = data.labels, data.targets.log1p(np.arange(len(data.labels))).toarray().astype(np.float64)
    context = labels.contexts.index(("screen", "x"))
    names = ["P", "Q", *sorted(set(LARGE) - {"P", "Q", "T"})]  # those of the split first, T never
    group = np.full(len(labels), -1)
    for i, name in enumerate(names):
        group[(labels.context == context) & (labels.perturbation == labels.perturbations.index(name))] = i + 1
    group[(labels.context == context) & labels.is_control] = 0
    fold = np.full(len(labels), -1)
    fold[group >= 0] = deal(group[group >= 0], FOLDS, 3)
    cells = [[dense[(group == g) & (fold == f)] for f in range(FOLDS)] for g in range(len(names) + 1)]
    sums, counts = (np.array([[of(part) for part in row] for row in cells]) for of in (lambda x: x.sum(0), len))
    controls, pairs = Folds(sums[:1], counts[:1], 3), Folds(sums[1:3], counts[1:3], 3)
    halves = score_halves(controls, pairs.counts, pairs.some, names[:2], data.targets.genes)
    expected = ceiling(controls, halves, "screen / x")
    assert found.of_split is not None and expected is not None
    for key, value in dataclasses.asdict(expected).items():
        assert getattr(found.of_split, key) == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_verdict_needs_no_ceiling_of_the_split(tmp_path: Path, shuffled: bool) -> None:
    screen = small_screen(sizes=LARGE, n_controls=40)
    if shuffled:
        perturbation = screen.obs["perturbation"].sample(frac=1, random_state=0).array
        screen = dataclasses.replace(screen, obs=screen.obs.assign(perturbation=perturbation))
    data = dataset_of(tmp_path, [screen], ONE_SPLIT)
    (whole,), (alone,) = split_ceilings(data, VAL, 3), split_ceilings(data, VAL, 3, of_split=False)
    assert bool(whole.verdict) == shuffled and whole.of_split is not None and alone.of_split is None
    assert (alone.verdict, alone.n_pairs, alone.context) == (whole.verdict, whole.n_pairs, whole.context)
    assert np.array_equal(alone.controls.sums, whole.controls.sums)


def test_a_split_of_few_cells_has_no_ceiling_and_no_verdict(data: Dataset) -> None:
    for found in split_ceilings(data, TEST, 0):
        assert (found.of_split, found.verdict) == (None, "")
