"""Turn an upstream `state tx` checkpoint (arc-state, Lightning) into one of our checkpoint folders."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sest import __version__
from sest.cache.disk import sha256_file
from sest.config import TrainConfig
from sest.data.features import Features, make_features
from sest.data.vectors import Source, Vectors
from sest.encoder.align import hash_names
from sest.encoder.obsm import PREFIX
from sest.errors import InputError, shown
from sest.head.model import RMS_NORM_EPS, HeadSizes, StateTransition, n_parameters
from sest.outputs import check_output
from sest.runs.checkpoint import save_checkpoint
from sest.runs.known import CELLS
from sest.runs.schema import FILES
from sest.untrusted.plain_yaml import read_yaml
from sest.untrusted.tensors import check_finite, read_vectors, refuse_impostor
from sest.untrusted.unpickle import read_checkpoint, read_plain_pickle

logger = logging.getLogger(__name__)

TARGET_SUM = float(TrainConfig().target_sum)
WEIGHTS, CONFIG, MAP, VAR_DIMS = "checkpoints/final.ckpt", "config.yaml", "pert_onehot_map.pt", "var_dims.pkl"
BATCHES, BATCH_ENCODER = "batch_onehot_map.torch", "batch_encoder.weight"
"""In a run folder of upstream's."""
FROZEN = "transformer_backbone.embed_tokens.weight"  # an all-zero table that upstream keeps and nobody reads
LAYER = re.compile(r"transformer_backbone\.layers\.(\d{1,4})\.")
EXPECTED = {  # what no tensor tells; upstream's value where a checkpoint is silent about a switch is the same
    "transformer_backbone_key": "llama",
    "predict_residual": True,
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


@dataclass(frozen=True)
class UpstreamRun:
    """What a run folder of upstream's says beside its weights."""

    names: tuple[str, ...]  # of perturbations
    vectors: torch.Tensor  # (n, P) float32, of these
    columns: dict[str, str | None]


def read_run_folder(folder: Path) -> UpstreamRun | None:
    """Read pert_onehot_map.pt and config.yaml, without running anything in them; None where there is no map.

    Raises:
        InputError: one of them is damaged, or holds something else.
    """
    if not (folder / MAP).is_file():
        return None
    names, vectors = read_vectors(folder / MAP)
    data: Any = read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    for key in ("data", "kwargs"):
        data = data.get(key) if isinstance(data, dict) else None
    known = data if isinstance(data, dict) else {}
    keys = {"perturbation": "pert_col", "cell_type": "cell_type_key", "batch": "batch_col", "control": "control_pert"}
    columns = {name: known.get(key) for name, key in keys.items()}
    return UpstreamRun(names, vectors, {n: v if isinstance(v, str) else None for n, v in columns.items()})


def _checkpoint_in(folder: Path) -> Path:
    """The checkpoint that upstream's commands use of a run folder, or the only one in it."""
    found = sorted(folder.glob("**/*.ckpt"))
    if (folder / WEIGHTS) in found:
        return folder / WEIGHTS
    if len(found) != 1:
        there = shown(file.relative_to(folder).as_posix() for file in found) if found else "none"
        raise InputError(f"{folder} has no {WEIGHTS}, and of other .ckpt files: {there}. Name the one to import.")
    return found[0]


def import_checkpoint(
    source: Path, out: Path, *, target_sum: float = TARGET_SUM, batch: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Read an upstream checkpoint and write it as a checkpoint folder that predicts the same.

    Args:
        source: a `.ckpt` of `state tx train`, or its run folder (as on the Hugging Face hub), whose pert_onehot_map.pt
            then has the features.
        target_sum: what its targets were normalised to, which no file of upstream's says.
        batch: of a head with a batch encoder: the label of the batch whose cells are to be predicted.
        out: the folder to write; new or empty, or with `force` an older checkpoint to replace.

    Returns:
        The state.json of the new checkpoint.

    Raises:
        InputError: not such a checkpoint, of another architecture, or `out` exists.
    """
    check_output(out, inputs=[source], force=force, made=FILES)
    beside = source if source.is_dir() else source.parent.parent if source.parent.name == "checkpoints" else None
    source = _checkpoint_in(source) if source.is_dir() else source
    run = read_run_folder(beside) if beside is not None else None
    checkpoint = _of_one_batch(source, load_transition(source), beside, batch)
    sizes = _sizes(source, checkpoint)
    tensors = {name: t for name, t in checkpoint.tensors.items() if name != FROZEN}
    with torch.device("meta"):  # shapes only
        model = StateTransition(sizes)
    _check_tensors(source, tensors, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    parameters = checkpoint.hyper_parameters
    genes, set_size = _gene_names(parameters, beside, sizes.n_genes), parameters.get("cell_set_len")
    features = _features(source, run, sizes, str(parameters.get("control_pert"))) if run is not None else None
    columns = dict.fromkeys(("perturbation", "cell_type", "batch", "control")) if run is None else run.columns
    state = {
        "sest_version": __version__,
        "step": checkpoint.step,
        "run": {"step": checkpoint.step, "best_step": None, "best_val_loss": None, "val_loss": None},
        "sizes": sizes.to_values(),
        "trainable_parameters": n_parameters(model),
        "genes": genes,
        "config": {"set_size": set_size if isinstance(set_size, int) else 128, "dropout": sizes.dropout},
        "precision": "fp32",
        "cache_sha256": None,
        "splits_sha256": None,
        "features": {
            "source": "upstream" if features is None else MAP,
            "sha256": None if features is None else features.sha256,
            "width": sizes.n_features,
            "names": None,
        },
        "encoder": _encoder(parameters.get("embed_key"), sizes.dim),
        "scale": None,
        "target_sum": None if features is None else target_sum,
        "columns": {**columns, "control": parameters.get("control_pert")},
        "imported": {"file": source.name, "sha256": sha256_file(source), **({} if batch is None else {"batch": batch})},
    }
    if features is not None:
        logger.info(f"Targets of the run are taken to be log1p of counts normalised to {target_sum:g}: --target-sum.")
        state[CELLS] = {
            "perturbations": list(features.names),
            "trained": list(features.names[1:]),
            "missing": [],
            "sources": [MAP],
            "dtype": "float32",
            "is_one_scale": True,
            "normalisation": None,
        }
    kept = None if features is None else {"source-0": torch.from_numpy(features.matrix)}
    save_checkpoint(out.resolve(), state, tensors, features=kept)
    return state


def _gene_names(parameters: dict[str, Any], folder: Path | None, n_genes: int) -> list[str]:
    """The genes of the head, in its order: of its checkpoint, else of var_dims.pkl; empty where neither names them."""
    names = parameters.get("gene_names")
    if not isinstance(names, list) and folder is not None and (folder / VAR_DIMS).is_file():
        try:
            names = read_plain_pickle(folder / VAR_DIMS).get("gene_names")
        except InputError as error:
            logger.warning(f"The head's genes stay without names: {error}")
    return list(map(str, names)) if isinstance(names, list) and len(names) == n_genes else []


def _of_one_batch(
    source: Path, checkpoint: TransitionCheckpoint, folder: Path | None, batch: str | None
) -> TransitionCheckpoint:
    """A head without its batch encoder, for the cells of one batch.

    The encoder adds a vector of the batch to the encoded perturbation of every cell, and so does a bias.

    Raises:
        InputError: no batch is named, or one that it does not know; or it has no batch encoder.
    """
    tensors = dict(checkpoint.tensors)
    vectors = tensors.pop(BATCH_ENCODER, None)
    if vectors is None:
        if batch is not None:
            raise InputError(f"{source} has no batch encoder. Leave --batch out.")
        return checkpoint
    labels = [str(number) for number in range(len(vectors))]
    if folder is not None and (folder / BATCHES).is_file():
        names, rows = read_vectors(folder / BATCHES)
        labels = [name for _, name in sorted(zip(rows.argmax(1).tolist(), names, strict=True))]
        if len(labels) != len(vectors):
            raise InputError(f"{BATCHES} has {len(labels)} batches; {source.name} has {len(vectors)}.")
    if batch is None or batch not in labels:
        unknown = "" if batch is None else f" It has no batch {batch!r}."
        raise InputError(
            f"{source} was trained with a batch encoder, so it predicts the cells of one batch.{unknown} Pass --batch "
            f"with one of: {shown(labels, 20)}. Upstream takes the first for cells of other batches."
        )
    bias = f"pert_encoder.{_last_linear(tensors, 'pert_encoder')}.bias"
    tensors[bias] = tensors[bias] + vectors[labels.index(batch)]
    return dataclasses.replace(checkpoint, tensors=tensors)


def _features(source: Path, run: UpstreamRun, sizes: HeadSizes, control: str) -> Features:
    """The perturbations of a run folder and their vectors; the control first, which has none where it is not there."""
    vectors = Source(MAP, {name: row for row, name in enumerate(run.names)}, run.vectors.numpy())
    if vectors.width != sizes.n_features:
        raise InputError(f"{MAP} has vectors of width {vectors.width}; {source.name} takes {sizes.n_features}.")
    names = (control, *(name for name in run.names if name != control))
    return make_features(Vectors(MAP, (vectors,)), names, "zero", needed=frozenset())


def _encoder(embed_key: Any, dim: int) -> dict[str, Any]:
    """Where the embeddings are from: those that upstream reads from obsm, new cells must bring as well."""
    if not isinstance(embed_key, str):
        return {"name": "unknown", "sha256": None, "licence": None, "genes": None}
    name = f"{PREFIX}{embed_key}"
    made = {"max_tokens": None, "projection": "none", "seed": 0, "licence": None, "genes": None}
    return {"name": name, "sha256": hash_names([name, str(dim)]), "native_dim": dim, **made}


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
