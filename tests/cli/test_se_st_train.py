"""`se-st-train`: the ancestor's documented command, from cells to a trained run, again, in stages, and refused."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers.caches import hashes
from helpers.se_model import write_se
from sest.cache import open_cache
from sest.cli import console, main
from sest.cli.se_st_train import main as se_st_train
from sest.compat.ancestor import KEYS, read_request
from sest.compat.ancestor_run import find_resume
from sest.options import read_toml
from sest.simulation.screen import write_screen
from sest.simulation.simulation import Simulation

DOCUMENTED = """
++data.kwargs.toml_config_path=data/starter.toml
++data.kwargs.perturbation_features_file=ESM2_pert_features.pt ++data.kwargs.num_workers=8
++training.max_steps=40000 ++training.ckpt_every_n_steps=5000 ++training.batch_size=16 ++training.lr=1e-4
++training.val_check_interval=500 ++training.log_every_n_steps=50 ++training.early_stopping=true
++training.patience=10 ++training.gradient_clip_val=1.0 ++training.accumulate_grad_batches=2
++model.kwargs.input_dim=18080 ++model.kwargs.hidden_dim=512 ++model.kwargs.output_dim=18080
++model.kwargs.pert_dim=5120 ++model.kwargs.se_model_path=SE-600M
++model.kwargs.se_checkpoint_path=SE-600M/se600m_epoch15.ckpt ++output_dir=competition ++name=run1
"""
SMALL = {  # the sizes of the simulated cells, and of a head of some thousand parameters
    "data.kwargs.num_workers": "1",
    "training.max_steps": "4",
    "training.ckpt_every_n_steps": "2",
    "training.batch_size": "2",
    "training.val_check_interval": "2",
    "training.log_every_n_steps": "1",
    "model.kwargs.input_dim": "60",
    "model.kwargs.hidden_dim": "6",
    "model.kwargs.output_dim": "60",
    "model.kwargs.pert_dim": "16",
    "model.kwargs.st_hidden_dim": "16",
    "model.kwargs.cell_set_len": "4",
    "model.kwargs.n_encoder_layers": "2",
    "model.kwargs.n_decoder_layers": "2",
    "model.kwargs.transformer_backbone_kwargs.num_hidden_layers": "1",
    "model.kwargs.transformer_backbone_kwargs.num_attention_heads": "2",
    "accelerator": "cpu",
}
SIMULATION = Simulation(
    n_cells_per_perturbation=6,
    n_controls=10,
    n_perturbations=8,
    n_genes=60,
    expressed_genes=30,
    umi_per_cell=200,
    n_features=16,
)


def line(**changes: str | None) -> list[str]:
    """The documented words with small sizes and `changes`, in which a dot is written as two underscores."""
    values = dict(word.lstrip("+").split("=", 1) for word in DOCUMENTED.split()) | SMALL
    values |= {key.replace("__", "."): value for key, value in changes.items()}  # type: ignore[misc]
    return [f"++{key}={value}" for key, value in values.items() if value is not None]


@dataclass(frozen=True)
class Done:
    """What a command left behind; the lines are not wrapped."""

    code: int
    out: str
    err: str

    @property
    def commands(self) -> list[str]:
        """The command lines that were shown."""
        return [text[2:] for text in self.err.splitlines() if text.startswith("$ ")]

    @property
    def error(self) -> str:
        """The one line of an error of the user's."""
        assert self.code == 2 and self.err.count("Error: ") == 1 and "Traceback" not in self.err, self
        return self.err.splitlines()[-1]


