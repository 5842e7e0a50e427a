"""`sest import` and `sest convert`: files of other programs to forms that sest reads fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sest.cli import console
from sest.cli.options import Force, options
from sest.config import EmbedConfig


def import_(
    source: Annotated[Path, typer.Argument(metavar="UPSTREAM.ckpt", help="checkpoint of `state tx train`")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder to write, new or empty")],
    force: Force = False,
) -> None:
    """Import a checkpoint of upstream's `state tx train`.

    It becomes a checkpoint folder that predicts the same. The file is read without running anything in it.
    """
    from sest.compat.import_upstream import import_checkpoint

    state = import_checkpoint(source, out, force=force)
    sizes = state["sizes"]
    console.say(
        f"{out}: step {state['step']:,}, {state['trainable_parameters']:,} parameters; embeddings {sizes['dim']}, "
        f"features {sizes['n_features']}, {sizes['n_genes']:,} genes."
    )


@options(EmbedConfig, {"Options": "weights"})
def convert(
    encoder: Annotated[Path, typer.Argument(metavar="ENCODER", help="SE folder, or its .ckpt file")],
    **options: Any,
) -> None:
    """Keep a safetensors copy beside an encoder's .ckpt, which loads in seconds.

    `sest embed` and `sest predict` read the copy from then on, while the .ckpt is unchanged.
    """
    from sest.se.weights import convert_encoder

    copy, made = convert_encoder(encoder, options.get("weights"))
    size = f"{copy.stat().st_size / 1e9:.2f} GB"
    if made:
        console.say(f"{copy}: written ({size}). It is read instead of the .ckpt from now on.")
    else:
        console.say(f"{copy} is there already ({size}), and a copy of the present .ckpt.")
