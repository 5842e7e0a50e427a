"""The `sest` command: help, versions, exit codes, and one line for what a user can do wrong with any command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Demo

from helpers.commands import COMMANDS, Done
from sest.cli.progress import ConsoleProgress


def test_every_command_has_help_in_the_readme_and_in_its_tests(sest: Callable[..., Done]) -> None:
    readme = (ROOT / "README.md").read_text()
    tests = {p.name: p.read_text() for p in (ROOT / "tests").rglob("test_*.py") if p.name != "test_main.py"}
    overview = sest("--help").out
    assert set(COMMANDS) == set(
        "run embed convert train blend predict evaluate report info demo simulate import export push".split()
    )
    for name, command in COMMANDS.items():
        assert command.help and len(command.help) > 30
        assert re.search(rf"^\W*{name}\s+\w", overview, re.MULTILINE), name
        assert f"sest {name}" in readme, f"README.md does not show `sest {name}`"
        assert any(name in file or f'"{name}"' in text for file, text in tests.items()), f"no test of `sest {name}`"


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


def test_the_version_is_printed_and_no_arguments_show_the_help(sest: Callable[..., Done]) -> None:
    import sest as package

    assert sest("--version").out.strip() == f"sest {package.__version__}"
    assert "Usage" in sest().out + sest().err


def test_a_file_that_is_no_h5ad_is_refused(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").write_text("target_gene,n_cells\n")
    line = refused("embed", tmp_path / "x.h5ad", "--encoder", "pca", "--cache", tmp_path / "c.zarr")
    assert "x.h5ad" in line and "HDF5" in line
    line = refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--template", tmp_path / "x.h5ad")
    assert "x.h5ad" in line
    assert "x.h5ad" in refused("evaluate", tmp_path / "x.h5ad", demo.cells, "--out", tmp_path / "out")
    assert "x.h5ad" in refused("info", tmp_path / "x.h5ad")


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


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_code_and_removes_what_was_begun(
    sest: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def kill(self: ConsoleProgress, n: int = 1) -> None:
        assert [path.name for path in tmp_path.iterdir()] != []  # the unfinished file
        os.kill(os.getpid(), signum)

    monkeypatch.setattr(ConsoleProgress, "advance", kill)
    try:
        assert sest("simulate", tmp_path / "x.h5ad", "--n-perturbations", "2", "--n-cells", "3").code == code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=["Python", "torch", "mmap"],
)
def test_no_memory_is_one_line_with_the_step_and_what_to_lower(
    refused: Callable[..., str], demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: ConsoleProgress, n: int = 1) -> None:
        raise error

    monkeypatch.setattr(ConsoleProgress, "advance", fail)
    line = refused("embed", demo.cells, "--encoder", "pca", "--cache", tmp_path / "c.zarr")
    assert line == (
        "Error: Out of host memory. The last step that began: Reading. Pass a smaller --batch-size; or free some "
        "memory, or run it where there is more."
    )
    line = refused("train", demo.cache, "--run", tmp_path / "r", "--perturbations", demo.features)
    assert "began: Loading targets. Pass --data-device disk, or a smaller --batch-size, --set-size" in line
    line = refused("predict", demo.run, "--out", tmp_path / "o.h5ad")
    assert "This command needs more memory than there is; or free some memory" in line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RecursionError(), "Error: An input is nested too deeply to be read. Is it damaged, or made to be?"),
        (OSError(36, "File name too long", "x" * 300), f"Error: File name too long: {'x' * 200}.... What was finished"),
        (OSError(28, "No space left on device", "a"), "Error: No space left on device: a. What was finished is kept."),
        (OSError(5, "Input/output error"), "Error: Input/output error: the output. What was finished is kept."),
        (
            OSError(18, "Invalid cross-device link", "a", None, "b"),
            "Error: Invalid cross-device link: a -> b. What",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line_in_any_command(
    refused: Callable[..., str],
    demo: Demo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    line: str,
) -> None:
    def fail(self: ConsoleProgress, n: int = 1) -> None:
        raise error

    monkeypatch.setattr(ConsoleProgress, "advance", fail)
    assert refused("embed", demo.cells, "--encoder", "pca", "--cache", tmp_path / "c.zarr").startswith(line)


def test_a_name_of_more_than_255_bytes_is_one_line_in_any_command(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    name = tmp_path / ("x" * 300)
    for words in (
        ("embed", demo.cells, "--encoder", "pca", "--cache", f"{name}.zarr"),
        ("train", demo.cache, "--perturbations", demo.features, "--max-steps", 1, "--run", name),
        ("predict", demo.run, "--cell-type", "alpha", "--out", f"{name}.h5ad"),
        ("report", demo.run, "--no-model", "--out", f"{name}.html"),
        ("simulate", f"{name}.h5ad"),
        ("info", f"{name}.h5ad"),
    ):
        assert "oo long" in refused(*words), words
    almost = tmp_path / f"{'x' * 245}.h5ad"  # too long with what is written aside
    assert "is too long: at most 230 bytes" in refused("simulate", almost)
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.4, 1.2])
def test_ctrl_c_while_it_starts_is_quiet(demo: Demo, delay: float) -> None:
    """From the first line of ours on; what Python does before cannot be ours."""
    code = "import sys; sys.stdout.write('up'); sys.stdout.flush(); import sest.__main__; sest.__main__.main()"
    words = ["train", str(demo.cache), "--run", "/nowhere/r", "--perturbations", str(demo.features)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.read(2) == "up"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in err and "Interrupt" not in err, err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_training_that_outgrows_its_memory_ends_with_one_line(demo: Demo, tmp_path: Path) -> None:
    """The case first_hour/lowmem: under `ulimit -v`, where the largest allocations fail."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2_600_000 * 1024,) * 2)\n"
    command = f"{limited}from sest.cli.main import main; main()"
    words = ["train", str(demo.cache), "--run", str(tmp_path / "r"), "--perturbations", str(demo.features)]
    sizes = ["--max-steps", "2", "--hidden", "1344", "--set-size", "512"]
    done = subprocess.run([sys.executable, "-c", command, *words, *sizes], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("Error: Out of host memory after step") and "smaller --batch-size, --set-size" in last
