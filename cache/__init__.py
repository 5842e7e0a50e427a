"""The cache of embeddings: one Zarr v3 store, written shard by shard, read only when complete. No torch here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sest.cache.reader import Cache, Group, open_cache
    from sest.cache.schema import CacheError
    from sest.cache.writer import CacheWriter

__all__ = ["Cache", "CacheError", "CacheWriter", "Group", "open_cache"]
_MODULES = {
    "Cache": "reader",
    "Group": "reader",
    "open_cache": "reader",
    "CacheError": "schema",
    "CacheWriter": "writer",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `sest --help` must not wait for anndata and zarr."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sest.cache.{_MODULES[name]}"), name)
