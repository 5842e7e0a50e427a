"""embedding/embed.py: upstream's numbers, caches that are a function of content, going on after a stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import sest.cells.inputs
import sest.embedding.embed
import sest.embedding.plan
import sest.embedding.rows
import sest.files.matrix
from helpers.caches import hashes, small_shards
from helpers.h5ad_files import FORMS, counts, gene_names, write_cells
from helpers.notes import Notes
from helpers.se_model import OUT, write_se
from sest.cache import CacheError, CacheWriter, open_cache, schema
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.embedding.plan import EmbedPlan
from sest.encoder.state import SeEncoder
from sest.errors import InputError
from sest.machine.signals import Interrupted
from sest.progress import reporting

N = 40  # cells of the small file


@pytest.fixture(scope="module")
def se(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SE model that knows G0 to G34: 12 native columns, 15 gene slots."""
    return write_se(tmp_path_factory.mktemp("model") / "se", gene_names(35))


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 cells x 30 genes of counts; cell 1 is empty, every third is a control."""
    return write_cells(tmp_path_factory.mktemp("cells") / "a.h5ad", counts(N))


def run(inputs: Path | list[Path], cache: Path, encoder: str | Path, **options: Any) -> EmbedPlan:
    """Embed on the CPU in float32."""
    config = EmbedConfig(encoder=str(encoder), **{"device": "cpu", "dtype": "float32", **options})
    return embed(inputs if isinstance(inputs, list) else [inputs], cache, config)


@pytest.fixture(scope="module")
def made(cells: Path, se: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `cells` with the default width, which is the native one; never changed."""
    path = tmp_path_factory.mktemp("made") / "s.zarr"
    run(cells, path, se)
    return path


def stored(cache: Path, group: str = "a") -> np.ndarray:
    return open_cache(cache).groups[group].embeddings()


def pca(native: np.ndarray, dim: int, fitted_on: np.ndarray | slice = slice(None)) -> np.ndarray:
    """PCA scores by NumPy's SVD of float64, every component pointing to its largest entry."""
    x = native.astype(np.float64)
    mean = x[fitted_on].mean(0)
    vt = np.linalg.svd(x[fitted_on] - mean, full_matrices=False)[2][:dim]
    return (x - mean) @ (vt * np.sign(vt[np.arange(dim), np.abs(vt).argmax(1)])[:, None]).T


# --- the numbers


@pytest.mark.parametrize("data", ["log1p", "raw"])
def test_dim_state_stores_what_upstream_writes(shared_reference: Path, tmp_path: Path, data: str) -> None:
    folder = shared_reference / "se" / data
    run(folder / "cells.h5ad", tmp_path / "s.zarr", folder / "model", dim="state", precision="fp32")
    made, given = anndata.read_zarr(tmp_path / "s.zarr" / "cells"), anndata.read_h5ad(folder / "cells.h5ad")
    assert np.abs(made.obsm["X_sest"] - np.load(folder / "expected.npy")).max() < 1e-5  # measured: 5.4e-7
    assert (made.X.dtype.kind == "i") == (data == "raw")
    np.testing.assert_array_equal(made.X.toarray(), given.X.toarray() if scipy.sparse.issparse(given.X) else given.X)
    assert list(made.obs_names) == list(given.obs_names) and list(made.var_names) == list(given.var_names)


def test_native_state_and_pca_widths_are_parts_of_one_embedding(
    cells: Path, se: Path, made: Path, tmp_path: Path
) -> None:
    native = stored(made)
    assert native.shape == (N, OUT) and open_cache(made).projection is None
    run(cells, tmp_path / "state.zarr", se, dim="state")
    state = stored(tmp_path / "state.zarr")
    assert state.shape == (N, OUT + 10)
    np.testing.assert_array_equal(state[:, :OUT], native)
    run(cells, tmp_path / "5.zarr", se, dim="5")
    # the same embedding, fitted in float64, stored in float32
    np.testing.assert_allclose(stored(tmp_path / "5.zarr"), pca(native, 5), atol=1e-6)
    kept = open_cache(tmp_path / "5.zarr").projection
    assert kept is not None and kept["basis"].shape == (OUT, 5)
    np.testing.assert_allclose((native - kept["mean"]) @ kept["basis"], pca(native, 5), atol=1e-6)


