"""What stands at the top of a report: the verdict before any figure, and a card a metric with every baseline."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.pages import Trained, brief, rewrite
from sest.facts.scores import Score, Scoreboard
from sest.report.headline import card, cards, verdict
from sest.runs.curves import METRICS, WITH_CELLS


def board(*scores: Score, **more: object) -> Scoreboard:
    return Scoreboard("test split", "the head", scores, 4, **more)  # type: ignore[arg-type]


MIXED = board(
    Score("mae", 0.2, {"controls": 0.05, "stack": 0.1}), Score("energy_distance", 0.1, {"controls": 1.0, "stack": 0.5})
)


def test_a_loss_against_doing_nothing_is_said_first() -> None:
    said = verdict(MIXED)
    assert said.startswith('<div class="verdict warning"><p><b>Worse than doing nothing') and "4 times worse" in said
    assert "5 times better" in said and "Test split, 4 pairs" in said
    assert "is not known before <code>sest evaluate</code>" in said


def test_a_card_has_every_predictor_the_best_first() -> None:
    made = card(MIXED.scores[0], board(MIXED.scores[0], real_half={"mae": 0.02}))
    names = re.findall(r'<span class="name[^"]*">([^<]*)</span>', made)
    assert names == ["half of the real cells", "controls", "stack", "this model"]
    assert re.findall(r"width:([0-9.]+)%", made) == ["10.0", "25.0", "50.0", "100.0"]
    assert "worse than doing nothing" in made and "lower is better" in made
    higher = card(Score("pds", 0.9, {"controls": 0.5, "stack": 0.7}), MIXED)
    assert higher.index("this model") < higher.index("stack") < higher.index("controls")
    assert "better than every baseline" in higher


def test_where_nothing_can_be_measured_no_card_is_a_win() -> None:
    nothing = board(Score("mae", 0.1, {"controls": 0.3}), no_measure="No measurable effect.")
    assert "better than" not in cards(nothing) and "no measure" in cards(nothing)
    assert verdict(nothing).startswith('<div class="verdict note"><p><b>No measurable effect.</b></p>')


def test_the_best_validation_is_shown_where_no_cells_are(trained: Trained, copy: Path) -> None:
    page, best = brief(copy), trained.best
    top = page.source.split('id="perturbations"')[0]
    assert f"the head alone at the best val_loss, step {best['step']}" in page.words
    for metric in METRICS[1:]:  # a val_loss does not count
        made = next(part for part in top.split('class="card"') if f"<h3>{metric.replace('_', ' ')}</h3>" in part)
        for name in ("controls", "stack") if metric == "energy_distance" else ("controls", "ridge", "kernel"):
            value = best[f"{metric}_{name}"]
            assert re.search(rf">{name.replace('_', ' ')}</span>.*?>{value:.4g}<", made, re.DOTALL), (metric, name)
    assert set(WITH_CELLS) > {"controls", "stack"}


def test_a_run_without_any_validation_says_so(copy: Path, trained: Trained) -> None:
    rewrite(copy, [line for line in trained.lines if "val_loss" not in line])
    assert "No validation yet" in brief(copy).words


def test_scores_that_measure_nothing_are_said_to(copy: Path, trained: Trained) -> None:
    for mark, said in (
        ({"pds": None, "val_perturbations_not_learned": 2}, "training says nothing about its perturbations"),
        ({"val_pairs": 3, "val_pairs_not_measurable": 3}, "no measurable effect"),
    ):
        rewrite(copy, [line | mark if "val_loss" in line else line for line in trained.lines])
        words = brief(copy).words
        assert said in words and "no score there is a win or a loss" in words and "no measure" in words
        assert "better than every baseline" not in words and "worse than doing nothing" not in words
