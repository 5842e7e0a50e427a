"""Open what may hold cells: HDF5 or Zarr, a file, a folder or a zip archive, here or at a URL; decided by content."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import zarr

from sest.cache.storage import NO_LOCKS
from sest.errors import InputError, nearest_file, one_line, shown
from sest.files import formats
from sest.files.nodes import DAMAGE, Group, attribute, bad, child, is_array
from sest.files.remote import RemoteFile, UrlPath, check_url, reason
from sest.untrusted.probe import check_bytes, check_structure

CHUNK_CACHE = 2**25  # bytes of decompressed chunks HDF5 keeps for each dataset
SUFFIXES = (".h5ad", ".h5", ".h5mu", ".zarr", ".zarr.zip")  # by which a folder's files are found

Close = Callable[[], None]


def open_container(path: Path) -> tuple[Group, Close]:
    """Return the root group of a file, and what closes it.

    Raises:
        InputError: nothing there, or neither HDF5 nor Zarr: says what it is instead, where its content tells.
    """
    if isinstance(path, UrlPath):
        return _remote_zarr(path) if path.name.endswith(".zarr") else _remote_hdf5(path)
    if not path.exists():
        if "::" in str(path):
            check_url(str(path))
        raise InputError(f"No such file: {path}.{nearest_file(path)}")
    if formats.is_zarr(path):
        return _local_zarr(path)
    if path.is_dir():
        raise InputError(_folder(path))
    try:
        if not formats.is_hdf5(path):
            raise InputError(f"{path} is not an .h5ad file (not HDF5){formats.of_file(path)}.")
        check_structure(path)
        file = opened_hdf5(path)
    except OSError as error:
        raise _unopened(path, error) from error
    return file, file.close


def opened_hdf5(path: Path) -> h5py.File:
    """An HDF5 file, to read. It is locked as other readers of this process lock it, or not at all where that fails.

    Raises:
        OSError: it cannot be opened, or another process writes it.
    """
    try:
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE)
    except OSError as error:
        if not any(f"unable to lock file, errno = {number}," in str(error) for number in NO_LOCKS):
            raise
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE, locking=False)


def part_of(root: Group, path: Path, modality: str | None) -> Group:
    """The cells of a file: its root, or of a MuData file the part `modality`, which may be left out if it is the only.

    Raises:
        InputError: no such modality, several and none is chosen, or a modality of a file that has none.
    """
    parts = child(root, "mod") if "mod" in root and "X" not in root else None
    if parts is None or is_array(parts):
        if modality is not None:
            raise InputError(f"{path} is no MuData file: it has no modality {modality!r}. Leave --modality out.")
        return root
    there = sorted(parts)
    if modality is None and len(there) == 1:
        modality = there[0]
    if modality is None:
        raise InputError(f"{path} is a MuData file of several modalities: {shown(there)}. Choose one with --modality.")
    if modality not in there:
        raise InputError(f"{path} has no modality {modality!r}. There are: {shown(there)}. Pass --modality.")
    part = child(parts, modality)
    if is_array(part):
        raise bad(part, "is no modality")
    return part


def files_in(folder: Path) -> list[Path]:
    """The files of cells directly in a folder, by name; hidden ones (macOS writes ._x.h5ad) are left out."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIXES) and not name.startswith("."))
    return [folder / name for name in names]


def stem_of(path: Path) -> str:
    """Name of a file of cells without its ending."""
    ending = max((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), key=len, default=path.suffix)
    return path.name.removesuffix(ending)


def _folder(path: Path) -> str:
    if files := files_in(path):
        return f"{path} is a folder with {len(files)} files of cells: {shown(f.name for f in files)}. Give one of them."
    return f"{path} is a folder, neither an .h5ad file nor a Zarr store{formats.of_folder(path)}."


def _unopened(path: Path | str, error: OSError) -> InputError:
    """Why HDF5 could not open a file that begins as HDF5 does."""
    if "truncated" in str(error):
        return InputError(f"{path} is truncated: copy or download it again.")
    if "consistency flags" in str(error) or "already open for write" in str(error):
        return InputError(
            f"{path} is being written, or its writer died: wait for it, or write it again (h5clear -s {path} opens "
            "what is there)."
        )
    return InputError(f"{path} cannot be opened: {one_line(error)}.")


def _remote_hdf5(path: UrlPath) -> tuple[Group, Close]:
    raw = RemoteFile(str(path))
    try:
        head = raw.read(len(formats.HDF5)) or b""
        if head != formats.HDF5:
            raise InputError(f"{path} is not an .h5ad file (not HDF5): it begins with {head!r}.")
        check_bytes(str(path), raw)
        raw.seek(0)
        file = h5py.File(raw, "r", rdcc_nbytes=CHUNK_CACHE)
    except InputError:
        raw.close()
        raise
    except OSError as error:
        raw.close()
        raise _unopened(path, error) from error

    def close() -> None:
        file.close()
        raw.close()

    return file, close


def _local_zarr(path: Path) -> tuple[Group, Close]:
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            for name in (*folders, *files):
                if os.path.islink(os.path.join(folder, name)):
                    raise InputError(f"{os.path.join(folder, name)} is a link, which is not followed in a Zarr store.")
        return _zarr_group(zarr.storage.LocalStore(path, read_only=True), path, consolidated=False)
    return _zarr_group(zarr.storage.ZipStore(path, mode="r"), path, consolidated=False)


def _remote_zarr(path: UrlPath) -> tuple[Group, Close]:
    check_url(str(path))
    try:
        store = zarr.storage.FsspecStore.from_url(str(path), read_only=True)
    except Exception as error:  # packages for object stores have no error in common
        raise InputError(f"{path} cannot be opened: {reason(error)}.") from error
    return _zarr_group(store, path, consolidated=None)  # without it, a server that lists no folders has no members


def _zarr_group(store: Any, path: Path, consolidated: bool | None) -> tuple[Group, Close]:
    # said by zarr of every file it does not know, such as a note beside the groups
    warnings.filterwarnings("ignore", ".*not recognized as a component of a Zarr hierarchy", UserWarning)
    try:
        group = zarr.open_group(store, mode="r", use_consolidated=consolidated)
    except DAMAGE as error:
        store.close()
        raise InputError(f"{path} cannot be opened as a Zarr store: {reason(error)}.") from error
    return group, store.close


def foreign(root: Group, path: Path, missing: list[str]) -> InputError:
    """The error of a container that holds no cells."""
    kind = "Zarr store" if isinstance(root, zarr.Group) else ".h5ad file"
    also = f" ({attribute(root, 'encoding-type')})" if attribute(root, "encoding-type") else ""
    return InputError(f"{path} is no {kind} with cells{also}: it has no {shown(missing)}{formats.of_group(root)}.")
