"""The values of control cells that are kept beside a cache, against those read from all cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sest.data.control_values
from helpers.datasets import open_three_files
from sest.cache.derived import read_derived
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
    assert read_derived(cache.storage, "controls", ControlValues(cache, controls)._key) is None
