"""evaluation/ceiling.py: halves of the real cells, against plain means; nothing is called measurable that is noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from sest.evaluation.ceiling import (
    FOLDS,
    LEAST_CELLS,
    Ceiling,
    Folds,
    ceiling,
    deal,
    independent_pearson_delta,
    n_folds,
    score_halves,
    splits,
)
from sest.evaluation.metrics import discrimination_score, mean_absolute_error, pearson_delta


def folded(values: np.ndarray, group: np.ndarray, n_groups: int, folds: int = FOLDS, seed: int = 0) -> Folds:
    """Sums by a loop over groups and folds: nothing shared with `Side.pseudobulks`."""
    fold = deal(group, folds, seed)
    parts = [[values[(group == g) & (fold == f)] for f in range(folds)] for g in range(n_groups)]
    sums = np.array([[part.sum(0) for part in row] for row in parts], dtype=np.float64)
    return Folds(sums, np.array([[len(part) for part in row] for row in parts]), seed)


def screen(effect: float, n_cells: int = 40, n_perturbations: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Normal values (cells, 60 genes) and groups: 0 is the controls, each perturbation moves five genes."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_perturbations + 1), n_cells)
    values = rng.normal(1, 0.5, (len(group), 60))
    for p in range(1, n_perturbations + 1):
        values[np.ix_(group == p, rng.choice(60, 5, replace=False))] += effect
    return values, group


def ceiling_of(folds: Folds, names: list[str], genes: list[str]) -> Ceiling | None:
    """Of the groups after the first, which are the controls."""
    controls, pairs = folds.some(np.array([0])), folds.some(np.arange(1, len(folds.sums)))
    return ceiling(controls, score_halves(controls, pairs.counts, pairs.some, names, genes), "type")


def of(values: np.ndarray, group: np.ndarray, seed: int = 0) -> Ceiling:
    n = int(group.max()) + 1
    names = [f"p{i}" for i in range(1, n)]
    found = ceiling_of(folded(values, group, n, seed=seed), names, [f"g{i}" for i in range(60)])
    assert found is not None
    return found


def test_cells_are_dealt_in_equal_parts_whatever_other_groups_there_are() -> None:
    group = np.repeat([0, 1, 2], [40, 23, 8])
    fold = deal(group, 8, 3)
    for g in range(3):
        counts = np.bincount(fold[group == g], minlength=8)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(deal(group[group == 1], 8, 3), fold[group == 1])
    shuffled = np.random.default_rng(0).permutation(len(group))
    assert not np.array_equal(deal(group, 8, 4), fold)
    assert np.bincount(deal(group[shuffled], 8, 3), minlength=8).tolist() == np.bincount(fold, minlength=8).tolist()


def test_splits_are_halves_and_each_is_there_once() -> None:
    for folds, n in ((8, 10), (4, 3)):
        found = splits(folds, 0)
        assert len(found) == n
        assert all(half.sum() == folds // 2 for half in found)
        assert len({tuple(half) for half in found} | {tuple(~half) for half in found}) == 2 * n
    assert [n_folds(100, genes) for genes in (500, 200_000)] == [8, 4]


def test_scores_are_those_of_plain_means_of_the_two_halves() -> None:
    values, group = screen(0.5)
    found = of(values, group)
    fold, names, genes = deal(group, FOLDS, 0), [f"p{i}" for i in range(1, 13)], [f"g{i}" for i in range(60)]
    r, mae, controls, pds = [], [], [], []
    for half in splits(FOLDS, 0):
        one, other = (
            np.stack([values[(group == g) & np.isin(fold, np.flatnonzero(side))].mean(0) for g in range(13)])
            for side in (half, ~half)
        )
        r.append(pearson_delta(one[1:], other[1:], other[0], one[0]))
        mae.append(mean_absolute_error(one[1:], other[1:]).mean())
        controls.append(mean_absolute_error(np.tile(one[0], (12, 1)), other[1:]).mean())
        pds.append(discrimination_score(one[1:], other[1:], other[0], names, genes, one[0]).mean())
    assert found.pearson_delta == pytest.approx(np.mean(r))
    assert (found.mae, found.mae_controls, found.pds) == pytest.approx((np.mean(mae), np.mean(controls), np.mean(pds)))
    assert (found.n_perturbations, found.n_cells, found.n_controls) == (12, 40, 40)


@pytest.mark.parametrize("seed", range(5))
def test_an_effect_is_measurable_and_noise_is_not(seed: int) -> None:
    strong, nothing = of(*screen(1.0, seed=seed), seed=seed), of(*screen(0.0, seed=seed), seed=seed)
    assert strong.is_measurable and strong.verdict() == ""
    assert not nothing.is_measurable
    assert "no measurable effect here with 40 cells a perturbation and 40 controls" in nothing.verdict()


def test_the_error_is_that_of_screens_without_an_effect() -> None:
    """Correlations of 60 screens without an effect spread no more than the error of each says, and not far less.

    Genes are independent and controls as many as cells: 1 / sqrt(G) times sqrt(1 / 12 + 1 / 4).
    """
    found = [of(*screen(0.0, seed=seed), seed=seed) for seed in range(60)]
    said = np.mean([c.pearson_delta_se for c in found])
    assert said == pytest.approx(np.sqrt((1 / 12 + 1 / 4) / 60), rel=0.1)
    assert 0.5 * said < np.std([c.pearson_delta for c in found]) < said


def test_a_shared_control_mean_looks_like_agreement_and_independent_halves_do_not() -> None:
    """Twenty screens without any effect: the shared mean alone gives a correlation near one half."""
    shared, independent = [], []
    for seed in range(20):
        values, group = screen(0.0, seed=seed)
        found = folded(values, group, 13, seed=seed)
        means = found.means
        again, _ = screen(0.0, seed=seed + 1000)
        predicted = np.stack([again[group == g].mean(0) for g in range(1, 13)])  # cells that saw no control of these
        shared.append(pearson_delta(predicted, means[1:], means[0]).mean())
        independent.append(independent_pearson_delta(found, 0, predicted, means[1:], means[0], 0.0).mean())
    assert np.mean(shared) > 0.4
    assert abs(np.mean(independent)) < 0.05


def test_controls_predict_no_effect_and_too_few_cells_say_nothing() -> None:
    values, group = screen(0.5)
    found = folded(values, group, 13)
    control = found.means[0]
    scores = independent_pearson_delta(found, 0, np.tile(control, (12, 1)), found.means[1:], control, 1.0)
    np.testing.assert_array_equal(scores, 0.0)
    few = (group > 0) | (np.arange(len(group)) < 7)
    found = folded(values[few], group[few], 13)
    assert np.isnan(independent_pearson_delta(found, 0, found.means[1:], found.means[1:], found.means[0], 0.0)).all()
    assert ceiling_of(found, [f"p{i}" for i in range(12)], []) is None


@pytest.mark.parametrize("follows", [0.0, 0.4, 1.0])
def test_a_prediction_that_follows_its_controls_has_no_agreement_by_their_noise(follows: float) -> None:
    """A hundred screens without any effect, predicted from all their controls: only the right share gives 0."""
    found: dict[float, list[float]] = {0.0: [], 0.4: [], 1.0: []}
    for seed in range(100):
        values, group = screen(0.0, seed=seed)
        folds = folded(values, group, 13, seed=seed)
        again, _ = screen(0.0, seed=seed + 1000)
        learned = np.stack([again[group == g].mean(0) for g in range(1, 13)])  # from other cells
        control = folds.means[0]
        predicted = follows * control + (1 - follows) * learned + follows * (learned - 1)
        for share, scores in found.items():
            scores.append(float(independent_pearson_delta(folds, 0, predicted, folds.means[1:], control, share).mean()))
    for share, scores in found.items():
        error = np.std(scores) / 10
        assert (abs(np.mean(scores)) < 3 * error) == (share == follows), (share, np.mean(scores), error)


@pytest.mark.parametrize("follows", [0.0, 0.3, 1.0])
def test_all_splits_at_once_are_the_mean_over_the_splits(follows: float) -> None:
    rng = np.random.default_rng(0)
    found = Folds(rng.gamma(1.0, 20.0, (1, 8, 60)), rng.integers(10, 20, (1, 8)))
    predicted, observed = rng.gamma(1.0, 1.5, (2, 5, 60))
    own = rng.gamma(1.0, 1.5, 60)
    predicted[0] = own  # no effect
    one_by_one = [
        pearson_delta(predicted, observed, other, follows * own + (1 - follows) * one)
        for one, other in zip(*found.halves()[:, 0], strict=True)
    ]
    scores = independent_pearson_delta(found, 0, predicted, observed, own, follows)
    np.testing.assert_allclose(scores, np.mean(one_by_one, axis=0), rtol=1e-9, atol=1e-12)
    assert (scores[0] == 0.0) == (follows == 1)


def test_pds_of_many_perturbations_is_that_of_the_first_split_and_of_more_none(monkeypatch: pytest.MonkeyPatch) -> None:
    values, group = screen(0.5)
    whole = of(values, group)
    monkeypatch.setattr("sest.evaluation.ceiling.PDS_ROWS", 0)
    first = of(values, group)
    names, genes = [f"p{i}" for i in range(1, 13)], [f"g{i}" for i in range(60)]
    found = folded(values, group, 13)
    one, other = found.halves()[:, :, 0]
    expected = discrimination_score(one[1:], other[1:], other[0], names, genes, one[0]).mean()
    assert first.pds == pytest.approx(expected)
    monkeypatch.setattr("sest.evaluation.ceiling.PDS_PAIRS", 11)
    none = of(values, group)
    assert np.isnan(none.pds)
    for fewer in (first, none):
        assert (fewer.pearson_delta, fewer.mae) == (whole.pearson_delta, whole.mae)


def test_pairs_in_blocks_and_beside_others_are_those_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 pairs the 4th has too few cells; a block of sums holds one, and pds ranks the first 8."""
    values, group = screen(0.5)
    kept = (group != 4) | (np.arange(len(group)) % 40 < LEAST_CELLS - 1)
    folds, names, genes = folded(values[kept], group[kept], 13), [f"p{i}" for i in range(12)], ["g"] * 60
    some = folds.some(np.arange(9))
    alone, whole = ceiling_of(some, names[:8], genes), ceiling_of(folds, names, genes)
    monkeypatch.setattr("sest.evaluation.ceiling.BLOCK_BYTES", 1)
    controls, pairs = folds.some(np.array([0])), folds.some(np.arange(1, 13))
    halves = score_halves(controls, pairs.counts, pairs.some, names[:8], genes)
    assert np.flatnonzero(np.isnan(halves.pearson_delta)).tolist() == [3]
    assert ceiling(controls, halves.first(8), "type") == alone
    of_all = ceiling(controls, halves, "type")
    assert whole is not None and of_all == dataclasses.replace(whole, pds=halves.pds)


