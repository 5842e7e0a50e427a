"""One folder from one file of cells to a report: what `sest run` carries out.

What is held out is chosen from the cells where no splits file says it. The folder keeps what it was begun with, so that
the same call again goes on, and another is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sest.cache.disk import write_durably
from sest.cells.choose_splits import ChosenSplits, choose_splits
from sest.cells.genes import column_of_targets, gene_names
from sest.cells.inputs import Source, group_name, read_group
from sest.cells.labels import targets_of
from sest.cells.split_file import TEST, read_splits
from sest.cells.splits import GroupCells
from sest.config import EmbedConfig, EvaluateConfig, PipelineConfig, PredictConfig, TrainConfig
from sest.describe import describe
from sest.encoder.choose import needs_weights
from sest.errors import InputError, nearest_file, shown
from sest.files.cell_file import CellFile
from sest.files.containers import stem_of
from sest.options import read_toml
from sest.outputs import check_output, is_same
from sest.pipeline.stages import (
    CACHE,
    EMBED,
    MAY_CHANGE,
    RUN,
    STAGES,
    STATE,
    Ledger,
    PipelineResult,
    Plan,
    Watcher,
    carry_out,
    changed,
    command_line,
)


def run_pipeline(
    cells: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Mapping[str, Any],
    watcher: Watcher | None = None,
) -> PipelineResult:
    """Embed, train, predict, evaluate and report; again: go on where it stopped.

    Args:
        cells: one file of cells.
        out: a folder for everything, new or from an earlier call with the same cells and options.
        options: fields of `PipelineConfig` that were given; a folder that was begun keeps its own.
        watcher: is told of every step.

    Raises:
        InputError, CacheError: bad input, or a folder that was begun with something else; finished stages are kept.
        TrainingFailed: see `sest.training.train.train`.
        Interrupted: after SIGINT or SIGTERM; the same call goes on.
    """
    cells, out, watcher = Path(cells), Path(out), watcher or Watcher()
    ledger, config = _begun(cells, out, options)
    columns = EmbedConfig.from_values(_columns(config), "the options")
    if "perturbations" not in ledger.begun_with:
        _look(cells, columns, watcher)
        columns, genes, group = _genes(cells, columns, config, watcher)
        ledger.begun_with["gene_col"] = columns.gene_col or ""
        ledger.begun_with["perturbations"] = config.perturbations or "auto"
        if config.splits is None:
            chosen = _chosen(group, genes, config)
            if chosen.by_genes and config.perturbations is None:
                ledger.begun_with["perturbations"] = "genes+onehot"
            out.mkdir(parents=True, exist_ok=True)
            dataset = group_name(stem_of(cells))
            write_durably(out / "splits.toml", chosen.toml(dataset, Path(os.path.abspath(cells))).encode())
            watcher.note(f"{chosen.why} Written to {out / 'splits.toml'}; --splits takes another file.")
        else:
            _check_splits(Path(config.splits), cells)
            out.mkdir(parents=True, exist_ok=True)
        ledger.save()
    columns = replace(columns, gene_col=ledger.begun_with.get("gene_col") or columns.gene_col)
    plan = _plan(cells, out, config, columns, str(ledger.begun_with["perturbations"]))
    return carry_out(plan, watcher, ledger)


def _begun(cells: Path, out: Path, options: Mapping[str, Any]) -> tuple[Ledger, PipelineConfig]:
    """The folder's ledger, and its options with those given now on top.

    What was given before may change as long as nothing is kept that was made with it.

    Raises:
        InputError: no such cells, a folder of something else, or one that was begun with other cells or options.
    """
    if not cells.exists():
        raise InputError(f"{cells} does not exist.{nearest_file(cells)}")
    if cells.suffix == ".toml":
        raise InputError(f"{cells}: sest run takes one file of cells, with --splits for the TOML that names it.")
    file = cells.stat()
    now = {"cells": str(cells.resolve()), "bytes": file.st_size, "mtime_ns": file.st_mtime_ns}
    if not (out / STATE).is_file():
        read = [options.get(name) for name in ("splits", "perturbations", "encoder")]
        check_output(out, inputs=[cells, *read], made=())
        config = PipelineConfig.from_values(options, "the options")
        return Ledger(out / STATE, {"options": config.to_values(), **now}), config
    kept = read_toml(out / STATE)
    done = [stage for stage in kept.pop("done", []) if stage in STAGES]
    predicted_from = str(kept.pop("predicted_from", ""))
    before = PipelineConfig.from_values(kept["options"], str(out / STATE))
    config = PipelineConfig.from_values({**kept["options"], **options}, "the options")
    if not done and not (out / CACHE).exists():  # nothing is kept that was made with other options
        return Ledger(out / STATE, {"options": config.to_values(), **now}), config
    may_change = MAY_CHANGE if (out / RUN).exists() else (*MAY_CHANGE, *OF_TRAINING)
    for name in PipelineConfig.names():
        old, new = getattr(before, name), getattr(config, name)
        if old != new and name not in may_change:
            raise InputError(
                f"{out} was begun with --{name.replace('_', '-')} {'unset' if old is None else old}, not {new}. Choose "
                "another --out."
            )
    if any(kept.get(key) != now[key] for key in ("cells", "bytes")):
        raise InputError(f"{out} was begun with other cells than {cells} holds now. Choose another --out.")
    if kept.get("mtime_ns") != now["mtime_ns"]:  # `sest embed` says whether what it holds is the same
        done = []
    if config.perturbations != before.perturbations:
        kept["perturbations"] = config.perturbations
    if config.max_steps != before.max_steps:
        done = [stage for stage in done if stage == EMBED]
    return Ledger(out / STATE, {**kept, **now, "options": config.to_values()}, done, predicted_from), config


OF_TRAINING = ("perturbations", "head", "preset")  # options that may change before it has begun
READING = "layer modality counts labels pert_col cell_type_col batch_col gene_col control".split()


def _columns(config: PipelineConfig) -> dict[str, Any]:
    """How the cells are to be read, as far as it was said."""
    usual = PipelineConfig()
    return {name: value for name in READING if (value := getattr(config, name)) != getattr(usual, name)}


def _look(cells: Path, columns: EmbedConfig, watcher: Watcher) -> None:
    """Tell what `sest info` says of the cells, and refuse what cannot be trained on."""
    columns = replace(columns, counts=EmbedConfig().counts)  # which `sest info` finds out
    watcher.command(command_line("info", cells, *changed(columns)))
    facts, _ = describe(cells, columns=columns)
    if facts["kind"] != "cells":
        raise InputError(f"{cells} is a {facts['kind']}; sest run takes a file of cells.")
    watcher.facts(cells, facts)
    if "columns" in facts:  # why they were not found
        raise InputError(str(facts["columns"]))
    if facts["perturbation_column"] is None:
        raise InputError(
            f"{cells} has no perturbation column that is known by its name. It has: {shown(facts['obs_columns'])}. "
            "Pass --pert-col."
        )


def _genes(
    cells: Path, columns: EmbedConfig, config: PipelineConfig, watcher: Watcher
) -> tuple[EmbedConfig, Sequence[str], GroupCells]:
    """The same with the column of var that names genes as the perturbations do; these names; and the cells' labels."""
    name = group_name(stem_of(cells))
    group = read_group(Source(name, name, cells), columns)
    targets = {target for label in group.perturbations if label != group.control for target in targets_of(label)}
    with CellFile(cells, columns.layer, columns.modality) as file:
        own = gene_names(file.var, columns.gene_col)
        found = None if columns.gene_col else column_of_targets(file.var, targets)
    if found is None:
        return columns, own.names, group
    if needs_weights(config.encoder):  # which finds the column that it knows
        return columns, found.names, group
    of_own, of_found = (len(targets.intersection(names.names)) for names in (own, found))
    watcher.note(
        f"Genes are named by column {found.column!r} of var, which has {of_found:,} of the {len(targets):,} targets of "
        f"perturbations, not by {own.column}, which has {of_own:,}; --gene-col index takes the index."
    )
    return replace(columns, gene_col=found.column), found.names, group


