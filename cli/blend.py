"""`sest blend`: how much head and baselines are to count in a run's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import options
from sest.cli.progress import ConsoleProgress
from sest.cli.train import show_blend
from sest.config import BlendConfig


@help_page("sest blend run", "sest blend run --checkpoint last")
@options(BlendConfig)
def blend(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, or one of its checkpoint folders")],
    **options: Any,
) -> None:
    """Fit how much the head and the baselines are to count in a run's predictions.

    On the run's validation pairs, as `sest train` does when it ends: for runs that were stopped, or that an earlier
    sest trained. The weights are kept in the checkpoint, in which nothing else changes.
    """
    config = BlendConfig.from_values(options, "the command line")
    from sest.training.blend import blend_run  # imports torch

    with ConsoleProgress():
        folder, sentences = blend_run(run, config)
    show_blend(sentences)
    console.say(f"Kept in {folder}.")
