"""What a checkpoint says alone is what its cache says."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from sest.data.dataset import read_dataset
from sest.errors import InputError
from sest.runs.checkpoint import Checkpoint, open_checkpoint
from sest.runs.known import CELLS, Known, known_with_cells, known_without_cells, mean_of_controls
from sest.runs.provenance import find_data
from sest.runs.run_folder import stored_features
from sest.training.train import train

LOG1P = dataclasses.replace(small_screen("log"), scale="log1p")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and files of features: of the perturbations, and of some of them."""
    folder = tmp_path_factory.mktemp("known")
    write_cache(folder / "c.zarr", [small_screen()])
    rng = np.random.default_rng(0)
    np.savez(
        folder / "f.npz", allow_pickle=False, **{n: rng.random(3, np.float32) for n in ("P", "Q", "R", "S", "T", "U")}
    )
    np.savez(folder / "some.npz", allow_pickle=False, **{n: rng.random(2, np.float32) for n in "PQ"})
    return folder


def trained(folder: Path, run: str, **options: Any) -> tuple[Known, Checkpoint]:
    """A run of two steps as its cache has it, and its checkpoint best/, which lies in no run folder."""
    train(folder / "c.zarr", folder / run, small_config(max_steps=2, val_every=2, **options))
    checkpoint = open_checkpoint(folder / run / "best")
    config, cache, source = find_data(checkpoint, None, None)
    data = read_dataset(cache, config, stored=stored_features(checkpoint))
    alone = open_checkpoint(Path(shutil.copytree(checkpoint.folder, folder / f"{run}-alone")))
    return known_with_cells(checkpoint, data, config, source), alone


@pytest.mark.parametrize("sources", ["onehot", "FILE/f.npz", "onehot+FILE/some.npz", "genes+FILE/f.npz"])
def test_a_checkpoint_alone_knows_what_its_cache_knows(folder: Path, sources: str, request: Any) -> None:
    run = str(request.node.callspec.indices["sources"])
    given = sources.replace("FILE", str(folder))
    whole, checkpoint = trained(folder, run, perturbations=given)
    alone = known_without_cells(checkpoint, None)
    assert alone is not None
    assert np.array_equal(alone.features.matrix, whole.features.matrix)
    for name in ("P", "Q", "T", "P+Q"):
        one, other = alone.features.vectors.find(name), whole.features.vectors.find(name)
        assert (one is None) == (other is None)
        assert one is None or other is None or np.array_equal(one, other)
        assert alone.features.vectors.has_only_a_column(name) == whole.features.vectors.has_only_a_column(name)
    assert alone.features.names == whole.features.names and alone.features.missing == whole.features.missing
    for field in dataclasses.fields(Known):
        if field.name not in ("config", "features", "source", "data"):
            assert getattr(alone, field.name) == getattr(whole, field.name), field.name
    steps = ("batch_size", "set_size", "missing_perturbations")
    assert [getattr(alone.config, n) for n in steps] == [getattr(whole.config, n) for n in steps]
    np.testing.assert_array_equal(mean_of_controls(checkpoint, alone), mean_of_controls(checkpoint, whole))


def test_a_file_may_have_more_perturbations_but_none_of_the_runs_otherwise(folder: Path) -> None:
    _, checkpoint = trained(folder, "file", perturbations=str(folder / "f.npz"))
    kept, given = (known_without_cells(checkpoint, source) for source in (None, str(folder / "f.npz")))
    assert kept is not None and given is not None
    assert kept.features.vectors.find("U") is None and given.features.vectors.find("U") is not None
    changed = dict(np.load(folder / "f.npz"))
    changed["P"] = changed["P"] + 1
    np.savez(folder / "changed.npz", allow_pickle=False, **changed)
    with pytest.raises(InputError, match=r"changed\.npz has other features than the checkpoint was trained with"):
        known_without_cells(checkpoint, str(folder / "changed.npz"))
    with pytest.raises(InputError, match=r"some\.npz has features of width 2; the checkpoint takes 3"):
        known_without_cells(checkpoint, str(folder / "some.npz"))


def test_other_sources_than_the_runs_are_not_ignored(folder: Path) -> None:
    _, checkpoint = trained(folder, "sources", perturbations=str(folder / "f.npz"))
    with pytest.raises(InputError, match=r"onehot has features of width 5; the checkpoint takes 3"):
        known_without_cells(checkpoint, "onehot")
    with pytest.raises(InputError, match="keeps no vectors of genes"):
        known_without_cells(checkpoint, "genes")


def test_what_earlier_versions_kept_is_not_enough(folder: Path) -> None:
    _, checkpoint = trained(folder, "old")
    before = dataclasses.replace(checkpoint, state={k: v for k, v in checkpoint.state.items() if k != CELLS})
    assert known_without_cells(before, None) is None


def test_the_mean_of_controls_is_in_the_blend_alone(folder: Path) -> None:
    whole, _ = trained(folder, "mean")
    last = open_checkpoint(folder / "mean" / "last")
    alone = known_without_cells(last, None)
    assert alone is not None and not last.has_blend
    with pytest.raises(InputError, match="Pass --cache, or --missing-genes zero"):
        mean_of_controls(last, alone)
    assert whole.data is not None
    rows = np.flatnonzero(whole.data.labels.is_control)
    expected = whole.data.targets.log1p(rows).toarray().astype(np.float64).mean(0)
    np.testing.assert_allclose(mean_of_controls(last, whole), expected, rtol=1e-6)
    best = open_checkpoint(folder / "mean" / "best")  # all contexts have training pairs here, so all controls count
    np.testing.assert_allclose(mean_of_controls(best, alone), expected, rtol=1e-6)


def test_log1p_files_keep_how_they_were_normalised(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr", [LOG1P])
    whole, checkpoint = trained(tmp_path, "run")
    alone = known_without_cells(checkpoint, None)
    assert alone is not None and alone.scale == "log1p"
    assert alone.normalisation == whole.normalisation and alone.normalisation.sums is not None
