"""One frozen dataclass a stage. A default and its explanation are written here once; the command line reads them."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from sest.errors import InputError, nearest, shown

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
EMBED_PRECISIONS = (*PRECISIONS, "fp8")
COUNTS = ("auto", "raw", "log1p")
LARGEST_SEED = 2**63 - 1
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}
KINDS[type(None)] = "nothing"
RENAMED = {  # options that have another name now, by configuration
    "EmbedConfig": {"checkpoint": "weights"},
    "TrainConfig": {"controls": "match_controls"},
    "PredictConfig": {"counts": "list", "cells": "controls"},
}
# What options of several stages have in common: up to the first colon or semicolon, a name means one thing everywhere.
DEVICE = "auto, cpu, cuda or cuda:N"
PRECISION = "number format of the network"
SEED = "seed of random numbers"
PERT_COL = "obs column with the perturbation"
CELL_TYPE_COL = "obs column with the cell type"
GENE_COL = "var column with the names of the genes, or index"
CONTROL = "label of control cells, or a pattern such as 'NT*'"
LABELS = (
    "what labels are; auto: guides of controls are controls, A+ctrl is A, cells without a perturbation are left out"
)
LAYER = "layer to read instead of X; raw: raw/X"
MISSING_GENES = "genes that new cells lack: not expressed, or the mean of the cells known"
MODALITY = "part of a MuData file to read, such as rna; default: the only one"
VALUES = "what the values are; auto: found out"
ENCODER = "encoder"
CACHE = "cache of embeddings"
CHECKPOINT = "checkpoint of the run: best, last or checkpoint-step-N"
SPLITS = "splits TOML"
FEATURES = "perturbation features"
N_CELLS = "cells of each perturbation"
GENES = "file of gene names, one a line"
MIXED = "files that were normalised differently"
TARGET_SUM = "counts a cell is normalised to before log1p"


def option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), least: float | None = None, most: float | None = None
) -> Any:
    """A field of a configuration: its default, one line with its unit, and what values it takes.

    Where it takes numbers too, `choices` are the words it takes.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


