"""Where the lines of metrics.jsonl also go, if asked for: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sest.config import TrainConfig
from sest.errors import InputError

TENSORBOARD = "tensorboard"  # folder in the run folder
Line = dict[str, Any]


def check_sinks(config: TrainConfig) -> None:
    """Refuse, before anything is written, what is asked for and not installed. Raises InputError."""
    for name, asked in (("tensorboard", config.tensorboard), ("wandb", config.wandb is not None)):
        if asked and find_spec(name) is None:
            raise InputError(f"--{name} needs the package {name}. Run `pip install 'sest[{name}]'`.")


@contextmanager
def open_sinks(run: Path, config: TrainConfig, step: int) -> Iterator[Callable[[Line], None]]:
    """A function that hands a line to every sink that `config` asks for; they are closed at the end.

    Args:
        run: folder of the run; its name names the run.
        step: the step a resumed run goes on from: what TensorBoard holds of later ones is hidden.

    Raises:
        InputError: a sink refuses (see also `check_sinks`).
    """
    with ExitStack() as stack:
        sinks: list[Callable[[Line], None]] = []
        if config.tensorboard:
            sinks.append(stack.enter_context(_tensorboard(run, step)))
        if config.wandb is not None:
            sinks.append(stack.enter_context(_wandb(run, config)))

        def write(line: Line) -> None:
            for sink in sinks:
                sink(line)

        yield write


def _numbers(line: Line) -> dict[str, float]:
    """The finite numbers of a line by "train/name" or "val/name"."""
    kind = "val" if "val_loss" in line else "train"
    return {
        f"{kind}/{name}": float(value)
        for name, value in line.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


@contextmanager
def _tensorboard(run: Path, step: int) -> Iterator[Callable[[Line], None]]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1 if step else None) as writer:

        def write(line: Line) -> None:
            for name, value in _numbers(line).items():
                writer.add_scalar(name, value, line["step"])
            writer.flush()

        yield write


@contextmanager
def _wandb(run: Path, config: TrainConfig) -> Iterator[Callable[[Line], None]]:
    import wandb

    try:
        session = wandb.init(
            project=config.wandb,
            name=run.resolve().name,
            id=hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16],  # a resumed run goes on there
            resume="allow",
            dir=str(run),
            config=config.to_values(),
        )
    except wandb.errors.Error as error:
        raise InputError(f"Weights & Biases: {error} Log in with `wandb login`, or set WANDB_MODE=offline.") from error
    with session:  # an exception marks it as failed there
        yield lambda line: session.log(_numbers(line), step=line["step"])
