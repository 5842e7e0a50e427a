"""The stages of a plan: how they are typed, and which are finished. What they do: test_folder.py and test_demo.py."""

from __future__ import annotations

from pathlib import Path

from sest.options import read_toml
from sest.pipeline.stages import Ledger, as_options, command_line


def test_options_are_typed_as_the_command_line_takes_them() -> None:
    values = {"max_steps": 5, "control": ("a b", "c"), "cell_eval": False, "compile": True, "seed": 0, "dim": None}
    assert as_options(values, {"seed": 0}) == [
        "--max-steps", 5, "--control", "a b", "--control", "c", "--no-cell-eval", "--compile",
    ]  # fmt: skip
    assert command_line("embed", Path("it's"), *as_options({"control": "NT*"})) == (
        "sest embed 'it'\"'\"'s' --control 'NT*'"
    )


def test_a_stage_that_begins_makes_what_follows_unfinished(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "pipeline.toml", {"seed": 3})
    for stage in ("embed", "train", "predict"):
        ledger.begin(stage)
        ledger.finish(stage)
    assert read_toml(tmp_path / "pipeline.toml") == {
        "seed": 3, "done": ["embed", "train", "predict"], "predicted_from": "",
    }  # fmt: skip
    ledger.begin("train")
    assert read_toml(tmp_path / "pipeline.toml")["done"] == ["embed"]
    Ledger().begin("embed")  # keeps nothing anywhere
