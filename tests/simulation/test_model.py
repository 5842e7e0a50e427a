"""The model of a simulated screen: counts, labels and features, held against what its options say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.screens import TINY
from sest.errors import InputError
from sest.simulation import model
from sest.simulation.model import (
    CONTROL,
    names_of_genes,
    perturbation_features,
    simulate_counts,
    simulate_labels,
)
from sest.simulation.simulation import Simulation

# Small enough for a second, large enough that a pseudobulk of 50 cells shows more signal than sampling noise.
SCREEN = Simulation(
    n_cells_per_perturbation=50, n_controls=250, n_perturbations=32, n_genes=800, expressed_genes=350, umi_per_cell=4000
)


class Screen:
    """Pseudobulk deltas of SCREEN: mean log1p of counts per 10,000 minus that of the type's controls."""

    def __init__(self) -> None:
        self.obs = simulate_labels(SCREEN)
        self.features = perturbation_features(SCREEN)
        self.names = list(self.features)
        genes = names_of_genes(SCREEN, None)
        self.targets = np.array([genes.index(name) for name in self.names])
        counts = simulate_counts(SCREEN, 0, SCREEN.n_cells).toarray()
        self.fraction = counts / counts.sum(axis=1, keepdims=True)
        self.logs = np.log1p(1e4 * self.fraction)
        self.controls = {c: self.rows(self.logs, c, CONTROL).mean(0) for c in SCREEN.cell_types}
        self.deltas = {c: np.array([self.delta(c, name) for name in self.names]) for c in SCREEN.cell_types}

    def rows(self, values: np.ndarray, cell_type: str, perturbation: str) -> np.ndarray:
        of = (self.obs["cell_type"] == cell_type) & (self.obs["target_gene"] == perturbation)
        return values[of.to_numpy()]

    def delta(self, cell_type: str, perturbation: str) -> np.ndarray:
        return self.rows(self.logs, cell_type, perturbation).mean(0) - self.controls[cell_type]


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen()


def pearson(predicted: np.ndarray, real: np.ndarray) -> float:
    """Mean over rows of Pearson's r."""
    return float(np.mean([np.corrcoef(p, r)[0, 1] for p, r in zip(predicted, real, strict=True)]))


def test_same_seed_gives_the_same_cells_and_another_seed_others() -> None:
    made = []
    for sim in (TINY, TINY, replace(TINY, seed=1)):
        model._biology.cache_clear()
        model._obs.cache_clear()
        made.append((simulate_counts(sim, 0, sim.n_cells), simulate_labels(sim)))
    (a, labels), (again, same), (c, others) = made
    assert (a != again).nnz == 0 and labels.equals(same)
    assert (a != c).nnz > 0.2 * a.nnz
    assert list(labels["target_gene"]) != list(others["target_gene"])


def test_a_cell_depends_on_no_other() -> None:
    whole = simulate_counts(TINY, 0, TINY.n_cells)
    assert (simulate_counts(TINY, 31, 44) != whole[31:44]).nnz == 0
    assert simulate_counts(TINY, 5, 5).shape == (0, TINY.n_genes)
    with pytest.raises(InputError, match="not in a file of 100 cells"):
        simulate_counts(TINY, 90, 101)


def test_labels_are_those_of_the_options_in_shuffled_order() -> None:
    labels = simulate_labels(TINY)
    assert set(perturbation_features(TINY)) | {CONTROL} == set(labels["target_gene"].cat.categories)
    sizes = labels.groupby(["cell_type", "target_gene"], observed=True).size()
    assert set(sizes.xs(CONTROL, level=1)) == {TINY.n_controls}
    assert set(sizes.drop(CONTROL, level=1)) == {TINY.n_cells_per_perturbation}
    assert len(sizes) == len(TINY.cell_types) * (TINY.n_perturbations + 1)
    assert set(labels["batch"]) == {"batch_1", "batch_2"} and labels.index.is_unique
    changes = (labels["target_gene"].to_numpy()[1:] != labels["target_gene"].to_numpy()[:-1]).mean()
    assert changes > 0.5  # shuffled; grouped cells would change at 14 of 99 places


