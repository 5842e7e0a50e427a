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
from helpers.pages import CELL_TYPE, SIZES, Opened, Trained, opened
from sest.baselines.stack import KINDS
from sest.report.cache_facts import read_cache
from sest.report.run_facts import read_runs
from sest.report.write import write_report
from sest.training.train import train


def rows_of(page: Opened) -> dict[str, list[str]]:
    """Perturbation -> its row in the tables of all pairs."""
    tables = page.section("perturbations").split("all pairs, the worst first")[1:]
    rows = re.findall(r"<tr>(.*?)</tr>", "".join(tables), re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    return {row[0]: row for row in cells if row}


def test_pairs_are_shown_beside_the_stack_as_the_blend_predicts_them(trained: Trained, page: Opened) -> None:
    rows, facts = (
        rows_of(page),
        read_cache(read_runs([trained.run])[0], n_sets=0, device=torch.device("cpu")),
    )
    assert set(rows) == {"P", "T", "S", "Q", "&lt;script&gt;alert(1)&lt;/script&gt;"}
    validated = [row for name, row in rows.items() if name != "Q"]
    assert facts.pairs is not None
    for column, name in ((3, "pearson_delta"), (4, "stack"), (5, "mae"), (6, "pds")):
        mean = np.mean([float(row[column]) for row in validated if row[column] != "-"])  # one has no pds
        expected = np.nanmean(facts.pairs[0].scores[name])
        assert mean == pytest.approx(expected, rel=2e-3, abs=1e-4), name  # the page shows four digits
    mean = np.mean([float(row[4]) for row in validated])
    assert mean == pytest.approx(trained.best["pearson_delta_stack"], rel=2e-3, abs=1e-4)


def test_the_effect_of_a_pair_is_that_of_its_raw_counts(trained: Trained, page: Opened) -> None:
    group, rows = trained.group, rows_of(page)
    counts = group.matrix.toarray().astype(float)
    log1p = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    for name, cell_type in (("P", "x"), ("Q", "x"), ("S", CELL_TYPE)):
        of = (group.obs["cell_type"] == cell_type).to_numpy()
        mine, control = (of & (group.obs["perturbation"] == label).to_numpy() for label in (name, "ctrl"))
        change = log1p[mine].mean(0) - log1p[control].mean(0)
        assert int(rows[name][2]) == SIZES[name] == mine.sum()
        assert float(rows[name][7]) == pytest.approx(np.linalg.norm(change), rel=1e-3)  # four digits
        scatter = next(f for f in page.figures.values() if f.get("columns", [""])[0] == "gene" and is_of(page, f, name))
        shown = {gene: observed for gene, observed, _ in scatter["rows"]}
        assert [shown[gene] for gene in GENES] == pytest.approx(change, rel=1e-4, abs=1e-5)  # six digits of float32


def is_of(page: Opened, figure: dict[str, Any], name: str) -> bool:
    """Whether a scatter of genes is the one that the list offers for a perturbation."""
    key = next(key for key, value in page.figures.items() if value is figure)
    return f'value="{key}">{name} in ' in page.source or f'value="{key}" selected>{name} in ' in page.source


def test_a_limit_on_sets_is_kept_and_said(trained: Trained, tmp_path: Path) -> None:
    write_report([trained.run], tmp_path / "r.html", n_sets=5)
    # val: 8, 7, 9 and 6 cells in sets of 4; 2 + 2 + 3 + 2 sets; test: 5 cells, 2 sets
    assert "(5 of its 9 sets predicted)" in opened(tmp_path / "r.html").words
    assert "(all its sets predicted)" in opened(tmp_path / "r.html").words


def test_pairs_of_which_nothing_can_be_learned_are_said_to_be_chance(trained: Trained, tmp_path: Path) -> None:
    train(trained.cache, tmp_path / "run", small_config(max_steps=1, val_contexts="all"))
    write_report([tmp_path / "run"], tmp_path / "r.html")
    words = opened(tmp_path / "r.html").words
    assert "the head can have learned nothing" in words and "pds - (it needs two" in words


def test_what_counts_in_the_predictions_is_said_for_each_split(page: Opened) -> None:
    assert "head and baselines together, one line a cell type" in page.words
    said = re.findall(r"Weights in (screen/\S+) \(([a-z ]+)\): stack \d\.\d\d", page.words)
    assert said and {kind for _, kind in said} <= set(KINDS)
