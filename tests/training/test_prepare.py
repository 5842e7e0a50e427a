"""What happens before the first step: cells in memory or mapped files, and what is said of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import sest.training.prepare
from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.notes import Notes
from helpers.runs import files, metrics, signal_after
from sest.errors import InputError
from sest.machine.signals import Interrupted
from sest.progress import reporting
from sest.runs.run_folder import config_of, read_run_config
from sest.training.train import train


def test_cells_without_a_control_in_their_batch_are_counted_aloud(tmp_path: Path) -> None:
    group = small_screen(n_controls=2, batches=("b1", "b2", "b3", "b4"))
    cache = write_cache(tmp_path / "s.zarr", [group])
    notes = Notes()
    with reporting(notes):
        train(cache, tmp_path / "run", small_config(max_steps=1, match_controls="batch"))
    assert any("training cells have no control in their batch; any of their cell type serves" in n for n in notes.notes)
    notes = Notes()
    with reporting(notes):
        train(cache, tmp_path / "other", small_config(max_steps=1))
    assert not any("in their batch" in text for text in notes.notes)


@pytest.mark.parametrize("target_sum", [1e6, "median"])
def test_files_that_were_normalised_differently_are_trained_on_only_if_that_is_asked_for(
    tmp_path: Path, target_sum: float | str
) -> None:
    cache = write_cache(tmp_path / "s.zarr", [small_screen("a"), small_screen("b", scale="log1p", seed=1)])
    config = small_config(max_steps=1, target_sum=target_sum)
    with pytest.raises(InputError, match=r"normalised differently: .*Pass --target-sum 10000, or .*--mixed-scales"):
        train(cache, tmp_path / "run", config)
    train(cache, tmp_path / "run", dataclasses.replace(config, mixed_scales="allow"))
    with pytest.raises(InputError, match="normalised differently"):
        train(cache, tmp_path / "run", dataclasses.replace(config, max_steps=2), resume="auto")
    train(cache, tmp_path / "other", small_config(max_steps=1))


def test_a_cell_type_the_head_never_sees_is_named_unless_its_controls_are_learned(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "splits.toml").write_text(
        '[datasets]\nscreen = "s.h5ad"\n[training]\nscreen = "train"\n[zeroshot]\n"screen.y" = "test"\n'
    )
    for control_targets in (False, True):
        notes = Notes()
        config = small_config(splits=str(tmp_path / "splits.toml"), control_targets=control_targets, max_steps=1)
        with reporting(notes):
            train(cache, tmp_path / f"run{control_targets}", config)
        said = any("never sees screen / y in training. With --control-targets" in text for text in notes.notes)
        assert said == (not control_targets)


def test_cells_in_mapped_files_give_the_same_bytes_and_the_files_stay_beside_the_cache(
    cache: Path, whole: Path, tmp_path: Path
) -> None:
    run, notes = tmp_path / "run", Notes()
    config = small_config(data_device="disk")
    with pytest.raises(Interrupted), reporting(notes):
        train(cache, run, config, on_log=signal_after(5))
    (values,) = cache.glob(".derived/values-*")
    assert any(f"they are read from {values}." in text for text in notes.notes)
    notes = Notes()
    with reporting(notes):
        train(cache, run, config, resume="auto")
    assert f"The values in {values} are used again." in notes.notes
    assert values.is_dir() and files(run) == files(whole)


def test_a_run_killed_while_its_files_are_written_can_be_started_again(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "run", small_config(data_device="disk", scratch=str(tmp_path / "scratch"))
    with monkeypatch.context() as kill:
        kill.setattr("sest.cache.derived.name_folder", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(cache, run, config)
    assert not run.exists() and not list((tmp_path / "scratch").glob("values-*"))
    train(cache, run, config)
    assert list((tmp_path / "scratch").glob("values-*"))
    assert files(run) == files(whole)  # --scratch is in config.toml alone


@pytest.mark.parametrize("named", [False, True])
def test_runs_of_one_cache_share_the_files(cache: Path, tmp_path: Path, named: bool) -> None:
    place = tmp_path / "scratch" if named else cache / ".derived"
    config = small_config(data_device="disk", scratch=str(place) if named else None, max_steps=1)
    train(cache, tmp_path / "a", config)
    (values,) = place.glob("values-*")
    written = {file: file.stat().st_mtime_ns for file in values.iterdir()}
    notes = Notes()
    with reporting(notes):
        train(cache, tmp_path / "b", dataclasses.replace(config, target_sum=1e3))
        train(cache, tmp_path / "c", config)
    assert notes.notes.count(f"The values in {values} are used again.") == 2
    assert {file: file.stat().st_mtime_ns for file in values.iterdir()} == written
    assert files(tmp_path / "a") == files(tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"Precision tf32 needs a GPU with TF32 units \(Ampere or newer\)\. Use --precision fp32\."),
        (
            {"loss": "energy+sinkhorn"},
            r"--loss energy\+sinkhorn has float32 products, which TF32 rounds\. Use --precision",
        ),
    ],
    ids=["on a CPU", "sinkhorn on a GPU"],
)
def test_tf32_is_refused_where_there_is_none_and_with_a_loss_that_it_would_round(
    cache: Path, tmp_path: Path, options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options:
        monkeypatch.setattr(sest.training.prepare, "choose_precision", lambda name, device, training: name)
    with pytest.raises(InputError, match=message):
        train(cache, tmp_path / "run", small_config(precision="tf32", **options))
    assert not (tmp_path / "run").exists()


def test_what_one_hot_features_cannot_learn_is_said_and_its_validation_is_marked(cache: Path, tmp_path: Path) -> None:
    notes, run = Notes(), tmp_path / "run"
    with reporting(notes):
        train(cache, run, small_config(max_steps=4, val_contexts="all"))
    said = "\n".join(notes.notes)
    held = re.search(r"held out 1 of 5 training perturbations \((\w)\)", said)
    assert held is not None
    assert f"never learn 1 of 5 perturbations, as they have no training cells in any context: {held[1]}." in said
    assert "The val split has only perturbations that cannot be learned (1): val_loss" in said
    assert "no pds there (-)" in said
    (line,) = (line for line in metrics(run) if "val_loss" in line)
    assert (line["pds"], line["val_perturbations_not_learned"]) == (None, 1)
    notes = Notes()
    with reporting(notes):
        train(cache, tmp_path / "other", small_config(max_steps=4))
    said = "\n".join(notes.notes)
    assert "in one context each" in said and "never learn" not in said and "cannot be learned" not in said
    assert not any("val_perturbations_not_learned" in line for line in metrics(tmp_path / "other"))


def test_perturbations_with_the_same_vector_are_named(cache: Path, tmp_path: Path) -> None:
    vectors = {name: np.full(3, number, np.float32) for name, number in zip("PQRST", (1, 2, 1, 0, 5), strict=True)}
    np.savez(tmp_path / "f.npz", allow_pickle=False, **vectors)
    notes = Notes()
    with reporting(notes):
        train(cache, tmp_path / "run", small_config(max_steps=1, perturbations=str(tmp_path / "f.npz")))
    (said,) = (note for note in notes.notes if "same feature vector" in note)
    assert said.endswith("cannot tell apart: ctrl, S; P, R.")  # S is zero as the control is


def test_the_size_of_a_set_is_chosen_from_the_pairs_where_that_is_asked_for(tmp_path: Path) -> None:
    """Pairs of 9 cells fill sets of 16; in sets of 64 most cells would be repeated, which is said."""
    cache = write_cache(tmp_path / "s.zarr", [small_screen(sizes={"P": 9, "Q": 9, "R": 9}, n_controls=20)])
    notes = Notes()
    with reporting(notes):
        train(cache, tmp_path / "run", small_config(max_steps=1, set_size=0))
    assert "Sets have 16 cells (--set-size auto: what half of the training pairs fill)." in notes.notes
    assert not any("filled by repeating" in text for text in notes.notes)
    assert read_run_config(tmp_path / "run")[0]["set_size"] == 16
    notes = Notes()
    with reporting(notes):
        train(cache, tmp_path / "run", small_config(max_steps=2, set_size=16), resume="auto")
        train(cache, tmp_path / "other", small_config(max_steps=1, set_size=64))
    (said,) = (text for text in notes.notes if "filled by repeating" in text)
    assert said.startswith(f"Sets of 64 cells are filled by repeating cells: {64 / 9:.3g} times the cells")
    with pytest.raises(InputError, match="--set-size 1: the loss compares the cells of a set"):
        train(cache, tmp_path / "none", small_config(max_steps=1, set_size=1))


def test_a_preset_chooses_what_was_not_given_once_and_the_run_keeps_what_and_why(cache: Path, tmp_path: Path) -> None:
    run, notes = tmp_path / "run", Notes()
    config = small_config(preset="auto", max_steps=2)
    given = ("max_steps", "set_size", "device", "num_workers")
    with reporting(notes):
        train(cache, run, config, given=given)
    (said,) = [text for text in notes.notes if text.startswith("Preset ")]
    assert said.startswith("Preset small: hidden 128, 1 layer, 2 steps of 32 sets x 4 cells at lr 0.001, chosen for ")
    values, provenance = read_run_config(run)
    assert provenance["chosen"] == said and values["preset"] == "auto"
    shown = {
        key: values[key] for key in ("hidden", "n_layers", "lr", "max_steps", "set_size", "batch_size", "val_every")
    }
    assert shown == {
        "hidden": 128, "n_layers": 1, "lr": 1e-3, "max_steps": 2, "set_size": 4, "batch_size": 32, "val_every": 1,
    }  # fmt: skip
    notes = Notes()
    with reporting(notes):
        train(cache, run, config_of(run, {"max_steps": 3}, "auto", "here"), resume="auto", given=("max_steps",))
    assert not [text for text in notes.notes if text.startswith("Preset ")]
    values, provenance = read_run_config(run)
    assert provenance["chosen"] == said and (values["hidden"], values["max_steps"]) == (128, 3)


def test_a_run_stopped_before_its_first_checkpoint_keeps_what_it_was_begun_with(cache: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", small_config(preset="small", max_steps=2, lr=0.01)
    with pytest.raises(KeyboardInterrupt):
        train(cache, run, config, given=("lr", "max_steps", "device"), on_log=mock.Mock(side_effect=KeyboardInterrupt))
    train(cache, run, config_of(run, {}, "auto", "here"), resume="auto")
    values, provenance = read_run_config(run)
    assert (values["lr"], values["hidden"]) == (0.01, 128) and "Preset small" in provenance["chosen"]


def test_a_preset_beside_another_head_or_none_is_refused(cache: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--init-from brings its own"):
        train(cache, tmp_path / "run", small_config(preset="small", init_from=str(whole)))
    with pytest.raises(InputError, match="--head none leaves it out"):
        train(cache, tmp_path / "run", small_config(preset="small", head="none"))
    assert not (tmp_path / "run").exists()