@dataclass(frozen=True)
class Config:
    """What every stage's configuration can do: be checked, read from TOML and written as plain values.

    A path may be given where text is wanted, a whole number where a number is, and a number as text where text may
    stand too; it is kept as what it stands for.
    """

    _kinds: ClassVar[dict[str, tuple[type, ...]]]

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            name, kinds = f.name.replace("_", "-"), self.kinds()[f.name]
            value = _plain(getattr(self, f.name), kinds)
            object.__setattr__(self, f.name, value)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise InputError(f"{name} is {value!r}; it takes {' or '.join(KINDS[k] for k in kinds)}.")
            choices, least, most = (f.metadata[key] for key in ("choices", "least", "most"))
            if choices and isinstance(value, str) and value not in choices:
                number = "".join(f"{KINDS[k]} or " for k in kinds if k in (int, float))
                raise InputError(
                    f"{name} is {value!r}; it takes {number}one of: {', '.join(choices)}.{nearest(value, choices)}"
                )
            if isinstance(value, (int, float)) and least is not None and not value >= least:
                raise InputError(f"{name} is {value}; it must be at least {least:g}.")
            if isinstance(value, (int, float)) and most is not None and not value <= most:
                raise InputError(f"{name} is {value}; it must be at most {most:g}.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all fields."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def kinds(cls) -> dict[str, tuple[type, ...]]:
        """The types that each field takes."""
        if "_kinds" not in vars(cls):
            hints = get_type_hints(cls)
            kinds = {n: get_args(hints[n]) if isinstance(hints[n], UnionType) else (hints[n],) for n in cls.names()}
            cls._kinds = {name: tuple(get_origin(kind) or kind for kind in kinds[name]) for name in kinds}
        return cls._kinds

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build from plain values.

        Raises:
            InputError: a key that has another name now, an unknown one (with the nearest known one), or a value of the
                wrong kind.
        """
        known = cls.names()
        for key in values:
            if now := RENAMED.get(cls.__name__, {}).get(key):
                raise InputError(f"{where}: {key} is now {now}.")
            if key not in known:
                raise InputError(f"Unknown key '{key}' in {where}.{nearest(key, known)} Known: {shown(known, 60)}.")
        return cls(**values)

    def to_values(self) -> dict[str, Any]:
        """Plain values for TOML or JSON; fields that are not set are left out."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


def _plain(value: Any, kinds: tuple[type, ...]) -> Any:
    """A value as what it stands for: a path as text, "1" as 1 where both may stand, 1 as 1.0, "a, b" as two words.

    Where text may stand beside a list, commas in it mean nothing, and a list of one text is that text.
    """
    if {str, tuple} <= set(kinds) and isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else tuple(value) or None
    if isinstance(value, os.PathLike) and str in kinds:
        return os.fspath(value)
    if isinstance(value, (str, list)) and tuple in kinds and str not in kinds:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)
    number = next((kind for kind in (int, float) if kind in kinds), None)
    is_text = isinstance(value, str) and str in kinds
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if number is not None and (is_text or is_whole):
        with suppress(ValueError, OverflowError):
            return number(value)
    return value


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A training's values as an earlier sest wrote them, with today's names, and numbers that it kept as text.

    Before `val_contexts` perturbations were held out in all contexts; all runs had a head, and its val_loss monitored.
    """
    kinds, renamed = TrainConfig.kinds(), RENAMED["TrainConfig"]
    now = {"val_contexts": "all", "head": "st", "monitor": "val_loss"} | {
        renamed.get(key, key): value for key, value in values.items()
    }
    return {key: _plain(value, kinds[key]) if key in kinds else value for key, value in now.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file's keys. Dashes in keys are underscores.

    Raises:
        InputError: no such file, over 1 MB, or not TOML.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    if len(data) > 1_000_000:
        raise InputError(f"{path} is larger than 1 MB; that is no configuration file.")
    try:
        values = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    names = [key.replace("-", "_") for key in values]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path} has {twice[0]} twice, with dashes and with underscores. Keep one.")
    return dict(zip(names, values.values(), strict=True))


@dataclass(frozen=True)
class EmbedConfig(Config):
    """`sest embed`."""

    encoder: str = option(
        "",
        f"{ENCODER}: SE folder, file of weights, Hugging Face repo id, or without weights: 'pca', 'genes' (log1p of "
        "the most variable), 'obsm:KEY' (embeddings the files have)",
    )
    weights: str | None = option(
        None, "which of several files of weights in the encoder's folder, by file name; default: the only one"
    )
    dim: int | str | None = option(
        None,
        "columns of a stored embedding: a number makes a PCA of the native embedding, native keeps all of it, state "
        "adds 10 dataset columns to it, as `state emb transform`; default: 512 (genes: 2000), or the native width "
        "where that is smaller",
        choices=("native", "state"),
        least=1,
    )
    dtype: str = option("float16", "number format of the stored embeddings", choices=("float16", "float32"))
    cells: str = option("all", "which cells to embed; the others keep NaN", choices=("all", "controls"))
    counts: str = option("auto", VALUES, choices=COUNTS)
    layer: str | None = option(None, LAYER)
    modality: str | None = option(None, MODALITY)
    labels: str = option("auto", LABELS, choices=("auto", "as-is"))
    mixed_scales: str = option("refuse", MIXED, choices=("refuse", "allow"))
    pert_col: str | None = option(None, f"{PERT_COL}; default: detected")
    cell_type_col: str | None = option(None, f"{CELL_TYPE_COL}; default: detected")
    batch_col: str | None = option(None, "obs column with the batch; default: detected")
    gene_col: str | None = option(None, f"{GENE_COL}; default: the index, or where that has no names, detected")
    missing_genes: str = option("error", f"{MISSING_GENES}; with --add", choices=("error", "zero", "mean"))
    control: str | tuple[str, ...] | None = option(None, f"{CONTROL}; may be given several times; default: detected")
    batch_size: int = option(0, "cells a forward pass; 0: from the device's memory", least=0)
    device: str = option("auto", DEVICE)
    precision: str = option(
        "auto",
        f"{PRECISION}; auto: bf16 on GPUs that have it, else fp32; fp8: bf16 with the large products in 8 bits",
        choices=EMBED_PRECISIONS,
    )
    max_tokens: int | None = option(
        None,
        "read only CLS and the N - 1 most expressed genes of a cell: faster, approximate; default: all slots",
        least=2,
    )
    seed: int = option(0, f"{SEED}: of tie-breaking and of the PCA's sample", least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class TrainConfig(Config):
    """`sest train`."""

    perturbations: str = option(
        "onehot",
        f"{FEATURES}: 'onehot', 'genes' (from the control cells), 'drugs' (drug and dose of labels), a file (name -> "
        "vector: .pt, .npz, .safetensors, .pickle, .csv, .tsv), an SE folder (its proteins), or several joined by +",
    )
    splits: str | None = option(
        None, f"{SPLITS}: has [datasets], [training], [zeroshot], [fewshot]; default: all cells train"
    )
    missing_perturbations: str = option(
        "error", "perturbations without a feature vector", choices=("error", "drop", "zero")
    )
    val_fraction: float = option(
        0.05, "share of training perturbations held out where no val split is given", least=0.0
    )
    val_contexts: str = option(
        "auto",
        "where those are held out: all contexts, or one each, so that the others train them; auto: one for one-hot "
        "features, which cannot predict what did not train, else all",
        choices=("auto", "one", "all"),
    )
    max_steps: int = option(40_000, "optimizer steps in all, a resumed run's earlier ones included", least=1)
    batch_size: int = option(
        16, "sets a forward pass, of all processes together; auto (0): as many as memory holds, at most 64", least=0
    )
    set_size: int = option(128, "cells a set", least=2)
    accumulate: int = option(1, "forward passes an optimizer step", least=1)
    lr: float = option(1e-4, "learning rate of AdamW, constant", least=0.0)
    weight_decay: float = option(5e-4, "decoupled weight decay of AdamW", least=0.0)
    clip: float = option(1.0, "largest global gradient norm; 0: no clipping", least=0.0)
    loss: str = option("energy", "between predicted and real sets", choices=("energy", "mse", "energy+sinkhorn"))
    target_sum: float | str = option(10_000.0, f"{TARGET_SUM}; median: that of the cells", choices=("median",))
    mixed_scales: str = option("refuse", MIXED, choices=("refuse", "allow"))
    match_controls: str = option(
        "context", "a set's controls: same file and cell type, or also the same batch", choices=("context", "batch")
    )
    control_targets: bool = option(False, "also learn control cells from control cells")
    head: str = option("st", "State Transition, or none: the stack of baselines alone", choices=("st", "none"))
    hidden: int = option(672, "hidden width of the head", least=1)
    n_layers: int = option(4, "transformer layers", least=1)
    n_heads: int = option(8, "attention heads", least=1)
    ffn: int = option(0, "SwiGLU width; 0: 4 x hidden", least=0)
    n_encoder_layers: int = option(4, "linear layers of each input MLP", least=1)
    n_decoder_layers: int = option(4, "linear layers of the output MLP", least=1)
    dropout: float = option(0.1, "share of values dropped in the MLPs", least=0.0, most=1.0)
    val_every: int = option(500, "steps between validations", least=1)
    val_sets: int = option(
        0, "sets a validation at most, one of each cell type and perturbation at least; 0: every cell", least=0
    )
    monitor: str = option(
        "val_loss",
        "what best/ and early stopping go by; metrics over pairs as means of three validations",
        choices=("val_loss", "energy_distance", "mae", "pearson_delta", "pds"),
    )
    checkpoint_every: int = option(5_000, "steps between kept checkpoints", least=1)
    log_every: int = option(50, "steps between lines of metrics.jsonl", least=1)
    early_stopping: bool = option(False, "stop when --monitor has not improved for --patience validations")
    patience: int = option(10, "validations without improvement before stopping early", least=1)
    max_bad_steps: int = option(20, "steps in a row with a non-finite loss or gradient before giving up", least=1)
    precision: str = option(
        "auto", f"{PRECISION}; auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU", choices=PRECISIONS
    )
    compile: bool = option(False, "compile the head (CUDA graphs on GPUs): a slower start, then faster steps")
    gradients: str = option("fp32", "number format in which GPUs exchange gradients", choices=("fp32", "bf16"))
    num_workers: int = option(2, "threads that prepare batches ahead, each holding one; 0: in the loop", least=0)
    data_device: str = option(
        "auto",
        "where cells are kept: GPU memory, host memory, or files that are mapped; auto: the first they fit",
        choices=("auto", "gpu", "cpu", "disk"),
    )
    scratch: str | None = option(
        None, "folder for those files, kept for other runs; default: in the run folder, deleted at its end"
    )
    tensorboard: bool = option(False, "also write the metrics for TensorBoard, into tensorboard/ of the run folder")
    wandb: str | None = option(None, "also send the metrics to this Weights & Biases project; default: not sent")
    device: str = option("auto", DEVICE)
    seed: int = option(0, f"{SEED}: of weights, dropout, sets and their order", least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class BlendConfig(Config):
    """`sest blend`."""

    checkpoint: str | None = option(None, f"{CHECKPOINT}; default: best")
    cache: str | None = option(None, f"{CACHE}: where the run's is now; default: where the run says")
    perturbations: str | None = option(None, f"{FEATURES}: where their file is now; default: where the run says")
    device: str = option("auto", DEVICE)


@dataclass(frozen=True)
class PredictConfig(Config):
    """`sest predict`."""

    blend: str = option(
        "auto",
        "what counts: head and baselines by the weights that training fitted, or one alone; auto: the blend, or of a "
        "checkpoint without one the head",
        choices=("auto", "head", "stack", "controls"),
    )
    checkpoint: str | None = option(None, f"{CHECKPOINT}; default: best")
    cache: str | None = option(None, f"{CACHE}: where the run's is now; default: where the run says")
    perturbations: str | None = option(None, f"{FEATURES}: a file that has the perturbations; default: the run's")
    template: str | None = option(None, ".h5ad whose obs says which cells to predict; rows are grouped, names kept")
    list: str | None = option(None, "csv with the columns target_gene,n_cells: what to predict")
    only: str | tuple[str, ...] | None = option(
        None, "perturbation to predict, or several separated by commas; may be given several times"
    )
    n_cells: int = option(128, f"{N_CELLS}; with --only", least=1)
    cell_type: str | None = option(None, "cell type to predict; default: all, or with --list and --only the only one")
    controls: str | None = option(None, ".h5ad with new control cells, embedded with the run's encoder and projection")
    all_controls: bool = option(False, "all cells of --controls are unperturbed, as in an atlas")
    encoder: str | None = option(None, f"{ENCODER}: the run's, as SE folder or file of weights; with --controls")
    layer: str | None = option(None, f"{LAYER}; of --controls")
    modality: str | None = option(None, f"{MODALITY}; of --controls")
    missing_genes: str = option("error", f"{MISSING_GENES}; with --controls", choices=("error", "zero", "mean"))
    mixed_scales: str = option("refuse", f"{MIXED}: --controls and the run's cells", choices=("refuse", "allow"))
    genes: str | None = option(None, f"{GENES}: those of the output, in its order; default: the run's")
    pert_col: str | None = option(None, f"{PERT_COL}; of --template or --controls; default: the run's, or detected")
    cell_type_col: str | None = option(
        None, f"{CELL_TYPE_COL}; of --template or --controls; default: the run's, or detected"
    )
    control: str | tuple[str, ...] | None = option(
        None, f"{CONTROL}; may be given several times; of --template or --controls; default: detected"
    )
    gene_col: str | None = option(None, f"{GENE_COL}; of --controls; default: the one with most of the run's genes")
    device: str = option("auto", DEVICE)
    precision: str = option("auto", f"{PRECISION}; auto: bf16 on GPUs that have it, else fp32", choices=PRECISIONS)
    seed: int = option(0, f"{SEED}: of the choice of control cells", least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """`sest evaluate`."""

    pert_col: str | None = option(None, f"{PERT_COL}; default: detected")
    cell_type_col: str | None = option(None, f"{CELL_TYPE_COL}; default: detected")
    control: str | tuple[str, ...] | None = option(None, f"{CONTROL}; may be given several times; default: detected")
    labels: str | None = option(None, f"{LABELS}; default: the prediction's, else auto", choices=("auto", "as-is"))
    gene_col: str | None = option(None, f"{GENE_COL}; of REAL; default: the one with most of the prediction's genes")
    layer: str | None = option(None, f"{LAYER}; of REAL")
    modality: str | None = option(None, f"{MODALITY}; of REAL")
    counts: str = option("auto", f"{VALUES}; of REAL", choices=COUNTS)
    target_sum: float | None = option(None, f"{TARGET_SUM}; default: the prediction's")
    cell_eval: bool = option(True, "also run cell-eval, where it is installed")
    threads: int = option(1, "threads of cell-eval's differential expression", least=1)
    seed: int = option(
        0, f"{SEED}: of the control cells that stand for baselines in cell-eval", least=0, most=LARGEST_SEED
    )


@dataclass(frozen=True)
class ReportConfig(Config):
    """`sest report`."""

    model: bool = option(True, "predict the held-out cells and map the embeddings, which needs the cache")
    sets: int = option(
        512,
        "sets of each split to predict at most, one of each cell type and perturbation at least; 0: every cell",
        least=0,
    )
    cache: str | None = option(None, f"{CACHE}: where the run's is now; default: where the run says")
    perturbations: str | None = option(None, f"{FEATURES}: where their file is now; default: where the run says")
    device: str = option("auto", DEVICE)


RESUMABLE = (  # what a resumed run may change without becoming another run
    "mixed_scales max_steps val_every checkpoint_every log_every early_stopping patience max_bad_steps "
    "num_workers data_device scratch compile gradients device precision lr weight_decay clip tensorboard wandb"
).split()
