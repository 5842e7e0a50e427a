"""A run's folder: what a new, resumed or interrupted run finds in it, its configuration and its metrics."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
import torch

from sest import __version__
from sest.cache.disk import naming, sha256, write_durably
from sest.cache.storage import is_url
from sest.config import TrainConfig, upgraded
from sest.data.dataset import Dataset
from sest.data.features import StoredFeatures
from sest.data.vectors import GENES, Source, resolved
from sest.errors import InputError, TrainingFailed, nearest_file, shown, what_it_is
from sest.head.preset import AUTO, SHAPE
from sest.hub import repository_of
from sest.options import read_toml
from sest.runs.checkpoint import (
    Checkpoint,
    later_checkpoints,
    latest_checkpoint,
    remove_unfinished,
    resumable,
    sound_checkpoint,
)
from sest.runs.schema import PROVENANCE, PROVENANCE_KIND, PROVENANCE_TOO, summed_line
from sest.untrusted.plain_json import check_plain

logger = logging.getLogger(__name__)

METRICS, CONFIG, SPLITS = "metrics.jsonl", "config.toml", "splits.toml"
SEED = "seed-"  # and its number: a run of several that differ in nothing else
PATHS = ("perturbations", "splits", "init_from")  # where files lie is no part of a run's identity; their content is
RESUMABLE = (  # what a resumed run may change without becoming another run
    "mixed_scales max_steps max_time val_every checkpoint_every keep_last log_every early_stopping patience "
    "max_bad_steps num_workers data_device scratch compile gradients device precision lr schedule warmup weight_decay "
    "clip tensorboard wandb"
).split()
# RESUMABLE, but with others the steps are other ones
SAME_STEPS = ("lr", "schedule", "warmup", "weight_decay", "clip", "precision")


def seeds_of(folder: Path) -> list[Path]:
    """The runs in a folder that `sest train --seeds` made, in order; empty for any other folder."""
    if (folder / CONFIG).exists() or not folder.is_dir():
        return []
    found = [one for one in folder.glob(f"{SEED}*") if (one / CONFIG).is_file()]
    return sorted(found, key=lambda one: (len(one.name), one.name))


def find_start(
    run: Path,
    resume: str | None,
    config: TrainConfig,
) -> Checkpoint | None:
    """The checkpoint to resume from; None for a new run, or one that was stopped before its first checkpoint."""
    if resume is None:
        if not _is_unused(run):
            raise InputError(f"{run} exists. Continue it with --resume auto, or choose another --run folder.")
        return None
    if not (_is_unused(run) or (run / CONFIG).is_file()):
        raise InputError(f"{run} exists and is no run folder: it has no {CONFIG}. Choose another --run folder.")
    if resume == "auto" and not resumable(run):
        begun = read_run_config(run)[1].get("resumed_from") if (run / CONFIG).is_file() else None
        if not begun:
            logger.info(f"{run} has no checkpoint yet: training starts at step 0.")
            return None
        checkpoint = sound_checkpoint(Path(begun), to_resume=True)  # stopped before its own first checkpoint
    elif resume == "auto":
        checkpoint, problems = latest_checkpoint(run)
        for problem in problems:
            logger.info(f"Passed over: {problem}")
    else:
        checkpoint = sound_checkpoint(Path(resume), to_resume=True)
        _refuse_to_mix(run, checkpoint, config)
    logger.info(f"Resuming from {checkpoint.folder} at step {checkpoint.state['step']:,}.")
    return checkpoint


def _is_unused(run: Path) -> bool:
    """Whether a run folder is yet to be made, or was not even begun when it was stopped."""
    if not run.is_dir():
        return not run.exists()
    return all(file.name.endswith(".partial") for file in run.iterdir())


def _refuse_to_mix(run: Path, start: Checkpoint, config: TrainConfig) -> None:
    """Going back in a run folder repeats the same steps; other steps would lie beside the later checkpoints there."""
    later = later_checkpoints(start) if start.folder.resolve().parent == run.resolve() else []
    before = TrainConfig.from_values(read_run_config(run)[0], str(run / CONFIG)) if later else config
    steps = (*SAME_STEPS, *(("max_steps",) if config.schedule != "constant" else ()))  # where a schedule ends
    changed = [name for name in steps if getattr(before, name) != getattr(config, name)]
    if changed:
        options = shown("--" + name.replace("_", "-") for name in changed)
        raise InputError(
            f"{run} has later checkpoints ({shown(folder.name for folder in later)}), made with another {options}. "
            f"Go on from {start.folder.name} in another --run folder."
        )


def stored_features(checkpoint: Checkpoint | None) -> StoredFeatures | None:
    """What a checkpoint keeps of its features; None without one."""
    if checkpoint is None:
        return None
    made, loadings = checkpoint.state["features"], checkpoint.features().get("genes")
    names, columns = (tuple(made[key]) if made.get(key) else None for key in ("names", "columns"))
    genes = {name: i for i, name in enumerate(checkpoint.state["genes"])}
    return StoredFeatures(names, columns, None if loadings is None else Source(GENES, genes, loadings.numpy()))


def config_of(
    run: Path, options: dict[str, Any], resume: str | None, where: str, *, from_file: bool = False
) -> TrainConfig:
    """The configuration to train with: of a new run the options, of a resumed one its own with the options on top.

    Where nothing says how large a new run's head is to be, its preset is auto.

    Args:
        resume: as in `find_start`.
        where: what names the options in an error, such as "the command line".
        from_file: some of the options are from a configuration file, whose defaults are those of full.

    Raises:
        InputError: an unknown option or value, nothing to resume, or see `resumed_config`.
    """
    if resume is None or (resume == "auto" and run.is_dir() and _is_unused(run)):
        config = TrainConfig.from_values(options, where)
        return config if from_file or _names_a_head(config, options) else dataclasses.replace(config, preset=AUTO)
    if resume == "auto" and not run.exists():
        raise InputError(f"{run} does not exist: nothing to resume. Leave --resume out to start it.")
    return resumed_config(run, resume, options)


def _names_a_head(config: TrainConfig, options: dict[str, Any]) -> bool:
    """Whether options say how large the head is: its sizes, a preset, the head to go on with, or none."""
    return bool(set(options) & {*SHAPE, "preset", "init_from"}) or config.head == "none"


def resumed_config(run: Path, resume: str, options: dict[str, Any]) -> TrainConfig:
    """The configuration of a run to resume, with the options given now on top.

    Raises:
        InputError: no configuration there, an option that a resumed run cannot change (see `RESUMABLE`), or a head of
            the hub, which is not fetched at a file's word.
    """
    if resume == "auto" and _is_unused(run):
        return TrainConfig.from_values(options, "the command line")
    folder = run if resume == "auto" or (run / CONFIG).exists() else Path(resume).resolve().parent
    values, _ = read_run_config(folder)
    before = TrainConfig.from_values(values, str(folder / CONFIG))
    theirs = before.init_from
    if theirs is not None and "init_from" not in options and repository_of(theirs) and not resumable(run):
        raise InputError(
            f"{run} says that it starts from {theirs}; pass it yourself: --init-from {shlex.quote(theirs)}."
        )
    if options.get("batch_size") == 0:  # auto: it was chosen when the run began
        options = {key: value for key, value in options.items() if key != "batch_size"}
    config = TrainConfig.from_values({**values, **options}, "the command line")
    for name in TrainConfig.names():
        old, new = getattr(before, name), getattr(config, name)
        if old != new and name not in (*RESUMABLE, *PATHS):
            raise InputError(
                f"--{name.replace('_', '-')} {new} would make another run; this one has {old}. Use a new --run."
            )
    return config


def read_run_config(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's configuration and its provenance (where its cache is).

    Raises:
        InputError: no config.toml there, or one that says what no training says.
    """
    if not (run / CONFIG).is_file():
        hint = what_it_is(run) if run.exists() else nearest_file(run)
        raise InputError(f"{run} is no run folder: it has no {CONFIG}.{hint}")
    read = read_toml(run / CONFIG)
    values = upgraded(read)
    provenance = values.pop("provenance", {})
    check_plain(provenance, PROVENANCE_KIND, f"{run / CONFIG}, [provenance]")
    splits = (run / SPLITS).read_bytes() if (run / SPLITS).is_file() else b""
    # a kill may have come between the two files; metrics.jsonl is the third
    whole = bool(splits) == ("splits" in values) or (run / METRICS).exists()
    is_complete = provenance.keys() >= PROVENANCE and provenance.keys() <= PROVENANCE | PROVENANCE_TOO
    written = provenance.pop("sha256", None)  # earlier runs have none
    if not is_complete or (written is not None and whole and written != _digest(read, splits)):
        _say_changed(run, written)
    TrainConfig.from_values(values, str(run / CONFIG))
    if "splits" in values and (run / SPLITS).exists():
        values["splits"] = str(run / SPLITS)
    return values, provenance


