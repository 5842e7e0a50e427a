"""Public screens by name: fetched once from a real server, checked, and one line where there is no network."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.web import serve
from sest import datasets
from sest.datasets import DATASETS, FOLDER, Dataset, fetch
from sest.errors import InputError
from sest.progress import Silent, reporting

CONTENT = b"cells" * 500_000


def test_every_dataset_is_at_a_secure_address_with_a_published_checksum() -> None:
    assert {"kang", "papalexi", "norman", "replogle_k562"} <= set(DATASETS)
    for name, dataset in DATASETS.items():
        assert re.fullmatch(r"https://(zenodo|exampledata\.scverse)\.org/\S+\.h5ad(\?download=1)?", dataset.url), name
        assert re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", dataset.checksum), name
        assert dataset.file.endswith(".h5ad") and dataset.n_bytes > 2**24
    assert len({dataset.checksum for dataset in DATASETS.values()}) == len(DATASETS)


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"No dataset 'Norman_2019'. There are: kang, .*Did you mean 'norman'\?"):
        fetch("Norman_2019")


def test_without_pooch_the_extra_and_the_address_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(InputError, match=r"pip install 'sest\[datasets\]'. kang by hand: https://exampledata"):
        fetch("kang")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to serve with a file of the dataset `made`, whose address is set once it is served."""
    pytest.importorskip("pooch")
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "made.h5ad").write_bytes(CONTENT)
    checksum = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    monkeypatch.setitem(DATASETS, "made", Dataset("", "made.h5ad", len(CONTENT), checksum, "for this test"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    return folder


def at(url: str) -> None:
    DATASETS["made"] = replace(DATASETS["made"], url=f"{url}/made.h5ad")


class Heard(Silent):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int]] = []
        self.n = 0

    def begin(self, task: str, total: int, *_: object) -> None:
        self.tasks.append((task, total))

    def advance(self, n: int = 1) -> None:
        self.n += n


def test_a_dataset_is_downloaded_once_and_read_without_a_network_afterwards(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve(source) as url, reporting(Heard()) as heard:
        at(url)
        path = fetch("made")
    assert path == tmp_path / "kept" / "made.h5ad" and path.read_bytes() == CONTENT
    assert heard.tasks == [("Downloading made", len(CONTENT))] and heard.n == len(CONTENT)  # type: ignore[attr-defined]
    assert fetch("made") == path  # the server is gone
    assert capfd.readouterr() == ("", "")


def test_without_a_network_one_line_says_what_from_where_and_what_to_do(source: Path, tmp_path: Path) -> None:
    with serve(source) as url:
        at(url)
    with pytest.raises(InputError) as caught:
        fetch("made")
    assert str(caught.value) == (
        f"Cannot fetch made (2 MB) from {url}/made.h5ad: no network, or no such server. Download it where there is a "
        f"network, put it into {tmp_path / 'kept'} as made.h5ad, and ask again."
    )


def test_bytes_of_another_checksum_are_refused_and_not_kept(source: Path, tmp_path: Path) -> None:
    (source / "made.h5ad").write_text("<html>please log in</html>")
    with serve(source) as url:
        at(url)
        with pytest.raises(InputError, match=r"is not the made that was published \(md5:\w+\): nothing is kept"):
            fetch("made", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_what_a_server_does_not_have_is_said(source: Path) -> None:
    with serve(source) as url:
        at(url)
        (source / "made.h5ad").unlink()
        with pytest.raises(InputError, match=r"Cannot fetch made .*: 404 Client Error"):
            fetch("made")


def test_a_file_that_was_changed_is_fetched_again(source: Path) -> None:
    with serve(source) as url:
        at(url)
        fetch("made").write_bytes(b"cut off")
        assert datasets.fetch("made").read_bytes() == CONTENT
