from __future__ import annotations

import tomllib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sest import simulate
from sest.errors import InputError
from sest.simulate import (
    CONTROL,
    Simulation,
    perturbation_features,
    simulate_counts,
    write_features,
    write_h5ad,
    write_splits,
)

TINY = Simulation(
    n_cells_per_perturbation=5, n_controls=20, n_perturbations=6, n_genes=120, expressed_genes=60, umi_per_cell=400
)
# Small enough for a second, large enough that a pseudobulk of 50 cells shows more signal than sampling noise.
SCREEN = Simulation(
    n_cells_per_perturbation=50, n_controls=250, n_perturbations=32, n_genes=800, expressed_genes=350, umi_per_cell=4000
)


class Screen:
    """Pseudobulk deltas of SCREEN: mean log1p of counts per 10,000 minus that of the type's controls."""

    def __init__(self, path: Path) -> None:
        self.cells = anndata.read_h5ad(path)
        self.features = perturbation_features(SCREEN)
        self.names = list(self.features)
        self.targets = self.cells.var_names.get_indexer(self.names)
        counts = self.cells.X.toarray()
        self.fraction = counts / counts.sum(axis=1, keepdims=True)
        self.logs = np.log1p(1e4 * self.fraction)
        self.controls = {c: self.rows(self.logs, c, CONTROL).mean(0) for c in SCREEN.cell_types}
        self.deltas = {c: np.array([self.delta(c, name) for name in self.names]) for c in SCREEN.cell_types}

    def rows(self, values: np.ndarray, cell_type: str, perturbation: str) -> np.ndarray:
        obs = self.cells.obs
        return values[((obs["cell_type"] == cell_type) & (obs["target_gene"] == perturbation)).to_numpy()]

    def delta(self, cell_type: str, perturbation: str) -> np.ndarray:
        return self.rows(self.logs, cell_type, perturbation).mean(0) - self.controls[cell_type]


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    write_h5ad(SCREEN, path)
    return Screen(path)


def pearson(predicted: np.ndarray, real: np.ndarray) -> float:
    """Mean over rows of Pearson's r."""
    return float(np.mean([np.corrcoef(p, r)[0, 1] for p, r in zip(predicted, real, strict=True)]))


def test_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    for name, sim in {"a": TINY, "b": TINY, "c": replace(TINY, seed=1)}.items():
        simulate._biology.cache_clear()
        simulate._obs.cache_clear()
        write_h5ad(sim, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    a, c = (anndata.read_h5ad(tmp_path / name) for name in "ac")
    assert (a.X != c.X).nnz > 0.2 * a.X.nnz
    assert list(a.obs["target_gene"]) != list(c.obs["target_gene"])


def test_block_size_does_not_change_a_value(tmp_path: Path) -> None:
    whole = simulate_counts(TINY, 0, TINY.n_cells)
    for block in (1, 7, 64):
        rows: list[int] = []
        write_h5ad(TINY, tmp_path / "x.h5ad", block=block, on_rows=rows.append)
        assert sum(rows) == TINY.n_cells and max(rows) <= block
        assert (whole != anndata.read_h5ad(tmp_path / "x.h5ad").X).nnz == 0
    assert (simulate_counts(TINY, 31, 44) != whole[31:44]).nnz == 0
    assert simulate_counts(TINY, 5, 5).shape == (0, TINY.n_genes)


def test_file_is_a_valid_anndata_of_integer_counts(tmp_path: Path) -> None:
    genes = [f"symbol-{g}" for g in range(TINY.n_genes)]
    write_h5ad(TINY, tmp_path / "x.h5ad", gene_names=genes)
    cells = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert cells.shape == (TINY.n_cells, TINY.n_genes) and cells.X.dtype == np.int32
    assert cells.X.has_canonical_format and cells.X.data.min() >= 1
    assert list(cells.var_names) == genes and cells.obs_names.is_unique
    assert set(perturbation_features(TINY, gene_names=genes)) | {CONTROL} == set(
        cells.obs["target_gene"].cat.categories
    )
    sizes = cells.obs.groupby(["cell_type", "target_gene"], observed=True).size()
    assert set(sizes.xs(CONTROL, level=1)) == {TINY.n_controls}
    assert set(sizes.drop(CONTROL, level=1)) == {TINY.n_cells_per_perturbation}
    assert len(sizes) == len(TINY.cell_types) * (TINY.n_perturbations + 1)
    assert set(cells.obs["batch"]) == {"batch_1", "batch_2"}
    changes = (cells.obs["target_gene"].to_numpy()[1:] != cells.obs["target_gene"].to_numpy()[:-1]).mean()
    assert changes > 0.5  # shuffled; grouped cells would change at 14 of 99 places


def test_full_panel_has_the_stated_sparsity_and_library_size() -> None:
    sim = Simulation(n_genes=18_080, expressed_genes=3_700, umi_per_cell=15_000)
    counts = simulate_counts(sim, 0, 400)
    per_cell, library = np.diff(counts.indptr), np.asarray(counts.sum(axis=1)).ravel()
    # standard errors over 400 cells: 1% of the mean number of genes, 2% of the median library
    assert per_cell.mean() == pytest.approx(3_700, rel=0.04)
    assert np.median(library) == pytest.approx(15_000, rel=0.07)
    assert np.log(library).std() == pytest.approx(sim.library_spread, rel=0.1)
    by_gene = np.sort(np.asarray(counts.mean(axis=0)).ravel())[::-1]
    assert 0.2 < by_gene[:100].sum() / by_gene.sum() < 0.5  # long tail
    assert np.median(by_gene) < 0.2 < 15_000 / 18_080 < by_gene[1000]


def test_counts_are_poisson_without_dispersion_and_lognormal_poisson_with_it() -> None:
    still = Simulation(
        n_controls=2000, n_perturbations=1, n_cells_per_perturbation=1, cell_types=("one",), n_batches=1, n_genes=200,
        expressed_genes=120, umi_per_cell=1000, library_spread=0.0, dispersion=0.0,
    )  # fmt: skip
    for dispersion in (0.0, 0.5):
        sim = replace(still, dispersion=dispersion)
        biology = simulate._biology(sim)
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
    one, two = (
        screen.fraction[(screen.cells.obs["batch"] == b).to_numpy()].mean(0)[well] for b in ("batch_1", "batch_2")
    )
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


def test_features_are_the_same_in_every_format_and_leave_the_control_out(tmp_path: Path) -> None:
    features = perturbation_features(TINY)
    assert len(features) == TINY.n_perturbations and CONTROL not in features
    for suffix in (".npz", ".safetensors", ".pt"):
        write_features(TINY, tmp_path / f"f{suffix}")
    as_tensors = torch.load(tmp_path / "f.pt", weights_only=True)
    read = [dict(np.load(tmp_path / "f.npz")), load_file(tmp_path / "f.safetensors")]
    read.append({name: tensor.numpy() for name, tensor in as_tensors.items()})
    for table in read:
        assert set(table) == set(features)
        for name, row in features.items():
            assert row.shape == (TINY.n_features,) and row.dtype == np.float32
            np.testing.assert_array_equal(table[name], row)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "f.pt", "f.safetensors"]


