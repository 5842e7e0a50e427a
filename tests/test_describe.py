"""What `sest info` says of caches, runs, checkpoints, encoders and cells: the keys other programs rely on."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import Demo

from helpers.h5ad_files import gene_names
from helpers.runs import metrics
from helpers.se_model import write_se
from sest.cache import open_cache
from sest.cache.schema import COMPLETE
from sest.config import EmbedConfig, TrainConfig
from sest.data.dataset import read_dataset
from sest.describe import describe
from sest.embedding.embed import embed
from sest.errors import InputError
from sest.runs.checkpoint import load_model, open_checkpoint

PROMISED_OF_A_CACHE = {"kind", "complete", "n_cells", "dim", "encoder", "groups"}
PROMISED_OF_A_GROUP = {"n_cells", "n_genes", "perturbations", "controls"}
PROMISED_OF_A_RUN = {"kind", "step", "trainable_parameters", "n_genes", "dim", "val_loss", "best_step"}


def strict(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts after a trip through JSON, which knows neither NaN nor infinity."""
    read: dict[str, Any] = json.loads(json.dumps(facts, allow_nan=False))
    return read


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, also where other names share its bytes."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_a_cache_says_what_is_in_it(demo: Demo) -> None:
    facts = strict(describe(demo.cache)[0])
    assert set(facts) >= PROMISED_OF_A_CACHE
    assert (facts["kind"], facts["complete"], facts["n_cells"], facts["dim"]) == ("cache", True, 880, 64)
    assert facts["encoder"] == "pca" and set(facts["groups"]) == {"cells"}
    group = facts["groups"]["cells"]
    assert set(group) >= PROMISED_OF_A_GROUP
    assert {key: group[key] for key in PROMISED_OF_A_GROUP} == {
        "n_cells": 880,
        "n_genes": 300,
        "perturbations": 12,
        "controls": 160,
    }
    assert facts["bytes"] == open_cache(demo.cache).size


def test_an_unfinished_cache_says_so_and_what_is_known_already(demo: Demo, tmp_path: Path) -> None:
    cache = shutil.copytree(demo.cache, tmp_path / "cache.zarr")
    (cache / COMPLETE).unlink()
    facts = strict(describe(cache)[0])
    assert set(facts) >= PROMISED_OF_A_CACHE
    assert (facts["complete"], facts["n_cells"], facts["dim"], facts["encoder"]) == (False, 880, 64, "pca")
    shutil.rmtree(cache / "cells")  # nothing but the root group is written yet
    facts = strict(describe(cache)[0])
    assert (facts["complete"], facts["n_cells"]) == (False, None)
    assert set(facts["groups"]["cells"].values()) == {None}


def test_a_zarr_store_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(InputError, match="is no Zarr store with cells: it has no obs, var"):
        describe(tmp_path)


def test_verifying_finds_a_flipped_bit_of_a_cache(demo: Demo, tmp_path: Path) -> None:
    cache = shutil.copytree(demo.cache, tmp_path / "cache.zarr")
    facts, damaged = describe(cache, verify=True)
    assert facts["verified"] and not damaged
    shard = next(file for file in sorted((cache / "cells" / "obsm").rglob("c/0/0")))
    flip(shard)
    assert describe(cache)[1] == []  # the size is the same: only reading every byte shows it
    facts, damaged = describe(cache, verify=True)
    assert not facts["verified"] and damaged == [shard.relative_to(cache).as_posix()]


@pytest.mark.parametrize("folder", ["best", "last", "checkpoint-step-10"])
def test_a_checkpoint_says_where_it_stands(demo: Demo, folder: str) -> None:
    facts = strict(describe(demo.run / folder, verify=True)[0])
    state = open_checkpoint(demo.run / folder).state
    assert set(facts) >= PROMISED_OF_A_RUN
    assert (facts["kind"], facts["step"], facts["n_genes"], facts["dim"]) == ("checkpoint", state["step"], 300, 64)
    assert facts["trainable_parameters"] == sum(p.numel() for p in load_model(demo.run).parameters())
    assert facts["val_loss"] == state["run"]["val_loss"] and facts["verified"]


def test_a_run_says_how_far_it_is_and_which_step_was_best(demo: Demo) -> None:
    facts = strict(describe(demo.run, verify=True)[0])
    assert set(facts) >= PROMISED_OF_A_RUN and facts["kind"] == "run"
    lines = metrics(demo.run, timed=True)
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert (facts["step"], facts["max_steps"], facts["best_step"]) == (20, 20, best)
    assert facts["best_val_loss"] == facts["val_loss"] == losses[best]
    assert facts["metrics"] == {line["step"]: line for line in lines if "val_loss" in line}[20]
    assert set(facts["checkpoints"]) == {"best", "last", "checkpoint-step-10", "checkpoint-step-20"}
    assert facts["cache"] == str(demo.cache)


