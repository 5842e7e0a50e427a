"""One frozen dataclass a stage. A default and its explanation are written here once; the command line reads them."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_type_hints

from sest.errors import InputError, nearest, shown

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
EMBED_PRECISIONS = (*PRECISIONS, "fp8")
LARGEST_SEED = 2**63 - 1
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}


def option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), least: float | None = None, most: float | None = None
) -> Any:
    """A field of a configuration: its default, one line with its unit, and what values it takes."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


@dataclass(frozen=True)
class Config:
    """What every stage's configuration can do: be checked, read from TOML and written as plain values."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value, name = getattr(self, f.name), f.name.replace("_", "-")
            kinds = get_args(hints[f.name]) if isinstance(hints[f.name], UnionType) else (hints[f.name],)
            if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
                object.__setattr__(self, f.name, float(value))
                value = float(value)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise InputError(f"{name} is {value!r}; it takes {' or '.join(KINDS[k] for k in kinds)}.")
            choices, least, most = (f.metadata[key] for key in ("choices", "least", "most"))
            if choices and value not in choices:
                raise InputError(
                    f"{name} is {value!r}; it takes one of: {', '.join(choices)}.{nearest(str(value), choices)}"
                )
            if least is not None and value is not None and not value >= least:
                raise InputError(f"{name} is {value}; it must be at least {least:g}.")
            if most is not None and value is not None and not value <= most:
                raise InputError(f"{name} is {value}; it must be at most {most:g}.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all fields."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def from_values(cls, values: dict[str, Any], where: str) -> Self:
        """Build from plain values.

        Raises:
            InputError: an unknown key (with the nearest known one), or a value of the wrong kind.
        """
        known = cls.names()
        for key in values:
            if key not in known:
                raise InputError(f"Unknown key '{key}' in {where}.{nearest(key, known)} Known: {shown(known, 60)}.")
        return cls(**values)

    def to_values(self) -> dict[str, Any]:
        """Plain values for TOML or JSON; fields that are not set are left out."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


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

    encoder: str = option("", "SE folder, checkpoint file, Hugging Face repo id, or 'pca' (needs no weights)")
    checkpoint: str | None = option(None, "which of several checkpoints in the encoder folder, by file name")
    dim: str | None = option(
        None,
        "stored width: a number (PCA of the native embedding), 'native', or 'state' (CLS + 10 dataset columns, "
        "as `state emb transform`); default: 512, or the native width where that is smaller",
    )
    dtype: str = option("float16", "of the stored embeddings", choices=("float16", "float32"))
    cells: str = option("all", "which cells to embed; the others keep NaN", choices=("all", "controls"))
    counts: str = option("auto", "what X holds", choices=("auto", "raw", "log1p"))
    layer: str | None = option(None, "read this layer instead of X")
    pert_col: str | None = option(None, "obs column with the perturbation; default: detected")
    cell_type_col: str | None = option(None, "obs column with the cell type; default: detected")
    batch_col: str | None = option(None, "obs column with the batch; default: detected")
    control: str | None = option(None, "label of control cells; default: detected")
    batch_size: int = option(0, "cells a forward pass; 0: from the device's memory", least=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: str = option(
        "auto",
        "of the encoder; auto: bf16 on GPUs that have it, else fp32; fp8: bf16 with the large products in 8 bits",
        choices=EMBED_PRECISIONS,
    )
    max_tokens: int | None = option(
        None,
        "read only CLS and the N - 1 most expressed genes of a cell: faster, approximate; default: all slots",
        least=2,
    )
    seed: int = option(0, "of tie-breaking and of the PCA's sample", least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class TrainConfig(Config):
    """`sest train`."""

    perturbations: str = option(
        "onehot", "perturbation features: a .pt, .npz or .safetensors file (name -> vector), or 'onehot'"
    )
    splits: str | None = option(
        None, "TOML with [datasets], [training], [zeroshot], [fewshot]; default: all cells train"
    )
    missing_perturbations: str = option(
        "error", "perturbations without a feature vector", choices=("error", "drop", "zero")
    )
    val_fraction: float = option(
        0.05, "share of training perturbations held out where no val split is given", least=0.0
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
    target_sum: str = option("10000", "counts a cell is normalised to before log1p: a number, or 'median'")
    controls: str = option(
        "context", "a set's controls: same file and cell type, or also the same batch", choices=("context", "batch")
    )
    control_targets: bool = option(False, "also learn control cells from control cells")
    hidden: int = option(672, "hidden width of the head", least=1)
    n_layers: int = option(4, "transformer layers", least=1)
    n_heads: int = option(8, "attention heads", least=1)
    ffn: int = option(0, "SwiGLU width; 0: 4 x hidden", least=0)
    n_encoder_layers: int = option(4, "linear layers of each input MLP", least=1)
    n_decoder_layers: int = option(4, "linear layers of the output MLP", least=1)
    dropout: float = option(0.1, "in the MLPs", least=0.0, most=1.0)
    val_every: int = option(500, "steps between validations", least=1)
    val_sets: int = option(
        0, "sets a validation at most, one of each cell type and perturbation at least; 0: every cell", least=0
    )
    checkpoint_every: int = option(5_000, "steps between kept checkpoints", least=1)
    log_every: int = option(50, "steps between lines of metrics.jsonl", least=1)
    early_stopping: bool = option(False, "stop when val_loss has not improved for --patience validations")
    patience: int = option(10, "validations without improvement before stopping early", least=1)
    max_bad_steps: int = option(20, "steps in a row with a non-finite loss or gradient before giving up", least=1)
    precision: str = option(
        "auto", "auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU", choices=PRECISIONS
    )
    compile: bool = option(False, "compile the head (CUDA graphs on GPUs): a slower start, then faster steps")
    gradients: str = option("fp32", "as which several GPUs exchange gradients", choices=("fp32", "bf16"))
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
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(0, "of weights, dropout, sets and their order", least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class PredictConfig(Config):
    """`sest predict`."""

    checkpoint: str | None = option(None, "of the run: best, last or checkpoint-step-N; default: best")
    cache: str | None = option(None, "store with the control cells; default: the one the run was trained on")
    perturbations: str | None = option(None, "features file; default: the run's")
    template: str | None = option(None, ".h5ad whose obs says which cells to predict; rows are grouped, names kept")
    counts: str | None = option(None, "csv with the columns target_gene,n_cells: what to predict")
    only: str | None = option(None, "perturbations to predict, separated by commas")
    n_cells: int = option(128, "cells a perturbation, with --only", least=1)
    cell_type: str | None = option(None, "cell type of the controls, with --counts and --only")
    cells: str | None = option(None, ".h5ad with new control cells, embedded with the run's encoder and projection")
    encoder: str | None = option(None, "the run's SE folder or checkpoint file, with --cells")
    layer: str | None = option(None, "layer of --cells to read instead of X")
    genes: str | None = option(None, "csv of gene names: the output has these, in this order")
    pert_col: str | None = option(None, "obs column of --template or --cells; default: as in the run, or detected")
    cell_type_col: str | None = option(None, "obs column of --template or --cells; default: as in the run, or detected")
    control: str | None = option(None, "control label of --template or --cells; default: detected")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: str = option("auto", "of the head; auto: bf16 on GPUs that have it, else fp32", choices=PRECISIONS)
    seed: int = option(0, "of the choice of control cells", least=0, most=LARGEST_SEED)


RESUMABLE = (  # what a resumed run may change without becoming another run
    "max_steps val_every checkpoint_every log_every early_stopping patience max_bad_steps "
    "num_workers data_device scratch compile gradients device precision lr weight_decay clip tensorboard wandb"
).split()
