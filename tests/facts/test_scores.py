"""What scores say in words: better, level, worse than doing nothing, and where they measure nothing."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from sest.evaluation.ceiling import Ceiling
from sest.evaluation.results import Evaluation
from sest.facts.scores import Score, Scoreboard, of_evaluation, of_pairs


def score(metric: str, model: float, errors: dict[str, float] | None = None, **baselines: float) -> Score:
    return Score(metric, model, baselines, errors or {})


def board(*scores: Score, no_measure: str = "") -> Scoreboard:
    return Scoreboard("test split", "the head", scores, 4, no_measure=no_measure)


def table(*rows: tuple[str, str, str, float]) -> pd.DataFrame:
    """Rows of (cell type, perturbation, predictor, mae)."""
    made = pd.DataFrame(rows, columns=["cell_type", "perturbation", "predictor", "mae"])
    return made.assign(n_real=3)


def test_higher_is_better_for_some_metrics_and_close_scores_are_level() -> None:
    for metric, model, expected in (
        ("mae", 1.0, 1),
        ("pds", 1.0, -1),
        ("mae", 2.01, 0),
        ("mae", 2.03, -1),
        ("pds", 3.0, 1),
    ):
        assert score(metric, model, controls=2.0).against("controls") == expected, (metric, model)
    assert score("pds", math.nan, controls=2.0).against("controls") == 0
    assert score("mae", 1.0, controls=math.nan).against("controls") == 0
    spread = {"controls": 0.3}  # 0.5 is less than two standard errors
    assert score("mae", 1.5, spread, controls=2.0).against("controls") == 0
    assert score("mae", 1.3, spread, controls=2.0).against("controls") == 1


def test_a_mixed_result_is_said_to_be_one_with_how_many_times() -> None:
    mixed = board(
        score("mae", 0.2, controls=0.05, stack=0.1),
        score("energy_distance", 0.1, controls=1.0, stack=0.5),
        score("pds", 0.6, controls=0.5, stack=0.7),
    )
    lead, behind = mixed.verdict()
    assert lead == (
        "Worse than doing nothing (predicting the controls) on 1 of 3 metrics, in mae 0.2 against 0.05, 4 times worse; "
        "better than every baseline on 1 of 3 metrics, in energy_distance 0.1 against 0.5, 5 times better of the stack."
    )
    assert "pds is behind the best baseline, stack (0.6 against 0.7, 1.2 times worse)." in behind


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([("mae", 0.1, 0.3, 0.2)], "Better than every baseline on the only metric."),
        ([("mae", 0.1, 0.3, 0.1)], "than every baseline on none: level with the best one on 1."),
        ([("mae", 0.2, 0.3, 0.1)], "on the only metric, than every baseline on none: behind it on 1."),
        ([("mae", 0.4, 0.3, 0.1)], "better than every baseline on none."),
    ],
)  # fmt: skip
def test_wins_and_losses_are_counted(scores: list[tuple[str, float, float, float]], said: str) -> None:
    found = board(*(score(m, model, controls=c, stack=s) for m, model, c, s in scores))
    assert said in found.verdict()[0]


def test_where_nothing_can_be_measured_nothing_is_a_win() -> None:
    assert board(score("mae", 0.1, controls=0.3), no_measure="No effect.").verdict() == ("No effect.", "")


def test_a_val_loss_counts_only_where_nothing_else_is_known() -> None:
    loss, distance = score("val_loss", 1.0, controls=2.0), score("energy_distance", 1.0, controls=0.5)
    assert board(loss, distance).judged == [distance] and board(loss).judged == [loss]


def test_means_are_over_pairs_of_cell_types_with_an_effect_and_errors_are_paired() -> None:
    rows = table(
        ("a", "P", "model", 1.0), ("a", "Q", "model", 3.0), ("b", "P", "model", 9.0),
        ("a", "P", "controls", 2.0), ("a", "Q", "controls", 5.0), ("b", "P", "controls", 1.0),
    )  # fmt: skip
    found = of_pairs(rows, of="x", by="y", no_effect=["b"])
    assert found.n_pairs == 2 and found.is_measured and found.no_effect == ("b",) and not found.no_measure
    (mae,) = found.scores
    assert (mae.model, mae.baselines) == (2.0, {"controls": 3.5})
    assert mae.errors["controls"] == pytest.approx(0.5)  # leads 1 and 2: sd 0.707 over sqrt 2
    wide = found.by_pair["mae"]
    assert list(wide.columns) == ["model", "controls"] and wide.loc[("b", "P"), "model"] == 9.0
    nothing = of_pairs(rows, of="x", by="y", no_effect=["a", "b"])
    assert nothing.no_measure and nothing.n_pairs == 3 and nothing.verdict()[0].startswith("No measurable effect")
    assert not of_pairs(rows, of="x", by="y").is_measured


def test_an_evaluation_brings_its_ceilings_and_what_it_is_of() -> None:
    rows = table(("a", "P", "model", 1.0), ("a", "P", "controls", 2.0))
    low = Ceiling("a", 1, 9, 9, 0.01, 0.2, 0.1, 0.1, math.nan)
    made: dict[str, object] = {"made_by": {"run": "run1", "step": 40}}
    summary = {"mae": {"model": 1.0, "controls": 2.0, "real_half": 0.1}}
    found = of_evaluation(Evaluation(rows, summary, made, (), (low,)))
    assert (
        found.no_effect == ("a",)
        and found.no_measure
        and found.real_half == {"pearson_delta_independent": 0.01, "mae": 0.1}
    )
    assert "of run1, step 40" in found.by
    assert not of_evaluation(Evaluation(rows, summary, {}, ())).is_measured
