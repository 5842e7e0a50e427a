"""The ancestor's command line: what each of its keys stands for here, and the two commands it comes to.

The ancestor (se-st-combined) ran the frozen encoder inside `se-st-train` at every step; here the same keys become one
`sest embed` into <output_dir>/cache and one `sest train` into <output_dir>/<name>. Keys of `state tx train` that have a
counterpart are taken too. A key does what it says, or is refused.

Two widths must not be mixed up. The ancestor's `hidden_dim=512` is the width of a cell's state as its head sees it, the
embedding: `sest embed --dim`. The width inside the head was another key, `st_hidden_dim=672`: `sest train --hidden`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sest.compat.overrides import Override, parse_overrides
from sest.config import EmbedConfig, TrainConfig
from sest.errors import InputError, nearest
from sest.head.preset import FULL
from sest.options import Config

EMBED, TRAIN, BOTH = "embed", "train", "embed, train"  # the key is an option of these commands
PLACE, SIZE, FIXED = "place", "size", "fixed"  # says where something lies; is compared with the data; has one value
CONFIGS: dict[str, tuple[type[Config], ...]] = {
    EMBED: (EmbedConfig,),
    TRAIN: (TrainConfig,),
    BOTH: (EmbedConfig, TrainConfig),
}
TOML, FEATURES = "data.kwargs.toml_config_path", "data.kwargs.perturbation_features_file"
SE_FOLDER, SE_CHECKPOINT = "model.kwargs.se_model_path", "model.kwargs.se_checkpoint_path"
INPUT_DIM, OUTPUT_DIM = "model.kwargs.input_dim", "model.kwargs.output_dim"
PERT_DIM, EMBEDDING_DIM = "model.kwargs.pert_dim", "model.kwargs.hidden_dim"
CHECKPOINT, DATA_ROOT = "model.checkpoint", "data_root"
OUTPUT_FOLDER, NAME = "output_dir", "name"
DEFAULT_FOLDER, DEFAULT_NAME = "outputs", "se_st_training"  # the ancestor's
CACHE = "cache"  # in the output folder
PCA, ONE_HOT = "pca", "onehot"  # words that stand for no file
FOLDERS = {"final_model": "last", "final": "last", "best_model": "best"}  # the ancestor's checkpoints that end a run

PRECISIONS = {
    **{word: word for word in ("auto", "fp32", "tf32", "bf16", "fp16")},
    **{"16": "fp16", "16-mixed": "fp16", "bf16-mixed": "bf16", "32": "fp32", "32-true": "fp32"},
}
NO_WANDB = "++wandb.project=NAME sends metrics there; they are always in metrics.jsonl of the run"
DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}


@dataclass(frozen=True)
class Key:
    """One key, and what it stands for."""

    name: str
    kind: str  # EMBED, TRAIN, BOTH, PLACE, SIZE or FIXED
    option: str = ""  # of that command, as on its command line without the dashes
    note: str = ""  # what it says, where the option's own help does not; of a FIXED key why there is one value
    words: dict[str, str] | None = None  # the ancestor's values (in lower case) and ours

    @property
    def field(self) -> str:
        """The option as a field of its configuration."""
        return self.option.replace("-", "_")


def _fixed(name: str, value: str, why: str) -> Key:
    return Key(name, FIXED, note=why, words={value: value})


_BACKBONE = "model.kwargs.transformer_backbone_kwargs."
KEYS = {
    key.name: key
    for key in (
        Key(TOML, PLACE, "splits", "required: the datasets' files and their splits"),
        Key(FEATURES, TRAIN, "perturbations"),
        Key("data.kwargs.num_workers", TRAIN, "num-workers"),
        Key("data.kwargs.pert_col", EMBED, "pert-col"),
        Key("data.kwargs.cell_type_key", EMBED, "cell-type-col"),
        Key("data.kwargs.batch_col", EMBED, "batch-col"),
        Key("data.kwargs.control_pert", EMBED, "control"),
        Key(
            "data.kwargs.basal_mapping_strategy", TRAIN, "match-controls", words={"random": "context", "batch": "batch"}
        ),
        _fixed("data.kwargs.embed_key", "null", "embeddings are made with se_model_path, not read from obsm"),
        _fixed("data.kwargs.output_space", "all", "the head predicts every gene"),
        Key("training.max_steps", TRAIN, "max-steps"),
        Key("training.ckpt_every_n_steps", TRAIN, "checkpoint-every"),
        Key("training.batch_size", TRAIN, "batch-size"),
        Key("training.lr", TRAIN, "lr"),
        Key("training.weight_decay", TRAIN, "weight-decay"),
        Key("training.val_check_interval", TRAIN, "val-every", "optimizer steps between validations [default: 500]"),
        Key("training.val_freq", TRAIN, "val-every", "the same"),
        Key("training.log_every_n_steps", TRAIN, "log-every"),
        Key("training.early_stopping", TRAIN, "early-stopping"),
        Key("training.patience", TRAIN, "patience"),
        Key("training.gradient_clip_val", TRAIN, "clip"),
        Key("training.accumulate_grad_batches", TRAIN, "accumulate"),
        Key("training.precision", TRAIN, "precision", "as Lightning names it, such as 16-mixed", PRECISIONS),
        Key("training.seed", TRAIN, "seed"),
        Key("training.train_seed", TRAIN, "seed", "the same"),
        _fixed("training.devices", "1", "for several GPUs give `torchrun` the two commands that are shown"),
        _fixed("training.wandb_track", "false", NO_WANDB),
        Key(SE_FOLDER, PLACE, "encoder", "required: the encoder's folder, or pca, which needs no weights"),
        Key(SE_CHECKPOINT, PLACE, "weights", "the weights in that folder, where it has several"),
        Key(INPUT_DIM, SIZE, note="checked: genes of the cells"),
        Key(OUTPUT_DIM, SIZE, note="checked: the same"),
        Key(PERT_DIM, SIZE, note="checked: width of the perturbation features"),
        Key(
            EMBEDDING_DIM, SIZE, "dim", "width of the embeddings, the head's input [default: 512, or the native width]"
        ),
        Key("model.kwargs.st_hidden_dim", TRAIN, "hidden"),
        Key("model.kwargs.st_cell_set_len", TRAIN, "set-size"),
        Key("model.kwargs.cell_set_len", TRAIN, "set-size", "the same"),
        Key("model.kwargs.n_encoder_layers", TRAIN, "n-encoder-layers"),
        Key("model.kwargs.n_decoder_layers", TRAIN, "n-decoder-layers"),
        Key("model.kwargs.dropout", TRAIN, "dropout"),
        Key("model.kwargs.distributional_loss", TRAIN, "loss", words={"energy": "energy", "mse": "mse"}),
        Key("model.kwargs.loss", TRAIN, "loss", "the same", {"energy": "energy", "mse": "mse"}),
        _fixed("model.kwargs.freeze_se_model", "true", "the encoder is never trained"),
        _fixed("model.kwargs.predict_residual", "true", "the head adds the encoded controls"),
        _fixed("model.kwargs.batch_encoder", "false", "the head is not told the batch"),
        _fixed("model.kwargs.mask_attn", "false", "cells of a set have no order"),
        _fixed("model.kwargs.transformer_backbone_key", "llama", "the head has Llama layers"),
        Key(_BACKBONE + "hidden_size", TRAIN, "hidden"),
        Key(_BACKBONE + "intermediate_size", TRAIN, "ffn"),
        Key(_BACKBONE + "num_hidden_layers", TRAIN, "n-layers"),
        Key(_BACKBONE + "num_attention_heads", TRAIN, "n-heads"),
        _fixed(_BACKBONE + "bidirectional_attention", "true", "cells of a set have no order"),
        _fixed(_BACKBONE + "use_rotary_embeddings", "false", "cells of a set have no order"),
        Key(OUTPUT_FOLDER, PLACE, "cache", f"folder of the cache and the runs [default: {DEFAULT_FOLDER}]"),
        Key(NAME, PLACE, "run", f"the run's folder in it [default: {DEFAULT_NAME}]"),
        Key(CHECKPOINT, PLACE, "resume", "go on from this checkpoint of another run; .ckpt is dropped [default: none]"),
        Key("seed", TRAIN, "seed"),
        Key("trainer.precision", TRAIN, "precision", "as training.precision", PRECISIONS),
        Key("accelerator", BOTH, "device", "auto, cpu or gpu [default: auto]", DEVICES),
        Key(DATA_ROOT, PLACE, "data-root", "not the ancestor's: a folder the TOML's paths may lead to [default: none]"),
        _fixed("model", "se_st_combined", "that is the model"),
        _fixed("model.name", "se_st_combined", "that is the model"),
        _fixed("save_top_k", "1", "a run keeps the best checkpoint (196 MB) and one every training.ckpt_every_n_steps"),
        _fixed("overwrite", "false", "a run is never overwritten: delete its folder, or choose another ++name"),
        _fixed("use_wandb", "false", NO_WANDB),
        _fixed("wandb.enabled", "false", NO_WANDB),
        Key("wandb.project", TRAIN, "wandb"),
    )
}
_KEY_OF = {key.option: key.name for key in reversed(KEYS.values()) if key.option}  # the first of several
_OPTION = re.compile(r"`[^`]*`|--([a-z][a-z-]*)(?: ([A-Z0-9]+)\b)?")


@dataclass(frozen=True)
class Request:
    """What a command line of the ancestor asks for. The options are those that were given, by field."""

    splits: Path
    encoder: str
    cache: Path
    run: Path
    checkpoint: str | None  # to go on from, as given
    data_roots: tuple[Path, ...]
    sizes: dict[str, int]  # key -> what the data must have
    embed: dict[str, Any]  # of EmbedConfig, without the encoder
    train: dict[str, Any]  # of TrainConfig

    def embed_command(self) -> list[str]:
        """`sest embed` as words."""
        words = ["sest", "embed", str(self.splits), "--encoder", self.encoder, "--cache", str(self.cache)]
        words += [word for root in self.data_roots for word in ("--data-root", str(root))]
        return words + _options(self.embed)

    def train_command(self, resume: str | None) -> list[str]:
        """`sest train` as words."""
        words = ["sest", "train", str(self.cache), "--run", str(self.run)]
        return words + (["--resume", resume] if resume else []) + _options(self.training(resume))

    def training(self, resume: str | None) -> dict[str, Any]:
        """Options of the training; the sizes that no key names are the ancestor's, whatever the data."""
        return self.train if resume else {**self.train, "preset": FULL}


