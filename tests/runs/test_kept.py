"""Which checkpoints stay, and what disk they take: --keep-last, and what is said and refused before the first step."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.configs import small_config
from helpers.notes import Notes
from helpers.runs import files, metrics, signal_after
from sest.errors import InputError
from sest.machine.behind import Behind
from sest.machine.signals import Interrupted
from sest.progress import reporting
from sest.runs.checkpoint import checkpoints, step_folder, step_folders
from sest.runs.kept import check_disk, delete_older, most_at_once
from sest.runs.run_folder import CONFIG
from sest.runs.schema import BEST, LAST, STATE
from sest.training.train import train

FULL, HEAD = 600_000_000, 200_000_000  # bytes of a checkpoint and of best/


def made(run: Path, *names: str) -> None:
    """Folders that look like checkpoints."""
    for name in names:
        (run / name).mkdir(parents=True)
        (run / name / STATE).write_text('{"step": 0}')


def there(run: Path) -> list[str]:
    """The names of all folders, hidden ones too."""
    return sorted(path.name for path in run.iterdir() if path.is_dir())


def free_disk(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": n_bytes}))


def said(run: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[int, str]:
    """Level and text of what is said of a run of 12 steps, kept at 4, 8 and 12, at its beginning."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "sest"):
        check_disk(run, small_config(**options), 0, n_bytes=FULL, best_bytes=HEAD)
    (record,) = caplog.records
    return record.levelno, record.getMessage()


# ---- --keep-last