def run(folder: Path, words: list[str], command: str = "se-st-train") -> Done:
    """Run a command in this process, in a folder."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(console, "out", Console(file=out, width=200, highlight=False))
        patch.setattr(console, "err", Console(file=err, width=200, highlight=False))
        patch.setattr(sys, "argv", [command, *words])
        try:
            se_st_train() if command == "se-st-train" else main.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class First:
    """A folder in which the documented command has run once."""

    folder: Path
    done: Done


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    """8 perturbations, 116 cells, 60 genes; an SE folder with two checkpoints, of which the documented one is a .ckpt.

    Tests work on copies, or write beside competition/.
    """
    folder = tmp_path_factory.mktemp("ancestor")
    (folder / "data").mkdir()
    write_screen(
        SIMULATION, folder / "data" / "cells.h5ad", folder / "ESM2_pert_features.pt", folder / "data" / "starter.toml"
    )
    genes = list(map(str, ad.read_h5ad(folder / "data" / "cells.h5ad", backed="r").var_names))
    se = write_se(folder / "SE-600M", genes)
    torch.save({"state_dict": load_file(se / "model.safetensors")}, se / "se600m_epoch15.ckpt")
    return First(folder, run(folder, line()))


@pytest.fixture
def again(first: First, tmp_path: Path) -> Path:
    """A copy of the folder, without the cells and the encoder: what is embedded needs neither."""
    return Path(
        shutil.copytree(first.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("cells.h5ad", "SE-600M"))
    )


def weights(folder: Path) -> bytes:
    return (folder / "last" / "model.safetensors").read_bytes()


# --- the documented command


def test_the_documented_command_embeds_then_trains(first: First) -> None:
    assert first.done.code == 0, first.done
    cache, trained = open_cache(first.folder / "competition" / "cache"), first.folder / "competition" / "run1"
    assert (cache.n_cells, cache.dim, cache.attributes["encoder"]) == (116, 6, "se600m_epoch15.ckpt")
    config = read_toml(trained / "config.toml")
    given = {"max_steps": 4, "checkpoint_every": 2, "batch_size": 2, "lr": 1e-4, "val_every": 2, "log_every": 1}
    given |= {"early_stopping": True, "patience": 10, "clip": 1.0, "accumulate": 2, "num_workers": 1}
    given |= {"hidden": 16, "set_size": 4, "n_layers": 1, "n_heads": 2, "n_encoder_layers": 2, "n_decoder_layers": 2}
    assert {key: config[key] for key in given} == given
    assert {path.name for path in trained.iterdir()} >= {"best", "last", "checkpoint-step-2", "checkpoint-step-4"}
    assert "step 4 (all steps done)" in first.done.out


def test_the_commands_that_are_shown_do_the_same_when_they_are_run(first: First, tmp_path: Path) -> None:
    assert len(first.done.commands) == 2
    for text in first.done.commands:
        words = [word.replace("competition", str(tmp_path)) for word in shlex.split(text)]
        assert run(first.folder, words[1:], words[0]).code == 0
    assert hashes(tmp_path / "cache") == hashes(first.folder / "competition" / "cache")
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        expected = (first.folder / "competition" / "run1" / "last" / name).read_bytes()
        assert (tmp_path / "run1" / "last" / name).read_bytes() == expected, name


def test_the_same_command_again_reads_no_cell_and_goes_on(again: Path) -> None:
    before = hashes(again / "competition" / "cache")
    done = run(again, line())
    assert done.code == 0 and "step 4 (all steps done)" in done.out, done
    assert "competition/cache is complete (116 cells at width 6)" in done.err and "delete it" in done.err
    assert "competition/run1 exists: its training goes on (--resume auto)" in done.err
    assert [text.split()[:2] for text in done.commands] == [["sest", "train"]]
    assert "--resume auto" in done.commands[0]
    more = run(again, line(training__max_steps="6"))
    assert more.code == 0 and "step 6 (all steps done)" in more.out, more
    assert hashes(again / "competition" / "cache") == before


def test_a_stage_goes_on_from_another_run_as_one_run_would(again: Path) -> None:
    given = "competition/run1/checkpoint-step-2.ckpt"
    staged = run(again, line(name="stage2", model__checkpoint=given, training__max_steps="6"))
    assert staged.code == 0 and "step 6 (all steps done)" in staged.out, staged
    assert "stage2 goes on from competition/run1/checkpoint-step-2. max_steps counts the steps before it" in staged.err
    assert "--run competition/stage2 --resume competition/run1/checkpoint-step-2" in staged.commands[0]
    lines = [json.loads(text) for text in (again / "competition/stage2/metrics.jsonl").read_text().splitlines()]
    assert min(entry["step"] for entry in lines) == 3
    assert run(again, line(training__max_steps="6")).code == 0
    assert weights(again / "competition" / "stage2") == weights(again / "competition" / "run1")


def test_a_stage_that_was_stopped_begins_where_it_began_or_goes_on(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restarted job must neither begin at step 0 nor go back to the stage before."""
    monkeypatch.chdir(again)
    given = line(name="stage2", model__checkpoint="competition/run1/last.ckpt", training__max_steps="6")
    stage2 = Path("competition/stage2")
    stage2.mkdir()
    shutil.copy("competition/run1/config.toml", stage2)
    assert find_resume(read_request(given)) == "competition/run1/last"
    shutil.copytree("competition/run1/last", stage2 / "last")
    assert find_resume(read_request(given)) == "auto"


def test_pca_is_an_encoder_that_needs_no_weights(first: First, tmp_path: Path) -> None:
    words = line(
        model__kwargs__se_model_path="pca", model__kwargs__se_checkpoint_path=None, output_dir=str(tmp_path / "o")
    )
    done = run(first.folder, words)
    assert done.code == 0, done
    assert open_cache(tmp_path / "o" / "cache").attributes["encoder"] == "pca"


