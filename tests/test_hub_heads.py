"""Heads on a hub: pushed with a card, and found by name by every command that takes a run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import yaml
from conftest import Demo

from helpers.hub import COMMIT, NO_SERVER, TOKEN, Hub, hub_environment
from helpers.processes import server
from sest.config import PredictConfig
from sest.hub import fetched, repository_of
from sest.prediction.predict import predict
from sest.runs.checkpoint import open_checkpoint
from sest.runs.known import known_without_cells


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def hub(files: Path) -> Iterator[Hub]:
    files.mkdir()
    hub = Hub(files)
    yield hub
    hub.close()


def sest(folder: Path, endpoint: str, *words: object, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = hub_environment(folder, endpoint) | ({} if token is None else {"HF_TOKEN": token})
    return server().run(["-m", "sest", *words], cwd=folder, env=environment)


def test_names_of_heads_have_a_scheme_of_their_own() -> None:
    for text in ("hf://lab/head", "hf:/lab/head", Path("hf://lab/head")):  # a Path keeps one slash
        found = repository_of(text)
        assert found is not None and (found.name, found.revision) == ("lab/head", None)
    named = repository_of("hf://lab/head@v1")
    assert named is not None and named.revision == "v1"
    for text in ("lab/head", "hf://lab", "hf://datasets/lab/cache.zarr", "s3://lab/head", "run/best"):
        assert repository_of(text) is None and fetched(Path(text)) == Path(text)


def test_a_pushed_head_predicts_and_trains_on_by_name(demo: Demo, hub: Hub, files: Path, tmp_path: Path) -> None:
    done = sest(tmp_path, hub.url, "push", demo.run, "lab/head", token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "RUN is hf://lab/head now" in " ".join(done.stdout.split()) and hub.private == {"lab/head": True}
    pushed = {file.name for file in (files / "lab" / "head").iterdir()} - {".gitattributes"}
    best = open_checkpoint(demo.run / "best")
    assert pushed == {*best.state["files"], "state.json", "README.md"} and "optimizer.safetensors" not in pushed

    known = known_without_cells(best, None)
    assert known is not None
    name = known.perturbations[1]
    asked = ("--controls", demo.cells, "--only", name, "--n-cells", 12)
    done = sest(tmp_path, hub.url, "predict", "hf://lab/head", *asked, "-o", "one.h5ad")
    assert done.returncode == 0, done.stderr
    predict(demo.run, tmp_path / "other.h5ad", PredictConfig(controls=str(demo.cells), only=name, n_cells=12))
    one, other = (ad.read_h5ad(tmp_path / f"{n}.h5ad") for n in ("one", "other"))
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())

    done = sest(tmp_path, NO_SERVER, "embed", demo.cells, "--like", "hf://lab/head", "--cache", "new.zarr")
    assert done.returncode == 0, done.stderr  # from the cache of the hub
    sizes = ("--max-steps", 1, "--val-every", 1, "--batch-size", 2, "--set-size", 8, "--num-workers", 0)
    features = ("--perturbations", demo.features)
    done = sest(tmp_path, NO_SERVER, "train", "new.zarr", "-r", "r", "--init-from", "hf://lab/head", *features, *sizes)
    assert done.returncode == 0, done.stderr
    started = open_checkpoint(tmp_path / "r" / "last").state["init_from"]
    assert started["name"] == COMMIT and started["model_sha256"] == best.state["files"]["model.safetensors"]
    done = sest(tmp_path, NO_SERVER, "info", "hf://lab/head", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "checkpoint", done.stderr


def test_what_cannot_be_pushed_or_found_is_one_line(demo: Demo, hub: Hub, files: Path, tmp_path: Path) -> None:
    (files / "lab" / "encoder").mkdir(parents=True)
    (files / "lab" / "encoder" / "model.safetensors").write_bytes(b"x")
    controls: tuple[Any, ...] = ("--controls", demo.cells, "--only", "A", "-o", "o.h5ad")
    for words, token, expected in (
        (("push", demo.run, "lab/head"), None, "needs a token with write access"),
        (("push", demo.run, "head"), TOKEN, "'head' is no repository: name it OWNER/NAME"),
        (("push", tmp_path / "gone", "lab/head"), TOKEN, "gone does not exist"),
        (("predict", "hf://lab/none", *controls), None, "no such repository on the Hugging Face hub"),
        (("predict", "hf://lab/encoder", *controls), None, "lab/encoder is no head that `sest push` wrote"),
    ):
        done = sest(tmp_path, hub.url, *words, token=token)
        assert done.returncode == 2 and expected in done.stderr, done.stderr
        assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.glob("*.h5ad")) and not (files / "lab" / "head").exists()


def test_the_card_can_be_read_before(demo: Demo, tmp_path: Path) -> None:
    done = sest(tmp_path, NO_SERVER, "push", demo.run, "lab/head", "--card", "card.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "card.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "sest"
    assert "sest predict hf://lab/head --controls" in text
    assert sest(tmp_path, NO_SERVER, "push", demo.run, "lab/head", "--card", "card.md").returncode == 2
    assert os.sep + "pytest" not in text  # no paths of this machine
