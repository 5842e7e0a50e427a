"""Predict perturbed cells with a trained head and write them as an .h5ad, real control cells beside them.

Shapes: S cells a set, E embedding width, P feature width, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse

from sest import progress
from sest.baselines.effects import Query
from sest.cache import Cache
from sest.cells.columns import Columns
from sest.cells.scale import LARGEST_PREDICTED_LOG1P
from sest.config import VCC2025, VCC2026, PredictConfig, TrainConfig
from sest.data.dataset import Dataset, read_dataset
from sest.errors import InputError, shown
from sest.evaluation.record import FOLLOWED
from sest.files.write_h5ad import H5adWriter
from sest.machine.devices import choose_device, choose_precision
from sest.outputs import check_output
from sest.prediction.cells import (
    Followed,
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
from sest.prediction.counts import count_blocks, counted
from sest.prediction.draws import control_rows
from sest.prediction.effects import write_effects
from sest.prediction.features import vectors_of
from sest.prediction.record import COUNTS_RECORD, RECORD, baselines, is_source, labels_of, pairs_of, provenance
from sest.prediction.requests import (
    Request,
    Wanted,
    asked_of,
    make_requests,
    measured_genes,
    read_genes,
    read_wanted,
)
from sest.prediction.submission import all_controls, copies_of, refuse_options, refuse_too_many, write_submission
from sest.runs.checkpoint import Checkpoint, find_checkpoint, sound_checkpoint
from sest.runs.known import Known, known_with_cells, known_without_cells
from sest.runs.provenance import check_data, files_of, find_data, first_of_alike
from sest.runs.run_folder import seeds_of, stored_features

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
    for beside in (config.effects, config.vcc):
        if beside is not None:
            check_output(beside, inputs=[*inputs, out], force=force)
    listed = read_wanted(wanted, config)
    checkpoints = [sound_checkpoint(find_checkpoint(one, config.checkpoint)) for one in runs]
    by_split = listed is None and config.template is None and not config.all_perturbations
    checkpoint = first_of_alike(checkpoints, by_split=by_split)
    planned = planned_pools(config, checkpoint)
    known = _known(checkpoint, config, out)
    genes, places, extra = read_genes(config, known.genes)
    requests, columns = make_requests(config, listed, known, planned)
    genes, places = measured_genes(requests, genes, places, asked=config.genes is not None)
    refuse_too_many(requests, config)
    copies = copies_of(requests, config) if config.format == VCC2026 else {}
    if config.with_controls and copies:
        check_output(config.with_controls, inputs=[*inputs, out], force=force, made={c.name for c in copies.values()})
    names = sorted({request.perturbation for request in asked_of(requests)})
    first = _member(checkpoint, names, config, known)
    members = [first, *(_member(other, names, config, _also_known(other, config, known)) for other in checkpoints[1:])]
    if planned is not None:  # all that can be refused was, before the embedding
        pools = new_pools(config, checkpoint, known, extra)
        requests = [dataclasses.replace(request, pool=pools[request.pool.cell_type]) for request in requests]
    what = _What(requests, members, columns, genes, places, known, config)
    for sentence in what.said() if config.blend == "auto" else ():
        logger.info(sentence)
    if config.format == VCC2026:
        what = dataclasses.replace(what, requests=requests if copies else asked_of(requests))
        _submit(out, copies, what)
    else:
        _write(out, what)
    if config.effects is not None:
        write_effects(Path(config.effects), out, columns, known.target_sum if config.format == "counts" else None)
    asked = asked_of(requests)
    return Prediction(
        n_predicted=sum(request.n_cells for request in asked),
        n_controls=sum(request.n_cells for request in what.requests if request.is_control),
        n_genes=len(genes),
        n_perturbations=len(names),
        checkpoint=checkpoint.folder,
        step=checkpoint.state["step"],
        n_runs=len(members),
        copies=tuple(copies.values()),
    )


Blocks = Iterable[tuple[np.ndarray, Any]]


@dataclass(frozen=True, eq=False)
class _What:
    """Everything that decides what is written."""

    requests: Sequence[Request]
    members: Sequence[Member]
    columns: Columns
    genes: Sequence[str]  # of the output
    places: np.ndarray | None  # where they stand among the pools'; None: all, in order
    known: Known
    config: PredictConfig

    @cached_property
    def query(self) -> Query:
        """The pairs, each once."""
        return query_of(pairs_of(self.requests), self.members[0].vectors)

    @cached_property
    def followed(self) -> Followed:
        """How far the means that `values` has predicted follow their controls."""
        return Followed(self.members)

    def said(self) -> list[str]:
        """What the parts of the prediction count, a sentence each."""
        blend = self.members[0].blend
        return blend.said(self.query) if blend is not None else []

    @cached_property
    def factor(self) -> float:
        """What counts are multiplied by before log1p, beside the run's target sum: 1 unless another one is asked for.

        Raises:
            InputError: the median of control cells without counts, or values of a run of no known target sum.
        """
        asked = self.config.target_sum
        if asked is None and self.config.format == VCC2025 and self.known.config.target_sum != "median":
            asked = "median"
        if asked is None:
            return 1.0
        own = self.known.normalisation.total
        if own is None:
            raise InputError("The run's log1p values are of no known target sum, so --target-sum cannot change it.")
        if isinstance(asked, str):
            pools = {id(r.pool): r.pool for r in self.requests}.values()
            if any(pool.totals is None for pool in pools):
                raise InputError("Control cells of log1p values have no counts, so --target-sum must be a number.")
            totals = np.concatenate([pool.totals for pool in pools if pool.totals is not None])
            asked = float(np.median(totals[totals > 0]))
            logger.info(f"Values are of counts normalised to {asked:,.0f}, the median of the control cells.")
        return asked / own

    def record(self) -> dict[str, Any]:
        """Provenance and, at the run's own scale, the baselines."""
        checkpoints, weights = (
            [m.checkpoint for m in self.members],
            [m.blend.weights if m.blend else None for m in self.members],
        )
        record = provenance(checkpoints, self.known, self.columns, self.config.missing_genes, weights)
        if self.config.format in ("counts", VCC2026):
            return record
        if self.factor != 1:
            logger.info("Baselines are of the run's own target sum: none are stored beside values of another one.")
            return record | {"scale": "counts", "target_sum": self.factor * float(self.known.normalisation.total or 0)}
        blend = self.members[0].blend
        fitted = blend.baselines if blend is not None else fitted_baselines(checkpoints[0], self.known)
        if fitted is None:
            logger.info("What the run was trained on is not known here, so no baselines are stored.")
            return record
        asked = asked_of(self.requests)
        return record | baselines(fitted, asked, query_of(asked, self.members[0].vectors), self.places)

    def effects(self, real: Callable[[Request], Blocks]) -> Iterator[tuple[Request, np.ndarray, Any]]:
        """In blocks which control cells are moved, and how far; `real` says which are written as they are."""
        return _blocks(self.requests, self.members, self.config.seed, real, predicted_effects)

    def values(self) -> Iterator[tuple[Request, np.ndarray, scipy.sparse.csr_matrix]]:
        """In blocks the cells to write: of what, from which control cells, and their values."""
        seed = self.config.seed
        if self.config.format == "counts":
            controls = counted(self.requests, self.places, self.known.target_sum)
            yield from count_blocks(self.effects(lambda r: [(control_rows(r, seed), None)]), controls, seed)
            return

        def real(request: Request) -> Blocks:
            return real_cells(request.pool, control_rows(request, seed))

        cells = partial(predicted_cells, followed=self.followed)
        for request, rows, block in _blocks(self.requests, self.members, seed, real, cells):
            values = request.pool.whole(rows, block)
            if self.factor != 1:
                values.data = np.log1p(np.expm1(values.data) * np.float32(self.factor)).clip(0, LARGEST_PREDICTED_LOG1P)
            yield request, rows, values if self.places is None else values[:, self.places]


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