# --- what a user can do wrong


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__kwargs__input_dim": "50", "model__kwargs__output_dim": "50"}, ["input_dim is 50", "has 60 genes"]),
        ({"model__kwargs__output_dim": "61", "model__kwargs__input_dim": None}, ["output_dim is 61", "has 60 genes"]),
        ({"model__kwargs__pert_dim": "17"}, ["pert_dim is 17", "features of width 16", "++model.kwargs.pert_dim=16"]),
        ({"model__kwargs__hidden_dim": "13"}, ["++model.kwargs.hidden_dim=13 is above the native width 12"]),
        ({"data__kwargs__perturbation_features_file": "absent.pt"}, ["absent.pt"]),
        ({"data__kwargs__pert_col": "guide"}, ["No column 'guide'", "++data.kwargs.pert_col"]),
        ({"model__kwargs__se_checkpoint_path": "SE-600M/se600m.ckpt"}, ["se600m_epoch15.ckpt"]),
        ({"model__kwargs__se_model_path": None}, ["No encoder", "se_model_path=pca"]),
        ({"model__checkpoint": "competition/run1/checkpoint-step-3.ckpt"}, ["checkpoint-step-3", "checkpoint-step-2"]),
        (
            {"model__checkpoint": "competition/run1/last.ckpt", "model__kwargs__cell_set_len": "5"},
            ["st_cell_set_len=5 would make another run"],
        ),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(
    first: First, tmp_path: Path, changes: dict[str, str | None], parts: list[str]
) -> None:
    error = run(first.folder, line(output_dir=str(tmp_path / "new"), **changes)).error
    assert all(part in error for part in parts), error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__kwargs__hidden_dim": "8"}, ["hidden_dim is 8", "made with 6", "++model.kwargs.hidden_dim=6"]),
        ({"model__kwargs__input_dim": "50", "model__kwargs__output_dim": "50"}, ["input_dim is 50", "60 genes"]),
        ({"model__kwargs__pert_dim": "17"}, ["pert_dim is 17", "features of width 16"]),
        ({"model__kwargs__se_model_path": "pca", "model__kwargs__se_checkpoint_path": None}, ["se_model_path is pca"]),
        ({"model__kwargs__se_checkpoint_path": "SE-600M/older.ckpt"}, ["older.ckpt", "made with se600m_epoch15.ckpt"]),
        ({"data__kwargs__batch_col": "plate"}, ["batch_col is plate", "made with batch"]),
        ({"model__checkpoint": "competition/run1/best.ckpt"}, ["no optimizer state", "last/ or a checkpoint-step-N/"]),
    ],
)
def test_a_finished_cache_that_was_made_otherwise_is_refused(
    first: First, changes: dict[str, str | None], parts: list[str]
) -> None:
    error = run(first.folder, line(name="other", **changes)).error
    assert all(part in error for part in parts), error
    assert not (first.folder / "competition" / "other").exists()


def test_a_damaged_cache_is_repaired(first: First, tmp_path: Path) -> None:
    shutil.copytree(first.folder / "competition" / "cache", tmp_path / "o" / "cache")
    shard = next(path for path in sorted((tmp_path / "o" / "cache").rglob("c/*")) if path.is_file())
    shard.unlink()
    done = run(first.folder, line(output_dir=str(tmp_path / "o"), training__max_steps="2"))
    assert done.code == 0 and "is damaged" in done.err and len(done.commands) == 2, done
    assert hashes(tmp_path / "o" / "cache") == hashes(first.folder / "competition" / "cache")


def test_cells_outside_the_toml_s_folder_need_a_permission_that_has_a_key(first: First, tmp_path: Path) -> None:
    toml = tmp_path / "a" / "starter.toml"
    toml.parent.mkdir()
    text = (first.folder / "data" / "starter.toml").read_text()
    toml.write_text(text.replace('"cells.h5ad"', f'"{first.folder}/data/cells.h5ad"'))
    words = line(output_dir=str(tmp_path / "o"), data__kwargs__toml_config_path=str(toml))
    words = [re.sub("=(ESM2|SE-600M)", rf"={first.folder}/\1", word) for word in words]
    assert "Permit its folder with ++data_root." in run(tmp_path, words).error
    permitted = read_request([*words, f"++data_root={first.folder}"])
    assert f"--data-root {first.folder}" in " ".join(permitted.embed_command())


# --- help


def test_help_explains_every_key_and_no_arguments_show_it_as_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, ["--help"])
    assert done.code == 0 and done.out == run(tmp_path, ["-h"]).out == run(tmp_path, []).out
    assert run(tmp_path, []).code == 2
    for name in KEYS:
        section, _, key = name.rpartition(".")
        assert re.search(rf"│ {key} +│", done.out), name
        assert f"++{section}.KEY=VALUE" in done.out or not section
    assert "[default: 40000]" in done.out


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from sest.cli.se_st_train import show_help; show_help(); "
        "print(sorted({'torch', 'anndata', 'zarr', 'h5py', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
