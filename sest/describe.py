"""What a path is and whether it is sound: the facts behind `sest info`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sest.cache import journal, open_cache
from sest.cache.derived import derived_bytes
from sest.cache.schema import COMPLETE, ROOT
from sest.cache.storage import Storage, is_url, storage_at
from sest.cells.labels import AS_IS
from sest.cells.split_file import SPLIT_NAMES, read_splits
from sest.cells.splits import assign_splits, split_table
from sest.config import EmbedConfig, TrainConfig
from sest.errors import Error, InputError, nearest_file, shown
from sest.files.cell_file import CellFile
from sest.files.containers import SUFFIXES
from sest.files.formats import is_zarr, of_folder
from sest.files.remote import located
from sest.files.write_h5ad import as_written
from sest.hub import fetched, repository_of
from sest.runs.curves import read_lines

if TYPE_CHECKING:
    from sest.cells.inputs import Source
    from sest.cells.labels import DecidedLabels

Facts = dict[str, Any]
CACHE_FACTS = (
    "dtype cells encoder encoder_sha256 native_dim projection precision seed sest_version schema_version licence"
).split()
GROUP_FACTS = "n_cells n_genes perturbations controls n_embedded scale".split()
FIRST_CELLS = 1_000
FEATURES = (".pt", ".npz", ".safetensors", ".pickle", ".pkl", ".csv", ".tsv")
WEIGHTS = (".ckpt", ".safetensors")
RUN_FACTS = "trainable_parameters dim n_features n_genes val_loss best_val_loss best_step".split()


def describe(
    path: str | os.PathLike[str],
    *,
    verify: bool = False,
    splits: str | os.PathLike[str] | None = None,
    columns: EmbedConfig | None = None,
) -> tuple[Facts, list[str]]:
    """Return the facts about a path and the files found damaged (only with `verify`).

    Args:
        path: a cache (also its URL), a run, a checkpoint (also hf://owner/name), an encoder folder, a file of cells, a
            splits TOML or a file of perturbation features.
        verify: read every file of a cache or a checkpoint, or a prediction, and compare its checksum.
        splits: of a cache: also count its cells as this TOML divides them ("splits", one entry a table row, and
            "split_notes").
        columns: of a file of cells: how its labels are to be read, and its layer.

    Raises:
        InputError, CacheError: nothing there, nothing sest knows, or something that cannot be used.
    """
    path = located(os.fspath(fetched(Path(path)) if repository_of(path) else path))
    if not (path.exists() or is_url(path)):
        raise InputError(f"{path} does not exist.{nearest_file(path)}")
    if _is_cache(path):
        facts, damaged = _cache(storage_at(path), verify)
        if splits is not None:
            usual = TrainConfig()
            facts |= _splits(path, usual, splits)
        return facts, damaged
    if path.suffix == ".toml":
        return _splits_file(path, columns or EmbedConfig()), []
    if splits is not None:
        raise InputError(f"--splits counts the cells of a cache, and {path} is none. Pass the cache's path.")
    if path.is_file() and path.suffix in FEATURES and (found := _features(path)) is not None:
        return found, []
    if is_url(path) or (path.is_file() and path.suffix not in WEIGHTS) or is_zarr(path):
        return _finite(_cells(as_written(path) if verify else path, columns or EmbedConfig())), []
    found = _run_or_checkpoint(path, verify)
    if found is None and (path.suffix in WEIGHTS or any(any(path.glob(f"*{suffix}")) for suffix in WEIGHTS)):
        found = _encoder(path)
    if found is None:
        held = of_folder(path) if path.is_dir() else ""
        raise InputError(f"{path} is no cache, run, checkpoint, encoder folder or file of cells{held}.")
    return _finite(found), []


def _is_cache(path: Path) -> bool:
    """Whether it is a cache, finished or not; a Zarr store that others wrote is none, and may hold cells."""
    if not is_url(path):
        return (path / ROOT).exists() and journal.root_attributes(storage_at(path)) is not None
    if path.name.endswith(SUFFIXES[:3]):
        return False
    storage = storage_at(path)
    there = storage.here()
    return not path.name.endswith(".zarr") or (ROOT in there and journal.root_attributes(storage) is not None)


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON cannot say: None."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cache(storage: Storage, verify: bool) -> tuple[Facts, list[str]]:
    there = storage.here()
    if ROOT in there and COMPLETE not in there and (attributes := journal.root_attributes(storage)) is not None:
        return _unfinished_cache(storage, attributes), []
    cache = open_cache(str(storage))
    facts = {
        "kind": "cache",
        "complete": True,
        "n_cells": cache.n_cells,
        "dim": cache.dim,
        **{key: cache.attributes[key] for key in CACHE_FACTS},
        "bytes": cache.size,
        "bytes_derived": derived_bytes(cache.storage),
        "groups": {name: {key: g.attributes[key] for key in GROUP_FACTS} for name, g in cache.groups.items()},
    }
    damaged = cache.verify() if verify else []
    if verify:
        facts["verified"] = not damaged
    return facts, damaged


def _splits_file(path: Path, config: EmbedConfig) -> Facts:
    """What a splits TOML names, checked against the labels of its files: before anything is embedded.

    Raises:
        InputError: it cannot be read, or names what the cells do not have.
    """
    from sest.cells.inputs import read_group, resolve_inputs
    from sest.data.dataset import holds_out_in_one_context
    from sest.data.features import automatic_source

    sources, file = resolve_inputs([path])
    assert file is not None, "a .toml was given"
    usual, groups = TrainConfig(), [read_group(source, config) for source in sources]
    names = {name for group in groups for name in group.perturbations if name != group.control}
    features, _ = automatic_source(names, _common_genes(sources, config), as_is=config.labels == AS_IS)
    one = holds_out_in_one_context(usual.val_contexts, features)
    divided = assign_splits(groups, file, seed=usual.seed, val_fraction=usual.val_fraction, one_context=one)
    return {
        "kind": "splits",
        "datasets": [f"{name} ({len(files)} file{'s' * (len(files) != 1)})" for name, files in file.datasets.items()],
        "training": sorted(file.training),
        "zeroshot": [f"{'.'.join(context)}: {SPLIT_NAMES[bit]}" for context, bit in sorted(file.zeroshot.items())],
        "fewshot": [".".join(context) for context in sorted(file.fewshot)],
        "splits": [dataclasses.asdict(row) for row in split_table(groups, divided)],
        "split_notes": list(divided.notes),
    }


def _common_genes(sources: Sequence[Source], config: EmbedConfig) -> set[str]:
    """The genes that all files name alike."""
    from sest.cells.genes import agreeing_names

    tables = []
    for source in sources:
        with CellFile(source.path, config.layer, config.modality) as file:
            tables.append(file.var)
    first, *others = agreeing_names(tables, config.gene_col)
    return set(first.names).intersection(*(names.names for names in others))


def _features(path: Path) -> Facts | None:
    """The vectors in a file; None for a .safetensors or .pt that holds something else."""
    from sest.untrusted.tensors import read_vectors

    try:
        names, matrix = read_vectors(path)
    except InputError:
        if path.suffix in (".safetensors", ".csv", ".tsv"):  # weights of an encoder, or a table of something else
            return None
        raise
    return {
        "kind": "features",
        "n_perturbations": len(names),
        "width": matrix.shape[1],
        "names": shown(names, 6),
        "values": f"from {float(matrix.min()):.4g} to {float(matrix.max()):.4g}",
        "all_zero": [name for name, row in zip(names, matrix, strict=True) if not row.any()],
    }


def _splits(cache: str | Path, config: TrainConfig, splits: str | os.PathLike[str] | None) -> Facts:
    """What training with `config`, but these splits, would read: cells of a cache by dataset, cell type and split."""
    from sest.data.dataset import holds_out_in_one_context
    from sest.data.features import with_sources
    from sest.data.labels import read_labels
    from sest.data.vectors import AUTO

    opened = open_cache(cache)
    _, groups = read_labels(opened)
    if config.perturbations == AUTO:
        config = with_sources(config, opened)
    file = read_splits(Path(splits), resolve_files=False) if splits else None
    one = holds_out_in_one_context(config.val_contexts, config.perturbations)
    divided = assign_splits(groups, file, seed=config.seed, val_fraction=config.val_fraction, one_context=one)
    return {
        "splits": [dataclasses.asdict(row) for row in split_table(groups, divided)],
        "split_notes": list(divided.notes),
    }


def _unfinished_cache(storage: Storage, attributes: Facts) -> Facts:
    """What a cache that is being written, or whose writing was stopped, says of itself already."""
    groups, written = {}, storage.sizes()
    for name in attributes.get("groups", ()):
        made = journal.root_attributes(storage, name) if f"{name}/{ROOT}" in written else None
        groups[name] = {key: made.get(key) if made else None for key in GROUP_FACTS}
    sizes = [group["n_cells"] for group in groups.values()]
    return {
        "kind": "cache",
        "complete": False,
        "n_cells": None if None in sizes else sum(sizes),
        "dim": attributes.get("dim"),
        **{key: attributes.get(key) for key in CACHE_FACTS},
        "groups": groups,
    }


def _run_or_checkpoint(path: Path, verify: bool) -> Facts | None:
    from sest.runs.run_folder import CONFIG, METRICS
    from sest.runs.schema import STATE  # imports torch, which caches and cells do not need

    if (path / STATE).exists():
        return _checkpoint(path, verify)
    return _run(path, path / METRICS, verify) if (path / CONFIG).exists() and (path / METRICS).exists() else None


def _checkpoint(path: Path, verify: bool) -> Facts:
    """Sizes and state of a checkpoint; `verify` compares the sha256 of its files (a difference is an error)."""
    from sest.runs.checkpoint import open_checkpoint

    state = open_checkpoint(path, check=verify).state
    run = state["run"]
    facts = {
        "kind": "checkpoint",
        "step": state["step"],
        "trainable_parameters": state["trainable_parameters"],
        **{key: state["sizes"][key] for key in ("dim", "n_features", "n_genes", "hidden", "n_layers", "n_heads")},
        "val_loss": run.get("val_loss"),
        "best_val_loss": run.get("best_val_loss"),
        "best_step": run.get("best_step"),
        "precision": state["precision"],
        "target_sum": state["target_sum"],
        "scale": state["scale"],
        "features": state["features"]["source"],
        "encoder": state["encoder"]["name"],
        "blend": [f"{name} {weight:.2f}" for name, weight in state["blend"]["weights"].items()]
        if "blend" in state
        else None,
        "files": sorted(state["files"]),
        "bytes": sum((path / name).stat().st_size for name in state["files"]),
        "sest_version": state["sest_version"],
        "licence": state["encoder"]["licence"],
    }
    if verify:
        facts["verified"] = True
    return facts


def _run(path: Path, metrics: Path, verify: bool) -> Facts:
    """The furthest checkpoint of a run, and where it stands."""
    from sest.runs.checkpoint import checkpoints, find_checkpoint, open_checkpoint
    from sest.runs.run_folder import own_cache, read_run_config

    config, provenance = read_run_config(path)
    found = [folder for folder in checkpoints(path) if not folder.name.startswith(".")]
    facts: Facts = {"kind": "run", "step": 0, **dict.fromkeys(RUN_FACTS)}  # before the first checkpoint
    if found:
        facts |= _checkpoint(found[0], verify) | {"kind": "run"}
        for folder in found[1:] if verify else ():
            open_checkpoint(folder)
        best = _checkpoint(find_checkpoint(path), verify=False)  # what predicts
        facts |= {key: best[key] for key in ("val_loss", "best_val_loss", "best_step", "blend")}
    facts["max_steps"] = config.get("max_steps")
    facts["checkpoints"] = [folder.name for folder in found]
    facts["cache"] = provenance.get("cache")
    facts["metrics"] = next((line for line in reversed(read_lines(metrics)) if "val_loss" in line), None)
    try:
        used = TrainConfig.from_values(config, str(path))
        facts |= _splits(own_cache(path, provenance), used, used.splits)
    except Error as error:  # the cache is elsewhere by now
        facts["split_notes"] = [f"No table of its cells: {error}"]
    return facts


def _encoder(path: Path) -> Facts:
    from sest.se.model import sizes
    from sest.se.weights import load_encoder

    weights = load_encoder(path)
    return {
        "kind": "encoder",
        "weights": weights.source,
        "sha256": weights.sha256,
        **sizes(weights.tensors),
        "n_heads": weights.n_heads,
        "pad_length": weights.pad_length,
        "n_genes": len(weights.genes),
        "parameters": sum(t.numel() for t in weights.tensors.values()),
    }


def _cells(path: Path, config: EmbedConfig) -> Facts:
    from sest.cells.columns import labels
    from sest.cells.genes import gene_names
    from sest.cells.inputs import columns_of

    with CellFile(path, config.layer, config.modality) as file:
        facts: Facts = {"kind": "cells", "n_cells": file.n_cells, "n_genes": file.n_genes, "layers": list(file.choices)}
        facts["obs_columns"] = list(map(str, file.obs.columns))
        try:
            found = columns_of(file, config)
        except InputError as error:
            facts["columns"] = str(error)
        else:
            facts |= {
                "perturbation_column": found.perturbation,
                "cell_type_column": found.cell_type,
                "batch_column": found.batch,
                "control": found.control,
            }
            if found.decided is not None:
                facts |= _labels(found.decided)
            if found.cell_type is not None:
                facts["cell_types"] = list(labels(file.obs, found.cell_type)[1])
        facts["values"], facts["scale"] = _values(file), _scale(file)
        genes = gene_names(file.var, config.gene_col)
        facts["gene_names"] = f"{genes.column}: {shown(genes.names[:3])}"
        if genes.are_numbers:
            facts["gene_names"] += " (numbers: no column of var has the names)"
    return facts


def _labels(decided: DecidedLabels) -> Facts:
    """What the labels of the perturbation column are taken for."""
    from sest.cells.labels import CONTROL, PERTURBATION, UNASSIGNED
    from sest.cells.treatments import treatments_of

    decisions = [decision for kind in (CONTROL, UNASSIGNED, PERTURBATION) for decision in decided.of(kind)]
    return {
        "perturbations": len({decision.name for decision in decided.of(PERTURBATION)}),
        "controls": sum(decision.n_cells for decision in decided.of(CONTROL)),
        "left_out": decided.n_unassigned,
        "labels": [
            dataclasses.asdict(d) | {"treatments": [dataclasses.asdict(each) for each in treatments_of(d.label)]}
            for d in decisions
        ],
    }


def _scale(file: CellFile) -> str:
    """What the first cells of X are, or why that cannot be said; `sest embed` decides over all of them."""
    from sest.cells.scale import decide_scale, scan_blocks

    n = min(file.n_cells, FIRST_CELLS)
    scan = scan_blocks([file.rows(0, n)], n, list(file.var.index))
    try:
        scale = decide_scale(scan, "auto", file.path, file.choices, file.log_base)
    except InputError as error:
        return str(error)
    return str(scan.normalisation) if scale == "log1p" else scale


def _values(file: CellFile) -> str:
    """What the values of the first cells look like."""
    first = file.rows(0, min(file.n_cells, FIRST_CELLS)).data
    if not len(first):
        return f"all 0 in the first {FIRST_CELLS:,} cells"
    whole = "whole numbers" if (first == np.floor(first)).all() else "fractions"
    return f"{whole} from {first.min():.4g} to {first.max():.4g} in the first {min(file.n_cells, FIRST_CELLS):,} cells"
