"""`Simulation`: the size and the biology of a simulated screen, as options. Imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass

from sest.errors import InputError, shown
from sest.options import LARGEST_SEED, N_CELLS, SEED, Config, option


@dataclass(frozen=True)
class Simulation(Config):
    """Size and biology of a simulated screen; every value has a default.

    The defaults make a small file that is quick to learn from; `n_genes=18_080` a full panel, 80% zeros.
    Raises InputError for sizes that cannot be.
    """

    n_cells_per_perturbation: int = option(100, f"{N_CELLS}; in each cell type", least=1)
    n_controls: int = option(400, "control cells of each cell type", least=1)
    n_perturbations: int = option(40, "perturbed genes, control not counted", least=1)
    n_genes: int = option(2000, "genes of the panel")
    cell_types: tuple[str, ...] = option(("alpha", "beta"), "names of the cell types, separated by commas")
    n_batches: int = option(2, "batches, shared by all cell types", least=1)
    n_features: int = option(64, "width of a perturbation's features")
    n_programs: int = option(8, "latent gene programs that perturbations drive", least=1)
    expressed_genes: int | None = option(
        None, "mean number of genes with counts in a cell; default: 35% of the genes, at most 3,700"
    )
    umi_per_cell: int | None = option(None, "median counts of a cell; default: 2.5 a gene, at most 15,000")
    library_spread: float = option(0.35, "standard deviation of the log library size", least=0)
    effect_size: float = option(0.7, "log fold change of a typical program gene at activity 1", least=0)
    null_fraction: float = option(0.15, "share of perturbations that move no program", least=0, most=1)
    knockdown: float = option(0.85, "mean loss of the target's expression, between 0 and 1")
    feature_noise: float = option(0.15, "standard deviation of a feature's noise; its signal has about 1.4", least=0)
    dispersion: float = option(0.5, "standard deviation of the log rate between like cells", least=0)
    batch_effect: float = option(0.08, "standard deviation of a gene's log shift between batches", least=0)
    seed: int = option(0, f"{SEED}: of everything", least=0, most=LARGEST_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.cell_types
        if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise InputError(f"cell_types must be distinct names, at least one; got {shown(names)}.")
        if self.n_genes < 50 or self.n_perturbations > self.n_genes // 4:
            raise InputError(
                f"{self.n_perturbations} perturbations need {max(50, 4 * self.n_perturbations)} genes or more "
                f"(each targets a well expressed one); n_genes is {self.n_genes}."
            )
        if self.n_features < self.n_programs:
            raise InputError(
                f"n_features {self.n_features} cannot hold {self.n_programs} programs; raise it or lower n_programs."
            )
        if not 1 <= self.mean_expressed <= min(self.n_genes - 1, self.median_umi):
            raise InputError(
                f"expressed_genes is {self.mean_expressed}; it must be at least 1, below n_genes ({self.n_genes}) "
                f"and not above umi_per_cell ({self.median_umi})."
            )
        if not 0 < self.knockdown < 1:
            raise InputError(f"knockdown is {self.knockdown}; it is a fraction between 0 and 1.")

    @property
    def mean_expressed(self) -> int:
        """`expressed_genes`, or what fits the panel."""
        return min(int(0.35 * self.n_genes), 3_700) if self.expressed_genes is None else self.expressed_genes

    @property
    def median_umi(self) -> int:
        """`umi_per_cell`, or what fits the panel."""
        return min(int(2.5 * self.n_genes), 15_000) if self.umi_per_cell is None else self.umi_per_cell

    @property
    def n_cells(self) -> int:
        """Cells in the screen, controls included."""
        return len(self.cell_types) * (self.n_controls + self.n_perturbations * self.n_cells_per_perturbation)
