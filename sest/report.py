"""`sest report`: one HTML file about one run, or about several beside each other, that opens without a network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sest import __version__
from sest.cache.schema import write_durably
from sest.devices import choose_device
from sest.diagnose import Finding
from sest.errors import InputError
from sest.progress import Progress
from sest.report_data import RunFacts, StoreFacts, read_runs, read_store
from sest.report_page import Html, Page, element, join, section
from sest.report_sections import comparison, header, run_sections
from sest.run_folder import SCRATCH

REPORT = "report.html"
DEFAULT_SETS = 512  # of each split that are predicted


@dataclass(frozen=True)
class Report:
    """What was written."""

    path: Path
    n_bytes: int
    findings: dict[str, list[Finding]]  # by run
    notes: list[str]  # what was left out, and why


def write_report(
    runs: Sequence[Path],
    out: Path | None,
    progress: Progress,
    *,
    with_model: bool = True,
    n_sets: int = DEFAULT_SETS,
    device: str = "auto",
    cache: str | None = None,
    perturbations: str | None = None,
) -> Report:
    """Write the report.

    Args:
        runs: run folders; several are compared.
        out: the .html file; None: report.html in the run folder, of several runs in the working folder.
        with_model: also predict the held-out cells and map the embeddings, which needs the store.
        n_sets: sets of each split to predict at most, but one of every pair; 0: all.
        device: to predict on.
        cache, perturbations: where the store and the features file are now, if not where the runs say.

    Raises:
        InputError: no such run or device, or a place that cannot be written to. A store that cannot be used is no
            error: the page says so where it would have been needed.
    """
    facts = read_runs(runs, cache=cache, perturbations=perturbations)
    out = out or (facts[0].folder if len(facts) == 1 else Path()) / REPORT
    _check_writable(out)
    page, stores, chosen = Page(), list[StoreFacts | None](), choose_device(device)
    for run in facts:
        scratch = out.with_name(f".{out.name}.{SCRATCH}")  # used only where memory is too small
        stores.append(read_store(run, progress, n_sets=n_sets, device=chosen, scratch=scratch) if with_model else None)
    data = _page(page, facts, stores).encode()
    write_durably(out, data)
    notes = [f"{r.name}: {n}" for r, s in zip(facts, stores, strict=True) if s for n in dict.fromkeys(s.notes.values())]
    return Report(out, len(data), {run.name: run.findings for run in facts}, notes)


def _check_writable(out: Path) -> None:
    """Refuse a place that no report can be written to, or where it would replace something else."""
    if out.suffix != ".html":
        raise InputError(f"{out} does not end in .html. Pass --out with a file name that does.")
    if out.is_dir():
        raise InputError(f"{out} is a folder. Pass --out with the name of a file.")
    if not out.parent.is_dir():
        raise InputError(f"No folder {out.parent} to write {out.name} in. Create it first, or pass another --out.")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"Cannot write to {out.parent}. Pass another --out.")


def _page(page: Page, runs: Sequence[RunFacts], stores: Sequence[StoreFacts | None]) -> str:
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
    for number, (run, store) in enumerate(zip(runs, stores, strict=True), 1):
        prefix = f"run-{number}-" if several else ""
        sections = run_sections(page, run, store, prefix)
        made = join(section(identity, name, body, level=3 if several else 2) for identity, name, body in sections)
        date = element("p", f"Last step logged {run.written:%d %B %Y, %H:%M} UTC.", class_="quiet")
        if several:
            identity = f"run-{number}"
            contents.append((identity, run.name))
            parts.append(element("div", section(identity, run.name, date, header(run, store)), made, class_="run"))
        else:
            contents = [(identity, name) for identity, name, _ in sections]
            parts += [element("h1", title), date, header(run, store), made]
    footer = f"Written by sest {__version__} on {now:%d %B %Y, %H:%M} UTC. This file loads nothing from the network."
    parts.append(element("footer", footer))
    return page.whole(f"{title} - sest report", contents, join(parts))