def test_of_a_checkpoint_every_step_the_newest_stay_and_last_and_best(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: list[list[str]] = []
    config = small_config(max_steps=5, checkpoint_every=1, val_every=2, keep_last=2)
    train(cache, run, config, on_log=lambda line: seen.append(there(run)) if "loss" in line else None)
    assert there(run) == [BEST, step_folder(4), step_folder(5), LAST]
    for step, names in enumerate(seen):  # the newest are written and the oldest deleted while steps go on
        kept = [int(name.rpartition("-")[2]) for name in names if name.startswith("checkpoint")]
        assert len(kept) <= 3 and kept == list(range(kept[0], kept[-1] + 1)) if kept else step <= 2


def test_what_stays_is_what_a_run_that_keeps_all_has(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(cache, run, small_config(keep_last=1), on_log=signal_after(9))
    assert there(run) == [BEST, step_folder(8), LAST]
    train(cache, run, small_config(keep_last=1), resume="auto")
    expected = {name: data for name, data in files(whole).items() if step_folder(4) not in name}
    assert files(run) == {name: data for name, data in expected.items() if step_folder(8) not in name}
    assert metrics(run) == metrics(whole)


def test_a_resumed_run_may_keep_fewer_and_a_finished_one_is_tidied(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    train(cache, run, small_config(keep_last=2), resume="auto")
    assert there(run) == [BEST, step_folder(12), step_folder(8), LAST]
    assert files(run) == {name: data for name, data in files(whole).items() if step_folder(4) not in name}


def test_the_newest_go_by_the_number_of_their_step(tmp_path: Path) -> None:
    made(tmp_path, *map(step_folder, (8, 9, 10, 100)), BEST, LAST, "checkpoint-step-x", "notes")
    delete_older(tmp_path, 100, 2)
    assert there(tmp_path) == [BEST, step_folder(10), step_folder(100), "checkpoint-step-x", LAST, "notes"]


def test_a_run_that_went_back_keeps_the_one_just_written_and_the_later_ones(tmp_path: Path) -> None:
    made(tmp_path, *map(step_folder, (4, 8, 12)))
    delete_older(tmp_path, 8, 1)
    assert there(tmp_path) == [step_folder(12), step_folder(8)]
    delete_older(tmp_path, 12, 1)
    assert there(tmp_path) == [step_folder(12)]


def test_what_a_kill_between_two_renames_left_counts_as_the_checkpoint_it_is(tmp_path: Path) -> None:
    made(tmp_path, ".checkpoint-step-4.old", step_folder(8), step_folder(12))
    assert [step for step, _ in step_folders(tmp_path)] == [4, 8, 12]
    delete_older(tmp_path, 12, 2)
    assert there(tmp_path) == [step_folder(12), step_folder(8)]


def test_a_link_of_the_user_is_left_alone(tmp_path: Path) -> None:
    made(tmp_path / "elsewhere", "kept")
    made(tmp_path / "run", step_folder(8))
    (tmp_path / "run" / step_folder(4)).symlink_to(tmp_path / "elsewhere/kept")
    delete_older(tmp_path / "run", 8, 1)
    assert there(tmp_path / "run") == [step_folder(4), step_folder(8)] and there(tmp_path / "elsewhere") == ["kept"]


@pytest.mark.parametrize("key", ["resumed_from", "init_from"])
def test_a_checkpoint_that_another_run_starts_from_stays_until_that_has_its_own(tmp_path: Path, key: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    made(run, *map(step_folder, (4, 8, 12)))
    start = f'{key} = "{run / step_folder(4)}"\n'
    other.mkdir()
    (other / CONFIG).write_text(f"[provenance]\n{start}" if key == "resumed_from" else start)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / CONFIG).write_text("= no TOML")
    delete_older(run, 12, 1)
    assert there(run) == [step_folder(12), step_folder(4)]
    made(other, BEST)  # without moments: the run still begins where it began
    delete_older(run, 12, 1)
    assert there(run) == [step_folder(12), step_folder(4)]
    made(other, LAST)
    delete_older(run, 12, 1)
    assert there(run) == [step_folder(12)]


# ---- a kill, a disk that fails


class Kill(BaseException):
    """Ends the process at a point, as far as the disk can tell."""


def killed(*arguments: object, **options: object) -> None:
    raise Kill


def test_a_kill_before_the_name_is_gone_leaves_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, step_folder(4), step_folder(8))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(Kill):
            delete_older(tmp_path, 8, 1)
    assert there(tmp_path) == [step_folder(4), step_folder(8)]
    delete_older(tmp_path, 8, 1)
    assert there(tmp_path) == [step_folder(8)]


def test_a_kill_after_the_name_is_gone_leaves_no_checkpoint_and_the_next_save_sweeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, step_folder(4), step_folder(8))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", killed)  # its files are deleted, it is not
        with pytest.raises(Kill):
            delete_older(tmp_path, 8, 1)
    assert there(tmp_path) == [".checkpoint-step-4.gone", step_folder(8)]
    assert [folder.name for folder in checkpoints(tmp_path)] == [step_folder(8)]
    delete_older(tmp_path, 8, 1)
    assert there(tmp_path) == [step_folder(8)]


def test_a_resumed_run_sweeps_what_a_kill_left_of_a_deleted_checkpoint(
    cache: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    os.rename(run / step_folder(4), run / ".checkpoint-step-4.gone")
    train(cache, run, small_config(), resume="auto")  # keeps all, but that one was given up
    assert there(run) == [BEST, step_folder(12), step_folder(8), LAST]


@pytest.mark.parametrize(("operation", "left"), [("rename", step_folder(1)), ("rmdir", ".checkpoint-step-1.gone")])
def test_a_checkpoint_that_cannot_be_deleted_is_a_warning_and_is_tried_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, left: str
) -> None:
    run, failures = tmp_path / "run", 0

    def failing(original: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *arguments: Any, **options: Any) -> None:
            nonlocal failures
            if failures == 0 and "checkpoint-step-1" in str(path) and not str(path).endswith(".new"):
                failures += 1
                raise PermissionError(13, "Permission denied", str(path))
            original(path, *arguments, **options)

        return call

    def done_at_once(behind: Behind, work: Callable[[], None]) -> None:
        do(behind, work)
        behind.wait()

    seen: list[list[str]] = []
    do = Behind.do
    monkeypatch.setattr(Behind, "do", done_at_once)  # else what is seen after a step depends on the thread that writes
    monkeypatch.setattr(os, operation, failing(getattr(os, operation)))
    notes = Notes()
    with reporting(notes):
        train(
            cache, run, small_config(max_steps=4, checkpoint_every=1, keep_last=1),
            on_log=lambda line: seen.append(there(run)))  # fmt: skip
    assert [note for note in notes.notes if "could not" in note] == [
        f"{run / step_folder(1)} could not be deleted (Permission denied); it is tried again at the next save."
    ]
    assert left in seen[2] and left not in seen[3]  # after step 2, and after step 3
    assert there(run) == [BEST, step_folder(4), LAST]


# ---- the disk


def test_checkpoints_at_the_same_time_are_counted() -> None:
    # kept at 4, 8 and 12, which is last/ too: all three; with one to stay the one being written beside it
    assert [most_at_once(3, False, 0, keep) for keep in (0, 1, 2, 3, 9)] == [3, 2, 3, 3, 3]
    # ends at 14: last/ comes on top, when all but --keep-last are gone
    assert [most_at_once(3, True, 0, keep) for keep in (0, 1, 2, 3)] == [4, 2, 3, 4]
    assert [most_at_once(1, at_end, 0, 1) for at_end in (False, True)] == [1, 2]
    assert [most_at_once(0, True, before, 1) for before in (0, 5)] == [1, 1]  # last/ alone is written
    # resumed with two there: the third is beside both, then one goes for each that comes
    assert [most_at_once(3, False, 2, keep) for keep in (0, 1, 2, 3, 4)] == [3, 1, 1, 2, 3]


def test_what_is_needed_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free_disk(monkeypatch, 5_000_000_000)
    level, line = said(tmp_path / "a/run", caplog)
    assert level == logging.INFO and not (tmp_path / "a").exists()
    assert line == (
        "The checkpoints to come take at most 2.0 GB of disk (3 of 600.0 MB and best/ of 200.0 MB); 5.0 GB are free "
        f"at {tmp_path}."
    )
    assert "1.4 GB of disk (2 of 600.0 MB and" in said(tmp_path / "run", caplog, keep_last=1)[1]


def test_a_disk_that_holds_some_but_not_all_is_a_warning_that_names_keep_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free_disk(monkeypatch, 1_400_000_000)  # exactly two and best/
    level, line = said(tmp_path, caplog)
    assert level == logging.WARNING
    assert line.endswith("The disk may be full before the run ends: --keep-last 1 fits.")
    assert said(tmp_path, caplog, keep_last=1)[0] == logging.INFO
    free_disk(monkeypatch, 2_000_000_000)  # three and best/, of six
    level, line = said(tmp_path, caplog, checkpoint_every=2)
    assert level == logging.WARNING and "3.8 GB of disk (6 of" in line and "--keep-last 2 fits" in line


def test_a_disk_that_cannot_hold_those_of_the_same_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free_disk(monkeypatch, 1_399_999_999)
    with pytest.raises(InputError) as refused:
        said(tmp_path, caplog, keep_last=1)
    assert str(refused.value) == (
        "The checkpoints that are there at the same time take at least 1.4 GB of disk (2 of 600.0 MB and best/ of "
        f"200.0 MB); 1.4 GB are free at {tmp_path}. Free some, choose a --run folder on another disk, or pass "
        "--checkpoint-every 12."
    )
    assert said(tmp_path, caplog, checkpoint_every=12)[0] == logging.INFO  # what it says helps
    free_disk(monkeypatch, 799_999_999)
    with pytest.raises(InputError, match=r"at least 800\.0 MB .*on another disk\.$"):
        said(tmp_path, caplog, checkpoint_every=12)


def test_a_run_that_may_stop_early_is_refused_only_where_one_checkpoint_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free_disk(monkeypatch, 800_000_000)
    level, line = said(tmp_path, caplog, early_stopping=True)
    assert level == logging.WARNING and "--keep-last 1 and a larger --checkpoint-every take less" in line
    free_disk(monkeypatch, 799_999_999)
    with pytest.raises(InputError, match=r"\(1 of 600\.0 MB and best/"):
        said(tmp_path, caplog, early_stopping=True)


def test_a_resumed_run_needs_what_comes_beside_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, step_folder(4), BEST)
    config = small_config(keep_last=1)
    free_disk(monkeypatch, FULL)
    with caplog.at_level(logging.INFO, "sest"):
        check_disk(tmp_path, config, 4, n_bytes=FULL, best_bytes=0)
    assert "at most 600.0 MB of disk (1 of 600.0 MB);" in caplog.text
    free_disk(monkeypatch, FULL - 5)
    with pytest.raises(InputError, match=r"take at least 600\.0 MB"):
        check_disk(tmp_path, config, 4, n_bytes=FULL, best_bytes=0)
    made(tmp_path, ".checkpoint-step-8.new")  # what a full disk left is deleted before the first step
    (tmp_path / ".checkpoint-step-8.new" / "model.safetensors").write_bytes(b"12345")
    check_disk(tmp_path, config, 4, n_bytes=FULL, best_bytes=0)


