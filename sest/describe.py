"""What a path is and whether it is sound: the facts behind `sest info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sest.cache import open_cache
from sest.cache.schema import COMPLETE, JOURNAL
from sest.errors import InputError

Facts = dict[str, Any]


def describe(path: Path, *, verify: bool = False) -> tuple[Facts, list[str]]:
    """Return the facts about a path and the files found damaged (only with `verify`).

    Raises:
        InputError, StoreError: nothing there, nothing sest knows, or something that cannot be used.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if (path / "zarr.json").exists():
        return _cache(path, verify)
    raise InputError(f"{path} is no store, run, checkpoint, encoder folder or h5ad file.")


def _cache(path: Path, verify: bool) -> tuple[Facts, list[str]]:
    if (path / JOURNAL).exists() and not (path / COMPLETE).exists():
        return {"kind": "cache", "complete": False, "path": str(path)}, []
    cache = open_cache(path)
    a = cache.attributes
    facts = {
        "kind": "cache",
        "complete": True,
        "n_cells": cache.n_cells,
        "dim": cache.dim,
        "dtype": a["dtype"],
        "cells": a["cells"],
        "encoder": a["encoder"],
        "encoder_sha256": a["encoder_sha256"],
        "native_dim": a["native_dim"],
        "projection": a["projection"],
        "precision": a["precision"],
        "seed": a["seed"],
        "bytes": cache.size,
        "sest_version": a["sest_version"],
        "schema_version": a["schema_version"],
        "licence": a["licence"],
        "groups": {
            name: {
                key: g.attributes[key]
                for key in ("n_cells", "n_genes", "perturbations", "controls", "n_embedded", "scale")
            }
            for name, g in cache.groups.items()
        },
    }
    damaged = cache.verify() if verify else []
    if verify:
        facts["verified"] = not damaged
    return facts, damaged
