"""TensorBoard and Weights & Biases get the lines of metrics.jsonl."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sest.config import TrainConfig
from sest.errors import InputError
from sest.runs.sinks import TENSORBOARD, check_sinks, open_sinks

LINES: list[dict[str, Any]] = [
    {"step": 10, "loss": 2.0, "grad_norm": float("nan"), "limited_by": "memory"},
    {"step": 10, "val_loss": 1.5, "mae": 0.25},
    {"step": 20, "loss": 1.0, "grad_norm": 0.5, "limited_by": "memory"},
]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard
def test_tensorboard_gets_every_finite_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with open_sinks(tmp_path, TrainConfig(tensorboard=True), 0) as write:
        for line in LINES:
            write(line)
    assert scalars(tmp_path / TENSORBOARD) == {
        "train/loss": [(10, 2.0), (20, 1.0)],
        "train/grad_norm": [(20, 0.5)],
        "val/val_loss": [(10, 1.5)],
        "val/mae": [(10, 0.25)],
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard
def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = TrainConfig(tensorboard=True)
    with open_sinks(tmp_path, config, 0) as write:
        for line in LINES:
            write(line)
    with open_sinks(tmp_path, config, 10) as write:
        write({"step": 20, "loss": 3.0})
    assert scalars(tmp_path / TENSORBOARD)["train/loss"] == [(10, 2.0), (20, 3.0)]


class FakeSession:
    """What `wandb.init` returns, as far as it is used."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.exit_code = int(kind is not None)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A wandb package that remembers how it was called: the real one starts a server process and wants an account."""
    seen: dict[str, Any] = {"sessions": []}
    module = types.ModuleType("wandb")
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))  # type: ignore[attr-defined]

    def init(**options: Any) -> FakeSession:
        if "refuse" in seen:
            raise module.errors.Error("api_key not configured.")
        seen["options"] = options
        seen["sessions"].append(FakeSession())
        return seen["sessions"][-1]

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_wandb_gets_the_numbers_and_goes_on_in_the_same_run(tmp_path: Path, wandb: dict[str, Any]) -> None:
    config = TrainConfig(wandb="perturbations", lr=0.5)
    with open_sinks(tmp_path / "run7", config, 0) as write:
        for line in LINES:
            write(line)
    first = wandb["options"]
    assert (first["project"], first["name"], first["resume"], first["config"]["lr"]) == (
        "perturbations", "run7", "allow", 0.5,
    )  # fmt: skip
    session = wandb["sessions"][0]
    assert session.logged == [
        (10, {"train/loss": 2.0}),
        (10, {"val/val_loss": 1.5, "val/mae": 0.25}),
        (20, {"train/loss": 1.0, "train/grad_norm": 0.5}),
    ]
    assert session.exit_code == 0
    with open_sinks(tmp_path / "run7", config, 10):
        pass
    assert wandb["options"]["id"] == first["id"]
    with open_sinks(tmp_path / "run8", config, 0):
        pass
    assert wandb["options"]["id"] != first["id"]


def test_wandb_is_told_of_a_run_that_failed(tmp_path: Path, wandb: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError), open_sinks(tmp_path, TrainConfig(wandb="p"), 0):
        raise RuntimeError("out of cells")
    assert wandb["sessions"][0].exit_code == 1


def test_what_wandb_refuses_is_one_line(tmp_path: Path, wandb: dict[str, Any]) -> None:
    wandb["refuse"] = True
    with (
        pytest.raises(InputError, match=r"api_key not configured.*wandb login"),
        open_sinks(tmp_path, TrainConfig(wandb="p"), 0),
    ):
        pass


def test_a_package_that_is_not_there_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sest.runs.sinks.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sest\[tensorboard\]'"):
        check_sinks(TrainConfig(tensorboard=True))
    with pytest.raises(InputError, match=r"pip install 'sest\[wandb\]'"):
        check_sinks(TrainConfig(wandb="p"))
    check_sinks(TrainConfig())


def test_without_sinks_lines_go_nowhere(tmp_path: Path) -> None:
    with open_sinks(tmp_path, TrainConfig(), 0) as write:
        write(LINES[0])
    assert not list(tmp_path.iterdir())
