"""Predict perturbed cells with a trained head and write them as an .h5ad, real control cells beside them.

Shapes: S cells a set, E embedding width, P feature width, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sest import progress
from sest.cache import Cache
from sest.cells.columns import Columns
from sest.config import VCC2026, PredictConfig, TrainConfig
from sest.data.dataset import Dataset, read_dataset
from sest.data.targets import remove_scratch
from sest.errors import InputError, nearest, shown
from sest.files.write_h5ad import H5adWriter
from sest.machine.devices import choose_device, choose_precision
from sest.outputs import check_output
from sest.prediction.cells import (
    Member,
    baseline_effects,
    fitted_baselines,
    predicted_cells,
    predicted_effects,
    query_of,
    real_cells,
    weights_for,
)
from sest.prediction.controls import new_pools, planned_pools
from sest.prediction.draws import control_rows
from sest.prediction.features import vectors_of
from sest.prediction.record import baselines, is_source, pairs_of, provenance
from sest.prediction.requests import Request, Wanted, asked_of, join_tables, make_requests, obs_of, read_wanted
from sest.prediction.submission import all_controls, copies_of, refuse_options, write_submission
from sest.runs.checkpoint import Checkpoint, find_checkpoint, sound_checkpoint
from sest.runs.known import Known, known_with_cells, known_without_cells
from sest.runs.provenance import check_data, files_of, find_data
from sest.runs.run_folder import SCRATCH, seeds_of, stored_features

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What was written."""

    n_predicted: int
    n_controls: int
    n_genes: int
    n_perturbations: int
    checkpoint: Path
    step: int
    n_runs: int = 1
    copies: tuple[Path, ...] = ()  # of a submission: a file for each context, with its controls


def predict(
    run: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    config: PredictConfig,
    wanted: Wanted | None = None,
    *,
    force: bool = False,
) -> Prediction:
    """Predict cells and write them, with real control cells beside them.

    Args:
        run: a run folder, one of its checkpoint folders, or several of them, whose predictions are averaged.
        out: the .h5ad to write: X CSR float32 log1p within [0, 14]; obs perturbation, cell type, batch; var the genes;
            uns["sest"] the provenance and the baselines' pseudobulks.
        config: what to predict and from which controls.
        wanted: the perturbations, instead of config.list or config.only: names (config.n_cells of each), or
            name -> cells.
        force: replace `out` where it exists; what the prediction is made from never is.

    Raises:
        InputError, CacheError: `out` exists or is an input, no such run, a damaged checkpoint, unknown perturbations or
            cell types, features that are missing or of another width, or runs of different cells or genes. Nothing is
            written then.
    """
    out, runs = Path(out), runs_of(run)
    given = [config.template, config.list, config.controls, config.genes, config.encoder, config.cache]
    inputs = [*given, config.perturbations, *(file for one in runs for file in files_of(one))]
    check_output(out, inputs=inputs, force=force)
    refuse_options(config)
    listed = read_wanted(wanted, config)
    checkpoints = [sound_checkpoint(find_checkpoint(one, config.checkpoint)) for one in runs]
    _refuse_unlike(checkpoints)
    checkpoint = checkpoints[0]
    planned = planned_pools(config, checkpoint)
    known = _known(checkpoint, config, out)
    genes, places, extra = _genes(config, known.genes)
    requests, columns = make_requests(config, listed, known, planned)
    copies = copies_of(requests, config) if config.format == VCC2026 else {}
    if config.with_controls and copies:
        check_output(config.with_controls, inputs=[*inputs, out], force=force, made={c.name for c in copies.values()})
    asked = asked_of(requests)
    names = sorted({request.perturbation for request in asked})
    first = _member(checkpoint, names, config, known)
    members = [first, *(_member(other, names, config, _also_known(other, config, known)) for other in checkpoints[1:])]
    if planned is not None:  # all that can be refused was, before the embedding
        pools = new_pools(config, checkpoint, known, extra)
        requests = [dataclasses.replace(request, pool=pools[request.pool.cell_type]) for request in requests]
    weights = [member.blend.weights if member.blend is not None else None for member in members]
    query, blend = query_of(pairs_of(requests), first.vectors), first.blend
    uns = {"sest": provenance(checkpoints, known, columns, config.missing_genes, weights)}
    for sentence in blend.said(query) if blend is not None and config.blend == "auto" else ():
        logger.info(sentence)
    if config.format == VCC2026:
        requests = requests if copies else asked_of(requests)
        effects, scale = (
            _blocks(requests, members, config.seed, all_controls, predicted_effects),
            known.target_sum,
        )
        write_submission(out, copies, requests, effects, genes, places, uns["sest"], scale, config.seed)
    else:
        fitted = blend.baselines if blend is not None else fitted_baselines(checkpoint, known)
        if fitted is not None:
            uns["sest"] |= baselines(fitted, requests, config.seed, query, places)
        else:
            logger.info("What the run was trained on is not known here, so no baselines are stored.")
        _write(out, requests, members, columns, genes, places, uns, config.seed)
    return Prediction(
        n_predicted=sum(request.n_cells for request in asked),
        n_controls=sum(request.n_cells for request in requests if request.is_control),
        n_genes=len(genes),
        n_perturbations=len(names),
        checkpoint=checkpoint.folder,
        step=checkpoint.state["step"],
        n_runs=len(members),
        copies=tuple(copies.values()),
    )