def test_embeddings_do_not_depend_on_the_batch_size(cells: Path, se: Path, made: Path, tmp_path: Path) -> None:
    run(cells, tmp_path / "s.zarr", se, batch_size=3)
    # matrix products of other shapes add up in another order
    np.testing.assert_allclose(stored(tmp_path / "s.zarr"), stored(made), atol=1e-6)


def test_float16_is_the_default_and_rounds_the_float32_embedding(
    cells: Path, se: Path, made: Path, tmp_path: Path
) -> None:
    embed([cells], tmp_path / "s.zarr", EmbedConfig(encoder=str(se), device="cpu"))
    half = stored(tmp_path / "s.zarr")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, stored(made).astype(np.float16))


@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_stores_of_csr_csc_and_dense_files_are_the_same_byte_for_byte(tmp_path: Path, scale: str) -> None:
    found, values = [], counts(N) if scale == "counts" else np.log1p(counts(N))
    for form in FORMS:
        run(write_cells(tmp_path / form / "a.h5ad", values, form), tmp_path / f"{form}.zarr", "pca")
        found.append(hashes(tmp_path / f"{form}.zarr"))
    assert found[0] == found[1] == found[2]


# --- the cache


def test_groups_open_with_anndata_and_say_what_they_are(cells: Path, made: Path) -> None:
    found, given = anndata.read_zarr(made / "a"), anndata.read_h5ad(cells)
    assert found.X.dtype == np.int16
    np.testing.assert_array_equal(found.X.toarray(), given.X.toarray())
    assert list(found.obs_names) == list(given.obs_names) and list(found.var_names) == list(given.var_names)
    assert found.obs["perturbation"].tolist() == given.obs["target_gene"].tolist()
    assert found.obs["cell_type"].tolist() == given.obs["cell_type"].tolist()
    assert found.obs["batch"].tolist() == given.obs["batch"].tolist()
    cache = open_cache(made)
    about = cache.groups["a"].attributes
    assert {key: about[key] for key in ("n_cells", "n_genes", "n_embedded", "perturbations", "controls", "scale")} == {
        "n_cells": 40, "n_genes": 30, "n_embedded": 40, "perturbations": 2, "controls": 14, "scale": "counts",
    }  # fmt: skip
    assert about["columns"] == {
        "perturbation": "target_gene", "cell_type": "cell_type", "batch": "batch", "control": "non-targeting",
    }  # fmt: skip
    assert (cache.attributes["encoder"], cache.attributes["seed"]) == ("model.safetensors", 0)
    assert "non-commercial" in cache.attributes["licence"]
    assert cache.verify() == []


@pytest.mark.parametrize(
    ("values", "options", "dtype"),
    [
        (counts(6) * 10_000, {}, "int32"),
        (-np.log1p(counts(6)), {"counts": "log1p"}, "float32"),
        (np.zeros((6, 5), np.float32), {"counts": "raw"}, "int16"),
    ],
    ids=["large", "negative", "no values at all"],
)
def test_odd_targets_are_stored_exactly(
    tmp_path: Path, se: Path, values: np.ndarray, options: dict[str, str], dtype: str
) -> None:
    run(write_cells(tmp_path / "a.h5ad", values), tmp_path / "s.zarr", se, **options)
    found = anndata.read_zarr(tmp_path / "s.zarr" / "a")
    assert found.X.dtype == dtype
    np.testing.assert_array_equal(found.X.toarray(), values)
    assert np.isfinite(found.obsm["X_sest"]).all()


def test_only_controls_are_embedded_where_asked_and_the_rest_is_nan(
    cells: Path, se: Path, made: Path, tmp_path: Path
) -> None:
    plan = run(cells, tmp_path / "controls.zarr", se, cells="controls")
    assert plan.n_selected == 14
    found, expected = stored(tmp_path / "controls.zarr"), stored(made)
    is_control = np.arange(N) % 3 == 0
    assert np.isnan(found[~is_control]).all()
    np.testing.assert_allclose(found[is_control], expected[is_control], atol=1e-6)  # other batches
    run(cells, tmp_path / "pca.zarr", se, cells="controls", dim="4")
    found = stored(tmp_path / "pca.zarr")
    assert np.isnan(found[~is_control]).all()
    np.testing.assert_allclose(found[is_control], pca(expected[is_control], 4), atol=1e-6)


