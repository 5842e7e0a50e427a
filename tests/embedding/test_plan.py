"""embedding/plan.py: the stored width, the sample of the PCA, and what is said of it all before a cell is encoded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sest.embedding.plan
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.notes import Notes
from helpers.se_model import write_se
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.embedding.plan import EmbedPlan, group_plan, measure_fidelity
from sest.encoder.pca import PcaEncoder
from sest.encoder.state import SeEncoder
from sest.errors import InputError
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


def planned(inputs: list[Path], cache: Path, encoder: str | Path, **options: Any) -> EmbedPlan:
    """What `sest embed --dry-run` would do on the CPU."""
    config = EmbedConfig(encoder=str(encoder), **{"device": "cpu", **options})
    return embed(inputs, cache, config, dry_run=True)


def test_width_is_512_or_what_is_there_and_said(
    cells: Path, se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoder, default, dim, expected in (
        (se, 512, None, "Stored width: 12 (the native width)."),
        (se, 6, None, "Stored width: 6 (PCA of 12)."),
        ("pca", 512, None, "Stored width: 30 (PCA of 30)."),
        ("pca", 6, None, "Stored width: 6 (PCA of 30)."),
        ("pca", 6, "native", "Stored width: 30 (PCA of 30)."),
    ):
        for kind in (SeEncoder, PcaEncoder):
            monkeypatch.setattr(kind, "default_dim", default)
        notes = Notes()
        with reporting(notes):
            plan = planned([cells], tmp_path / "s.zarr", encoder, dim=dim)
        assert expected in notes.notes
        assert f"width: {plan.dim} " in expected


@pytest.mark.parametrize(
    ("encoder", "dim", "message"),
    [
        ("se", "13", "--dim 13 is above the native width 12 of 'model.safetensors'. Use 12 or less."),
        ("pca", "31", "--dim 31 is above the native width 30 of 'pca'"),
        ("pca", "state", "'pca' has no dataset columns"),
        ("few", "10", "A PCA to 10 dimensions needs more than 10 cells; there are 6. Pass --dim native, or --dim 5"),
        ("flat", "3", "--dim 3 is above the rank of the data (1, from 40 cells). Use --dim 1 or less."),
        ("pca", "0", "dim is 0; it must be at least 1."),
        ("pca", "small", "dim is 'small'; it takes a whole number or one of: native, state."),
    ],
)
def test_a_width_that_cannot_be_is_refused_and_nothing_is_written(
    cells: Path, se: Path, tmp_path: Path, encoder: str, dim: str, message: str
) -> None:
    values = {"few": counts(6), "flat": np.outer(np.arange(N) % 2, np.full(30, 5.5)).astype(np.float32)}.get(encoder)
    path = cells if values is None else write_cells(tmp_path / "a.h5ad", values)
    name = str(se) if encoder in ("se", "few") else "pca"
    with pytest.raises(InputError) as refused:
        embed([path], tmp_path / "s.zarr", EmbedConfig(encoder=name, dim=dim, device="cpu"))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "s.zarr").exists()


# --- the sample


def test_files_that_were_normalised_differently_are_embedded_only_if_that_is_asked_for(
    cells: Path, se: Path, tmp_path: Path
) -> None:
    dense = counts(N, seed=1).astype(np.float64)
    paths = {}
    for total in (1e4, 1e6):
        values = np.log1p(dense / np.maximum(dense.sum(1, keepdims=True), 1) * total).astype(np.float32)
        paths[total] = write_cells(tmp_path / f"log{total:.0f}.h5ad", values)
    planned([cells, paths[1e4]], tmp_path / "c.zarr", "pca")
    for inputs, encoder, words in (
        ([cells, paths[1e6]], "pca", "a.h5ad is counts, normalised to 10,000; log1000000.h5ad is log1p of CPM"),
        ([paths[1e6], paths[1e4]], se, "log1000000.h5ad is log1p of CPM.*; log10000.h5ad is .*to 10,000"),
    ):
        with pytest.raises(InputError, match=words + r".*--mixed-scales allow"):
            planned(inputs, tmp_path / "c.zarr", encoder)
        with reporting(notes := Notes()):
            planned(inputs, tmp_path / "c.zarr", encoder, mixed_scales="allow")
        assert any("are embedded together, as asked" in note for note in notes.notes)
    with reporting(notes := Notes()):
        planned([cells, paths[1e6]], tmp_path / "c.zarr", se)  # SE does not normalise counts; training compares
    assert any("Training will not take these files together" in note for note in notes.notes)


def test_the_sample_is_drawn_over_all_files_sorted_and_by_the_seed(
    tmp_path: Path, se: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sest.embedding.plan, "SAMPLE_CELLS", 30)
    files = [write_cells(tmp_path / "a.h5ad", counts(40)), write_cells(tmp_path / "b.h5ad", counts(20, seed=1))]
    samples = [planned(files, tmp_path / "s.zarr", se, dim="4", seed=seed).sample for seed in (0, 0, 1)]
    for a, b in samples:
        assert len(a) + len(b) == 30 and len(a) > 10 and len(b) > 2  # 20 and 10 expected
        assert (np.diff(a) > 0).all() and (np.diff(b) > 0).all() and a[-1] < 40 and b[-1] < 20
    np.testing.assert_equal(samples[0], samples[1])
    assert not np.array_equal(samples[0][0], samples[2][0])
    first, same, other = (
        planned(files, tmp_path / "s.zarr", se, dim="4", seed=seed).attributes["projection_sample_sha256"]
        for seed in (0, 0, 1)
    )
    assert first == same != other


def test_every_eligible_cell_is_sampled_where_there_are_few(cells: Path, se: Path, tmp_path: Path) -> None:
    plan = planned([cells], tmp_path / "s.zarr", se, dim="4")
    np.testing.assert_equal(plan.sample, [np.arange(N)])
    plan = planned([cells], tmp_path / "s.zarr", se, dim="4", cells="controls")
    np.testing.assert_equal(plan.sample, [np.arange(0, N, 3)])
    assert plan.projected and plan.n_selected == 14
    plan = planned([cells], tmp_path / "s.zarr", se, dim="native")  # no PCA, no sample
    assert not plan.projected and [len(rows) for rows in plan.sample] == [0]
    assert plan.attributes["projection_sample_sha256"] is None


def test_the_draw_is_uniform() -> None:
    eligible = [np.arange(100, 108), np.zeros(0, np.int64), np.arange(4)]
    drawn = [np.concatenate(sest.embedding.plan._draw(eligible, 3, seed)) for seed in range(2000)]
    times = np.bincount(np.concatenate(drawn), minlength=108)
    # 3 of 12 a time: 500 times each, standard deviation 19
    np.testing.assert_allclose(times[[*range(4), *range(100, 108)]], 500, atol=100)
    assert times.sum() == 6000 == times[:4].sum() + times[100:].sum()


# --- what is said of it


def test_a_plan_knows_how_much_it_will_write(cells: Path, se: Path, tmp_path: Path) -> None:
    entries = np.count_nonzero(counts(N))
    for dtype, width in (("float16", 2), ("float32", 4)):
        plan = planned([cells], tmp_path / "s.zarr", se, dtype=dtype)
        assert plan.n_bytes == N * 12 * width + entries * 6
    assert not plan.complete


def test_a_group_says_what_its_file_holds(cells: Path, se: Path, tmp_path: Path) -> None:
    plan = planned([cells], tmp_path / "s.zarr", se, cells="controls", dim="state")
    (c,), (rows,) = plan.cells, plan.selected
    group = group_plan(plan, c, rows)
    assert (group.path, group.n_cells, group.n_genes, group.dim) == ("a", N, 30, 22)
    assert (group.target_dtype, group.embedding_dtype, group.n_entries) == ("int16", "float16", c.scan.indptr[-1])
    assert {key: group.attributes[key] for key in ("dataset", "n_embedded", "perturbations", "controls")} == {
        "dataset": "a", "n_embedded": 14, "perturbations": 2, "controls": 14,
    }  # fmt: skip
    plan.attributes["targets"] = False
    assert group_plan(plan, c, rows).n_entries == 0


@pytest.mark.parametrize(
    ("scale", "whole", "largest", "dtype"),
    [
        ("counts", True, 2**15 - 1, "int16"),
        ("counts", True, 2**15, "int32"),
        ("counts", True, 2**31, "float32"),
        ("counts", False, 7, "float32"),
        ("log1p", False, 7, "float32"),
        ("log1p", True, 7, "float32"),
    ],
)
def test_targets_have_the_smallest_type_that_holds_them(scale: str, whole: bool, largest: float, dtype: str) -> None:
    scan = SimpleNamespace(all_integer=whole, max_value=float(largest))
    cells: Any = SimpleNamespace(scale=scale, scan=scan)
    assert sest.embedding.plan._target_dtype(cells) == dtype


@pytest.mark.parametrize(("n_cells", "expected"), [(5, range(5)), (64, range(64)), (127, range(0, 127, 2))])
def test_fidelity_is_measured_on_cells_spread_evenly_over_the_first_file_with_any(
    n_cells: int, expected: range
) -> None:
    asked: list[np.ndarray] = []

    def fidelity(cells: Any, block: np.ndarray, numbers: np.ndarray) -> dict[str, float]:
        assert cells.name == "b" and (block == numbers).all()
        asked.append(numbers)
        return {"n_cells": len(numbers), "cosine_mean": 0.99876, "cosine_min": 0.9}

    def file(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, read=lambda numbers: numbers)

    plan: Any = SimpleNamespace(
        cells=[file("a"), file("b")],
        selected=[np.zeros(0, np.int64), np.arange(n_cells)],
        encoder=SimpleNamespace(fidelity=fidelity),
    )
    notes = Notes()
    with reporting(notes):
        assert measure_fidelity(plan) == {"n_cells": len(expected), "cosine_mean": 0.99876, "cosine_min": 0.9}
    np.testing.assert_array_equal(asked, [expected])
    assert notes.notes == [
        f"Approximate: cosine to the exact embedding on {len(expected)} cells: mean 0.99876, lowest 0.90000."
    ]
