"""The small screen that the tests of the simulation share."""

from __future__ import annotations

from sest.simulation.simulation import Simulation

TINY = Simulation(
    n_cells_per_perturbation=5, n_controls=20, n_perturbations=6, n_genes=120, expressed_genes=60, umi_per_cell=400
)
