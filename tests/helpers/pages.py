"""What the tests of `sest report` share: a page as a browser reads it, a run with hostile names, and facts of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from helpers.caches import CellGroup
from helpers.configs import small_config
from helpers.runs import metrics
from sest.facts.run import RunFacts
from sest.report.write import write_report
from sest.runs.curves import curves_of

HOSTILE = "<script>alert(1)</script>"
CELL_TYPE = "y<img src=x onerror=alert(2)>"
SIZES = {"P": 8, "Q": 5, "S": 6, "T": 9, HOSTILE: 7}
SPLITS = f"""
[datasets]
screen = "screen.h5ad"
[training]
screen = "train"
[fewshot."screen.x"]
val = ["P", "{HOSTILE}", "T"]
test = ["Q"]
[fewshot."screen.{CELL_TYPE}"]
val = ["S"]
"""


@dataclass
class Opened(HTMLParser):
    """A page as a browser reads it: its text, its elements with their attributes, and the figures."""

    source: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    words: str = ""
    inside: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.figures: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        self.words += " "

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words += data

    def curve(self, y: str, number: int = 0) -> dict[int, float | None]:
        """Step -> value of a curve of the first figure with this y axis."""
        plots = [figure for figure in self.figures.values() if "layout" in figure]
        plot = next(f for f in plots if f["layout"]["yaxis"]["title"]["text"] == y)
        return dict(zip(plot["data"][number]["x"], plot["data"][number]["y"], strict=True))

    def section(self, identity: str) -> str:
        """The HTML of a section."""
        return self.source.split(f'id="{identity}"')[1].split("</section>")[0]


def opened(path: Path) -> Opened:
    return Opened(path.read_text())


@dataclass(frozen=True)
class Trained:
    """A run of 12 steps on a tiny cache, with a val and a test split and hostile names."""

    group: CellGroup
    cache: Path
    run: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return metrics(self.run, timed=True)

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "val_loss" in line]

    @property
    def best(self) -> dict[str, Any]:
        return min(self.validations, key=lambda line: line["val_loss"])


def brief(run: Path, **options: Any) -> Opened:
    """The report of a run without its cache."""
    write_report([run], run / "report.html", with_model=False, force=True, **options)
    return opened(run / "report.html")


def rewrite(run: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def facts(name: str, lines: Sequence[dict[str, Any]] = (), **changes: Any) -> RunFacts:
    """What a run folder without a checkpoint says, by the lines of its metrics.jsonl; `changes` are of its options."""
    return RunFacts(
        folder=Path("/runs", name),
        name=name,
        written=datetime(2026, 1, 2, tzinfo=UTC),
        config=small_config(**changes),
        provenance={"cache": "/cells.zarr"},
        lines=list(lines),
        curves=curves_of(lines),
        findings=[],
        checkpoint=None,
        problem="none yet",
    )


def validation(step: int, val_loss: float, mean: float = 2.0, controls: float = 3.0) -> dict[str, Any]:
    """A line of a validation, with the val_loss of both baselines."""
    baselines = {"val_loss_perturbation_mean": mean, "val_loss_controls": controls}
    return {"step": step, "val_loss": val_loss, **baselines}
