"""The sections on one run: what each shows, in words, tables and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sest.config import TrainConfig
from sest.data.vectors import DRUGS, GENES, ONE_HOT
from sest.report.cache_facts import CacheFacts
from sest.report.embedding_map import LABELS, MOST_CELLS
from sest.report.figures import MOST_POINTS, MOST_ROWS, embedding_map, log_curve, validation_curve
from sest.report.held_out import NO_CACHE, perturbations
from sest.report.page import Html, Page, details, element, grid, join, note, paragraph, sentence_case, table
from sest.report.run_facts import RunFacts, Score
from sest.runs.curves import (
    HIGHER_IS_BETTER,
    METRICS,
    NOT_LEARNED,
    NOT_MEASURABLE,
    VAL_PAIRS,
    WITH_CELLS,
    is_no_measure,
    strongest,
)
from sest.runs.diagnose import GOOD, NOTE, WARNING, Finding

WORDS = {GOOD: "Good", NOTE: "Note", WARNING: "Warning"}
MEANINGS = {
    "val_loss": "the training loss, of held-out cells; lower is better",
    "energy_distance": "between predicted and real held-out cells, none compared with itself; lower is better",
    "pearson_delta": "correlation over genes of predicted and observed change; higher is better",
    "pearson_delta_independent": "the same where both changes are from different halves of the controls",
    "mae": "mean absolute error of the mean log1p expression; lower is better",
    "pds": "how well perturbations are told apart by the predictions, 0.5 is chance; higher is better",
}
NOT_RECORDED = "not recorded"


# --- header


def header(run: RunFacts, cache: CacheFacts | None) -> Html:
    """What the run is, in one sentence, and its headline figures."""
    return join([paragraph(sentence(run, cache)), _cards(run), _score_table(run)])


def sentence(run: RunFacts, cache: CacheFacts | None) -> str:
    """What the run is, in one sentence."""
    state, done = run.state, f"trained for {run.step:,} of {run.config.max_steps:,} steps"
    if not state:
        return f"A State Transition head, {done}; it has no checkpoint that can be read."
    encoder, sizes, source = state["encoder"], state["sizes"], state["features"]["source"]
    known = {ONE_HOT: "one-hot features", GENES: "the genes' own features", DRUGS: "drugs and doses"}
    features = known.get(source, f"the features in {source}")
    if run.config.head == "none":
        return (
            f"Stack of baselines without a head, which predicts the expression of {sizes['n_genes']:,} genes after a "
            f"perturbation from its effects in other cells and from {features} of the perturbation."
        )
    cells = f" of {cache.map.n_cells:,} cells" if cache is not None and cache.map is not None else ""
    return (
        f"A State Transition head with {state['trainable_parameters']:,} parameters that predicts the expression of "
        f"{sizes['n_genes']:,} genes after a perturbation, from embeddings{cells} by {encoder['name']} ({sizes['dim']} "
        f"numbers a cell) and {features} of the perturbation; {done}."
    )


def _cards(run: RunFacts) -> Html:
    scores = run.scores()
    if not scores:
        return note("No validation yet, so there is nothing to hold against the baselines.")
    score = run.judged()
    assert score is not None
    name = score.metric.replace("_", " ") if score.metric != "val_loss" else score.metric
    cards = [_card(f"{score.head:.4g}", f"{name} at the best {run.config.monitor}, step {run.best_step:,}")]
    for baseline, other in score.baselines.items():
        if baseline not in WITH_CELLS:
            continue
        beats = score.beats(baseline)
        verdict = element("span", "beaten" if beats else "not beaten", class_=_yes(beats))
        if _is_no_measure(run):
            verdict = Html("no measure, see the diagnosis")
        words = f"{name} of the {baseline.replace('_', ' ')}: "
        cards.append(_card(f"{other:.4g}" if np.isfinite(other) else "-", words, verdict))
    return element("div", *cards, class_="cards")


def _is_no_measure(run: RunFacts) -> bool:
    return is_no_measure({name: run.last(name) for name in (VAL_PAIRS, NOT_MEASURABLE, NOT_LEARNED)})


def _card(figure: str, *words: Any) -> Html:
    return element("div", element("b", figure), element("span", *words), class_="card")


def _yes(beats: bool) -> str:
    return "yes" if beats else "no"


def _score_table(run: RunFacts) -> Html:
    scores = run.scores()
    if not scores:
        return Html("")
    baselines = [name.replace("_", " ") for name in scores[0].baselines]
    who = "stack" if run.config.head == "none" else f"head, step {run.best_step:,}"
    columns = ["metric", who, *baselines, "beats all", "what it is"]
    return table(columns, [_score_row(score, no_measure=_is_no_measure(run)) for score in scores])


def _score_row(score: Score, *, no_measure: bool) -> list[Any]:
    if no_measure or not np.isfinite(score.head):
        return [score.metric, score.head, *score.baselines.values(), None, MEANINGS[score.metric]]
    known = {name: value for name, value in score.baselines.items() if np.isfinite(value)}
    beats = all(score.beats(name) for name in known)
    equals = not beats and all(score.beats(name) or score.head == value for name, value in known.items())
    verdict: Any = "equal" if equals else element("span", _yes(beats), class_=_yes(beats))
    return [score.metric, score.head, *score.baselines.values(), verdict, MEANINGS[score.metric]]


# --- diagnosis


def diagnosis(findings: Sequence[Finding]) -> Html:
    if not findings:
        return note("Too little is recorded to say anything.")
    items = [
        element(
            "li",
            element("span", WORDS[finding.level], class_="level"),
            element("b", sentence_case(finding.name)),
            paragraph(finding.evidence),
            *([paragraph(finding.advice)] if finding.advice else []),
            class_=finding.level,
        )
        for finding in findings
    ]
    return element("ul", *items, class_="findings")


# --- curves


def curves(page: Page, run: RunFacts) -> Html:
    log = run.curves.log
    most = max(len(log["step"]), len(run.curves.validation["step"]))
    thinned = f"Curves show at most {MOST_POINTS:,} points, tables {MOST_ROWS} rows." if most > MOST_ROWS else ""
    metrics = [
        page.plot(f"{metric}, {direction(metric)} is better", validation_curve(run, metric))
        for metric in METRICS
        if metric in ("val_loss", *run.curves.validation)
    ]
    loss = page.plot("Training loss", log_curve(run.curves, "loss", "loss"))
    norm = page.plot("Gradient norm, before clipping", log_curve(run.curves, "grad_norm", "norm"))
    rate = page.plot("Speed", log_curve(run.curves, "it_per_s", "it/s", limit="limit_it_per_s"))
    beside = strongest(run.curves.validation).replace("_", " ")
    key = element(
        "p",
        *(element("span", words) for words in ("head", beside, "controls", "best step")),
        class_="key",
    )
    parts = [grid([loss, metrics[0]]), grid(metrics[1:], three=True), grid([norm, rate])]
    if run.best() is not None:
        parts.insert(0, key)
    return join([*([paragraph(thinned)] if thinned else []), *parts])


def direction(metric: str) -> str:
    return "higher" if metric in HIGHER_IS_BETTER else "lower"


# --- the embeddings


def embeddings(page: Page, cache: CacheFacts | None) -> Html:
    if cache is None:
        return note(NO_CACHE)
    if cache.map is None:
        return note("Not shown, as the embeddings could not be read. ", cache.notes["map"])
    cells = cache.map
    n = len(cells.is_control)
    sample = f"A sample of {n:,} of {cells.n_cells:,}" if n < cells.n_cells else f"All {n:,}"
    first, second = cells.explained
    umap = (
        "UMAP keeps neighbours, not distances."
        if "UMAP" in cells.places
        else "With umap-learn installed (the extra umap of sest) a UMAP stands here too."
    )
    parts = [
        paragraph(
            f"{sample} embedded cells (at most {MOST_CELLS:,} are drawn), as the head sees them. The two principal "
            f"components hold {first:.1%} and {second:.1%} of the variance: what they do not show may still be there. "
            f"{umap} The most frequent labels have a colour of their own."
        )
    ]
    plots = [
        page.buttons(f"{layout} of the embeddings, coloured by", {x: embedding_map(cells, layout, x) for x in LABELS})
        for layout in cells.places
    ]
    return join([*parts, grid(plots) if len(plots) > 1 else plots[0]])


# --- speed


def speed(run: RunFacts) -> Html:
    log = run.curves.log

    def finite(name: str) -> np.ndarray:
        values = log.get(name, np.zeros(0))
        return values[np.isfinite(values)]

    rate, wait, limit = finite("it_per_s"), finite("data_wait"), run.last("limit_it_per_s")
    memory, device_wait = run.last("memory_bytes"), finite("device_wait")
    half = rate[len(rate) // 2 :]
    steady = float(np.median(half)) if len(half) else None
    by = run.last("limited_by")
    rows: list[list[Any]] = [
        ["speed, median of the second half", f"{steady:.4g} it/s" if steady is not None else NOT_RECORDED],
        ["speed, last", f"{rate[-1]:.4g} it/s" if len(rate) else NOT_RECORDED],
        ["waiting for batches, mean share of the time", f"{wait.mean():.1%}" if len(wait) else NOT_RECORDED],
        ["waiting for batches, most", f"{wait.max():.1%}" if len(wait) else NOT_RECORDED],
        ["limit of the device for this step", f"{limit:.4g} it/s" if limit else NOT_RECORDED],
        ["what sets that limit", str(by) if by else NOT_RECORDED],
        ["share of the limit reached", f"{steady / limit:.0%}" if limit and steady is not None else NOT_RECORDED],
        ["memory", f"{memory / 1e9:.2f} GB" if memory else NOT_RECORDED],
    ]
    if len(device_wait):
        rows.insert(4, ["the loop waited for the GPU, mean share of the time", f"{device_wait.mean():.1%}"])
    return table(["what", "value"], rows)


# --- configuration


def configuration(run: RunFacts, cache: CacheFacts | None) -> Html:
    options = ["option", "this run", "default", "what it is"]
    every = [_option(run.config, field) for field in dataclasses.fields(TrainConfig)]
    changed = [row for row in every if row[1] != row[2]]
    return join(
        [
            element("h3", "Options that differ from the defaults"),
            table(options, changed) if changed else paragraph("None."),
            details("All options", table(options, every)),
            element("h3", "Where it comes from"),
            table(["what", "value"], _provenance(run, cache.attributes if cache is not None else {})),
            element("h3", "Splits"),
            _splits(cache),
        ]
    )


def _option(config: TrainConfig, field: dataclasses.Field[Any]) -> list[Any]:
    """Name, value, default and help of an option."""
    name = element("code", "--" + field.name.replace("_", "-"))
    return [name, getattr(config, field.name), field.default, str(field.metadata["help"])]


def _provenance(run: RunFacts, attributes: dict[str, Any]) -> list[list[Any]]:
    """attributes: of the cache; empty where it is not read."""
    state, kept = run.state, run.provenance
    encoder = state.get("encoder", {})
    rows = {
        "run folder": run.folder,
        "cache": run.cache,
        "encoder": encoder.get("name") or attributes.get("encoder"),
        "encoder sha256": encoder.get("sha256") or attributes.get("encoder_sha256"),
        "projection": encoder.get("projection") or attributes.get("projection"),
        "width of the embeddings": state.get("sizes", {}).get("dim") or attributes.get("dim"),
        "perturbation features": state.get("features", {}).get("source"),
        "scale of the targets": state.get("scale"),
        "target sum, counts a cell": state.get("target_sum"),
        "precision": state.get("precision"),
        "sest that trained": kept.get("sest_version"),
        "torch": kept.get("torch_version"),
        "sest that made the cache": attributes.get("sest_version"),
        "resumed from": kept.get("resumed_from"),
        "licence": encoder.get("licence") or attributes.get("licence") or "no note in the cache",
    }
    return [[what, value if isinstance(value, (int, float)) else str(value or "-")] for what, value in rows.items()]


def _splits(cache: CacheFacts | None) -> Html:
    if cache is None:
        return note(NO_CACHE)
    if cache.table is None:
        return note("Not shown, as the cells could not be read. ", cache.notes["table"])
    columns = ["dataset", "cell type", "split", "perturbations", "cells", "controls"]
    return table(
        columns,
        [[r.dataset, r.cell_type, r.split, r.n_perturbations, r.n_perturbed_cells, r.n_controls] for r in cache.table],
    )


def run_sections(page: Page, run: RunFacts, cache: CacheFacts | None, prefix: str = "") -> list[tuple[str, str, Html]]:
    """All sections of a run after its header: (id, title, content)."""
    made = [
        ("diagnosis", "Diagnosis", diagnosis(run.findings)),
        ("curves", "Curves", curves(page, run)),
        ("perturbations", "Held-out perturbations", perturbations(page, run, cache)),
        ("embeddings", "Embeddings", embeddings(page, cache)),
        ("speed", "Speed and its limit", speed(run)),
        ("configuration", "Configuration and provenance", configuration(run, cache)),
    ]
    return [(prefix + identity, title, content) for identity, title, content in made]
