"""`se-st-train`: the ancestor's command line, carried out as `sest embed` and `sest train`."""

from __future__ import annotations

import os
import shlex
import sys

from sest.cli import console
from sest.cli.embed import embed
from sest.cli.main import EXIT_BAD_INPUT, run_command
from sest.cli.options import help_of
from sest.cli.progress import ConsoleProgress
from sest.cli.train import train
from sest.compat.ancestor import BOTH, CONFIGS, EMBED, FIXED, KEYS, SIZE, TRAIN, Key, Request, in_keys, read_request
from sest.errors import Error, InputError, TrainingFailed
from sest.machine.ranks import ranks_of
from sest.machine.signals import Interrupted

USAGE = """\
Usage: se-st-train ++KEY=VALUE ...

The command of se-st-combined, with its keys: embeds the cells into <output_dir>/cache the first time, then trains the
head from there into <output_dir>/<name>. The same command again goes on where it stopped. The commands of `sest` that
it stands for are shown before they are carried out.
"""
EXAMPLE = """\
Example:
  se-st-train ++data.kwargs.toml_config_path=data/starter.toml \\
      ++data.kwargs.perturbation_features_file=ESM2_pert_features.pt ++model.kwargs.se_model_path=SE-600M \\
      ++model.kwargs.se_checkpoint_path=SE-600M/se600m_epoch15.ckpt ++model.kwargs.hidden_dim=512 \\
      ++training.max_steps=40000 ++training.batch_size=16 ++output_dir=competition ++name=run1

Go on from a checkpoint in a run of another name; max_steps counts the earlier steps too:
  ... ++training.max_steps=20000 ++model.checkpoint=competition/run1/checkpoint-step-5000.ckpt ++name=run2

++key=value, +key=value and key=value are the same. null stands for a key that is not given.
"""


def main() -> None:
    """Run the command line; exit codes as those of `sest`."""
    run_command(lambda: se_st_train(sys.argv[1:]))


def se_st_train(words: list[str]) -> None:
    """Carry out the ancestor's overrides."""
    if not words or {"-h", "--help"} & set(words):
        show_help()
        sys.exit(0 if words else EXIT_BAD_INPUT)
    try:
        embed_and_train(read_request(words))
    except Error as error:
        raise InputError(in_keys(str(error))) from error
    except TrainingFailed as error:
        raise TrainingFailed(in_keys(str(error))) from error
    except Interrupted as stopped:
        raise Interrupted(stopped.signum, in_keys(str(stopped))) from stopped


def embed_and_train(request: Request) -> None:
    """Make the cache unless it is finished, then train from it."""
    if ranks_of(None, None, os.environ).world_size > 1:
        raise InputError("se-st-train is one process. Start it alone once; it shows the two commands for torchrun.")
    from sest.cache import open_cache
    from sest.compat.ancestor_run import (  # imports torch
        check_before_embedding,
        check_features,
        check_genes,
        find_resume,
        finished_cache,
    )

    with ConsoleProgress():
        resume = find_resume(request)
        cache = finished_cache(request)
    if cache is None:
        check_before_embedding(request)
        console.command(shlex.join(request.embed_command()))
        embed(
            [request.splits], request.encoder, str(request.cache), data_root=list(request.data_roots), **request.embed
        )
        cache = open_cache(request.cache)
    else:
        check_features(request)
    check_genes(request, cache)
    console.command(shlex.join(request.train_command(resume)))
    train(request.cache, request.run, resume, **request.training(resume))


def show_help() -> None:
    """Print every key, the option it stands for and what it says, a table for each part of the configuration."""
    _say_lines(USAGE)
    sections: dict[str, list[Key]] = {}
    for key in KEYS.values():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    for section, keys in sections.items():
        title = f"++{section}.KEY=VALUE" if section else "++KEY=VALUE"
        rows = [[key.name.rpartition(".")[2], _option_of(key), _meaning(key)] for key in keys]
        console.table(title, ["key", "of sest", "meaning"], rows)
    _say_lines(EXAMPLE)


def _say_lines(text: str) -> None:
    for line in text.split("\n"):
        console.say(line)


def _option_of(key: Key) -> str:
    if not key.option:
        return "-"
    if key.kind in (EMBED, TRAIN, BOTH):
        return f"{key.kind} --{key.option}"
    return {
        "splits": "embed INPUT, train --splits",
        "cache": "embed --cache, train --run",
        "run": "train --run",
        "resume": "train --resume",
    }.get(key.option, f"embed --{key.option}")


def _meaning(key: Key) -> str:
    if key.kind == FIXED:
        return f"{' or '.join(key.words or ())} only: {key.note}"
    if key.note or key.kind == SIZE:
        return key.note
    text = help_of(CONFIGS[key.kind][0], key.field, preset=False)
    return f"{text}; here: {' | '.join(key.words)}" if key.words else text
