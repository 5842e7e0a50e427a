"""The `sest` command: one file per subcommand; errors of the library become one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from sest import __version__
from sest.cli import console
from sest.cli.blend import blend
from sest.cli.convert import convert, export, import_
from sest.cli.demo import demo
from sest.cli.embed import embed
from sest.cli.evaluate import evaluate
from sest.cli.help import Command, Group
from sest.cli.info import info
from sest.cli.predict import predict
from sest.cli.push import push
from sest.cli.report import report
from sest.cli.run import run
from sest.cli.simulate import simulate
from sest.cli.train import train
from sest.errors import Error, TrainingFailed, is_out_of_memory
from sest.machine.signals import Interrupted
from sest.progress import last_step

EXIT_BAD_INPUT = 2
LOWER = {  # what makes a command take less of the host's memory
    "embed": "Pass a smaller --batch-size",
    "train": "Pass --data-device disk, or a smaller --batch-size, --set-size or --hidden",
    "report": "Pass a smaller --sets, or --no-model",
}
LONGEST_NAME = 200  # characters of a file's name that are shown
MORE = "free some memory, or run it where there is more"

app = typer.Typer(
    name="sest",
    cls=Group,
    help="Embed every cell once, then train, predict and evaluate perturbation responses from the stored embeddings.",
    epilog="sest run cells.h5ad --out results\nsest train --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: option texts get the width, and [names] stay
    context_settings={"help_option_names": ["-h", "--help"]},
)
PANELS = {
    "From cells to an answer": (run, embed, train, blend, predict, evaluate, report),
    "To look and to try": (info, demo, simulate),
    "With other programs": (convert, import_, export, push),
}
for heading, commands in PANELS.items():
    for command in commands:
        app.command(command.__name__.rstrip("_"), cls=Command, rich_help_panel=heading)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.say(f"sest {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version)] = False,
) -> None:
    """Options that come before the subcommand."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 training failed, 2 bad input, 128 + signal: stopped, saved."""
    run_command(app)


def run_command(command: Callable[[], object]) -> None:
    """Run a command; what it raises becomes one line and an exit code (see `main`)."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup does with SIGHUP
            signal.signal(signum, lambda signum, _: sys.exit(128 + signum))  # unwinds: unfinished files are removed
    try:
        command()
    except Error as error:
        console.error(str(error))
        sys.exit(EXIT_BAD_INPUT)
    except TrainingFailed as error:
        console.error(str(error))
        sys.exit(1)
    except Interrupted as stopped:
        console.note(str(stopped))
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        line = of_the_machine(error, "".join(sys.argv[1:2]))
        if line is None:
            raise
        console.error(line)
        sys.exit(EXIT_BAD_INPUT)


def of_the_machine(error: Exception, command: str) -> str | None:
    """What is said where the memory, the disk or another part of the machine refuses; None: it is no such error."""
    if is_out_of_memory(error):
        return out_of_memory(command)
    if isinstance(error, RecursionError):
        return "An input is nested too deeply to be read. Is it damaged, or made to be?"
    if isinstance(error, OSError) and error.errno:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        where = " -> ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in names)
        return f"{error.strerror}: {where or 'the output'}. What was finished is kept."
    return None


def out_of_memory(command: str) -> str:
    """What is said where the host has no memory left; a training that had begun says more itself."""
    step = f" The last step that began: {last_step()}." if last_step() else ""
    return f"Out of host memory.{step} {LOWER.get(command, 'This command needs more memory than there is')}; or {MORE}."
