"""Phase one: run the frozen encoder once over all cells and write the store.

The order of things: read every input once and refuse what is wrong; create the store or continue one made the same
way; copy the training targets; fit the projection on a seeded sample; encode shard after shard. Finished rows of an
unfinished shard are kept at least every minute, so that a kill costs little. Of several processes (sest.ranks) each
encodes every n-th piece; the first also creates the groups and fits the projection, for which the others wait.

Shapes: B cells, D native width, E stored width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pandas as pd

from sest.cache import StoreWriter, journal, schema
from sest.cache.storage import storage_at
from sest.cache.writer import GroupPlan, refuse_foreign
from sest.config import EmbedConfig
from sest.embed_plan import (
    EmbedPlan,
    asked_dim,
    group_plan,
    measure_fidelity,
    plan_addition,
    plan_store,
    stored_projection,
)
from sest.encode_rows import Piece, RowEncoder
from sest.encoders import check_encoder
from sest.errors import InputError
from sest.hub import with_local_encoder
from sest.inputs import ROWS_PER_READ, Cells, open_cells, resolve_inputs
from sest.memory import resident_bytes
from sest.progress import Progress
from sest.project import Projection, fit_pca
from sest.ranks import SINGLE, Ranks
from sest.signals import Interrupted, stop_requests

SAMPLE_PIECE = 1024  # cells of the PCA's sample that one process encodes at a time
WAIT_SECONDS = 30.0  # between notes of a process that waits for another


def embed(
    inputs: Sequence[Path],
    cache: str | Path,
    config: EmbedConfig,
    progress: Progress,
    *,
    data_roots: Sequence[Path] = (),
    ranks: Ranks = SINGLE,
    add: bool = False,
    targets: bool = True,
    dry_run: bool = False,
) -> EmbedPlan:
    """Embed every cell of the inputs into the store `cache`; the same call again continues where it stopped.

    Args:
        inputs: .h5ad/.h5 files, or one .toml in cell-load's form.
        cache: the store's folder, or a URL that fsspec knows.
        config: see `EmbedConfig`.
        progress: is told what happens.
        data_roots: folders that a .toml's paths may lead to, beside its own and the working folder.
        ranks: which of several processes with the same inputs and configuration this is.
        add: files that the store does not have yet are added to it.
        targets: store the expression values too, which training needs.
        dry_run: read and check everything, write nothing.

    Raises:
        InputError, StoreError: bad input; nothing was written, or everything finished before is kept.
        Interrupted: after SIGINT or SIGTERM; finished rows are saved.
    """
    sources, splits = resolve_inputs(inputs, data_roots)
    storage = storage_at(cache)
    refuse_foreign(storage)  # all that can be refused before the inputs are read, which can take an hour
    config = with_local_encoder(config, progress)
    check_encoder(config)
    asked_dim(config.dim)
    made = journal.root_attributes(storage) if schema.ROOT in storage.here() else None
    if add and made is None:
        raise InputError(f"--add adds files to a store, and there is none at {cache}. Leave --add out to make one.")
    with ExitStack() as stack:
        cells = open_cells(sources, config, progress, stack)
        if add:
            assert made is not None
            plan = plan_addition(cells, config, made, storage, progress)
        else:
            plan = plan_store(cells, splits, config, progress)
        plan.attributes["targets"] = targets
        plan.attributes["fidelity"] = made.get("fidelity") if made else measure_fidelity(plan, progress)
        if dry_run:
            return plan
        stop = stack.enter_context(stop_requests())  # from here on there is something to save
        writer = stack.enter_context(
            StoreWriter(cache, plan.attributes, rank=ranks.rank, world_size=ranks.world_size, add=add)
        )
        if writer.complete:
            progress.note(f"{cache} is complete already.")
            return dataclasses.replace(plan, complete=True)
        work = _Work(writer, plan, ranks, config, progress, stop, str(cache))
        work.add_groups()
        work.copy_targets()
        work.write_embeddings(work.projection())
        return dataclasses.replace(plan, complete=work.finish())


class _Work:
    """One process's part of making the store; the order of the calls is in `embed`."""

    def __init__(
        self,
        writer: StoreWriter,
        plan: EmbedPlan,
        ranks: Ranks,
        config: EmbedConfig,
        progress: Progress,
        stopping: Callable[[], int],
        cache: str,
    ) -> None:
        self._writer, self._plan, self._ranks, self._config = writer, plan, ranks, config
        self._progress, self._stopping, self._cache = progress, stopping, cache
        self._groups = [group_plan(plan, c, rows) for c, rows in zip(plan.cells, plan.selected, strict=True)]
        self._sampled = [np.zeros((0, plan.encoder.native_dim), np.float32)] * len(plan.cells)

    def _check(self) -> None:
        if signum := self._stopping():
            raise Interrupted(signum, f"Stopped. Finished rows are in {self._cache}; the same command continues there.")

    def _wait(self, until: Callable[[], bool], what: str) -> None:
        """Wait for another process's work; it is found in its journal, or in the spool."""
        said = time.monotonic()
        while not until():
            self._check()
            if time.monotonic() - said > WAIT_SECONDS:
                self._progress.note(f"Waiting for {what}.")
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
            self._wait(lambda: all(map(self._writer.has_group, self._groups)), "rank 0 to create the store")

    def copy_targets(self) -> None:
        """Write this process's missing shards of targets."""
        shards = [(i, shard) for i, group in enumerate(self._groups) for shard in range(len(group.target_shards()))]
        mine = [piece for number, piece in enumerate(shards) if self._ranks.owns(number)]
        missing = [set(self._writer.missing_target_shards(group)) for group in self._groups]
        todo = [(i, shard) for i, shard in mine if shard in missing[i]]
        if todo:
            self._progress.begin("Copying targets", len(mine), "shards", len(mine) - len(todo))
        for i, shard in todo:
            self._check()
            data, indices = _targets(self._plan.cells[i], self._groups[i], shard)
            self._writer.write_target_shard(self._groups[i], shard, data, indices)
            self._progress.advance()

    def projection(self) -> Projection | None:
        """The PCA of the store: fitted by the first process on what all have encoded; None where there is none."""
        plan, writer = self._plan, self._writer
        stored = stored_projection(writer.storage) if writer.has_projection() else None
        if plan.projected and plan.encoder.fitted is None:
            self._encode_sample(needed=stored is None)
        if not plan.projected or stored is not None:
            return stored
        if self._ranks.rank == 0:
            fitted = plan.encoder.fitted or fit_pca(self._sampled, plan.dim)
            writer.write_projection(fitted.arrays(), {"sha256": fitted.sha256, **plan.encoder.projection_attributes()})
        else:
            self._wait(writer.has_projection, "rank 0 to fit the PCA")
        return stored_projection(writer.storage)

    def _encode_sample(self, *, needed: bool) -> None:
        """Native embeddings of the PCA's sample, (n, D) a file, encoded in pieces by all processes.

        Where the PCA is stored but pieces of its sample are gone (a finished store is repaired), they are not
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
        self._progress.begin("Encoding the PCA's sample", sum(len(piece.numbers) for piece in mine), "cells")
        for piece, rows in run.encode(mine):
            if piece.spool not in there:
                self._writer.spool_rows(piece.spool, 0, rows)  # whole: it stands in for all blocks after it
            self._check()
        waiting = list(flat)

        def all_there() -> bool:
            while waiting and whole(waiting[0]):
                del waiting[0]
            return not waiting

        self._wait(all_there, "the other processes' part of the PCA's sample")
        self._sampled = [
            np.concatenate([np.zeros((0, native), np.float32), *(run.spooled(piece) for piece in part)])
            for part in pieces
        ]

    def write_embeddings(self, projection: Projection | None) -> None:
        """Write this process's missing shards of embeddings, each while the next one is encoded."""
        plan, native, width = self._plan, self._plan.encoder.native_dim, self._plan.dim

        def finish(x: np.ndarray) -> np.ndarray:  # (B, D + extra) -> (B, E)
            return projection.apply(x[:, :native]) if projection is not None else x[:, :width]

        shards = [(i, shard) for i, group in enumerate(self._groups) for shard in range(len(group.embedding_shards()))]
        if len(shards) < self._ranks.world_size:
            self._progress.note(
                f"{len(shards):,} of the store's shards for {self._ranks.world_size} processes: some will idle."
            )
        mine = [piece for number, piece in enumerate(shards) if self._ranks.owns(number)]
        missing = [set(self._writer.missing_embedding_shards(group)) for group in self._groups]
        todo = [(i, shard) for i, shard in mine if shard in missing[i]]
        rows = {(i, k): _rows_of(plan.selected[i], self._groups[i], k) for i, k in mine}
        known = {(i, k): np.isin(rows[i, k], plan.sample[i][: len(self._sampled[i])]) for i, k in todo}
        total, left = sum(map(len, rows.values())), sum(int((~known[place]).sum()) for place in todo)
        finished = len(mine) - len(todo)

        def detail() -> str:
            return f"{finished}/{len(mine)} shards, {resident_bytes() / 1e9:.1f} GB"

        self._progress.begin("Embedding", total, "cells", total - left, detail)
        pieces = [
            Piece(
                f"{self._groups[i].path}/{k}" + ("" if len(self._sampled[i]) else "-all"),  # with or without the sample
                plan.cells[i],
                rows[i, k][~known[i, k]],
            )
            for i, k in todo
        ]
        run = self._encoder(finish, width)
        written: Future[None] | None = None
        with ThreadPoolExecutor(1, "write") as thread, closing(run.encode(pieces)) as encoded:
            for (i, k), (piece, values) in zip(todo, encoded, strict=True):
                start, end = self._groups[i].embedding_shards()[k]
                out = np.full((end - start, width), np.nan, np.float32)
                out[piece.numbers - start] = values
                if known[i, k].any():
                    again = rows[i, k][known[i, k]]
                    out[again - start] = finish(self._sampled[i][np.searchsorted(plan.sample[i], again)])
                if self._config.dtype == "float16" and np.nanmax(np.abs(out), initial=0.0) > np.finfo(np.float16).max:
                    raise InputError("The embeddings do not fit float16. Pass --dtype float32.")
                if written is not None:
                    written.result()
                written = thread.submit(self._write, self._groups[i], k, out, piece.spool)
                finished += 1
                self._check()
            if written is not None:
                written.result()

    def _write(self, group: GroupPlan, shard: int, rows: np.ndarray, spool: str) -> None:
        self._writer.write_embedding_shard(group, shard, rows)
        self._writer.drop_spool(spool)

    def _encoder(self, finish: Callable[[np.ndarray], np.ndarray], width: int) -> RowEncoder:
        encoder = self._plan.encoder
        size = encoder.batch_size(self._config.batch_size)
        return RowEncoder(self._writer, encoder, size, self._progress, finish, width, self._stopping, self._check)

    def finish(self) -> bool:
        """Mark the store complete if nothing is left to other processes; returns whether it is."""
        writer = self._writer
        if self._ranks.world_size > 1:
            writer.refresh()
        left = sum(
            len(writer.missing_embedding_shards(group)) + len(writer.missing_target_shards(group))
            for group in self._groups
        )
        if left and not writer.complete:
            self._progress.note(
                f"Rank {self._ranks.rank} has done its part; {left} shards are left to the other processes. "
                "The last of them completes the store; if one died, run it again."
            )
            return False
        if not writer.complete:
            writer.finish()
        return True


def _targets(cells: Cells, group: GroupPlan, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """The values and gene positions of one shard of a file's targets."""
    indptr, dtype = group.indptr, group.target_dtype
    a, b = group.target_shards()[shard]
    data, indices = np.empty(b - a, dtype), np.empty(b - a, np.int32)
    row = int(np.searchsorted(indptr, a, side="right")) - 1  # holds value number a
    stop = int(np.searchsorted(indptr, b, side="left"))
    while row < stop:
        block = cells.file.rows(row, min(row + ROWS_PER_READ, stop))
        first = int(indptr[row])
        low, high = max(a, first), min(b, first + block.nnz)
        data[low - a : high - a] = block.data[low - first : high - first]
        indices[low - a : high - a] = block.indices[low - first : high - first]
        row += block.shape[0]
    return data, indices


def _parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _rows_of(selected: np.ndarray, group: GroupPlan, shard: int) -> np.ndarray:
    """The selected rows that lie in a shard."""
    start, end = group.embedding_shards()[shard]
    return selected[np.searchsorted(selected, start) : np.searchsorted(selected, end)]
