"""Encoders by name, from a server that answers as huggingface.co does, and from the cache without it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.hub import COMMIT, NO_SERVER, Hub, hub_environment
from helpers.processes import server
from helpers.se_model import write_se
from sest.cache import open_cache
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.errors import InputError
from sest.se.hub import with_local_encoder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = tmp_path_factory.mktemp("hub")
    write_se(files / "lab" / "one", gene_names(35))
    (files / "lab/one/README.md").write_text("# A model")
    (files / "lab/one/training_log.bin").write_bytes(bytes(1000))
    write_se(files / "lab" / "several", gene_names(35), seed=1)
    (files / "lab/several/epoch4.safetensors").write_bytes((files / "lab/one/model.safetensors").read_bytes())
    for name in ("other", "gated"):
        (files / "lab" / name).mkdir()
        (files / "lab" / name / "README.md").write_text("nothing")
    return files


@pytest.fixture
def hub(files: Path) -> Iterator[Hub]:
    hub = Hub(files)
    yield hub
    hub.close()


def sest(tmp_path: Path, endpoint: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `sest embed a.h5ad --cache s.zarr --encoder WORDS` in a process of its own: HF_ENDPOINT is read on import."""
    if not (tmp_path / "a.h5ad").exists():
        write_cells(tmp_path / "a.h5ad", counts(20))
    return server().run(
        ["-m", "sest", "embed", "a.h5ad", "--device", "cpu", "--cache", "s.zarr", "--encoder", *words],
        cwd=tmp_path,
        env=hub_environment(tmp_path, endpoint) | environment,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    return line


def test_an_encoder_is_downloaded_once_and_used_from_the_cache_without_a_connection(
    hub: Hub, files: Path, tmp_path: Path
) -> None:
    done = sest(tmp_path, hub.url, "lab/one")
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == {"model.safetensors", "protein_embeddings.pt", "config.yaml"}
    assert f"lab/one: model.safetensors of revision {COMMIT[:12]}, in {tmp_path}/hf/hub/" in done.stderr
    config = EmbedConfig(encoder=str(files / "lab" / "one"), device="cpu")
    embed([tmp_path / "a.h5ad"], tmp_path / "local.zarr", config)
    here, there = (open_cache(tmp_path / name).groups["a"].embeddings() for name in ("local.zarr", "s.zarr"))
    np.testing.assert_array_equal(here, there)
    hub.close()
    for endpoint, variables in ((hub.url, {}), (NO_SERVER, {"HF_HUB_OFFLINE": "1"})):
        again = sest(tmp_path, endpoint, "lab/one", **variables)
        assert again.returncode == 0, again.stderr
        assert (
            "lab/one: the hub cannot be reached" in again.stderr and "used as downloaded before, from" in again.stderr
        )
        assert "s.zarr is complete already." in again.stderr


def test_of_several_files_of_weights_only_the_chosen_one_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    assert refused(sest(tmp_path, hub.url, "lab/several")) == (
        "Error: lab/several has several files of weights: epoch4.safetensors, model.safetensors. "
        "Choose one with --weights NAME."
    )
    line = refused(sest(tmp_path, hub.url, "lab/several", "--weights", "epoch5.safetensors"))
    assert "has no weights 'epoch5.safetensors'. Did you mean 'epoch4.safetensors'" in line
    assert hub.fetched() == set()
    done = sest(tmp_path, hub.url, "lab/several", "--weights", "epoch4.safetensors")
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == {"epoch4.safetensors", "protein_embeddings.pt", "config.yaml"}
    assert open_cache(tmp_path / "s.zarr").attributes["encoder"] == "epoch4.safetensors"


IN_TURN = """
import sys
from sest.cli.main import main
for name in sys.argv[1:]:
    sys.argv[1:] = ["embed", "a.h5ad", "--device", "cpu", "--cache", "s.zarr", "--encoder", name]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2, ended.code
"""


def test_what_the_hub_does_not_have_is_one_line_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    write_cells(tmp_path / "a.h5ad", counts(20))
    expected = {
        "lab/none": "No file or folder lab/none here, and no such repository on the Hugging Face hub",
        "lab/gated": "lab/gated on the Hugging Face hub wants its licence accepted on its page first; then set",
        "lab/one@v2": "lab/one on the Hugging Face hub has no revision 'v2'.",
        "lab/other": "lab/other has no .ckpt or .safetensors: it is no SE encoder. It has: README.md.",
    }
    done = server().run(["-c", IN_TURN, *expected], cwd=tmp_path, env=hub_environment(tmp_path, hub.url))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in done.stderr
    for line, message in zip(lines, expected.values(), strict=True):
        assert message in line
    assert not (tmp_path / "s.zarr").exists()


def test_without_a_connection_the_error_says_how_to_fetch_by_hand(hub: Hub, tmp_path: Path) -> None:
    for name, variables, message in (
        ("lab/one", {"HF_ENDPOINT": NO_SERVER}, "By hand: `hf download lab/one --local-dir FOLDER` on a machine that"),
        ("lab/one", {"HF_HUB_OFFLINE": "1"}, "lab/one cannot be fetched from the Hugging Face hub (OfflineMode"),
    ):
        line = refused(sest(tmp_path, hub.url, name, **variables))
        assert message in line, line
    assert not (tmp_path / "s.zarr").exists()


def test_a_file_damaged_in_the_cache_of_the_hub_is_named_with_what_to_delete(hub: Hub, tmp_path: Path) -> None:
    assert sest(tmp_path, hub.url, "lab/one", "--dry-run").returncode == 0
    link = next(tmp_path.rglob("snapshots/*/model.safetensors"))
    blob = link.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    for endpoint in (NO_SERVER, hub.url):
        done = sest(tmp_path, endpoint, "lab/one")
        assert done.returncode == 2
        assert f"Delete {blob} and run the same command again" in done.stderr.splitlines()[-1]
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))  # as a download that was stopped
    link.unlink()
    done = sest(tmp_path, NO_SERVER, "lab/one")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "lab/one was downloaded only in part, and the hub cannot be reached" in last
    assert not (tmp_path / "s.zarr").exists()


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"pip install 'sest\[hub\]'. By hand: `hf download lab/one"):
        with_local_encoder(EmbedConfig(encoder="lab/one@main"))


def test_paths_and_pca_are_no_names_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab" / "one").mkdir(parents=True)
    for name in ("pca", "lab/one", "/lab/none", "./lab/none", "a/b/c", "none"):
        config = EmbedConfig(encoder=name)
        assert with_local_encoder(config) is config
