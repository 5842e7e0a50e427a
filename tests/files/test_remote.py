"""Cells at a URL are read as from the disk; what is not there, or leads on, is one line."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import fsspec
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

import sest.files.remote
from helpers.damaged_h5ad import counts, write
from helpers.web import serve
from helpers.zarr_cells import as_zarr
from sest.errors import InputError
from sest.files.cell_file import CellFile
from sest.files.remote import located


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    write(tmp_path / "a.h5ad", sp.csr_matrix(counts()), compression="gzip")
    (tmp_path / "page.h5ad").write_text("<html></html>")
    with serve(tmp_path) as url:
        yield url


@pytest.mark.parametrize("name", ["a.h5ad", "a.h5ad?download=1"])
def test_h5ad_of_a_web_server_is_read_in_parts(web: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sest.files.remote, "BLOCK", 4096)  # many blocks even of a small file
    with CellFile(f"{web}/{name}") as file:
        assert str(file.path) == f"{web}/{name}"
        assert file.path.name == "a.h5ad"
        np.testing.assert_array_equal(file.rows(10, 40).toarray(), counts()[10:40])
        assert file.obs["target_gene"].tolist()[:2] == ["control", "STAT1"]


class Fetching:
    """A file whose blocks another thread fetches, as fsspec's does, which makes enough objects to be collected."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.stuck = data, 0, False

    def close(self) -> None:
        pass

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, len(self.data))[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, n: int) -> bytes:
        thread = threading.Thread(target=lambda: [[i] for i in range(100_000)], daemon=True)
        thread.start()
        thread.join(5)
        self.stuck = self.stuck or thread.is_alive()
        self.at += n
        return self.data[self.at - n : self.at]


def test_garbage_of_h5py_that_is_found_while_a_block_is_fetched_waits_for_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "a.h5ad", counts()).read_bytes()
    fetching = Fetching(data)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.open", lambda *a, **k: fetching)
    with h5py.File(tmp_path / "a.h5ad") as other:
        cycle: dict[str, Any] = {"group": other["obs"]}
        cycle["itself"] = cycle
        del cycle  # nothing but a collection finds it now
        remote = sest.files.remote.RemoteFile("memory://a.h5ad")
        with h5py.File(remote, "r") as file:
            assert "X" in file
    assert not fetching.stuck and gc.isenabled()


def test_what_a_web_server_does_not_have_or_sends_wrongly_is_one_line(web: str, tmp_path: Path) -> None:
    for name, words in (("b.h5ad", "b.h5ad cannot be opened: nothing is there"), ("page.h5ad", "not HDF5.*<html>")):
        with pytest.raises(InputError, match=words) as caught:
            CellFile(f"{web}/{name}")
        assert str(caught.value).startswith(f"{web}/{name}")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be opened: "):
        CellFile("http://127.0.0.1:9/a.h5ad")
    with serve(tmp_path, ranges=False) as url, pytest.raises(InputError, match=r"only sends whole files\. Download it"):
        CellFile(f"{url}/a.h5ad")


def test_cells_in_an_object_store_are_read(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/cells/a.h5ad", write(tmp_path / "a.h5ad", counts()).read_bytes())
    fs.put(
        str(as_zarr(tmp_path / "a.zarr", ad.read_h5ad(tmp_path / "a.h5ad"), "zarr3")), "/cells/a.zarr", recursive=True
    )
    for name in ("a.h5ad", "a.zarr"):
        with CellFile(f"memory://cells/{name}") as file:
            np.testing.assert_array_equal(file.rows(0, 53).toarray(), counts())
            assert file.obs["target_gene"].tolist()[:2] == ["control", "STAT1"]


@pytest.mark.parametrize("url", ["reference://a.h5ad", "zip://a.h5ad", "zip://x::s3://b/y", "simplecache::https://x/a"])
def test_a_url_that_leads_on_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="leads through one place to another"):
        CellFile(url)


def test_unknown_protocols_and_missing_packages_are_one_line() -> None:
    with pytest.raises(InputError, match="cannot be opened: Protocol not known"):
        CellFile("nonsense://a/b.h5ad")
    with pytest.raises(InputError, match=r"^gs://a/b\.h5ad cannot be opened: .*gcsfs"):
        CellFile("gs://a/b.h5ad")


def test_a_server_that_goes_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(sest.files.remote, "BLOCK", 4096)
    write(tmp_path / "a.h5ad", counts(2000, 300))
    with serve(tmp_path) as url:
        file = CellFile(f"{url}/a.h5ad")
    with file, pytest.raises(InputError, match=r"^http.*a\.h5ad cannot be read") as caught:
        file.rows(0, 2000)
    assert "\n" not in str(caught.value)


def test_a_url_is_spoken_of_as_it_was_given() -> None:
    assert str(located("https://a.b/c/d.h5ad")) == "https://a.b/c/d.h5ad"
    assert str(located(Path("s3://bucket/d.zarr"))) == "s3://bucket/d.zarr"
    assert located("s3://bucket/d.zarr").name == "d.zarr"
    assert located("file:///tmp/a.h5ad") == Path("/tmp/a.h5ad")
    assert str(located("a.h5ad")) == "a.h5ad"
