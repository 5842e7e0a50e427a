"""Checkpoints: folders written aside, fsynced and renamed, so that a checkpoint is whole or not there.

    checkpoint-step-500/model.safetensors       the head alone (196 MB at the default sizes)
                        projection.safetensors  the PCA of the embeddings, for new cells (where there is one)
                        optimizer.safetensors   AdamW's moments (not in best/)
                        state.json              step, configuration, genes, hashes; sha256 of the other files

Nothing in them depends on the clock, the machine's paths or the order of dictionaries: the same run gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sest.cache.schema import fsync_file, fsync_folder, sha256_file
from sest.errors import InputError
from sest.model import HeadSizes, StateTransition

FORMAT_VERSION = 1
MODEL, PROJECTION, OPTIMIZER, STATE = (
    "model.safetensors",
    "projection.safetensors",
    "optimizer.safetensors",
    "state.json",
)
LAST, BEST = "last", "best"
_STEP_FOLDER = re.compile(r"checkpoint-step-(\d+)")


def step_folder(step: int) -> str:
    """Name of the kept checkpoint of a step."""
    return f"checkpoint-step-{step}"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose files have the sha256 its state.json says."""

    folder: Path
    state: dict[str, Any]

    @property
    def sizes(self) -> HeadSizes:
        return HeadSizes(**self.state["sizes"])

    def model_tensors(self) -> dict[str, Tensor]:
        """Parameters of the head by name."""
        return _read(self.folder / MODEL)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state by "<kind>/<parameter>".

        Raises:
            InputError: this checkpoint has none (best/, imported ones).
        """
        if OPTIMIZER not in self.state["files"]:
            raise InputError(
                f"{self.folder} has no optimizer state, so training cannot resume from it. "
                "Use the run's last/ or a checkpoint-step-N/."
            )
        return _read(self.folder / OPTIMIZER)

    def projection(self) -> dict[str, Tensor] | None:
        """Mean, basis and explained variance of the embeddings' PCA, or None."""
        return _read(self.folder / PROJECTION) if PROJECTION in self.state["files"] else None

    def model(self) -> StateTransition:
        """The head in eval mode, on the CPU, float32."""
        with torch.device("meta"):
            model = StateTransition(self.sizes)
        try:
            model.load_state_dict(self.model_tensors(), assign=True)
        except RuntimeError as error:
            raise InputError(f"{self.folder}: {MODEL} does not fit state.json ({' '.join(str(error).split())}).") from error
        return model.requires_grad_(True).eval()


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}, path)


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    model: Mapping[str, Tensor],
    *,
    optimizer: Mapping[str, Tensor] | None = None,
    projection: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder: aside, fsynced, renamed. An older folder of that name is replaced.

    Args:
        folder: where it will be.
        state: plain values; `sizes` (see HeadSizes) among them. The hashes of the files are added.
        model, optimizer, projection: tensors by name.
    """
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer), (PROJECTION, projection)):
        if tensors is not None:
            _write(aside / name, tensors)
    _seal(aside, state)
    _replace(aside, folder)


def _seal(aside: Path, state: Mapping[str, Any]) -> None:
    """Add state.json with the hashes of the files beside it; make all of it durable."""
    files = sorted(file for file in aside.iterdir() if file.name != STATE)
    content = {**state, "format_version": FORMAT_VERSION, "files": {file.name: sha256_file(file) for file in files}}
    (aside / STATE).write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")
    for file in [*files, aside / STATE]:
        fsync_file(file)
    fsync_folder(aside)


def _replace(aside: Path, folder: Path) -> None:
    """Move a finished folder to its name. A kill between the renames leaves `.<name>.old`, which is found again."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(aside, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_checkpoint(source: Path, folder: Path, *, with_optimizer: bool = True) -> None:
    """Make `folder` the same checkpoint as `source`, sharing the files on disk where the file system can."""
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in source.iterdir():
        if file.name == STATE or (file.name == OPTIMIZER and not with_optimizer):
            continue
        try:
            os.link(file, aside / file.name)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, aside / file.name)
    state = json.loads((source / STATE).read_text())
    _seal(aside, {key: value for key, value in state.items() if key not in ("files", "format_version")})
    _replace(aside, folder)