def test_a_cache_of_controls_has_packed_embeddings_and_one_begun_without_stays_so(
    cells: Path, se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older sest's cache of controls is not packed; metadata that is written again must fit the shards that stay."""

    def codecs(cache: Path) -> list[str]:
        about = json.loads((cache / "a/obsm/X_sest/zarr.json").read_text())
        return [codec["name"] for codec in about["codecs"][0]["configuration"]["codecs"]]

    now, older = tmp_path / "now.zarr", tmp_path / "older.zarr"
    run(cells, now, se, cells="controls")
    assert codecs(now) == ["bytes", "blosc", "crc32c"] and open_cache(now).attributes["embedding_codec"] == "zstd"
    with monkeypatch.context() as before:
        before.setattr("sest.embedding.embed.embedding_codec", lambda which, existing: {})
        run(cells, older, se, cells="controls")
    assert codecs(older) == ["bytes", "crc32c"] and "embedding_codec" not in open_cache(older).attributes
    for cache in (now, older):
        expected = hashes(cache)
        for damaged in ("a/obsm/X_sest/zarr.json", "a/obsm/X_sest/c/0/0"):
            (cache / damaged).unlink()
            run(cells, cache, se, cells="controls")
            assert hashes(cache) == expected
    np.testing.assert_array_equal(stored(now), stored(older))


def test_a_layer_and_symbols_in_a_var_column_are_used_where_named(se: Path, made: Path, tmp_path: Path) -> None:
    var = pd.DataFrame({"symbol": gene_names(30)}, index=[f"ENSG{i:011d}" for i in range(30)])
    path = write_cells(tmp_path / "a.h5ad", np.log1p(counts(N)), var=var, layers={"umi": counts(N)})
    run(path, tmp_path / "layer.zarr", se, layer="umi")
    np.testing.assert_array_equal(stored(tmp_path / "layer.zarr"), stored(made))
    group = open_cache(tmp_path / "layer.zarr").groups["a"]
    assert group.genes == gene_names(30)
    np.testing.assert_array_equal(group.targets().toarray(), counts(N))


def test_cells_may_share_a_name(se: Path, tmp_path: Path) -> None:
    obs = pd.DataFrame({"perturbation": ["ctrl", "A"] * 20}, index=["same"] * N)
    with pytest.warns(UserWarning, match="not unique"):
        path = write_cells(tmp_path / "a.h5ad", counts(N), obs=obs)
    run(path, tmp_path / "s.zarr", se)
    assert open_cache(tmp_path / "s.zarr").groups["a"].obs.index.tolist() == ["same"] * N


def test_a_dry_run_checks_everything_and_writes_nothing(cells: Path, se: Path, tmp_path: Path) -> None:
    config = EmbedConfig(encoder=str(se), device="cpu")
    plan = embed([cells], tmp_path / "s.zarr", config, dry_run=True)
    assert (plan.n_selected, plan.dim) == (N, OUT)
    assert plan.n_bytes == N * OUT * 2 + 6 * np.count_nonzero(counts(N))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").touch()
    with pytest.raises(CacheError, match="not a sest cache"):
        embed([cells], tmp_path, config, dry_run=True)


# --- several files


TOML = """
[datasets]
held = "held.h5ad"
many = "{more,mos{t}}.h5ad"
[training]
many = "train"
[zeroshot]
"held.k562" = "test"
"held.rpe1" = "test"
[fewshot."many.k562"]
val = ["STAT1"]
test = ["JAK2"]
"""


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TOML of three files: one dataset is all test and not in [training], another's k562 has val and test."""
    folder = tmp_path_factory.mktemp("screen")
    for i, name in enumerate(("held", "more", "most")):
        write_cells(folder / f"{name}.h5ad", counts(24, seed=i))
    (folder / "splits.toml").write_text(TOML)
    return folder / "splits.toml"


@pytest.mark.parametrize("encoder", ["se", "pca"])
def test_the_pca_is_fitted_on_training_cells_only_where_splits_are_given(
    screen: Path, se: Path, tmp_path: Path, encoder: str
) -> None:
    notes, name = Notes(), se if encoder == "se" else "pca"
    with reporting(notes):
        run(screen, tmp_path / "s.zarr", name, dim="4")
    assert "The PCA is fitted on training cells of splits.toml only." in notes.notes
    cache = open_cache(tmp_path / "s.zarr")
    assert list(cache.groups) == ["held", "many/more", "many/most"]
    assert {g.dataset for g in cache.groups.values()} == {"held", "many"}
    if encoder == "se":
        run(screen, tmp_path / "native.zarr", se, dim="native")
        native = np.concatenate([g.embeddings() for g in open_cache(tmp_path / "native.zarr").groups.values()])
    else:
        values = np.concatenate([counts(24, seed=i) for i in range(3)])
        native = np.log1p(1e4 * values / np.maximum(values.sum(1, keepdims=True), 1))
    obs = pd.concat([g.obs for g in cache.groups.values()])
    in_held = np.arange(72) < 24
    perturbed = (obs["perturbation"] != "non-targeting").to_numpy()
    train = ~in_held & (~perturbed | (obs["cell_type"] == "rpe1").to_numpy())  # none of the first file
    found = np.concatenate([g.embeddings() for g in cache.groups.values()])
    np.testing.assert_allclose(found, pca(native, 4, train), atol=1e-6 if encoder == "se" else 5e-5)  # scores to 30


# --- going on after a stop


class Encoded:
    """Remembers which cells were encoded, and can stop the program in the middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cells: list[tuple[str, int]] = []
        self.before: Callable[[int], None] = lambda call: None
        stage, start, calls = SeEncoder.stage, SeEncoder.start, iter(range(10_000))
        numbers_of: dict[int, tuple[Any, np.ndarray]] = {}  # by identity of the batch, which is kept alive

        def staged(model: Any, cells: Any, rows: Any, numbers: np.ndarray) -> Any:
            batch = stage(model, cells, rows, numbers)
            numbers_of[id(batch)] = batch, numbers
            return batch

        def begun(model: Any, cells: Any, batch: Any) -> Callable[[], np.ndarray]:
            encoded = start(model, cells, batch)

            def noted() -> np.ndarray:
                self.before(next(calls))
                self.cells += [(cells.group, int(n)) for n in numbers_of[id(batch)][1]]
                return encoded()

            return noted

        monkeypatch.setattr(SeEncoder, "stage", staged)
        monkeypatch.setattr(SeEncoder, "start", begun)


def stop_at(call: int, signum: int) -> Callable[[int], None]:
    return lambda now: os.kill(os.getpid(), signum) if now == call else None


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    return [write_cells(tmp_path / "a.h5ad", counts(21)), write_cells(tmp_path / "b.h5ad", counts(13, seed=1))]


@pytest.mark.parametrize(("options", "calls"), [({}, (0, 5)), ({"dim": "4"}, (2, 7))])
def test_a_stop_saves_every_encoded_row_and_the_same_command_reuses_them(
    two_files: list[Path], se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str], calls: tuple[int, int],
) -> None:  # fmt: skip
    """With a PCA, the first stop is while its sample is encoded, the second while the shards are."""
    small_shards(monkeypatch)  # shards of 8 cells; batches of 3 end within them
    monkeypatch.setattr(schema, "ENTRIES_PER_SHARD", 1024)
    monkeypatch.setattr(sest.embedding.plan, "SAMPLE_CELLS", 14)
    run(two_files, tmp_path / "whole.zarr", se, batch_size=3, **options)
    encoded, cache = Encoded(monkeypatch), tmp_path / "s.zarr"
    for call, signum in zip(calls, (signal.SIGTERM, signal.SIGINT), strict=True):
        encoded.before, before = stop_at(call, signum), signal.getsignal(signum)
        with pytest.raises(Interrupted, match="the same command continues there") as stopped:
            run(two_files, cache, se, batch_size=3, **options)
        assert stopped.value.signum == signum and signal.getsignal(signum) is before
        with pytest.raises(CacheError, match="unfinished"):
            open_cache(cache)
    run(two_files, cache, se, batch_size=3, **options)
    assert len(encoded.cells) == len(set(encoded.cells)) == 34  # every cell once, over all three runs
    assert hashes(cache) == hashes(tmp_path / "whole.zarr")


def test_after_a_kill_only_rows_since_the_last_save_are_encoded_again(
    two_files: list[Path], se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 25))  # a save is due after 60 s: every third batch
    monkeypatch.setattr(sest.embedding.rows, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    run(two_files, tmp_path / "whole.zarr", se, batch_size=2, dim="4")
    encoded = Encoded(monkeypatch)

    class Killed(BaseException):
        pass

    def kill(call: int) -> None:
        if call in (7, 19):
            raise Killed

    encoded.before = kill
    for _ in range(2):
        with pytest.raises(Killed):
            run(two_files, tmp_path / "s.zarr", se, batch_size=2, dim="4")
    run(two_files, tmp_path / "s.zarr", se, batch_size=2, dim="4")
    twice = len(encoded.cells) - len(set(encoded.cells))
    assert len(set(encoded.cells)) == 34 and 0 < twice <= 2 * 2 * 2  # two kills, at most two batches of two lost each
    assert hashes(tmp_path / "s.zarr") == hashes(tmp_path / "whole.zarr")


def test_a_finished_cache_is_not_written_again(
    cells: Path, se: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.name != schema.LOCK}
    encoded, notes = Encoded(monkeypatch), Notes()
    with reporting(notes):
        run(cells, made, se)
    assert notes.notes[-1] == f"{made} is complete already."
    assert encoded.cells == []
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.name != schema.LOCK} == before


def test_a_damaged_shard_alone_is_encoded_again_and_damaged_labels_cost_no_encoding(
    two_files: list[Path], se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    cache = tmp_path / "s.zarr"
    run(two_files, cache, se, batch_size=8)
    before = hashes(cache)
    encoded = Encoded(monkeypatch)
    (cache / "a" / "obsm" / "X_sest" / "c" / "1" / "0").write_bytes(b"")
    (cache / "b" / "obs" / "cell_type" / "codes" / "c" / "0").unlink()
    run(two_files, cache, se, batch_size=8)
    assert encoded.cells == [("a", i) for i in range(8, 16)]
    assert hashes(cache) == before and open_cache(cache).verify() == []


def test_a_stored_pca_is_used_as_it_is_and_costs_no_encoding_again(
    two_files: list[Path], se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    monkeypatch.setattr(sest.embedding.plan, "SAMPLE_CELLS", 14)
    cache, encoded = tmp_path / "s.zarr", Encoded(monkeypatch)
    with monkeypatch.context() as killed:
        killed.setattr(CacheWriter, "finish", lambda self: 1 / 0)  # killed while finishing
        with pytest.raises(ZeroDivisionError):
            run(two_files, cache, se, batch_size=8, dim="4")
    assert len(encoded.cells) == 34
    run(two_files, cache, se, batch_size=8, dim="4")
    assert len(encoded.cells) == 34
    before, rows = hashes(cache), stored(cache)
    damaged = "a/obsm/X_sest/c/1/0"
    (cache / damaged).unlink()
    run(two_files, cache, se, batch_size=8, dim="4")
    assert encoded.cells[34:] == [("a", i) for i in range(8, 16)]
    np.testing.assert_allclose(stored(cache), rows, atol=1e-6)  # sampled cells were in other batches before
    after = hashes(cache)
    assert {name: after[name] for name in after if name != damaged} == {n: before[n] for n in before if n != damaged}


def test_a_spool_whose_sample_is_damaged_is_not_used(
    two_files: list[Path], se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    monkeypatch.setattr(sest.embedding.plan, "SAMPLE_CELLS", 14)
    sample = run(two_files, tmp_path / "whole.zarr", se, batch_size=3, dim="4").sample
    cache, encoded = tmp_path / "s.zarr", Encoded(monkeypatch)
    encoded.before = stop_at(7, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(two_files, cache, se, batch_size=3, dim="4")
    (spooled,) = (file for file in (cache / schema.SPOOL).rglob("*.npy") if ".sample" not in file.parts)
    group, shard = spooled.parts[-3:-1]
    assert (sample["ab".index(group)] // 8 == int(shard)).any()  # rows of a shard without its sampled cells
    for file in (cache / schema.SPOOL / ".sample" / group).glob("*.npy"):
        file.write_bytes(b"")
    run(two_files, cache, se, batch_size=3, dim="4")
    for name in ("a", "b"):
        np.testing.assert_allclose(stored(cache, name), stored(tmp_path / "whole.zarr", name), atol=1e-6)


def test_a_cache_is_not_continued_with_anything_else(cells: Path, se: Path, made: Path, tmp_path: Path) -> None:
    cache, other_se = made, write_se(tmp_path / "se", gene_names(35), seed=1)
    before = hashes(cache)
    values = counts(N)
    values[7, 7] += 1
    changed = write_cells(tmp_path / "changed" / "a.h5ad", values)
    for inputs, encoder, options, difference in (
        (cells, other_se, {}, "the weights of the encoder"),
        (cells, se, {"dim": "state"}, 'dim: 12 there, 22 asked; projection: "none" there, "state" asked'),
        (cells, se, {"seed": 1}, "(seed: 0 there, 1 asked)"),
        (cells, se, {"dtype": "float16"}, '(dtype: "float32" there, "float16" asked)'),
        (cells, se, {"precision": "bf16"}, '(precision: "fp32" there, "bf16" asked)'),
        (cells, se, {"control": "STAT1"}, 'inputs.a.columns.control: "non-targeting" there, "STAT1" asked'),
        (changed, se, {}, "(a: what the file holds)"),
        ([cells, write_cells(tmp_path / "b.h5ad", values)], se, {}, "inputs.b: null there"),
        (cells, "pca", {}, '"model.safetensors" there, "pca" asked'),
    ):
        with pytest.raises(CacheError, match="was made differently") as refused:
            run(inputs, cache, encoder, **options)
        assert difference in str(refused.value) and "\n" not in str(refused.value)
    assert hashes(cache) == before and open_cache(cache).verify() == []


# --- what is refused


def broken_once(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Give cell 33 an embedding that cannot be stored."""
    stage, start = SeEncoder.stage, SeEncoder.start
    places: dict[int, tuple[Any, np.ndarray]] = {}

    def staged(model: Any, cells: Any, rows: Any, numbers: np.ndarray) -> Any:
        batch = stage(model, cells, rows, numbers)
        places[id(batch)] = batch, numbers == 33
        return batch

    def begun(model: Any, cells: Any, batch: Any) -> Callable[[], np.ndarray]:
        encoded = start(model, cells, batch)

        def broken() -> np.ndarray:
            found = encoded()
            found[places[id(batch)][1], 0] = value
            return found

        return broken

    monkeypatch.setattr(SeEncoder, "stage", staged)
    monkeypatch.setattr(SeEncoder, "start", begun)


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "the embedding of cell 33 is not finite. Try --precision fp32."), (1e6, "Pass --dtype float32.")],
)
def test_embeddings_that_cannot_be_stored_are_refused(
    cells: Path, se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, message: str
) -> None:
    broken_once(monkeypatch, value)
    with pytest.raises(InputError, match=message):
        run(cells, tmp_path / "s.zarr", se, dtype="float16")


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(se: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    unlabelled = pd.DataFrame({"n": np.arange(6.0)}, index=[f"c{i}" for i in range(6)])
    plain = write_cells(folder / "plain.h5ad", counts(6))
    ensembl = write_cells(folder / "e.h5ad", counts(6), var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(30)]))
    no_labels = write_cells(folder / "n.h5ad", counts(6), obs=unlabelled)
    garbage = folder / "g.h5ad"
    garbage.write_bytes(b"not HDF5")
    links = write_cells(folder / "l.h5ad", counts(6))
    with h5py.File(links, "r+") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink(str(plain), "X")
    toml = folder / "t.toml"
    toml.write_text('[datasets]\nd = "n.h5ad"\n[training]\nd = "train"\n')
    typo = folder / "typo.toml"
    typo.write_text('[datasets]\nd = "plain.h5ad"\n[training]\nd = "train"\n[zeroshot]\n"d.k526" = "test"\n')
    before = hashes(folder)
    for inputs, options, message in (
        (ensembl, {}, "these look like ENSEMBL ids"),
        (no_labels, {"cells": "controls"}, "no file has control cells. Pass --pert-col and --control."),
        (plain, {"control": "STAT3"}, "no cell has the label 'STAT3'"),
        (plain, {"pert_col": "guide"}, "No column 'guide' in obs"),
        (plain, {"layer": "umi"}, "umi"),
        (plain, {"encoder": str(tmp_path / "SE")}, "No SE folder or checkpoint"),
        (plain, {"encoder": ""}, "No encoder"),
        (garbage, {}, "not HDF5"),
        (links, {}, "as a link"),
        (toml, {}, "n.h5ad has no perturbation column, which the splits of"),
        (typo, {}, "k526"),
        (folder / "missing.h5ad", {}, "No such file"),
    ):
        with pytest.raises(InputError) as refused:
            run(inputs, tmp_path / "s.zarr", options.pop("encoder", se), **options)
        assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "s.zarr").exists() and hashes(folder) == before


