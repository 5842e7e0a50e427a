"""Run by a Python that has arc-state: its own class loads a head that sest exported, or makes one to import.

    python upstream_state.py predict FOLDER INPUTS.npz OUT.npy   forward of FOLDER/checkpoints/final.ckpt, read as
                                                                 plain values
    python upstream_state.py predict_own (the same)              of one that upstream wrote, which is unpickled
    python upstream_state.py make FOLDER [BATCH...]              a run folder of a model with random weights, with an
                                                                 encoder of these batches

Only a part of the package's own training is repeated: the files that it writes beside a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

N_GENES, N_PERTURBATIONS, SET_SIZE = 30, 5, 8
KWARGS: dict[str, Any] = {  # as configs/model/state.yaml has them, small
    "cell_set_len": SET_SIZE,
    "n_encoder_layers": 1,
    "n_decoder_layers": 1,
    "predict_residual": True,
    "distributional_loss": "energy",
    "transformer_backbone_key": "llama",
    "transformer_backbone_kwargs": {
        "bidirectional_attention": True,
        "max_position_embeddings": SET_SIZE,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "use_cache": False,
        "tie_word_embeddings": False,
        "vocab_size": 64,
    },
}


def _quiet(make: Any, *args: Any, **kwargs: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return make(*args, **kwargs)


def _class() -> Any:
    return importlib.import_module("state.tx.models.state_transition").StateTransitionPerturbationModel


def predict(folder: Path, inputs: Path, out: Path, **how: Any) -> None:
    """Predict a set with upstream's class."""
    file = str(folder / "checkpoints/final.ckpt")
    model = _quiet(_class().load_from_checkpoint, file, map_location="cpu", **how).eval()
    given = np.load(inputs)
    batch = {"pert_emb": torch.from_numpy(given["pert"]), "ctrl_cell_emb": torch.from_numpy(given["basal"])}
    if "batch" in given:
        batch["batch"] = torch.from_numpy(given["batch"])
    with torch.inference_mode():
        np.save(out, model(batch, padded=False).numpy())


def make(folder: Path, *batches: Path) -> None:
    """Write what `state tx train` leaves of a head on highly variable genes."""
    lightning = importlib.import_module("lightning.pytorch")
    torch.manual_seed(0)
    genes = [f"g{i}" for i in range(N_GENES)]
    model = _quiet(
        _class(),
        input_dim=N_GENES,
        hidden_dim=24,
        output_dim=N_GENES,
        pert_dim=N_PERTURBATIONS,
        gene_dim=N_GENES,
        hvg_dim=N_GENES,
        embed_key="X_hvg",
        output_space="gene",
        control_pert="ctrl",
        gene_names=genes,
        gene_decoder_bool=False,
        batch_dim=len(batches) or None,
        batch_encoder=bool(batches),
        **KWARGS,
    )
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    (folder / "checkpoints").mkdir(parents=True)
    trainer.save_checkpoint(folder / "checkpoints/final.ckpt")
    names = ["ctrl", "P", "Q", "R", "S"]
    torch.save({n: torch.eye(N_PERTURBATIONS)[i] for i, n in enumerate(names)}, folder / "pert_onehot_map.pt")
    if batches:
        named = {str(name): torch.eye(len(batches))[i] for i, name in enumerate(batches)}
        torch.save(named, folder / "batch_onehot_map.torch")
    dims = {"input_dim": N_GENES, "output_dim": N_GENES, "pert_dim": N_PERTURBATIONS, "gene_names": genes}
    (folder / "var_dims.pkl").write_bytes(pickle.dumps(dims))
    (folder / "config.yaml").write_text("data:\n  kwargs: {pert_col: gene, cell_type_key: kind, control_pert: ctrl}\n")


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    predict_own = functools.partial(predict, weights_only=False)
    commands: dict[str, Any] = {"predict": predict, "predict_own": predict_own, "make": make}
    commands[command](*map(Path, paths))
