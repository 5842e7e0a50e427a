"""What is no file of cells is called what it is, by its content, whatever its name, with the way to convert it."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from helpers.damaged_h5ad import counts, write
from sest.errors import InputError
from sest.files.cell_file import CellFile


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def hdf5(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name in names:
                file[name] = np.arange(3)

    return make


def old_10x(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name in ("barcodes", "genes", "gene_names", "data", "indices", "indptr", "shape"):
            file[f"hg19/{name}"] = np.arange(3)


def matrix_market(path: Path) -> None:
    scipy.io.mmwrite(path.with_suffix(".mtx"), sp.csr_matrix(counts()))
    path.with_suffix(".mtx").rename(path)


def archive(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.h5ad"), io.BytesIO(b""))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.h5ad", b"x")


def half_written(path: Path) -> None:
    path.write_bytes(write(path, counts()).read_bytes()[:-2000])


def half_copied(path: Path) -> None:
    path.write_bytes(write(path, counts()).read_bytes()[:6])


def left_open(path: Path) -> None:
    """As a writer leaves it that dies: a flag in the file says that it is being written."""
    with h5py.File(path.with_name("whole"), "w", libver="latest") as file:
        file["obs"] = np.arange(3)
        file.flush()
        shutil.copy(file.filename, path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
RDS = b"X\n\x00\x00\x00\x03\x00\x04\x03\x01\x00\x03\x05\x00"
# what the file holds, and what the one line must say
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (content(b""), "it is empty"),
    "zeros": (content(bytes(4096)), "begins with zeros; its copy or download did not finish"),
    "half copied": (half_copied, "damaged, or its copy or download did not finish"),
    "half written": (half_written, "is truncated: copy or download it again"),
    "left open": (left_open, "is being written, or its writer died"),
    "gzip": (content(gzip.compress(b"\x89HDF\r\n\x1a\n")), "gunzip"),
    "damaged gzip": (content(gzip.compress(b"x" * 99)[:12]), "damaged gzip"),
    "gzipped mtx": (content(gzip.compress(b"%%MatrixMarket matrix")), r"Matrix Market.*read_10x_mtx"),
    "mtx": (matrix_market, r"Matrix Market.*read_10x_mtx"),
    "rds": (content(gzip.compress(RDS)), r"R object \(\.rds\).*zellkonverter::writeH5AD"),
    "uncompressed rds": (content(RDS), r"R object \(\.rds\)"),
    "RData": (content(gzip.compress(b"RDX3\nX\n")), r"R workspace"),
    "parquet": (content(b"PAR1\x15\x04"), "Parquet; docs/data.md"),
    "arrow": (content(b"ARROW1\x00\x00"), "Arrow"),
    "npy": (content(b"\x93NUMPY\x01\x00"), "NumPy array"),
    "pickle": (content(b"\x80\x04\x95"), "a pickle, which is never loaded"),
    "sqlite": (content(b"SQLite format 3\x00"), "SQLite"),
    "zip": (zipped, "zip archive; unpack it"),
    "tar": (archive, "tar archive"),
    "csv": (content(b"cell,G1,G2\na,1,2\n"), "comma-separated text"),
    "tsv": (content(b"cell\tG1\tG2\na\t1\t2\n"), "tab-separated text"),
    "lfs pointer": (content(LFS), "git lfs pull"),
    "html": (content(b"\n<!DOCTYPE html><html></html>"), "HTML.*download failed"),
    "text": (content(b"nothing"), "not an .h5ad file"),
    "10x": (hdf5("matrix/barcodes"), "10x Genomics .h5.*read_10x_h5"),
    "10x, Cell Ranger 2": (old_10x, "10x Genomics .h5.*read_10x_h5"),
    "loom": (hdf5("matrix", "row_attrs/Gene"), "loom file.*read_loom"),
    "h5Seurat": (hdf5("assays/RNA", "cell.names"), "h5Seurat.*SeuratDisk::Convert"),
    "other HDF5": (hdf5("weights"), "no obs, var; it has weights"),
}


@pytest.mark.parametrize("suffix", [".h5ad", ".bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_cells_is_called_what_it_is(tmp_path: Path, kind: str, suffix: str) -> None:
    make, words = KINDS[kind]
    path = tmp_path / f"a{suffix}"
    make(path)
    with pytest.raises(InputError, match=words) as caught:
        CellFile(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^No such file: .*a\.h5ad\.$"):
        CellFile(tmp_path / "a.h5ad")


def test_folders_are_called_what_they_are(tmp_path: Path) -> None:
    for name, words in (
        ("matrix.mtx.gz", r"10x Genomics matrix.*read_10x_mtx"),
        ("0.parquet", r"Parquet files; docs/data\.md"),
        ("notes.txt", r"it has notes\.txt"),
        ("a.h5ad", r"a folder with 1 files of cells: a\.h5ad\. Give one"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(InputError, match=words):
            CellFile(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [("cells.loom", "read_loom"), ("cellranger2.h5", "read_10x_h5"), ("cells.h5mu", "several modalities: prot, rna")],
)
def test_files_that_other_programs_wrote_are_called_what_they_are(shared_cases: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        CellFile(shared_cases / "files" / name)