def test_genes_that_are_named_name_the_perturbations() -> None:
    genes = [f"symbol-{g}" for g in range(TINY.n_genes)]
    made_up = names_of_genes(TINY, None)
    assert made_up[0] == "GENE0001" and len(set(made_up)) == TINY.n_genes
    assert [genes[made_up.index(name)] for name in perturbation_features(TINY)] == list(
        perturbation_features(TINY, gene_names=genes)
    )
    with pytest.raises(InputError, match="3 gene names for 120 genes"):
        names_of_genes(TINY, ["a", "b", "c"])
    with pytest.raises(InputError, match="must be distinct"):
        perturbation_features(TINY, gene_names=["a"] * TINY.n_genes)


def test_full_panel_has_the_stated_sparsity_and_library_size() -> None:
    sim = Simulation(n_genes=18_080)
    counts = simulate_counts(sim, 0, 400)
    per_cell, library = np.diff(counts.indptr), np.asarray(counts.sum(axis=1)).ravel()
    # standard errors over 400 cells: 1% of the mean number of genes, 2% of the median library
    assert per_cell.mean() == pytest.approx(3_700, rel=0.04)
    assert np.median(library) == pytest.approx(15_000, rel=0.07)
    assert np.log(library).std() == pytest.approx(sim.library_spread, rel=0.1)
    by_gene = np.sort(np.asarray(counts.mean(axis=0)).ravel())[::-1]
    assert 0.2 < by_gene[:100].sum() / by_gene.sum() < 0.5  # long tail
    assert np.median(by_gene) < 0.2 < 15_000 / 18_080 < by_gene[1000]


@pytest.mark.parametrize("n_genes", [50, 300, 2000, 9000])
def test_counts_and_expressed_genes_follow_the_panel_where_nobody_says(n_genes: int) -> None:
    sim = Simulation(n_genes=n_genes, n_perturbations=2)
    counts = simulate_counts(sim, 0, 300)
    assert np.diff(counts.indptr).mean() == pytest.approx(min(0.35 * n_genes, 3_700), rel=0.06)
    assert np.median(np.asarray(counts.sum(axis=1))) == pytest.approx(min(2.5 * n_genes, 15_000), rel=0.08)


def test_counts_are_poisson_without_dispersion_and_lognormal_poisson_with_it() -> None:
    still = Simulation(
        n_controls=2000, n_perturbations=1, n_cells_per_perturbation=1, cell_types=("one",), n_batches=1, n_genes=200,
        expressed_genes=120, umi_per_cell=1000, library_spread=0.0, dispersion=0.0,
    )  # fmt: skip
    for dispersion in (0.0, 0.5):
        sim = replace(still, dispersion=dispersion)
        biology = model._biology(sim)
        moved = np.concatenate([genes for genes, _ in biology.states])
        steady = np.setdiff1d(np.arange(sim.n_genes), [*moved, *biology.targets])
        counts = simulate_counts(sim, 0, sim.n_cells).toarray()[:, steady].astype(float)
        mean, variance = counts.mean(axis=0), counts.var(axis=0)
        expected = biology.rate[0, 0, steady] / biology.rate[0, 0].sum() * sim.umi_per_cell
        # a share of the total moves a little with the cell state and with the noise of the largest genes
        assert np.median(mean[expected > 1] / expected[expected > 1]) == pytest.approx(1, rel=0.05)
        # Poisson-lognormal: variance = mean + mean^2 (exp(dispersion^2) - 1). 2,000 cells: 3% a gene, less over genes
        fano = variance / (mean + mean**2 * np.expm1(dispersion**2))
        assert np.median(fano[(mean > 0.1) & (mean < 5)]) == pytest.approx(1, abs=0.03)


def test_target_gene_is_knocked_down_in_its_own_cells_and_only_there(screen: Screen) -> None:
    for cell_type in SCREEN.cell_types:
        control = screen.rows(screen.fraction, cell_type, CONTROL).mean(0)[screen.targets]
        perturbed = np.array([screen.rows(screen.fraction, cell_type, name).mean(0) for name in screen.names])
        left = perturbed[:, screen.targets] / control  # (N, N), share of the control's expression
        own = np.diag(left)
        assert np.median(own) == pytest.approx(1 - SCREEN.knockdown, abs=0.03)
        assert own.max() < 0.4
        # the programs of a small panel move its total, so the share of an unmoved gene by some percent
        assert np.median(left[~np.eye(len(own), dtype=bool)]) == pytest.approx(1, abs=0.12)


