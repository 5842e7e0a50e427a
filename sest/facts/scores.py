"""Scores of a model beside baselines on the same pairs, from wherever they are known, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from sest.baselines.effects import BASELINES
from sest.evaluation.ceiling import means_of_halves
from sest.evaluation.metrics import SOME_HAVE, mean_score
from sest.evaluation.results import Evaluation
from sest.runs.curves import HIGHER_IS_BETTER

MODEL, CONTROLS = "model", "controls"
METRICS = ("pearson_delta", "pearson_delta_independent", "mae", "pds", "energy_distance", "des")  # in this order
HIGHER = (*HIGHER_IS_BETTER, "des")
LEVEL = 0.01  # relative: closer scores are level, however surely they differ
ERRORS = 2.0  # standard errors of the paired difference over pairs within which scores are level, if it is known
LEAST_RATIO = 1.1  # from which on "so many times" is said


@dataclass(frozen=True)
class Score:
    """Mean of a metric over pairs, of a model and of what needs no network."""

    metric: str
    model: float
    baselines: dict[str, float]  # by name
    errors: dict[str, float] = field(default_factory=dict)  # standard error of the model's lead over each; if known

    def lead(self, baseline: str) -> float:
        """By how much the model is better than a baseline; NaN where one of them is no number."""
        lead = self.baselines.get(baseline, math.nan) - self.model
        return -lead if self.metric in HIGHER else lead

    def against(self, baseline: str) -> int:
        """1: the model is better than a baseline; -1: worse; 0: they are level, or one of them is no number."""
        lead, error = self.lead(baseline), self.errors.get(baseline, math.nan)
        least = max(LEVEL * abs(self.baselines.get(baseline, math.nan)), 0.0 if math.isnan(error) else ERRORS * error)
        return 0 if math.isnan(lead) or abs(lead) <= least else int(math.copysign(1, lead))

    @property
    def known(self) -> dict[str, float]:
        """The baselines that have this score."""
        return {name: value for name, value in self.baselines.items() if math.isfinite(value)}

    @property
    def best(self) -> str | None:
        """The best baseline; None where none is known."""
        return min(self.known, key=self.lead, default=None)

    @property
    def beats_all(self) -> bool:
        return bool(self.known) and all(self.against(name) > 0 for name in self.known)

    @property
    def is_level(self) -> bool:
        """Whether no baseline is better, and one is as good."""
        return bool(self.known) and not self.beats_all and all(self.against(name) >= 0 for name in self.known)

    def beside(self, baseline: str) -> str:
        """The two scores, and how many times better or worse the model's is."""
        other = self.baselines[baseline]
        text = f"{self.model:.3g} against {other:.3g}"
        if self.model > 0 and other > 0:
            ratio = max(self.model, other) / min(self.model, other)
            word = "better" if self.lead(baseline) > 0 else "worse"
            text += f", {ratio:.2g} times {word}" if ratio >= LEAST_RATIO else ""
        return text


@dataclass(frozen=True, eq=False)
class Scoreboard:
    """What a model and the baselines score on the same pairs."""

    of: str  # which pairs, for a title
    by: str  # whose predictions
    scores: tuple[Score, ...]
    n_pairs: int
    pairs: pd.DataFrame | None = None  # a row a (cell_type, perturbation, predictor), as `Evaluation.table`
    real_half: Mapping[str, float] = field(default_factory=dict)  # metric -> score of half of the real cells
    no_effect: tuple[str, ...] = ()  # cell types whose real cells show no measurable effect
    is_measured: bool = False  # whether that is known
    no_measure: str = ""  # why no score is a win or a loss; empty: they count

    @property
    def predictors(self) -> list[str]:
        """The model and the baselines that have scores."""
        return [MODEL, *dict.fromkeys(name for score in self.scores for name in score.known)]

    def without(self, baseline: str) -> Scoreboard:
        """The same beside other baselines, where the model itself is this one."""
        left = (replace(s, baselines={n: v for n, v in s.baselines.items() if n != baseline}) for s in self.scores)
        return replace(self, scores=tuple(left))

    @property
    def judged(self) -> list[Score]:
        """The scores that count: a val_loss counts each cell's distance to itself, by which too little spread earns."""
        known = [score for score in self.scores if math.isfinite(score.model) and score.known]
        return [score for score in known if score.metric != "val_loss"] or known

    @cached_property
    def by_pair(self) -> dict[str, pd.DataFrame]:
        """metric -> a row a (cell_type, perturbation), a column a predictor; without metrics that no pair has."""
        if self.pairs is None:
            return {}
        keys = ["cell_type", "perturbation"]
        order = pd.MultiIndex.from_frame(self.pairs[self.pairs["predictor"] == MODEL][keys])
        wide = self.pairs.set_index([*keys, "predictor"])
        found = {}
        for score in self.scores:
            table = wide[score.metric].unstack("predictor").reindex(order)[self.predictors]
            if table[MODEL].notna().any():
                found[score.metric] = table
        return found

    def verdict(self) -> tuple[str, str]:
        """How the model stands, in one sentence for the top, and the figures behind it."""
        if self.no_measure:
            return self.no_measure, ""
        scores = self.judged
        n = len(scores)
        wins = [score for score in scores if score.beats_all]
        losses = [score for score in scores if score.against(CONTROLS) < 0]
        if not scores:
            return "No score is known.", ""
        if losses:
            lead = f"Worse than doing nothing (predicting the controls) on {_of(losses, n)}"
            worst = max(losses, key=lambda s: _ratio(s, CONTROLS))
            lead += f", in {worst.metric} {worst.beside(CONTROLS)}"
            if wins:
                best = max(wins, key=lambda s: _ratio(s, str(s.best)))
                where = f"in {best.metric} {best.beside(str(best.best))} of the {_plain(best.best)}"
                lead = f"{lead}; better than every baseline on {_of(wins, n)}, {where}"
            else:
                lead += "; better than every baseline on none"
        elif len(wins) == n:
            lead = f"Better than every baseline on {_of(wins, n)}"
        else:
            something = [score for score in scores if score.against(CONTROLS) > 0]
            lead = f"Better than doing nothing on {_of(something, n)}, than every baseline on {_of(wins, n)}"
            level = [score for score in scores if score.is_level]
            behind = n - len(wins) - len(level)
            rest = [f"level with the best one on {len(level)}"] if level else []
            rest += [f"behind it on {behind}"] if behind else []
            lead += f": {', '.join(rest)}"
        return f"{lead}.", " ".join(f"{_sentence(score)}." for score in scores)


