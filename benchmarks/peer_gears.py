"""cell-gears (0.1.2) on one fold of peers.py, by an interpreter that has it: python peer_gears.py FOLDER OUT.npy

As its tutorial trains it: 20 epochs, batches of 32, hidden size 64, lr 1e-3, on cells of the one cell type that is
predicted. Its perturbation graph is made from gene ontology terms that it downloads: without internet every
perturbation has a node without neighbours, so all that it knows of one is from cells with that target.
FOLDER has data/*.h5ad (X log1p; obs gene, cell_type, split) and inputs.npz (basal (n, S, G), name and cell_type (n,)).
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from gears import GEARS, PertData
from gears.utils import create_cell_graph_for_prediction
from torch_geometric.loader import DataLoader

CONTROLS = {"control", "non-targeting"}
EPOCHS, BATCH_SIZE, HIDDEN, LR = 20, 32, 64, 1e-3


def condition_of(label: str) -> str:
    """A label as GEARS writes it: ctrl, A+ctrl or A+B."""
    if label in CONTROLS:
        return "ctrl"
    return label if "+" in label else f"{label}+ctrl"


def main(folder: Path, out: Path) -> None:
    """Train on the fold's training cells and predict its sets."""
    given = np.load(folder / "inputs.npz")
    whole = ad.read_h5ad(next((folder / "data").glob("*.h5ad")))
    whole = whole[whole.obs["cell_type"].isin(given["cell_type"].tolist())].copy()
    obs = pd.DataFrame(
        {"condition": [condition_of(label) for label in whole.obs["gene"].astype(str)], "cell_type": "cells"},
        index=whole.obs_names,
    )
    cells = ad.AnnData(sp.csr_matrix(whole.X), obs=obs, var=pd.DataFrame(index=whole.var_names))
    cells.var["gene_name"] = cells.var_names.to_numpy()
    targets = sorted({target for label in obs["condition"] for target in label.split("+")} - {"ctrl"})
    with tempfile.TemporaryDirectory() as scratch:
        genes = {name: {"GO:0"} for name in (*cells.var_names, *targets)}
        (Path(scratch) / "gene2go_all.pkl").write_bytes(pickle.dumps(genes))
        data = PertData(scratch, default_pert_graph=False)
        data.new_data_process("fold", adata=cells)
        split_of = dict(zip(obs["condition"], whole.obs["split"].astype(str), strict=True)) | {"ctrl": "train"}
        splits = {s: [c for c, own in split_of.items() if own == s] for s in ("train", "val", "test")}
        (Path(scratch) / "splits.pkl").write_bytes(pickle.dumps(splits))
        data.prepare_split("custom", split_dict_path=str(Path(scratch) / "splits.pkl"))
        data.get_dataloader(batch_size=BATCH_SIZE, test_batch_size=128)
        model = GEARS(data, device="cpu")
        alone = torch.arange(len(data.pert_names)).repeat(2, 1)
        model.model_initialize(hidden_size=HIDDEN, G_go=alone, G_go_weight=torch.ones(alone.shape[1]))
        model.train(epochs=EPOCHS, lr=LR)
    place, found = {name: i for i, name in enumerate(model.pert_list)}, []
    network = model.best_model.eval()
    for basal, name in zip(given["basal"], given["name"].tolist(), strict=True):
        names = name.split("+")
        graphs = [create_cell_graph_for_prediction(row, [place[n] for n in names], names) for row in basal[:, None]]
        with torch.inference_mode():
            found.append(network(next(iter(DataLoader(graphs, len(graphs))))).numpy())
    np.save(out, np.stack(found).astype(np.float32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
