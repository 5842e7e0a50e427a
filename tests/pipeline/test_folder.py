"""`sest run`: what a folder keeps, where it goes on, and what is chosen where nothing was said."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

import anndata as ad
import pytest
from conftest import Demo

from helpers.runs import signal_after
from helpers.watching import Recorder
from sest.cli.main import main
from sest.errors import InputError
from sest.machine.signals import Interrupted
from sest.pipeline import stages
from sest.pipeline.folder import run_pipeline
from sest.pipeline.stages import EMBED, EVALUATE, PREDICT, REPORT, STAGES, STATE, TRAIN
from sest.runs.checkpoint import open_checkpoint
from sest.runs.run_folder import resumed_config
from sest.training.train import train

OPTIONS = {"max_steps": 24, "preset": "small", "device": "cpu"}


class Stopped(Recorder):
    """Sends SIGTERM while the head trains."""

    def logged(self, line: dict[str, Any]) -> None:
        signal_after(2)(line)


@pytest.fixture(scope="module")
def begun(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Recorder, Recorder]:
    """Cells, a folder that was stopped while it trained and then finished, and what was said both times."""
    folder = tmp_path_factory.mktemp("my files")  # to be quoted
    cells, out = folder / "cells.h5ad", folder / "out"
    shutil.copy(demo.cells, cells)
    first, second = Stopped(), Recorder()
    with pytest.raises(Interrupted, match=r"Go on with --resume auto. Or `sest run` again") as stopped:
        run_pipeline(cells, out, OPTIONS, first)
    assert stopped.value.signum == signal.SIGTERM
    result = run_pipeline(cells, out, {}, second)
    assert result.training is not None and result.training.step == 24
    return cells, out, first, second


def test_a_second_call_goes_on_where_it_stopped(begun: tuple[Path, Path, Recorder, Recorder]) -> None:
    _, out, first, second = begun
    assert [shlex.split(line)[1] for line in first.commands] == ["info", EMBED, TRAIN]
    assert first.ended == [EMBED] and second.skipped == [EMBED] and second.ended == [TRAIN, PREDICT, EVALUATE, REPORT]
    assert [shlex.split(line)[1] for line in second.commands] == [TRAIN, PREDICT, EVALUATE, REPORT]
    assert "--resume auto" in second.commands[0] and "--max-steps 24" in second.commands[0]
    assert {path.name for path in out.iterdir()} == set(stages.MADE)


def test_a_third_call_has_nothing_to_do(begun: tuple[Path, Path, Recorder, Recorder]) -> None:
    cells, out, *_ = begun
    third = Recorder()
    result = run_pipeline(cells, out, OPTIONS, third)
    assert third.skipped == list(STAGES) and not third.commands and result.report is None
    assert result.plan.report == out / "report.html" and result.plan.report.is_file()


def test_what_is_held_out_is_chosen_said_and_written(begun: tuple[Path, Path, Recorder, Recorder]) -> None:
    _, out, first, _ = begun
    (said,) = first.notes
    assert "Of 12 perturbations in " in said and f"Written to {out / 'splits.toml'}; --splits takes another" in said
    assert (out / "splits.toml").read_text().startswith("# Of 12 perturbations in ")
    splits = tomllib.loads((out / "splits.toml").read_text())["fewshot"]
    (held,) = splits.values()
    assert len(held["test"]) == 2 and len(held["val"]) == 3
    assert set(held["test"]) < set(ad.read_h5ad(out / "predicted.h5ad").obs.iloc[:, 0])


def test_what_was_stopped_between_stages_is_carried_out_again(
    begun: tuple[Path, Path, Recorder, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, done, *_ = begun
    out = tmp_path / "out"
    shutil.copytree(done, out)
    longer = {**OPTIONS, "max_steps": 25}
    with monkeypatch.context() as killed:
        killed.setattr(stages, "predict", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(cells, out, longer)
    assert open_checkpoint(out / "run" / "last").state["step"] == 25
    for name in ("evaluate", "write_report"):
        monkeypatch.setattr(stages, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    again = Recorder()
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(cells, out, {}, again)
    assert again.skipped == [EMBED, TRAIN] and again.ended == [PREDICT]  # the older predictions are not taken for new
    assert again.commands[0].endswith("--force")
    (out / "cache.zarr" / "COMPLETE").unlink()
    shutil.rmtree(out / "cache.zarr")
    monkeypatch.setattr(stages, "embed", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # what was deleted is made again
        run_pipeline(cells, out, {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "was begun with --seed 0, not 1. Choose another --out"),
        ({"encoder": "genes"}, "was begun with --encoder pca, not genes"),
        ({"pert_col": "x"}, "was begun with --pert-col unset, not x"),
        ({"sede": 1}, "Unknown key 'sede' in the options. Did you mean 'seed'"),
    ],
)
def test_other_options_are_refused(
    begun: tuple[Path, Path, Recorder, Recorder], options: dict[str, Any], said: str
) -> None:
    cells, out, *_ = begun
    before = (out / STATE).read_bytes()
    with pytest.raises(InputError, match=said):
        run_pipeline(cells, out, options)
    assert (out / STATE).read_bytes() == before


def test_other_cells_and_folders_of_something_else_are_refused(
    begun: tuple[Path, Path, Recorder, Recorder], demo: Demo, tmp_path: Path
) -> None:
    cells, out, *_ = begun
    with pytest.raises(InputError, match="was begun with other cells"):
        run_pipeline(demo.cells, out, {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    with pytest.raises(InputError, match="not an empty folder: it holds notes"):
        run_pipeline(cells, tmp_path / "mine", {})
    with pytest.raises(InputError, match="is a cache; sest run takes a file of cells"):
        run_pipeline(demo.cache, tmp_path / "new", {})
    with pytest.raises(InputError, match=r"takes one file of cells, with --splits for the TOML"):
        run_pipeline(demo.folder / "starter.toml", tmp_path / "new", {})
    assert not (tmp_path / "new").exists()


def test_what_nothing_was_made_with_may_be_given_otherwise(demo: Demo, tmp_path: Path) -> None:
    """As after an error that names an option: before the embedding all may change, before the training its own."""
    cells, out, said = tmp_path / "my cells (1).h5ad", tmp_path / "out", Recorder()
    shutil.copy(demo.cells, cells)
    bad, options = tmp_path / "bad.npz", {"head": "none", "seed": 1}
    bad.write_bytes(b"")
    with pytest.raises(InputError, match="no cell has the label"):
        run_pipeline(cells, out, {**options, "control": "no such"})
    with pytest.raises(InputError, match=r"bad\.npz"):
        run_pipeline(cells, out, {**options, "perturbations": bad})
    run_pipeline(cells, out, {**options, "perturbations": demo.features}, said)
    assert said.skipped == [EMBED] and said.ended == [TRAIN, PREDICT, EVALUATE, REPORT]
    cells.touch()  # the same cells all the same
    run_pipeline(cells, out, {})
    with pytest.raises(InputError, match="was begun with --perturbations"):
        run_pipeline(cells, out, {"perturbations": "onehot"})


def test_more_training_by_hand_makes_what_follows_it_again(
    begun: tuple[Path, Path, Recorder, Recorder], tmp_path: Path
) -> None:
    cells, done, *_ = begun
    out, again = tmp_path / "out", Recorder()
    shutil.copytree(done, out)
    config = resumed_config(out / "run", "auto", {"max_steps": 26})
    train(out / "cache.zarr", out / "run", config, resume="auto", given={"max_steps": 26})
    run_pipeline(cells, out, OPTIONS | {"max_steps": 24}, again)
    assert again.skipped == [EMBED, TRAIN] and again.ended == [PREDICT, EVALUATE, REPORT]
    assert any("is another than when it predicted" in note for note in again.notes)
    third = Recorder()
    run_pipeline(cells, out, {}, third)
    assert third.skipped == list(STAGES)


def test_genes_are_named_by_the_column_that_has_the_targets(demo: Demo, tmp_path: Path) -> None:
    """As in files with Ensembl ids in the index: without it nothing of one cell type could be predicted."""
    cells = ad.read_h5ad(demo.cells)
    cells = cells[cells.obs["cell_type"] == "alpha"].copy()
    cells.var["symbol"] = cells.var_names.to_numpy()
    cells.var_names = [f"ENSG{i:011d}" for i in range(cells.n_vars)]
    cells.write_h5ad(tmp_path / "ids.h5ad")
    with pytest.raises(InputError, match=r"could be predicted where they are held out.*--gene-col"):
        run_pipeline(tmp_path / "ids.h5ad", tmp_path / "refused", {"gene_col": "index"})
    assert not (tmp_path / "refused").exists()
    said = Recorder()
    run_pipeline(tmp_path / "ids.h5ad", tmp_path / "out", {"head": "none"}, said)
    assert "by column 'symbol' of var" in said.notes[0] and "--gene-col symbol" in said.commands[1]
    assert set(ad.read_h5ad(tmp_path / "out" / "predicted.h5ad").var_names) == set(cells.var["symbol"])


def test_splits_of_other_cells_or_without_a_test_split_are_refused(demo: Demo, tmp_path: Path) -> None:
    splits = tmp_path / "splits.toml"
    text = f'[datasets]\nd = "{demo.cells}"\n[training]\nd = "train"\n'
    for content, said in (
        (text, "holds nothing out to test"),
        (text.replace("d =", 'e = "*.h5ad"\nd =', 1), "matched no file of cells"),
    ):
        splits.write_text(content)
        with pytest.raises(InputError, match=said):
            run_pipeline(demo.cells, tmp_path / "new", {"splits": splits})
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    shutil.copy(demo.cells, tmp_path / "other.h5ad")
    splits.write_text('[datasets]\nd = "other.h5ad"\n[training]\nd = "train"\n')
    with pytest.raises(InputError, match=r"other.h5ad, and sest run takes one file of cells"):
        run_pipeline(demo.cells, tmp_path / "new", {"splits": splits})


def test_the_commands_shown_do_the_same(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --head none, which takes no training, and the demo's own splits and features."""
    out, other, said = tmp_path / "it's", tmp_path / "typed", Recorder()
    options = {"head": "none", "splits": demo.folder / "starter.toml", "perturbations": demo.features, "seed": 3}
    run_pipeline(demo.cells, out, options, said)
    assert [shlex.split(line)[1] for line in said.commands] == ["info", *STAGES]
    other.mkdir()
    for line in said.commands:
        words = [word.replace(str(out), str(other)) for word in shlex.split(line)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, line
    for name in ("predicted.h5ad", "evaluation/results.csv", "run/best/blend.safetensors"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
