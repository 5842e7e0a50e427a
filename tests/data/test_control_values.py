"""The values of control cells that are kept beside a cache, against those read from all cells."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import sest.data.control_values
from helpers.datasets import open_three_files
from sest.cache.derived import keep_derived, read_derived
from sest.data.control_values import ControlValues
from sest.data.labels import read_labels
from sest.data.targets import read_targets


@pytest.mark.parametrize("target_sum", [1e4, "median"])
@pytest.mark.parametrize("axis", ["common", "union"])
def test_kept_values_are_those_of_the_whole_over_any_genes(tmp_path: Path, axis: str, target_sum: float | str) -> None:
    """Of files with other genes, in other orders, of counts and of log1p values."""
    cache, _ = open_three_files(tmp_path)
    controls = read_labels(cache)[0].is_control
    whole = read_targets(cache, target_sum, axis=axis, controls=controls)
    kept = read_targets(cache, target_sum, axis=axis, controls=controls, only_controls=True)
    assert whole.held is None and kept.held is not None and np.array_equal(kept.held, controls)
    assert (kept.genes, kept.target_sum, kept.scale) == (whole.genes, whole.target_sum, whole.scale)
    np.testing.assert_array_equal(kept.factor, whole.factor)
    rows = np.flatnonzero(controls)[::-1]
    a, b = kept.values(rows), whole.values(rows)
    assert (a != b).nnz == 0 and a.nnz == b.nnz and kept.data.dtype == whole.data.dtype
    assert kept.indices.dtype == whole.indices.dtype and len(kept.data) < len(whole.data)
    assert np.diff(kept.indptr)[~controls].sum() == 0


def test_where_nothing_is_kept_all_cells_are_read(tmp_path: Path) -> None:
    cache, _ = open_three_files(tmp_path)
    controls = read_labels(cache)[0].is_control
    assert read_targets(cache, 1e4, controls=controls, only_controls=True).held is None  # and kept now
    assert read_targets(cache, 1e4, controls=controls, only_controls=True).held is not None
    others = controls.copy()
    others[np.flatnonzero(controls)[0]] = False
    assert read_targets(cache, 1e4, controls=others, only_controls=True).held is None


def test_more_than_memory_should_gather_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sest.data.control_values, "MOST_BYTES", 1)
    cache, _ = open_three_files(tmp_path)
    controls = read_labels(cache)[0].is_control
    read_targets(cache, 1e4, controls=controls)
    assert ControlValues(cache, controls).read() is None
    assert read_derived(cache.storage, "controls", ControlValues(cache, controls)._key, ["data"]) is None


@pytest.mark.parametrize("damage", ["a gene", "order", "a count", "fewer", "another kind"])
def test_values_that_cannot_be_those_of_the_controls_are_read_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Their checksums are right: somebody else wrote them."""
    cache, _ = open_three_files(tmp_path)
    controls = read_labels(cache)[0].is_control
    whole = read_targets(cache, 1e4, controls=controls)
    own = ControlValues(cache, controls)
    arrays = read_derived(cache.storage, "controls", own._key, ("indices", "data", "totals"))
    assert arrays is not None
    forged = {name: np.array(values) for name, values in arrays.items()}
    if damage == "a gene":
        forged["indices"][3] = 40_000
    elif damage == "order":
        forged["indices"][:2] = forged["indices"][:2][::-1].copy()
    elif damage == "a count":
        forged["data"][5] = -1
    elif damage == "fewer":
        forged["data"] = forged["data"][:-1]
    else:
        forged["totals"] = forged["totals"][:, None]
    shutil.rmtree(Path(cache.storage.url) / ".derived")
    keep_derived(cache.storage, "controls", own._key, forged)
    assert own.read() is None and "is damaged; it is made again." in caplog.text
    again = read_targets(cache, 1e4, controls=controls, only_controls=True)
    assert again.held is None and (again.values(np.arange(3)) != whole.values(np.arange(3))).nnz == 0
    assert own.is_kept
