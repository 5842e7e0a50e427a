"""Checkpoints: folders written aside, fsynced and renamed, so that a checkpoint is whole or not there.

    checkpoint-step-500/model.safetensors       the head alone
                        projection.safetensors  the PCA of the embeddings, for new cells (where there is one)
                        features.safetensors    vectors of genes and from files, where these are the features
                        blend.safetensors       effects of the training pairs (best/, once training has ended)
                        optimizer.safetensors   AdamW's moments (not in best/)
                        state.json              step, configuration, genes, hashes; sha256 of every file, also its own

Nothing in them depends on the clock, the machine's paths or the order of dictionaries: the same run gives the same
bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from sest.blend.blend import Blend, from_stored, to_stored
from sest.cache.disk import GONE, NEW, OLD, folder_aside, sha256, sha256_file, write_flushed
from sest.cache.schema import ROOT
from sest.config import upgraded
from sest.errors import InputError, nearest_file, one_line, shown, what_it_is
from sest.head.model import HeadSizes, StateTransition
from sest.hub import fetched
from sest.runs.schema import (
    BEST,
    BLEND,
    FEATURES,
    FORMAT_VERSION,
    LAST,
    MODEL,
    OPTIMIZER,
    PROJECTION,
    STATE,
    read_state,
)
from sest.untrusted.tensors import check_finite, read_safetensors

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
        return read_safetensors(self.folder / MODEL)

    def require_optimizer(self) -> None:
        """Refuse a checkpoint without optimizer state (best/, imported ones).

        Raises:
            InputError: it has none.
        """
        if OPTIMIZER not in self.state["files"]:
            raise InputError(
                f"{self.folder} has no optimizer state, so training cannot resume from it. "
                "Use the run's last/ or a checkpoint-step-N/."
            )

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state by "<kind>/<parameter>"; see `require_optimizer`."""
        return read_safetensors(self.folder / OPTIMIZER)

    def projection(self) -> dict[str, Tensor] | None:
        """Mean, basis and explained variance of the embeddings' PCA, or None."""
        return read_safetensors(self.folder / PROJECTION) if PROJECTION in self.state["files"] else None

    def features(self) -> dict[str, Tensor]:
        """Vectors of perturbations and genes that nothing else has; see `sest.runs.known.features_to_keep`."""
        return read_safetensors(self.folder / FEATURES) if FEATURES in self.state["files"] else {}

    @property
    def has_head(self) -> bool:
        """Whether there is a head in it; a run of --head none has none."""
        return MODEL in self.state["files"]

    @property
    def has_blend(self) -> bool:
        return BLEND in self.state["files"]

    def blend(self) -> Blend:
        """Weights of the head and of the baselines, and what the baselines need; see `has_blend`."""
        try:
            return from_stored(self.state["blend"], read_safetensors(self.folder / BLEND))
        except (KeyError, ValueError) as error:
            raise InputError(f"{self.folder}: {BLEND} does not fit {STATE} ({one_line(error)}).") from error

    def model(self) -> StateTransition:
        """The head in eval mode, on the CPU, float32.

        Raises:
            InputError: it does not fit state.json, or there is none.
        """
        if not self.has_head:
            raise InputError(f"{self.folder} is of a run without a head (--head none): only its blend can predict.")
        with torch.device("meta"):
            model = StateTransition(self.sizes)
        try:
            tensors = self.model_tensors()
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise InputError(f"{self.folder}: {MODEL} does not fit {STATE} ({one_line(error)}).") from error
        if other := [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]:
            raise InputError(f"{self.folder}: {MODEL} is not all float32: {shown(other)}.")
        check_finite(str(self.folder / MODEL), tensors)
        return model.requires_grad_(True).eval()


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    model: Mapping[str, Tensor] | None,
    *,
    blend: Blend | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
    projection: Mapping[str, Tensor] | None = None,
    features: Mapping[str, Tensor] | None = None,
    write: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Write a checkpoint folder: aside, fsynced, renamed. An older folder of that name is replaced.

    Args:
        state: plain values; `sizes` (see HeadSizes) among them. The hashes of the files are added.
        model: tensors by name; None: a run without a head.
        blend: what else predicts beside it.
        optimizer, projection, features: tensors by name.
        write: has the writing done later, of copies of everything, in a folder that is there; None: it is done here
            and now.

    Raises:
        OSError: the disk is full or not writable; the older folder is still there.
    """
    values, of_blend = to_stored(blend) if blend is not None else (None, None)
    named = {MODEL: model, OPTIMIZER: optimizer, PROJECTION: projection, FEATURES: features, BLEND: of_blend}
    files = {name: tensors for name, tensors in named.items() if tensors is not None}
    content, hashes = {**state, **({} if values is None else {"blend": values})}, {}

    def work() -> None:
        with folder_aside(folder, parents=write is None) as aside:
            for name in list(files):
                data = _bytes_of(files.pop(name))
                hashes[name] = sha256(data)
                write_flushed(aside / name, data)
            _write_state(aside, {**content, "files": hashes})

    if write is None:
        return work()
    content = json.loads(json.dumps(content))
    for name, tensors in files.items():
        files[name] = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
    write(work)


def add_blend(folder: Path, blend: Blend) -> None:
    """Put a blend into a checkpoint, instead of an older one; the other files are not written again.

    Raises:
        OSError: as `save_checkpoint`; the older folder is still there.
    """
    state = read_state(folder)
    values, tensors = to_stored(blend)
    data = _bytes_of(tensors)
    with folder_aside(folder.with_name(_meant(folder.name))) as aside:
        for name in state["files"]:
            if name != BLEND:
                _share(folder / name, aside / name)
        write_flushed(aside / BLEND, data)
        _write_state(aside, {**state, "blend": values, "files": {**state["files"], BLEND: sha256(data)}})


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    content = {**state, "format_version": FORMAT_VERSION}
    content["sha256"] = _state_sha256(content)
    write_flushed(folder / STATE, (json.dumps(content, sort_keys=True, indent=1) + "\n").encode())


def _share(source: Path, target: Path) -> None:
    """The same file under another name, where the file system can; else a copy."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        write_flushed(target, source.read_bytes())