Blocks = Iterable[tuple[np.ndarray, Any]]


def _blocks(
    requests: Sequence[Request],
    members: Sequence[Member],
    seed: int,
    real: Callable[[Request], Blocks],
    predicted: Callable[[Request, Sequence[Member], Sequence[np.ndarray], int], Blocks],
) -> Iterator[tuple[Request, np.ndarray, Any]]:
    """All requests in blocks: of what, from which controls, and what `real` or `predicted` give."""
    progress.begin("Predicting", sum(request.n_cells for request in requests), "cells")
    of_baselines = baseline_effects(members, asked_of(requests))
    for request in requests:
        blocks = real(request) if request.is_control else predicted(request, members, next(of_baselines), seed)
        for rows, block in blocks:
            yield request, rows, block
            progress.advance(len(rows))


def _write(
    out: Path,
    requests: Sequence[Request],
    members: Sequence[Member],
    columns: Columns,
    genes: Sequence[str],
    places: np.ndarray | None,
    uns: dict[str, Any],
    seed: int,
) -> None:
    """Write log1p values and labels of all cells."""

    def real(request: Request) -> Blocks:
        return real_cells(request.pool, control_rows(request, seed))

    chosen: list[tuple[Request, list[np.ndarray]]] = []
    with H5adWriter(out, len(genes), "float32") as writer:
        for request, rows, block in _blocks(requests, members, seed, real, predicted_cells):
            values = request.pool.whole(rows, block)
            writer.add(values if places is None else values[:, places])
            if not chosen or chosen[-1][0] is not request:
                chosen.append((request, []))
            chosen[-1][1].append(rows)
        tables = [obs_of(request, np.concatenate(rows), columns) for request, rows in chosen]
        writer.finish(join_tables(tables), pd.DataFrame(index=pd.Index(genes, dtype=str)), uns)


