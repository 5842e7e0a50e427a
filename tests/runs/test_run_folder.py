"""The run folder: refused, begun, resumed, damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.configs import small_config
from helpers.notes import Notes
from helpers.runs import CHECKPOINTS, files, metrics, same, signal_after, weights
from sest.config import TrainConfig
from sest.errors import InputError
from sest.machine.signals import Interrupted
from sest.progress import reporting
from sest.runs.checkpoint import open_checkpoint, save_checkpoint, step_folder
from sest.runs.curves import read_lines
from sest.runs.run_folder import CONFIG, METRICS, RESUMABLE, SPLITS, config_of, read_run_config, resumed_config
from sest.runs.schema import BEST, LAST, MODEL, OPTIMIZER, STATE
from sest.training.train import train


def test_an_existing_run_is_refused_and_stays_as_it_was(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(InputError, match=r"run exists. Continue it with --resume auto, or choose another --run"):
        train(cache, run, small_config(max_steps=20))
    assert {f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"exists"):
        train(cache, tmp_path / "file", small_config())


def test_a_folder_that_is_no_run_is_never_written_to(cache: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for resume in (None, "auto", str(whole / LAST)):
        with pytest.raises(InputError, match=r"exists"):
            train(cache, tmp_path, small_config(), resume=resume)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_and_one_whose_first_write_was_killed_can_be_used(
    cache: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml.partial").write_text("max_ste")
    assert resumed_config(run, "auto", {"max_steps": 3}).max_steps == 3
    train(cache, run, small_config())
    assert files(run) == files(whole)
    assert sorted(f.name for f in run.iterdir()) == sorted([*CHECKPOINTS, CONFIG, METRICS])


def test_bad_input_leaves_no_run_folder(cache: Path, tmp_path: Path) -> None:
    for changes in (
        {"hidden": 10, "n_heads": 4},
        {"perturbations": str(tmp_path / "none.npz")},
        {"splits": str(tmp_path / "none.toml")},
        {"target_sum": "x"},
        {"device": "cuda:99"},
        {"device": "toaster"},
        {"precision": "fp16"},
        {"data_device": "gpu"},
        {"val_fraction": 0.0},
    ):
        with pytest.raises(InputError):
            train(cache, tmp_path / "run", small_config(**changes))
    assert not (tmp_path / "run").exists()


def test_config_toml_of_a_run_gives_the_same_run_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "splits.toml").write_text('[datasets]\nscreen = "s.h5ad"\n[training]\nscreen = "train"\n')
    np.savez(tmp_path / "f.npz", allow_pickle=False, **{n: np.full(3, i, np.float32) for i, n in enumerate("PQRST")})
    monkeypatch.chdir(tmp_path)
    config = small_config(splits="splits.toml", perturbations="f.npz", loss="mse", clip=0.5)
    train(cache, tmp_path / "run", config)
    values, provenance = read_run_config(tmp_path / "run")
    assert provenance["cache"] == str(cache.resolve()) and provenance["torch_version"] == torch.__version__
    assert values["splits"] == str(tmp_path / "run" / SPLITS) and values["perturbations"] == str(tmp_path / "f.npz")
    monkeypatch.chdir("/")
    (tmp_path / "splits.toml").unlink()  # the run has its own copy
    train(cache, tmp_path / "again", TrainConfig.from_values(values, "config.toml"))
    assert files(tmp_path / "again") == files(tmp_path / "run")


def test_a_run_goes_on_with_its_own_splits_and_with_features_that_were_moved(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "splits.toml").write_text('[datasets]\nscreen = "s.h5ad"\n[training]\nscreen = "train"\n')
    vectors = {n: np.full(3, i, np.float32) for i, n in enumerate("PQRST")}
    np.savez(tmp_path / "f.npz", allow_pickle=False, **vectors)
    config = small_config(splits=str(tmp_path / "splits.toml"), perturbations=str(tmp_path / "f.npz"))
    train(cache, tmp_path / "whole", config)
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(cache, run, config, on_log=signal_after(6))
    (tmp_path / "splits.toml").unlink()
    (tmp_path / "f.npz").rename(tmp_path / "moved.npz")
    resumed = resumed_config(run, "auto", {"perturbations": str(tmp_path / "moved.npz")})
    train(cache, run, resumed, resume="auto")
    for which in (MODEL, OPTIMIZER):
        assert same(weights(run / LAST, which), weights(tmp_path / "whole" / LAST, which))
    vectors["P"] += 1
    np.savez(tmp_path / "moved.npz", allow_pickle=False, **vectors)
    with pytest.raises(InputError, match=r"is of another run \(other vectors of the perturbations"):
        train(cache, run, resumed, resume="auto")


def test_going_back_with_another_learning_rate_beside_later_checkpoints_is_refused(
    cache: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = small_config(lr=1e-4, clip=0.5)
    with pytest.raises(InputError) as error:
        train(cache, run, config, resume=str(run / step_folder(4)))
    assert "later checkpoints (last, checkpoint-step-12, checkpoint-step-8), made with another --lr, --clip." in str(
        error.value
    )
    assert "in another --run folder" in str(error.value)
    assert files(run) == files(whole) and metrics(run) == metrics(whole)
    train(cache, tmp_path / "branch", config, resume=str(run / step_folder(4)))
    assert not same(weights(tmp_path / "branch" / LAST), weights(whole / LAST))
    train(cache, run, small_config(lr=1e-4, max_steps=13), resume=str(run / LAST))  # nothing later


def test_resumed_config_takes_what_may_change_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    config = resumed_config(whole, "auto", {"max_steps": 99, "lr": 0.5, "device": "cpu", "batch_size": 3})
    assert (config.max_steps, config.lr, config.batch_size, config.hidden) == (99, 0.5, 3, 16)
    with pytest.raises(InputError, match=r"--set-size 5 would make another run; this one has 4. Use a new --run"):
        resumed_config(whole, "auto", {"set_size": 5})
    with pytest.raises(InputError, match=r"Unknown key 'steps'"):
        resumed_config(whole, "auto", {"steps": 5})
    assert resumed_config(tmp_path / "new", str(whole / LAST), {}) == resumed_config(whole, "auto", {})
    with pytest.raises(InputError, match=r"is no run folder: it has no config.toml"):
        resumed_config(whole / LAST, "auto", {})


def test_a_new_run_has_a_preset_unless_its_head_is_named_or_its_options_are_a_files(tmp_path: Path) -> None:
    def preset(options: dict[str, Any], **how: Any) -> str | None:
        return config_of(tmp_path / "run", options, None, "here", **how).preset

    assert preset({}) == preset({"max_steps": 5, "lr": 0.1}) == "auto"
    assert [preset({"preset": "full"}), preset({"preset": "small", "hidden": 8}, from_file=True)] == ["full", "small"]
    for options in ({"hidden": 8}, {"ffn": 8}, {"head": "none"}, {"init_from": "x"}):
        assert preset(options) is None
    assert preset({"max_steps": 5}, from_file=True) is None
    (tmp_path / "run").mkdir()
    assert config_of(tmp_path / "run", {}, "auto", "here").preset == "auto"


def spoil(folder: Path, name: str = MODEL) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).unlink()  # last/ and the kept checkpoint of the same step share their files
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_resume_auto_passes_over_damaged_checkpoints_and_makes_them_again(
    cache: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for folder in (LAST, step_folder(12)):
        spoil(run / folder, name)
    with pytest.raises(InputError, match=r"damaged.*Sound: .*checkpoint-step-8\. Pass that one instead"):
        train(cache, run, small_config(), resume=str(run / LAST))
    notes = Notes()
    with reporting(notes):
        train(cache, run, small_config(), resume="auto")
    assert sum(text.startswith("Passed over: ") for text in notes.notes) == 2
    assert f"Resuming from {run / step_folder(8)} at step 8." in notes.notes
    assert files(run) == files(whole) and metrics(run) == metrics(whole)


def test_a_damaged_kept_checkpoint_never_becomes_last(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / LAST)
    spoil(run / step_folder(12))
    train(cache, run, small_config(checkpoint_every=100), resume="auto")  # step 12 is not kept this time
    assert weights(run / LAST).keys() and same(weights(run / LAST), weights(whole / LAST))


def test_a_run_with_damaged_checkpoints_only_is_not_started_over(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for folder in CHECKPOINTS:
        spoil(run / folder)
    with pytest.raises(InputError, match=r"no checkpoint to resume from \(.*damaged.*another --run folder"):
        train(cache, run, small_config(), resume="auto")


def test_best_cannot_be_resumed(cache: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no optimizer state"):
        train(cache, tmp_path / "run", small_config(), resume=str(whole / BEST))


def test_a_kill_between_the_renames_of_last_is_recovered_from(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(cache, run, small_config(), on_log=signal_after(6))
    (run / LAST).rename(run / ".last.old")
    shutil.copytree(run / ".last.old", run / ".last.new")  # the one that was being put in its place
    notes = Notes()
    with reporting(notes):
        train(cache, run, small_config(), resume="auto")
    assert f"Resuming from {run / '.last.old'} at step 6." in notes.notes
    assert files(run) == files(whole)


def test_a_run_from_before_val_contexts_goes_on_with_the_split_it_had(cache: Path, tmp_path: Path) -> None:
    """Its files do not say where perturbations are held out: in all contexts, with one-hot features too."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(cache, whole, small_config(val_contexts="all"))
    train(cache, run, small_config(val_contexts="all", max_steps=8))
    values = (run / CONFIG).read_text()
    (run / CONFIG).write_text(values.replace('val_contexts = "all"\n', ""))
    assert (run / CONFIG).read_text() != values
    for folder in (run / LAST, run / step_folder(8)):
        checkpoint = open_checkpoint(folder)
        state = {key: value for key, value in checkpoint.state.items() if key not in ("files", "sha256")}
        state["config"] = {key: value for key, value in state["config"].items() if key != "val_contexts"}
        tensors = checkpoint.model_tensors()
        save_checkpoint(
            folder, state, tensors, optimizer=checkpoint.optimizer_tensors(), projection=checkpoint.projection()
        )
    train(cache, run, resumed_config(run, "auto", {"max_steps": 12}), resume="auto")
    for name in (MODEL, OPTIMIZER, STATE):
        assert (run / LAST / name).read_bytes() == (whole / LAST / name).read_bytes()
    assert metrics(run) == metrics(whole)
    assert read_run_config(run)[0]["val_contexts"] == "all"


