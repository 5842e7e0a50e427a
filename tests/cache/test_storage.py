"""cache/storage.py: a cache on a URL is the cache in a folder, file for file; what cannot be a cache is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

import sest.embedding.plan
from helpers.caches import hashes, small_shards
from helpers.embed_rank import EmbedRank
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.notes import Notes
from helpers.se_model import write_se
from sest.cache import CacheError, CacheWriter, open_cache
from sest.cache.disk import sha256
from sest.cache.storage import LocalStorage, RemoteStorage, is_url, storage_at
from sest.config import EmbedConfig
from sest.data.dataset import read_dataset
from sest.describe import describe
from sest.embedding.embed import embed
from sest.machine.ranks import Ranks
from sest.progress import reporting

URL = "memory://bucket/s.zarr"


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbedConfig:
    small_shards(monkeypatch)
    monkeypatch.setattr(sest.embedding.plan, "SAMPLE_CELLS", 14)
    return EmbedConfig(encoder=str(write_se(tmp_path / "se", gene_names(35))), dim="4", batch_size=3, device="cpu")


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "a.h5ad", counts(21))


def remote_hashes() -> dict[str, str]:
    storage = storage_at(URL)
    return {name: storage.sha256(name) for name in sorted(storage.sizes())}


def test_urls_are_told_from_paths() -> None:
    assert is_url("s3://bucket/x") and is_url(Path("s3://bucket/x")) and is_url("memory://x")
    assert not any(map(is_url, ("a/b.zarr", "/a/b", "C:/x", "file:///tmp/x", "./s3:/x", "s3", "s3:")))
    assert isinstance(storage_at("file:///tmp/x"), LocalStorage) and str(storage_at("file:///tmp/x")) == "/tmp/x"
    assert isinstance(storage_at(Path(URL)), RemoteStorage) and str(storage_at(Path(URL))) == URL


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_files_are_written_whole_and_found_again(tmp_path: Path, kind: str) -> None:
    storage = storage_at(tmp_path / "s" if kind == "folder" else URL)
    assert storage.here() == [] and storage.sizes() == {}
    if kind == "folder":
        with pytest.raises(FileNotFoundError):  # somebody has deleted it
            storage.write({"zarr.json": b"{}"})
        assert not (tmp_path / "s").exists()
        (tmp_path / "s").mkdir()
    storage.write({"zarr.json": b"{}", "a/c/0": b"12345"})
    storage.append("journal.jsonl", b"one\n")
    storage.append("journal.jsonl", b"two\n")
    assert storage.here() == ["a", "journal.jsonl", "zarr.json"]
    assert storage.sizes() == {"a/c/0": 5, "journal.jsonl": 8, "zarr.json": 2}
    assert storage.sizes("a") == {"a/c/0": 5} and storage.sizes("none") == {}
    assert storage.read("journal.jsonl") == b"one\ntwo\n" and storage.sha256("a/c/0") == sha256(b"12345")
    for read in (storage.read, storage.sha256):
        with pytest.raises(FileNotFoundError):
            read("none")
    storage.write({"a/c/0": b"6"})
    storage.remove(["zarr.json", "none"])
    storage.remove_folder("none")
    assert storage.sizes() == {"a/c/0": 1, "journal.jsonl": 8}
    storage.remove_folder("a")
    assert storage.sizes() == {"journal.jsonl": 8}


def test_a_cache_on_a_url_has_the_files_of_one_in_a_folder(cells: Path, config: EmbedConfig, tmp_path: Path) -> None:
    embed([cells], tmp_path / "s.zarr", config)
    assert embed([cells], URL, config).complete
    assert remote_hashes() == hashes(tmp_path / "s.zarr")
    local, remote = open_cache(tmp_path / "s.zarr"), open_cache(URL)
    assert remote.verify() == [] and remote.size == local.size and remote.path == URL
    np.testing.assert_equal(remote.projection, local.projection)
    a, b = local.groups["a"], remote.groups["a"]
    np.testing.assert_array_equal(a.embeddings(), b.embeddings())
    assert (a.targets() != b.targets()).nnz == 0 and a.obs.equals(b.obs) and a.genes == b.genes
    notes = Notes()
    with reporting(notes):
        assert embed([cells], URL, config).complete and f"{URL} is complete already." in notes.notes


def test_a_cache_on_a_url_is_described_and_trained_from(cells: Path, config: EmbedConfig) -> None:
    from sest.config import TrainConfig

    embed([cells], URL, config)
    facts, _ = describe(Path(URL), verify=True)
    assert facts["n_cells"] == 21 and facts["complete"] and facts["verified"]
    data = read_dataset(Path(URL), TrainConfig(set_size=4, control_targets=True))
    np.testing.assert_array_equal(data.embeddings, open_cache(URL).groups["a"].embeddings()[data.labels.is_control])


def test_going_on_and_repairing_work_on_a_url(
    cells: Path, config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed([cells], tmp_path / "s.zarr", config)
    storage, expected = storage_at(URL), hashes(tmp_path / "s.zarr")
    write, left = RemoteStorage.write, iter(range(200))
    n_kills = 0
    for k in range(2, 60, 7):  # cut off after every seventh write; a write is one or more whole objects
        left = iter(range(k))

        def cut(self: RemoteStorage, files: dict[str, bytes], left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise InterruptedError
            write(self, files)

        with monkeypatch.context() as killed:
            killed.setattr(RemoteStorage, "write", cut)
            try:
                embed([cells], URL, config)
            except InterruptedError:
                n_kills += 1
    assert n_kills >= 2
    assert embed([cells], URL, config).complete
    assert remote_hashes() == expected
    storage.write({"a/X/data/c/0": b"short"})
    with pytest.raises(CacheError, match=r"memory://bucket/s\.zarr is damaged: 1 of"):
        open_cache(URL)
    assert embed([cells], URL, config).complete
    assert remote_hashes() == expected


def test_ranks_write_one_cache_on_a_url(cells: Path, config: EmbedConfig, tmp_path: Path) -> None:
    embed([cells], tmp_path / "s.zarr", config)
    processes = [EmbedRank([cells], URL, config, Ranks(rank, 3)) for rank in (2, 1, 0)]
    assert all(process.done().error is None for process in processes)
    assert remote_hashes() == hashes(tmp_path / "s.zarr")


class OutOfReach(Exception):
    """What a package for an object store may raise; they have no class in common."""


def test_an_object_store_that_cannot_be_reached_is_one_line(
    cells: Path, config: EmbedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OutOfReach("no route\nto host")

    embed([cells], URL, config)
    group = open_cache(URL).groups["a"]
    for method, use in (
        ("pipe", lambda: storage_at(URL).write({"a": b""})),
        ("cat_file", lambda: storage_at(URL).read("a")),
        ("find", lambda: open_cache(URL)),
        ("_cat_file", lambda: group.embeddings()),
    ):
        with monkeypatch.context() as cut_off:
            cut_off.setattr(type(fsspec.filesystem("memory")), method.removeprefix("_"), broken)
            with pytest.raises(CacheError, match=rf"^{URL} cannot be reached: no route to host\.$"):
                use()


IN_S3 = """
import sys
from pathlib import Path
import s3fs
from moto.server import ThreadedMotoServer
from helpers.caches import hashes
from sest.cache import CacheError, open_cache
from sest.cache.storage import storage_at
from sest.config import EmbedConfig
from sest.embedding.embed import embed
import os