def _chosen(group: GroupCells, genes: Sequence[str], config: PipelineConfig) -> ChosenSplits:
    """What to hold out of the cells."""
    known = config.perturbations not in (None, "auto", "onehot", "genes", "genes+onehot", "onehot+genes")
    use_genes = config.perturbations != "onehot"
    return choose_splits(group, genes if use_genes else (), everything_known=known, seed=config.seed)


def _check_splits(splits: Path, cells: Path) -> None:
    """Refuse a splits file that is not about these cells, or holds nothing out to test."""
    file = read_splits(splits, roots=(Path(os.path.abspath(cells)).parent,))
    files = [path for paths in file.datasets.values() for path in paths]
    if len(files) != 1 or not is_same(files[0], cells):
        raise InputError(
            f"{splits} names {shown(map(str, files))}, and sest run takes one file of cells, {cells}. Name it, and no "
            "other; of several files run the commands one by one."
        )
    tests = TEST in file.zeroshot.values() or any(held.get(TEST) for held in file.fewshot.values())
    if not tests:
        raise InputError(f"{splits} holds nothing out to test. Name a test split in [zeroshot] or [fewshot].")


def _plan(cells: Path, out: Path, config: PipelineConfig, columns: EmbedConfig, features: str) -> Plan:
    splits = Path(config.splits) if config.splits is not None else out / "splits.toml"
    shared: dict[str, Any] = {"seed": config.seed, "device": config.device}
    here = [Path(os.path.abspath(splits)).parent, Path.cwd()]
    places = {Path(os.path.abspath(cells)).parent, Path(os.path.realpath(cells)).parent}
    roots = sorted(place for place in places if not any(place.is_relative_to(root) for root in here))
    usual = TrainConfig()
    training = {
        "splits": str(splits),
        "perturbations": features if features != usual.perturbations else None,
        "head": config.head if config.head != usual.head else None,
        "preset": config.preset,
        "max_steps": config.max_steps,
        "seed": config.seed or None,
        "device": config.device if config.device != usual.device else None,
    }
    return Plan(
        cells=cells,
        folder=out,
        splits=splits,
        embed=EmbedConfig.from_values({**asdict(columns), "encoder": config.encoder, **shared}, "the options"),
        train={key: value for key, value in training.items() if value is not None},
        predict=PredictConfig(**shared),
        evaluate=EvaluateConfig.from_values(
            {k: v for k, v in _columns(config).items() if k != "batch_col"} | {"seed": config.seed}, "the options"
        ),
        data_roots=tuple(roots),
    )