def test_a_head_of_the_hub_is_not_fetched_at_the_word_of_a_run(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / CONFIG).write_text(f'init_from = "hf://lab/head"\n{(whole / CONFIG).read_text()}')
    with pytest.raises(
        InputError, match=r"says that it starts from hf://lab/head; pass it yourself: --init-from hf://"
    ):
        resumed_config(run, "auto", {})
    assert resumed_config(run, "auto", {"init_from": "hf://lab/head"}).init_from == "hf://lab/head"


def test_an_edited_configuration_or_splits_file_is_said_once(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = read_run_config(run)
    assert not caplog.messages and "sha256" not in before[1]
    text = (run / CONFIG).read_text()
    assert "lr = 0.001" in text
    (run / CONFIG).write_text(text.replace("lr = 0.001", "lr = 0.003"))
    assert read_run_config(run)[0]["lr"] == 0.003 == read_run_config(run)[0]["lr"]
    assert [message for message in caplog.messages if "is not as sest wrote it" in message] == caplog.messages
    assert len(caplog.messages) == 1 and str(run) in caplog.messages[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("sha256 = ", "sja256 = "),  # one bit, and there is nothing to compare with
        lambda text: text[: text.index("[provenance]")],
        lambda text: text[: text.index("resumed_from")],
    ],
)
def test_a_configuration_that_lost_its_hash_is_said(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[str], str]
) -> None:
    (tmp_path / CONFIG).write_text(change((whole / CONFIG).read_text()))
    read_run_config(tmp_path)
    assert len(caplog.messages) == 1 and "is not as sest wrote it" in caplog.messages[0]


def test_a_line_of_metrics_that_is_not_as_it_was_written_is_refused(whole: Path, tmp_path: Path) -> None:
    data = (whole / METRICS).read_bytes()
    lines = read_lines(whole / METRICS)
    assert lines and all("crc32c" not in line for line in lines)
    (tmp_path / METRICS).write_bytes(data + data.splitlines()[-1][:-9])  # a kill
    assert read_lines(tmp_path / METRICS) == lines
    at = data.index(b'"loss": ') + len(b'"loss": ')
    (tmp_path / METRICS).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(InputError, match=r"metrics.jsonl, line 1: it is damaged, not as it was written"):
        read_lines(tmp_path / METRICS)


def test_what_a_resumed_run_may_change_are_fields_of_the_configuration() -> None:
    assert set(RESUMABLE) <= set(TrainConfig.names()) and len(set(RESUMABLE)) == len(RESUMABLE)
