"""Names of repositories, and what is said where huggingface_hub is not there; the rest: tests/se and test_hub_heads."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sest.errors import InputError
from sest.hub import NAME, Repository


def test_names_are_owner_and_name_with_a_revision_or_without() -> None:
    for text, expected in {
        "arcinstitute/SE-600M": ("arcinstitute/SE-600M", None),
        "lab/one@v2": ("lab/one", "v2"),
        "lab/one@refs/pr/1": ("lab/one", "refs/pr/1"),
    }.items():
        found = NAME.fullmatch(text)
        assert found is not None and (found[1], found[2]) == expected
    for text in ("one", "/one", "lab/one/two", "../one", "lab/.one", "lab/one@", "lab one/x"):
        assert NAME.fullmatch(text) is None, text


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    repository = Repository("lab/one", None, "pass --encoder FOLDER")
    for call in (
        lambda: repository.files("state.json"),
        lambda: repository.download(["a"]),
        lambda: repository.upload(tmp_path, "x", private=True),
    ):
        with pytest.raises(InputError, match=r"pip install 'sest\[hub\]'.*pass --encoder FOLDER\."):
            call()


@pytest.mark.parametrize(
    "name", [None, 3, "", "../x", "a/../../x", "/etc/passwd", "a\x1b[31m", "a\\b", "~/x", "a//b", "./a"]
)
def test_a_list_of_files_with_what_is_no_file_of_a_repository_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: object
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    siblings = [SimpleNamespace(rfilename="model.safetensors"), SimpleNamespace(rfilename=name)]
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    with pytest.raises(InputError, match=r"lab/one: the hub lists .* which is no name of a file"):
        Repository("lab/one", None, "").files("state.json")
