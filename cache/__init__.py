"""The embedding store: one Zarr v3 store, written shard by shard, read only when complete. No torch here."""

from sest.cache.reader import Cache, Group, open_cache
from sest.cache.schema import StoreError
from sest.cache.writer import StoreWriter

__all__ = ["Cache", "Group", "StoreError", "StoreWriter", "open_cache"]
