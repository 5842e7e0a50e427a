"""What is computed from all cells of a cache, kept beside it: whoever needs it next reads it instead of every cell.

    OUT.zarr/.derived/<name>-<digest of the key>/about.json  the key, and of each array its type, shape and CRC-32C
    OUT.zarr/.derived/<name>-<digest of the key>/<array>.bin

It is no part of the cache: not journalled, made again where it is missing or damaged, and free to be deleted. It is not
kept where the cache lies on an object store, in a folder that cannot be written, or on a disk that is nearly full.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from sest.cache.disk import folder_aside, sha256, write_flushed
from sest.cache.schema import DERIVED
from sest.cache.storage import LocalStorage, Storage

logger = logging.getLogger(__name__)

ABOUT = "about.json"
SPARE = 2**30  # bytes of the disk that stay free
_BLOCK = 2**26


def is_derived(storage: Storage, name: str, key: Mapping[str, Any]) -> bool:
    """Whether something is kept under this name and key; whether it is sound shows when it is read."""
    folder = _folder(storage, name, key)
    return folder is not None and (folder / ABOUT).is_file()


def read_derived(storage: Storage, name: str, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Arrays that `keep_derived` kept under this name and key, mapped read-only; None where there are none."""
    folder = _folder(storage, name, key)
    try:
        about = json.loads((folder / ABOUT).read_text()) if folder is not None else None
    except (OSError, ValueError):
        return None
    if folder is None or about is None or about.get("key") != _plain(key):
        return None
    found = {}
    for array, (dtype, shape, checksum) in about["arrays"].items():
        try:
            values = _mapped(folder / f"{array}.bin", np.dtype(dtype), tuple(shape))
        except (OSError, ValueError):
            values = None
        if values is None or _checksum(values) != checksum:
            logger.warning(f"{folder / array}.bin is damaged; it is made again.")
            shutil.rmtree(folder, ignore_errors=True)
            return None
        found[array] = values
    return found


def keep_derived(storage: Storage, name: str, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Keep arrays, whole or not at all. Nothing depends on it: where it cannot be done, that is said and no error."""
    folder = _folder(storage, name, key)
    if folder is None:
        return
    needed = sum(array.nbytes for array in arrays.values())
    try:
        folder.parent.mkdir(exist_ok=True)
        if shutil.disk_usage(folder.parent).free < needed + SPARE:
            logger.info(f"{folder.parent} keeps no {name}: its disk is nearly full.")
            return
        about: dict[str, Any] = {"key": _plain(key), "arrays": {}}
        with folder_aside(folder) as aside:
            for array, values in arrays.items():
                values = np.ascontiguousarray(values)
                write_flushed(aside / f"{array}.bin", values.reshape(-1).view(np.uint8).data)
                about["arrays"][array] = [str(values.dtype), list(values.shape), _checksum(values)]
            write_flushed(aside / ABOUT, json.dumps(about).encode())
    except OSError as error:  # nothing can be written there, or another process keeps the same
        logger.debug(f"{folder.parent} keeps no {name}: {error.strerror}.")


def derived_bytes(storage: Storage) -> int:
    """Bytes of all that is kept beside a cache."""
    total = 0
    if isinstance(storage, LocalStorage):
        for file in (storage.root / DERIVED).rglob("*.bin"):
            with suppress(OSError):
                total += file.stat().st_size
    return total


def _folder(storage: Storage, name: str, key: Mapping[str, Any]) -> Path | None:
    if not isinstance(storage, LocalStorage):
        return None
    return storage.root / DERIVED / f"{name}-{sha256(json.dumps(_plain(key)).encode())[:16]}"


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(key, sort_keys=True))
    return plain


def _mapped(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray | None:
    """A file's numbers; None where it has more or fewer of them."""
    if file.stat().st_size != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        return None
    return np.memmap(file, dtype, "r", shape=shape) if np.prod(shape) else np.zeros(shape, dtype)


def _checksum(values: np.ndarray) -> int:
    """CRC-32C of an array's bytes."""
    data, found = values.reshape(-1).view(np.uint8), 0
    for start in range(0, len(data), _BLOCK):
        found = google_crc32c.extend(found, data[start : start + _BLOCK])
    return int(found)
