"""What the ancestor's command line meets on the disk: its cache, its run, and data of other sizes than it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from helpers.caches import DIM, GENES, small_screen, write_cache
from helpers.configs import small_config
from helpers.notes import Notes
from helpers.screens import TINY
from sest.cache import open_cache
from sest.cache.schema import COMPLETE
from sest.compat.ancestor import EMBEDDING_DIM, INPUT_DIM, OUTPUT_DIM, PERT_DIM, Request
from sest.compat.ancestor_run import check_before_embedding, check_features, check_genes, find_resume, finished_cache
from sest.errors import InputError
from sest.progress import reporting
from sest.simulation.screen import write_features, write_h5ad, write_screen
from sest.training.train import train


def request(folder: Path, **changes: Any) -> Request:
    """A command line that embeds with pca into folder/cache and trains in folder/run."""
    least = Request(
        splits=folder / "starter.toml",
        encoder="pca",
        cache=folder / "cache",
        run=folder / "run",
        checkpoint=None,
        data_roots=(),
        sizes={},
        embed={},
        train={},
    )
    return replace(least, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache in cache/, and in run/ and stage1/ the same run of four steps. Read only."""
    folder = tmp_path_factory.mktemp("ancestor")
    cache = write_cache(folder / "cache", [small_screen()])
    for name in ("run", "stage1"):
        train(cache, folder / name, small_config(max_steps=4))
    return folder


# --- the cache


def test_a_finished_cache_is_taken_and_said(folder: Path) -> None:
    with reporting(Notes()) as told:
        cache = finished_cache(request(folder, sizes={EMBEDDING_DIM: DIM}, embed={"control": "ctrl"}))
    assert cache is not None and cache.dim == DIM
    assert isinstance(told, Notes) and f"is complete ({cache.n_cells} cells at width {DIM})" in told.notes[0]


def test_an_unfinished_or_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [small_screen()])
    shard = next(path for path in sorted(cache.rglob("c/*")) if path.is_file())
    shard.unlink()
    with reporting(Notes()) as told:
        assert finished_cache(request(tmp_path)) is None
    assert isinstance(told, Notes) and "is damaged" in told.notes[0]
    (cache / COMPLETE).unlink()
    assert finished_cache(request(tmp_path)) is None
    assert finished_cache(request(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "SE-600M"}, r"se_model_path is SE-600M, but \S+/cache was made with pca\. Give \+\+model\S+=pca"),
        ({"sizes": {EMBEDDING_DIM: 8}}, "hidden_dim is 8, but .* was made with 6"),
        ({"embed": {"pert_col": "guide"}}, "pert_col is guide, but .* was made with gene"),
        ({"embed": {"weights": "older.ckpt"}}, "se_checkpoint_path is older.ckpt, but .* was made with pca"),
    ],
)
def test_a_cache_that_was_made_otherwise_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        finished_cache(request(folder, **changes))


# --- the run


def test_a_new_run_begins_at_step_0_once_its_options_are_sound(tmp_path: Path) -> None:
    assert find_resume(request(tmp_path, train={"max_steps": 4})) is None
    with pytest.raises(InputError, match="max-steps is 0"):
        find_resume(request(tmp_path, train={"max_steps": 0}))


def test_a_run_that_exists_goes_on_whatever_it_was_begun_from(folder: Path) -> None:
    for checkpoint in (None, str(folder / "stage1" / "last.ckpt")):
        with reporting(Notes()) as told:
            assert find_resume(request(folder, checkpoint=checkpoint, train={"max_steps": 8})) == "auto"
        assert isinstance(told, Notes) and "its training goes on (--resume auto)" in told.notes[0]
        assert ("model.checkpoint says where it began" in told.notes[0]) == (checkpoint is not None)
    with pytest.raises(InputError, match="--set-size 5 would make another run"):
        find_resume(request(folder, train={"set_size": 5}))


def test_a_stage_begins_from_the_checkpoint_that_is_named(folder: Path, tmp_path: Path) -> None:
    for name, found in (("checkpoint-step-4.ckpt", "checkpoint-step-4"), ("final_model.ckpt", "last")):
        given = request(tmp_path, checkpoint=str(folder / "stage1" / name), train={"max_steps": 8})
        assert find_resume(given) == str(folder / "stage1" / found)
    with pytest.raises(InputError, match="checkpoint-step-3"):
        find_resume(request(tmp_path, checkpoint=str(folder / "stage1" / "checkpoint-step-3.ckpt")))


# --- sizes


def test_genes_are_compared_with_the_file_before_anything_is_embedded(tmp_path: Path) -> None:
    write_screen(TINY, tmp_path / "cells.h5ad", splits=tmp_path / "starter.toml")
    check_before_embedding(request(tmp_path, sizes={INPUT_DIM: 120, OUTPUT_DIM: 120}))
    for key, asked in ((INPUT_DIM, 50), (OUTPUT_DIM, 121)):
        with pytest.raises(InputError, match=rf"{key} is {asked}, but cells\.h5ad has 120 genes\. Give \+\+{key}=120"):
            check_before_embedding(request(tmp_path, sizes={key: asked}))


def test_of_several_files_only_more_genes_than_the_smallest_has_are_refused(tmp_path: Path) -> None:
    for name, n_genes in (("a", 120), ("b", 140)):
        write_h5ad(replace(TINY, n_genes=n_genes), tmp_path / f"{name}.h5ad")
    toml = {"datasets": {"a": "a.h5ad", "b": "b.h5ad"}, "training": {"a": "train", "b": "train"}}
    (tmp_path / "starter.toml").write_text(tomli_w.dumps(toml))
    check_before_embedding(request(tmp_path, sizes={INPUT_DIM: 100}))  # as many as they have in common, perhaps
    with pytest.raises(InputError, match=r"input_dim is 130, but a\.h5ad has 120 genes"):
        check_before_embedding(request(tmp_path, sizes={INPUT_DIM: 130}))


def test_features_must_have_the_width_that_is_named(tmp_path: Path) -> None:
    file = tmp_path / "features.npz"
    write_features(TINY, file)
    check_features(request(tmp_path, train={"perturbations": str(file)}, sizes={PERT_DIM: TINY.n_features}))
    check_features(request(tmp_path))  # one-hot
    with pytest.raises(InputError, match=r"pert_dim is 5120, but \S+ has features of width 64"):
        check_features(request(tmp_path, train={"perturbations": str(file)}, sizes={PERT_DIM: 5120}))
    with pytest.raises(InputError, match=r"gone\.npz"):
        check_features(request(tmp_path, train={"perturbations": str(tmp_path / "gone.npz")}))


def test_genes_of_a_cache_are_those_that_all_its_groups_have(tmp_path: Path) -> None:
    groups = [small_screen("a"), small_screen("b", genes=(*GENES[5:], "other"))]
    cache = open_cache(write_cache(tmp_path / "cache", groups))
    check_genes(request(tmp_path, sizes={INPUT_DIM: 15, OUTPUT_DIM: 15}), cache)
    with pytest.raises(InputError, match=r"output_dim is 20, but the cells of .* have 15 genes in common"):
        check_genes(request(tmp_path, sizes={OUTPUT_DIM: 20}), cache)