def _digest(content: Mapping[str, Any], splits: bytes) -> str:
    """The sha256 of what a config.toml says, but for this hash, and of the splits file."""
    made = {key: value for key, value in content["provenance"].items() if key != "sha256"}
    return sha256(json.dumps({**content, "provenance": made}, sort_keys=True, default=str).encode() + splits)


@cache
def _say_changed(run: Path, written: str | None) -> None:
    """Once for each run: many parts of a command read it."""
    logger.warning(
        f"{CONFIG} or {SPLITS} of {run} is not as sest wrote it: it was edited, or is damaged. It is used as it is."
    )


def own_cache(run: Path, provenance: Mapping[str, Any]) -> str:
    """The cache that a run says it was trained on.

    Raises:
        InputError: it does not say, or says a URL, which is not followed at a file's word; or nothing is there.
    """
    cache = str(provenance.get("cache", ""))
    if not cache:
        raise InputError(f"{run} does not say where its cache is. Pass --cache.")
    if is_url(cache):
        raise InputError(f"{run} says that its cache is at a URL; pass it yourself: --cache {shlex.quote(cache)}.")
    if not Path(cache).exists():
        raise InputError(f"The cache {cache} does not exist. Pass --cache with the one the run was trained on.")
    return cache


@contextmanager
def opened_run(
    run: Path, config: TrainConfig, data: Dataset, start: Checkpoint | None, step: int, chosen: str = ""
) -> Iterator[int]:
    """Create or continue the run folder (configuration, splits, metrics up to the step resumed from), and keep it.

    Args:
        chosen: what a preset chose and why, for the provenance; a continued run keeps its own.

    Yields:
        how many lines its metrics have.

    Raises:
        InputError: another process trains in it, or it cannot be written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        folder = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        _lock(folder, run)
        yield _begin(run, config, data, start, step, chosen)
    finally:
        os.close(folder)  # which also unlocks


def _lock(folder: int, run: Path) -> None:
    """Keep other processes out, until the folder's descriptor is closed."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"Another process trains in {run}. Wait until it has ended, or choose another --run folder."
        ) from error
    except OSError:
        return  # some network file systems have no locks


