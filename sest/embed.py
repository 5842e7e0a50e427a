"""Phase one: run the frozen encoder once over all cells and write the store.

The order of things: read every input once and refuse what is wrong; create the store or continue one made the same
way; copy the training targets; fit the projection on a seeded sample; encode shard after shard. Finished rows of an
unfinished shard are kept at least every minute, so that a kill costs little.

Shapes: B cells, D native width, E stored width.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from sest import __version__
from sest.cache import StoreWriter, schema
from sest.cache.writer import GroupPlan, refuse_foreign
from sest.config import EmbedConfig
from sest.encoders import CellEncoder, check_encoder, hash_names, make_encoder
from sest.errors import InputError
from sest.inputs import ROWS_PER_READ, Cells, open_cells, resolve_inputs
from sest.progress import Progress
from sest.project import Projection, fit_pca
from sest.signals import Interrupted, stop_requests
from sest.splits import TRAIN, SplitFile, assign_splits

DEFAULT_DIM = 512
SAMPLE_CELLS = 16_384  # at most, for the PCA
SPOOL_SECONDS = 60.0


@dataclass(frozen=True)
class EmbedPlan:
    """What an `embed` command does; `--dry-run` stops here."""

    cells: list[Cells]
    encoder: CellEncoder
    dim: int  # E
    projected: bool  # whether a PCA stands between the encoder and the store
    sample: list[np.ndarray]  # per file: sorted rows of the PCA's sample
    selected: list[np.ndarray]  # per file: sorted rows to embed
    attributes: dict[str, Any]  # of the store's root

    @property
    def n_selected(self) -> int:
        return sum(map(len, self.selected))

    @property
    def n_bytes(self) -> int:
        """Bytes of embeddings plus uncompressed targets."""
        width = np.dtype(self.attributes["dtype"]).itemsize
        cells = sum(c.file.n_cells for c in self.cells)
        return cells * self.dim * width + sum(int(c.scan.indptr[-1]) * 6 for c in self.cells)


def embed(
    inputs: Sequence[Path],
    cache: Path,
    config: EmbedConfig,
    progress: Progress,
    *,
    data_roots: Sequence[Path] = (),
    dry_run: bool = False,
) -> EmbedPlan:
    """Embed every cell of the inputs into the store `cache`; the same call again continues where it stopped.

    Args:
        inputs: .h5ad/.h5 files, or one .toml in cell-load's form.
        cache: the store's folder.
        config: see `EmbedConfig`.
        progress: is told what happens.
        data_roots: folders that a .toml's paths may lead to, beside its own and the working folder.
        dry_run: read and check everything, write nothing.

    Raises:
        InputError, StoreError: bad input; nothing was written, or everything finished before is kept.
        Interrupted: after SIGINT or SIGTERM; finished rows are saved.
    """
    sources, splits = resolve_inputs(inputs, data_roots)
    refuse_foreign(cache)  # all that can be refused before the inputs are read, which can take an hour
    check_encoder(config)
    _asked_dim(config.dim)
    with ExitStack() as stack:
        cells = open_cells(sources, config, progress, stack)
        plan = _plan(cells, splits, config, progress)
        if dry_run:
            return plan
        stop = stack.enter_context(stop_requests())  # from here on there is something to save
        writer = stack.enter_context(StoreWriter(cache, plan.attributes))
        if writer.complete:
            progress.note(f"{cache} is complete already.")
            return plan
        groups = _add_groups(writer, plan)
        copies = [_TargetCopy(writer, c, group, progress) for c, group in zip(cells, groups, strict=True)]
        progress.begin("Copying targets", sum(c.n_shards for c in copies), "shards", sum(c.n_done for c in copies))
        for copy in copies:
            copy.run(lambda: _check_stop(stop, cache))
        _encode_all(writer, plan, groups, config, progress, stop, cache)
        writer.finish()
        return plan


def _check_stop(stop: Callable[[], int], cache: Path) -> None:
    if stop():
        raise Interrupted(stop(), f"Stopped. Finished rows are in {cache}; the same command continues there.")


def _plan(cells: list[Cells], splits: SplitFile | None, config: EmbedConfig, progress: Progress) -> EmbedPlan:
    """Load the encoder, decide the width and the sample; everything that can be refused is refused here."""
    encoder = make_encoder(config, cells, progress)
    selected = [
        np.flatnonzero(c.is_control) if config.cells == "controls" else np.arange(c.file.n_cells) for c in cells
    ]
    if not sum(map(len, selected)):
        raise InputError("--cells controls, but no file has control cells. Pass --pert-col and --control.")
    eligible = _eligible(cells, selected, splits, config.seed)
    n_sample = min(SAMPLE_CELLS, sum(map(len, eligible)))
    dim, projected = _width(config.dim, encoder, n_sample)
    sample = _draw(eligible, n_sample, config.seed) if projected else [np.zeros(0, np.int64)] * len(cells)
    if projected and splits is not None:
        progress.note(f"The PCA is fitted on training cells of {splits.path.name} only.")
    encoder.prepare(cells, sample, _asked_dim(config.dim), dim)
    dim = encoder.fitted.basis.shape[1] if encoder.fitted else dim
    if config.dim in (None, "native"):
        progress.note(
            f"Stored width: {dim}" + (f" (PCA of {encoder.native_dim})." if projected else " (the native width).")
        )
    sample_hash = hashlib.sha256(b"".join(rows.astype(np.int64).tobytes() for rows in sample)).hexdigest()
    attributes = {
        "schema_version": schema.SCHEMA_VERSION,
        "sest_version": __version__,
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        "gene_table_sha256": encoder.gene_table_sha256(),
        "native_dim": encoder.native_dim,
        "dim": dim,
        "projection": "pca" if projected else ("state" if config.dim == "state" else "none"),
        "projection_sample_sha256": sample_hash if projected else None,
        "dtype": config.dtype,
        "precision": encoder.precision,
        "cells": config.cells,
        "seed": config.seed,
        "groups": [c.group for c in cells],
        "inputs": {c.group: {**c.identity(), "genes_sha256": hash_names(encoder.gene_names(c))} for c in cells},
        "licence": schema.LICENCE_NOTE if encoder.name != "pca" else None,
    }
    return EmbedPlan(cells, encoder, dim, projected, sample, selected, attributes)


def _asked_dim(text: str | None) -> int | None:
    """The number that --dim gives; None for 'native', 'state' and nothing. Raises InputError for anything else."""
    if text in (None, "native", "state"):
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise InputError(f"--dim is '{text}'; it takes a number of at least 1, 'native' or 'state'.")
    return int(text)


def _width(asked: str | None, encoder: CellEncoder, n_sample: int) -> tuple[int, bool]:
    """The stored width and whether a PCA makes it."""
    native = encoder.native_dim
    if asked == "state":
        if encoder.n_extra == 0:
            raise InputError(f"--dim state is what an SE encoder gives; '{encoder.name}' has no dataset columns.")
        return native + encoder.n_extra, False
    number = _asked_dim(asked)
    dim = number or (native if asked == "native" else min(DEFAULT_DIM, native))
    if number is None and encoder.always_projected:
        return dim, True  # or its rank, where that is smaller
    if dim > native:
        raise InputError(f"--dim {dim} is above the native width {native} of '{encoder.name}'. Use {native} or less.")
    projected = dim < native or encoder.always_projected
    if projected and dim > n_sample - 1:
        raise InputError(
            f"A PCA to {dim} dimensions needs more than {dim} cells; there are {n_sample}. "
            f"Pass --dim native, or --dim {max(1, n_sample - 1)} or less."
        )
    return dim, projected


def _eligible(cells: list[Cells], selected: list[np.ndarray], splits: SplitFile | None, seed: int) -> list[np.ndarray]:
    """Rows the PCA may be fitted on: training cells only, where splits are given."""
    if splits is None:
        return selected
    for c in cells:
        if c.columns.perturbation is None:
            raise InputError(
                f"{c.file.path} has no perturbation column, which the splits of {splits.path} need. "
                "Pass --pert-col, or give the files instead of the .toml."
            )
    masks = assign_splits([c.as_group() for c in cells], splits, seed=seed).masks
    return [rows[(masks[c.group][rows] & TRAIN) > 0] for c, rows in zip(cells, selected, strict=True)]


def _draw(eligible: list[np.ndarray], n_sample: int, seed: int) -> list[np.ndarray]:
    """A seeded sample over all files: per file, sorted rows."""
    ends = np.cumsum([0, *map(len, eligible)])
    chosen = np.sort(np.random.default_rng([seed, 0x5A3B1E]).choice(ends[-1], n_sample, replace=False))
    return [
        rows[chosen[np.searchsorted(chosen, a) : np.searchsorted(chosen, b)] - a]
        for rows, a, b in zip(eligible, ends, ends[1:], strict=False)
    ]


def _add_groups(writer: StoreWriter, plan: EmbedPlan) -> list[GroupPlan]:
    groups = []
    for c, selected in zip(plan.cells, plan.selected, strict=True):
        control = int(c.is_control.sum())
        attributes = {
            **c.identity(),
            "dataset": c.source.dataset,
            "n_cells": c.file.n_cells,
            "n_genes": c.file.n_genes,
            "n_embedded": len(selected),
            "perturbations": len(set(c.obs["perturbation"]) - {c.columns.control}) if "perturbation" in c.obs else 0,
            "controls": control,
        }
        group = GroupPlan(
            path=c.group,
            indptr=c.scan.indptr,
            n_genes=c.file.n_genes,
            target_dtype=_target_dtype(c),
            dim=plan.dim,
            embedding_dtype=plan.attributes["dtype"],
            attributes=attributes,
        )
        names = plan.encoder.gene_names(c)
        writer.add_group(group, c.obs, pd.DataFrame(index=pd.Index(names, dtype=str)))
        groups.append(group)
    return groups


def _target_dtype(cells: Cells) -> str:
    """The smallest type that holds a file's values exactly: integers for counts."""
    if cells.scale == "counts" and cells.scan.all_integer:
        for dtype in ("int16", "int32"):
            if cells.scan.max_value <= np.iinfo(dtype).max:
                return dtype
    return "float32"


