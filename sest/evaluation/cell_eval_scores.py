"""What cell-eval adds to our own metrics, where it is installed: the Virtual Cell Challenge's DES and overall score.

cell-eval tests differential expression on cells, so baselines, which are pseudobulks, are made into cells here. Its
licence is non-commercial: it is called, never copied. Shapes: N cells, G genes. Space: log1p.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from sest.cells.scale import LARGEST_PREDICTED_LOG1P

log = logging.getLogger(__name__)

LIMIT = 15.0  # cell-eval takes larger values for counts
MAX_RATIO = 1.5  # largest factor on a control cell's log1p value in `cells_with_mean`
CONTROL = "(control)"  # the control's name in the tables given to cell-eval
LabelledCells = tuple[sp.csr_matrix, np.ndarray]  # (N, G) log1p and the perturbation of each, (N,)
_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class CellEvalFailed(Exception):
    """cell-eval cannot score these cells; one line with its reason. Our own metrics are not touched by it."""


def cells_with_mean(mean: np.ndarray, controls: sp.csr_matrix, n: int, rng: np.random.Generator) -> sp.csr_matrix:
    """`n` cells (n, G), log1p, that look like control cells (C, G) and whose pseudobulk is `mean` (G,).

    A baseline is a pseudobulk, but cell-eval tests differential expression on cells. Repeating the mean n times (what
    cell-eval's own baseline does) removes the spread, so that the test calls almost every gene: the controls' own mean
    then earns a DES above 0, and even the true mean loses most of its own. So: draw control cells; where the mean is to
    fall, scale the gene's values down; where it is to rise, scale up to MAX_RATIO and let further cells express the
    gene (those without it first) at its mean level. Other zeros stay zeros; the mean is exact up to the cap of
    LARGEST_PREDICTED_LOG1P.
    """
    n_controls = controls.shape[0]
    drawn = rng.permutation(n_controls)[:n] if n <= n_controls else rng.integers(n_controls, size=n)
    cells = controls[drawn].toarray().astype(np.float64)  # (n, G)
    now = cells.mean(axis=0)
    cells *= np.minimum(np.divide(mean, now, out=np.ones_like(now), where=now > 0), MAX_RATIO)
    expressing = np.maximum(controls.getnnz(axis=0), 1)
    level = np.maximum(np.asarray(controls.sum(axis=0)).ravel() / expressing, np.maximum(mean, 1.0))  # (G,)
    missing = (mean - cells.mean(axis=0)) * n / level  # (G,) further cells
    up = np.flatnonzero(missing > 1e-6)
    order = np.argsort(rng.random((n, len(up))) + (cells[:, up] > 0), axis=0)
    rank = np.argsort(order, axis=0)  # (n, up) who is next to express it
    cells[:, up] += np.clip(missing[up] - rank, 0.0, 1.0) * level[up]
    return sp.csr_matrix(np.minimum(cells, LARGEST_PREDICTED_LOG1P).astype(np.float32))


def cell_eval_scores(
    real: LabelledCells, predictions: dict[str, LabelledCells], genes: list[str], threads: int = 1
) -> pd.DataFrame:
    """cell-eval's Virtual Cell Challenge metrics for one cell type, one row a (predictor, perturbation).

    `real` and each prediction are cells (N, G) log1p and their perturbations (N,), controls being named `CONTROL`; all
    must have the same perturbations. des is overlap_at_N: the share of the real differentially expressed genes (N of
    them, Wilcoxon test at FDR 0.05) found among the N strongest predicted ones; 0 where the real cells have none.
    cell_eval_mae and cell_eval_pds equal mae and pds but for ties and float32. Needs the extra `eval`.

    Raises CellEvalFailed for values it takes for counts, and for whatever it raises itself.
    """
    top = max(float(cells.max()) for cells, _ in [real, *predictions.values()])
    if top >= LIMIT:
        raise CellEvalFailed(f"it takes log1p values below {LIMIT:g}, and the largest is {top:g}")
    try:
        return _run(real, predictions, genes, threads)
    except _FOREIGN as error:
        raise CellEvalFailed(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _run(real: LabelledCells, predictions: dict[str, LabelledCells], genes: list[str], threads: int) -> pd.DataFrame:
    from cell_eval import MetricsEvaluator

    names = {"overlap_at_N": "des", "mae": "cell_eval_mae", "discrimination_score_l1": "cell_eval_pds"}
    parts = []
    real_tests: str | None = None  # the real cells are tested once
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as bars:
        for i, cells in enumerate(predictions.values()):
            outdir = Path(folder) / str(i)
            evaluator = MetricsEvaluator(
                adata_pred=_anndata(*cells, genes),
                adata_real=_anndata(*real, genes),
                de_real=real_tests,
                control_pert=CONTROL,
                pert_col="perturbation",
                num_threads=threads,
                outdir=str(outdir),
            )
            results, _ = evaluator.compute(profile="vcc", write_csv=False, break_on_error=True)
            real_tests = real_tests or str(outdir / "real_de.csv")
            scores = {ours: results[theirs].to_numpy() for theirs, ours in names.items()}
            parts.append(pd.DataFrame({"perturbation": results["perturbation"].to_list(), **scores}))
    log.debug("cell-eval: %s", bars.getvalue())
    return pd.concat(dict(zip(predictions, parts, strict=True)), names=["predictor"]).reset_index("predictor")


def overall_scores(table: pd.DataFrame) -> dict[str, float]:
    """cell-eval's overall score of the model over each baseline, from the means over all pairs."""
    import polars as pl
    from cell_eval import score_agg_metrics

    theirs = {"des": "overlap_at_N", "cell_eval_mae": "mae", "cell_eval_pds": "discrimination_score_l1"}
    described = {
        str(name): pl.DataFrame({theirs[c]: rows[c].to_numpy() for c in theirs}).describe()
        for name, rows in table.groupby("predictor")
    }
    scores = {}
    for name in [name for name in described if name != "model"]:
        score = score_agg_metrics(described["model"], described[name])
        scores[name] = float(score.filter(pl.col("metric") == "avg_score")["from_baseline"].item())
    return scores


def controls_of(cells: LabelledCells) -> LabelledCells:
    """The cells named `CONTROL`."""
    at = np.flatnonzero(cells[1] == CONTROL)
    return cells[0][at], cells[1][at]


def stack(parts: list[LabelledCells]) -> LabelledCells:
    """Several tables of cells as one."""
    return sp.vstack([cells for cells, _ in parts], format="csr"), np.concatenate([names for _, names in parts])


def _anndata(cells: sp.csr_matrix, perturbations: np.ndarray, genes: list[str]) -> Any:
    import anndata

    obs = pd.DataFrame({"perturbation": pd.Categorical(perturbations)}, index=[str(i) for i in range(cells.shape[0])])
    return anndata.AnnData(cells, obs=obs, var=pd.DataFrame(index=genes))
