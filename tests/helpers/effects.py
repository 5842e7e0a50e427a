"""Effects with known contents for the baselines: drawn from a rule, or written by hand."""

from __future__ import annotations

import numpy as np

from sest.baselines.effects import Contexts, Effects, Query


def contexts(mean: np.ndarray, n_cells: int = 200, names: tuple[str, ...] = ("k562", "rpe1", "jurkat")) -> Contexts:
    """Controls of (C, G) means whose cells have variance 1."""
    return Contexts(names[: len(mean)], mean, np.ones_like(mean), np.full(len(mean), n_cells))


def by_hand() -> Effects:
    """Perturbation a in two contexts (100 and 10 cells), b in the first; two genes."""
    return Effects(
        controls=contexts(np.array([[1.0, 1.0], [2.0, 2.0]])),
        perturbations=("a", "b"),
        features=np.eye(2),
        delta=np.array([[1.0, 0.0], [0.0, -0.5], [-3.0, 0.5]]),
        context=np.array([0, 1, 0]),
        perturbation=np.array([0, 0, 1]),
        n_cells=np.array([100, 10, 50]),
    )


def query(effects: Effects, context: int, names: list[str], features: np.ndarray | None = None) -> Query:
    """Pairs of one context of `effects`; unseen names have features of zeros unless these are given."""
    known = {name: effects.features[i] for i, name in enumerate(effects.perturbations)}
    width = effects.features.shape[1]
    given = np.stack([known.get(name, np.zeros(width)) for name in names]) if features is None else features
    return Query(effects.controls, np.full(len(names), context), tuple(names), given)


def new_context(effects: Effects, names: list[str], mean: np.ndarray) -> Query:
    """Pairs of a context without training pairs."""
    asked = query(effects, 0, names)
    controls = Contexts(("new",), mean[None], np.ones((1, len(mean))), np.array([200]))
    return Query(controls, np.zeros(len(names), int), asked.perturbations, asked.features)


def simulated(
    n_contexts: int = 3, n_perturbations: int = 30, n_genes: int = 200, signal: float = 1.0, seed: int = 0
) -> tuple[Effects, np.ndarray]:
    """Effects that perturbations have in all contexts, half of them, with the noise of 50 cells; and without noise."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(0, 2, n_genes) + 0.3 * rng.normal(size=(n_contexts, n_genes))
    common = rng.normal(size=(n_perturbations, n_genes)) * signal * (np.arange(n_perturbations) % 2)[:, None]
    context = np.repeat(np.arange(n_contexts), n_perturbations)
    perturbation = np.tile(np.arange(n_perturbations), n_contexts)
    own = 0.3 * signal * rng.normal(size=(len(context), n_genes)) * (perturbation % 2)[:, None]
    truth = common[perturbation] + own
    noise = rng.normal(size=truth.shape) / np.sqrt(50) + rng.normal(size=(n_contexts, n_genes))[context] / np.sqrt(200)
    effects = Effects(
        controls=contexts(mean),
        perturbations=tuple(f"p{i}" for i in range(n_perturbations)),
        features=np.eye(n_perturbations),
        delta=truth + noise,
        context=context,
        perturbation=perturbation,
        n_cells=np.full(len(context), 50),
    )
    return effects, truth
