"""`sest run`: one file of cells to a report, by the commands that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sest.cli import console
from sest.cli.embed import show_embedded
from sest.cli.evaluate import show_evaluation
from sest.cli.help import help_page
from sest.cli.info import show_facts
from sest.cli.options import options
from sest.cli.predict import show_prediction
from sest.cli.progress import ConsoleProgress
from sest.cli.report import show_report
from sest.cli.train import show_beginning, show_end
from sest.config import PipelineConfig, PredictConfig

if TYPE_CHECKING:
    from sest.pipeline.stages import Watcher

GROUPS = {
    "What is learned from": "splits perturbations pert_col cell_type_col batch_col gene_col control",
    "How cells are read": "layer modality counts labels",
    "How": "encoder head preset max_steps device seed",
}


@help_page(
    "sest run cells.h5ad --out results",
    "sest run cells.h5ad --out results --pert-col guide --control NT",
    usual="cells out splits perturbations pert_col cell_type_col batch_col gene_col control layer encoder head preset "
    "max_steps device",
)
@options(PipelineConfig, GROUPS)
def run(
    cells: Annotated[Path, typer.Argument(metavar="CELLS", help="one file of cells: .h5ad, .h5mu or .zarr")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="output: folder for everything; again: goes on where it stopped")
    ],
    **options: Any,
) -> None:
    """Embed, train, predict, evaluate and report, in one go.

    Each command that it stands for is shown as it would be typed. Running it again goes on where it stopped; what is
    finished is passed over, and a larger --max-steps trains on.

    Without --splits some perturbations are held out, or cell types where each has one perturbation.
    """
    from sest.pipeline.folder import run_pipeline  # imports torch

    with ConsoleProgress() as progress:
        result = run_pipeline(cells, out, options, shown_on(progress, out))
    console.say("")
    console.say(f"Everything is in {out}. The report: {result.plan.report}")


def shown_on(progress: ConsoleProgress, folder: Path) -> Watcher:
    """A Watcher that shows each stage as its command would.

    Args:
        folder: of everything.
    """
    from sest.pipeline.stages import EMBED, EVALUATE, PREDICT, REPORT, TRAIN, Watcher  # imports torch

    cache, trained, predicted = folder / "cache.zarr", folder / "run", folder / "predicted.h5ad"

    class Shown(Watcher):
        def command(self, line: str) -> None:
            progress.command(line)

        def passed_over(self, stage: str, made: Path) -> None:
            progress.note(f"Finished before, and passed over: {stage} ({made}).")

        def note(self, text: str) -> None:
            progress.note(text)

        def facts(self, cells: Path, facts: dict[str, Any]) -> None:
            show_facts(cells, facts)

        def started(self, data: Any, model: Any) -> None:
            show_beginning(progress, cache, trained, data, model)

        def logged(self, line: dict[str, Any]) -> None:
            progress.show(line)

        def finished(self, stage: str, result: Any) -> None:
            progress.end()
            if stage == EMBED:
                show_embedded(result, str(cache))
            elif stage == TRAIN:
                show_end(result, cache, trained)
            elif stage == PREDICT:
                show_prediction(result, predicted, PredictConfig())
            elif stage == EVALUATE:
                show_evaluation(result, "Held-out pairs: the model beside baselines")
            elif stage == REPORT:
                show_report(result)

    return Shown()
