"""Perturb-seq cells made up from a known model, for `sest demo`, tests and benchmarks of any size.

A cell of type c with perturbation p draws Poisson-lognormal UMI counts:

    log rate(g) = baseline(c, g) + batch(b, g) + sum_k activity(p, k) sensitivity(c, k) loading(k, g) + states + noise
    count(g) ~ Poisson(library size * rate(g) / sum rate)

The feature vector of p is its program activity embedded in `n_features` dimensions, plus noise. So the effect of an
unseen perturbation follows from its features, and that of a seen one in another cell type from that type's
sensitivities. The perturbed gene itself is knocked down, by an amount that differs from cell to cell (CRISPRi).

Shapes: C cell types, B batches, G genes, K programs, N perturbations, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import ndtri

from sest.errors import InputError, shown
from sest.simulation.simulation import Simulation

CONTROL = "non-targeting"
BIOLOGY, ORDER, HOLD_OUT, CELL = range(4)  # streams of random numbers; one Generator per (stream, index, seed)
Programs = tuple[tuple[np.ndarray, np.ndarray], ...]  # each: genes, and their loadings (log units at activity 1)


@dataclass(frozen=True, eq=False)
class _Biology:
    """What the cells share."""

    rate: np.ndarray  # (C, B, G) float32, unnormalised
    noise: np.ndarray  # (4096,) float32, quantiles of the lognormal factor between like cells
    targets: np.ndarray  # (N,) gene of each perturbation
    programs: Programs  # K
    states: Programs  # 3: cell cycle cosine and sine, and stress
    activity: np.ndarray  # (N, K)
    sensitivity: np.ndarray  # (C, K)
    features: np.ndarray  # (N, F) float32


@dataclass(frozen=True, eq=False)
class _Obs:
    """What each cell is, in file order: int32 codes (n_cells,). Perturbation 0 is the control."""

    perturbation: np.ndarray
    cell_type: np.ndarray
    batch: np.ndarray


def simulate_counts(sim: Simulation, start: int, stop: int) -> sparse.csr_matrix:
    """Return UMI counts of cells `start` to `stop` (rows, G) int32, column indices sorted.

    Every row is a pure function of (sim, cell index), so blocks of any size give the same cells.
    Raises InputError where the range leaves the screen.
    """
    if not 0 <= start <= stop <= sim.n_cells:
        raise InputError(f"Rows {start} to {stop} are not in a file of {sim.n_cells} cells.")
    biology, obs = _biology(sim), _obs(sim)
    cells = [_cell(sim, biology, obs, index) for index in range(start, stop)]
    indptr = np.zeros(stop - start + 1, dtype=np.int64)
    np.cumsum([genes.size for genes, _ in cells], out=indptr[1:])
    indices = np.concatenate([genes for genes, _ in cells]) if cells else np.empty(0, dtype=np.int32)
    data = np.concatenate([counts for _, counts in cells]) if cells else np.empty(0, dtype=np.int32)
    matrix = sparse.csr_matrix((stop - start, sim.n_genes), dtype=np.int32)
    matrix.data, matrix.indices, matrix.indptr = data, indices, indptr.astype(np.int32)
    return matrix


def simulate_labels(sim: Simulation, *, gene_names: Sequence[str] | None = None) -> pd.DataFrame:
    """Return what every cell is (n_cells, 3): target_gene, cell_type and batch, categorical."""
    obs, genes = _obs(sim), names_of_genes(sim, gene_names)
    perturbations = [CONTROL, *(genes[target] for target in _biology(sim).targets)]
    return pd.DataFrame(
        {
            "target_gene": pd.Categorical.from_codes(obs.perturbation, perturbations),
            "cell_type": pd.Categorical.from_codes(obs.cell_type, sim.cell_types),
            "batch": pd.Categorical.from_codes(obs.batch, [f"batch_{b + 1}" for b in range(sim.n_batches)]),
        },
        index=[f"cell_{i:08d}" for i in range(sim.n_cells)],
    )


def perturbation_features(sim: Simulation, *, gene_names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return name -> (n_features,) float32 for every perturbation; the control has none."""
    genes, biology = names_of_genes(sim, gene_names), _biology(sim)
    return {genes[target]: row.copy() for target, row in zip(biology.targets, biology.features, strict=True)}