def _options(values: dict[str, Any]) -> list[str]:
    words = []
    for field, value in values.items():
        name = field.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def read_request(words: Sequence[str]) -> Request:
    """Read overrides in Hydra's form.

    Raises:
        InputError: an unknown key, a value that means nothing here, keys that contradict each other, or a key missing.
    """
    overrides = parse_overrides(words)
    for name in overrides:
        if name not in KEYS:
            raise InputError(f"Unknown key '{name}'.{nearest(name, KEYS)} `se-st-train --help` lists those there are.")
    set_by: dict[str, Override] = {}  # option -> what set it
    options: dict[str, dict[str, Any]] = {EMBED: {}, TRAIN: {}}
    sizes: dict[str, int] = {}
    places: dict[str, str] = {}
    for override in overrides.values():
        key = KEYS[override.key]
        if override.value is None:
            continue
        if key.kind == FIXED:
            _translated(key, override)
        elif key.kind == PLACE:
            places[key.name] = override.text
        elif key.kind == SIZE:
            sizes[key.name] = _size(override)
        else:
            value, before = _option_value(key, override), set_by.setdefault(key.option, override)
            for command in key.kind.split(", "):
                if options[command].setdefault(key.field, value) != value:
                    raise InputError(f"{before} and {override} are the same option, --{key.option}. Keep one.")
    for override in overrides.values():
        if KEYS[override.key].note == NO_WANDB and "wandb" in set_by and override.value is not None:
            raise InputError(f"{override} and {set_by['wandb']} contradict each other. Keep one.")
    return _request(places, sizes, options)


