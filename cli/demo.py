"""`sest demo`: everything once, on simulated cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import Force, options
from sest.cli.progress import ConsoleProgress
from sest.cli.run import shown_on
from sest.simulation.simulation import Simulation


@help_page("sest demo", "sest demo --quick --out look")
@options(Simulation, {"Options": "seed"})
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="output: a new folder for everything the demo makes")] = Path(
        "sest-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="tiny sizes: only to see that everything works [default: off]")
    ] = False,
    force: Force = False,
    **options: Any,
) -> None:
    """Run the whole pipeline on simulated cells.

    Takes under 3 minutes on 2 CPU cores. Shows the command of every step, and the model beside baselines at the end.
    """
    seed = Simulation.from_values(options, "the command line").seed
    from sest.pipeline.demo import run_demo

    with ConsoleProgress() as progress:
        result = run_demo(out, quick=quick, seed=seed, force=force, watcher=shown_on(progress, out))
    if quick:
        console.say("Tiny sizes: these figures only show that the pipeline runs.")
    console.say("")
    console.say(f"Everything is in {out}; open {result.plan.report} in a browser.")