def _write(out: Path, what: _What) -> None:
    """Write values and labels of all cells."""
    is_log1p = what.config.format != "counts"
    uns, chosen = {RECORD if is_log1p else COUNTS_RECORD: what.record()}, list[tuple[Request, list[np.ndarray]]]()
    with H5adWriter(out, len(what.genes), "float32") as writer:
        for request, rows, values in what.values():
            writer.add(values)
            if not chosen or chosen[-1][0] is not request:
                chosen.append((request, []))
            chosen[-1][1].append(rows)
        if is_log1p and (share := what.followed.share) is not None:
            uns[RECORD][FOLLOWED] = share
        writer.finish(labels_of(chosen, what.columns), pd.DataFrame(index=pd.Index(what.genes, dtype=str)), uns)


def _submit(out: Path, copies: Mapping[str, Path], what: _What) -> None:
    """Write a submission, and what is asked for beside it."""
    write_submission(
        out,
        copies,
        Path(what.config.vcc) if what.config.vcc is not None else None,
        what.requests,
        what.effects(all_controls),
        what.genes,
        what.places,
        what.record(),
        what.known.target_sum,
        what.config.seed,
    )


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
    return known_with_cells(checkpoint, _read(cache, train_config, checkpoint), train_config, source)


def _also_known(checkpoint: Checkpoint, config: PredictConfig, first: Known) -> Known:
    """The same of another run on the same cells, whose targets and embeddings are not read again."""
    if first.data is None and (known := known_without_cells(checkpoint, config.perturbations)) is not None:
        return known
    train_config, cache, source = find_data(checkpoint, config.cache, config.perturbations)
    data = read_dataset(cache, train_config, stored=stored_features(checkpoint), like=first.data)
    check_data(checkpoint, data)
    return known_with_cells(checkpoint, data, train_config, source)


def _read(cache: Cache, config: TrainConfig, checkpoint: Checkpoint) -> Dataset:
    """The cells of the cache, which must be the checkpoint's."""
    data = read_dataset(cache, config, stored=stored_features(checkpoint), only_controls=True)
    check_data(checkpoint, data)
    if not checkpoint.state["genes"]:
        logger.info(
            f"{checkpoint.folder} does not name its genes: they are taken to be those of {cache.path}, in order."
        )
    return data