def test_one_perturbation_has_a_spread_over_splits_and_no_pds() -> None:
    values, group = screen(1.0, n_perturbations=1)
    found = of(values, group)
    assert found.is_measurable and found.pearson_delta_se > 0
    assert np.isnan(found.pds)


@pytest.mark.parametrize(
    ("file", "context", "control", "measurable"),
    [
        ("perturbench_devel", "cell_type", "control", {"A172": False, "T98G": False, "U87MG": False, "k562": True}),
        ("papalexi_eccite", "batch", "non-targeting", {"rep_1": True, "rep_2": True, "rep_3": True}),
    ],
)
def test_real_screens(shared_data: Path, file: str, context: str, control: str, measurable: dict[str, bool]) -> None:
    """Three cell types of perturbench show nothing that replicates; k562 and the replicates of papalexi do."""
    adata = ad.read_h5ad(shared_data / f"{file}.h5ad")
    values = adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)
    if file == "papalexi_eccite":
        values = np.log1p(values / values.sum(1, keepdims=True) * 1e4)
    for name, expected in measurable.items():
        mine = (adata.obs[context] == name).to_numpy()
        labels = adata.obs["target_gene"].astype(str).to_numpy()[mine]
        names = sorted(set(labels) - {control})
        group = np.array([0 if label == control else 1 + names.index(label) for label in labels])
        found = ceiling_of(folded(values[mine], group, len(names) + 1), names, list(adata.var_names))
        assert found is not None
        assert found.is_measurable == expected, found