def names_of_genes(sim: Simulation, given: Sequence[str] | None) -> list[str]:
    """(G,) made-up names where none are given. Raises InputError for names that do not fit."""
    if given is None:
        return [f"GENE{g + 1:0{max(4, len(str(sim.n_genes)))}d}" for g in range(sim.n_genes)]
    names = list(given)
    if len(names) != sim.n_genes:
        raise InputError(f"{len(names)} gene names for {sim.n_genes} genes. Pass n_genes={len(names)}.")
    if len(set(names)) != len(names) or CONTROL in names:
        raise InputError(f"Gene names must be distinct and none may be {CONTROL!r}; got {shown(names, 3)}.")
    return names


def random_stream(stream: int, index: int, seed: int) -> np.random.Generator:
    """The random numbers of one stream (BIOLOGY, ORDER, HOLD_OUT or CELL) and one index in it."""
    return np.random.default_rng([stream, index, seed])


def _cell(sim: Simulation, biology: _Biology, obs: _Obs, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the expressed genes of one cell, ascending, and their counts (both int32)."""
    rng = random_stream(CELL, index, sim.seed)
    cell_type, perturbation = obs.cell_type[index], obs.perturbation[index] - 1
    library = sim.median_umi * np.exp(sim.library_spread * rng.standard_normal())
    phase, stress = rng.uniform(0, 2 * np.pi), rng.standard_normal()
    rate = biology.rate[cell_type, obs.batch[index]] * _noise(biology.noise, rng, sim.n_genes)  # (G,)
    _move(rate, biology.states, (np.cos(phase), np.sin(phase), stress))
    if perturbation >= 0:
        efficiency = rng.beta(10 * sim.knockdown, 10 * (1 - sim.knockdown))
        response = biology.activity[perturbation] * biology.sensitivity[cell_type]  # (K,)
        _move(rate, biology.programs, response * (efficiency / sim.knockdown))
        rate[biology.targets[perturbation]] *= np.float32(1 - efficiency)
    rate *= np.float32(library / rate.sum())  # expected UMIs
    # Exact Poisson counts as arrivals within `rate`: the first two come after Exp(1) waits, the rest are Poisson in
    # what is left. Most genes have none, so only the expressed ones cost more than one uniform number.
    rate += np.log(1 - rng.random(sim.n_genes, dtype=np.float32))  # what is left after the first arrival
    expressed = np.flatnonzero(rate > 0)
    left = rate[expressed] - rng.standard_exponential(expressed.size, dtype=np.float32)
    more = np.flatnonzero(left > 0)
    counts = np.ones(expressed.size, dtype=np.int32)
    counts[more] += 1 + rng.poisson(left[more]).astype(np.int32)
    return expressed.astype(np.int32), counts


def _noise(quantiles: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Lognormal factors (size,) float32 looked up in a table: drawing normals would take most of a cell's time."""
    return quantiles.take(np.frombuffer(rng.bytes(2 * size), dtype="<u2") >> 4)  # 16 bits to 12


def _move(rate: np.ndarray, programs: Programs, amounts: Iterable[float]) -> None:
    """Multiply the rates of each program's genes by exp(amount * loading), in place."""
    for amount, (genes, loadings) in zip(amounts, programs, strict=True):
        rate[genes] *= np.exp(np.float32(amount) * loadings)


@functools.lru_cache(maxsize=2)
def _obs(sim: Simulation) -> _Obs:
    per_type = np.concatenate(
        [
            np.zeros(sim.n_controls, dtype=np.int32),
            np.repeat(np.arange(1, sim.n_perturbations + 1, dtype=np.int32), sim.n_cells_per_perturbation),
        ]
    )
    rng = random_stream(ORDER, 0, sim.seed)
    order = rng.permutation(sim.n_cells)
    perturbation = np.tile(per_type, len(sim.cell_types))[order]
    cell_type = np.repeat(np.arange(len(sim.cell_types), dtype=np.int32), per_type.size)[order]
    return _Obs(perturbation, cell_type, rng.integers(sim.n_batches, size=sim.n_cells, dtype=np.int32))


@functools.lru_cache(maxsize=2)
def _biology(sim: Simulation) -> _Biology:
    rng = random_stream(BIOLOGY, 0, sim.seed)
    n_types, genes = len(sim.cell_types), sim.n_genes
    rank = rng.permutation(genes)  # genes from the highest to the lowest mean
    well = rank[genes // 100 :][: max(genes // 10, sim.n_perturbations)]  # well expressed, but not the few extreme ones
    targets = rng.choice(well, sim.n_perturbations, replace=False)
    markers = np.zeros((n_types, genes))  # log fold change against the common baseline
    others = np.setdiff1d(rank, targets)  # a target's own change is the knock-down alone
    for row in markers:
        row[rng.choice(others, min(400, genes // 6), replace=False)] = rng.normal(0, 1.2, min(400, genes // 6))
    baseline = _calibrated(sim, rank, markers)
    batch = rng.normal(0, sim.batch_effect, (sim.n_batches, genes))
    pool = np.setdiff1d(rank[: genes // 2], targets)  # a change of a gene that is hardly ever seen teaches nothing
    programs = tuple(_program(rng, pool, genes, sim.effect_size) for _ in range(sim.n_programs))
    states = tuple(_program(rng, pool, genes, 0.4) for _ in range(3))
    strength = rng.lognormal(0.3, 0.3, sim.n_perturbations)
    strength[rng.permutation(sim.n_perturbations)[: round(sim.null_fraction * sim.n_perturbations)]] = 0
    direction = rng.standard_normal((sim.n_perturbations, sim.n_programs))
    direction *= np.abs(direction)  # a few programs each
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    activity = strength[:, None] * direction  # (N, K)
    embedding = rng.standard_normal((sim.n_programs, sim.n_features))
    features = activity @ embedding + sim.feature_noise * rng.standard_normal((sim.n_perturbations, sim.n_features))
    return _Biology(
        rate=np.exp(baseline[:, None] + batch).astype(np.float32),
        noise=np.exp(sim.dispersion * _normal_quantiles(4096)).astype(np.float32),
        targets=targets,
        programs=programs,
        states=states,
        activity=activity,
        sensitivity=rng.uniform(0.2, 1.8, (n_types, sim.n_programs)),
        features=features.astype(np.float32),
    )


def _program(rng: np.random.Generator, pool: np.ndarray, n_genes: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Genes (30 to 300 of a full panel, fewer of a small one) and loadings of either sign."""
    most = min(300, n_genes // 10, pool.size)
    size = max(3, round(most * 10 ** -rng.uniform(0, 1)))
    loadings = rng.choice([-scale, scale], size) * rng.uniform(0.4, 1.6, size)
    return np.sort(rng.choice(pool, size, replace=False)), loadings.astype(np.float32)


def _calibrated(sim: Simulation, rank: np.ndarray, markers: np.ndarray) -> np.ndarray:
    """Log rates (C, G), normal over genes, as wide as `expressed_genes` of `umi_per_cell` ask for (bisection)."""
    normal = np.empty(sim.n_genes)
    normal[rank] = -_normal_quantiles(sim.n_genes)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    spread = np.hypot(sim.library_spread, sim.dispersion)
    depth = sim.median_umi * np.exp(spread * nodes - sim.dispersion**2 / 2)  # (9,) library x noise of one gene

    def expressed(tail: float) -> float:
        rate = np.exp(tail * normal + markers)
        rate /= rate.sum(axis=1, keepdims=True)
        seen = -np.expm1(-rate[..., None] * depth) @ (weights / weights.sum())
        return float(seen.sum(axis=1).mean())

    low, high = 0.0, 8.0
    if not expressed(high) < sim.mean_expressed < expressed(low):
        raise InputError(
            f"{sim.median_umi} UMIs over {sim.n_genes} genes cannot express {sim.mean_expressed} genes; "
            f"choose between {expressed(high):.0f} and {expressed(low):.0f}, or change umi_per_cell."
        )
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if expressed(middle) > sim.mean_expressed else (low, middle)
    log_rate: np.ndarray = low * normal + markers
    return log_rate


def _normal_quantiles(n: int) -> np.ndarray:
    """n equally likely values of a standard normal, ascending (n,)."""
    values: np.ndarray = ndtri((np.arange(n) + 0.5) / n)
    return values