def _request(places: dict[str, str], sizes: dict[str, int], options: dict[str, dict[str, Any]]) -> Request:
    if TOML not in places:
        raise InputError(f"No cells. Give ++{TOML}=FILE.toml, which lists the datasets and their splits.")
    if SE_FOLDER not in places:
        raise InputError(
            f"No encoder. Give ++{SE_FOLDER}=SE-600M, a folder with its weights, or ++{SE_FOLDER}={PCA}, the built-in "
            "encoder that needs none."
        )
    if {INPUT_DIM, OUTPUT_DIM} <= sizes.keys() and sizes[INPUT_DIM] != sizes[OUTPUT_DIM]:
        raise InputError(
            f"{INPUT_DIM} is {sizes[INPUT_DIM]} and {OUTPUT_DIM} is {sizes[OUTPUT_DIM]}, but both are the number of "
            "genes of the cells. Give one number."
        )
    if PERT_DIM in sizes and options[TRAIN].get("perturbations", ONE_HOT) == ONE_HOT:
        raise InputError(f"{PERT_DIM} is the width of a features file. Give ++{FEATURES}=FILE too, or leave it out.")
    output = Path(places.get(OUTPUT_FOLDER, DEFAULT_FOLDER))
    cache, run = output / CACHE, output / places.get(NAME, DEFAULT_NAME)
    if Path(os.path.abspath(cache)) in (Path(os.path.abspath(run)), *Path(os.path.abspath(run)).parents):
        raise InputError(f"{NAME} is {places[NAME]}, but {cache} is for the embeddings. Choose another ++{NAME}.")
    weights = _weights_name(places[SE_FOLDER], places.get(SE_CHECKPOINT))
    width = {"dim": sizes[EMBEDDING_DIM]} if EMBEDDING_DIM in sizes else {}
    return Request(
        splits=Path(places[TOML]),
        encoder=places[SE_FOLDER],
        cache=cache,
        run=run,
        checkpoint=places.get(CHECKPOINT),
        data_roots=(Path(places[DATA_ROOT]),) if DATA_ROOT in places else (),
        sizes=sizes,
        embed={**({"weights": weights} if weights else {}), **width, **options[EMBED]},
        train={"splits": places[TOML], "perturbations": ONE_HOT, **options[TRAIN]},
    )


