"""Turn an upstream `state tx` checkpoint (arc-state, Lightning) into one of our checkpoint folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sest import __version__
from sest.cache.disk import sha256_file
from sest.errors import InputError, shown
from sest.head.model import RMS_NORM_EPS, HeadSizes, StateTransition, n_parameters
from sest.outputs import check_output
from sest.runs.checkpoint import FILES, save_checkpoint, sizes_to_values
from sest.untrusted.tensors import check_finite, refuse_impostor
from sest.untrusted.unpickle import read_checkpoint

FROZEN = "transformer_backbone.embed_tokens.weight"  # an all-zero table that upstream keeps and nobody reads
LAYER = re.compile(r"transformer_backbone\.layers\.(\d{1,4})\.")
EXPECTED = {  # what no tensor tells; upstream's value where a checkpoint is silent about a switch is the same
    "transformer_backbone_key": "llama",
    "predict_residual": True,
    "batch_encoder": False,
    "mask_attn": False,
    "output_space": "gene",
    "activation": "gelu",
}
EXPECTED_OF_BACKBONE = {"bidirectional_attention": True, "rms_norm_eps": RMS_NORM_EPS, "hidden_act": "silu"}


@dataclass(frozen=True)
class TransitionCheckpoint:
    """An upstream `state tx` checkpoint."""

    tensors: dict[str, torch.Tensor]  # state_dict, float32, CPU
    hyper_parameters: dict[str, Any]  # plain values; anything else is its class name
    step: int  # optimizer steps done


def load_transition(path: Path) -> TransitionCheckpoint:
    """Load an upstream `state tx` Lightning checkpoint. Raises InputError for anything else."""
    if path.suffix != ".ckpt":
        raise InputError(f"{path.name}: an upstream `state tx` checkpoint is a .ckpt file.")
    refuse_impostor(path)
    read = read_checkpoint(path, genes=False)
    parameters, step = read.plain["hyper_parameters"], read.plain["global_step"]
    if not any(name.startswith("project_out.") for name in read.tensors) or not isinstance(parameters, dict):
        hint = " It looks like a State Embedding encoder: pass it to --encoder." if "cls_token" in read.tensors else ""
        raise InputError(f"{path.name}: this is not a `state tx` (State Transition) checkpoint.{hint}")
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in read.tensors.items()}
    check_finite(path.name, tensors)
    return TransitionCheckpoint(tensors, parameters, step if isinstance(step, int) else 0)


def import_checkpoint(source: Path, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Read an upstream checkpoint and write it as a checkpoint folder that predicts the same.

    Args:
        source: a `.ckpt` of `state tx train`.
        out: the folder to write; new or empty, or with `force` an older checkpoint to replace.

    Returns:
        The state.json of the new checkpoint.

    Raises:
        InputError: not such a checkpoint, of another architecture, or `out` exists.
    """
    check_output(out, inputs=[source], force=force, made=FILES)
    checkpoint = load_transition(source)
    sizes = _sizes(source, checkpoint)
    tensors = {name: t for name, t in checkpoint.tensors.items() if name != FROZEN}
    with torch.device("meta"):  # shapes only
        model = StateTransition(sizes)
    _check_tensors(source, tensors, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    parameters = checkpoint.hyper_parameters
    genes, set_size = parameters.get("gene_names"), parameters.get("cell_set_len")
    state = {
        "sest_version": __version__,
        "step": checkpoint.step,
        "run": {"step": checkpoint.step, "best_step": None, "best_val_loss": None, "val_loss": None},
        "sizes": sizes_to_values(sizes),
        "trainable_parameters": n_parameters(model),
        "genes": list(map(str, genes)) if isinstance(genes, list) and len(genes) == sizes.n_genes else [],
        "config": {"set_size": set_size if isinstance(set_size, int) else 128, "dropout": sizes.dropout},
        "precision": "fp32",
        "cache_sha256": None,
        "splits_sha256": None,
        "features": {"source": "upstream", "sha256": None, "width": sizes.n_features, "names": None},
        "encoder": {
            "name": str(parameters.get("embed_key") or "unknown"),
            "sha256": None,
            "licence": None,
            "genes": None,
        },
        "scale": None,
        "target_sum": None,
        "columns": {
            "perturbation": None,
            "cell_type": None,
            "batch": None,
            "control": parameters.get("control_pert"),
        },
        "imported": {"file": source.name, "sha256": sha256_file(source)},
    }
    save_checkpoint(out.resolve(), state, tensors)
    return state


def _sizes(source: Path, checkpoint: TransitionCheckpoint) -> HeadSizes:
    """Sizes from the tensors; what they cannot tell from the hyper-parameters, which are checked against our head."""
    parameters, tensors = checkpoint.hyper_parameters, checkpoint.tensors
    kwargs = parameters.get("transformer_backbone_kwargs")
    kwargs = {"bidirectional_attention": False, **(kwargs if isinstance(kwargs, dict) else {})}  # upstream's default
    other = {key: parameters.get(key) for key, value in EXPECTED.items() if parameters.get(key, value) != value}
    other |= {key: kwargs[key] for key, value in EXPECTED_OF_BACKBONE.items() if kwargs.get(key, value) != value}
    n_heads = kwargs.get("num_attention_heads")
    if kwargs.get("num_key_value_heads", n_heads) != n_heads:
        other["num_key_value_heads"] = kwargs["num_key_value_heads"]
    if other:
        what = ", ".join(f"{key}={value}" for key, value in sorted(other.items()))
        raise InputError(f"{source} is of another architecture than sest's head ({what}); it cannot be imported.")
    try:
        first, last = tensors["pert_encoder.0.weight"], _last_linear(tensors, "project_out")
        hidden, dropout = first.shape[0], parameters.get("dropout", 0.1)
        if not isinstance(n_heads, int) or n_heads < 1 or hidden % n_heads or not isinstance(dropout, int | float):
            raise InputError(f"{source} has unusable sizes: {n_heads} heads of width {hidden}, dropout {dropout}.")
        return HeadSizes(
            dim=tensors["basal_encoder.0.weight"].shape[1],
            n_features=first.shape[1],
            n_genes=tensors[f"project_out.{last}.weight"].shape[0],
            hidden=hidden,
            n_layers=1 + max((int(m[1]) for m in map(LAYER.match, tensors) if m), default=0),
            n_heads=n_heads,
            ffn=tensors["transformer_backbone.layers.0.mlp.gate_proj.weight"].shape[0],
            n_encoder_layers=_last_linear(tensors, "pert_encoder") // 3 + 1,
            n_decoder_layers=last // 3 + 1,
            dropout=float(dropout),
        )
    except KeyError as error:
        raise InputError(f"{source} has no {error.args[0]}, which sest's head has; it cannot be imported.") from error


def _last_linear(tensors: dict[str, Any], part: str) -> int:
    """Position of the last linear layer of an MLP (they stand at 0, 3, 6 ...)."""
    places = (re.fullmatch(rf"{part}\.(\d{{1,4}})\.weight", name) for name in tensors)
    return max((int(m[1]) for m in places if m), default=0)


def _check_tensors(source: Path, tensors: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    missing, more = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or more:
        raise InputError(f"{source} does not fit sest's head: it lacks {shown(missing)} and has besides {shown(more)}.")
    wrong = [f"{n} {tuple(tensors[n].shape)}" for n in expected if tuple(tensors[n].shape) != expected[n]]
    if wrong:
        raise InputError(f"{source} has tensors of other shapes than sest's head: {shown(wrong)}.")
