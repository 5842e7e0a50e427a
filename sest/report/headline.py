"""What a reader sees first: what the run is, and how it stands beside doing nothing and beside baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sest.data.vectors import DRUGS, GENES, ONE_HOT
from sest.facts.cache import CacheFacts
from sest.facts.run import RunFacts
from sest.facts.scores import HIGHER, MODEL, Score, Scoreboard
from sest.report.page import Html, element, join, note, paragraph, sentence_case, text

MEANINGS = {
    "val_loss": "training loss of held-out cells",
    "energy_distance": "between predicted and real cells",
    "pearson_delta": "correlation over genes of predicted and real change",
    "pearson_delta_independent": "the same, each change from another half of the controls",
    "mae": "mean absolute error of the mean log1p expression",
    "pds": "how well perturbations are told apart; chance is 0.5",
    "des": "overlap of the differentially expressed genes",
}
REAL_HALF = "half of the real cells"


def header(run: RunFacts, cache: CacheFacts | None, boards: Sequence[Scoreboard]) -> Html:
    """boards: what the run scores, the most telling first."""
    if not boards:
        none = note("No validation yet, so there is nothing to hold against the baselines.")
        return join([paragraph(sentence(run, cache)), none])
    return join([paragraph(sentence(run, cache)), verdict(boards[0]), cards(boards[0])])


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


def verdict(board: Scoreboard) -> Html:
    """How the model stands, said before any figure."""
    lead, behind = board.verdict()
    kind = "note"
    if not board.no_measure:
        kind = "warning" if lead.startswith("Worse") else "good" if "every baseline on all" in lead else "note"
    pairs = f"{board.n_pairs:,} pairs (perturbation and cell type): " if board.n_pairs else ""
    said = [f"{sentence_case(board.of)}, {pairs}{board.by}."]
    if board.no_effect and not board.no_measure:
        said.append(f"Left out, as their real cells show no measurable effect: {', '.join(board.no_effect)}.")
    if not board.is_measured and not board.no_measure:
        said.append("Whether these cells show an effect that can be measured is not known before `sest evaluate`.")
    parts = [paragraph(element("b", lead)), *([paragraph(behind)] if behind else []), paragraph(" ".join(said))]
    return element("div", *parts, class_=f"verdict {kind}")


def cards(board: Scoreboard) -> Html:
    """A card a metric: the model and every baseline, the best first."""
    made = [card(score, board) for score in board.judged]
    return element("div", *made, class_="cards")


def card(score: Score, board: Scoreboard) -> Html:
    values = {MODEL: score.model, **score.known}
    if math.isfinite(board.real_half.get(score.metric, math.nan)):
        values[REAL_HALF] = board.real_half[score.metric]
    order = sorted(values, key=lambda name: values[name] * (-1 if score.metric in HIGHER else 1))
    largest = max(map(abs, values.values())) or 1.0
    rows = []
    for name in order:
        kind = {MODEL: " mine", REAL_HALF: " half"}.get(name, "")
        words = {MODEL: "this model"}.get(name, name.replace("_", " "))
        width = f"width:{100 * max(values[name], 0.0) / largest:.1f}%"
        rows += [
            element("span", words, class_=f"name{kind}"),
            element("span", class_=f"bar{kind}", style=width),
            element("span", text(float(values[name])), class_=f"value{kind}"),
        ]
    direction = "higher" if score.metric in HIGHER else "lower"
    meaning = f"{MEANINGS.get(score.metric, score.metric)}; {direction} is better"
    heading = element("h3", score.metric.replace("_", " ") if score.metric != "val_loss" else score.metric)
    return element(
        "div", heading, element("p", meaning), _word(score, board), element("div", *rows, class_="bars"), class_="card"
    )


def _word(score: Score, board: Scoreboard) -> Html:
    """Whether a score is a win."""
    if board.no_measure:
        return element("p", "no measure")
    if score.beats_all:
        return element("p", element("span", "better than every baseline", class_="yes"))
    if score.against("controls") < 0:
        return element("p", element("span", "worse than doing nothing", class_="no"))
    if score.is_level:
        return element("p", element("span", f"level with {_plain(score.best)}"))
    return element("p", element("span", f"behind {_plain(score.best)}", class_="no"))


def _plain(name: str | None) -> str:
    return str(name).replace("_", " ")