def runs_of(run: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The runs that paths mean: of a folder that `sest train --seeds` made, those of its seeds.

    Raises:
        InputError: a run is named twice, or none is.
    """
    given = [Path(run)] if isinstance(run, str | os.PathLike) else [Path(one) for one in run]
    runs = [one for path in given for one in (seeds_of(path) or [path])]
    if not runs or len({one.resolve() for one in runs}) < len(runs):
        raise InputError(f"Name at least one run, and each once; given: {shown(map(str, runs))}.")
    return runs


def _refuse_unlike(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse to average predictions of different cells, genes or scales."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for key, what in (
            ("cache_sha256", "on another cache"),
            ("genes", "with other genes"),
            ("target_sum", "with another --target-sum"),
        ):
            if first.state[key] != other.state[key] or first.state["cache_sha256"] is None:
                raise InputError(f"{other.folder} was trained {what} than {first.folder}: they cannot be averaged.")


def _member(checkpoint: Checkpoint, names: Sequence[str], config: PredictConfig, known: Known) -> Member:
    """A run that is ready to predict the perturbations `names`; `known` are the cells as it knows them."""
    device = choose_device(config.device)
    blend = weights_for(config.blend, checkpoint, known)
    needs_head = blend is None or blend.of_head > 0
    return Member(
        checkpoint=checkpoint,
        model=checkpoint.model().to(device) if needs_head else None,
        blend=blend,
        vectors=vectors_of(names, checkpoint, known),
        control=known.features.matrix[0],
        batch_size=known.config.batch_size,
        set_size=known.config.set_size,
        precision=choose_precision(config.precision, device, training=False),
    )


def predict_cells(
    run: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    wanted: Wanted | None = None,
    config: PredictConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> AnnData:
    """`predict` into memory; `out`: a file to keep as well, which replaces another with `force`."""
    from anndata import read_h5ad  # slow to import

    config = config or PredictConfig()
    if out is not None:
        predict(run, out, config, wanted, force=force)
        return read_h5ad(out)
    with tempfile.TemporaryDirectory(prefix="sest-") as folder:
        return predict_cells(run, wanted, config, out=Path(folder) / "predicted.h5ad")


def _known(checkpoint: Checkpoint, config: PredictConfig, out: Path) -> Known:
    """What is known of the run's cells: with new controls the checkpoint is enough, unless --cache names a cache."""
    if config.controls is not None and config.cache is None:
        known = known_without_cells(checkpoint, config.perturbations)
        if known is not None:
            return known
    train_config, cache, source = find_data(checkpoint, config.cache, config.perturbations)
    if out.exists() and is_source(out, cache):
        raise InputError(
            f"{out} has the cells that {cache.path} was made from, and is never replaced. Give another name."
        )
    return known_with_cells(checkpoint, _read(cache, train_config, checkpoint, out), train_config, source)


def _also_known(checkpoint: Checkpoint, config: PredictConfig, first: Known) -> Known:
    """The same of another run on the same cells, whose targets and embeddings are not read again."""
    if first.data is None and (known := known_without_cells(checkpoint, config.perturbations)) is not None:
        return known
    train_config, cache, source = find_data(checkpoint, config.cache, config.perturbations)
    data = read_dataset(cache, train_config, stored=stored_features(checkpoint), like=first.data)
    check_data(checkpoint, data)
    return known_with_cells(checkpoint, data, train_config, source)


def _read(cache: Cache, config: TrainConfig, checkpoint: Checkpoint, out: Path) -> Dataset:
    """The cells of the cache, which must be the checkpoint's."""
    scratch = Path(config.scratch or out.with_name(f".{out.name}.{SCRATCH}"))  # only if memory is too small
    data = read_dataset(cache, config, stored=stored_features(checkpoint), scratch=scratch)
    if not config.scratch:
        remove_scratch(scratch)  # mapped files stay readable
    check_data(checkpoint, data)
    if not checkpoint.state["genes"]:
        logger.info(
            f"{checkpoint.folder} does not name its genes: they are taken to be those of {cache.path}, in order."
        )
    return data


def _genes(config: PredictConfig, genes: Sequence[str]) -> tuple[list[str], np.ndarray | None, list[str]]:
    """The output's genes, where they stand among the run's and the extra ones (None: all, in order), and these.

    Extra are those that the run does not have; new controls may.
    """
    path = config.genes
    if path is None:
        return list(genes), None, []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
    names = [name for line in lines if (name := line.split(",")[0].strip().strip('"'))]
    place = {name: i for i, name in enumerate(genes)}
    if names and names[0] not in place and names[0].lower() in ("gene", "genes", "gene_name", "gene_names"):
        names = names[1:]  # a header
    extra = [name for name in names if name not in place]
    if extra and (config.controls is None or len(extra) == len(names)):
        raise InputError(f"{path}: {len(extra)} genes are not the run's: {shown(extra)}.{nearest(extra[0], place)}")
    if not names or len(set(names)) < len(names):
        raise InputError(f"{path} must list genes, one a line, each once.")
    if extra:
        logger.warning(
            f"{len(extra):,} of {len(names):,} genes are not the run's: {shown(extra)}. They keep the values of the "
            "control cells, in which no perturbation has an effect on them."
        )
    place |= {name: len(genes) + i for i, name in enumerate(extra)}
    return names, np.array([place[name] for name in names]), extra
