"""`sest import` and `sest convert`: files of other programs to forms that sest reads fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import Force, options
from sest.cli.progress import ConsoleProgress
from sest.config import EmbedConfig, TrainConfig
from sest.errors import InputError
from sest.options import CHECKPOINT, TARGET_SUM

USUAL = float(TrainConfig().target_sum)


@help_page("sest import ST-HVG-Replogle imported", "sest import final.ckpt imported --target-sum 5000")
def import_(
    source: Annotated[
        Path,
        typer.Argument(metavar="UPSTREAM", help="run folder of `state tx train`, as on the hub, or its .ckpt"),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder to write, new or empty")],
    target_sum: Annotated[
        float, typer.Option(help=f"{TARGET_SUM}; upstream's files do not say it", show_default=True)
    ] = USUAL,
    batch: Annotated[
        str | None,
        typer.Option(help="of a head with a batch encoder: the batch whose cells it is to predict; default: none"),
    ] = None,
    force: Force = False,
) -> None:
    """Import a head of upstream's `state tx train`.

    It becomes a checkpoint folder that predicts the same, and from which training can start (train --init-from).
    Nothing in the files is run.
    """
    from sest.compat.import_upstream import import_checkpoint

    with ConsoleProgress():
        state = import_checkpoint(source, out, target_sum=target_sum, batch=batch, force=force)
    sizes = state["sizes"]
    console.say(
        f"{out}: step {state['step']:,}, {state['trainable_parameters']:,} parameters; embeddings {sizes['dim']}, "
        f"features {sizes['n_features']}, {sizes['n_genes']:,} genes."
    )


@help_page("sest export run --out upstream", "sest export run --out upstream --checkpoint last")
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="run folder, or one of its checkpoint folders; also hf://OWNER/NAME")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="output: the folder to write")],
    to: Annotated[str, typer.Option(help="program that is to read it: state (arc-state)", show_default=True)] = "state",
    checkpoint: Annotated[str | None, typer.Option(help=f"{CHECKPOINT}; default: best")] = None,
    force: Force = False,
) -> None:
    """Write a head as a run folder of upstream's `state tx`.

    Its classes load it and predict the same. The baselines beside the head stay behind.
    """
    if to != "state":
        raise InputError(f"--to is {to!r}; it takes: state.")
    from sest.compat.export_upstream import export_run

    done = export_run(run, out, checkpoint=checkpoint, force=force)
    console.say(
        f"{out}: the head of {done.checkpoint} (step {done.step:,}) for `state tx infer --model-dir {out} --embed-key "
        f"{done.embed_key}`, with the vectors of {done.n_perturbations:,} perturbations."
    )
    if done.has_blend:
        console.say("Its blend with the baselines is not in it: upstream predicts by the head alone.")


@help_page("sest convert SE-600M", "sest convert SE-600M --weights se600m_epoch16.ckpt")
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