class _TargetCopy:
    """Copies one file's values into X of its group, shard by shard."""

    def __init__(self, writer: StoreWriter, cells: Cells, group: GroupPlan, progress: Progress) -> None:
        self._writer, self._cells, self._group, self._progress = writer, cells, group, progress
        self._missing = writer.missing_target_shards(group)
        self.n_shards = len(group.target_shards())
        self.n_done = self.n_shards - len(self._missing)

    def run(self, check: Callable[[], None]) -> None:
        indptr, dtype = self._group.indptr, self._group.target_dtype
        for shard in self._missing:
            check()
            a, b = self._group.target_shards()[shard]
            data, indices = np.empty(b - a, dtype), np.empty(b - a, np.int32)
            row = int(np.searchsorted(indptr, a, side="right")) - 1  # holds value number a
            stop = int(np.searchsorted(indptr, b, side="left"))
            while row < stop:
                block = self._cells.file.rows(row, min(row + ROWS_PER_READ, stop))
                first = int(indptr[row])
                low, high = max(a, first), min(b, first + block.nnz)
                data[low - a : high - a] = block.data[low - first : high - first]
                indices[low - a : high - a] = block.indices[low - first : high - first]
                row += block.shape[0]
            self._writer.write_target_shard(self._group, shard, data, indices)
            self._progress.advance()


