"""The whole pipeline on a simulated Perturb-seq experiment: what `sest demo` runs and `make demo` shows.

Two cell types; in one of them some perturbations are held out. The head sees their features and what they do in the
other cell type, so it can beat both "nothing happens" and "the same as elsewhere".
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from sest.config import EmbedConfig, EvaluateConfig, TrainConfig
from sest.outputs import check_output
from sest.pipeline.stages import MADE as MADE_BY_STAGES
from sest.pipeline.stages import Ledger, PipelineResult, Plan, Watcher, as_options, carry_out, command_line
from sest.simulation.screen import write_screen
from sest.simulation.simulation import Simulation

SIMULATED = ("cells.h5ad", "features.safetensors", "starter.toml")
MADE = (*SIMULATED, *MADE_BY_STAGES)
DIM = 64  # stored width of the embeddings
SIMULATION = Simulation()
QUICK_SIMULATION = Simulation(
    n_cells_per_perturbation=30, n_controls=80, n_perturbations=12, n_genes=300, expressed_genes=120, umi_per_cell=600
)
TRAINING = TrainConfig(
    max_steps=600,
    batch_size=16,
    set_size=32,
    lr=2e-3,
    hidden=128,
    n_layers=1,
    n_heads=4,
    n_encoder_layers=2,
    n_decoder_layers=2,
    dropout=0.0,  # noise that is gone at prediction would stand for the variation between cells
    val_every=100,
    checkpoint_every=300,
    log_every=25,
    num_workers=2,
)
QUICK_TRAINING = TrainConfig(
    max_steps=20,
    batch_size=4,
    set_size=16,
    hidden=32,
    n_layers=1,
    n_heads=2,
    val_every=10,
    checkpoint_every=10,
    log_every=5,
    num_workers=1,
)


def run_demo(
    out: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    force: bool = False,
    watcher: Watcher | None = None,
) -> PipelineResult:
    """Simulate, then embed, train, predict, evaluate and report, as `sest run` does.

    Args:
        out: a new folder for everything.
        quick: tiny sizes, to see that everything works; its figures mean nothing.
        seed: of the simulation and the training.
        force: delete what an earlier demo left in `out`.
        watcher: is told of every step, the command line that does the same among it.

    Raises:
        InputError: `out` exists and is not empty, or holds something else than a demo.
    """
    out, watcher = Path(out), watcher or Watcher()
    check_output(out, force=force, made=MADE)
    out.mkdir(parents=True, exist_ok=True)
    for older in out.iterdir():
        if older.is_dir() and not older.is_symlink():
            shutil.rmtree(older)
        else:
            older.unlink()
    simulation = replace(QUICK_SIMULATION if quick else SIMULATION, seed=seed)
    cells, features, splits = (out / name for name in SIMULATED)
    options = as_options(_simulation_values(simulation), _simulation_values(SIMULATION))
    watcher.command(command_line("simulate", cells, "--features", features, "--splits", splits, *options))
    write_screen(simulation, cells, features, splits)
    training, usual = (QUICK_TRAINING if quick else TRAINING).to_values() | {"seed": seed}, TrainConfig().to_values()
    given = {key: value for key, value in training.items() if value != usual.get(key)}
    plan = Plan(
        cells=cells,
        folder=out,
        splits=splits,
        embed=EmbedConfig(encoder="pca", dim=DIM, seed=seed),
        train={**given, "perturbations": str(features), "splits": str(splits)},
        evaluate=EvaluateConfig(cell_eval=False),
    )
    return carry_out(plan, watcher, Ledger())


def _simulation_values(simulation: Simulation) -> dict[str, object]:
    return {key.removesuffix("_per_perturbation"): value for key, value in asdict(simulation).items()}
