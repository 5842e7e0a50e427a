"""A map of the embedded cells of a cache: a sample of them in two dimensions, with their labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sest import progress
from sest.cache import Cache, Group
from sest.cache.schema import ROWS_PER_CHUNK
from sest.errors import InputError
from sest.machine.jit import import_compiled

logger = logging.getLogger(__name__)

MOST_CELLS = 4_000
CONTROL = "control"  # what control cells are called here, whatever each file calls them
LABELS = ("cell type", "perturbation", "batch")

NEIGHBOURS = 15  # of a cell, UMAP's default; fewer cells have no such map


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """A sample of n embedded cells."""

    labels: dict[str, list[str]]  # of LABELS; each (n,)
    is_control: np.ndarray  # (n,) bool
    places: dict[str, np.ndarray]  # "PCA" and, if asked for, "UMAP": (n, 2)
    explained: tuple[float, float]  # share of the sample's variance along the two principal components
    n_cells: int  # embedded in the cache


def map_embeddings(cache: Cache, *, seed: int = 0, umap: bool = False) -> EmbeddingMap:
    """Draw a sample of the embedded cells and lay them out.

    Args:
        umap: by UMAP too, where the sample has more cells than NEIGHBOURS.

    Raises:
        InputError: no cell of the cache has a finite embedding.
        CacheError: a damaged cache.
    """
    groups, only_controls = list(cache.groups.values()), cache.attributes["cells"] == "controls"
    is_control = np.concatenate([_is_control(group) for group in groups])
    candidates = np.flatnonzero(is_control) if only_controls else np.arange(len(is_control))
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(candidates, min(len(candidates), MOST_CELLS), replace=False))
    progress.begin("Reading embeddings", len(rows), "cells")
    vectors, tables, first = [np.zeros((0, cache.dim), np.float32)], [], 0
    for group in groups:
        here = rows[(rows >= first) & (rows < first + group.n_cells)] - first
        vectors += _read(group, here)
        tables.append(_labels(group, here, several=len(groups) > 1))
        first += group.n_cells
    found = np.concatenate(vectors)
    finite = np.isfinite(found).all(1)
    rows, found = rows[finite], found[finite]
    if not len(rows):
        raise InputError(f"No cell of {cache.path} has a finite embedding.")
    mine = pd.concat(tables, ignore_index=True)[finite]
    pca, explained = principal_components(found)
    places = {"PCA": pca}
    if umap and len(found) > NEIGHBOURS:
        logger.info("UMAP of the embeddings: half a minute.")
        places["UMAP"] = _umap(found, seed)
    labels = {name: mine[name].tolist() for name in LABELS}
    return EmbeddingMap(labels, is_control[rows], places, explained, len(candidates))


def _is_control(group: Group) -> np.ndarray:
    """(cells,) bool; none in a file without perturbations."""
    labels = group.read_labels()
    if "perturbation" not in labels:
        return np.zeros(group.n_cells, bool)
    mine: np.ndarray = (labels["perturbation"] == str(group.attributes["columns"]["control"])).to_numpy()
    return mine


def _labels(group: Group, rows: np.ndarray, *, several: bool) -> pd.DataFrame:
    """What some cells (n,) of a file are, in words; batches of several files never have the same name."""
    obs = group.read_labels().iloc[rows]
    perturbation, cell_type, batch = (
        obs[name].astype(object).where(obs[name].notna(), "-").astype(str) if name in obs else pd.Series("-", obs.index)
        for name in ("perturbation", "cell_type", "batch")
    )
    return pd.DataFrame(
        {
            "cell type": cell_type,
            "perturbation": perturbation.mask(_is_control(group)[rows], CONTROL),
            "batch": group.path + "/" + batch if several else batch,
        }
    )


def _read(group: Group, rows: np.ndarray) -> list[np.ndarray]:
    """Embeddings of some rows (n,), sorted; only chunks with one of them are read."""
    parts = []
    for chunk in np.unique(rows // ROWS_PER_CHUNK):
        start = int(chunk) * ROWS_PER_CHUNK
        mine = rows[rows // ROWS_PER_CHUNK == chunk] - start
        block = group.embeddings(start, min(start + ROWS_PER_CHUNK, group.n_cells))
        parts.append(block[mine].astype(np.float32))
        progress.advance(len(mine))
    return parts


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The first two principal components of rows (n, E), and their shares of the variance."""
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    basis, explained = principal_axes(centred)
    return centred @ basis.T, explained


def principal_axes(rows: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The two principal axes (2, E) of rows (n, E), and their shares of the variance.

    The sign of an axis is such that its largest loading is positive.
    """
    centred = rows - rows.mean(0)
    _, sizes, basis = np.linalg.svd(centred, full_matrices=False)
    basis = np.vstack([basis[:2], np.zeros((2 - len(basis[:2]), basis.shape[1]))])
    largest = basis[np.arange(2), np.abs(basis).argmax(1)]
    variance = np.pad(sizes**2, (0, 2))
    total = float(variance.sum()) or 1.0
    axes: np.ndarray = basis * np.where(largest < 0, -1.0, 1.0)[:, None]
    return axes, (float(variance[0]) / total, float(variance[1]) / total)


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    """UMAP with its defaults and the cosine metric, the same for the same seed."""
    umap = import_compiled("umap")  # the extra "umap"; half of its import is compiling
    places: np.ndarray = umap.UMAP(NEIGHBOURS, metric="cosine", random_state=seed, n_jobs=1).fit_transform(vectors)
    return places
