"""One frozen dataclass a stage: every option, its default and its help."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sest.options import (
    CACHE,
    CELL_TYPE_COL,
    CHECKPOINT,
    CONTROL,
    COUNTS,
    DEVICE,
    ENCODER,
    FEATURES,
    GENE_COL,
    GENES,
    LABELS,
    LARGEST_SEED,
    LAYER,
    MAX_STEPS,
    MAX_TIME,
    MISSING_GENES,
    MIXED,
    MODALITY,
    N_CELLS,
    PERT_COL,
    PRECISION,
    PRECISIONS,
    PRESET,
    RENAMED,
    SEED,
    SPLITS,
    TARGET_SUM,
    VALUES,
    Config,
    option,
    plain,
)

VCC2025, VCC2026 = "vcc2025", "vcc2026"  # the Virtual Cell Challenges of these years


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A training's values as an earlier sest wrote them, with today's names, and numbers that it kept as text.

    Before `val_contexts` perturbations were held out in all contexts; all runs had a head, its val_loss monitored, no
    average of its weights, the genes that all files have, and one-hot features.
    """
    kinds, renamed = TrainConfig.kinds(), RENAMED["TrainConfig"]
    before = {"val_contexts": "all", "head": "st", "monitor": "val_loss", "ema": 0.0, "gene_axis": "common"}
    now = {**before, "perturbations": "onehot"} | {renamed.get(key, key): value for key, value in values.items()}
    return {key: plain(value, kinds[key]) if key in kinds else value for key, value in now.items()}