def _of(scores: Sequence[Score], n: int) -> str:
    if len(scores) == n:
        return f"all {n} metrics" if n > 1 else "the only metric"
    return f"{len(scores)} of {n} metrics" if scores else "none"


def _ratio(score: Score, baseline: str) -> float:
    other = score.baselines[baseline]
    return max(score.model, other) / min(score.model, other) if min(score.model, other) > 0 else 0.0


def _plain(name: str | None) -> str:
    return str(name).replace("_", " ")


def _sentence(score: Score) -> str:
    best = score.best
    assert best is not None
    word = {1: "ahead of", 0: "level with", -1: "behind"}[score.against(best)]
    return f"{score.metric} is {word} the best baseline, {_plain(best)} ({score.beside(best)})"


# --- where scores come from


def of_pairs(
    pairs: pd.DataFrame,
    *,
    of: str,
    by: str,
    real_half: Mapping[str, float] | None = None,
    no_effect: Sequence[str] | None = None,
) -> Scoreboard:
    """Means over the pairs of a table like `Evaluation.table`; without those of cell types of no effect, if others are.

    Args:
        no_effect: cell types without a measurable effect; None: not known.
    """
    without = set(no_effect or ())
    counted = pairs[~pairs["cell_type"].isin(without)]
    no_measure = ""
    if not len(counted):
        counted = pairs
        no_measure = (
            "No measurable effect in these cells: half of the real cells does not predict the other half, so no score "
            "is a win or a loss."
        )
    rows = {str(name): table for name, table in counted.groupby("predictor", sort=False)}
    names = [name for name in BASELINES if name in rows] + [n for n in rows if n not in (*BASELINES, MODEL)]
    scores = tuple(_score(metric, rows, names) for metric in METRICS if metric in pairs)
    return Scoreboard(
        of=of,
        by=by,
        scores=tuple(score for score in scores if math.isfinite(score.model)),
        n_pairs=len(rows[MODEL]),
        pairs=pairs,
        real_half=dict(real_half or {}),
        no_effect=tuple(sorted(without)),
        is_measured=no_effect is not None,
        no_measure=no_measure,
    )


def _score(metric: str, rows: Mapping[str, pd.DataFrame], names: Sequence[str]) -> Score:
    of_model = rows[MODEL][metric].to_numpy(np.float64)
    found, errors = {}, {}
    for name in names:
        of_baseline = rows[name][metric].to_numpy(np.float64)
        found[name] = mean_score(metric, of_baseline)
        lead = of_model - of_baseline
        lead = lead[np.isfinite(lead)] if metric in SOME_HAVE else lead
        if len(lead) > 1:
            errors[name] = float(lead.std(ddof=1) / math.sqrt(len(lead)))
    return Score(metric, mean_score(metric, of_model), found, errors)


def of_evaluation(evaluation: Evaluation) -> Scoreboard:
    """What `sest evaluate` found."""
    made = evaluation.provenance.get("made_by")
    of = (
        f" of {made['run']}, step {int(made['step']):,}"
        if isinstance(made, dict) and {"run", "step"} <= set(made)
        else ""
    )
    none = [c.cell_type for c in evaluation.ceilings if not c.is_measurable]
    known = {c.cell_type for c in evaluation.ceilings} >= set(evaluation.table["cell_type"])
    halves = means_of_halves([c for c in evaluation.ceilings if c.is_measurable] or evaluation.ceilings)
    halves["pearson_delta_independent"] = halves.pop("pearson_delta")  # each half has its own controls
    return of_pairs(
        evaluation.table,
        of="evaluated cells",
        by=f"the predicted cells{of}, as `sest evaluate` scored them",
        real_half={metric: half for metric, half in halves.items() if math.isfinite(half)},
        no_effect=none if known or none else None,
    )


def made_by(evaluation: Evaluation) -> dict[str, object]:
    """Which checkpoint the evaluated cells are of, as far as is known."""
    made = evaluation.provenance.get("made_by")
    return dict(made) if isinstance(made, dict) else {}
