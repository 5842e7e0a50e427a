"""Baselines at challenge size, where the best possible prediction is known: effects drawn from a known distribution.

18,080 genes, three contexts, 150 perturbations of which some did not train and one context not at all; features of
width 64. Effects are Gaussian with covariances that are known here, and so is the noise of the measured means, so that
the conditional mean of what was not measured is the best prediction there is, by squared error. Each baseline is shown
as its mean squared error over that of this best one (500 genes), with time and memory of all.
`python benchmarks/known_effects.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
from real_cells import hardware

from sest.baselines.all import Baselines
from sest.baselines.effects import BASELINES, Contexts, Effects
from sest.baselines.means import cosines

PER_CELL = 0.5  # standard deviation of a gene between cells, log1p
SIGNAL = {"everywhere": 0.02, "perturbation": 0.10, "context": 0.02, "both": 0.06}  # standard deviations of effects


def covariance(features: np.ndarray, near: np.ndarray, perturbation: np.ndarray, context: np.ndarray) -> np.ndarray:
    """(n, n) of the effects of pairs, without their noise."""
    alike = cosines(features, features)[np.ix_(perturbation, perturbation)]
    close = near[np.ix_(context, context)]
    a = {name: size**2 for name, size in SIGNAL.items()}
    whole: np.ndarray = a["everywhere"] + a["perturbation"] * alike + a["context"] * close + a["both"] * alike * close
    return whole


def main() -> None:
    """Draw effects, fit on what trains, compare with the conditional mean."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-genes", type=int, default=18_080)
    parser.add_argument("--n-perturbations", type=int, default=150)
    parser.add_argument("--cells", type=int, default=100, help="cells of a pair")
    parser.add_argument("--controls", type=int, default=1000, help="control cells of a context")
    asked = parser.parse_args()
    rng, n_contexts, n = np.random.default_rng(0), 3, asked.n_perturbations
    perturbation, context = np.tile(np.arange(n), n_contexts), np.repeat(np.arange(n_contexts), n)
    features = rng.normal(size=(n, 64))
    mean = rng.uniform(0, 2, asked.n_genes) + 0.1 * rng.normal(size=(n_contexts, asked.n_genes))
    distance = ((mean[:, None] - mean[None]) ** 2).mean(2)
    near = np.exp(-distance / (2 * distance.max()))
    k = covariance(features, near, perturbation, context)
    same_context = context[:, None] == context
    noise = PER_CELL**2 * (np.eye(len(k)) / asked.cells + same_context / asked.controls)
    size = np.exp(rng.normal(0, 1, asked.n_genes))  # of a gene's effects
    root, root_of_noise = np.linalg.cholesky(k + 1e-12 * np.eye(len(k))), np.linalg.cholesky(noise)
    truth = root @ rng.normal(size=(len(k), asked.n_genes)) * np.sqrt(size)
    measured = truth + root_of_noise @ rng.normal(size=truth.shape)
    unseen = perturbation % 5 == 0
    learned = ~unseen & (context != n_contexts - 1)
    kinds = {
        "new perturbation": unseen & (context != n_contexts - 1),
        "new context": ~unseen & (context == n_contexts - 1),
        "both new": unseen & (context == n_contexts - 1),
    }
    variance = np.full(mean.shape, PER_CELL**2)
    controls = Contexts(("a", "b", "c"), mean, variance, np.full(n_contexts, asked.controls))
    names = tuple(f"p{i}" for i in range(n))
    whole = Effects(controls, names, features, measured, context, perturbation, np.full(len(k), asked.cells))
    began = time.perf_counter()
    fitted = Baselines().fit(whole.some(learned))
    predicted = {name: fitted.predict(whole.query(np.flatnonzero(rows))) for name, rows in kinds.items()}
    seconds = time.perf_counter() - began
    genes = np.sort(rng.choice(asked.n_genes, min(asked.n_genes, 500), replace=False))
    print(f"| pairs | {' | '.join(name.replace('_', ' ') for name in BASELINES)} |\n" + "|---" * 8 + "|")
    for name, rows in kinds.items():
        best = np.empty((rows.sum(), len(genes)))
        for place, gene in enumerate(genes.tolist()):  # a gene's own covariance: effects of this size, and the noise
            own = size[gene] * k
            inside = np.linalg.solve((own + noise)[np.ix_(learned, learned)], measured[learned, gene])
            best[:, place] = own[np.ix_(rows, learned)] @ inside
        there = truth[rows][:, genes]
        error = ((best - there) ** 2).mean()
        ratios = [((predicted[name][one][:, genes] - there) ** 2).mean() / error for one in BASELINES]
        print(f"| {name} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    n_asked = int(sum(rows.sum() for rows in kinds.values()))
    print(f"\n{learned.sum()} training pairs; all baselines fitted and {n_asked} pairs predicted in {seconds:.1f} s")
    print(f"{peak:.1f} GB with the data")
    print(json.dumps(hardware()))


if __name__ == "__main__":
    main()
