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
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w
from scipy import sparse
from scipy.special import ndtri

from sest.errors import InputError, nearest, shown
from sest.write_h5ad import H5adWriter, check_writable

CONTROL = "non-targeting"
FEATURE_SUFFIXES = (".npz", ".safetensors", ".pt")
BIOLOGY, ORDER, HOLD_OUT, CELL = range(4)  # streams of random numbers; one Generator per (stream, index, seed)
Programs = tuple[tuple[np.ndarray, np.ndarray], ...]  # each: genes, and their loadings (log units at activity 1)


@dataclass(frozen=True)
class Simulation:
    """Size and biology of a simulated screen.

    The defaults make a small file that is quick to learn from. A full panel, 80% zeros, is
    `Simulation(n_genes=18_080, expressed_genes=3_700, umi_per_cell=15_000)`.
    Raises InputError for sizes that cannot be.
    """

    n_cells_per_perturbation: int = 100  # cells per perturbation and cell type (default 100)
    n_controls: int = 400  # control cells per cell type (default 400)
    n_perturbations: int = 40  # perturbed genes, control not counted (default 40)
    n_genes: int = 2000  # genes of the panel (default 2000)
    cell_types: tuple[str, ...] = ("alpha", "beta")  # names of the contexts (default alpha, beta)
    n_batches: int = 2  # batches, shared by all cell types (default 2)
    n_features: int = 64  # width of a perturbation's feature vector (default 64)
    n_programs: int = 8  # latent gene programs that perturbations drive (default 8)
    expressed_genes: int = 700  # mean number of genes with a count in a cell (default 700)
    umi_per_cell: int = 5000  # median library size, UMIs (default 5000)
    library_spread: float = 0.35  # standard deviation of the log library size (default 0.35)
    effect_size: float = 0.7  # log fold change of a typical program gene at activity 1 (default 0.7)
    null_fraction: float = 0.15  # share of perturbations that move no program (default 0.15)
    knockdown: float = 0.85  # mean loss of the target's expression, fraction (default 0.85)
    feature_noise: float = 0.15  # standard deviation of a feature's noise; its signal has about 1.4 (default 0.15)
    dispersion: float = 0.5  # standard deviation of the log rate between like cells (default 0.5)
    batch_effect: float = 0.08  # standard deviation of a gene's log shift between batches (default 0.08)
    seed: int = 0  # everything follows from it (default 0)

    def __post_init__(self) -> None:
        for name in ("n_cells_per_perturbation", "n_perturbations", "n_batches", "n_programs", "n_controls"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.cell_types or len(set(self.cell_types)) != len(self.cell_types):
            raise InputError(f"cell_types must be distinct names, at least one; got {shown(self.cell_types)}.")
        if self.n_genes < 50 or self.n_perturbations > self.n_genes // 4:
            raise InputError(
                f"{self.n_perturbations} perturbations need {max(50, 4 * self.n_perturbations)} genes or more "
                f"(each targets a well expressed one); n_genes is {self.n_genes}."
            )
        if self.n_features < self.n_programs:
            raise InputError(
                f"n_features {self.n_features} cannot hold {self.n_programs} programs; raise it or lower n_programs."
            )
        if not 1 <= self.expressed_genes <= min(self.n_genes - 1, self.umi_per_cell):
            raise InputError(
                f"expressed_genes is {self.expressed_genes}; it must be at least 1, below n_genes ({self.n_genes}) "
                f"and not above umi_per_cell ({self.umi_per_cell})."
            )
        if not 0 < self.knockdown < 1:
            raise InputError(f"knockdown is {self.knockdown}; it is a fraction between 0 and 1.")
        if not 0 <= self.null_fraction <= 1:
            raise InputError(f"null_fraction is {self.null_fraction}; it is a fraction from 0 to 1.")
        for name in ("library_spread", "effect_size", "feature_noise", "dispersion", "batch_effect", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative.")

    def with_seed(self, seed: int) -> Simulation:
        """The same screen, drawn anew."""
        return replace(self, seed=seed)

    @property
    def n_cells(self) -> int:
        """Cells in the file, controls included."""
        return len(self.cell_types) * (self.n_controls + self.n_perturbations * self.n_cells_per_perturbation)


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

    Every row is a pure function of (sim, cell index), so blocks of any size give the same file.
    Raises InputError where the range leaves the file.
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


def write_h5ad(
    sim: Simulation,
    path: Path,
    *,
    gene_names: Sequence[str] | None = None,
    block: int = 4096,
    on_rows: Callable[[int], None] | None = None,
) -> None:
    """Write raw UMI counts (CSR int32) as an h5ad with obs `target_gene`, `cell_type`, `batch` (categorical).

    Cells are in shuffled order. Memory is that of `block` cells (twice 8 bytes a nonzero count), plus a few tens of
    bytes for each cell of the file. `on_rows(n)` is called when n more rows are written. The file appears under its
    name only when complete. Raises InputError for gene names that do not fit.
    """
    genes = _gene_names(sim, gene_names)
    if block < 1:
        raise InputError(f"block is {block}; it must be at least 1 cell.")
    obs = _obs(sim)
    perturbations = [CONTROL, *(genes[target] for target in _biology(sim).targets)]
    with H5adWriter(path, sim.n_genes, "int32") as writer:
        for start in range(0, sim.n_cells, block):
            rows = simulate_counts(sim, start, min(start + block, sim.n_cells))
            writer.add(rows)
            if on_rows is not None:
                on_rows(rows.shape[0])
            del rows  # before the next block is made
        table = pd.DataFrame(
            {
                "target_gene": pd.Categorical.from_codes(obs.perturbation, perturbations),
                "cell_type": pd.Categorical.from_codes(obs.cell_type, sim.cell_types),
                "batch": pd.Categorical.from_codes(obs.batch, [f"batch_{b + 1}" for b in range(sim.n_batches)]),
            },
            index=[f"cell_{i:08d}" for i in range(sim.n_cells)],
        )
        settings = json.dumps(asdict(sim), sort_keys=True)
        writer.finish(table, pd.DataFrame(index=genes), {"simulation": settings})


def perturbation_features(sim: Simulation, *, gene_names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return name -> (n_features,) float32 for every perturbation; the control has none."""
    genes, biology = _gene_names(sim, gene_names), _biology(sim)
    return {genes[target]: row.copy() for target, row in zip(biology.targets, biology.features, strict=True)}


def write_features(sim: Simulation, path: Path, *, gene_names: Sequence[str] | None = None) -> None:
    """Write `perturbation_features` as .npz, .safetensors or .pt (dict name -> tensor), else InputError."""
    features = perturbation_features(sim, gene_names=gene_names)
    if path.suffix not in FEATURE_SUFFIXES:
        raise InputError(f"Cannot write features as {path.name!r}. Use a name that ends in {shown(FEATURE_SUFFIXES)}.")
    with _aside(path) as partial:
        if path.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, **features)
        elif path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(features, partial)
        else:
            import torch

            torch.save({name: torch.from_numpy(row) for name, row in features.items()}, partial)


def write_splits(
    sim: Simulation,
    path: Path,
    dataset: str,
    h5ad_name: str,
    *,
    test_cell_type: str,
    n_test: int,
    n_val: int,
    gene_names: Sequence[str] | None = None,
) -> None:
    """Write a cell-load style TOML: few-shot, `n_test` and `n_val` perturbations of one cell type are held out.

    `h5ad_name` is relative to the folder of `path`. The same perturbations stay in training in the other cell types.
    Raises InputError for an unknown cell type or more held out than there are.
    """
    if test_cell_type not in sim.cell_types:
        hint = nearest(test_cell_type, sim.cell_types)
        raise InputError(f"No cell type {test_cell_type!r}. Available: {shown(sim.cell_types)}.{hint}")
    if min(n_test, n_val) < 0 or n_test + n_val > sim.n_perturbations:
        raise InputError(f"Cannot hold out {n_test} test and {n_val} val of {sim.n_perturbations} perturbations.")
    names = list(perturbation_features(sim, gene_names=gene_names))
    order = _rng(HOLD_OUT, 0, sim.seed).permutation(len(names))
    test = sorted(names[i] for i in order[:n_test])
    val = sorted(names[i] for i in order[n_test : n_test + n_val])
    tables = {
        "datasets": {dataset: h5ad_name},
        "training": {dataset: "train"},
        "zeroshot": {},
        "fewshot": {f"{dataset}.{test_cell_type}": {"val": val, "test": test}},
    }
    with _aside(path) as partial:
        partial.write_text(tomli_w.dumps(tables), encoding="utf-8")


def write_screen(
    sim: Simulation,
    cells: Path,
    features: Path | None = None,
    splits: Path | None = None,
    *,
    gene_names: Sequence[str] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> None:
    """Write the cells and, where asked, features and splits that fit them; the long work, the cells, comes last.

    The splits hold out a quarter of the perturbations of the last cell type for testing and a twelfth for validation;
    their dataset is named as the file, so that they fit a store made from the file and one made from the splits.
    Raises InputError as the three writers do; no cells are written then.
    """
    check_writable(cells)
    _gene_names(sim, gene_names)
    if splits is not None:
        n_test = max(1, sim.n_perturbations // 4)
        n_val = min(max(2, sim.n_perturbations // 12), sim.n_perturbations - n_test)
        relative = os.path.relpath(cells.resolve(), splits.resolve().parent)
        last = sim.cell_types[-1]
        write_splits(
            sim, splits, cells.stem, relative, test_cell_type=last, n_test=n_test, n_val=n_val, gene_names=gene_names
        )
    if features is not None:
        write_features(sim, features, gene_names=gene_names)
    write_h5ad(sim, cells, gene_names=gene_names, on_rows=on_rows)


def _rng(stream: int, index: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([stream, index, seed])


def _cell(sim: Simulation, biology: _Biology, obs: _Obs, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the expressed genes of one cell, ascending, and their counts (both int32)."""
    rng = _rng(CELL, index, sim.seed)
    cell_type, perturbation = obs.cell_type[index], obs.perturbation[index] - 1
    library = sim.umi_per_cell * np.exp(sim.library_spread * rng.standard_normal())
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
    """Lognormal factors (size,) float32 looked up in a table: five times faster than drawing normals."""
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
    rng = _rng(ORDER, 0, sim.seed)
    order = rng.permutation(sim.n_cells)
    perturbation = np.tile(per_type, len(sim.cell_types))[order]
    cell_type = np.repeat(np.arange(len(sim.cell_types), dtype=np.int32), per_type.size)[order]
    return _Obs(perturbation, cell_type, rng.integers(sim.n_batches, size=sim.n_cells, dtype=np.int32))


@functools.lru_cache(maxsize=2)
def _biology(sim: Simulation) -> _Biology:
    rng = _rng(BIOLOGY, 0, sim.seed)
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
    depth = sim.umi_per_cell * np.exp(spread * nodes - sim.dispersion**2 / 2)  # (9,) library x noise of one gene

    def expressed(tail: float) -> float:
        rate = np.exp(tail * normal + markers)
        rate /= rate.sum(axis=1, keepdims=True)
        seen = -np.expm1(-rate[..., None] * depth) @ (weights / weights.sum())
        return float(seen.sum(axis=1).mean())

    low, high = 0.0, 8.0
    if not expressed(high) < sim.expressed_genes < expressed(low):
        raise InputError(
            f"{sim.umi_per_cell} UMIs over {sim.n_genes} genes cannot express {sim.expressed_genes} genes; "
            f"choose between {expressed(high):.0f} and {expressed(low):.0f}, or change umi_per_cell."
        )
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if expressed(middle) > sim.expressed_genes else (low, middle)
    log_rate: np.ndarray = low * normal + markers
    return log_rate


def _normal_quantiles(n: int) -> np.ndarray:
    """n equally likely values of a standard normal, ascending (n,)."""
    values: np.ndarray = ndtri((np.arange(n) + 0.5) / n)
    return values


def _gene_names(sim: Simulation, given: Sequence[str] | None) -> list[str]:
    if given is None:
        return [f"GENE{g + 1:0{max(4, len(str(sim.n_genes)))}d}" for g in range(sim.n_genes)]
    names = list(given)
    if len(names) != sim.n_genes:
        raise InputError(f"{len(names)} gene names for {sim.n_genes} genes. Pass n_genes={len(names)}.")
    if len(set(names)) != len(names) or CONTROL in names:
        raise InputError(f"Gene names must be distinct and none may be {CONTROL!r}; got {shown(names, 3)}.")
    return names


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; on success it is flushed to disk and renamed, otherwise removed."""
    if not path.parent.is_dir():
        raise InputError(f"No folder {path.parent} to write {path.name} in. Create it first.")
    partial = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
