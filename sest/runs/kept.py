"""Which checkpoints of a run stay, and what disk they take.

Kept checkpoints (`checkpoint-step-N/`) stay, or with --keep-last the newest of them; last/ and best/ always do. Bytes
are those of the tensors: names, hashes and the blend come on top, so what does not fit by them does not fit.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from sest.cache.disk import GONE, delete_folder
from sest.config import TrainConfig
from sest.errors import InputError
from sest.runs.checkpoint import resumable, step_folders, unfinished
from sest.runs.run_folder import CONFIG, read_run_config

logger = logging.getLogger(__name__)


def delete_older(run: Path, step: int, keep: int) -> None:
    """Of the kept checkpoints up to a step leave the `keep` newest; call it once that step's is on the disk.

    Later ones, where a run went back, stay until it is there again; so do those that a run beside this one starts from.
    What cannot be deleted is said, and tried again at the next call.
    """
    for folder in run.glob(f".*{GONE}"):
        shutil.rmtree(folder, ignore_errors=True)
    there = [(at, folder) for at, folder in step_folders(run) if at <= step and not folder.is_symlink()]
    newest = sorted({at for at, _ in there})[-keep:]
    older = [folder for at, folder in there if at not in newest]
    started_from = _started_from_beside(run) if older else set()
    for folder in older:
        if folder.resolve() in started_from:
            continue
        try:
            delete_folder(folder)
        except OSError as error:
            logger.warning(f"{folder} could not be deleted ({error.strerror}); it is tried again at the next save.")


def _started_from_beside(run: Path) -> set[Path]:
    """The checkpoints that runs beside this one began from, of those that have none of their own to go on from yet."""
    found, here = set(), run.resolve()
    for config in here.parent.glob(f"*/{CONFIG}"):
        with suppress(InputError, OSError):  # what cannot be read cannot be resumed
            if config.parent != here and not resumable(config.parent):
                values, provenance = read_run_config(config.parent)
                begun = (provenance.get("resumed_from"), values.get("init_from"))
                found |= {Path(path).resolve() for path in begun if path}
    return found


def check_disk(run: Path, config: TrainConfig, step: int, *, n_bytes: int, best_bytes: int) -> None:
    """Say what disk the checkpoints take that are written from a step on.

    Args:
        run: its folder, which need not exist yet.
        n_bytes: of a checkpoint that can be resumed.
        best_bytes: of best/; 0 where there is one already.

    Raises:
        InputError: what is free does not even hold those that are there at the same time with --keep-last 1.
    """
    disk = next(folder for folder in (run, *run.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(disk).free + sum(_bytes_in(folder) for folder in unfinished(run))
    before = len({at for at, _ in step_folders(run)})
    n_steps = config.max_steps // config.checkpoint_every - step // config.checkpoint_every
    at_end = config.max_steps % config.checkpoint_every > 0

    def at_once(keep: int) -> int:
        return most_at_once(n_steps, at_end, before, keep)

    def needed(n: int) -> int:
        return n * n_bytes + best_bytes

    def said(n: int) -> str:
        return f"{n} of {_size(n_bytes)}" + (f" and best/ of {_size(best_bytes)}" if best_bytes else "")

    n, least = at_once(config.keep_last), 1 if config.early_stopping else at_once(1)
    there = f"{_size(free)} are free at {disk}"
    if needed(least) > free:
        fewer = f", or pass --checkpoint-every {config.max_steps}" if least > 1 and needed(1) <= free else ""
        raise InputError(
            f"The checkpoints that are there at the same time take at least {_size(needed(least))} of disk "
            f"({said(least)}); {there}. Free some, choose a --run folder on another disk{fewer}."
        )
    line = f"The checkpoints to come take at most {_size(needed(n))} of disk ({said(n)}); {there}."
    if needed(n) <= free:
        logger.info(line)
        return
    fits = next((keep for keep in range(n + before, 0, -1) if needed(at_once(keep)) <= free), None)
    advice = f"--keep-last {fits} fits" if fits else "--keep-last 1 and a larger --checkpoint-every take less"
    logger.warning(f"{line} The disk may be full before the run ends: {advice}.")


def most_at_once(n_steps: int, at_end: bool, before: int, keep: int) -> int:
    """The most checkpoints that a run has at the same time beyond those it has now; best/ is not counted.

    Args:
        n_steps: kept ones that it is still to write. An older one is deleted when the newer one is written.
        at_end: whether last/ is another one, as it is of another step than the newest kept one.
        before: kept ones that are there now.
        keep: --keep-last; 0: all.
    """
    if n_steps == 0:
        return int(at_end)
    keep = keep or before + n_steps
    newest_written = min(keep, before + n_steps - 1) + 1
    ended = min(keep, before + n_steps) + at_end
    return max(1, newest_written - before, ended - before)


def _bytes_in(folder: Path) -> int:
    """Bytes of a folder's files; 0 where these go while they are counted."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return 0


def _size(n_bytes: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.1f} {name}"
    return f"{n_bytes / 1e3:.1f} kB"
