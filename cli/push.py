"""`sest push`: a head to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.progress import ConsoleProgress
from sest.options import CHECKPOINT


@help_page(
    "sest push run my-lab/my-head --card card.md",
    "sest push run my-lab/my-head --public",
)
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, or one of its checkpoint folders")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository on the Hugging Face hub")],
    checkpoint: Annotated[str | None, typer.Option(help=f"{CHECKPOINT}; default: best")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="make a new repository that everybody can read [default: private]")
    ] = False,
    card: Annotated[
        Path | None,
        typer.Option(help="write the model card to this file and push nothing, to read it first; default: none"),
    ] = None,
) -> None:
    """Push a head with a model card to the Hugging Face hub.

    Others then predict with hf://OWNER/NAME as RUN, or train on from there (train --init-from). The card says what the
    head was trained on, how it compares with baselines, and the licence of its encoder.
    """
    from sest.api import push as run_push

    with ConsoleProgress():
        address = run_push(run, repository, checkpoint=checkpoint, private=not public, card=card)
    console.say(f"{address}: {'the model card.' if card is not None else f'pushed. RUN is hf://{repository} now.'}")
