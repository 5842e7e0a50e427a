"""The card of a head says what its run's files say."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest
from conftest import Demo
from markdown_it import MarkdownIt

from sest.facts.run import read_runs
from sest.report.card import card_of
from sest.runs.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(scope="module")
def best(demo: Demo) -> Checkpoint:
    return open_checkpoint(demo.run / "best")


def table(text: str) -> dict[str, dict[str, str]]:
    """The rows of the card's table: metric -> column -> text."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def test_scores_stand_beside_the_baselines(demo: Demo, best: Checkpoint) -> None:
    text = card_of(best, "lab/head")
    rows = table(text)
    for score in read_runs([demo.run])[0].scores():
        assert float(rows[score.metric]["this"]) == pytest.approx(score.model, rel=1e-3)
        for name, value in score.baselines.items():
            shown = rows[score.metric][name.replace("_", " ")]
            assert shown == "-" or float(shown) == pytest.approx(value, rel=1e-3)
    weights = best.blend().weights
    assert f"and controls {weights.of_controls:.2f} (weights fitted on {weights.n_pairs} validation" in text
    assert f"step {best.state['step']:,}" in text and "of the val split, beside baselines" in text


def test_data_splits_and_options_are_said(demo: Demo, best: Checkpoint) -> None:
    text = card_of(best, "lab/head")
    trained = best.state["cells"]["trained"]
    assert f"Trained on {len(trained)} perturbations: {trained[0]}" in text and "cells/alpha" in text
    assert "[fewshot" in text and "`--hidden 32`" in text and "300 genes" in text
    assert str(demo.folder) not in text and ".h5ad" not in text.split("## Data")[1]


def test_a_checkpoint_alone_has_a_card_without_scores_and_a_licence_is_passed_on(
    best: Checkpoint, tmp_path: Path
) -> None:
    alone = open_checkpoint(Path(shutil.copytree(best.folder, tmp_path / "alone")))
    text = card_of(alone, "lab/head")
    assert "## Scores" not in text and "No licence comes with the embeddings" in text and "license" not in text
    made = {**alone.state["encoder"], "licence": "SE weights are non-commercial.", "name": "se600m.safetensors"}
    of_se = dataclasses.replace(alone, state={**alone.state, "encoder": made})
    text = card_of(of_se, "lab/head")
    assert "license: other" in text and text.rstrip().endswith("SE weights are non-commercial.")
    assert "--encoder ENCODER --only" in text


HOSTILE = "<script>x</script> ![i](http://a/b.png) [l](http://a) `c` | **b** \n# h\n\u202e www.a.org\x1b[31m ~~~ ```"


def test_names_in_a_card_are_text(best: Checkpoint) -> None:
    state = {
        **best.state,
        "sest_version": HOSTILE,
        "cells": {"trained": [HOSTILE], "perturbations": ["c", HOSTILE, "h|"]},
    }
    state["encoder"] = {**state["encoder"], "name": HOSTILE, "licence": HOSTILE}
    state["features"] = {**state["features"], "source": HOSTILE}
    text = card_of(dataclasses.replace(best, state=state), "lab/head")
    assert "\x1b" not in text and "\u202e" not in text
    body = text.split("---\n", 2)[2]
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    assert not re.search(r"<(script|img|a|em|strong|s)\b", html) and html.count("<table>") == 1  # that of scores
    assert re.findall(r"<h1>(.*)</h1>", html) == ["head"]
    assert html.count("&lt;script&gt;x&lt;/script&gt; ![i](http://a/b.png) [l](http://a) `c` | **b** \\n# h") >= 5
    bash = next(block for block in re.findall(r"<code[^>]*>(.*?)</code>", html, re.DOTALL) if "sest predict" in block)
    assert len(shlex.split(unescape(bash))) > 20 and HOSTILE.split("\n")[0] in unescape(bash)