def test_a_run_without_a_checkpoint_yet_has_the_same_keys(demo: Demo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.toml", "splits.toml"):
        shutil.copy(demo.run / name, run)
    (run / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    facts = strict(describe(run)[0])
    assert set(facts) >= PROMISED_OF_A_RUN
    assert (facts["kind"], facts["step"], facts["checkpoints"], facts["metrics"]) == ("run", 0, [], None)
    assert facts["val_loss"] is None and facts["trainable_parameters"] is None


def test_a_metric_that_is_nan_becomes_null_and_a_line_cut_short_is_passed_over(demo: Demo, tmp_path: Path) -> None:
    run = shutil.copytree(demo.run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    broken = metrics(run, timed=True)[-1] | {"pds": math.nan, "step": 20}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(broken), lines[-1][:50]]))
    found = strict(describe(run)[0])["metrics"]
    assert found["pds"] is None and found["val_loss"] == broken["val_loss"]


@pytest.mark.parametrize(
    "name", ["best/model.safetensors", "last/optimizer.safetensors", "checkpoint-step-10/state.json"]
)
def test_verifying_a_run_finds_a_flipped_bit_in_any_checkpoint(demo: Demo, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(demo.run, tmp_path / "run")
    file = run / name
    if file.name == "state.json":
        file.write_text(file.read_text().replace('"target_sum": 10000.0', '"target_sum": 10001.0'))
    else:
        flip(file)
    assert describe(run)[0]["step"] == 20
    with pytest.raises(InputError, match=f"{file.parent.name} is damaged.*{file.name}"):
        describe(run, verify=True)
    with pytest.raises(InputError, match="is damaged"):
        describe(file.parent, verify=True)


def test_an_encoder_folder_gives_its_sizes(tmp_path: Path) -> None:
    facts = strict(describe(write_se(tmp_path / "se", gene_names(9)))[0])
    assert (facts["kind"], facts["n_genes"], facts["pad_length"], facts["output_dim"]) == ("encoder", 9, 16, 12)
    assert facts == strict(describe(tmp_path / "se" / "model.safetensors")[0])


def test_a_file_of_cells_gives_its_columns(demo: Demo, tmp_path: Path) -> None:
    facts = strict(describe(demo.cells)[0])
    assert (facts["kind"], facts["n_cells"], facts["n_genes"]) == ("cells", 880, 300)
    assert (facts["perturbation_column"], facts["cell_type_column"]) == ("target_gene", "cell_type")
    assert facts["gene_names"].startswith("var index: ")
    assert (facts["batch_column"], facts["control"]) == ("batch", "non-targeting")


def test_columns_that_cannot_be_told_are_said_and_are_no_error(tmp_path: Path) -> None:
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    obs = pd.DataFrame({"perturbation": ["A", "B"], "drug": ["x", "y"]}, index=["a", "b"])
    ad.AnnData(sp.csr_matrix((2, 5), dtype="float32"), obs=obs).write_h5ad(tmp_path / "x.h5ad")
    assert "Several columns" in strict(describe(tmp_path / "x.h5ad")[0])["columns"]


def test_paths_may_be_text(demo: Demo) -> None:
    splits = demo.folder / "starter.toml"
    assert describe(str(demo.cache), splits=str(splits)) == describe(demo.cache, splits=splits)
    for path in (demo.run, demo.run / "best", demo.cells):
        assert describe(str(path)) == describe(path)


def test_what_is_nothing_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        describe(tmp_path / "gone")
    with pytest.raises(InputError, match="is no cache, run, checkpoint, encoder folder or file of cells: it is empty"):
        describe(tmp_path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InputError, match=r"x\.txt is not an \.h5ad file \(not HDF5\): it is empty"):
        describe(tmp_path / "x.txt")


def test_a_cache_s_cells_are_counted_by_split_before_anything_trains(demo: Demo) -> None:
    facts = strict(describe(demo.cache, splits=demo.folder / "starter.toml")[0])
    rows = facts["splits"]
    assert set(rows[0]) == {"dataset", "cell_type", "split", "n_perturbations", "n_perturbed_cells", "n_controls"}
    labels = open_cache(demo.cache).groups["cells"].obs
    for row in rows:
        of_type = labels[labels["cell_type"] == row["cell_type"]]
        assert row["n_controls"] == (of_type["perturbation"] == "non-targeting").sum()
    perturbed = labels[labels["perturbation"] != "non-targeting"]
    assert sum(row["n_perturbed_cells"] for row in rows) == len(perturbed)
    assert {row["split"] for row in rows} == {"train", "val", "test"}


def test_splits_are_counted_of_caches_only(demo: Demo) -> None:
    with pytest.raises(InputError, match="--splits counts the cells of a cache"):
        describe(demo.run, splits=demo.folder / "starter.toml")


def test_a_run_counts_the_cells_it_was_trained_on_or_says_why_not(demo: Demo, tmp_path: Path) -> None:
    facts = strict(describe(demo.run)[0])
    assert facts["splits"] == strict(describe(demo.cache, splits=demo.folder / "starter.toml")[0])["splits"]
    run = shutil.copytree(demo.run, tmp_path / "run")
    config = run / "config.toml"
    config.write_text(config.read_text().replace(str(demo.cache), str(tmp_path / "gone.zarr")))
    facts = strict(describe(run)[0])
    assert "splits" not in facts and "gone.zarr does not exist" in facts["split_notes"][0]


def test_cells_say_what_their_labels_and_values_are(demo: Demo) -> None:
    facts = strict(describe(demo.cells)[0])
    assert (facts["perturbations"], facts["controls"], len(facts["cell_types"])) == (12, 160, 2)
    assert facts["values"].startswith("whole numbers from 1 to ") and "first 880 cells" in facts["values"]


def test_a_splits_file_is_checked_against_its_cells_before_they_are_embedded(demo: Demo, tmp_path: Path) -> None:
    facts = strict(describe(demo.folder / "starter.toml")[0])
    assert facts["kind"] == "splits" and facts["training"] == ["cells"] and facts["datasets"] == ["cells (1 file)"]
    assert facts["splits"] == strict(describe(demo.cache, splits=demo.folder / "starter.toml")[0])["splits"]
    text = (demo.folder / "starter.toml").read_text()
    shutil.copy(demo.cells, tmp_path / "cells.h5ad")
    (tmp_path / "s.toml").write_text(text.replace("cells.beta", "cells.betta"))
    with pytest.raises(InputError, match=r"has no cell type 'betta'.* Did you mean 'beta'"):
        describe(tmp_path / "s.toml")


def test_the_division_that_is_shown_is_that_of_training_where_targets_are_no_genes(tmp_path: Path) -> None:
    """Then features are one-hot, and what validates is held out in one cell type, as training does."""
    kinds, names = np.repeat(["a", "b"], 60), np.tile(np.repeat(["ctrl", *(f"Drug{i}" for i in range(5))], 10), 2)
    obs = pd.DataFrame({"perturbation": names, "cell_type": kinds}, index=[f"c{i}" for i in range(120)])
    counts = np.random.default_rng(0).poisson(2.0, (120, 9)).astype(np.float32)
    ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(9)])).write_h5ad(tmp_path / "c.h5ad")
    splits = tmp_path / "s.toml"
    splits.write_text('[datasets]\nd = "c.h5ad"\n[training]\nd = "train"\n')
    embed([splits], tmp_path / "c.zarr", EmbedConfig(encoder="pca", dim=4, device="cpu"))
    trained = read_dataset(str(tmp_path / "c.zarr"), TrainConfig(splits=str(splits)))
    expected = [dataclasses.asdict(row) for row in trained.table]
    assert len([row for row in expected if row["split"] == "val"]) == 1
    for path, given in ((splits, None), (tmp_path / "c.zarr", splits)):
        assert describe(path, splits=given)[0]["splits"] == expected


def test_a_file_of_features_is_described_and_weights_are_not_taken_for_one(demo: Demo, tmp_path: Path) -> None:
    facts = strict(describe(demo.features)[0])
    assert (facts["kind"], facts["n_perturbations"], facts["width"]) == ("features", 12, 64) and not facts["all_zero"]
    write_se(tmp_path / "se", gene_names(9))
    assert describe(tmp_path / "se" / "model.safetensors")[0]["kind"] == "encoder"


def test_what_is_not_there_is_answered_with_what_is_called_nearly_so(demo: Demo) -> None:
    for path, said in ((demo.folder / "cach.zarr", "'cache.zarr'"), (demo.folder / "runn", "'run'")):
        with pytest.raises(InputError, match=f"does not exist. Did you mean {said}"):
            describe(path)
