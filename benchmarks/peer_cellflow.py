"""cellflow-tools (0.0.6) on one fold of peers.py, by an interpreter that has it: python peer_cellflow.py FOLDER OUT.npy

Flow matching from control to perturbed cells in 50 principal components of the training cells, as its tutorials do it;
conditions are the targets' vectors, pooled by attention. Its networks of 2,048 to 4,096 units a layer are for a GPU:
here they have WIDTH, train ITERATIONS of BATCH_SIZE cells with Adam, and flows are solved to TOLERANCE.
FOLDER has data/*.h5ad (X log1p; obs gene, cell_type, split), vectors.npz (names (n,), vectors (n, P)) and inputs.npz
(basal (n, S, G), name and cell_type (n,)).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import cellflow
import diffrax
import jax
import numpy as np
import optax
import pandas as pd
import scipy.sparse as sp
from cellflow.model import CellFlow

CONTROLS = {"control", "non-targeting"}
COMPONENTS, WIDTH, CONDITION_WIDTH = 50, 512, 128
ITERATIONS, BATCH_SIZE, LR, TOLERANCE = 2000, 256, 3e-4, 1e-2
TARGETS, NONE = ("target_1", "target_2"), "none"


def labelled(names: list[str], cell_types: list[str]) -> pd.DataFrame:
    """obs as cellflow reads it: two targets a cell, the second one perhaps none."""
    split = [[] if name in CONTROLS else name.split("+") for name in names]
    table = {key: [one[i] if i < len(one) else NONE for one in split] for i, key in enumerate(TARGETS)}
    obs = pd.DataFrame(table | {"cell_type": cell_types}).astype("category")
    obs["control"] = np.array([not one for one in split])
    obs.index = obs.index.astype(str)
    return obs


def flow_of(model: CellFlow) -> Callable[[np.ndarray, dict[str, np.ndarray]], jax.Array]:
    """What `CellFlow.predict` does with (S, components) cells and a condition, compiled once and not for every pair."""
    state, noise = model.solver.vf_state, np.zeros((1, CONDITION_WIDTH), np.float32)

    def field(time: jax.Array, cell: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        return state.apply_fn({"params": state.params}, time, cell, condition, noise, train=False)[0]

    def solved(cell: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        term, steps = diffrax.ODETerm(field), diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)
        found = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, None, cell, condition, stepsize_controller=steps)
        return found.ys[0]

    return jax.jit(jax.vmap(solved, in_axes=(0, None)))


def main(folder: Path, out: Path) -> None:
    """Train on the fold's training cells and predict its sets."""
    given, whole = np.load(folder / "inputs.npz"), ad.read_h5ad(next((folder / "data").glob("*.h5ad")))
    kept = np.load(folder / "vectors.npz")
    vectors = dict(zip(kept["names"].tolist(), kept["vectors"].astype(np.float32), strict=True))
    names, kinds = whole.obs["gene"].astype(str).tolist(), whole.obs["cell_type"].astype(str).tolist()
    obs = labelled(names, kinds)
    trains = (whole.obs["split"].astype(str) == "train").to_numpy() & ~obs["control"].to_numpy()
    use = trains | (obs["control"].to_numpy() & obs["cell_type"].isin(set(obs["cell_type"][trains])).to_numpy())
    dense = np.asarray(whole.X.todense() if sp.issparse(whole.X) else whole.X, np.float32)
    cells = ad.AnnData(sp.csr_matrix(dense[use]), obs=obs[use].copy(), var=pd.DataFrame(index=whole.var_names))
    for key in ("target_1", "target_2", "cell_type"):
        cells.obs[key] = cells.obs[key].cat.remove_unused_categories()
    cellflow.pp.centered_pca(cells, n_comps=COMPONENTS)
    width = len(next(iter(vectors.values())))
    cells.uns["vectors"] = vectors | {NONE: np.zeros(width, np.float32)}
    model = CellFlow(cells, solver="otfm")
    model.prepare_data(
        sample_rep="X_pca",
        control_key="control",
        perturbation_covariates={"perturbation": TARGETS},
        perturbation_covariate_reps={"perturbation": "vectors"},
        split_covariates=["cell_type"],
    )
    model.prepare_model(
        condition_embedding_dim=CONDITION_WIDTH,
        hidden_dims=(WIDTH,) * 3,
        decoder_dims=(WIDTH,) * 3,
        time_encoder_dims=(WIDTH,) * 3,
        optimizer=optax.adam(LR),
        cond_output_dropout=0.1,
    )
    model.train(num_iterations=ITERATIONS, batch_size=BATCH_SIZE, valid_freq=10 * ITERATIONS)
    mean, axes, flow = np.asarray(cells.varm["X_mean"]).reshape(-1), np.asarray(cells.varm["PCs"]), flow_of(model)
    found = np.empty(given["basal"].shape, np.float32)
    for number, (basal, name) in enumerate(zip(given["basal"], given["name"].tolist(), strict=True)):
        targets = [*name.split("+"), NONE][: len(TARGETS)]
        condition = np.stack([cells.uns["vectors"][target] for target in targets])[None]
        moved = flow(((basal - mean) @ axes).astype(np.float32), {"perturbation": condition})
        found[number] = np.asarray(moved) @ axes.T + mean
    np.save(out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
