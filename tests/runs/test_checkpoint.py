"""Checkpoint folders: the same bytes for the same content, whole or not there, damage refused and another offered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sest.errors import InputError
from sest.head.model import HeadSizes, StateTransition, new_model
from sest.runs import checkpoint as module
from sest.runs.checkpoint import (
    Checkpoint,
    checkpoints,
    copy_checkpoint,
    find_checkpoint,
    later_checkpoints,
    latest_checkpoint,
    load_model,
    open_checkpoint,
    remove_unfinished,
    resumable,
    save_checkpoint,
    sound_checkpoint,
    step_folder,
)
from sest.runs.schema import BEST, LAST, MODEL, OPTIMIZER, PROJECTION, STATE

SIZES = HeadSizes(dim=3, n_features=2, n_genes=4, hidden=4, n_layers=1, n_heads=2, ffn=8, n_encoder_layers=1)


def plain_state(step: int, sizes: HeadSizes = SIZES) -> dict[str, Any]:
    """What every state.json says, but for the hashes."""
    return {
        "sest_version": "0.1.0",
        "step": step,
        "run": {"step": step, "best_step": 1, "best_val_loss": 0.1 + 0.2, "val_loss": None},
        "sizes": sizes.to_values(),
        "trainable_parameters": 1,
        "genes": [],
        "config": {},
        "precision": "fp32",
        "cache_sha256": None,
        "splits_sha256": None,
        "features": {"source": "onehot", "sha256": None, "width": sizes.n_features, "names": None},
        "encoder": {"name": "pca", "sha256": None, "licence": None, "genes": None},
        "scale": None,
        "target_sum": None,
        "columns": dict.fromkeys(("perturbation", "cell_type", "batch", "control")),
    }


def saved(folder: Path, step: int = 5, *, with_optimizer: bool = True, seed: int = 0) -> Path:
    """A checkpoint of a head with 4 genes; its optimizer state is a made-up tensor."""
    state = plain_state(step)
    optimizer = {"exp_avg/w": torch.arange(3.0)} if with_optimizer else None
    projection = {"mean": torch.zeros(3), "basis": torch.eye(3)}
    save_checkpoint(folder, state, new_model(SIZES, seed).state_dict(), optimizer=optimizer, projection=projection)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def visible(run: Path) -> list[str]:
    return sorted(entry.name for entry in run.iterdir())


def test_a_checkpoint_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    opened = open_checkpoint(saved(tmp_path / LAST))
    assert opened.sizes == SIZES and opened.state["step"] == 5
    assert opened.state["run"]["best_val_loss"] == 0.1 + 0.2  # every bit of a float survives JSON
    model = new_model(SIZES, 0).state_dict()
    assert opened.model_tensors().keys() == model.keys()
    assert all(torch.equal(value, model[name]) for name, value in opened.model_tensors().items())
    assert opened.optimizer_tensors()["exp_avg/w"].tolist() == [0, 1, 2]
    projection = opened.projection()
    assert projection is not None and torch.equal(projection["basis"], torch.eye(3))
    assert visible(tmp_path) == [LAST] and sorted(content(tmp_path / LAST)) == sorted(
        [MODEL, OPTIMIZER, PROJECTION, STATE]
    )


def test_load_model_predicts_as_the_saved_head_did_from_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    saved(tmp_path / LAST, seed=1)
    saved(tmp_path / BEST, seed=2, with_optimizer=False)
    basal, perturbation = torch.ones(2, 3, 3), torch.ones(2, 2)
    for folder, seed in ((tmp_path, 2), (tmp_path / LAST, 1), (str(tmp_path / BEST), 2)):
        model = load_model(folder)
        assert not model.training and next(model.parameters()).dtype == torch.float32
        predicted = model(basal, perturbation)
        assert predicted.shape == (2, 3, 4)
        assert torch.equal(predicted, new_model(SIZES, seed).eval()(basal, perturbation))
        predicted.sum().backward()  # a loaded head can be trained further


def test_the_same_content_gives_the_same_bytes_in_whatever_order_it_is_given(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    state = dict(reversed(plain_state(5).items()))
    model = dict(reversed(list(new_model(SIZES, 0).state_dict().items())))
    projection = {"basis": torch.eye(3), "mean": torch.zeros(3)}
    save_checkpoint(tmp_path / "b", state, model, optimizer={"exp_avg/w": torch.arange(3.0)}, projection=projection)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_state_json_holds_the_sha256_of_every_file(tmp_path: Path) -> None:
    files = content(saved(tmp_path / LAST))
    made = json.loads(files[STATE])
    assert made["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != STATE}


def flip(name: str, place: float) -> Callable[[Path], None]:
    """Flips one bit of a file, at a share of its length."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(place * (len(data) - 1))] ^= 1
        (folder / name).write_bytes(data)

    return damage


