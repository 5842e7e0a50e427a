"""Several runs beside each other: which is better, whether they learn the same task, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sest.config import TrainConfig
from sest.facts.run import RunFacts
from sest.report.figures import overlaid
from sest.report.page import Html, Page, element, grid, join, paragraph, table
from sest.report.sections import WORDS, direction
from sest.runs.curves import METRICS
from sest.runs.diagnose import WARNING
from sest.runs.run_folder import PATHS

SAME_BASELINE = 1e-4  # relative: validation baselines of the same cells agree better than this on any device


def comparison(page: Page, runs: Sequence[RunFacts]) -> Html:
    """The section that stands before those of the single runs."""
    parts = [paragraph(ranking(runs))]
    if different := different_tasks(runs):
        warning = (
            f"These runs differ in {', '.join(different)}: their losses are not measured on the same task, so which is "
            "lower says little."
        )
        item = element("li", element("span", WORDS[WARNING], class_="level"), warning, class_=WARNING)
        parts.append(element("ul", item, class_="findings"))
    figures = [
        page.plot(f"{name}{said}", overlaid(runs, kind, name))
        for kind, name, said in (
            ("validation", "val_loss", ", lower is better"),
            ("log", "loss", " in training"),
            *(("validation", metric, f", {direction(metric)} is better") for metric in METRICS[1:]),
            ("log", "it_per_s", ", steps a second"),
        )
    ]
    parts += [
        element("h3", "At the best validation"),
        table(["run or baseline", "step", *METRICS], _scores(runs)),
        grid(figures),
        element("h3", "What differs"),
    ]
    if options := differing_options(runs):
        rows = [[name, *map(_plain, values)] for name, values in options.items()]
        parts.append(table(["option or fact", *(run.name for run in runs)], rows))
    else:
        parts.append(paragraph("No option differs."))
    return join(parts)


def _scores(runs: Sequence[RunFacts]) -> list[list[Any]]:
    """A row a run, then the baselines: once where all runs have the same, else those of every run."""
    rows: list[list[Any]] = []
    for run in runs:
        heads_of = {score.metric: score.model for score in run.scores()}
        rows.append([run.name, run.best_step, *(heads_of.get(metric) for metric in METRICS)])
    alike = same_baselines(runs)
    validated = [run for run in runs if run.scores()]
    for run in validated[:1] if alike else validated:
        of = "" if alike else f" for {run.name}"
        scores = {score.metric: score.baselines for score in run.scores()}
        for name in scores["val_loss"]:
            values = (scores.get(metric, {}).get(name) for metric in METRICS)
            rows.append([f"{name.replace('_', ' ')}{of}", None, *values])
    return rows


def _plain(value: Any) -> Any:
    return "-" if value is None else value if isinstance(value, (bool, int, float)) else str(value)


def ranking(runs: Sequence[RunFacts]) -> str:
    """One sentence: which run has the lower best val_loss, and by how much."""
    found = [(run.scores()[0].model, run) for run in runs if run.scores()]
    if len(found) < 2:
        return "Fewer than two of these runs have been validated, so there is nothing to compare yet."
    (low, best), *others = sorted(found, key=lambda pair: pair[0])
    texts = [f"{loss:.4g} of {run.name} ({(loss - low) / loss if loss else 0.0:.1%} lower)" for loss, run in others]
    word = "lower" if len(found) == 2 else "lowest"
    return f"{best.name} has the {word} best val_loss: {low:.4g}, against {', '.join(texts)}."


def different_tasks(runs: Sequence[RunFacts]) -> list[str]:
    """What makes val_losses of these runs incomparable, each in a few words; empty where nothing is known to."""
    kept = ("set_size", "loss", "match_controls", "val_sets", "seed", "val_fraction", "val_contexts")
    found = [f"--{name.replace('_', '-')}" for name in kept if len({getattr(run.config, name) for run in runs}) > 1]
    if all(run.config.splits for run in runs):
        found = [name for name in found if name not in ("--val-fraction", "--val-contexts")]
    states = [run.state for run in runs if run.state]
    for key, words in (
        ("splits_sha256", "the splits"),
        ("target_sum", "the target sum"),
        ("scale", "the scale of the targets"),
        ("genes", "the genes"),
    ):
        if len({repr(state.get(key)) for state in states}) > 1:
            found.append(words)
    if not same_baselines(runs):
        low, high = min(_control_losses(runs)), max(_control_losses(runs))
        found.append(f"the validation cells (predicting the controls scores {low:.4g} to {high:.4g})")
    return found


def same_baselines(runs: Sequence[RunFacts]) -> bool:
    """Whether predicting the controls scores the same val_loss in all runs: they validate on the same cells."""
    losses = _control_losses(runs)
    return not losses or max(losses) - min(losses) <= SAME_BASELINE * max(map(abs, losses))


def _control_losses(runs: Sequence[RunFacts]) -> list[float]:
    """The val_loss of the controls in every run that has been validated."""
    return [scores[0].baselines["controls"] for run in runs if (scores := run.scores())]


def differing_options(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """Options and facts of the encoder that are not the same in all runs: name -> one value a run."""
    values = {name: [getattr(run.config, name) for run in runs] for name in TrainConfig.names()}
    for name in PATHS:  # where files lie is no difference; their content is
        del values[name]
    values["splits sha256"] = [run.state.get("splits_sha256") for run in runs]
    values["features sha256"] = [run.state.get("features", {}).get("sha256") for run in runs]
    encoders = [run.state.get("encoder", {}) for run in runs]
    for key in ("name", "native_dim", "projection", "max_tokens"):
        values[f"encoder {key}"] = [encoder.get(key) for encoder in encoders]
    values["width of the embeddings"] = [run.state.get("sizes", {}).get("dim") for run in runs]
    values["precision, as run"] = [run.state.get("precision") for run in runs]
    values["cache"] = [run.cache for run in runs]
    return {name: row for name, row in values.items() if len(set(map(repr, row))) > 1}
