"""`sest embed`: what it says, its exit codes, and what a user can do wrong with it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import Demo

from helpers.commands import Done
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.se_model import write_se
from sest.cache import open_cache
from sest.cache.schema import COMPLETE, SPOOL
from sest.cells.inputs import Cells
from sest.encoder.state import SeEncoder
from sest.se.model import Staged

CONTROL = "non-targeting"


def without_controls(some: ad.AnnData) -> ad.AnnData:
    return some[some.obs["target_gene"] != CONTROL].copy()


def ensembl(some: ad.AnnData) -> None:
    some.var.index = [f"ENSG{i:011d}" for i in range(some.n_vars)]


@pytest.fixture
def words(tmp_path: Path) -> tuple[object, ...]:
    """Embed 40 cells with a small model into s.zarr."""
    cells, se = write_cells(tmp_path / "a.h5ad", counts(40)), write_se(tmp_path / "se", gene_names(35))
    return ("embed", cells, "--encoder", se, "--cache", tmp_path / "s.zarr", "--device", "cpu")


def test_it_embeds_and_says_what_it_did(sest: Callable[..., Done], words: tuple[object, ...], tmp_path: Path) -> None:
    cache = tmp_path / "s.zarr"
    done = sest(*words, "--cells", "controls", "--dry-run")
    assert done.code == 0 and "Would embed 14 of 40 cells at width 12" in done.out and not cache.exists()
    done = sest(*words, "--cells", "controls")
    assert done.code == 0
    assert f"{cache}: 14 of 40 cells embedded at width 12, complete." in done.out and "non-commercial" in done.out
    assert "a.h5ad: 40 cells x 30 genes, counts." in done.err
    assert open_cache(cache).groups["a"].n_cells == 40


@pytest.mark.parametrize("encoder", [(), ("--encoder", "pca")], ids=["SE", "pca"])
def test_tf32_is_refused_where_there_is_none(
    refused: Callable[..., str], words: tuple[object, ...], encoder: tuple[object, ...]
) -> None:
    line = refused(*words, *encoder, "--precision", "tf32")
    assert ("'pca' is float32" if encoder else "needs a GPU with TF32 units (Ampere or newer). Use --precision") in line


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_is_130_or_143_when_it_was_stopped_and_saved_its_rows(
    sest: Callable[..., Done], words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    signum: int, code: int,
) -> None:  # fmt: skip
    start, calls = SeEncoder.start, iter(range(100))

    def begun(encoder: SeEncoder, cells: Cells, staged: Staged) -> Callable[[], np.ndarray]:
        encoded = start(encoder, cells, staged)

        def stopped() -> np.ndarray:
            if next(calls) == 1:
                os.kill(os.getpid(), signum)
            return encoded()

        return stopped

    monkeypatch.setattr(SeEncoder, "start", begun)
    done = sest(*words, "--batch-size", 10)
    assert done.code == code
    last = f"Stopped. Finished rows are in {tmp_path / 's.zarr'}; the same command continues there."
    assert done.err.strip().splitlines()[-1] == last
    assert [len(np.load(file)) for file in (tmp_path / "s.zarr" / SPOOL).rglob("*.npy")] == [20]


def test_a_place_below_a_file_is_refused(
    refused: Callable[..., str], words: tuple[object, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "s.zarr"
    line = refused(*words, "--cache", below)
    assert line == f"Error: Cannot write to {below}: Not a directory. Choose another --cache path."


def test_a_missing_column_is_answered_with_those_there_are(
    refused: Callable[..., str], cells: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused("embed", cells(), "--encoder", "pca", "--cache", tmp_path / "c.zarr", "--pert-col", "guide")
    assert "No column 'guide' in obs. Available: target_gene, cell_type, batch" in line


def test_cells_without_controls_are_refused(
    refused: Callable[..., str], cells: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused("embed", cells(without_controls), "--encoder", "pca", "--cache", tmp_path / "c.zarr")
    assert "No control cells" in line and "--control" in line


def test_genes_that_the_encoder_does_not_know_are_refused(
    refused: Callable[..., str], cells: Callable[..., Path], tmp_path: Path
) -> None:
    se = write_se(tmp_path / "se", [f"TP{i}" for i in range(40)])
    line = refused("embed", cells(), "--encoder", se, "--cache", tmp_path / "c.zarr")
    assert "Too few of the file's 300 genes are known to the encoder" in line and "such as TP0" in line
    line = refused("embed", cells(ensembl), "--encoder", se, "--cache", tmp_path / "c.zarr")
    assert "look like ENSEMBL ids" in line and "Add a var column" in line


def test_several_files_of_weights_are_listed(
    refused: Callable[..., str], cells: Callable[..., Path], tmp_path: Path
) -> None:
    se = write_se(tmp_path / "se", ["A", "B", "C", "D"])
    shutil.copy(se / "model.safetensors", se / "older.safetensors")
    for words in (("embed", cells(), "--encoder", se, "--cache", tmp_path / "c.zarr"), ("info", se)):
        line = refused(*words)
        assert "model.safetensors, older.safetensors" in line and "--weights" in line


def test_a_cache_that_is_not_finished_or_made_otherwise_is_refused(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    cache = shutil.copytree(demo.cache, tmp_path / "cache.zarr")
    words = ("embed", demo.folder / "starter.toml", "--cache", cache)
    line = refused(*words, "--encoder", "pca", "--dim", "32")
    assert "dim" in line and "64" in line and "32" in line
    (cache / COMPLETE).unlink()
    assert "unfinished (no COMPLETE file). Run the same" in refused("train", cache, "--run", tmp_path / "run")
    assert "unfinished" in refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--cache", cache)


def test_a_cache_of_another_encoder_is_refused(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    cache = shutil.copytree(demo.cache, tmp_path / "cache.zarr")
    genes = [str(name) for name in ad.read_h5ad(demo.cells, backed="r").var_names]
    se = write_se(tmp_path / "se", genes)
    line = refused("embed", demo.folder / "starter.toml", "--encoder", se, "--cache", cache)
    assert "encoder" in line and "pca" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nowhere to write. Pass --cache OUT.zarr, or --to-h5ad OUT.h5ad."),
        (["--to-h5ad", "o.h5ad", "--rank", "0", "--world-size", "2"], "--to-h5ad is for one process."),
        (["--cache", "c.zarr", "--dim", "wide"], "dim is 'wide'; it takes a whole number or one of: native, state."),
        (["--cache", "c.zarr", "--dim", "0"], "dim is 0; it must be at least 1."),
    ],
)
def test_options_that_make_no_sense_are_refused(
    refused: Callable[..., str], demo: Demo, words: list[str], message: str
) -> None:
    assert message in refused("embed", demo.cells, "--encoder", "pca", *words)


def test_a_copy_with_embeddings_is_made_of_one_file(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    words = ("--encoder", "pca", "--to-h5ad", tmp_path / "o.h5ad")
    for inputs in ([demo.cells, demo.cells], [demo.folder / "starter.toml"]):
        assert "--to-h5ad takes one .h5ad file as INPUT." in refused("embed", *inputs, *words)
