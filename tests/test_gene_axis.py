"""Training on the union of genes: of a gene that its file lacks a cell has no target, at every place that compares."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from helpers.caches import CellGroup, small_screen, write_cache
from helpers.configs import small_config
from helpers.notes import Notes
from sest.cells.split_file import TRAIN, VAL
from sest.config import PredictConfig
from sest.data.dataset import read_dataset
from sest.data.resident import resident_cells
from sest.errors import InputError
from sest.evaluation.means import split_pairs, training_effects
from sest.evaluation.metrics import discrimination_score, mean_absolute_error, pearson_delta
from sest.evaluation.pairs import pair_metrics
from sest.head.loss import make_loss
from sest.prediction.predict import predict
from sest.progress import reporting
from sest.runs.checkpoint import open_checkpoint
from sest.runs.known import known_without_cells, mean_of_controls
from sest.training.train import train

FEWER = tuple(f"g{i}" for i in range(14, 3, -1))  # of 20, in another order


def fewer(name: str = "b") -> CellGroup:
    """The cells of another file, of which 11 genes and one of its own were measured."""
    screen = small_screen(name)
    columns = [screen.genes.index(gene) for gene in FEWER]
    matrix = screen.matrix[:, [*columns, 0]]
    return dataclasses.replace(screen, genes=(*FEWER, "own"), matrix=matrix)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("axis") / "c.zarr", [small_screen("a"), fewer()])


def config(**changes: Any) -> Any:
    return small_config(gene_axis="union", val_fraction=0.3, val_contexts="all", **changes)


def test_the_axis_has_the_genes_of_any_file_and_knows_which_has_which(cache: Path) -> None:
    data = read_dataset(cache, config())
    assert data.targets.genes == (*(f"g{i}" for i in range(20)), "own")
    assert data.targets.measured is not None
    assert [m.sum() for m in data.targets.measured] == [20, 12]
    groups = list(data.cache.groups.values())
    for number, group in enumerate(groups):
        rows = np.arange(data.labels.first[number], data.labels.first[number + 1])
        values = data.targets.values(rows).toarray()
        for gene in group.genes:
            expected = group.targets().toarray()[:, group.genes.index(gene)]
            assert np.array_equal(values[:, data.targets.genes.index(gene)], expected)
        assert values[:, ~data.targets.measured[number]].sum() == 0
        totals = np.asarray(group.targets().sum(1)).ravel()  # over all genes of its file
        np.testing.assert_allclose(
            data.targets.factor[rows], np.where(totals > 0, 1e4 / np.maximum(totals, 1), 0), rtol=1e-6
        )
    usual = read_dataset(cache, small_config())
    assert set(usual.targets.genes) == set(FEWER) and usual.targets.measured is None


@pytest.mark.parametrize("loss", ["energy", "mse", "energy+sinkhorn"])
def test_the_loss_of_a_set_is_that_of_the_genes_of_its_file(cache: Path, loss: str) -> None:
    """As the trainer masks it, against the same cells cut to these genes; and no gradient reaches the others."""
    if loss == "energy+sinkhorn":
        pytest.importorskip("geomloss")
    data = read_dataset(cache, config())
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, torch.device("cpu"))
    rows = np.flatnonzero(data.labels.context == len(data.labels.contexts) - 1)[:8].reshape(2, 4)
    measured = cells.measured(rows)
    assert measured is not None and measured.shape == (2, 1, 21)
    genes = np.flatnonzero(measured[0, 0].numpy())
    assert len(genes) == 12
    predicted = torch.rand(2, 4, 21, generator=torch.Generator().manual_seed(0), requires_grad=True)
    criterion, target = make_loss(loss, torch.float32), cells.expression(rows)
    masked = criterion(predicted * measured, target)
    alone = criterion(predicted.detach()[..., genes], target[..., genes])
    alone = alone * len(genes) / 21 if loss == "mse" else alone  # a mean over all genes of the axis
    torch.testing.assert_close(masked.detach(), alone, rtol=1e-5, atol=1e-6)
    masked.sum().backward()
    assert predicted.grad is not None
    others = np.setdiff1d(np.arange(21), genes)
    assert predicted.grad[..., others].abs().sum() == 0 and predicted.grad[..., genes].abs().sum() > 0


def test_scores_are_those_of_the_genes_of_each_file(cache: Path) -> None:
    data = read_dataset(cache, config())
    pairs = split_pairs(data, VAL)
    predicted = pairs.observed + np.random.default_rng(0).normal(size=pairs.observed.shape)
    found = pair_metrics(data, pairs, predicted)
    for context in np.unique(pairs.context).tolist():
        measured = data.measured_in(context)
        assert measured is not None
        mine, genes = pairs.context == context, np.flatnonzero(measured)
        sides = [side[mine][:, genes] for side in (predicted, pairs.observed, pairs.control)]
        np.testing.assert_allclose(found["mae"][mine], mean_absolute_error(*sides[:2]))
        np.testing.assert_allclose(found["pearson_delta"][mine], pearson_delta(*sides))
        names = [data.labels.perturbations[p] for p in pairs.perturbation[mine]]
        scores = discrimination_score(sides[0], sides[1], sides[2][0], names, [data.targets.genes[g] for g in genes])
        np.testing.assert_allclose(found["pds"][mine], scores)
    effects = training_effects(data)
    assert effects.measured is not None and effects.measured.sum(1).tolist() == [20, 20, 12, 12]


def test_a_run_learns_predicts_and_says_what_it_left_out(cache: Path, tmp_path: Path) -> None:
    """The genes of all asked cells by default; one that was not measured there is refused."""
    train(cache, tmp_path / "run", config(max_steps=40, val_every=20))
    train(cache, tmp_path / "parts", config(max_steps=20, val_every=20))
    train(cache, tmp_path / "parts", config(max_steps=40, val_every=20), resume="auto")
    whole, parts = (load_file(tmp_path / r / "last" / "model.safetensors") for r in ("run", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    best = open_checkpoint(tmp_path / "run" / "best")
    assert best.sizes.n_genes == 21 and best.blend().effects.measured is not None
    notes = Notes()
    with reporting(notes):
        predict(tmp_path / "run", tmp_path / "p.h5ad", PredictConfig(only="P", cell_type=("x", "y"), n_cells=20))
    cells = ad.read_h5ad(tmp_path / "p.h5ad")
    assert set(cells.var_names) == set(FEWER) and np.isfinite(cells.X.toarray()).all()
    assert any("10 genes were not measured in all cells" in note for note in notes.notes)
    (tmp_path / "genes.csv").write_text("g0\ng5\n")
    with pytest.raises(InputError, match=r"1 genes were not measured in the control cells of the run: g0"):
        predict(
            tmp_path / "run",
            tmp_path / "q.h5ad",
            PredictConfig(only="P", cell_type="x", genes=str(tmp_path / "genes.csv")),
        )
    known = known_without_cells(best, None)
    assert known is not None
    data = read_dataset(cache, config())
    rows = np.flatnonzero(data.labels.is_control & data.in_split(TRAIN))
    mean, genes = mean_of_controls(best, known), data.targets.measured_by(rows)
    assert genes is not None
    expected = data.targets.log1p(rows).toarray().astype(np.float64).sum(0) / genes.sum(0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)


def test_files_of_the_same_genes_train_the_same_run(tmp_path: Path) -> None:
    both = write_cache(tmp_path / "c.zarr", [small_screen("a"), small_screen("b")])
    for axis in ("common", "union"):
        train(both, tmp_path / axis, small_config(gene_axis=axis, max_steps=3))
    one, other = ((tmp_path / axis / "last" / "model.safetensors").read_bytes() for axis in ("common", "union"))
    assert one == other


def test_what_has_no_union_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--perturbations genes takes the genes' loadings"):
        read_dataset(cache, config(perturbations="genes"))
    numbered = dataclasses.replace(fewer("n"), genes=tuple(map(str, range(12))))
    other = write_cache(tmp_path / "n.zarr", [small_screen("a"), numbered])
    with pytest.raises(InputError, match="are numbers, which are not told apart"):
        read_dataset(other, config())
    apart = dataclasses.replace(fewer("n"), genes=tuple(f"x{i}" for i in range(12)))
    other = write_cache(tmp_path / "x.zarr", [small_screen("a"), apart])
    with pytest.raises(InputError, match="no gene in common"):
        read_dataset(other, config())