def test_train_refuses_a_disk_that_is_too_small_and_says_its_checkpoints_bytes(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    asked: list[dict[str, int]] = []

    def noted(*arguments: Any, **sizes: Any) -> None:
        asked.append(sizes)
        check_disk(*arguments, **sizes)

    monkeypatch.setattr("sest.training.trainer.check_disk", noted)
    with monkeypatch.context() as patch:
        free_disk(patch, 1000)
        with pytest.raises(InputError, match=r"at the same time take at least .* kB"):
            train(cache, run, small_config())
    assert not run.exists()
    (sizes,) = asked
    # float32: 5,508 parameters in 22 tensors and the projection of width 6 (basis, mean, variance); then two moments of
    # each parameter, and the step of each tensor
    best = 4 * (5508 + 6 * 6 + 6 + 6)
    assert sizes == {"n_bytes": best + 4 * (2 * 5508 + 22), "best_bytes": best}
    on_disk = sum(file.stat().st_size for file in (whole / step_folder(4)).glob("*.safetensors"))
    assert 0 < on_disk - sizes["n_bytes"] < 20_000  # names and shapes
    notes = Notes()
    with reporting(notes):
        train(cache, run, small_config(max_steps=4))
    assert len([note for note in notes.notes if note.startswith("The checkpoints to come take at most ")]) == 1
    with reporting(notes):
        train(cache, run, small_config(max_steps=4), resume="auto")  # nothing to come
    assert len([note for note in notes.notes if note.startswith("The checkpoints to come")]) == 1
