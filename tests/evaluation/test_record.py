"""What a prediction says of itself: its stored baselines, and records that are damaged or not to be trusted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from helpers.two_files import PAIRS, Written, means, sest_uns, write_two_files
from sest.config import EvaluateConfig
from sest.errors import InputError
from sest.evaluation.evaluate import evaluate


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Writes the two files."""
    return partial(write_two_files, tmp_path)


def test_stored_baselines_are_matched_by_their_labels(written: Callable[..., Written]) -> None:
    _, real = written()
    r = means(real, 1000.0)
    order = PAIRS[::-1]
    truth = np.stack([r[pair] for pair in order]).astype(np.float32)
    labels = {"cell_type": np.array([c for c, _ in order]), "perturbation": np.array([p for _, p in order])}
    wrong = np.zeros_like(truth)
    uns = sest_uns(baselines={"ridge": truth, "perturbation_mean": truth + 0.5, "context_mean": wrong}, pairs=labels)
    summary = evaluate(*written(uns), EvaluateConfig(cell_eval=False)).summary
    assert list(summary["mae"]) == ["model", "controls", "perturbation_mean", "ridge", "real_half"]
    assert summary["mae"]["ridge"] < 1e-6
    assert summary["mae"]["perturbation_mean"] == pytest.approx(0.5, abs=1e-6)
    # before baselines had a version, context_mean was what is called controls now, which are always the real ones
    assert "context_mean" not in summary["mae"] and summary["mae"]["controls"] < 1.0
    uns = sest_uns(
        baselines={"stack": truth, "context_mean": truth + 0.5, "controls": wrong}, pairs=labels, baselines_version=2
    )
    summary = evaluate(*written(uns), EvaluateConfig(cell_eval=False)).summary
    assert list(summary["mae"]) == ["model", "controls", "context_mean", "stack", "real_half"]
    assert summary["mae"]["context_mean"] == pytest.approx(0.5, abs=1e-6) and summary["mae"]["controls"] < 1.0


def test_stored_baselines_that_lack_a_pair_are_refused(written: Callable[..., Written]) -> None:
    labels = {"cell_type": np.array(["k562"]), "perturbation": np.array(["g0"])}
    uns = sest_uns(baselines={"ridge": np.ones((1, 8), np.float32)}, pairs=labels)
    with pytest.raises(InputError, match="baseline 'ridge' lacks 4 of its pairs"):
        evaluate(*written(uns), EvaluateConfig(cell_eval=False))


@pytest.mark.parametrize(
    "values", [np.ones((5, 7), np.float32), np.full((5, 8), np.nan, np.float32)], ids=["another width", "NaN"]
)
def test_stored_baselines_of_another_width_or_with_nan_are_refused(
    written: Callable[..., Written], values: np.ndarray
) -> None:
    labels = {"cell_type": np.array([c for c, _ in PAIRS]), "perturbation": np.array([p for _, p in PAIRS])}
    uns = sest_uns(baselines={"ridge": values}, pairs=labels)
    with pytest.raises(InputError, match="'ridge' is not 5 x 8 finite numbers"):
        evaluate(*written(uns), EvaluateConfig(cell_eval=False))


def test_links_in_the_prediction_s_record_are_not_followed(written: Callable[..., Written]) -> None:
    predicted, real = written()
    with h5py.File(predicted, "r+") as file:
        file["uns/sest/elsewhere"] = h5py.ExternalLink("/etc/hostname", "/")
    with pytest.raises(InputError, match="'elsewhere' as a link"):
        evaluate(predicted, real, EvaluateConfig(cell_eval=False))


def test_a_damaged_record_in_the_prediction_is_named(written: Callable[..., Written]) -> None:
    uns = sest_uns()
    del uns["columns"]["control"]
    with pytest.raises(InputError, match="no columns/control"):
        evaluate(*written(uns), EvaluateConfig(cell_eval=False))
