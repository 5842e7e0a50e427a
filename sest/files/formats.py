"""What a file or folder is that cannot be read as cells, by what it holds; how to turn it into one that can.

Every answer is the end of a sentence: "PATH is not an .h5ad file" + ": it is ...; convert it with ...".
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import h5py

from sest.errors import shown, what_it_is
from sest.files.nodes import Group

HEAD = 512  # bytes that tell what a file is
HDF5 = b"\x89HDF\r\n\x1a\n"
ZARR_ROOTS = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
MTX = "it is Matrix Market; read its folder with scanpy.read_10x_mtx(FOLDER) and save it with .write_h5ad(...)"
RDS = (
    "it is an R object (.rds); in R: zellkonverter::writeH5AD(Seurat::as.SingleCellExperiment(readRDS(FILE)), "
    '"cells.h5ad")'
)
RDATA = "it is an R workspace (.RData); load() it in R and save the object with zellkonverter::writeH5AD"
# first bytes -> what the file is
STARTS: tuple[tuple[bytes, str], ...] = (
    (b"BZh", "it is compressed with bzip2; unpack it with bunzip2"),
    (b"\xfd7zXZ", "it is compressed with xz; unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; unpack it with unzstd"),
    (b"version https://git-lfs", "it is a Git LFS pointer; fetch the file with git lfs pull"),
    (b"%%MatrixMarket", MTX),
    (b"RDX2\n", RDATA),
    (b"RDX3\n", RDATA),
    (b"X\n\x00\x00", RDS),
    (b"A\n2\n", RDS),
    (b"A\n3\n", RDS),
    (b"PAR1", "it is Parquet; docs/data.md has a recipe that makes .h5ad files of it"),
    (b"ARROW1", "it is Arrow; read it with pyarrow.feather.read_table and build an AnnData of it"),
    (b"FEA1", "it is Feather; read it with pyarrow.feather.read_table and build an AnnData of it"),
    (b"\x93NUMPY", "it is a NumPy array; build an AnnData of it, with names of cells and genes"),
    (b"SQLite format 3", "it is an SQLite database"),
    (b"\x80\x02", "it is a pickle, which is never loaded: it could run any code"),
    (b"\x80\x03", "it is a pickle, which is never loaded: it could run any code"),
    (b"\x80\x04", "it is a pickle, which is never loaded: it could run any code"),
    (b"\x80\x05", "it is a pickle, which is never loaded: it could run any code"),
    (b"<", "it looks like an HTML or XML page; the download failed"),
)


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 does; its signature may stand behind 512, 1024, 2048 ... bytes."""
    return path.is_file() and bool(h5py.is_hdf5(path))


def is_zarr(path: Path) -> bool:
    """Whether a folder, or a zip archive, holds a Zarr group."""
    if path.is_dir():
        return any((path / name).is_file() for name in ZARR_ROOTS)
    return path.is_file() and zipfile.is_zipfile(path) and not {*ZARR_ROOTS}.isdisjoint(_names_in_zip(path))


def of_file(path: Path) -> str:
    """What a file that is neither HDF5 nor Zarr is, by its first bytes; "" where they do not tell."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return ": it is empty"
    if head.startswith(HDF5[:4]):
        return ": it is damaged, or its copy or download did not finish"
    if not head.strip(b"\x00"):
        return ": it begins with zeros; its copy or download did not finish"
    if head.startswith(b"\x1f\x8b"):
        return f": {_in_gzip(path)}"
    if head.startswith(b"PK\x03\x04"):
        return f": {_in_zip(path)}"
    if head[257:262] == b"ustar":
        return ": it is a tar archive; unpack it with tar -xf"
    for start, words in STARTS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start):
            return f": {words}"
    return _text(head)


def of_folder(path: Path) -> str:
    """What a folder is that is no Zarr store and has no files of cells in it."""
    names = {entry.name.removesuffix(".gz") for entry in path.iterdir()}
    if "matrix.mtx" in names:
        return ": it is a 10x Genomics matrix; convert it with scanpy.read_10x_mtx(FOLDER).write_h5ad(...)"
    if any(name.endswith(".parquet") for name in names):
        return ": it holds Parquet files; docs/data.md has a recipe that makes .h5ad files of them"
    if known := what_it_is(path):
        return f":{known.removesuffix('.').replace(' It', ' it')}"
    return f"; it has {shown(sorted(names))}" if names else ": it is empty"


def of_group(root: Group) -> str:
    """What an HDF5 file or Zarr store without obs and var is."""
    names = set(root)
    if "matrix" in names and "row_attrs" in names:
        return ": it is a loom file; convert it with anndata.io.read_loom(...).write_h5ad(...)"
    if "matrix" in names or _is_old_10x(root, names):
        return ": it is a 10x Genomics .h5; convert it with scanpy.read_10x_h5(...).write_h5ad(...)"
    if {"assays", "cell.names"} <= names:
        return ": it is an h5Seurat file; in R: SeuratDisk::Convert(FILE, dest = 'h5ad')"
    if "sest" in root.attrs:
        return ": it is a cache of `sest embed`; `sest train` and `sest info` take it"
    return f"; it has {shown(sorted(names))}"


def _is_old_10x(root: Group, names: Collection[str]) -> bool:
    """Cell Ranger 2: a group for each genome."""
    parts = {"barcodes", "gene_names", "indptr", "shape"}
    return any(hasattr(root[name], "keys") and parts <= set(root[name]) for name in list(names)[:8])


def _in_gzip(path: Path) -> str:
    try:
        with gzip.open(path) as file:
            head = file.read(HEAD)
    except (OSError, EOFError, zlib.error):
        return "it is a damaged gzip file; copy or download it again"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it with tar -xzf"
    for start, words in STARTS:
        if head.startswith(start):
            return words
    return "it is compressed with gzip; unpack it with gunzip"


def _in_zip(path: Path) -> str:
    names = _names_in_zip(path)
    if names and all(name.endswith(".npy") for name in names):
        return "it is a NumPy .npz; build an AnnData of it, with names of cells and genes"
    return "it is a zip archive; unpack it"


def _names_in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return []


def _text(head: bytes) -> str:
    """Tables of text, which begin with a line of names."""
    try:
        first = head.decode().partition("\n")[0]
    except UnicodeDecodeError:
        return ""
    if first.startswith("{") and first.endswith("}"):
        return ": it is JSON, a line each; read it with pandas.read_json(..., lines=True)"
    for separator, name in (("\t", "tab-separated"), (",", "comma-separated")):
        if first.count(separator) > 1:
            return f": it is {name} text; read it with pandas.read_csv and build an AnnData of it"
    return ""
