"""`sest report`: one HTML file about one run, or about several beside each other, that opens without a network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sest import __version__
from sest.blend.blend import STACK
from sest.cache.disk import write_durably
from sest.config import ReportConfig
from sest.errors import InputError
from sest.evaluation.results import Evaluation, read_evaluation
from sest.facts.cache import CacheFacts, read_cache
from sest.facts.run import RunFacts, read_runs
from sest.facts.scores import Scoreboard, made_by, of_evaluation, of_pairs
from sest.machine import jit
from sest.machine.devices import choose_device
from sest.outputs import check_output
from sest.report.comparison import comparison
from sest.report.headline import header
from sest.report.page import GENERATOR, Html, Page, element, join, section
from sest.report.sections import run_sections
from sest.runs.diagnose import Finding
from sest.runs.provenance import files_of
from sest.runs.run_folder import seeds_of
from sest.runs.schema import MODEL

REPORT = "report.html"
EVALUATION = "evaluation"  # folder in a run, or beside it
HEAD = 4096  # bytes of a page within which it says what made it


@dataclass(frozen=True)
class Report:
    """What was written."""

    path: Path
    n_bytes: int
    findings: dict[str, list[Finding]]  # by run
    notes: list[str]  # what was left out, and why


def refuse_without_plotly() -> None:
    """Refuse to draw where there is nothing to draw with.

    Raises:
        InputError: plotly is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        raise InputError("A report needs plotly, which is not installed. Run pip install plotly.")


def write_report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    with_model: bool = ReportConfig.model,
    n_sets: int = ReportConfig.sets,
    device: str = ReportConfig.device,
    cache: str | os.PathLike[str] | None = None,
    perturbations: str | os.PathLike[str] | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    umap: bool = ReportConfig.umap,
    force: bool = False,
) -> Report:
    """Write the report.

    Args:
        runs: a run folder, or several to compare, such as those in a folder of `sest train --seeds`.
        out: the .html file; None: report.html in the run folder, of several runs in the working folder.
        with_model: also predict the held-out cells and map the embeddings, which needs the cache.
        n_sets: sets of each split to predict at most, but one of every pair; 0: all.
        device: to predict on: auto, cpu, cuda or cuda:N.
        cache, perturbations: where the cache and the features file are now, if not where the runs say.
        evaluation: folder that `sest evaluate` wrote about the run's prediction; None: `evaluation` in or beside the
            run folder, if it is of the checkpoint that is reported.
        umap: draw a UMAP of the embeddings too.
        force: replace `out` where it exists. At its default place an older report is replaced without it.

    Raises:
        InputError: no plotly, no such run, device or evaluation, several runs with one evaluation, no umap-learn for a
            UMAP, or a place that cannot or must not be written to (see `check_output`). A cache that cannot be used is
            no error: the page says so where it would have been needed.
    """
    refuse_without_plotly()
    given = [Path(folder) for folder in ([runs] if isinstance(runs, (str, os.PathLike)) else runs)]
    facts = read_runs(
        [run for folder in given for run in (seeds_of(folder) or [folder])],
        cache=None if cache is None else os.fspath(cache),
        perturbations=None if perturbations is None else os.fspath(perturbations),
    )
    scored = _evaluations(facts, evaluation)
    if umap and importlib.util.find_spec("umap") is None:
        raise InputError("--umap needs umap-learn. Run pip install 'sest[umap]'.")
    if umap and jit.REASON:
        raise InputError(f"--umap needs umap-learn, and that needs numba, which is not here ({jit.REASON}).")
    place = Path(out) if out is not None else (facts[0].folder if len(facts) == 1 else Path()) / REPORT
    check_output(
        place,
        inputs=[cache, perturbations, evaluation, *(file for run in facts for file in files_of(run.folder))],
        force=force or (out is None and _is_report(place)),
        suffixes=(".html",),
    )
    page, caches, chosen = Page(), list[CacheFacts | None](), choose_device(device)
    for run in facts:
        caches.append(read_cache(run, n_sets=n_sets, device=chosen, umap=umap) if with_model else None)
    data = _page(page, facts, caches, scored).encode()
    write_durably(place, data)
    notes = [f"{r.name}: {n}" for r, c in zip(facts, caches, strict=True) if c for n in dict.fromkeys(c.notes.values())]
    return Report(place, len(data), {run.name: run.findings for run in facts}, notes)