folder, url = Path(sys.argv[1]), "s3://bucket/s.zarr"
server = ThreadedMotoServer("127.0.0.1", port=0)
server.start()
os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
arguments = (EmbedConfig(encoder="pca", dim="4"),)
try:
    embed([folder / "a.h5ad"], url, *arguments)
    raise AssertionError("no bucket, no error")
except CacheError as error:
    assert str(error).startswith("s3://bucket/s.zarr cannot be written: The specified bucket does not exist"), error
s3fs.S3FileSystem().mkdir("bucket")
assert embed([folder / "a.h5ad"], url, *arguments).complete
embed([folder / "a.h5ad"], folder / "s.zarr", *arguments)
storage = storage_at(url)
assert {name: storage.sha256(name) for name in storage.sizes()} == hashes(folder / "s.zarr")
assert open_cache(url).verify() == [] and open_cache(url).groups["a"].embeddings().shape == (21, 4)
server.stop()
"""


def test_a_cache_in_s3_has_the_files_of_one_in_a_folder(cells: Path) -> None:
    """Against moto's S3 server; needs `pip install s3fs 'moto[server]'`, which are no part of the extra `test`.

    In a process of its own: s3fs leaves its connections open, which pytest takes for an error.
    """
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_S3, str(cells.parent)],
        env={**os.environ, **keys, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_a_cache_is_refused_in_one_line() -> None:
    for url, message in (
        ("nfs4://x/y", "nfs4://x/y cannot be used as a cache: Protocol not known: nfs4"),
        (URL, f"{URL} does not exist. Make one with `sest embed"),
    ):
        with pytest.raises(CacheError, match=message) as refused:
            open_cache(url)
        assert "\n" not in str(refused.value)
    storage_at(URL).write({"thesis.tex": b"text"})
    with pytest.raises(CacheError, match="exists and is not a sest cache"), CacheWriter(URL, {}):
        pass
    assert storage_at(URL).sizes() == {"thesis.tex": 4}


@pytest.mark.parametrize(
    "url", ["reference://x::/tmp/ref.json", "reference:///tmp/ref.json", "zip://a::http://b/c.zip"]
)
def test_a_url_that_leads_on_to_another_place_is_no_storage(url: str) -> None:
    """fsspec would follow it, and older ones run what the reference says."""
    with pytest.raises(CacheError, match="leads through one place to another"):
        storage_at(url)
