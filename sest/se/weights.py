"""The weights of a State Embedding encoder: finding and loading them, and the fast copy of a `.ckpt`.

Every file is untrusted (docs/design.md, Untrusted files). Whatever is wrong with one becomes an InputError of one line.
Sizes: T token_dim, D d_model, H d_hid, O output_dim.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sest.cache.disk import file_aside
from sest.errors import InputError, nearest, shown
from sest.untrusted.plain_yaml import parse_yaml, read_yaml
from sest.untrusted.tensors import check_finite, read_safetensors, read_vectors, refuse_impostor, stack_vectors
from sest.untrusted.unpickle import Checkpoint, damaged, read_checkpoint

logger = logging.getLogger(__name__)

COPY_SUFFIX = ".sest.safetensors"  # <stem of the .ckpt>.sest.safetensors, written by save_safetensors_copy
GENES_FILE, CONFIG_FILE = "protein_embeddings.pt", "config.yaml"
_HOW_TO_GET = (
    f"An SE folder holds a .ckpt or .safetensors, {GENES_FILE} and {CONFIG_FILE}; get one with "
    "`huggingface-cli download arcinstitute/SE-600M --local-dir SE-600M`."
)
LARGEST_SETTING = 2**16  # slots of a sentence, of which SE-600M has 2,048; attention grows with their square
_SETTINGS = {  # our name: (where upstream's config has it, its default, smallest sensible value)
    "n_heads": (("model", "nhead"), None, 1),
    "pad_length": (("dataset", "pad_length"), None, 2),
    "cls_count_gene": (("dataset", "cls_token_idx"), 3, 0),
}
# Linear and LayerNorm modules of the SE model -> axes of their weight; a bias has the first. Equal letters are equal
# sizes: T token_dim, D d_model, H d_hid, O output_dim, R width inside the decoder, B count bins, C width of the count
# network. Source: state_dict of arc-state 0.11.1; its training heads (binary_decoder, dataset_encoder) are not needed.
_MODULES = {
    "encoder.0": "D T",
    "encoder.1": "D",
    "count_encoder.0": "C 1",
    "count_encoder.2": "B C",
    "decoder.0.intermediate_dense": "R D",
    "decoder.0.dense": "D R",
    "decoder.0.layer_norm": "D",
    "decoder.1": "O D",
    "dataset_embedder": "10 O",
}
_LAYER = {"qkv_proj": "3D D", "out_proj": "D D", "linear1": "H D", "linear2": "D H", "norm1": "D", "norm2": "D"}
_HASH_BLOCK = 2**26


@dataclass(frozen=True)
class EncoderFiles:
    """The files of one State Embedding encoder."""

    weights: Path  # *.ckpt or *.safetensors
    protein_embeddings: Path | None
    config: Path | None  # config.yaml


@dataclass(frozen=True)
class EncoderWeights:
    """A State Embedding encoder, checked: every tensor of the model is there, of fitting shape and finite."""

    tensors: dict[str, torch.Tensor]  # state_dict, float32, CPU, memory-mapped where stored as float32
    n_heads: int
    pad_length: int  # tokens a cell, CLS included
    cls_count_gene: int  # whose kept gene's weight the CLS slot carries
    genes: tuple[str, ...]  # token index -> symbol
    gene_vectors: torch.Tensor  # (n_genes, T) float32, not normalised
    sha256: str  # of all of the above: the same for a .ckpt and its safetensors copy
    source: str  # file name of the weights (of the .ckpt, if its copy was read)


def find_encoder(path: Path, checkpoint: str | None = None) -> EncoderFiles:
    """Find the weights in the SE folder `path` (or the weights file `path`) and the files beside them.

    `checkpoint` names one of several weights files. A copy that save_safetensors_copy made stands for its `.ckpt`
    while that is unchanged. Raises InputError if nothing, or not exactly one candidate, is found.
    """
    if path.is_file():
        if path.suffix not in (".ckpt", ".safetensors"):
            raise InputError(
                f"{path.name} is not a checkpoint (.ckpt or .safetensors). A .pt file holds vectors of genes or "
                f"perturbations: name the folder it lies in. {_HOW_TO_GET}"
            )
        if checkpoint not in (None, path.name):
            raise InputError(f"{path} is one file: drop --weights {checkpoint}, or name the folder {path.parent}.")
        return _files(path)
    if not path.is_dir():
        raise InputError(f"No SE folder or checkpoint at {path}. {_HOW_TO_GET}")
    found = sorted(f for f in path.iterdir() if f.suffix in (".ckpt", ".safetensors") and f.is_file())
    if not found:
        raise InputError(f"No checkpoint in {path}. It holds: {shown(sorted(os.listdir(path)))}. {_HOW_TO_GET}")
    if checkpoint is not None:
        by_name = {file.name: file for file in found}
        if checkpoint not in by_name:
            raise InputError(
                f"No checkpoint {checkpoint!r} in {path}.{nearest(checkpoint, by_name)} It holds: {shown(by_name)}."
            )
        return _files(by_name[checkpoint])
    originals = [file for file in found if _original(file) not in found]
    if len(originals) > 1:
        names = shown(file.name for file in originals)
        raise InputError(f"Several checkpoints in {path}: {names}. Choose one with --weights NAME.")
    return _files(originals[0])


def _original(file: Path) -> Path | None:
    """The .ckpt that `file`, by its name, is a copy of."""
    return file.with_name(file.name.removesuffix(COPY_SUFFIX) + ".ckpt") if file.name.endswith(COPY_SUFFIX) else None


def _files(weights: Path) -> EncoderFiles:
    """Add the files beside `weights`, and choose between a .ckpt and its copy."""
    genes, config = weights.with_name(GENES_FILE), weights.with_name(CONFIG_FILE)
    original = _original(weights)
    if original is not None and original.is_file():
        weights = original
    copy = weights.with_name(weights.stem + COPY_SUFFIX)
    if weights.suffix == ".ckpt" and genes.is_file() and copy.is_file():  # a copy has no gene vectors of its own
        if _is_copy(copy, weights):
            weights = copy
        else:
            logger.warning("%s is ignored: it is not a copy of the present %s", copy.name, weights.name)
    return EncoderFiles(weights, genes if genes.is_file() else None, config if config.is_file() else None)


def _is_copy(copy: Path, original: Path) -> bool:
    try:
        record = _record(copy)
    except InputError:  # damaged: the original is there
        return False
    return record.get("size") == original.stat().st_size and record.get("sha256") == _sha256(original)


def _record(path: Path) -> dict[str, Any]:
    """What save_safetensors_copy noted in the metadata of `path`; empty for any other safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("sest", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    return record if isinstance(record, dict) else {}


def _sha256(path: Path) -> str:
    """Hash of a file's content: of the SHA-256 of its blocks of 64 MB, which all cores hash at once."""
    n_blocks = -(-path.stat().st_size // _HASH_BLOCK)

    def block(number: int) -> bytes:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(number * _HASH_BLOCK)
            left = _HASH_BLOCK
            while left and (data := file.read(min(left, 2**20))):
                digest.update(data)
                left -= len(data)
        return digest.digest()

    with ThreadPoolExecutor() as threads:
        return hashlib.sha256(b"".join(threads.map(block, range(n_blocks)))).hexdigest()


def load_encoder(path: Path, checkpoint: str | None = None) -> EncoderWeights:
    """Load the State Embedding encoder at `path` (an SE folder or a weights file), see find_encoder.

    Sizes come from the tensors; heads and pad_length from the checkpoint, else from config.yaml beside it; genes from
    protein_embeddings.pt, else from the checkpoint. Writes nothing. Raises InputError naming what does not fit.
    """
    files = find_encoder(path, checkpoint)
    read = _read_weights(files.weights, genes=files.protein_embeddings is None)
    settings = _checked_settings(files.weights, read, files.config)
    tensors = {name: tensor.float() for name, tensor in read.tensors.items() if tensor.is_floating_point()}
    if files.protein_embeddings is not None:
        genes, vectors = read_vectors(files.protein_embeddings)
    elif read.genes is not None:
        genes, vectors = stack_vectors(read.genes, f"{files.weights.name} (protein_embeds_dict)")
    else:
        raise InputError(f"No {GENES_FILE} beside {files.weights.name}, and no gene vectors in it. {_HOW_TO_GET}")
    width = tensors["encoder.0.weight"].shape[1]
    if vectors.shape[1] != width:
        raise InputError(
            f"The gene vectors beside {files.weights.name} have {vectors.shape[1]} numbers each, its encoder.0.weight "
            f"takes {width}: they belong to another encoder. Use the {GENES_FILE} it was published with."
        )
    return EncoderWeights(
        tensors=tensors,
        **settings,
        genes=genes,
        gene_vectors=vectors,
        sha256=_content_hash(tensors | {"": vectors}, {"genes": genes, **settings}),
        source=read.source,
    )


@dataclass(frozen=True)
class _Weights:
    tensors: dict[str, torch.Tensor]  # stored types
    configs: list[Any]  # nested like config.yaml, the first that has a value wins
    genes: dict[str, torch.Tensor] | None
    source: str


def _read_weights(path: Path, genes: bool) -> _Weights:
    refuse_impostor(path)
    if path.suffix == ".ckpt":
        read = read_checkpoint(path, genes)
        return _Weights(read.tensors, _configs(read), read.genes, path.name)
    record = _record(path)
    config: dict[str, Any] = {}
    for name, ((section, key), _, _) in _SETTINGS.items():
        config.setdefault(section, {})[key] = record.get(name)
    return _Weights(read_safetensors(path), [config], None, str(record.get("source", path.name)))


def _configs(read: Checkpoint) -> list[Any]:
    """Where a Lightning checkpoint keeps its settings: own arguments, pickled config, the config's text."""
    arguments = read.plain["hyper_parameters"]
    arguments = arguments if isinstance(arguments, dict) else {}
    text = read.plain["cfg_yaml"]
    return [
        {"model": {"nhead": arguments.get("nhead")}},
        arguments.get("cfg"),
        parse_yaml(text, "cfg_yaml of the checkpoint") if isinstance(text, str) else {},
    ]


def _checked_settings(weights: Path, read: _Weights, config: Path | None) -> dict[str, int]:
    """Check that `read` is an SE model (_check_encoder) and return its settings."""
    width = _check_encoder(weights.name, read.tensors)
    settings = _settings(weights, read.configs, config)
    if width % settings["n_heads"]:
        raise InputError(f"{weights.name}: {settings['n_heads']} heads (model.nhead) do not divide a width of {width}.")
    return settings


def _settings(weights: Path, configs: list[Any], config: Path | None) -> dict[str, int]:
    """n_heads, pad_length and cls_count_gene from the checkpoint's `configs`, else from `config`."""
    found = _found(configs)
    if config is not None and len(found) < len(_SETTINGS):
        found = _found([read_yaml(config)]) | found
    settings = {}
    for name, ((section, key), default, smallest) in _SETTINGS.items():
        value = found.get(name, default)
        if value is None:
            raise InputError(
                f"{weights.name} does not say {section}.{key}: put the {CONFIG_FILE} of its model, with "
                f"`{section}:` and `{key}:`, beside it."
            )
        if type(value) is not int or not smallest <= value <= LARGEST_SETTING:
            got = ascii(value)[:40]
            raise InputError(
                f"{weights.name}: {section}.{key} is {got}, not a whole number from {smallest} to {LARGEST_SETTING}."
            )
        settings[name] = value
    return settings


def _found(configs: list[Any]) -> dict[str, Any]:
    """Of every setting the first value that one of `configs` has."""
    found: dict[str, Any] = {}
    for config in configs:
        for name, ((section, key), _, _) in _SETTINGS.items():
            part = config.get(section) if isinstance(config, dict) else None
            if isinstance(part, dict) and part.get(key) is not None:
                found.setdefault(name, part[key])
    return found


def _check_encoder(name: str, tensors: dict[str, torch.Tensor]) -> int:
    """Raise InputError unless `tensors` are an SE model's, in fitting shapes, all finite; return D."""
    layers = {int(m[1]) for m in (re.match(r"transformer_encoder\.layers\.(\d{1,4})\.", key) for key in tensors) if m}
    n_layers = max(layers, default=0) + 1
    missing = [key for key in _shapes(n_layers) if key not in tensors]
    if missing:
        raise InputError(
            f"{name}: this is not a State Embedding checkpoint: no {shown(missing, 4)}.{_what_else(tensors)}"
        )
    width = tensors["encoder.1.weight"].numel()
    sizes = {"1": 1, "10": 10, "D": width, "3D": 3 * width}
    for key, axes in _shapes(n_layers).items():
        shape = tuple(tensors[key].shape)
        if len(shape) != len(axes) or any(sizes.setdefault(a, n) != n for a, n in zip(axes, shape, strict=True)):
            expected = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
            raise InputError(f"{name}: tensor {key} has shape {shape}, the other tensors call for ({expected}).")
    check_finite(name, tensors)
    for part in ("0.weight", "0.bias", "1.weight", "1.bias"):  # one layer to upstream, which stores it under two names
        twin = tensors.get(f"gene_embedding_layer.{part}")
        if twin is not None and not torch.equal(twin.float(), tensors[f"encoder.{part}"].float()):
            raise InputError(
                f"{name}: gene_embedding_layer.{part} and encoder.{part} differ, though they are one tensor of the "
                "model: this file was not written by its trainer. Use the published checkpoint."
            )
    return width


def _shapes(n_layers: int) -> dict[str, list[str]]:
    """Tensor -> its axes, for a model of `n_layers`."""
    modules = dict(_MODULES)
    for i in range(n_layers):
        modules |= {f"transformer_encoder.layers.{i}.{name}": axes for name, axes in _LAYER.items()}
    shapes = {"cls_token": ["1", "T"], "dataset_token": ["1", "T"], "bin_encoder.weight": ["B", "D"]}
    for name, axes in modules.items():
        shapes |= {f"{name}.weight": axes.split(), f"{name}.bias": axes.split()[:1]}
    return shapes


def _what_else(tensors: Mapping[str, torch.Tensor]) -> str:
    if any(name.startswith(("project_out.", "pert_encoder.", "transformer_backbone.")) for name in tensors):
        return " It looks like a `state tx` (State Transition) checkpoint: `sest import` reads those."
    if tensors and all(tensor.ndim == 1 for tensor in tensors.values()):
        return " It looks like a features file (name -> vector): `sest train --perturbations` reads those."
    return ""


def _content_hash(tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> str:
    """Hash of names, shapes, values and `facts`; the tensors are hashed by all cores at once."""

    def of_tensor(name: str) -> str:
        return hashlib.sha256(tensors[name].reshape(-1).numpy().data).hexdigest()

    names = sorted(tensors)
    with ThreadPoolExecutor() as threads:
        hashes = list(threads.map(of_tensor, names))
    content = [[name, list(tensors[name].shape), value] for name, value in zip(names, hashes, strict=True)]
    return hashlib.sha256(json.dumps([facts, content], sort_keys=True).encode()).hexdigest()


def convert_encoder(path: Path, checkpoint: str | None = None) -> tuple[Path, bool]:
    """Make sure that the `.ckpt` of an SE folder (or the `.ckpt` file `path`) has a safetensors copy.

    Returns:
        The copy, and whether it was written now: one that belongs to the present `.ckpt` is kept.

    Raises:
        InputError: no such encoder, an encoder without a `.ckpt` or gene vectors, or a folder that cannot be written.
    """
    files = find_encoder(path, checkpoint)
    if _original(files.weights) is not None and files.weights.name.endswith(COPY_SUFFIX):
        return files.weights, False
    if files.weights.suffix != ".ckpt":
        raise InputError(f"{files.weights} is read fast as it is: only a .ckpt needs a copy.")
    if files.protein_embeddings is None:  # the copy would have no gene vectors
        raise InputError(f"No {GENES_FILE} beside {files.weights}: without it the copy could not be used.")
    try:
        return save_safetensors_copy(files.weights), True
    except (SafetensorError, OSError) as error:
        raise InputError(f"The copy of {files.weights} cannot be written: {error}.") from error


def save_safetensors_copy(weights_path: Path) -> Path:
    """Write `<stem>.sest.safetensors` beside the SE `.ckpt` and return its path; load_encoder then reads that.

    Tensors keep their stored type and bytes. Gene vectors are not copied: they stay in protein_embeddings.pt. The
    file appears complete or not at all. Raises InputError for a `.ckpt` that load_encoder refuses, OSError on writing.
    """
    if weights_path.suffix != ".ckpt" or not weights_path.is_file():
        raise InputError(f"{weights_path} is not a .ckpt file: only those need a safetensors copy.")
    sha256, config = _sha256(weights_path), weights_path.with_name(CONFIG_FILE)
    read = _read_weights(weights_path, genes=False)
    settings = _checked_settings(weights_path, read, config if config.is_file() else None)
    record = {"source": weights_path.name, "sha256": sha256, "size": weights_path.stat().st_size, **settings}
    copy = weights_path.with_name(weights_path.stem + COPY_SUFFIX)
    with file_aside(copy) as aside:
        save_file(read.tensors, aside, metadata={"sest": json.dumps(record, sort_keys=True)})
        shutil.copymode(weights_path, aside)  # safetensors writes for the owner only
    return copy
