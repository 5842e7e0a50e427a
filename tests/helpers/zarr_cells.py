"""Cells as Zarr of every kind that anndata reads."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import scipy.sparse as sp
import zarr

KINDS = ("zarr2", "zarr3", "sharded", "zip")


@contextmanager
def settings(version: int) -> Iterator[None]:
    """What anndata writes Zarr with."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            "Writing zarr v2 data|Consolidated metadata is currently not part|This setting will be|zarr v3 will",
        )
        unsharded = {"auto_shard_zarr_v3": False} if hasattr(ad.settings, "auto_shard_zarr_v3") else {}
        with ad.settings.override(zarr_write_format=version, **unsharded):
            yield


def as_zarr(path: Path, adata: ad.AnnData, kind: str) -> Path:
    """Write cells as Zarr; "sharded" has several chunks a shard."""
    with settings(2 if kind == "zarr2" else 3):
        adata.write_zarr(path)
    if kind == "sharded":
        _shard(path, adata)
    if kind != "zip":
        return path
    with zipfile.ZipFile(archive := path.with_suffix(".zarr.zip"), "w") as file:
        for part in sorted(path.rglob("*")):
            if part.is_file():
                file.write(part, part.relative_to(path))
    shutil.rmtree(path)
    return archive


def _shard(path: Path, adata: ad.AnnData) -> None:
    """Write X again with several chunks a shard."""
    group: Any = zarr.open_group(path, mode="r+", use_consolidated=False)
    sparse = sp.issparse(adata.X)
    for name in ("X/data", "X/indices") if sparse else ("X",):
        stored, attributes = group[name][:], dict(group[name].attrs)
        del group[name]
        sizes: dict[str, Any] = (
            {"chunks": (64,), "shards": (256,)} if sparse else {"chunks": (8, 31), "shards": (16, 31)}
        )
        assert group.create_array(name, data=stored, attributes=attributes, **sizes).shards is not None
