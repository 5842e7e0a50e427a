"""How much each of several predictions is to count, fitted on pairs that none of them learned from.

Shapes: K pairs, G genes, B parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sest.baselines.effects import some_genes
from sest.baselines.stack import nonnegative_weights, pair_weights

RESAMPLES = 100
PRIOR_GROUPS = 4.0  # groups of pairs that the prior counts as
LEAST = 0.01  # below, a part does not count: it would cost a pass of the head for nothing


@dataclass(frozen=True)
class Weights:
    """The weight of every part; what they leave to 1 is the controls."""

    means: dict[str, float]
    spread: dict[str, float]  # standard deviation over resamples of the pairs
    n_pairs: int

    @property
    def of_controls(self) -> float:
        return max(1.0 - sum(self.means.values()), 0.0)


def fit_weights(
    parts: Mapping[str, np.ndarray],
    observed: np.ndarray,
    context: np.ndarray,
    group: np.ndarray,
    prior: Mapping[str, float],
    seed: int,
) -> Weights:
    """Weights of least squares, not negative and of a sum of at most 1, so that few pairs cannot make them swing.

    They are means over resamples of the groups of pairs (drawn with replacement), and the prior counts as much as
    PRIOR_GROUPS groups whose effects it predicts exactly. A pair counts as `pair_weights` says. What comes out below
    LEAST is zero.

    Args:
        parts: name -> (K, G) predicted effects.
        observed: (K, G) effects.
        context: (K,) codes.
        group: (K,) codes; pairs of one group, such as a perturbation in several contexts, err together.
        prior: name -> weight, of every part.
        seed: of the resamples.
    """
    names = list(parts)
    wanted = np.array([prior[name] for name in names])
    if not len(observed):
        return Weights(dict(zip(names, wanted.tolist(), strict=True)), dict.fromkeys(names, 0.0), 0)
    genes = some_genes(observed.shape[1], 8000)
    f = np.stack([parts[name][:, genes] for name in names])  # (B, K, genes)
    y = observed[:, genes]
    counts = pair_weights(y, context)
    gram = np.einsum("bkg,ckg->kbc", f, f) * counts[:, None, None]
    target = np.einsum("bkg,kg->kb", f, y) * counts[:, None]
    groups = [np.flatnonzero(group == one) for one in np.unique(group)]
    gram, target = (np.array([values[rows].sum(0) for rows in groups]) for values in (gram, target))
    strength = PRIOR_GROUPS * np.trace(gram.mean(0)) / len(names) * np.eye(len(names))
    rng, found = np.random.default_rng([seed, len(y)]), []
    for _ in range(RESAMPLES if len(groups) > 1 else 1):
        drawn = rng.integers(len(groups), size=len(groups))
        found.append(nonnegative_weights(gram[drawn].sum(0) + strength, target[drawn].sum(0) + strength @ wanted))
    means, spread = np.mean(found, 0), np.std(found, 0)
    means[means < LEAST] = 0.0
    return Weights(
        dict(zip(names, means.tolist(), strict=True)), dict(zip(names, spread.tolist(), strict=True)), len(y)
    )
