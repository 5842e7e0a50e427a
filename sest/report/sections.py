"""The sections on one run: what each shows, in words, tables and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sest.config import TrainConfig
from sest.facts.cache import CacheFacts
from sest.facts.embeddings import LABELS, MOST_CELLS
from sest.facts.run import RunFacts
from sest.facts.scores import Score, Scoreboard
from sest.report.figures import MOST_POINTS, MOST_ROWS, embedding_map, log_curve, validation_curve
from sest.report.held_out import NO_CACHE, perturbations
from sest.report.page import Html, Page, details, element, grid, join, note, paragraph, sentence_case, table
from sest.runs.curves import HIGHER_IS_BETTER, METRICS, steady_speed
from sest.runs.diagnose import GOOD, NOTE, WARNING, Finding

WORDS = {GOOD: "Good", NOTE: "Note", WARNING: "Warning"}
NOT_RECORDED = "not recorded"


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
    parts = [grid([loss, metrics[0]]), grid(metrics[1:], three=True), grid([norm, rate])]
    if (board := run.validation()) is not None:
        who = "Stack of baselines" if run.config.head == "none" else f"Head alone at step {run.best_step:,}"
        parts += [element("h3", f"{who}, beside every baseline"), _score_table(board)]
    return join([*([paragraph(thinned)] if thinned else []), *parts])


def _score_table(board: Scoreboard) -> Html:
    columns = ["metric", "this", *(name.replace("_", " ") for name in board.scores[0].baselines), "beats all"]
    return table(columns, [_score_row(score, board) for score in board.scores])


def _score_row(score: Score, board: Scoreboard) -> list[Any]:
    verdict: Any = None
    if not board.no_measure and np.isfinite(score.model):
        word, kind = ("yes", "yes") if score.beats_all else ("level", "") if score.is_level else ("no", "no")
        verdict = element("span", word, class_=kind)
    return [score.metric, score.model, *score.baselines.values(), verdict]


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
    umap = "UMAP keeps neighbours, not distances. " if "UMAP" in cells.places else ""
    parts = [
        paragraph(
            f"{sample} embedded cells (at most {MOST_CELLS:,} are drawn), as the head sees them. The two principal "
            f"components hold {first:.1%} and {second:.1%} of the variance: what they do not show may still be there. "
            f"{umap}The most frequent labels have a colour of their own."
        )
    ]
    plots = [
        page.buttons(
            f"{layout} of the embeddings, coloured by",
            {label: embedding_map(cells, layout, label) for label in LABELS},
            by="Colour by",
        )
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
    steady = steady_speed(log)
    by = run.last("limited_by")
    rows: list[list[Any]] = [
        ["speed, median of the second half", f"{steady.it_per_s:.4g} it/s" if steady is not None else NOT_RECORDED],
        ["speed, last", f"{rate[-1]:.4g} it/s" if len(rate) else NOT_RECORDED],
        ["waiting for batches, mean share of the time", f"{wait.mean():.1%}" if len(wait) else NOT_RECORDED],
        ["waiting for batches, most", f"{wait.max():.1%}" if len(wait) else NOT_RECORDED],
        ["limit of the device for this step", f"{limit:.4g} it/s" if limit else NOT_RECORDED],
        ["what sets that limit", str(by) if by else NOT_RECORDED],
        ["share of the limit reached", f"{steady.share:.0%}" if limit and steady is not None else NOT_RECORDED],
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


def run_sections(
    page: Page, run: RunFacts, cache: CacheFacts | None, boards: Sequence[Scoreboard], prefix: str = ""
) -> list[tuple[str, str, Html]]:
    """All sections of a run after its header: (id, title, content). boards: what is scored pair by pair."""
    made = [
        ("perturbations", "Held-out perturbations", perturbations(page, run, cache, boards)),
        ("diagnosis", "Diagnosis", diagnosis(run.findings)),
        ("curves", "Curves", curves(page, run)),
        ("embeddings", "Embeddings", embeddings(page, cache)),
        ("speed", "Speed and its limit", speed(run)),
        ("configuration", "Configuration and provenance", configuration(run, cache)),
    ]
    return [(prefix + identity, title, content) for identity, title, content in made]