def test_cell_types_differ_in_many_genes_but_not_in_most(screen: Screen) -> None:
    alpha, beta = (screen.controls[c] for c in SCREEN.cell_types)
    differ = (np.abs(alpha - beta) > 0.25).mean()  # sampling noise of 250 cells is below 0.08
    assert 0.08 < differ < 0.4


def test_batches_differ_mildly(screen: Screen) -> None:
    well = screen.fraction.mean(0) > 1e-3  # four counts a cell: sampling noise of 1,850 cells is 0.02 log units
    one, two = (screen.fraction[(screen.obs["batch"] == b).to_numpy()].mean(0)[well] for b in ("batch_1", "batch_2"))
    assert np.log(one / two).std() == pytest.approx(np.sqrt(2) * SCREEN.batch_effect, rel=0.25)


def test_some_perturbations_move_nothing_but_their_target(screen: Screen) -> None:
    moved = np.linalg.norm(np.delete(screen.deltas["alpha"], screen.targets, axis=1), axis=1)
    null = np.linalg.norm(np.array(list(screen.features.values())), axis=1) < 0.3 * np.sqrt(SCREEN.n_features)
    assert null.sum() == round(SCREEN.null_fraction * SCREEN.n_perturbations)
    assert moved[null].max() < np.median(moved[~null])


def test_effects_correlate_as_features_do(screen: Screen) -> None:
    features = np.array(list(screen.features.values()))
    active = np.linalg.norm(features, axis=1) > 0.3 * np.sqrt(SCREEN.n_features)
    pairs = np.triu_indices(active.sum(), k=1)
    alike = np.corrcoef(features[active])[pairs]
    effects = np.corrcoef(np.delete(screen.deltas["alpha"], screen.targets, axis=1)[active])[pairs]
    assert np.corrcoef(alike, effects)[0, 1] > 0.7
    assert effects[alike > 0.7].mean() > 0.3 and effects[alike < -0.7].mean() < -0.3


def ridge(features: np.ndarray, deltas: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    centre, middle = features[train].mean(0), deltas[train].mean(0)
    x = features[train] - centre
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ (deltas[train] - middle))
    return (features[test] - centre) @ weights + middle


def test_features_predict_held_out_effects_better_than_the_baselines(screen: Screen) -> None:
    """What makes the demo mean something; features and the other cell type together beat the other type alone."""
    features = np.array(list(screen.features.values()))
    deltas = screen.deltas["beta"]
    folds = np.random.default_rng(0).permutation(len(deltas)).reshape(4, -1)
    predicted, average = np.empty_like(deltas), np.empty_like(deltas)
    for test in folds:
        train = np.setdiff1d(np.arange(len(deltas)), test)
        predicted[test] = ridge(features, deltas, train, test)
        average[test] = deltas[train].mean(0)
    active = np.linalg.norm(features, axis=1) > 0.3 * np.sqrt(SCREEN.n_features)
    ours, base, other = (pearson(x[active], deltas[active]) for x in (predicted, average, screen.deltas["alpha"]))
    assert ours > base + 0.3
    assert np.abs(predicted - deltas).mean() < 0.95 * np.abs(deltas).mean()  # the control mean predicts a delta of 0
    assert 0.3 < other < 0.9  # cell types share directions and differ in sensitivity: related, not equal
    assert pearson((predicted + screen.deltas["alpha"])[active], deltas[active]) > other + 0.03


def test_features_have_the_width_that_is_asked_for_and_leave_the_control_out() -> None:
    features = perturbation_features(replace(TINY, n_features=9))
    assert len(features) == TINY.n_perturbations and CONTROL not in features
    assert all(row.shape == (9,) and row.dtype == np.float32 for row in features.values())


def test_a_library_too_small_for_its_genes_is_refused_with_what_is_possible() -> None:
    with pytest.raises(InputError, match="61 UMIs over 120 genes cannot express 60 genes; choose between"):
        simulate_counts(replace(TINY, umi_per_cell=61, expressed_genes=60), 0, 1)