def _weights_name(encoder: str, path: str | None) -> str | None:
    """The file name of se_checkpoint_path, which must lie in se_model_path."""
    if path is None:
        return None
    if encoder == PCA:
        raise InputError(f"{SE_CHECKPOINT} is {path}, but {SE_FOLDER}={PCA} has no weights. Leave it out.")
    folder, name = os.path.split(path)
    if folder and os.path.abspath(folder) != os.path.abspath(encoder):
        raise InputError(f"{SE_CHECKPOINT} is {path}, which is not in {SE_FOLDER}, {encoder}. Put it there.")
    return name


def _size(override: Override) -> int:
    if not isinstance(override.value, int) or isinstance(override.value, bool) or override.value < 1:
        raise InputError(f"{override}: it takes a whole number of at least 1.")
    return override.value


def _option_value(key: Key, override: Override) -> Any:
    """The value for the option, checked as its command would check it."""
    config = CONFIGS[key.kind][0]
    is_text = str in config.kinds()[key.field]
    value = _translated(key, override) if key.words else override.text if is_text else override.value
    try:
        config(**{key.field: value})
    except InputError as error:
        raise InputError(f"{override}: {error}") from error
    return value


def _translated(key: Key, override: Override) -> str:
    assert key.words is not None
    value = key.words.get(override.text.lower())
    if value is None:
        why = f": {key.note}" if key.kind == FIXED else ""
        raise InputError(f"{override} cannot be done here{why}. It takes {' or '.join(key.words)}, or leave it out.")
    return value


def checkpoint_folder(given: str) -> Path:
    """Our folder for a checkpoint of the ancestor's: .ckpt dropped, final_model is last/, best_model is best/.

    Raises:
        InputError: a .ckpt file is there, which only upstream can have written.
    """
    path = Path(given)
    if path.is_file():
        raise InputError(
            f"{path} is a checkpoint file of another program: training cannot go on from it. `sest import {path} OUT` "
            f"makes one of `state tx` into a folder that `sest predict` reads; leave {CHECKPOINT} out to train anew."
        )
    folder = path.with_suffix("") if path.suffix == ".ckpt" else path
    return folder.with_name(FOLDERS.get(folder.name, folder.name))


def in_keys(message: str) -> str:
    """An error line of `sest` in the ancestor's words: `--val-every` is ++training.val_check_interval."""

    def key(match: re.Match[str]) -> str:
        name = _KEY_OF.get(match[1]) if match[1] else None
        if name is None:
            return match[0]
        return f"++{name}" + (f"={match[2]}" if match[2] else "")

    return _OPTION.sub(key, message.replace("--resume auto", "the same command"))