def test_a_place_that_cannot_be_written_is_refused_before_the_cells_are_read(
    cells: Path, se: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("text")
    for cache in (tmp_path, tmp_path / "mine"):
        notes = Notes()
        with pytest.raises(CacheError, match="Choose another --cache path"), reporting(notes):
            run(cells, cache, se)
        assert notes.steps == []
    with pytest.raises(CacheError, match=r"Cannot write to .*mine/s.zarr: Not a directory"):
        run(cells, tmp_path / "mine" / "s.zarr", se)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# --- memory


def test_memory_does_not_grow_with_the_expression_of_more_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks of 600 and 2,400 cells differ by labels and row starts only, a tenth of a cell's values.

    A first run is not counted: it imports and compiles, which alone takes more than either.
    """
    n_genes, peaks, rng = 1000, {}, np.random.default_rng(0)
    model = write_se(tmp_path / "se", gene_names(150), pad_length=4)
    monkeypatch.setattr(sest.files.matrix, "READ_VALUES", 2**16)  # blocks and shards of some 100 cells: 600 are many
    for module in (sest.cells.inputs, sest.embedding.embed, sest.embedding.rows):
        monkeypatch.setattr(module, "ROWS_PER_READ", 64)
    monkeypatch.setattr(schema, "ROWS_PER_CHUNK", 64)
    monkeypatch.setattr(schema, "ROWS_PER_SHARD", 128)
    monkeypatch.setattr(schema, "ENTRIES_PER_CHUNK", 2**13)
    monkeypatch.setattr(schema, "ENTRIES_PER_SHARD", 2**15)
    for name, n in (("first", 600), ("few", 600), ("many", 2400)):
        x = scipy.sparse.random_array((n, n_genes), density=0.2, dtype=np.float32, rng=rng)
        x.data = np.ceil(x.data * 5)
        obs = pd.DataFrame({"perturbation": pd.Categorical(["ctrl", "A"] * (n // 2))}, index=np.arange(n).astype(str))
        path = tmp_path / f"{name}.h5ad"
        anndata.AnnData(x.tocsr(), obs=obs, var=pd.DataFrame(index=gene_names(n_genes))).write_h5ad(path)
        tracemalloc.start()
        run(path, tmp_path / f"{name}.zarr", model, batch_size=64)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks["many"] - peaks["few"]) / 1800 < 160, peaks  # bytes a cell; its 200 values take 1,600


def test_a_cache_says_where_its_encoder_was_which_may_be_elsewhere_when_it_is_continued(
    cells: Path, se: Path, made: Path, tmp_path: Path
) -> None:
    assert open_cache(made).attributes["encoder_folder"] == str(se.resolve())
    run(cells, tmp_path / "s.zarr", se)
    shutil.copytree(se, tmp_path / "moved")
    run(cells, tmp_path / "s.zarr", tmp_path / "moved")  # complete already
    assert open_cache(tmp_path / "s.zarr").attributes["encoder_folder"] == str(se.resolve())
    run(cells, tmp_path / "p.zarr", "pca", dim=4)
    assert "encoder_folder" not in open_cache(tmp_path / "p.zarr").attributes
