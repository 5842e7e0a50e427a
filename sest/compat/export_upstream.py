"""Write a head as a run folder of upstream's `state tx` (arc-state), whose classes load it and predict the same."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from sest.cache import schema
from sest.cache.disk import flush, folder_aside, write_flushed
from sest.compat.import_upstream import CONFIG, FROZEN, MAP, VAR_DIMS, WEIGHTS
from sest.encoder.choose import obsm_key
from sest.errors import InputError
from sest.head.model import RMS_NORM_EPS
from sest.outputs import check_output
from sest.runs.checkpoint import Checkpoint, find_checkpoint, sound_checkpoint
from sest.runs.known import known_without_cells
from sest.untrusted.unpickle import plain_pickle

LIGHTNING = "2.5.0"  # the version whose files these are like: Lightning changes older ones when it reads them
MADE = (CONFIG, VAR_DIMS, MAP, "checkpoints")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    checkpoint: Path
    step: int
    embed_key: str  # of obsm, where upstream looks for the embeddings
    n_perturbations: int  # with vectors; 0: the checkpoint keeps none
    has_blend: bool


def export_run(run: Path, out: Path, *, checkpoint: str | None = None, force: bool = False) -> Exported:
    """Write `out`/checkpoints/final.ckpt, config.yaml, var_dims.pkl and pert_onehot_map.pt.

    Args:
        run: a run folder, or one of its checkpoint folders.
        out: the folder to write; new or empty, or with `force` an older export to replace.
        checkpoint: which of the run; None: best.

    Raises:
        InputError: no such checkpoint, one without a head, or `out` exists.
    """
    check_output(out, inputs=[run], force=force, made=MADE)
    source = sound_checkpoint(find_checkpoint(run, checkpoint))
    model, known = source.model(), known_without_cells(source, None)
    embed_key = obsm_key(source.state["encoder"]["name"]) or schema.EMBEDDING
    parameters = _hyper_parameters(source, embed_key)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tensors[FROZEN] = torch.zeros(1, source.sizes.hidden)
    vectors = {}
    if known is not None:
        vectors = {
            n: torch.from_numpy(v.copy()) for n, v in zip(known.features.names, known.features.matrix, strict=True)
        }
    with folder_aside(out.resolve(), parents=True) as aside:
        (aside / WEIGHTS).parent.mkdir()
        content = {
            "state_dict": tensors,
            "hyper_parameters": parameters,
            "pytorch-lightning_version": LIGHTNING,
            "global_step": source.state["step"],
            "epoch": 0,
        }
        torch.save(content, aside / WEIGHTS)
        flush(aside / WEIGHTS)
        write_flushed(aside / CONFIG, yaml.safe_dump(_config(source, parameters), sort_keys=False).encode())
        names = {"gene_names": parameters["gene_names"], "pert_names": list(vectors)}
        sizes = {key: parameters[key] for key in ("input_dim", "gene_dim", "hvg_dim", "output_dim", "pert_dim")}
        write_flushed(aside / VAR_DIMS, plain_pickle({**sizes, "batch_dim": 1, **names}))
        if vectors:
            torch.save(vectors, aside / MAP)
            flush(aside / MAP)
    return Exported(source.folder, source.state["step"], embed_key, max(len(vectors) - 1, 0), source.has_blend)


def _hyper_parameters(source: Checkpoint, embed_key: str) -> dict[str, Any]:
    """What upstream's class is built with: plain values."""
    sizes, config, state = source.sizes, source.state["config"], source.state
    if not state["genes"]:
        raise InputError(f"{source.folder} does not name its genes, which upstream's model needs.")
    return {
        "input_dim": sizes.dim,
        "hidden_dim": sizes.hidden,
        "output_dim": sizes.n_genes,
        "pert_dim": sizes.n_features,
        "batch_dim": None,
        "gene_dim": sizes.n_genes,
        "hvg_dim": sizes.n_genes,
        "dropout": sizes.dropout,
        "control_pert": state["columns"]["control"],
        "embed_key": embed_key,
        "output_space": "gene",
        "gene_names": list(state["genes"]),
        "gene_decoder_bool": False,
        "decoder_cfg": None,
        "batch_size": config.get("batch_size", 16),
        "cell_set_len": config.get("set_size", 128),
        "n_encoder_layers": sizes.n_encoder_layers,
        "n_decoder_layers": sizes.n_decoder_layers,
        "activation": "gelu",
        "predict_residual": True,
        "batch_encoder": False,
        "mask_attn": False,
        "loss": "energy",
        "distributional_loss": "energy",
        "transformer_backbone_key": "llama",
        "transformer_backbone_kwargs": {
            "bidirectional_attention": True,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.ffn,
            "num_hidden_layers": sizes.n_layers,
            "num_attention_heads": sizes.n_heads,
            "num_key_value_heads": sizes.n_heads,
            "head_dim": sizes.hidden // sizes.n_heads,
            "hidden_act": "silu",
            "rms_norm_eps": RMS_NORM_EPS,
            "vocab_size": 1,  # of a table that nobody reads, as there are no tokens
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
            "max_position_embeddings": config.get("set_size", 128),
            "use_cache": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "use_rotary_embeddings": False,
        },
    }


def _config(source: Checkpoint, parameters: dict[str, Any]) -> dict[str, Any]:
    """What upstream's commands read of config.yaml."""
    columns = source.state["columns"]
    data = {
        "pert_col": columns["perturbation"],
        "cell_type_key": columns["cell_type"],
        "batch_col": columns["batch"],
        "control_pert": columns["control"],
        "embed_key": parameters["embed_key"],
        "output_space": "gene",
    }
    own = ("input_dim", "output_dim", "pert_dim", "gene_dim", "hvg_dim", "gene_names", "batch_dim")
    model = {key: value for key, value in parameters.items() if key not in own}
    return {
        "data": {"name": "PerturbationDataModule", "kwargs": data},
        "model": {"name": "state", "kwargs": model},
        "training": {"batch_size": parameters["batch_size"]},
        "name": os.path.basename(source.folder.parent),
        "output_dir": ".",
    }