def _bytes_of(tensors: Mapping[str, Tensor]) -> bytes:
    return to_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})


def _state_sha256(content: Mapping[str, Any]) -> str:
    """Hash of what a state.json says, but for this hash."""
    own = {key: value for key, value in content.items() if key != "sha256"}
    return sha256(json.dumps(own, sort_keys=True).encode())


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Make `folder` the same checkpoint as `source`, sharing the files on disk where the file system can."""
    with folder_aside(folder) as aside:
        for name in (*read_state(source)["files"], STATE):
            _share(source / name, aside / name)


def without_optimizer(source: Checkpoint, folder: Path) -> None:
    """Make `folder` the checkpoint `source`, but for what only a resumed training needs."""
    files = {name: digest for name, digest in source.state["files"].items() if name != OPTIMIZER}
    with folder_aside(folder, parents=True) as aside:
        for name in files:
            _share(source.folder / name, aside / name)
        _write_state(aside, {**source.state, "files": files})


def remove_unfinished(run: Path) -> None:
    """Delete `unfinished`."""
    for folder in unfinished(run):
        shutil.rmtree(folder, ignore_errors=True)


def unfinished(run: Path) -> list[Path]:
    """What a kill left of checkpoints that were being written or deleted, or that had been replaced already."""
    replaced = [folder for folder in run.glob(f".*{OLD}") if (run / _meant(folder.name) / STATE).exists()]
    return [*run.glob(f".*{NEW}"), *run.glob(f".*{GONE}"), *replaced]


def open_checkpoint(folder: Path, *, check: bool = True) -> Checkpoint:
    """Open a checkpoint folder.

    Args:
        check: compare every file with its sha256.

    Raises:
        InputError: not a checkpoint, of another format version, or damaged.
    """
    try:
        state = read_state(folder)
    except FileNotFoundError:
        raise InputError(f"{folder} is not a checkpoint: it has no {STATE}.") from None
    changed = [STATE] if check and state["sha256"] != _state_sha256(state) else []
    for name, expected in state["files"].items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{folder} is damaged: {name} is missing.")
        if check and sha256_file(file) != expected:
            changed.append(name)
    if changed:
        raise InputError(f"{folder} is damaged: not as it was saved (sha256 differs): {shown(changed)}.")
    return Checkpoint(folder, {**state, "config": upgraded(state.get("config", {}))})


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders of a run, the furthest step first; at one step, last/ before kept ones before best/.

    `.last.old`, which a kill between two renames leaves, counts as well.
    """
    found = []
    for folder in run.iterdir() if run.is_dir() else ():
        name = _meant(folder.name)
        if name in (LAST, BEST) or _STEP_FOLDER.fullmatch(name):
            found.append((-_step(folder), name == BEST, name != LAST, name != folder.name, folder))
    return [entry[-1] for entry in sorted(found)]