class _RowEncoder:
    """Encodes chosen rows of one file in batches, keeping finished rows in the store's spool."""

    def __init__(
        self,
        writer: StoreWriter,
        encoder: CellEncoder,
        batch_size: int,
        progress: Progress,
        stop: Callable[[], int],
        cache: Path,
    ) -> None:
        self._writer, self._encoder, self._batch_size = writer, encoder, batch_size
        self._progress, self._stop, self._cache = progress, stop, cache

    def spooled(self, name: str, n_rows: int, width: int) -> np.ndarray:
        """Rows 0..k of `name` that an interrupted run finished: (k, width)."""
        parts, done = [], 0
        for start, rows in self._writer.spooled_rows(name):
            if start != done or rows.shape[1:] != (width,) or done + len(rows) > n_rows:
                break
            parts.append(rows)
            done += len(rows)
        return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)

    def run(
        self, name: str, cells: Cells, rows: np.ndarray, width: int, finish: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Encode `rows` of a file: (n,) sorted row numbers -> (n, width) float32, after `finish` of each batch."""
        out = np.empty((len(rows), width), np.float32)
        before = self.spooled(name, len(rows), width)
        out[: len(before)] = before
        kept = done = len(before)  # rows in the spool; rows encoded
        saved = time.monotonic()
        for start, block in self._blocks(cells, rows, done):
            for i in range(0, block.shape[0], self._batch_size):
                part = block[i : i + self._batch_size]
                numbers = rows[start + i : start + i + part.shape[0]]
                encoded = finish(self._encoder.encode(cells, part, numbers))
                if not np.isfinite(encoded).all():
                    bad = numbers[~np.isfinite(encoded).all(1)][0]
                    raise InputError(
                        f"{cells.file.path}: the embedding of cell {bad} is not finite. Try --precision fp32."
                    )
                done = start + i + part.shape[0]
                out[done - part.shape[0] : done] = encoded
                self._progress.advance(part.shape[0])
                late = time.monotonic() - saved > SPOOL_SECONDS
                if late or self._stop():
                    self._writer.spool_rows(name, kept, out[kept:done])
                    kept, saved = done, time.monotonic()
                    _check_stop(self._stop, self._cache)
        return out

    def _blocks(self, cells: Cells, rows: np.ndarray, done: int) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
        """Yield (place in `rows`, cells) from `done` on; batches begin at multiples of the batch size from there."""
        step = max(ROWS_PER_READ // self._batch_size, 1) * self._batch_size
        for start in range(done, len(rows), step):
            yield start, cells.read(rows[start : start + step])


def _encode_all(
    writer: StoreWriter,
    plan: EmbedPlan,
    groups: list[GroupPlan],
    config: EmbedConfig,
    progress: Progress,
    stop: Callable[[], int],
    cache: Path,
) -> None:
    """Fit the projection where there is one, then write every missing shard of embeddings."""
    encoder = plan.encoder
    run = _RowEncoder(writer, encoder, encoder.batch_size(config.batch_size), progress, stop, cache)
    projection = _stored_projection(writer) or encoder.fitted
    sampled = [np.zeros((0, encoder.native_dim), np.float32)] * len(groups)
    if plan.projected and encoder.fitted is None:
        sampled = _encode_sample(run, writer, plan, progress, needed=projection is None)
        projection = projection or fit_pca(sampled, plan.dim)
    if projection is not None and not writer.has_projection():
        writer.write_projection(projection.arrays(), {"sha256": projection.sha256, **encoder.projection_attributes()})
    native, width = encoder.native_dim, plan.dim

    def finish(x: np.ndarray) -> np.ndarray:  # (B, D + extra) -> (B, E)
        return projection.apply(x[:, :native]) if projection is not None else x[:, :width]

    missing = [(i, shard) for i, group in enumerate(groups) for shard in writer.missing_embedding_shards(group)]
    left = sum(len(_rows_of(plan.selected[i], groups[i], shard)) for i, shard in missing)
    progress.begin("Embedding", plan.n_selected, "cells", plan.n_selected - left)
    for i, shard in missing:
        group, c = groups[i], plan.cells[i]
        start, end = group.embedding_shards()[shard]
        rows = _rows_of(plan.selected[i], group, shard)
        known = np.isin(rows, plan.sample[i]) if len(sampled[i]) else np.zeros(len(rows), bool)
        out = np.full((end - start, width), np.nan, np.float32)
        if known.any():
            out[rows[known] - start] = finish(sampled[i][np.searchsorted(plan.sample[i], rows[known])])
        spool = f"{group.path}/{shard}"
        progress.advance(int(known.sum()) + len(run.spooled(spool, int((~known).sum()), width)))
        out[rows[~known] - start] = run.run(spool, c, rows[~known], width, finish)
        if config.dtype == "float16" and np.nanmax(np.abs(out), initial=0.0) > np.finfo(np.float16).max:
            raise InputError("The embeddings do not fit float16. Pass --dtype float32.")
        writer.write_embedding_shard(group, shard, out)
        writer.drop_spool(spool)
        _check_stop(stop, cache)


def _encode_sample(
    run: _RowEncoder, writer: StoreWriter, plan: EmbedPlan, progress: Progress, *, needed: bool
) -> list[np.ndarray]:
    """Native embeddings of the PCA's sample, (n, D) a file, from the spool where they are there.

    Where they are not and the PCA is stored (a finished store is repaired), they are not `needed`, and the result is
    empty: these cells are encoded with their shards.
    """
    native = plan.encoder.native_dim
    names = [f".sample/{c.group}" for c in plan.cells]
    done = [len(run.spooled(name, len(rows), native)) for name, rows in zip(names, plan.sample, strict=True)]
    total = sum(map(len, plan.sample))
    if not needed and sum(done) < total:
        writer.drop_spool("")  # rows of a shard spooled beside a sample are out of place without it
        return [np.zeros((0, native), np.float32)] * len(names)
    progress.begin("Encoding the PCA's sample", total, "cells", sum(done))
    sampled = []
    for name, c, rows, n in zip(names, plan.cells, plan.sample, done, strict=True):
        sampled.append(run.run(name, c, rows, native, lambda x: x[:, :native]))
        if n < len(rows):
            writer.spool_rows(name, 0, sampled[-1])  # whole: it stands in for all blocks after it
    return sampled


def _rows_of(selected: np.ndarray, group: GroupPlan, shard: int) -> np.ndarray:
    """The selected rows that lie in a shard."""
    start, end = group.embedding_shards()[shard]
    return selected[np.searchsorted(selected, start) : np.searchsorted(selected, end)]


def _stored_projection(writer: StoreWriter) -> Projection | None:
    """The projection an interrupted run stored, so that all shards of a store share one."""
    if not writer.has_projection():
        return None
    return Projection(**writer.read_projection())
