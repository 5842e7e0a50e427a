"""Heads that go on with other cells: rows and columns by name, what is frozen, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from helpers.caches import CellGroup, small_screen, write_cache
from helpers.configs import small_config
from helpers.notes import Notes
from sest.cache import open_cache
from sest.config import TrainConfig
from sest.data.dataset import Dataset, read_dataset
from sest.errors import InputError
from sest.head.model import HeadSizes, StateTransition, new_model
from sest.progress import reporting
from sest.runs.checkpoint import open_checkpoint
from sest.runs.initial import (
    PARTS,
    features_to_start_with,
    freeze,
    like_head,
    refuse_other_cells,
    sized_like,
    take_over,
)
from sest.runs.run_folder import read_run_config
from sest.runs.schema import BEST, LAST, MODEL
from sest.training.prepare import head_sizes
from sest.training.train import train


def other_screen() -> CellGroup:
    """Of the genes every second one and three new ones, in another order; P is gone, U is new."""
    screen = small_screen("other")
    old = [f"g{i}" for i in range(18, -1, -2)]
    genes = ("new1", *old, "new2", "new3")
    columns = [screen.genes.index(name) if name in screen.genes else 1 for name in genes]
    obs = screen.obs.assign(perturbation=screen.obs["perturbation"].astype(str).replace("P", "U").astype("category"))
    return dataclasses.replace(screen, genes=genes, matrix=screen.matrix[:, columns], obs=obs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two caches whose cells are embedded alike, and a run on the first."""
    folder = tmp_path_factory.mktemp("initial")
    write_cache(folder / "a.zarr", [small_screen()])
    write_cache(folder / "b.zarr", [other_screen()])
    rng = np.random.default_rng(0)
    vectors = {name: rng.random(3, np.float32) for name in "PQRSTU"}
    np.savez(folder / "f.npz", allow_pickle=False, **vectors)
    np.savez(folder / "changed.npz", allow_pickle=False, **{n: v + (n == "Q") for n, v in vectors.items()})
    train(folder / "a.zarr", folder / "run", small_config(max_steps=6))
    return folder


def fresh(data: Dataset, config: TrainConfig) -> StateTransition:
    return new_model(head_sizes(data, config), seed=1)


def test_a_head_on_the_same_cells_is_taken_over_whole(folder: Path) -> None:
    source = open_checkpoint(folder / "run" / BEST)
    config = sized_like(small_config(seed=1), source)
    data = read_dataset(folder / "a.zarr", config)
    model = fresh(data, config)
    said = take_over(source, model, data, config)
    for name, tensor in source.model_tensors().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert said == {"name": BEST, "step": source.state["step"], "model_sha256": source.state["files"][MODEL]}


def test_sources_that_nobody_named_are_the_head_s_where_they_are_words(folder: Path) -> None:
    source = open_checkpoint(folder / "run" / BEST)

    def sources(theirs: str, **options: Any) -> str:
        features = {**source.state["features"], "source": theirs}
        head = dataclasses.replace(source, state={**source.state, "features": features})
        return like_head(small_config(init_from="run", **options), head, None).perturbations

    assert sources("drugs+onehot") == "drugs+onehot" and sources("drugs", perturbations="genes") == "genes"
    assert sources("ESM2.pt") == sources("ESM2.pt+onehot") == "auto"  # where that file is now is not known
    assert like_head(small_config(), None, None) == small_config()


def test_genes_and_perturbations_are_found_by_name_and_new_ones_are_as_in_a_fresh_head(folder: Path) -> None:
    source, config = open_checkpoint(folder / "run" / LAST), small_config(seed=1)
    data = read_dataset(folder / "b.zarr", config)
    model, notes = fresh(data, config), Notes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with reporting(notes):
        take_over(source, model, data, config)
    theirs, ours = source.model_tensors(), model.state_dict()
    weight, bias = "project_out.3.weight", "project_out.3.bias"
    for row, gene in enumerate(data.targets.genes):
        for name in (weight, bias):
            from_old = not gene.startswith("new")
            expected = theirs[name][source.state["genes"].index(gene)] if from_old else before[name][row]
            assert torch.equal(ours[name][row], expected), gene
    first, old = "pert_encoder.0.weight", ["P", "Q", "R", "S", "T"]
    for column, target in enumerate(["Q", "R", "S", "T", "U"]):
        expected = theirs[first][:, old.index(target)] if target != "U" else before[first][:, column]
        assert torch.equal(ours[first][:, column], expected), target
    for name in ours.keys() - {weight, bias, first}:
        assert torch.equal(ours[name], theirs[name]), name
    assert any("10 of 13 genes and 4 of 5 feature columns are known to it" in note for note in notes.notes)


