"""The `sest` command: help, exit codes, and one line for everything a user can do wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import pytest
import typer
from conftest import ROOT, Demo
from rich.console import Console
from safetensors.numpy import load_file, save_file
from small import write_se

from sest.cache.schema import COMPLETE
from sest.cli import console
from sest.cli.main import app, main
from sest.cli.simulate import simulate
from sest.config import EmbedConfig, PredictConfig, TrainConfig
from sest.simulate import Simulation

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = [(name, option) for name, command in COMMANDS.items() for option in command.params if option.name != "help"]
CONTROL = "non-targeting"


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def sest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `sest` in this process."""

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sest", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return Done(0 if code is None else int(code), *capsys.readouterr())

    return call


@pytest.fixture
def refused(sest: Callable[..., Done], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must end with code 2, one error line and not a byte changed in tmp_path."""

    def call(*words: object) -> str:
        before = content(tmp_path)
        done = sest(*words)
        assert done.code == 2, done
        lines = done.err.splitlines()
        assert lines[-1].startswith("Error: ") and done.err.count("Error") == 1
        assert "Traceback" not in done.err + done.out
        assert content(tmp_path) == before
        return lines[-1]

    return call


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder (and every folder) with its hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


# --- help


def test_every_command_has_help_in_the_readme_and_in_its_tests(sest: Callable[..., Done]) -> None:
    readme = (ROOT / "README.md").read_text()
    tests = {p.name: p.read_text() for p in (ROOT / "tests").glob("test_*.py") if p.name != "test_cli.py"}
    overview = sest("--help").out
    assert set(COMMANDS) == set("embed convert train predict evaluate report info demo simulate import".split())
    for name, command in COMMANDS.items():
        assert command.help and len(command.help) > 30
        assert re.search(rf"^\W*{name}\s+\w", overview, re.MULTILINE), name
        assert f"sest {name}" in readme, f"README.md does not show `sest {name}`"
        assert any(name in file or f'"{name}"' in text for file, text in tests.items()), f"no test of `sest {name}`"


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=[f"{name} {option.name}" for name, option in OPTIONS])
def test_every_option_has_help_and_says_what_happens_without_it(command: str, option: Any) -> None:
    """Flags without an off-switch (--quick) need no default; everything else names it or is required."""
    assert option.help and len(option.help) > 5
    _, text = option.get_help_record(typer.Context(COMMANDS[command]))
    is_flag = getattr(option, "is_flag", False) and not option.secondary_opts
    assert is_flag or option.required or "default: " in text, text


def test_help_is_short_of_nothing_and_the_same_in_both_forms() -> None:
    """`python -m sest` is `sest`; neither imports anything slow to say so."""
    code = (
        "import sys, runpy; sys.argv = ['sest', '--help']\n"
        "try: runpy.run_module('sest', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'anndata', 'zarr', 'h5py', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    script = Path(sys.executable).with_name("sest")
    environment = {**os.environ, "COLUMNS": "100"}
    forms: list[list[str]] = [[sys.executable, "-c", code], [sys.executable, "-m", "sest", "--help"]]
    if script.exists():
        forms.append([str(script), "--help"])
    outs = [subprocess.run(f, capture_output=True, text=True, env=environment, check=True).stdout for f in forms]
    head, _, imported = outs[0].rstrip().rpartition("\n")
    assert imported == "[]"
    usage = re.compile(r"Usage: .*")
    assert len({usage.sub("", text).strip() for text in (head, *outs[1:])}) == 1


def test_defaults_that_the_command_line_repeats_are_the_library_s() -> None:
    """`sest --help` must not import the simulation, so its defaults stand in two places."""
    fields = {f.name.removesuffix("_per_perturbation"): f.default for f in dataclasses.fields(Simulation)}
    for name, parameter in inspect.signature(simulate).parameters.items():
        if name in fields:
            default = parameter.default
            assert (tuple(default.split(",")) if name == "cell_types" else default) == fields[name], name


@pytest.mark.parametrize(
    ("command", "config"), [("embed", EmbedConfig), ("train", TrainConfig), ("predict", PredictConfig)]
)
def test_every_field_of_a_configuration_is_an_option(command: str, config: type) -> None:
    module = importlib.import_module(f"sest.cli.{command}")
    assert {f.name for f in dataclasses.fields(config)} <= set(inspect.signature(getattr(module, command)).parameters)


def test_the_version_is_printed_and_no_arguments_show_the_help(sest: Callable[..., Done]) -> None:
    import sest as package

    assert sest("--version").out.strip() == f"sest {package.__version__}"
    assert "Usage" in sest().out + sest().err


# --- what a user can do wrong


@pytest.fixture
def cells(demo: Demo, tmp_path: Path) -> Callable[..., Path]:
    """Writes 200 of the demo's cells with changes to cells.h5ad."""
    whole = ad.read_h5ad(demo.cells)

    def write(change: Callable[[ad.AnnData], ad.AnnData | None] = lambda some: None) -> Path:
        some = whole[:200].copy()
        some = change(some) or some
        some.write_h5ad(tmp_path / "cells.h5ad")
        return tmp_path / "cells.h5ad"

    return write


def without_controls(some: ad.AnnData) -> ad.AnnData:
    return some[some.obs["target_gene"] != CONTROL].copy()


def ensembl(some: ad.AnnData) -> None:
    some.var.index = [f"ENSG{i:011d}" for i in range(some.n_vars)]


def test_a_file_that_is_no_h5ad_is_refused(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").write_text("target_gene,n_cells\n")
    line = refused("embed", tmp_path / "x.h5ad", "--encoder", "pca", "--cache", tmp_path / "c.zarr")
    assert "x.h5ad" in line and "HDF5" in line
    line = refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--template", tmp_path / "x.h5ad")
    assert "x.h5ad" in line
    assert "x.h5ad" in refused("evaluate", tmp_path / "x.h5ad", demo.cells, "--out", tmp_path / "out")
    assert "x.h5ad" in refused("info", tmp_path / "x.h5ad")


def test_a_missing_column_is_answered_with_those_there_are(
    refused: Callable[..., str], cells: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused("embed", cells(), "--encoder", "pca", "--cache", tmp_path / "c.zarr", "--pert-col", "guide")
    assert "No column 'guide' in obs. Available: target_gene, cell_type, batch" in line


def test_cells_without_controls_are_refused(
    refused: Callable[..., str], cells: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused("embed", cells(without_controls), "--encoder", "pca", "--cache", tmp_path / "c.zarr")
    assert "No control cells" in line and "--control" in line


def test_genes_that_the_encoder_does_not_know_are_refused(
    refused: Callable[..., str], cells: Callable[..., Path], tmp_path: Path
) -> None:
    se = write_se(tmp_path / "se", [f"TP{i}" for i in range(40)])
    line = refused("embed", cells(), "--encoder", se, "--cache", tmp_path / "c.zarr")
    assert "Too few of the file's 300 genes are known to the encoder" in line and "such as TP0" in line
    line = refused("embed", cells(ensembl), "--encoder", se, "--cache", tmp_path / "c.zarr")
    assert "look like ENSEMBL ids" in line and "Add a var column" in line


def test_several_checkpoints_are_listed(
    refused: Callable[..., str], cells: Callable[..., Path], tmp_path: Path
) -> None:
    se = write_se(tmp_path / "se", ["A", "B", "C", "D"])
    shutil.copy(se / "model.safetensors", se / "older.safetensors")
    for words in (("embed", cells(), "--encoder", se, "--cache", tmp_path / "c.zarr"), ("info", se)):
        line = refused(*words)
        assert "model.safetensors, older.safetensors" in line and "--checkpoint" in line


def test_features_that_are_missing_or_of_another_width_are_refused(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    vectors = load_file(demo.features)
    name = next(iter(vectors))
    save_file({key: row for key, row in vectors.items() if key != name}, tmp_path / "fewer.safetensors")
    narrow = tmp_path / "narrow.safetensors"
    save_file({key: row[:-1].copy() for key, row in vectors.items()}, narrow)
    words = ("train", demo.cache, "--run", tmp_path / "run", "--perturbations")
    line = refused(*words, tmp_path / "fewer.safetensors")
    assert f"no features for 1 of 12 perturbations: {name}" in line and "--missing-perturbations" in line
    line = refused(
        "predict", demo.run, "--out", tmp_path / "o.h5ad", "--perturbations", tmp_path / "narrow.safetensors"
    )
    assert "width 63; the checkpoint takes 64" in line
    words = ("train", demo.cache, "--run", demo.run, "--resume", "auto", "--max-steps", "30", "--perturbations")
    assert "n_features: 64 there, 63 now" in refused(*words, narrow)


def test_a_store_that_is_not_finished_or_made_otherwise_is_refused(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    store = shutil.copytree(demo.cache, tmp_path / "store.zarr")
    words = ("embed", demo.folder / "starter.toml", "--cache", store)
    line = refused(*words, "--encoder", "pca", "--dim", "32")
    assert "dim" in line and "64" in line and "32" in line
    (store / COMPLETE).unlink()
    assert "unfinished (no COMPLETE file). Run the same" in refused("train", store, "--run", tmp_path / "run")
    assert "unfinished" in refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--cache", store)


def test_an_unfinished_store_is_described_and_no_error(sest: Callable[..., Done], demo: Demo, tmp_path: Path) -> None:
    store = shutil.copytree(demo.cache, tmp_path / "store.zarr")
    (store / COMPLETE).unlink()
    done = sest("info", store, "--json")
    assert done.code == 0 and json.loads(done.out)["complete"] is False
    assert sest("info", store).code == 0


def test_a_store_of_another_encoder_is_refused(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    store = shutil.copytree(demo.cache, tmp_path / "store.zarr")
    genes = [str(name) for name in ad.read_h5ad(demo.cells, backed="r").var_names]
    se = write_se(tmp_path / "se", genes)
    line = refused("embed", demo.folder / "starter.toml", "--encoder", se, "--cache", store)
    assert "encoder" in line and "pca" in line


@pytest.mark.parametrize(
    ("old", "new", "nearest"),
    [
        ('cells = "train"', 'cels = "train"', "'cells'"),
        ("cells.beta", "cells.betta", "'beta'"),
        ('test = [\n    "GENE', 'test = [\n    "GENW', "'GENE"),
    ],
    ids=["dataset", "cell type", "perturbation"],
)
def test_a_misspelt_name_in_the_splits_is_answered_with_the_nearest(
    refused: Callable[..., str], demo: Demo, tmp_path: Path, old: str, new: str, nearest: str
) -> None:
    text = (demo.folder / "starter.toml").read_text()
    assert text.count(old) >= 1
    (tmp_path / "splits.toml").write_text(text.replace(old, new, 1))
    line = refused("train", demo.cache, "--run", tmp_path / "run", "--splits", tmp_path / "splits.toml")
    assert "Did you mean" in line and nearest in line


def test_a_misspelt_option_in_a_configuration_file_is_answered_with_the_nearest(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text("max-step = 5\n")
    line = refused("train", demo.cache, "--run", tmp_path / "run", "--config", tmp_path / "run.toml")
    assert "Unknown key 'max_step'" in line and "'max_steps'" in line


def test_a_place_below_a_regular_file_cannot_be_written_to(
    refused: Callable[..., str], demo: Demo, shared_reference: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    below = file / "out"
    predicted = demo.folder / "predicted.h5ad"
    for words in (
        ("embed", demo.folder / "starter.toml", "--encoder", "pca", "--cache", below),
        ("train", demo.cache, "--run", below, "--perturbations", demo.features),
        ("predict", demo.run, "--out", below),
        ("evaluate", predicted, demo.cells, "--out", below),
        ("demo", "--quick", "--out", below),
        ("simulate", below),
        ("simulate", tmp_path / "x.h5ad", "--splits", below),
        ("simulate", tmp_path / "x.h5ad", "--features", file / "x.npz"),
        ("import", shared_reference / "st" / "st.ckpt", below),
    ):
        assert str(file) in refused(*words), words


def test_an_older_run_or_evaluation_is_not_overwritten(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    run = shutil.copytree(demo.run, tmp_path / "run")
    words = ("train", demo.cache, "--run", run, "--perturbations", demo.features)
    assert "exists. Continue it with --resume auto" in refused(*words)
    assert "would make another run" in refused(*words, "--resume", "auto", "--set-size", "8")
    assert "nothing to resume" in refused("train", demo.cache, "--run", tmp_path / "new", "--resume", "auto")
    shutil.copytree(demo.folder / "evaluation", tmp_path / "evaluation")
    words = ("evaluate", demo.folder / "predicted.h5ad", demo.cells, "--out", tmp_path / "evaluation")
    assert "not an empty folder" in refused(*words)


def test_simulating_what_cannot_be_leaves_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "x.h5ad"
    assert "expressed_genes is 700" in refused("simulate", out, "--n-genes", "300")
    assert "ends in .npz, .safetensors, .pt" in refused("simulate", out, "--features", tmp_path / "f.csv")
    (tmp_path / "genes.txt").write_text("A\nB\nA\n")
    assert "n_genes is 3" in refused("simulate", out, "--genes", tmp_path / "genes.txt")
    (tmp_path / "genes.txt").write_text("\n".join([*(f"G{i}" for i in range(900)), "G1"]))
    assert "must be distinct" in refused("simulate", out, "--genes", tmp_path / "genes.txt")
    assert "Cannot read" in refused("simulate", out, "--genes", tmp_path / "gone.txt")


def test_damage_found_by_info_is_an_error_after_the_facts(
    sest: Callable[..., Done], demo: Demo, tmp_path: Path
) -> None:
    store = shutil.copytree(demo.cache, tmp_path / "store.zarr")
    shard = next(file for file in sorted((store / "cells" / "obsm").rglob("c/0/0")))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    done = sest("info", store, "--json", "--verify")
    assert done.code == 2 and json.loads(done.out)["verified"] is False
    assert "1 files differ from their sha256" in done.err and "cells/obsm" in done.err


# --- what is printed


def test_json_is_strict_and_a_table_shows_what_is_not_a_number(
    sest: Callable[..., Done], demo: Demo, tmp_path: Path
) -> None:
    run = shutil.copytree(demo.run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), "pds": float("nan")})])
    )

    def refuse(word: str) -> None:
        raise AssertionError(word)

    facts = json.loads(sest("info", run, "--json").out, parse_constant=refuse)
    assert facts["metrics"]["pds"] is None
    assert "nan" in sest("info", run).out


def test_no_line_of_a_table_is_wider_than_a_terminal(sest: Callable[..., Done], demo: Demo) -> None:
    for path in (demo.cache, demo.run, demo.cells):
        assert max(map(len, sest("info", path).out.splitlines())) <= 80


def test_a_finished_step_is_said_when_it_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    with console.ConsoleProgress() as progress:
        progress.begin("Reading", 10, "cells")
        progress.advance(10)
        assert "Reading: 10/10 cells" in capsys.readouterr().err
        progress.command("sest next")
        assert capsys.readouterr().err.strip() == "$ sest next"
        progress.begin("Training", 10, "it")
        progress.advance(4)  # stopped early
        progress.command("sest after")
        stopped, command = [line for line in capsys.readouterr().err.splitlines() if line]
        assert stopped.startswith("Training: 4/10 it") and command == "$ sest after"
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_one_bar_and_commands_that_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=written, force_terminal=True, width=80))
    text = "sest train demo/cache.zarr --run demo/run " + " ".join(f"--option-{i} {i}" for i in range(9))
    with console.ConsoleProgress() as progress:
        progress.command(text)
        progress.begin("Reading", 10, "cells")
        progress.advance(10)
        progress.note("a note")
        progress.begin("Writing", 10, "cells")
        progress.advance(4)
        assert progress._bars is not None and len(progress._bars.tasks) == 1
        progress.begin("Training", 10, "it")
        assert progress._bars is None  # the panel takes its place
        progress.advance(4)
        progress.note("between")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())
    assert text in re.sub(r" \\\n +", " ", plain)
    assert max(map(len, re.split(r"[\r\n]", plain))) <= 80
    assert plain.index("$ sest") < plain.index("Reading: 10/10 cells") < plain.index("a note")
    assert plain.index("Writing: 4/10 cells") < plain.index("between")
    last = plain.rindex("Training")  # what is left on the screen
    assert "step 4/10" in plain[last:] and "between" not in plain[last:]


@pytest.mark.parametrize(
    ("variables", "live"), [({}, True), ({"JPY_PARENT_PID": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_notebook_s_terminal_gets_plain_lines(tmp_path: Path, variables: dict[str, str], live: bool) -> None:
    """`!sest ...` in a notebook runs under a pseudo-terminal whose escape codes nobody interprets."""
    ours, theirs = pty.openpty()
    words = ["simulate", str(tmp_path / "x.h5ad"), "--n-perturbations", "2", "--n-cells", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sest", *words],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"} | variables,
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65_536):
            written += part
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0 and b"cells" in written
    assert (b"\x1b[?25l" in written) == live  # hides the cursor, to draw over lines


def test_a_log_file_gets_plain_lines_even_where_colour_is_forced(tmp_path: Path) -> None:
    words = ["simulate", str(tmp_path / "x.h5ad"), "--n-perturbations", "2", "--n-cells", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "sest", *words], capture_output=True, env={**os.environ, "FORCE_COLOR": "1"}, check=True
    )
    assert b"\x1b" not in done.stdout + done.stderr and b"cells" in done.stderr


# --- signals and exit codes


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_code_and_removes_what_was_begun(
    sest: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def kill(self: console.ConsoleProgress, n: int = 1) -> None:
        assert [path.name for path in tmp_path.iterdir()] != []  # the unfinished file
        os.kill(os.getpid(), signum)

    monkeypatch.setattr(console.ConsoleProgress, "advance", kill)
    try:
        assert sest("simulate", tmp_path / "x.h5ad", "--n-perturbations", "2", "--n-cells", "3").code == code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())