def _begin(run: Path, config: TrainConfig, data: Dataset, start: Checkpoint | None, step: int, chosen: str) -> int:
    if not chosen and (run / CONFIG).is_file():
        chosen = read_run_config(run)[1].get("chosen", "")
    try:
        remove_unfinished(run)
        paths = {"perturbations": resolved(config.perturbations)}
        for name in ("splits", "init_from"):
            if (path := getattr(config, name)) is not None and repository_of(path) is None:
                paths[name] = str(Path(path).resolve())
        provenance = {
            "cache": data.cache.storage.url,
            "sest_version": __version__,
            "torch_version": torch.__version__,
            "resumed_from": str(start.folder.resolve()) if start else "",
            **({"chosen": chosen} if chosen else {}),
        }
        content = {**config.to_values(), **paths, "provenance": provenance}
        splits = Path(config.splits).read_bytes() if config.splits else b""
        provenance["sha256"] = _digest(content, splits)
        write_durably(run / CONFIG, tomli_w.dumps(content).encode())
        if splits:
            write_durably(run / SPLITS, splits)
        lines = (run / METRICS).read_text().splitlines() if (run / METRICS).exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_durably(run / METRICS, "".join(line + "\n" for line in kept).encode())
    except OSError as error:
        raise _unwritable(run, error) from error
    return len(kept)


def _unwritable(run: Path, error: OSError) -> InputError:
    return InputError(f"Cannot write to {run}: {error.strerror}. Choose another --run folder.")


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a kill


@contextmanager
def run_is_there(run: Path) -> Iterator[None]:
    """Around what is written into a run folder: one that was deleted or moved is not made again.

    Raises:
        TrainingFailed: it has no configuration any more, before or while something was written.
    """
    gone = TrainingFailed(f"{run} was deleted or moved while it trained: it has no {CONFIG}. Nothing is written there.")
    if not (run / CONFIG).is_file():
        raise gone
    try:
        yield
    except (FileNotFoundError, FileExistsError) as error:  # the latter of a folder that goes while it is asked for
        if not (run / CONFIG).is_file():
            raise gone from error
        raise


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Add a line, to be made durable with the next checkpoint; a number that is not finite becomes null."""
    plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
    with naming(path), open(path, "a") as file:
        file.write(summed_line(plain))