def test_a_run_starts_from_another_and_goes_on_when_it_is_stopped(folder: Path, tmp_path: Path) -> None:
    """Frozen parts stay; a stopped and resumed run is the run; both say what they started from."""
    frozen: dict[str, Any] = {"freeze": ("transformer_backbone", "basal_encoder"), "init_from": str(folder / "run")}
    config = small_config(max_steps=8, **frozen)
    train(folder / "b.zarr", tmp_path / "whole", config)
    train(folder / "b.zarr", tmp_path / "parts", small_config(max_steps=4, **frozen))
    train(folder / "b.zarr", tmp_path / "parts", config, resume="auto")
    theirs = load_file(folder / "run" / BEST / MODEL)
    whole, parts = (load_file(tmp_path / run / LAST / MODEL) for run in ("whole", "parts"))
    for name, values in whole.items():
        assert np.array_equal(values, parts[name]), name
        if name.startswith(("transformer_backbone", "basal_encoder")):
            assert np.array_equal(values, theirs[name]), name
    assert not np.array_equal(whole["pert_encoder.3.weight"], theirs["pert_encoder.3.weight"])
    source = open_checkpoint(folder / "run" / BEST)
    for run in ("whole", "parts"):
        state = open_checkpoint(tmp_path / run / LAST).state
        assert state["init_from"]["model_sha256"] == source.state["files"][MODEL]
        assert state["trainable_parameters"] < source.state["trainable_parameters"]
        assert Path(read_run_config(tmp_path / run)[0]["init_from"]) == folder / "run"


def test_features_of_files_must_be_the_same_vectors(folder: Path, tmp_path: Path) -> None:
    given = {"perturbations": str(folder / "f.npz")}
    train(folder / "a.zarr", tmp_path / "a", small_config(max_steps=2, **given))
    source = open_checkpoint(tmp_path / "a" / LAST)
    config = small_config(**given)
    data = read_dataset(folder / "b.zarr", config)
    model = fresh(data, config)
    take_over(source, model, data, config)
    assert torch.equal(model.state_dict()["pert_encoder.0.weight"], source.model_tensors()["pert_encoder.0.weight"])
    named_so = tmp_path / "f.npz"
    named_so.write_bytes((folder / "changed.npz").read_bytes())
    data = read_dataset(folder / "b.zarr", small_config(perturbations=str(named_so)))
    with pytest.raises(InputError, match=r"f\.npz has another vector for Q than the features"):
        take_over(source, fresh(data, config), data, config)
    one_hot, notes = read_dataset(folder / "b.zarr", small_config()), Notes()
    with reporting(notes):
        take_over(source, fresh(one_hot, config), one_hot, config)
    said = "was trained with other features (f.npz, these are onehot): what it knows of perturbations is not used"
    assert any(said in note for note in notes.notes)


def test_what_cannot_go_on_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    run, source = tmp_path / "run", str(folder / "run")

    def refused(cache: str = "b.zarr", **options: Any) -> str:
        with pytest.raises(InputError) as error:
            train(folder / cache, run, small_config(**options))
        assert not run.exists()
        return str(error.value)

    assert "has --hidden 16" in refused(init_from=source, hidden=32)
    assert "without one nothing is to be kept" in refused(freeze="project_out")
    assert "Did you mean 'project_out'" in refused(init_from=source, freeze="project_ot")
    assert "leaves nothing to train" in refused(init_from=source, freeze=PARTS)
    assert "3 genes are new to" in refused(init_from=source, freeze="project_out")
    assert "1 feature columns are new" in refused(init_from=source, freeze="pert_encoder")
    assert "Pass --target-sum 10000" in refused(init_from=source, target_sum=5000.0)
    assert "has none to go on with" in refused(init_from=source, head="none")
    assert "does not exist" in refused(init_from=str(tmp_path / "gone"))


def test_cells_that_were_embedded_otherwise_are_refused(folder: Path) -> None:
    source = open_checkpoint(folder / "run" / BEST)
    data = read_dataset(folder / "b.zarr", small_config())
    refuse_other_cells(source, data)
    for change in ({"encoder_sha256": "0"}, {"max_tokens": 9}, {"native_dim": 1}):
        cache = dataclasses.replace(data.cache, attributes={**data.cache.attributes, **change})
        with pytest.raises(InputError, match=r"not embedded as those of .*sest embed INPUT --like"):
            refuse_other_cells(source, dataclasses.replace(data, cache=cache))
    narrow = dataclasses.replace(source, state={**source.state, "sizes": {**source.state["sizes"], "dim": 3}})
    with pytest.raises(InputError, match=r"width 6; .* takes 3"):
        refuse_other_cells(narrow, data)


def test_parts_are_those_of_the_head(folder: Path) -> None:
    model = new_model(HeadSizes(4, 3, 5, hidden=8, n_layers=1, n_heads=2, ffn=8), seed=0)
    assert [name for name, _ in model.named_children()] == list(PARTS)
    freeze(model, small_config(init_from="x", freeze="basal_encoder"))
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {"basal_encoder"}
    assert features_to_start_with(None) is None and open_cache(folder / "a.zarr").n_cells