def _evaluations(runs: Sequence[RunFacts], given: str | os.PathLike[str] | None) -> list[Evaluation | None]:
    """The evaluation of each run, None where there is none."""
    if given is not None and len(runs) > 1:
        raise InputError(f"--evaluation {os.fspath(given)} is of one prediction, and {len(runs)} runs are given.")
    return [read_evaluation(given) if given is not None else _found(run) for run in runs]


def _found(run: RunFacts) -> Evaluation | None:
    """The evaluation in or beside a run folder, if its cells were predicted by the checkpoint that is reported."""
    if run.checkpoint is None:
        return None
    state = run.state
    mine = {"step": state["step"], "model_sha256": state["files"].get(MODEL, ""), "cache_sha256": state["cache_sha256"]}
    for folder in (run.folder / EVALUATION, run.folder.parent / EVALUATION):
        try:
            found = read_evaluation(folder)
        except InputError:
            continue
        if {key: made_by(found).get(key) for key in mine} == mine:
            return found
    return None


def _boards(run: RunFacts, cache: CacheFacts | None, evaluation: Evaluation | None) -> list[Scoreboard]:
    """What is scored: evaluated cells, else the test split as it is predicted here; then the val split; the validation.

    A run without a head is not held against the stack, which it is.
    """
    has_head = run.config.head != "none"
    boards = [of_evaluation(evaluation)] if evaluation is not None else []
    for result in reversed(cache.pairs or []) if cache is not None else ():
        if result.split == "val" or evaluation is None:
            assert run.checkpoint is not None
            by = "head and baselines together" if run.checkpoint.has_blend else "the head"
            by = by if has_head else "the baselines"
            boards.append(of_pairs(result.scores, of=f"{result.split} split", by=f"{by}, as predicted for this page"))
    if (validation := run.validation()) is not None:
        boards.append(validation)
    return boards if has_head else [board.without(STACK) for board in boards]


def _is_report(path: Path) -> bool:
    """Whether a file is a report that sest wrote."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return GENERATOR.encode() in file.read(HEAD)


def _page(
    page: Page,
    runs: Sequence[RunFacts],
    caches: Sequence[CacheFacts | None],
    evaluations: Sequence[Evaluation | None],
) -> str:
    now = datetime.now(UTC)
    several, parts, contents = len(runs) > 1, list[Html](), list[tuple[str, str]]()
    if several:
        title = f"{len(runs)} runs compared"
        parts += [
            element("h1", title),
            element("p", f"{', '.join(run.name for run in runs)}. Written {now:%d %B %Y}.", class_="quiet"),
            section("comparison", "Comparison", comparison(page, runs)),
        ]
        contents.append(("comparison", "Comparison"))
    else:
        title = runs[0].name
    for number, (run, cache, evaluation) in enumerate(zip(runs, caches, evaluations, strict=True), 1):
        prefix, boards = f"run-{number}-" if several else "", _boards(run, cache, evaluation)
        top = header(run, cache, boards)
        sections = run_sections(page, run, cache, [board for board in boards if board.pairs is not None], prefix)
        made = join(section(identity, name, body, level=3 if several else 2) for identity, name, body in sections)
        date = element("p", f"Last step logged {run.written:%d %B %Y, %H:%M} UTC.", class_="quiet")
        if several:
            identity = f"run-{number}"
            contents.append((identity, run.name))
            parts.append(element("div", section(identity, run.name, date, top), made, class_="run"))
        else:
            contents = [(identity, name) for identity, name, _ in sections]
            parts += [element("h1", title), date, top, made]
    footer = f"Written by sest {__version__} on {now:%d %B %Y, %H:%M} UTC. This file loads nothing from the network."
    parts.append(element("footer", footer))
    return page.whole(f"{title} - sest report", contents, join(parts))