@dataclass(frozen=True)
class EmbedConfig(Config):
    """`sest embed`."""

    encoder: str = option(
        "",
        f"{ENCODER}: SE folder, file of weights, Hugging Face repo id, or without weights: 'pca', 'genes' (log1p of "
        "the most variable), 'obsm:KEY' (embeddings the files have); default: that of --like",
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
        f"{PRECISION}; auto: bf16 on GPUs that have it, else fp32",
        choices=PRECISIONS,
    )
    max_tokens: int | None = option(
        None,
        "read only CLS and the N - 1 most expressed genes of a cell: faster, approximate; default: all slots",
        least=2,
    )
    max_time: str | None = option(None, f"{MAX_TIME}; default: no limit")
    seed: int = option(0, f"{SEED}: of tie-breaking and of the PCA's sample", least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class TrainConfig(Config):
    """`sest train`."""

    perturbations: str = option(
        "auto",
        f"{FEATURES}: 'onehot', 'genes' (from the control cells), 'drugs' (drug, dose and time of labels), a file "
        "(name -> vector: .pt, .npz, .safetensors, .pickle, .csv, .tsv), an SE folder or 'encoder' (the proteins of "
        "the cache's), or several joined by +; auto: genes where all targets are measured genes, else onehot",
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
    preset: str | None = option(
        None,
        f"{PRESET}; full: the defaults below; "
        "default: auto, or full with an option for the size of the head, --init-from or --config",
        choices=("auto", "small", "medium", "full"),
    )
    max_steps: int = option(40_000, MAX_STEPS, least=1)
    batch_size: int = option(
        16,
        "sets a forward pass, of all processes together; auto (0): as many as memory holds, at most 64",
        least=0,
        most=2**20,
    )
    set_size: int = option(
        128,
        "cells a set; auto (0): about as many as half of the training pairs have, from 8 to 128",
        least=0,
        most=2**20,
    )
    accumulate: int = option(1, "forward passes an optimizer step", least=1, most=2**20)
    lr: float = option(1e-4, "learning rate of AdamW; with a schedule the highest", least=0.0)
    schedule: str = option(
        "constant",
        "of the learning rate: constant, or a half cosine to 0 at --max-steps",
        choices=("constant", "cosine"),
    )
    warmup: int = option(0, "first steps, in which the learning rate rises from 0", least=0)
    ema: float = option(
        0.0,
        "validate, and keep as best/, a moving average of the weights with this decay a step, such as 0.999; 0: the "
        "weights themselves",
        least=0.0,
        most=1.0,
    )
    weight_decay: float = option(5e-4, "decoupled weight decay of AdamW", least=0.0)
    clip: float = option(1.0, "largest global gradient norm; 0: no clipping", least=0.0)
    loss: str = option("energy", "between predicted and real sets", choices=("energy", "mse", "energy+sinkhorn"))
    target_sum: float | str = option(10_000.0, f"{TARGET_SUM}; median: that of the cells", choices=("median",))
    mixed_scales: str = option("refuse", MIXED, choices=("refuse", "allow"))
    gene_axis: str = option(
        "common",
        "genes of the head: those that all files have, or the union, of which each file trains what it measured",
        choices=("common", "union"),
    )
    match_controls: str = option(
        "context", "a set's controls: same file and cell type, or also the same batch", choices=("context", "batch")
    )
    control_targets: bool = option(False, "also learn control cells from control cells")
    init_from: str | None = option(
        None,
        "checkpoint or run whose head goes on with these cells, which must be embedded as its were (embed --like); "
        "genes and perturbations are found by name; default: a fresh head",
    )
    freeze: str | tuple[str, ...] | None = option(
        None,
        "part of that head that keeps its weights: pert_encoder, basal_encoder, transformer_backbone or project_out; "
        "may be given several times; default: all parts train",
    )
    head: str = option("st", "State Transition, or none: the stack of baselines alone", choices=("st", "none"))
    hidden: int = option(672, "hidden width of the head", least=1, most=2**16)
    n_layers: int = option(4, "transformer layers", least=1, most=512)
    n_heads: int = option(8, "attention heads", least=1, most=4096)
    ffn: int = option(0, "SwiGLU width; 0: 4 x hidden", least=0, most=2**20)
    n_encoder_layers: int = option(4, "linear layers of each input MLP", least=1, most=512)
    n_decoder_layers: int = option(4, "linear layers of the output MLP", least=1, most=512)
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
    keep_last: int = option(0, "how many of those stay, the newest; older ones are deleted; 0: all", least=0)
    max_time: str | None = option(None, f"{MAX_TIME}; default: no limit")
    log_every: int = option(50, "steps between lines of metrics.jsonl", least=1)
    early_stopping: bool = option(False, "stop when --monitor has not improved for --patience validations")
    patience: int = option(10, "validations without improvement before stopping early", least=1)
    max_bad_steps: int = option(20, "steps in a row with a non-finite loss or gradient before giving up", least=1)
    precision: str = option(
        "auto", f"{PRECISION}; auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU", choices=PRECISIONS
    )
    compile: bool | None = option(None, "compile head and loss: slower start, faster steps; default: on GPUs, see docs")
    gradients: str = option("fp32", "number format in which GPUs exchange gradients", choices=("fp32", "bf16"))
    num_workers: int = option(
        2, "threads that prepare batches ahead, each holding one; 0: in the loop", least=0, most=1024
    )
    data_device: str = option(
        "auto",
        "where cells are kept: GPU memory, host memory, or files that are mapped; auto: the first they fit",
        choices=("auto", "gpu", "cpu", "disk"),
    )
    scratch: str | None = option(
        None, "folder for those files, which stay for other runs of the same cells; default: beside the cache"
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
    list: str | None = option(
        None, "csv with the columns target_gene and, if not all have --n-cells, n_cells: what to predict"
    )
    only: str | tuple[str, ...] | None = option(
        None, "perturbation to predict, or several separated by commas; may be given several times"
    )
    all_perturbations: bool = option(False, "predict every perturbation of the run")
    n_cells: int | None = option(
        None, f"{N_CELLS}; where --list has no number; default: 128, of {VCC2026} 400", least=1
    )
    format: str = option(
        "log1p",
        "what is written: log1p or whole counts, with real controls, or a submission to the challenge: "
        f"{VCC2025} log1p with controls, {VCC2026} counts of all contexts of --controls without them",
        choices=("log1p", "counts", VCC2025, VCC2026),
    )
    target_sum: float | str | None = option(
        None,
        f"{TARGET_SUM}: of what is written; median: that of its control cells; default: the run's, of {VCC2025} median",
        choices=("median",),
    )
    effects: str | None = option(
        None,
        "table to write too, .csv or .parquet: of each perturbation and gene the mean change, fold change and, with "
        "pdex, the Wilcoxon test of the predicted cells; default: none",
    )
    with_controls: str | None = option(
        None, f"folder for a copy of each context with its control cells, as cell-eval2 takes it; of {VCC2026}"
    )
    vcc: str | None = option(
        None, f"package that `vcc submit` takes, written too, without the memory that `vcc prep` needs; of {VCC2026}"
    )
    cell_type: str | tuple[str, ...] | None = option(
        None,
        "cell type to predict; may be given several times; default: all; with --list, --only or --all-perturbations "
        "those of --controls, or the only one",
    )
    controls: str | None = option(None, ".h5ad with new control cells, embedded with the run's encoder and projection")
    all_controls: bool = option(False, "all cells of --controls are unperturbed, as in an atlas")
    encoder: str | None = option(None, f"{ENCODER}: the run's, as SE folder or file of weights; with --controls")
    layer: str | None = option(None, f"{LAYER}; of --controls")
    modality: str | None = option(None, f"{MODALITY}; of --controls")
    missing_genes: str = option("error", f"{MISSING_GENES}; with --controls", choices=("error", "zero", "mean"))
    mixed_scales: str = option("refuse", f"{MIXED}: --controls and the run's cells", choices=("refuse", "allow"))
    genes: str | None = option(
        None,
        f"{GENES}: those of the output, in its order, with --controls also some that the run lacks; default: the run's",
    )
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
    evaluation: str | None = option(
        None,
        "folder of `sest evaluate`, scores of the run's prediction; default: `evaluation` in or beside the run folder",
    )
    umap: bool = option(False, "draw a UMAP of the embeddings too; needs the extra umap")
    cache: str | None = option(None, f"{CACHE}: where the run's is now; default: where the run says")
    perturbations: str | None = option(None, f"{FEATURES}: where their file is now; default: where the run says")
    device: str = option("auto", DEVICE)


def _of(stage: type[Config], name: str, default: Any = None, help: str = "") -> Any:
    """An option of another stage under the same name, here with another default."""
    metadata = next(f for f in dataclasses.fields(stage) if f.name == name).metadata
    return dataclasses.field(default=default, metadata={**metadata, **({"help": help} if help else {})})


@dataclass(frozen=True)
class PipelineConfig(Config):
    """`sest run`: the options of its stages that matter most."""

    encoder: str = option(
        "pca", f"{ENCODER}: SE folder, file of weights, Hugging Face repo id, 'pca', 'genes' or 'obsm:KEY'"
    )
    splits: str | None = option(
        None, f"{SPLITS}: what trains and what is tested; default: chosen from the cells and written into the folder"
    )
    perturbations: str | None = option(
        None, f"{FEATURES}: a file, or a word, as of `sest train`; default: chosen from the cells"
    )
    layer: str | None = _of(EmbedConfig, "layer")
    modality: str | None = _of(EmbedConfig, "modality")
    counts: str = _of(EmbedConfig, "counts", "auto")
    labels: str = _of(EmbedConfig, "labels", "auto")
    pert_col: str | None = _of(EmbedConfig, "pert_col")
    cell_type_col: str | None = _of(EmbedConfig, "cell_type_col")
    batch_col: str | None = _of(EmbedConfig, "batch_col")
    gene_col: str | None = _of(
        EmbedConfig, "gene_col", help=f"{GENE_COL}; default: the one that has the targets of the perturbations"
    )
    control: str | tuple[str, ...] | None = _of(EmbedConfig, "control")
    head: str = _of(TrainConfig, "head", "st")
    preset: str | None = _of(TrainConfig, "preset", help=f"{PRESET}; default: auto")
    max_steps: int | None = _of(
        TrainConfig, "max_steps", help=f"{MAX_STEPS}; more of them go on with a run; default: by --preset"
    )
    device: str = option("auto", DEVICE)
    seed: int = option(0, f"{SEED}: of all stages", least=0, most=LARGEST_SEED)
