"""The section on held-out perturbations: its numbers against the validation, the raw counts and the figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.caches import GENES
from helpers.configs import small_config
from helpers.pages import CELL_TYPE, HOSTILE, SIZES, Opened, Trained, opened
from sest.baselines.effects import BASELINES
from sest.baselines.stack import KINDS
from sest.facts.cache import read_cache
from sest.facts.run import read_runs
from sest.report.write import write_report
from sest.training.train import train


def rows_of(page: Opened, metric: str) -> dict[str, list[Any]]:
    """Perturbation -> its row in the tables of all pairs, of both splits."""
    columns = ["perturbation", "cell type", "cells", "this model", *(name.replace("_", " ") for name in BASELINES)]
    keys = re.findall(rf'data-rows="(f\d+)"><summary>{metric} of all', page.source)
    tables = [page.figures[key] for key in keys]
    assert len(tables) == (1 if metric == "pds" else 2) and all(table["columns"] == columns for table in tables)
    return {row[0]: row for table in tables for row in table["rows"]}


def test_every_pair_stands_beside_every_baseline_as_the_blend_predicts_it(trained: Trained, page: Opened) -> None:
    facts = read_cache(read_runs([trained.run])[0], n_sets=0, device=torch.device("cpu"))
    assert facts.pairs is not None
    scores = facts.pairs[0].scores
    for metric, words in (("pearson_delta", "pearson delta"), ("mae", "mae"), ("pds", "pds")):
        rows = rows_of(page, words)
        assert set(rows) == {"P", "T", "S", HOSTILE} | ({"Q"} if metric != "pds" else set())  # alone in its split
        for column, predictor in enumerate(("model", *BASELINES), 3):
            mean = np.mean([row[column] for name, row in rows.items() if name != "Q" and row[column] is not None])
            expected = np.nanmean(scores.loc[scores["predictor"] == predictor, metric])
            assert mean == pytest.approx(expected, rel=1e-4, abs=1e-6), (metric, predictor)  # five digits
            if predictor != "model":
                assert mean == pytest.approx(trained.best[f"{metric}_{predictor}"], rel=1e-4, abs=1e-6)
    means = re.findall(r"<td[^>]*>([^<]*)</td>", page.section("perturbations").split("Val split: every score")[1])
    assert "controls" in means and "stack" in means


def test_changes_are_those_of_the_raw_counts(trained: Trained, page: Opened) -> None:
    group = trained.group
    counts = group.matrix.toarray().astype(float)
    log1p = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    for name, cell_type in (("P", "x"), ("Q", "x"), ("S", CELL_TYPE)):
        of = (group.obs["cell_type"] == cell_type).to_numpy()
        mine, control = (of & (group.obs["perturbation"] == label).to_numpy() for label in (name, "ctrl"))
        change = log1p[mine].mean(0) - log1p[control].mean(0)
        assert rows_of(page, "mae")[name][2] == SIZES[name] == mine.sum()
        scatter = next(f for f in page.figures.values() if f["columns"][0] == "gene" and is_of(page, f, name))
        shown = {gene: observed for gene, observed, _ in scatter["rows"]}
        assert [shown[gene] for gene in GENES] == pytest.approx(change, rel=1e-4, abs=1e-5)  # six digits of float32


def is_of(page: Opened, figure: dict[str, Any], name: str) -> bool:
    """Whether a scatter of genes is the one that the list offers for a perturbation."""
    key = next(key for key, value in page.figures.items() if value is figure)
    return f'value="{key}">{name} in ' in page.source or f'value="{key}" selected>{name} in ' in page.source


def test_a_limit_on_sets_is_kept_and_said(trained: Trained, tmp_path: Path) -> None:
    write_report([trained.run], tmp_path / "r.html", n_sets=5)
    # val: 8, 7, 9 and 6 cells in sets of 4; 2 + 2 + 3 + 2 sets; test: 5 cells, 2 sets
    assert "(5 of its 9 sets predicted, from 16 draws of controls a cell type)" in opened(tmp_path / "r.html").words
    assert "(all its sets predicted)" in opened(tmp_path / "r.html").words


def test_pairs_of_which_nothing_can_be_learned_are_said_to_be_chance(trained: Trained, tmp_path: Path) -> None:
    train(trained.cache, tmp_path / "run", small_config(max_steps=1, val_contexts="all"))
    write_report([tmp_path / "run"], tmp_path / "r.html")
    words = opened(tmp_path / "r.html").words
    assert "the head can have learned nothing" in words


def test_what_counts_in_the_predictions_is_said_for_each_split(page: Opened) -> None:
    assert "by head and baselines together" in page.words
    said = re.findall(r"Weights in (screen/\S+) \(([a-z ]+)\): stack \d\.\d\d", page.words)
    assert said and {kind for _, kind in said} <= set(KINDS)
