"""Phase one: run the frozen encoder once over all cells and write the cache.

The order of things: read every input once and refuse what is wrong; create the cache or continue one made the same
way; copy the training targets; fit the projection on a seeded sample; encode shard after shard. Finished rows of an
unfinished shard are kept at least every minute, so that a kill costs little. Of several processes (sest.machine.ranks)
each encodes every n-th piece; the first also creates the groups and fits the projection, for which the others wait.

Shapes: B cells, D native width, E stored width.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sest import progress
from sest.cache import CacheWriter, journal, schema
from sest.cache.layout import GroupPlan
from sest.cache.locks import Watch
from sest.cache.storage import storage_at
from sest.cache.writer import refuse_foreign
from sest.cells.inputs import ROWS_PER_READ, open_cells, resolve_inputs
from sest.config import EmbedConfig
from sest.embedding.plan import (
    EmbedPlan,
    embedding_codec,
    group_plan,
    measure_fidelity,
    plan_addition,
    plan_alike,
    plan_cache,
    stored_projection,
)
from sest.embedding.rows import Piece, RowEncoder
from sest.encoder.choose import check_encoder, needs_weights
from sest.encoder.made import Made, alike
from sest.encoder.projection import Projection, fit_pca
from sest.errors import InputError
from sest.files.cell_file import CellFile
from sest.machine.memory import resident_bytes
from sest.machine.ranks import SINGLE, Ranks
from sest.machine.signals import StopRequest, TimeLimit, stop_requests
from sest.options import seconds_of
from sest.se.hub import with_local_encoder

logger = logging.getLogger(__name__)

SAMPLE_PIECE = 1024  # cells of the PCA's sample that one process encodes at a time
WAIT_SECONDS = 30.0  # between notes of a process that waits for another
LOOK_SECONDS = 5.0  # between looks whether that one runs


def embed(
    inputs: Sequence[Path],
    cache: str | Path,
    config: EmbedConfig,
    *,
    data_roots: Sequence[Path] = (),
    ranks: Ranks = SINGLE,
    add: bool = False,
    like: Made | None = None,
    targets: bool = True,
    dry_run: bool = False,
) -> EmbedPlan:
    """Embed every cell of the inputs into a cache; the same call again continues where it stopped.

    Args:
        inputs: .h5ad/.h5 files, or one .toml in cell-load's form.
        cache: its folder, or a URL that fsspec knows.
        config: see `EmbedConfig`.
        data_roots: folders that a .toml's paths may lead to, beside its own and the working folder.
        ranks: which of several processes with the same inputs and configuration this is.
        add: files that the cache does not have yet are added to it.
        like: make embeddings that mean the same as others: the same encoder and the same projection.
        targets: store the expression values too, which training needs.
        dry_run: read and check everything, write nothing.

    Raises:
        InputError, CacheError: bad input; nothing was written, or everything finished before is kept.
        Interrupted: after a signal, or when `max_time` is over; finished rows are saved.
    """
    if config.missing_genes != "error" and not (add or like):
        raise InputError(
            "Files that are embedded together use the genes that all of them have. --missing-genes is for files that "
            "join a cache with --add, or are embedded --like another; leave it out."
        )
    if like is not None:
        if add:
            raise InputError("Files that join a cache with --add are embedded as it was. Leave --like out.")
        config = alike(config, like)
    limit = TimeLimit(seconds_of(config.max_time), time.monotonic())
    sources, splits = resolve_inputs(inputs, data_roots)
    storage = storage_at(cache)
    refuse_foreign(storage)  # all that can be refused before the inputs are read, which can take an hour
    config = with_local_encoder(config)
    check_encoder(config)
    existing = journal.root_attributes(storage) if schema.ROOT in storage.here() else None
    if add and existing is None:
        raise InputError(f"--add adds files to a cache, and there is none at {cache}. Leave --add out to make one.")
    with ExitStack() as stack:
        cells = open_cells(sources, config, stack)
        if add and existing is not None:
            plan = plan_addition(cells, config, existing, storage)
        elif like is not None:
            plan = plan_alike(cells, config, like)
        else:
            plan = plan_cache(cells, splits, config)
        plan.attributes["targets"] = targets
        plan.attributes["fidelity"] = existing.get("fidelity") if existing else measure_fidelity(plan)
        plan.attributes.update(embedding_codec(config.cells, existing))
        if existing is None and needs_weights(config.encoder):
            plan.attributes[schema.ENCODER_FOLDER] = _folder_of(Path(config.encoder))
        if dry_run:
            return plan
        # from here on there is something to save
        saved = f"Stopped. Finished rows are in {cache}; the same command continues there."
        stop = stack.enter_context(stop_requests(saved, limit))
        writer = CacheWriter(cache, plan.attributes, rank=ranks.rank, world_size=ranks.world_size, add=add)
        stack.enter_context(writer)
        if writer.complete:
            logger.info(f"{cache} is complete already.")
            return dataclasses.replace(plan, complete=True)
        work = _Work(writer, plan, ranks, config.batch_size, stop)
        work.add_groups()
        work.copy_targets()
        work.write_embeddings(work.projection())
        return dataclasses.replace(plan, complete=work.finish())


def _folder_of(encoder: Path) -> str:
    """Where the files of an SE encoder are, for `--perturbations encoder`."""
    return str((encoder if encoder.is_dir() else encoder.parent).resolve())


@dataclass(frozen=True)
class _Shard:
    """A shard of embeddings that this process writes."""

    group: int  # place in EmbedPlan.cells
    number: int
    rows: np.ndarray  # (n,) sorted rows of the file that are embedded
    sampled: np.ndarray  # (n,) bool: those that were encoded with the PCA's sample


class _Work:
    """One process's part of making the cache; the order of the calls is in `embed`.

    Args:
        batch_size: as asked; 0: the encoder decides.
    """

    def __init__(self, writer: CacheWriter, plan: EmbedPlan, ranks: Ranks, batch_size: int, stop: StopRequest) -> None:
        self._writer, self._plan, self._ranks, self._batch_size, self._stop = writer, plan, ranks, batch_size, stop
        self._groups = [group_plan(plan, c, rows) for c, rows in zip(plan.cells, plan.selected, strict=True)]
        self._sampled = [np.zeros((0, plan.encoder.native_dim), np.float32)] * len(plan.cells)

    def _wait(self, until: Callable[[], bool], what: str, whose: Callable[[], set[int]] = lambda: {0}) -> None:
        """Wait for another process's work; it is found in its journal, or in the spool.

        Raises:
            CacheError: one of the ranks `whose` work it is has died, or none goes on.
        """
        watch, idle = Watch(self._writer.storage, self._ranks.rank), list[int]()
        said, looked = time.monotonic(), -math.inf
        while not until():
            self._stop.check()
            if time.monotonic() - looked > LOOK_SECONDS:
                idle, looked = watch.look(whose()), time.monotonic()
            if time.monotonic() - said > WAIT_SECONDS:
                who = f"; rank {idle[0]} does not write yet, or no longer" if idle else ""
                logger.info(f"Waiting for {what}{who}.")
                said = time.monotonic()
            time.sleep(0.2)
            self._writer.refresh()

    def add_groups(self) -> None:
        """Create the groups, or wait until the first process has."""
        if self._ranks.rank == 0:
            for c, group in zip(self._plan.cells, self._groups, strict=True):
                names = self._plan.encoder.gene_names(c)
                self._writer.add_group(group, c.obs, pd.DataFrame(index=pd.Index(names, dtype=str)))
        else:
            self._wait(lambda: all(map(self._writer.has_group, self._groups)), "rank 0 to create the cache")

    def _mine(self, n_shards: Iterable[int]) -> list[tuple[int, int]]:
        """This process's shards of all groups, which have `n_shards`: (number of the group, number of the shard)."""
        shards = [(i, shard) for i, n in enumerate(n_shards) for shard in range(n)]
        return [place for number, place in enumerate(shards) if self._ranks.owns(number)]

    def copy_targets(self) -> None:
        """Write this process's missing shards of targets."""
        mine = self._mine(len(group.target_shards()) for group in self._groups)
        missing = [set(self._writer.missing_target_shards(group)) for group in self._groups]
        todo = [(i, shard) for i, shard in mine if shard in missing[i]]
        if todo:
            progress.begin("Copying targets", len(mine), "shards", len(mine) - len(todo))
        for i, shard in todo:
            self._stop.check()
            data, indices = _targets(self._plan.cells[i].file, self._groups[i], shard)
            self._writer.write_target_shard(self._groups[i], shard, data, indices)
            progress.advance()

    def projection(self) -> Projection | None:
        """The PCA of the cache: fitted by the first process on what all have encoded; None where there is none."""
        plan, writer = self._plan, self._writer
        stored = stored_projection(writer.storage) if writer.has_projection() else None
        if plan.projected and plan.encoder.fitted is None and plan.given is None:
            self._encode_sample(needed=stored is None)
        if not plan.projected or stored is not None:
            return stored
        if self._ranks.rank == 0:
            fitted = plan.given or plan.encoder.fitted or fit_pca(self._sampled, plan.dim)
            writer.write_projection(fitted.arrays(), {"sha256": fitted.sha256, **plan.encoder.projection_attributes()})
        else:
            self._wait(writer.has_projection, "rank 0 to fit the PCA")
        return stored_projection(writer.storage)

    def _encode_sample(self, *, needed: bool) -> None:
        """Native embeddings of the PCA's sample, (n, D) a file, encoded in pieces by all processes.

        Where the PCA is stored but pieces of its sample are gone (a finished cache is repaired), they are not
        `needed`: these cells are encoded with their shards.
        """
        native = self._plan.encoder.native_dim
        pieces = [
            [Piece(f".sample/{c.group}/{k}", c, part) for k, part in enumerate(_parts(rows, SAMPLE_PIECE))]
            for c, rows in zip(self._plan.cells, self._plan.sample, strict=True)
        ]
        flat = [piece for part in pieces for piece in part]
        mine = [piece for number, piece in enumerate(flat) if self._ranks.owns(number)]
        run = self._encoder(lambda x: x[:, :native], native)

        def whole(piece: Piece) -> bool:
            return len(run.spooled(piece)) == len(piece.numbers)

        there = {piece.spool for piece in flat if whole(piece)}
        if not needed and len(there) < len(flat):
            return
        progress.begin("Encoding the PCA's sample", sum(len(piece.numbers) for piece in mine), "cells")
        for piece, rows in run.encode(mine):
            if piece.spool not in there:
                self._writer.spool_rows(piece.spool, 0, rows)  # whole: it stands in for all blocks after it
            self._stop.check()
        waiting = list(flat)

        def all_there() -> bool:
            while waiting and whole(waiting[0]):
                del waiting[0]
            return not waiting

        self._wait(
            all_there,
            "the other processes' part of the PCA's sample",
            lambda: {flat.index(waiting[0]) % self._ranks.world_size},
        )
        self._sampled = [
            np.concatenate([np.zeros((0, native), np.float32), *(run.spooled(piece) for piece in part)])
            for part in pieces
        ]

    def write_embeddings(self, projection: Projection | None) -> None:
        """Write this process's missing shards of embeddings, each while the next one is encoded."""
        native, width = self._plan.encoder.native_dim, self._plan.dim

        def finish(x: np.ndarray) -> np.ndarray:  # (B, D + extra) -> (B, E)
            return projection.apply(x[:, :native]) if projection is not None else x[:, :width]

        mine, todo = self._embedding_shards()
        total, left = sum(len(shard.rows) for shard in mine), sum(int((~shard.sampled).sum()) for shard in todo)
        finished = len(mine) - len(todo)

        def detail() -> str:
            return f"{finished}/{len(mine)} shards, {resident_bytes() / 1e9:.1f} GB"

        progress.begin("Embedding", total, "cells", total - left, detail)
        run = self._encoder(finish, width)
        written: Future[None] | None = None
        with ThreadPoolExecutor(1, "write") as thread, closing(run.encode([self._piece(s) for s in todo])) as encoded:
            for shard, (piece, values) in zip(todo, encoded, strict=True):
                rows = self._whole(shard, values, finish)
                if written is not None:
                    written.result()
                written = thread.submit(self._write, shard, rows, piece.spool)
                finished += 1
                self._stop.check()
            if written is not None:
                written.result()

    def _embedding_shards(self) -> tuple[list[_Shard], list[_Shard]]:
        """This process's shards of embeddings: all of them, and those that are missing."""
        n_shards = [len(group.embedding_shards()) for group in self._groups]
        if sum(n_shards) < self._ranks.world_size:
            logger.info(
                f"{sum(n_shards):,} of the cache's shards for {self._ranks.world_size} processes: some will idle."
            )
        mine = []
        for i, number in self._mine(n_shards):
            rows = _between(self._plan.selected[i], *self._groups[i].embedding_shards()[number])
            sampled = np.isin(rows, self._plan.sample[i][: len(self._sampled[i])])
            mine.append(_Shard(i, number, rows, sampled))
        missing = [set(self._writer.missing_embedding_shards(group)) for group in self._groups]
        return mine, [shard for shard in mine if shard.number in missing[shard.group]]

    def _piece(self, shard: _Shard) -> Piece:
        """What is left to encode of a shard; its spool is another one where the sample is not at hand."""
        spool = f"{self._groups[shard.group].path}/{shard.number}"
        if not len(self._sampled[shard.group]):
            spool += "-all"
        return Piece(spool, self._plan.cells[shard.group], shard.rows[~shard.sampled])

    def _whole(self, shard: _Shard, values: np.ndarray, finish: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """All rows of a shard, (rows, E): `values` of its piece, those of the sample, NaN where nothing is embedded."""
        start, stop = self._groups[shard.group].embedding_shards()[shard.number]
        rows = np.full((stop - start, self._plan.dim), np.nan, np.float32)
        rows[shard.rows[~shard.sampled] - start] = values
        if shard.sampled.any():
            again = shard.rows[shard.sampled]
            sampled = np.searchsorted(self._plan.sample[shard.group], again)
            rows[again - start] = finish(self._sampled[shard.group][sampled])
        half = self._plan.attributes["dtype"] == "float16"
        if half and np.nanmax(np.abs(rows), initial=0.0) > np.finfo(np.float16).max:
            raise InputError("The embeddings do not fit float16. Pass --dtype float32.")
        return rows

    def _write(self, shard: _Shard, rows: np.ndarray, spool: str) -> None:
        self._writer.write_embedding_shard(self._groups[shard.group], shard.number, rows)
        self._writer.drop_spool(spool)

    def _encoder(self, finish: Callable[[np.ndarray], np.ndarray], width: int) -> RowEncoder:
        encoder = self._plan.encoder
        size = encoder.batch_size(self._batch_size)
        return RowEncoder(self._writer, encoder, size, finish, width, self._stop)

    def finish(self) -> bool:
        """Mark the cache complete if nothing is left to other processes; returns whether it is."""
        writer = self._writer
        if self._ranks.world_size > 1:
            writer.refresh()
        left = sum(
            len(writer.missing_embedding_shards(group)) + len(writer.missing_target_shards(group))
            for group in self._groups
        )
        if left and not writer.complete:
            logger.info(
                f"Rank {self._ranks.rank} has done its part; {left} shards are left to the other processes. "
                "The last of them completes the cache; if one died, run it again."
            )
            return False
        if not writer.complete:
            writer.finish()
        return True


def _targets(file: CellFile, group: GroupPlan, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """The values and gene positions of one shard of a file's targets."""
    indptr, dtype = group.indptr, group.target_dtype
    a, b = group.target_shards()[shard]
    data, indices = np.empty(b - a, dtype), np.empty(b - a, np.int32)
    row = int(np.searchsorted(indptr, a, side="right")) - 1  # holds value number a
    stop = int(np.searchsorted(indptr, b, side="left"))
    while row < stop:
        block = file.rows(row, min(row + ROWS_PER_READ, stop))
        first = int(indptr[row])
        low, high = max(a, first), min(b, first + block.nnz)
        data[low - a : high - a] = block.data[low - first : high - first]
        indices[low - a : high - a] = block.indices[low - first : high - first]
        row += block.shape[0]
    return data, indices


def _parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _between(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Those of sorted rows from `start` to before `stop`."""
    return rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
