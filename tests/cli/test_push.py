"""`sest push`: what it says; pushing itself is tested with a server in tests/test_hub_heads.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import Demo

from helpers.commands import Done


def test_a_card_is_written_and_nothing_is_pushed(demo: Demo, sest: Callable[..., Done], tmp_path: Path) -> None:
    done = sest("push", demo.run, "lab/head", "--card", tmp_path / "card.md")
    assert done.code == 0 and "card.md: the model card." in " ".join(done.out.split())
    assert (tmp_path / "card.md").read_text().startswith("---\n")


def test_a_name_that_is_no_repository_is_refused(demo: Demo, sest: Callable[..., Done]) -> None:
    done = sest("push", demo.run, "https://huggingface.co/lab/head")
    assert done.code == 2 and "is no repository: name it OWNER/NAME" in done.err
