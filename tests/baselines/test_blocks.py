"""Where contexts measured different genes: each gene is learned from the contexts that have it, and from no other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sest.baselines.all import Baselines, baseline_pseudobulks
from sest.baselines.blocks import BlockStack
from sest.baselines.effects import BASELINES, Contexts, Effects, Query
from sest.baselines.stack import Stack

G, HALF = 12, 8  # contexts a and b have all genes, c the first HALF
PERTURBATIONS = tuple(f"p{i}" for i in range(6))


@pytest.fixture(scope="module")
def effects() -> Effects:
    rng = np.random.default_rng(0)
    measured = np.ones((3, G), bool)
    measured[2, HALF:] = False
    size = rng.normal(size=(len(PERTURBATIONS), G))
    context, perturbation = (part.ravel() for part in np.meshgrid(range(3), range(len(PERTURBATIONS)), indexing="ij"))
    delta = size[perturbation] + 0.2 * rng.normal(size=(len(context), G))
    mean = rng.random((3, G)) + 1
    return Effects(
        controls=Contexts(("a", "b", "c"), mean * measured, (0.1 + rng.random((3, G))) * measured, np.full(3, 50)),
        perturbations=PERTURBATIONS,
        features=rng.normal(size=(len(PERTURBATIONS), 4)).astype(np.float32),
        delta=delta * measured[context],
        context=context,
        perturbation=perturbation,
        n_cells=np.full(len(context), 30),
        measured=measured,
    )


def on(effects: Effects, genes: np.ndarray, contexts: list[int]) -> Effects:
    """Written out by hand: these genes and contexts alone."""
    pairs = np.isin(effects.context, contexts)
    of = effects.controls
    return Effects(
        controls=Contexts(
            tuple(of.names[i] for i in contexts),
            of.mean[contexts][:, genes],
            of.variance[contexts][:, genes],
            of.n_cells[contexts],
        ),
        perturbations=effects.perturbations,
        features=effects.features,
        delta=effects.delta[pairs][:, genes],
        context=effects.context[pairs],
        perturbation=effects.perturbation[pairs],
        n_cells=effects.n_cells[pairs],
    )


def asked(effects: Effects) -> Query:
    """A new perturbation in every context, and a known one in a new context."""
    of = effects.controls
    controls = Contexts(
        (*of.names, "d"), np.vstack([of.mean, of.mean[:1]]), np.vstack([of.variance, of.variance[:1]]), np.full(4, 50)
    )
    features = np.vstack([np.ones((3, 4)), effects.features[:1]])
    return Query(controls, np.arange(4), ("new", "new", "new", "p0"), features)


def test_every_block_is_as_if_only_its_contexts_and_genes_were_there(effects: Effects) -> None:
    found, query = Baselines().fit(effects).predict(asked(effects)), asked(effects)
    assert list(found) == list(BASELINES)
    for genes, contexts in ((np.arange(HALF), [0, 1, 2]), (np.arange(HALF, G), [0, 1])):
        alone = Baselines().fit(on(effects, genes, contexts))
        part = Query(
            Contexts(
                query.controls.names,
                query.controls.mean[:, genes],
                query.controls.variance[:, genes],
                query.controls.n_cells,
            ),
            query.context,
            query.perturbations,
            query.features,
        )
        for name, values in alone.predict(part).items():
            rows = [0, 1, 3] if len(contexts) == 2 else [0, 1, 2, 3]  # c has none of the second block's genes
            np.testing.assert_allclose(found[name][rows][:, genes], values[rows], atol=1e-12)


def test_a_missing_gene_is_no_zero(effects: Effects) -> None:
    """Taken for zero, the third context would pull the mean effect towards nothing by a third."""
    query = effects.query(np.flatnonzero((effects.context == 0) & (effects.perturbation == 0)))
    found = Baselines().fit(effects).predict(query)["perturbation_mean"][0, HALF:]
    as_zero = Baselines().fit(dataclasses.replace(effects, measured=None)).predict(query)["perturbation_mean"][0, HALF:]
    pairs = (effects.perturbation == 0) & (effects.context < 2)
    assert np.abs(found).sum() > 1.3 * np.abs(as_zero).sum()
    np.testing.assert_allclose(found, effects.delta[pairs][:, HALF:].mean(0), atol=1e-12)


def test_genes_that_no_training_context_has_get_no_effect(effects: Effects) -> None:
    nowhere = dataclasses.replace(effects, measured=effects.measured & (np.arange(G) != 3))
    stack = Baselines().fit(nowhere).stack
    assert isinstance(stack, BlockStack)
    assert (stack.predict(asked(effects))[:, 3] == 0).all()
    assert set(stack.weights_of("new perturbation")) == set(
        Stack().fit(on(effects, np.arange(2), [0, 1])).weights_of("new perturbation")
    )
    means = baseline_pseudobulks(Baselines().fit(nowhere), asked(effects))
    assert all(np.isfinite(values).all() for values in means.values())


def test_where_all_genes_are_measured_nothing_is_split(effects: Effects) -> None:
    assert type(Baselines().fit(dataclasses.replace(effects, measured=None)).stack) is Stack
    (block,) = list(dataclasses.replace(effects, measured=np.ones((3, G), bool)).blocks())
    assert block[0].tolist() == list(range(G)) and block[1] is not None and len(block[1]) == len(effects)