def step_folders(run: Path) -> list[tuple[int, Path]]:
    """The kept checkpoints of a run with the step that their names say, the earliest first."""
    named = [(_STEP_FOLDER.fullmatch(_meant(path.name)), path) for path in (run.iterdir() if run.is_dir() else ())]
    return sorted((int(match[1]), path) for match, path in named if match)


def resumable(run: Path) -> list[Path]:
    """Those of `checkpoints` that training can go on from: all but best/."""
    return [folder for folder in checkpoints(run) if _meant(folder.name) != BEST]


def _meant(name: str) -> str:
    """The name a folder has, or had before a kill: last for .last.old."""
    return name[1 : -len(OLD)] if name.startswith(".") and name.endswith(OLD) else name


def _step(folder: Path) -> int:
    """The step of a checkpoint, -1 where its state.json cannot be read."""
    try:
        return int(read_state(folder)["step"])
    except (OSError, InputError):
        return -1


def later_checkpoints(checkpoint: Checkpoint) -> list[Path]:
    """The run's other checkpoints that training could go on from, of later steps than this one's."""
    return [f for f in resumable(checkpoint.folder.parent) if _step(f) > checkpoint.state["step"]]


def latest_checkpoint(run: Path) -> tuple[Checkpoint, list[str]]:
    """The furthest checkpoint training can resume from, and what was wrong with those passed over.

    Raises:
        InputError: the run has none that is sound.
    """
    problems: list[str] = []
    for folder in sorted(resumable(run), key=lambda f: _step(f) >= 0):  # one of an unreadable step is said, too
        try:
            checkpoint = open_checkpoint(folder)
            checkpoint.require_optimizer()
            return checkpoint, problems
        except InputError as error:
            problems.append(str(error))
    detail = f" ({' '.join(problems)})" if problems else ""
    raise InputError(f"{run} has no checkpoint to resume from{detail}. Start again with another --run folder.")


def _present(run: Path, name: str) -> Path | None:
    """The checkpoint of that name, or what a kill left of it between two renames."""
    return next((place for place in (run / name, run / f".{name}{OLD}") if (place / STATE).exists()), None)


def find_checkpoint(path: Path, which: str | None = None) -> Path:
    """The checkpoint folder that a path means: itself, also of the hub, or of a run best/ (or `which`), else last/.

    Raises:
        InputError: there is none; the ones that exist are listed.
    """
    path = fetched(path)
    if (path / STATE).exists() and which is None:
        return path
    for name in (which,) if which else (BEST, LAST):
        if (folder := _present(path, name)) is not None:
            return folder
    if not path.exists():
        raise InputError(f"{path} does not exist.{nearest_file(path)}")
    if (path / ROOT).is_file():
        raise InputError(f"{path} is a cache, no run. `sest train {path} --run RUN` makes one from it.")
    there = checkpoints(path)
    if which is None and there:
        return there[0]
    wanted = f"checkpoint '{which}'" if which else "checkpoint"
    listed = f"It has: {shown(_meant(folder.name) for folder in there)}."
    raise InputError(f"{path} has no {wanted}. {listed if there else what_it_is(path).strip() or listed}")


def load_model(folder: str | Path) -> StateTransition:
    """Load the head from a checkpoint or run folder: `model(basal (B, S, E), perturbation (B, P)) -> (B, S, G)`.

    The model is in eval mode, float32, on the CPU.

    Raises:
        InputError: no checkpoint there, or a damaged one (an older sound one is named).
    """
    return sound_checkpoint(find_checkpoint(Path(folder))).model()


def sound_checkpoint(folder: Path, *, to_resume: bool = False) -> Checkpoint:
    """Open a checkpoint; of a damaged one the error names the run's furthest sound one.

    Args:
        to_resume: it must have optimizer state, and so must the one that is named.

    Raises:
        InputError: the checkpoint is damaged, or has no optimizer state.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except InputError as error:
        others = (resumable if to_resume else checkpoints)(folder.parent)
        sound = next((other for other in others if other != folder and _is_sound(other)), None)
        if sound is None:
            raise
        raise InputError(f"{error} Sound: {sound}. Pass that one instead.") from error
    if to_resume:
        checkpoint.require_optimizer()
    return checkpoint


def _is_sound(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except InputError:
        return False
    return True
