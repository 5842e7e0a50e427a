"""Several processes train one head together: the same batches, and to rounding the same weights, for any number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.processes import start_ranks
from sest.errors import InputError
from sest.machine.ranks import Ranks
from sest.machine.team import join_team
from sest.runs.checkpoint import open_checkpoint, step_folder
from sest.runs.run_folder import METRICS
from sest.runs.schema import BEST, LAST
from sest.training.train import train
from sest.training.window import MEASURED

# One process of a team, as torchrun starts it; extra arguments are changes of the configuration.
PROCESS = """
import json, os, sys, warnings
warnings.simplefilter("error")
from pathlib import Path
from helpers.configs import small_config
from sest.errors import InputError
from sest.machine.ranks import ranks_of
from sest.machine.signals import Interrupted
from sest.training.train import train
store, run, changes, resume, stop_at = json.loads(sys.argv[1])
if changes.get("compile"):  # traced and differentiated ahead of time, but not made into C++, which takes minutes
    import torch
    from functools import partial
    torch.compile = partial(torch.compile, backend="aot_eager")
    for kind in (FutureWarning, DeprecationWarning):  # of its own modules
        warnings.filterwarnings("ignore", category=kind)
def on_log(line):
    if line["step"] == stop_at:
        os.kill(os.getpid(), 15)
try:
    result = train(Path(store), Path(run), small_config(**changes), resume=resume,
                   ranks=ranks_of(None, None, os.environ), on_log=on_log)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if changes.get("compile") else ""
    print(result.step, result.reason, *([f"{graphs} graphs"] if graphs else []))
except (InputError, Interrupted) as error:
    print(type(error).__name__, error)
"""


def together(
    n: int,
    store: Path,
    run: Path,
    changes: dict[str, Any] | None = None,
    resume: str | None = None,
    stop_at: int = 0,
    timeout: float = 240.0,
) -> list[str]:
    """What the last lines of n processes say that train together."""
    words = json.dumps([str(store), str(run), changes or {}, resume, stop_at])
    processes = start_ranks(n, ["-c", PROCESS, words])
    results = [process.communicate(timeout) for process in processes]
    assert all(process.returncode == 0 for process in processes), [err[-2000:] for _, err in results]
    return [out.strip().splitlines()[-1] for out, _ in results]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("store") / "s.zarr", [small_screen()])


CHANGES: dict[str, Any] = {"batch_size": 4, "accumulate": 2, "dropout": 0.2}


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(store, run, small_config(**CHANGES))
    return run


def weights(run: Path, name: str = LAST) -> dict[str, Tensor]:
    return open_checkpoint(run / name).model_tensors()


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def check_same(run: Path, alone: Path) -> None:
    """Weights and metrics are those of one process, but for the order in which gradients are summed."""
    for name in (BEST, LAST, step_folder(4)):
        expected = weights(alone, name)
        for key, value in weights(run, name).items():
            # Adam turns a gradient's relative error into one of lr = 1e-3; 12 steps
            torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)
    assert len(metrics(run)) == len(metrics(alone))
    for mine, theirs in zip(metrics(run), metrics(alone), strict=True):
        numbers = {key: value for key, value in theirs.items() if value is not None}
        assert {key: mine[key] for key in numbers} == pytest.approx(numbers, rel=2e-4, abs=1e-6)
        assert {key: value for key, value in mine.items() if key not in numbers} == dict.fromkeys(
            theirs.keys() - numbers.keys()  # pds of one perturbation in a context: null
        )


def test_several_processes_train_the_same_head_also_from_files_that_one_of_them_writes(
    store: Path, alone: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    changes = {**CHANGES, "data_device": "disk", "scratch": str(scratch)}
    assert together(4, store, tmp_path / "run", changes) == ["12 max_steps"] * 4
    check_same(tmp_path / "run", alone)
    assert len(list(scratch.glob("values-*"))) == 1


def test_a_stopped_run_is_resumed_by_another_number_of_processes(store: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = together(2, store, run, CHANGES, stop_at=5)  # the first one alone gets the signal: both stop and save
    assert all(text.startswith("Interrupted Stopped after step 5") for text in said)
    assert open_checkpoint(run / LAST).state["step"] == 5
    assert together(4, store, run, CHANGES, resume="auto", stop_at=9)[0].startswith("Interrupted Stopped after step 9")
    train(store, run, small_config(**CHANGES), resume="auto")
    check_same(run, alone)


@pytest.mark.slow
def test_processes_that_compile_take_the_steps_of_one_that_does_not(store: Path, alone: Path, tmp_path: Path) -> None:
    """Of two batches a step, whose gradients are exchanged once."""
    said = together(2, store, tmp_path / "run", {**CHANGES, "compile": True}, timeout=900)
    assert said == ["12 max_steps 1 graphs"] * 2
    check_same(tmp_path / "run", alone)


def test_a_batch_that_cannot_be_divided_is_refused_by_all(store: Path, tmp_path: Path) -> None:
    said = together(2, store, tmp_path / "run", {"batch_size": 3})
    assert all("A batch of 3 sets cannot be divided among 2 processes" in text for text in said)
    assert not (tmp_path / "run").exists()


def test_gradients_in_bf16_are_refused_where_gpus_do_not_exchange_them(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--gradients bf16 needs GPUs"):
        train(store, tmp_path / "run", small_config(gradients="bf16"))


HEAD = ("--batch-size", 4, "--set-size", 4, "--hidden", 16, "--n-heads", 2, "--n-layers", 1, "--log-every", 1)


def test_of_the_command_line_s_processes_one_speaks(store: Path, tmp_path: Path) -> None:
    ranks = start_ranks(2, ["-m", "sest", "train", store, "-r", tmp_path / "run", *HEAD, "--max-steps", 3])
    results = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], [err[-2000:] for _, err in results]
    said = "".join(out for out, _ in results)
    assert said.count("trainable parameters") == 1 and said.count("step 3 (all steps done)") == 1
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3]


@pytest.mark.slow
def test_torchrun_starts_the_command_line_and_sigterm_to_it_saves_and_stops_all(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sest"]
    process = subprocess.Popen(
        [*command, *map(str, ["train", store, "-r", run, *HEAD])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    patience = time.monotonic() + 120
    while not (run / METRICS).exists() or not metrics(run):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    step = open_checkpoint(run / LAST).state["step"]
    assert step >= 1 and metrics(run)[-1]["step"] <= step


def test_more_processes_than_gpus_are_refused_with_what_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu, two = torch.device("cuda:0"), Ranks(0, 2)
    with (
        pytest.raises(InputError, match=r"^2 processes, but this machine has 1 CUDA GPUs: .*--nproc-per-node 1"),
        join_team(two, gpu, {"LOCAL_WORLD_SIZE": "2"}),
    ):
        pass
