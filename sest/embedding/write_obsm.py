"""Copy an .h5ad and put a cache's embeddings into it, as `state emb transform` does."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py

from sest import progress
from sest.cache import Group
from sest.cache.disk import file_aside
from sest.errors import InputError, shown
from sest.files.containers import opened_hdf5
from sest.files.formats import is_hdf5

ROWS_PER_BLOCK = 8192


def check_key(source: Path, key: str) -> None:
    """Refuse a name that the embeddings cannot have, before an hour of encoding.

    Raises:
        InputError: no name of an entry, no .h5ad file, or `source` has obsm `key` already.
    """
    if "/" in key or not key:
        raise InputError(f"--obsm-key {key!r} cannot name an entry of obsm.")
    if not is_hdf5(source):
        raise InputError(
            f"--to-h5ad copies an .h5ad file, and {source} is none. Pass --cache, or save it as .h5ad first."
        )
    with opened_hdf5(source) as file:
        there = list(file["obsm"]) if "obsm" in file else []
    if key in there:
        raise InputError(f"{source} has obsm {key!r} already ({shown(there)}). Pass another --obsm-key.")


def write_obsm(
    source: Path,
    group: Group,
    out: Path,
    key: str,
    dim: int,
) -> None:
    """Write `out`: a copy of `source` whose obsm[`key`] is the group's embeddings, (N, dim) float32.

    Made aside and renamed: it is there whole or not at all. Memory does not grow with the number of cells.

    Raises:
        InputError: the disk has no room for it.
    """
    need, free = source.stat().st_size + 4 * group.n_cells * dim, shutil.disk_usage(out.parent).free
    if need > free:
        raise InputError(f"{out} takes {need / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB.")
    progress.begin(f"Writing {out.name}", group.n_cells, "cells")
    with file_aside(out) as aside:
        shutil.copyfile(source, aside)
        with h5py.File(aside, "r+", locking=False) as file:  # some network file systems have no locks
            obsm = file.require_group("obsm")
            obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            rows = min(1024, group.n_cells)
            stored = obsm.create_dataset(key, (group.n_cells, dim), "float32", chunks=(rows, dim))
            stored.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            for start in range(0, group.n_cells, ROWS_PER_BLOCK):
                stop = min(start + ROWS_PER_BLOCK, group.n_cells)
                stored[start:stop] = group.embeddings(start, stop)
                progress.advance(stop - start)