def other_step(folder: Path) -> None:
    text = (folder / STATE).read_text()
    (folder / STATE).write_text(text.replace('"step": 5', '"step": 6'))


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"{name} at {place}": flip(name, place) for name in (MODEL, OPTIMIZER, PROJECTION) for place in (0, 0.5, 1)},
    "a cut model": lambda folder: os.truncate(folder / MODEL, 100),
    "an empty model": lambda folder: os.truncate(folder / MODEL, 0),
    "no model": lambda folder: (folder / MODEL).unlink(),
    "no optimizer": lambda folder: (folder / OPTIMIZER).unlink(),
    "an empty state": lambda folder: os.truncate(folder / STATE, 0),
    "a cut state": lambda folder: os.truncate(folder / STATE, 200),
    "another step": other_step,
    "a list": lambda folder: (folder / STATE).write_text("[]"),
    "no text": lambda folder: (folder / STATE).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_and_a_sound_one_is_offered(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    saved(tmp_path / LAST)
    damage(tmp_path / LAST)
    with pytest.raises(InputError, match=r"damaged") as alone:
        open_checkpoint(tmp_path / LAST)
    assert "\n" not in str(alone.value)
    saved(tmp_path / step_folder(3), 3)
    saved(tmp_path / step_folder(4), 4)
    with pytest.raises(InputError, match=r"damaged.*Sound: .*checkpoint-step-4\. Pass that one instead"):
        load_model(tmp_path / LAST)
    found, problems = latest_checkpoint(tmp_path)
    assert found.folder.name == step_folder(4)
    assert len(problems) <= 1  # a last/ that has lost its step is not even looked at before step 4


def test_a_bit_flip_anywhere_in_state_json_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path / LAST)
    whole = (tmp_path / LAST / STATE).read_bytes()
    unnoticed = []
    for i in range(0, len(whole), 7):
        data = bytearray(whole)
        data[i] ^= 1
        (tmp_path / LAST / STATE).write_bytes(data)
        try:
            open_checkpoint(tmp_path / LAST)
        except InputError:
            continue
        unnoticed.append(json.loads(data) == json.loads(whole))
    assert all(unnoticed)  # a space for another white space, or the last digit of a float, says the same


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / LAST)
    state = json.loads((tmp_path / LAST / STATE).read_text())
    (tmp_path / LAST / STATE).write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(InputError, match=r"checkpoint format 99; this sest reads 1"):
        open_checkpoint(tmp_path / LAST)


def test_weights_that_do_not_fit_their_sizes_are_an_error_of_one_line(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / LAST, plain_state(1, replace(SIZES, n_genes=5)), new_model(SIZES, 0).state_dict())
    with pytest.raises(InputError, match=r"model.safetensors does not fit state.json") as error:
        load_model(tmp_path / LAST)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_moments_cannot_be_resumed(tmp_path: Path) -> None:
    best = open_checkpoint(saved(tmp_path / BEST, with_optimizer=False))
    with pytest.raises(InputError, match=r"no optimizer state.*last/ or a checkpoint-step-N/"):
        best.require_optimizer()
    with pytest.raises(InputError, match=r"has no checkpoint to resume from"):
        latest_checkpoint(tmp_path)
    assert best.projection() is not None


def test_no_projection_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / LAST, plain_state(1), new_model(SIZES, 0).state_dict())
    assert open_checkpoint(tmp_path / LAST).projection() is None


# ---- replacing


class Stop(Exception):
    """Stands for a kill."""