def test_splits_hold_out_disjoint_perturbations_of_one_cell_type(tmp_path: Path) -> None:
    write_splits(TINY, tmp_path / "s.toml", "demo", "demo.h5ad", test_cell_type="beta", n_test=2, n_val=1)
    splits = tomllib.loads((tmp_path / "s.toml").read_text())
    held_out = splits["fewshot"]["demo.beta"]
    assert splits["datasets"] == {"demo": "demo.h5ad"} and splits["training"] == {"demo": "train"}
    assert list(splits["fewshot"]) == ["demo.beta"] and splits["zeroshot"] == {}
    assert len(held_out["test"]) == 2 and len(held_out["val"]) == 1
    assert len({*held_out["test"], *held_out["val"]} & set(perturbation_features(TINY))) == 3


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(sim: Simulation) -> int:
        simulate._biology(sim)
        tracemalloc.start()
        write_h5ad(sim, tmp_path / "x.h5ad", block=64)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few = replace(TINY, n_genes=600, expressed_genes=300, umi_per_cell=1500, n_controls=80)
    many = replace(few, n_controls=400)
    counts = simulate_counts(few, 0, 64)
    assert peak(few) < 2.5 * (counts.data.nbytes + counts.indices.nbytes) + 1e6
    assert many.n_cells > 3.5 * few.n_cells
    assert peak(many) < 1.4 * peak(few)  # a cell keeps its codes and place (about 60 bytes), not its counts (2.4 KB)


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    path.write_text("old")

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_h5ad(TINY, path, block=10, on_rows=stop)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_perturbations": 31}, "31 perturbations need 124 genes"),
        ({"n_controls": 0}, "n_controls is 0"),
        ({"cell_types": ("a", "a")}, "cell_types must be distinct"),
        ({"n_features": 4}, "n_features 4 cannot hold 8 programs"),
        ({"expressed_genes": 120}, "expressed_genes is 120"),
        ({"knockdown": 1.0}, "knockdown is 1.0"),
        ({"null_fraction": 1.5}, "null_fraction is 1.5"),
        ({"effect_size": -1.0}, "effect_size is -1.0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_impossible_requests_say_what_exists(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 gene names for 120 genes"):
        write_h5ad(TINY, tmp_path / "x.h5ad", gene_names=["a", "b", "c"])
    with pytest.raises(InputError, match="must be distinct"):
        perturbation_features(TINY, gene_names=["a"] * TINY.n_genes)
    with pytest.raises(InputError, match="block is 0"):
        write_h5ad(TINY, tmp_path / "x.h5ad", block=0)
    with pytest.raises(InputError, match="Create it first"):
        write_h5ad(TINY, tmp_path / "missing" / "x.h5ad")
    with pytest.raises(InputError, match=r"\.npz, \.safetensors, \.pt"):
        write_features(TINY, tmp_path / "features.csv")
    with pytest.raises(InputError, match="Did you mean 'alpha'"):
        write_splits(TINY, tmp_path / "s.toml", "d", "d.h5ad", test_cell_type="alfa", n_test=1, n_val=1)
    with pytest.raises(InputError, match="Cannot hold out 5 test and 2 val of 6"):
        write_splits(TINY, tmp_path / "s.toml", "d", "d.h5ad", test_cell_type="beta", n_test=5, n_val=2)
    with pytest.raises(InputError, match="not in a file of 100 cells"):
        simulate_counts(TINY, 90, 101)
    with pytest.raises(InputError, match="choose between"):
        simulate_counts(replace(TINY, umi_per_cell=61, expressed_genes=60), 0, 1)
    assert list(tmp_path.iterdir()) == []
