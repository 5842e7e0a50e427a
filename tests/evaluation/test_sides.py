"""Two files brought together: labels, genes and scales of every kind, and what cannot be compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sest.evaluation.sides
from helpers.two_files import Written, log1p, sest_uns, unchanged, write_two_files
from sest.config import EvaluateConfig
from sest.errors import InputError
from sest.evaluation.evaluate import evaluate
from sest.files.cell_file import CellFile


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Writes the two files."""
    return partial(write_two_files, tmp_path)


def test_reading_in_many_blocks_changes_nothing(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written()
    whole = evaluate(*paths, EvaluateConfig(cell_eval=False)).table
    monkeypatch.setattr(sest.evaluation.sides, "BLOCK", 5)
    pd.testing.assert_frame_equal(evaluate(*paths, EvaluateConfig(cell_eval=False)).table, whole, rtol=1e-12)


def test_each_file_is_read_once_and_again_only_where_its_first_cells_mislead(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ones(real: ad.AnnData) -> ad.AnnData:
        """Cells without counts at the start, then zeros and ones: they say nothing."""
        first = np.minimum(real.X.toarray()[:12], 1)
        first[:5] = 0
        real.X = sp.csr_matrix(np.concatenate([first, real.X.toarray()[12:]]))
        return real

    def foreign(predicted: ad.AnnData) -> ad.AnnData:
        del predicted.uns["sest"]
        return predicted

    read: list[tuple[str, int]] = []
    rows = CellFile.rows

    def counted(self: CellFile, start: int, stop: int) -> sp.csr_matrix:
        read.append((self.path.name, stop - start))
        return rows(self, start, stop)

    monkeypatch.setattr(CellFile, "rows", counted)
    monkeypatch.setattr(sest.evaluation.sides, "BLOCK", 5)
    config = EvaluateConfig(cell_eval=False, target_sum=1000.0)
    for change, again in ((unchanged, 0), (ones, 63)):
        read.clear()
        paths = written(change_real=change, change_predicted=foreign)
        found = evaluate(*paths, config)
        assert sum(n for name, n in read if name == "predicted.h5ad") == 42
        assert sum(n for name, n in read if name == "real.h5ad") == 63 + again
        as_asked = evaluate(*paths, EvaluateConfig(cell_eval=False, target_sum=1000.0, counts="raw"))
        pd.testing.assert_frame_equal(found.table, as_asked.table, rtol=1e-12)
        assert found.provenance["real_counts_normalised_to"] == 1000.0


def test_one_value_below_zero_in_the_last_cell_is_enough_to_refuse_a_file(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    def below(cells: ad.AnnData) -> ad.AnnData:
        cells.uns.clear()
        values = cells.X.toarray()
        values[-1, -1] = -3
        cells.X = sp.csr_matrix(values)
        return cells

    monkeypatch.setattr(sest.evaluation.sides, "BLOCK", 5)
    monkeypatch.setattr("sest.evaluation.evaluate._own_scores", lambda *_: pytest.fail("something was scored"))
    for counts in ("auto", "raw"):
        with pytest.raises(InputError, match=r"real\.h5ad has 1 values below zero: these are not counts"):
            evaluate(*written(change_real=below), EvaluateConfig(cell_eval=False, counts=counts))
    with pytest.raises(InputError, match=r"predicted\.h5ad has 1 values below zero: these look like effects"):
        evaluate(*written(change_predicted=below), EvaluateConfig(cell_eval=False))


def test_log1p_real_cells_are_used_as_they_are_and_that_is_said(written: Callable[..., Written]) -> None:
    def to_log1p(real: ad.AnnData) -> ad.AnnData:
        real.X = sp.csr_matrix(log1p(real.X.toarray(), 1000.0).astype(np.float32))
        return real

    from_counts = evaluate(*written(), EvaluateConfig(cell_eval=False))
    from_log1p = evaluate(*written(change_real=to_log1p), EvaluateConfig(cell_eval=False))
    pd.testing.assert_frame_equal(from_log1p.table, from_counts.table, rtol=1e-5, atol=1e-6)
    assert any("log1p values: they are used as they are" in note for note in from_log1p.notes)
    assert from_log1p.provenance["real_counts_normalised_to"] is None


def test_sides_that_were_normalised_differently_are_said(written: Callable[..., Written]) -> None:
    def to_cpm(real: ad.AnnData) -> ad.AnnData:
        real.X = sp.csr_matrix(log1p(real.X.toarray(), 1e6).astype(np.float32))
        return real

    def foreign(predicted: ad.AnnData) -> ad.AnnData:
        del predicted.uns["sest"]
        return predicted

    words = "predicted.h5ad is log1p of counts normalised to 1,000; .*real.h5ad is log1p of CPM"
    for change in (unchanged, foreign):
        notes = evaluate(*written(change_real=to_cpm, change_predicted=change), EvaluateConfig(cell_eval=False)).notes
        assert any(re.search("mae means nothing.*" + words, note) for note in notes)
    assert not any("mae" in note for note in evaluate(*written(), EvaluateConfig(cell_eval=False)).notes)
    mixed = evaluate(*written(uns=sest_uns(scale="mixed")), EvaluateConfig(cell_eval=False)).notes
    assert any("--mixed-scales allow): its mae means nothing" in note for note in mixed)


def test_a_prediction_of_effects_is_refused(written: Callable[..., Written]) -> None:
    def effects(predicted: ad.AnnData) -> ad.AnnData:
        predicted.X = predicted.X.toarray() - predicted.X.toarray().mean(0)
        return predicted

    def foreign(predicted: ad.AnnData) -> ad.AnnData:
        del predicted.uns["sest"]
        return effects(predicted)

    for change in (effects, foreign):
        with pytest.raises(InputError, match=r"predicted.h5ad has .* look like effects .*Add the mean of the controls"):
            evaluate(*written(change_predicted=change), EvaluateConfig(cell_eval=False))


def test_scaled_real_cells_are_refused_and_their_raw_is_read_when_asked(written: Callable[..., Written]) -> None:
    def scaled(real: ad.AnnData) -> ad.AnnData:
        real.raw = real
        x = np.log1p(real.X.toarray())
        real.X = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
        return real[:, ::-1].copy()

    with pytest.raises(InputError, match=r"real.h5ad is scaled: .*raw/X is there: pass --layer raw"):
        evaluate(*written(change_real=scaled), EvaluateConfig(cell_eval=False))
    from_raw = evaluate(*written(change_real=scaled), EvaluateConfig(cell_eval=False, layer="raw")).table
    pd.testing.assert_frame_equal(from_raw, evaluate(*written(), EvaluateConfig(cell_eval=False)).table)


def test_a_layer_of_the_real_file_is_read_when_asked(written: Callable[..., Written]) -> None:
    def to_layer(real: ad.AnnData) -> ad.AnnData:
        real.layers["umi"] = real.X.copy()
        real.X = sp.csr_matrix(np.full(real.shape, 0.5, dtype=np.float32))
        return real

    from_x = evaluate(*written(), EvaluateConfig(cell_eval=False)).table
    from_layer = evaluate(*written(change_real=to_layer), EvaluateConfig(layer="umi", cell_eval=False)).table
    pd.testing.assert_frame_equal(from_layer, from_x)


def test_a_foreign_prediction_is_read_by_detection_and_the_default_normalisation_is_said(
    written: Callable[..., Written],
) -> None:
    def forget(predicted: ad.AnnData) -> ad.AnnData:
        del predicted.uns["sest"]
        return predicted

    paths = written(change_predicted=forget)
    told = evaluate(*written(), EvaluateConfig(cell_eval=False)).table
    paths = written(change_predicted=forget)
    pd.testing.assert_frame_equal(evaluate(*paths, EvaluateConfig(target_sum=1000.0, cell_eval=False)).table, told)
    assert any("normalised to 10000" in note for note in evaluate(*paths, EvaluateConfig(cell_eval=False)).notes)


def test_another_target_sum_than_the_prediction_s_is_refused(written: Callable[..., Written]) -> None:
    with pytest.raises(InputError, match="normalised to 1000 counts a cell, not 10000"):
        evaluate(*written(), EvaluateConfig(target_sum=10_000.0, cell_eval=False))


def test_counts_cannot_be_compared_with_a_log1p_source_of_unknown_normalisation(
    written: Callable[..., Written],
) -> None:
    paths = written(uns={**sest_uns(), "scale": "log1p"})
    with pytest.raises(InputError, match="pass --target-sum"):
        evaluate(*paths, EvaluateConfig(cell_eval=False))
    assert (
        evaluate(*paths, EvaluateConfig(target_sum=1000.0, cell_eval=False)).provenance["real_counts_normalised_to"]
        == 1000.0
    )


def test_labels_of_the_real_file_may_differ_from_the_prediction_s(written: Callable[..., Written]) -> None:
    def rename(real: ad.AnnData) -> ad.AnnData:
        real.obs = real.obs.rename(columns={"target_gene": "guide", "cell_type": "line"})
        real.obs["guide"] = real.obs["guide"].cat.rename_categories({"control": "NT-9"})
        return real

    told = evaluate(*written(), EvaluateConfig(cell_eval=False)).table
    paths = written(change_real=rename)
    renamed = evaluate(
        *paths, EvaluateConfig(pert_col="guide", cell_type_col="line", control="NT-9", cell_eval=False)
    ).table
    pd.testing.assert_frame_equal(renamed, told)


def test_genes_are_found_in_another_var_column(written: Callable[..., Written]) -> None:
    def hide(real: ad.AnnData) -> ad.AnnData:
        real.var["symbol"] = real.var_names
        real.var_names = [f"ENSG{i:011d}" for i in range(real.n_vars)]
        return real

    told = evaluate(*written(), EvaluateConfig(cell_eval=False)).table
    pd.testing.assert_frame_equal(evaluate(*written(change_real=hide), EvaluateConfig(cell_eval=False)).table, told)


def test_missing_genes_are_named(written: Callable[..., Written]) -> None:
    paths = written(change_real=lambda real: real[:, [name != "g3" for name in real.var_names]].copy())
    with pytest.raises(InputError, match=r"1 of the prediction's 8 genes are not in .*: g3"):
        evaluate(*paths, EvaluateConfig(cell_eval=False))


def test_pairs_without_real_cells_are_named(written: Callable[..., Written]) -> None:
    paths = written(
        change_real=lambda real: real[~((real.obs.cell_type == "rpe1") & (real.obs.target_gene == "g2"))].copy()
    )
    with pytest.raises(InputError, match=r"1 predicted pairs .*: rpe1/g2"):
        evaluate(*paths, EvaluateConfig(cell_eval=False))


def test_cell_types_without_real_controls_are_named(written: Callable[..., Written]) -> None:
    paths = written(
        change_real=lambda real: real[~((real.obs.cell_type == "rpe1") & (real.obs.target_gene == "control"))].copy()
    )
    with pytest.raises(InputError, match="no control cells of cell types in the prediction: rpe1"):
        evaluate(*paths, EvaluateConfig(cell_eval=False))


def test_real_cells_that_were_not_predicted_do_not_matter(written: Callable[..., Written]) -> None:
    def fewer(predicted: ad.AnnData) -> ad.AnnData:
        return predicted[predicted.obs.cell_type == "k562"].copy()

    some = evaluate(*written(change_predicted=fewer), EvaluateConfig(cell_eval=False)).table
    every = evaluate(*written(), EvaluateConfig(cell_eval=False)).table
    of_k562 = every[every["cell_type"] == "k562"].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, of_k562)


def test_files_without_cell_types_are_one_cell_type(written: Callable[..., Written]) -> None:
    def forget(adata: ad.AnnData) -> ad.AnnData:
        adata = adata[adata.obs.cell_type == "k562"].copy()
        adata.obs = adata.obs[["target_gene"]]
        adata.uns.clear()
        return adata

    told = evaluate(*written(), EvaluateConfig(cell_eval=False)).table
    table = evaluate(*written(None, forget, forget), EvaluateConfig(target_sum=1000.0, cell_eval=False)).table
    assert set(table["cell_type"]) == {"unknown"}
    of_k562 = told[told["cell_type"] == "k562"].reset_index(drop=True).assign(cell_type="unknown")
    pd.testing.assert_frame_equal(table, of_k562)


def test_a_prediction_of_several_cell_types_needs_those_of_the_real_cells(written: Callable[..., Written]) -> None:
    def forget(real: ad.AnnData) -> ad.AnnData:
        real.obs = real.obs[["target_gene"]]
        return real

    with pytest.raises(InputError, match="no cell type column; the prediction has k562, rpe1"):
        evaluate(*written(change_real=forget), EvaluateConfig(cell_eval=False))


def test_genes_of_both_files_are_found_by_name_where_the_index_is_row_numbers(
    written: Callable[..., Written],
) -> None:
    def numbered(cells: ad.AnnData) -> ad.AnnData:
        cells = cells[:, np.random.default_rng(len(cells)).permutation(cells.n_vars)].copy()
        cells.var = pd.DataFrame({"gene_name": cells.var_names.to_numpy()}, index=list(map(str, range(cells.n_vars))))
        return cells

    def nameless(cells: ad.AnnData) -> ad.AnnData:
        cells.var_names = list(map(str, range(cells.n_vars)))
        return cells

    config = EvaluateConfig(cell_eval=False)
    expected = evaluate(*written(), config).table
    found = evaluate(*written(change_predicted=numbered, change_real=numbered), config)
    pd.testing.assert_frame_equal(found.table, expected, rtol=1e-9)
    assert sum("genes are named by gene_name" in note for note in found.notes) == 2
    paths = written(change_predicted=nameless, change_real=nameless)
    with pytest.raises(InputError, match=r"does not name its genes.* --gene-col"):
        evaluate(*paths, config)
    by_row = evaluate(*paths, EvaluateConfig(cell_eval=False, gene_col="index")).table
    assert (by_row["pearson_delta"][:5] < expected["pearson_delta"][:5]).sum() >= 4  # genes are in different orders


def test_files_without_control_cells_are_told_what_to_add(written: Callable[..., Written]) -> None:
    def drop(cells: ad.AnnData) -> ad.AnnData:
        del cells.uns["sest"]
        return cells[cells.obs.target_gene != "control"].copy()

    with pytest.raises(InputError, match=r"predicted\.h5ad: No control cells: .*add control cells to this file"):
        evaluate(*written(change_predicted=drop), EvaluateConfig(cell_eval=False))
