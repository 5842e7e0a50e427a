"""Drawing the sets of a large screen: making the sampler, the first batch of an epoch, a whole epoch, a validation.

Screens of labels alone, made up: 50 contexts x 950 perturbations x 60 cells, whose sets are drawn, 220,000 cells of one
context with 48 batches, as in the challenge of 2025, and 3,000,000 cells of 50 contexts with 200 batches each; the last
two with `--match-controls batch`. Prints seconds of the processor.

    OMP_NUM_THREADS=1 python benchmarks/sampler.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from sest.data.labels import Labels
from sest.data.sampler import SetSampler

CONTEXTS, PERTURBATIONS, CELLS, CONTROLS = 50, 950, 60, 1_000  # cells of a pair, controls of a context
LARGE, BATCHES = 3_000_000, 200  # cells; batches of a context
BATCH = 64  # sets
N_BATCHES = 80  # of the challenge's sizes, for a mean


def labels(context: np.ndarray, perturbation: np.ndarray, batch: np.ndarray) -> Labels:
    return Labels(
        groups=("cells",),
        first=np.array([0, len(context)]),
        perturbations=("control", *(f"p{i}" for i in range(1, PERTURBATIONS + 1))),
        perturbation=perturbation.astype(np.int32),
        contexts=tuple(("cells", f"type{i}") for i in range(CONTEXTS)),
        context=context.astype(np.int32),
        batch=batch.astype(np.int32),
    )


def screen(rng: np.random.Generator) -> Labels:
    """Every context with all perturbations, shuffled."""
    each = np.concatenate([np.zeros(CONTROLS, int), np.repeat(np.arange(1, PERTURBATIONS + 1), CELLS)])
    order = rng.permutation(CONTEXTS * len(each))
    context, perturbation = np.repeat(np.arange(CONTEXTS), len(each))[order], np.tile(each, CONTEXTS)[order]
    return labels(context, perturbation, np.zeros(len(order)))


def one_context(rng: np.random.Generator) -> Labels:
    """150 perturbations, 48 batches, 17% controls."""
    perturbation = np.where(rng.random(220_000) < 0.17, 0, rng.integers(1, 151, 220_000))
    return labels(np.zeros(220_000), perturbation, rng.integers(0, 48, 220_000))


def many_batches(rng: np.random.Generator) -> Labels:
    """Cells of any context, perturbation and batch of the context; a tenth is controls."""
    context = rng.integers(0, CONTEXTS, LARGE)
    perturbation = np.where(rng.random(LARGE) < 0.1, 0, rng.integers(1, PERTURBATIONS + 1, LARGE))
    return labels(context, perturbation, context * BATCHES + rng.integers(0, BATCHES, LARGE))


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.process_time()
    yield
    print(f"{what}: {time.process_time() - began:.3f} s", flush=True)


def main() -> None:
    """Measure, print."""
    rng = np.random.default_rng(0)
    cells = screen(rng)
    for set_size in (128, 32):
        sampler = SetSampler(cells, np.ones(len(cells), bool), set_size, 0)
        n = sampler.sets_per_epoch
        with timed(f"{n} sets of {set_size}, first batch of {BATCH}"):
            sampler.sets(np.arange(BATCH))
        with timed("  the others of the epoch"):
            for first in range(BATCH, n, BATCH):
                sampler.sets(np.arange(first, min(first + BATCH, n)))
        with timed("  those of a validation"):
            sampler.fixed_sets()
    cells = one_context(rng)
    for same_batch in (False, True):
        sampler = SetSampler(cells, np.ones(len(cells), bool), 128, 0, same_batch=same_batch)
        sampler.sets(np.arange(sampler.sets_per_epoch))  # the pairs of the epoch are drawn
        with timed(
            f"{N_BATCHES} batches of 16 sets of 128, controls of the same {'batch' if same_batch else 'context'}"
        ):
            for first in range(0, 16 * N_BATCHES, 16):
                sampler.sets(np.arange(first, first + 16))
    cells = many_batches(rng)
    with timed(f"{LARGE} cells, {CONTEXTS * BATCHES} batches, sampler made"):
        sampler = SetSampler(cells, np.ones(len(cells), bool), 64, 0, same_batch=True)
    with timed("  cells without a control of their batch counted"):
        sampler.without_same_batch()


if __name__ == "__main__":
    main()