def open_checkpoint(folder: Path, *, check: bool = True) -> Checkpoint:
    """Open a checkpoint folder.

    Args:
        check: compare every file with its sha256.

    Raises:
        InputError: not a checkpoint, of another format version, or damaged.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        files, version = dict(state["files"]), state["format_version"]
    except FileNotFoundError:
        raise InputError(f"{folder} is not a checkpoint: it has no {STATE}.") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{folder} is damaged: {STATE} cannot be read ({error!r}).") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{folder} has checkpoint format {version}; this sest reads {FORMAT_VERSION}.")
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{folder} is damaged: {name} is missing.")
        if check and sha256_file(file) != digest:
            raise InputError(f"{folder} is damaged: {name} is not the file that was saved (sha256 differs).")
    return Checkpoint(folder, state)


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders of a run, the furthest step first; at one step, last/ before kept ones before best/.

    `.last.old`, which a kill between two renames leaves, counts as well.
    """
    found = []
    for folder in run.iterdir() if run.is_dir() else ():
        name = folder.name.removeprefix(".").removesuffix(".old") if folder.name.endswith(".old") else folder.name
        if name in (LAST, BEST) or _STEP_FOLDER.fullmatch(name):
            try:
                step = int(json.loads((folder / STATE).read_text())["step"])
            except (OSError, ValueError, KeyError, TypeError):
                step = -1
            found.append((-step, (LAST, name, BEST).index(name), folder.name, folder))
    return [entry[-1] for entry in sorted(found)]


def latest_checkpoint(run: Path) -> tuple[Checkpoint, list[str]]:
    """The furthest checkpoint training can resume from, and what was wrong with those passed over.

    Raises:
        InputError: the run has none that is sound.
    """
    problems = []
    for folder in checkpoints(run):
        try:
            checkpoint = open_checkpoint(folder)
            if OPTIMIZER in checkpoint.state["files"]:
                return checkpoint, problems
        except InputError as error:
            problems.append(str(error))
    detail = f" ({' '.join(problems)})" if problems else ""
    raise InputError(f"{run} has no checkpoint to resume from{detail}.")


def find_checkpoint(path: Path, which: str | None = None) -> Path:
    """The checkpoint folder that a path means: itself, or of a run its best/ (or `which`), else last/.

    Raises:
        InputError: there is none; the ones that exist are listed.
    """
    if (path / STATE).exists() and which is None:
        return path
    there = [folder.name for folder in checkpoints(path) if not folder.name.startswith(".")]
    for name in (which,) if which else (BEST, LAST):
        if (path / name / STATE).exists():
            return path / name
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if which is None and there:
        return path / there[0]
    wanted = f"checkpoint '{which}'" if which else "checkpoint"
    raise InputError(f"{path} has no {wanted}. It has: {', '.join(there) or 'none'}.")


def load_model(folder: str | Path) -> StateTransition:
    """Load the head from a checkpoint or run folder: `model(basal (B, S, E), perturbation (B, P)) -> (B, S, G)`.

    The model is in eval mode, float32, on the CPU.

    Raises:
        InputError: no checkpoint there, or a damaged one (an older sound one is named).
    """
    return sound_checkpoint(find_checkpoint(Path(folder))).model()


def sound_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint; of a damaged one the error names the run's furthest sound one.

    Raises:
        InputError: the checkpoint is damaged.
    """
    try:
        return open_checkpoint(folder)
    except InputError as error:
        others = [other for other in checkpoints(folder.parent) if other != folder and _is_sound(other)]
        if not others:
            raise
        raise InputError(f"{error} Sound: {others[0]}. Pass that one instead.") from error


def _is_sound(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except InputError:
        return False
    return True


def optimizer_to_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's state as "<kind>/<parameter name>" tensors; names in the order of the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{kind}/{name}": value
        for name, parameter in zip(names, parameters, strict=True)
        for kind, value in optimizer.state[parameter].items()
    }


def tensors_to_optimizer(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Put `optimizer_to_tensors` back, on each parameter's device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        state = {k.split("/", 1)[0]: v for k, v in tensors.items() if k.split("/", 1)[1] == name}
        optimizer.state[parameter] = {kind: value.to(parameter.device).clone() for kind, value in state.items()}


def sizes_to_values(sizes: HeadSizes) -> dict[str, Any]:
    """Sizes as plain values for state.json."""
    return dataclasses.asdict(sizes)
