"""Where a checkpoint's cache and features are, and what is refused because it is not what it was trained with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from sest.data.dataset import Dataset, read_dataset
from sest.data.vectors import ONE_HOT
from sest.errors import InputError
from sest.runs.checkpoint import Checkpoint, open_checkpoint
from sest.runs.provenance import check_data, check_width, files_of, find_data, saw_the_same_split
from sest.training.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with features of width 3, and what it was made from."""
    folder = tmp_path_factory.mktemp("provenance")
    write_cache(folder / "c.zarr", [small_screen()])
    np.savez(folder / "f.npz", allow_pickle=False, **{n: np.full(3, ord(n), np.float32) for n in "PQRST"})
    train(folder / "c.zarr", folder / "run", small_config(max_steps=1, perturbations=str(folder / "f.npz")))
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder / "run" / "last")


def data_of(folder: Path, **changes: Any) -> Dataset:
    config = small_config(**{"perturbations": str(folder / "f.npz"), **changes})
    return read_dataset(folder / "c.zarr", config)


def changed(checkpoint: Checkpoint, **state: Any) -> Checkpoint:
    return replace(checkpoint, state={**checkpoint.state, **state})


def test_a_run_says_where_its_cache_and_features_are(folder: Path, checkpoint: Checkpoint) -> None:
    config, cache, source = find_data(checkpoint, None, None)
    assert (cache.path, source) == (str(folder / "c.zarr"), str(folder / "f.npz"))
    assert config == small_config(max_steps=1, perturbations=source)
    other = shutil.copy(folder / "f.npz", folder / "moved.npz")
    config, _, source = find_data(checkpoint, str(folder / "c.zarr"), str(other))
    assert (source, config.perturbations) == (str(other), str(other))


def test_a_checkpoint_alone_is_told_where_they_are(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    alone = open_checkpoint(Path(shutil.copytree(checkpoint.folder, tmp_path / "alone")))
    with pytest.raises(InputError, match=r"does not say where its perturbation features are\. Pass --perturbations"):
        find_data(alone, None, None)
    with pytest.raises(InputError, match=r"does not say where its cache is\. Pass --cache"):
        find_data(alone, None, str(folder / "f.npz"))
    config, cache, _ = find_data(alone, str(folder / "c.zarr"), str(folder / "f.npz"))
    assert cache.path == str(folder / "c.zarr") and config.hidden == small_config().hidden
    with pytest.raises(InputError, match=r"No file gone\.npz with the run's perturbation features"):
        find_data(checkpoint, None, "gone.npz")
    with pytest.raises(InputError, match=r"The cache gone\.zarr does not exist\. Pass --cache"):
        find_data(checkpoint, "gone.zarr", None)


def test_an_imported_checkpoint_needs_no_features_of_a_whole_cache(folder: Path, checkpoint: Checkpoint) -> None:
    config, _, source = find_data(changed(checkpoint, cache_sha256=None), None, None)
    assert (config.perturbations, source) == (ONE_HOT, str(folder / "f.npz"))


def test_what_the_checkpoint_was_trained_with_is_accepted_and_anything_else_refused(
    folder: Path, checkpoint: Checkpoint
) -> None:
    data = data_of(folder)
    check_data(checkpoint, data)
    check_width("f.npz", 3, checkpoint)
    sizes, features, genes = (checkpoint.state[key] for key in ("sizes", "features", "genes"))
    for state, message in (
        ({"cache_sha256": "0"}, r"c\.zarr is not the cache .*last was trained on\. Pass --cache with that one"),
        ({"sizes": {**sizes, "dim": 7}}, r"embeddings of width 6; the checkpoint takes 7"),
        ({"sizes": {**sizes, "n_features": 4}}, r"f\.npz has features of width 3; the checkpoint takes 4"),
        ({"features": {**features, "sha256": "0"}}, r"f\.npz has other features than the checkpoint was trained with"),
        ({"sizes": {**sizes, "n_genes": 19}}, r"has 20 genes; the checkpoint predicts 19"),
        ({"genes": [*genes[:-1], "other"]}, r"in another order, than the checkpoint predicts: g19 instead of other"),
    ):
        with pytest.raises(InputError, match=message):
            check_data(changed(checkpoint, **state), data)
    check_data(changed(checkpoint, cache_sha256=None, features={**features, "sha256": None}, genes=[]), data)


def test_the_same_split_is_the_same_cache_and_the_same_splits_file(
    folder: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    data = data_of(folder)
    assert saw_the_same_split(checkpoint, data)
    assert not saw_the_same_split(changed(checkpoint, cache_sha256="0"), data)
    assert not saw_the_same_split(changed(checkpoint, splits_sha256="0"), data)
    splits = tmp_path / "splits.toml"
    splits.write_text('[datasets]\nscreen = "x.h5ad"\n[training]\nscreen = "train"\n')
    assert not saw_the_same_split(checkpoint, data_of(folder, splits=str(splits)))


def test_what_a_run_consists_of_and_was_made_from_is_known_from_the_run_and_from_a_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.h5ad").touch()
    splits = tmp_path / "s.toml"
    splits.write_text('[datasets]\nd = "a.h5ad"\n[training]\nd = "train"\n')
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    (run / "config.toml").write_text(f'splits = "{splits}"\n{(run / "config.toml").read_text()}')
    made_from = {tmp_path / "a.h5ad", splits, folder / "c.zarr", folder / "f.npz"}
    for given in (run, run / "last"):
        assert set(files_of(given)) >= made_from | {run / "config.toml", run / "metrics.jsonl", run / "last"}


def test_a_run_that_cannot_be_read_is_no_error_here(tmp_path: Path) -> None:
    for text in ("not TOML", "provenance = 5\nsplits = 3\nperturbations = []\n", 'splits = "gone.toml"\n'):
        (tmp_path / "config.toml").write_text(text)
        assert tmp_path / "config.toml" in files_of(tmp_path)
    assert files_of(tmp_path / "gone")
