"""The sections of `sest report`: what each shows, in words, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sest.curves import BASELINES, HIGHER_IS_BETTER, METRICS
from sest.diagnose import GOOD, NOTE, WARNING, Finding
from sest.embedding_map import LABELS, MOST_CELLS, EmbeddingMap
from sest.features import ONE_HOT
from sest.report_data import (
    PairResults,
    RunFacts,
    Score,
    StoreFacts,
    all_options,
    changed_options,
    different_tasks,
    differing_options,
    ranking,
    same_baselines,
)
from sest.report_figures import (
    MOST_GENES,
    MOST_PAIRS,
    MOST_POINTS,
    MOST_ROWS,
    choosable,
    embedding_map,
    gene_scatter,
    log_curve,
    overlaid,
    overview,
    pair_name,
    ranked,
    validation_curve,
)
from sest.report_page import Html, Page, details, element, grid, join, note, paragraph, table

WORDS = {GOOD: "Good", NOTE: "Note", WARNING: "Warning"}
MEANINGS = {
    "val_loss": "energy distance between predicted and real held-out cells; lower is better",
    "pearson_delta": "correlation over genes of predicted and observed change; higher is better",
    "mae": "mean absolute error of the mean log1p expression; lower is better",
    "pds": "how well perturbations are told apart by the predictions, 0.5 is chance; higher is better",
}
NO_STORE = "Left out: it needs the store and the model, and --no-model was given."
NOT_RECORDED = "not recorded"
EXTREMES = 5  # worst and best pairs in tables of their own


# --- header


def header(run: RunFacts, store: StoreFacts | None) -> Html:
    """What the run is, in one sentence, and its headline figures."""
    return join([paragraph(sentence(run, store)), _cards(run), _score_table(run)])


def sentence(run: RunFacts, store: StoreFacts | None) -> str:
    """What the run is, in one sentence."""
    state, done = run.state, f"trained for {run.step:,} of {run.config.max_steps:,} steps"
    if not state:
        return f"A State Transition head, {done}; it has no checkpoint that can be read."
    encoder, sizes, source = state["encoder"], state["sizes"], state["features"]["source"]
    features = "one-hot features" if source == ONE_HOT else f"the features in {source}"
    cells = f" of {store.map.n_cells:,} cells" if store is not None and store.map is not None else ""
    return (
        f"A State Transition head with {state['trainable_parameters']:,} parameters that predicts the expression of "
        f"{sizes['n_genes']:,} genes after a perturbation, from embeddings{cells} by {encoder['name']} ({sizes['dim']} "
        f"numbers a cell) and {features} of the perturbation; {done}."
    )


def _cards(run: RunFacts) -> Html:
    scores = run.scores()
    if not scores:
        return note("No validation yet, so there is nothing to hold against the baselines.")
    loss = scores[0]
    cards = [_card(f"{loss.head:.4g}", f"best val_loss, at step {run.best_step:,}")]
    for baseline, words in (("perturbation_mean", "the perturbation mean"), ("controls", "predicting the controls")):
        other = loss.baselines[baseline]
        verdict = element("span", "beaten" if loss.beats(baseline) else "not beaten", class_=_yes(loss.beats(baseline)))
        cards.append(_card(f"{other:.4g}" if np.isfinite(other) else "-", "val_loss of ", words, ": ", verdict))
    return element("div", *cards, class_="cards")


def _card(figure: str, *words: Any) -> Html:
    return element("div", element("b", figure), element("span", *words), class_="card")


def _yes(beats: bool) -> str:
    return "yes" if beats else "no"


def _score_table(run: RunFacts) -> Html:
    scores = run.scores()
    if not scores:
        return Html("")
    columns = ["metric", f"head, step {run.best_step:,}", "perturbation mean", "controls", "beats both", "what it is"]
    return table(columns, [_score_row(score) for score in scores])


def _score_row(score: Score) -> list[Any]:
    beats = all(score.beats(name) for name in score.baselines)
    equals = not beats and all(score.beats(name) or score.head == v for name, v in score.baselines.items())
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
            element("b", _sentence_case(finding.name)),
            paragraph(finding.evidence),
            *([paragraph(finding.advice)] if finding.advice else []),
            class_=finding.level,
        )
        for finding in findings
    ]
    return element("ul", *items, class_="findings")


def _sentence_case(words: str) -> str:
    return words[:1].upper() + words[1:]


# --- curves


def curves(page: Page, run: RunFacts) -> Html:
    log = run.curves.log
    most = max(len(log["step"]), len(run.curves.validation["step"]))
    thinned = f"Curves show at most {MOST_POINTS:,} points, tables {MOST_ROWS} rows." if most > MOST_ROWS else ""
    metrics = [
        page.plot(f"{metric}, {_direction(metric)} is better", validation_curve(run, metric)) for metric in METRICS
    ]
    loss = page.plot("Training loss", log_curve(run.curves, "loss", "loss"))
    norm = page.plot("Gradient norm, before clipping", log_curve(run.curves, "grad_norm", "norm"))
    rate = page.plot("Speed", log_curve(run.curves, "it_per_s", "it/s", limit="limit_it_per_s"))
    key = element(
        "p",
        *(element("span", words) for words in ("head", "perturbation mean", "controls", "best step")),
        class_="key",
    )
    parts = [grid([loss, metrics[0]]), grid(metrics[1:], three=True), grid([norm, rate])]
    if run.best() is not None:
        parts.insert(0, key)
    return join([*([paragraph(thinned)] if thinned else []), *parts])


def _direction(metric: str) -> str:
    return "higher" if metric in HIGHER_IS_BETTER else "lower"


# --- held-out perturbations


def perturbations(page: Page, run: RunFacts, store: StoreFacts | None) -> Html:
    if store is None:
        return note(NO_STORE)
    if store.pairs is None:
        return note("Not shown, as the held-out cells could not be predicted. ", store.notes["pairs"])
    assert run.checkpoint is not None
    parts = [
        paragraph(
            f"The held-out cells as {run.checkpoint.folder.name}/ (step {run.checkpoint.state['step']:,}) predicts "
            "them, one line a cell type and perturbation. A change is a mean log1p expression minus that of the "
            "controls."
        )
    ]
    parts += [_means(result) for result in store.pairs]
    parts.append(page.plot("Effect and how well it is predicted, one dot a perturbation", overview(store.pairs)))
    parts.append(_genes(page, store.pairs, store.genes))
    parts += [_pair_tables(result) for result in store.pairs]
    return join(parts)


def _means(result: PairResults) -> Html:
    scores = {name: float(values.mean()) for name, values in result.scores.items()}
    sets = f"{result.n_sets:,} of its {result.of_sets:,} sets" if result.n_sets < result.of_sets else "all its sets"
    return paragraph(
        element("b", f"{_sentence_case(result.split)} split"),
        f": {len(result.perturbations):,} pairs, {int(result.n_cells.sum()):,} cells ({sets} predicted). Means: "
        f"pearson_delta {scores['pearson_delta']:.3f} (perturbation mean {scores['perturbation_mean']:.3f}), "
        f"mae {scores['mae']:.4g}, pds {scores['pds']:.3f}.",
    )


def _genes(page: Page, results: Sequence[PairResults], genes: Sequence[str]) -> Html:
    pairs = choosable(results)
    figures = {}
    for result, k in pairs:
        score = float(result.scores["pearson_delta"][k])
        name = f"{pair_name(result, k)} ({result.split}, {score:.2f})"
        figures[name] = gene_scatter(result, k, genes)
    n_all = sum(len(result.perturbations) for result in results)
    limit = f" To choose from: the worst and the best {MOST_PAIRS // 2} pairs." if n_all > MOST_PAIRS else ""
    shown = f"The {MOST_GENES} genes" if len(genes) > MOST_GENES else f"All {len(genes):,} genes"
    largest = " with the largest observed or predicted change" if len(genes) > MOST_GENES else ""
    return join(
        [
            element("h3", "Predicted against observed change, one dot a gene"),
            paragraph(
                f"{shown}{largest}; on the dashed line a prediction is right. The list is ordered from the worst to "
                f"the best pearson_delta.{limit}"
            ),
            page.choices(["Worst predicted, or another", "Best predicted, or another"], [0, len(figures) - 1], figures),
        ]
    )


def _pair_tables(result: PairResults) -> Html:
    order = ranked(result)
    columns = ["perturbation", "cell type", "cells", "pearson_delta", "perturbation mean", "mae", "pds", "effect"]

    def rows(chosen: np.ndarray) -> list[list[Any]]:
        scores = result.scores
        return [
            [
                result.perturbations[k],
                result.cell_types[k],
                int(result.n_cells[k]),
                *(float(scores[name][k]) for name in ("pearson_delta", "perturbation_mean", "mae", "pds")),
                float(result.effect[k]),
            ]
            for k in chosen
        ]

    split = _sentence_case(result.split)
    if len(order) < 2 * EXTREMES:
        return join([element("h3", f"{split} split: all pairs, the worst first"), table(columns, rows(order))])
    return join(
        [
            element("h3", f"{split} split: the {EXTREMES} worst"),
            table(columns, rows(order[:EXTREMES])),
            element("h3", f"{split} split: the {EXTREMES} best"),
            table(columns, rows(order[::-1][:EXTREMES])),
            details(f"All {len(order):,} pairs of the {result.split} split", table(columns, rows(order))),
        ]
    )


# --- the embeddings


def embeddings(page: Page, store: StoreFacts | None) -> Html:
    if store is None:
        return note(NO_STORE)
    if store.map is None:
        return note("Not shown, as the embeddings could not be read. ", store.notes["map"])
    cells: EmbeddingMap = store.map
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


def configuration(run: RunFacts, store: StoreFacts | None) -> Html:
    options = ["option", "this run", "default", "what it is"]
    changed = [[_option(n), v, default, words] for n, (v, default, words) in changed_options(run.config).items()]
    every = [[_option(n), v, default, words] for n, (v, default, words) in all_options(run.config).items()]
    state = run.state
    encoder = state.get("encoder", {})
    attributes = store.attributes if store is not None else {}
    kept = run.provenance
    rows: list[list[Any]] = [
        ["run folder", str(run.folder)],
        ["store", run.cache or None],
        ["encoder", encoder.get("name") or attributes.get("encoder")],
        ["encoder sha256", encoder.get("sha256") or attributes.get("encoder_sha256")],
        ["projection", encoder.get("projection") or attributes.get("projection")],
        ["width of the embeddings", state.get("sizes", {}).get("dim") or attributes.get("dim")],
        ["perturbation features", state.get("features", {}).get("source")],
        ["scale of the targets", state.get("scale")],
        ["target sum, counts a cell", state.get("target_sum")],
        ["precision", state.get("precision")],
        ["sest that trained", kept.get("sest_version")],
        ["torch", kept.get("torch_version")],
        ["sest that made the store", attributes.get("sest_version")],
        ["resumed from", kept.get("resumed_from") or None],
        ["licence", encoder.get("licence") or attributes.get("licence") or "no note in the store"],
    ]
    return join(
        [
            element("h3", "Options that differ from the defaults"),
            table(options, changed) if changed else paragraph("None."),
            details("All options", table(options, every)),
            element("h3", "Where it comes from"),
            table(
                ["what", "value"],
                [[what, value if isinstance(value, (int, float)) else str(value or "-")] for what, value in rows],
            ),
            element("h3", "Splits"),
            _splits(store),
        ]
    )


def _option(name: str) -> Html:
    return element("code", "--" + name.replace("_", "-"))


def _splits(store: StoreFacts | None) -> Html:
    if store is None:
        return note(NO_STORE)
    if store.table is None:
        return note("Not shown, as the cells could not be read. ", store.notes["store"])
    columns = ["dataset", "cell type", "split", "perturbations", "cells", "controls"]
    return table(
        columns,
        [[r.dataset, r.cell_type, r.split, r.n_perturbations, r.n_perturbed_cells, r.n_controls] for r in store.table],
    )


def run_sections(page: Page, run: RunFacts, store: StoreFacts | None, prefix: str = "") -> list[tuple[str, str, Html]]:
    """All sections of a run after its header: (id, title, content)."""
    made = [
        ("diagnosis", "Diagnosis", diagnosis(run.findings)),
        ("curves", "Curves", curves(page, run)),
        ("perturbations", "Held-out perturbations", perturbations(page, run, store)),
        ("embeddings", "Embeddings", embeddings(page, store)),
        ("speed", "Speed and its limit", speed(run)),
        ("configuration", "Configuration and provenance", configuration(run, store)),
    ]
    return [(prefix + identity, title, content) for identity, title, content in made]


# --- several runs


def comparison(page: Page, runs: Sequence[RunFacts]) -> Html:
    listed, parts = list(runs), [paragraph(ranking(list(runs)))]
    if different := different_tasks(listed):
        warning = (
            f"These runs differ in {', '.join(different)}: their losses are not measured on the same task, so which is "
            "lower says little."
        )
        parts.append(
            element(
                "ul",
                element("li", element("span", WORDS[WARNING], class_="level"), warning, class_=WARNING),
                class_="findings",
            )
        )
    rows: list[list[Any]] = []
    for run in runs:
        heads: list[Any] = [score.head for score in run.scores()]
        rows.append([run.name, run.best_step, *(heads or [None] * len(METRICS))])
    alone = same_baselines(listed)
    validated = [run for run in runs if run.scores()]
    for run in validated[:1] if alone else validated:
        of = "" if alone else f" for {run.name}"
        for name in BASELINES:
            rows.append([f"{name.replace('_', ' ')}{of}", None, *(s.baselines[name] for s in run.scores())])
    parts += [element("h3", "At the best validation"), table(["run or baseline", "step", *METRICS], rows)]
    figures = [
        page.plot(f"{name}{said}", overlaid(runs, kind, name))
        for kind, name, said in (
            ("validation", "val_loss", ", lower is better"),
            ("log", "loss", " in training"),
            *(("validation", metric, f", {_direction(metric)} is better") for metric in METRICS[1:]),
            ("log", "it_per_s", ", steps a second"),
        )
    ]
    options = [[name, *values] for name, values in differing_options(listed).items()]
    parts += [
        grid(figures),
        element("h3", "What differs"),
        table(["option or fact", *(run.name for run in runs)], [[a, *map(_plain, b)] for a, *b in options])
        if options
        else paragraph("No option differs."),
    ]
    return join(parts)


def _plain(value: Any) -> Any:
    return "-" if value is None else value if isinstance(value, (bool, int, float)) else str(value)