def stopping_at(k: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that raises at its k-th call."""
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == k:
            raise Stop
        return original(*args)

    return call


@pytest.mark.parametrize("k", range(1, 7))
def test_a_checkpoint_that_cannot_be_made_durable_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    before = content(saved(tmp_path / LAST, 5))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopping_at(k, os.fsync))  # three tensor files, state.json, the folder, the run
        with pytest.raises(Stop):
            saved(tmp_path / LAST, 6)
    if k < 6:
        assert content(tmp_path / LAST) == before and visible(tmp_path) == [LAST]  # nothing half done on a full disk
    else:
        assert open_checkpoint(tmp_path / LAST).state["step"] == 6


def test_a_kill_between_the_two_renames_leaves_the_older_one_to_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (LAST, BEST):
        saved(tmp_path / name, 5, with_optimizer=name == LAST)
    before = content(tmp_path / LAST)
    for name in (LAST, BEST):
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", stopping_at(2, os.rename))
            with pytest.raises(Stop):
                saved(tmp_path / name, 6)
    assert visible(tmp_path) == [".best.old", ".last.old"]
    assert content(tmp_path / ".last.old") == before
    assert [folder.name for folder in checkpoints(tmp_path)] == [".last.old", ".best.old"]
    assert latest_checkpoint(tmp_path)[0].folder.name == ".last.old"
    assert find_checkpoint(tmp_path).name == ".best.old" and find_checkpoint(tmp_path, LAST).name == ".last.old"
    assert isinstance(load_model(tmp_path), StateTransition)
    for name in (LAST, BEST):
        saved(tmp_path / name, 6)
    assert visible(tmp_path) == [BEST, LAST]


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else_is(tmp_path: Path) -> None:
    saved(tmp_path / step_folder(4), 4)
    for name in (".last.new", ".checkpoint-step-8.new"):
        shutil.copytree(tmp_path / step_folder(4), tmp_path / name)
    shutil.copytree(tmp_path / step_folder(4), tmp_path / ".last.old")
    assert [folder.name for folder in checkpoints(tmp_path)] == [".last.old", step_folder(4)]
    remove_unfinished(tmp_path)
    assert visible(tmp_path) == [".last.old", step_folder(4)]  # the only last/ there is
    saved(tmp_path / "last", 5)
    shutil.copytree(tmp_path / step_folder(4), tmp_path / ".last.old")
    remove_unfinished(tmp_path)
    assert visible(tmp_path) == [step_folder(4), LAST]


def test_a_copy_is_the_same_checkpoint_and_outlives_its_source(tmp_path: Path) -> None:
    saved(tmp_path / step_folder(4), 4)
    saved(tmp_path / LAST, 3)
    (tmp_path / step_folder(4) / "notes.txt").write_text("a user's own file")
    copy_checkpoint(tmp_path / step_folder(4), tmp_path / LAST)
    (tmp_path / step_folder(4) / "notes.txt").unlink()
    assert content(tmp_path / LAST) == content(tmp_path / step_folder(4))
    assert (tmp_path / LAST / MODEL).stat().st_nlink == 2  # no second 600 MB
    shutil.rmtree(tmp_path / step_folder(4))
    assert open_checkpoint(tmp_path / LAST).state["step"] == 4


def test_a_copy_without_hard_links_is_a_copy_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / step_folder(4), 4)

    def link(source: object, target: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", link)
    copy_checkpoint(tmp_path / step_folder(4), tmp_path / LAST)
    assert content(tmp_path / LAST) == content(tmp_path / step_folder(4))
    assert (tmp_path / LAST / MODEL).stat().st_nlink == 1


def test_a_copy_of_a_damaged_checkpoint_is_damaged_too(tmp_path: Path) -> None:
    saved(tmp_path / step_folder(4), 4)
    flip(MODEL, 0.5)(tmp_path / step_folder(4))
    copy_checkpoint(tmp_path / step_folder(4), tmp_path / LAST)
    with pytest.raises(InputError, match=r"damaged"):
        open_checkpoint(tmp_path / LAST)


def test_a_full_disk_is_an_oserror_that_the_command_line_can_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> str:
        raise OSError(28, "No space left on device", str(path))

    before = content(saved(tmp_path / LAST))
    monkeypatch.setattr(module, "write_flushed", write)
    with pytest.raises(OSError, match=r"No space left"):
        saved(tmp_path / LAST, 6)
    assert content(tmp_path / LAST) == before


# ---- finding


def test_checkpoints_are_listed_from_the_furthest_step_on(tmp_path: Path) -> None:
    for name, step in ((step_folder(10), 10), (step_folder(9), 9), (LAST, 10), (BEST, 10)):
        saved(tmp_path / name, step, with_optimizer=name != BEST)
    (tmp_path / "checkpoint-step-x").mkdir()
    (tmp_path / "notes.old").mkdir()
    assert [f.name for f in checkpoints(tmp_path)] == [LAST, step_folder(10), BEST, step_folder(9)]
    assert [f.name for f in resumable(tmp_path)] == [LAST, step_folder(10), step_folder(9)]
    assert [f.name for f in later_checkpoints(open_checkpoint(tmp_path / step_folder(9)))] == [LAST, step_folder(10)]
    assert later_checkpoints(open_checkpoint(tmp_path / LAST)) == []
    assert checkpoints(tmp_path / "nothing") == []


def test_a_run_means_its_best_then_its_last_then_its_furthest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no checkpoint\. It has: \(none\)"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"does not exist"):
        find_checkpoint(tmp_path / "nothing")
    for name, step in ((step_folder(4), 4), (step_folder(8), 8)):
        saved(tmp_path / name, step)
    assert find_checkpoint(tmp_path).name == step_folder(8)
    saved(tmp_path / LAST, 6)
    assert find_checkpoint(tmp_path).name == LAST
    saved(tmp_path / BEST, 2)
    assert find_checkpoint(tmp_path).name == BEST
    assert find_checkpoint(tmp_path, step_folder(4)).name == step_folder(4)
    assert find_checkpoint(tmp_path / LAST).name == LAST
    with pytest.raises(InputError, match=r"has no checkpoint 'checkpoint-step-5'. It has: checkpoint-step-8, last"):
        find_checkpoint(tmp_path, step_folder(5))


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_ones_beside_it(tmp_path: Path) -> None:
    saved(tmp_path / LAST)
    with pytest.raises(InputError, match=r"is not a checkpoint: it has no state.json. Sound: .*last"):
        sound_checkpoint(tmp_path / "lats")
    assert isinstance(sound_checkpoint(tmp_path / LAST), Checkpoint)


def test_shared_memory_between_tensors_is_no_obstacle(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = dict(new_model(SIZES, 0).state_dict())
    save_checkpoint(
        tmp_path / LAST,
        plain_state(1),
        tensors,
        optimizer={"a": tensors["pert_encoder.0.weight"].t()},
    )
    weight = open_checkpoint(tmp_path / LAST).optimizer_tensors()["a"]
    assert torch.equal(weight, tensors["pert_encoder.0.weight"].t())
