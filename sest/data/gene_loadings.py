"""Vectors for genes from the cells themselves: which genes vary together in the controls.

A gene's vector are its loadings in the principal components of the controls' log1p expression, so that a perturbation
of a measured gene has features without any file. As in Ahlmann-Eltze et al. 2025 ("Deep-learning-based gene
perturbation effect prediction does not yet outperform simple linear baselines"), whose linear model reads such
vectors. n control cells, G genes, W components.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from sest.data.targets import Targets
from sest.data.vectors import GENES, Source
from sest.errors import InputError

WIDTH = 64  # components, fewer where the cells have fewer
MOST_CELLS = 8192
_STREAM = 11  # what a random stream is for


def gene_loadings(targets: Targets, rows: np.ndarray, context: np.ndarray, seed: int) -> Source:
    """Fit the components on control cells; every gene of the targets gets a vector.

    Args:
        rows: (n,) the control cells of the training split; a seeded sample of 8,192 of more.
        context: (n,) codes; every context is centred by itself, as differences between contexts are no co-variation.

    Returns:
        (G, W): the components (columns of length 1) times the square root of G, so that an entry is about 1. Signs: the
        largest entry of each component is positive.

    Raises:
        InputError: fewer than three control cells, or all the same.
    """
    if len(rows) > MOST_CELLS:
        chosen = np.sort(np.random.default_rng([seed, _STREAM]).choice(len(rows), MOST_CELLS, replace=False))
        rows, context = rows[chosen], context[chosen]
    x = targets.log1p(rows).astype(np.float64)
    contexts, code = np.unique(context, return_inverse=True)
    member = scipy.sparse.csr_matrix((np.ones(len(rows)), (code, np.arange(len(rows)))))
    means = np.asarray((member @ x).todense()) / np.bincount(code)[:, None]
    width = min(WIDTH, len(rows) - len(contexts), x.shape[1] - 1)
    if width < 1:
        raise InputError(f"--perturbations genes needs more than {len(rows)} control cells and {x.shape[1]} genes.")
    centred = scipy.sparse.linalg.LinearOperator(
        x.shape,
        dtype=np.float64,
        matvec=lambda v: x @ v.ravel() - (means @ v.ravel())[code],
        rmatvec=lambda u: x.T @ u.ravel() - means.T @ (member @ u.ravel()),
    )
    if x.multiply(x).sum() - (np.bincount(code)[:, None] * means**2).sum() <= 1e-12 * x.multiply(x).sum():
        raise InputError("--perturbations genes: the control cells of each cell type are all the same.")
    start = np.random.default_rng([seed, _STREAM]).normal(size=min(x.shape))
    _, sizes, components = scipy.sparse.linalg.svds(centred, width, v0=start)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 1e-6 * sizes.max()]
    basis = components[order].T
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(len(order))])
    matrix = (basis * np.sqrt(len(basis))).astype(np.float32)
    return Source(GENES, {name: i for i, name in enumerate(targets.genes)}, matrix)
