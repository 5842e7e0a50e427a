"""`sest import`: an upstream checkpoint to one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sest.cli import console


def import_(
    source: Annotated[Path, typer.Argument(metavar="UPSTREAM.ckpt", help="checkpoint of `state tx train`")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder to write; must not exist")],
) -> None:
    """Import a checkpoint of upstream's `state tx train`.

    It becomes a checkpoint folder that predicts the same. The file is read without running anything in it.
    """
    from sest.import_upstream import import_checkpoint

    state = import_checkpoint(source, out)
    sizes = state["sizes"]
    console.say(
        f"{out}: step {state['step']:,}, {state['trainable_parameters']:,} parameters; embeddings {sizes['dim']}, "
        f"features {sizes['n_features']}, {sizes['n_genes']:,} genes."
    )
