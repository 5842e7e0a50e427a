"""The model card of a head: what it is, what it was trained on, how it compares with baselines, and its licence."""

from __future__ import annotations

import math
import os
import re
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from sest import __version__
from sest.cache.disk import write_durably
from sest.cells.split_file import SPLIT_NAMES, VAL
from sest.config import TrainConfig
from sest.errors import InputError, visible
from sest.facts.run import RunFacts, read_runs
from sest.facts.scores import Score
from sest.hub import NAME, Repository
from sest.options import read_toml
from sest.outputs import check_output
from sest.runs.checkpoint import Checkpoint, find_checkpoint, sound_checkpoint, without_optimizer
from sest.runs.known import CELLS
from sest.runs.run_folder import CONFIG, PATHS, SPLITS

FEW = 12  # names that a sentence lists
_MARKUP = re.compile(r"[\\`*_{}\[\]<>()#!|~$&@:^]|(?<=www)\.")  # and what makes an address a link


def card_of(checkpoint: Checkpoint, repository: str) -> str:
    """Markdown with the header that the Hugging Face hub reads.

    Args:
        checkpoint: in its run folder, or alone; then there are no scores.
        repository: owner/name, where it will be.
    """
    run = checkpoint.folder.parent
    facts = read_runs([run])[0] if (run / CONFIG).is_file() else None
    state = checkpoint.state
    licence = state["encoder"]["licence"]
    terms = licence or "No licence comes with the embeddings; the owner of this page says what holds."
    header: dict[str, Any] = {"library_name": "sest", "tags": ["single-cell", "perturbation", "state-transition"]}
    if licence:
        header |= {"license": "other", "license_name": "that-of-the-embeddings"}
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {repository.rpartition('/')[2]}\n",
        _what(checkpoint),
        _weights(checkpoint),
        _use(checkpoint, repository),
        _data(checkpoint, facts),
        _scores(facts),
        f"## Licence\n\n{_text(terms)}\n",
    ]
    return "\n".join(part for part in parts if part)


def _text(words: str) -> str:
    """Words that may be from a file, in Markdown that shows them as they are."""
    return _MARKUP.sub(r"\\\g<0>", visible(words))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(_text(name) for name in names)


def _code(words: str) -> str:
    """The same as a code span."""
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    return f"{fence} {visible(words)} {fence}" if len(fence) > 1 else f"`{visible(words)}`"


def _what(checkpoint: Checkpoint) -> str:
    state, sizes = checkpoint.state, checkpoint.sizes
    encoder, source = _text(state["encoder"]["name"]), _text(state["features"]["source"])
    kind, beside = "Baselines", ""
    if checkpoint.has_head:
        kind = f"A State Transition head of {state['trainable_parameters']:,} parameters"
        beside = ", with the baselines that its predictions are blended with" if checkpoint.has_blend else ""
    return (
        f"{kind}{beside}, trained with sest {_text(state['sest_version'])} ({state['step']:,} steps). From embeddings "
        f"of control cells ({encoder}, {sizes.dim} wide) and the features of a perturbation ({source}, "
        f"{sizes.n_features} wide) it predicts log1p expression of {sizes.n_genes:,} "
        f"genes{_scale(state)}.\n"
    )


def _weights(checkpoint: Checkpoint) -> str:
    """What the parts count in a prediction."""
    if not checkpoint.has_blend:
        return ""
    weights = checkpoint.blend().weights
    means = [f"{_text(name)} {mean:.2f}" for name, mean in weights.means.items()]
    return (
        f"A prediction is {', '.join(means)} and controls {weights.of_controls:.2f} (weights fitted on "
        f"{weights.n_pairs:,} validation pairs; `stack` are the baselines together, `anchored` is the head held "
        "against itself); `--blend head` is the head alone.\n"
    )


def _scale(state: dict[str, Any]) -> str:
    is_of_counts = state["target_sum"] and state["scale"] != "log1p"
    return f", counts normalised to {state['target_sum']:g}" if is_of_counts else ""


def _use(checkpoint: Checkpoint, repository: str) -> str:
    known = checkpoint.state.get(CELLS, {})
    name = shlex.quote(visible(next(iter(known.get("trained", [])), "GENE")))
    with_encoder = "" if checkpoint.state["encoder"]["name"] in ("pca", "genes") else " --encoder ENCODER"
    return (
        "## Use\n\nWith `sest` and its extra `hub` installed:\n\n```bash\n"
        f"sest predict hf://{repository} --controls controls.h5ad{with_encoder} --only {name} --out predicted.h5ad\n"
        f"sest embed new.h5ad --like hf://{repository}{with_encoder} --cache new.zarr\n"
        f"sest train new.zarr --run adapted --init-from hf://{repository}\n```\n"
    )


def _data(checkpoint: Checkpoint, facts: RunFacts | None) -> str:
    known = checkpoint.state.get(CELLS, {})
    trained = known.get("trained", [])
    lines = ["## Data"]
    if trained:
        listed = _listed(trained[:FEW]) + (f" and {len(trained) - FEW} more" if len(trained) > FEW else "")
        lines.append(f"Trained on {len(trained):,} perturbations: {listed}.")
    if checkpoint.has_blend:
        effects = checkpoint.blend().effects
        lines.append(f"Contexts (file/cell type): {_listed(effects.controls.names)}.")
    held = sorted(set(known.get("perturbations", [])[1:]) - set(trained))
    if held:
        lines.append(f"Held out everywhere: {len(held):,} perturbations, such as {_listed(held[:FEW])}.")
    if facts is not None and (facts.folder / SPLITS).is_file():
        splits = {key: value for key, value in read_toml(facts.folder / SPLITS).items() if key != "datasets"}  # paths
        shown = "\n".join(map(visible, tomli_w.dumps(splits).strip().split("\n")))
        lines.append(f"Splits:\n\n```toml\n{shown}\n```")
    options = _options(facts.config) if facts is not None else ""
    return "\n\n".join([*lines, *([f"Options: {options}."] if options else [])]) + "\n"


def _options(config: TrainConfig) -> str:
    """What was not left as it is by default, but for paths."""
    usual = TrainConfig().to_values()
    own = {key: value for key, value in config.to_values().items() if value != usual.get(key) and key not in PATHS}
    return ", ".join(_code(f"--{key.replace('_', '-')} {value}") for key, value in own.items())


def _scores(facts: RunFacts | None) -> str:
    scores = facts.scores() if facts is not None else []
    if facts is None or not scores:
        return ""
    columns = list(dict.fromkeys(name for score in scores for name in score.baselines))
    heading = " | ".join(name.replace("_", " ") for name in columns)
    rows = [f"| metric | this | {heading} |", "|---" * (2 + len(columns)) + "|"]
    rows += [_row(score, columns) for score in scores]
    nothing = facts.last("val_pairs_not_measurable")
    said = f"\n{int(nothing)} of the pairs have no measurable effect: no score there is a win." if nothing else ""
    pairs = facts.last("val_pairs")
    return (
        f"## Scores\n\nOf the head alone at its best validation (step {facts.best_step:,}), on "
        f"{int(pairs or 0):,} pairs of the {SPLIT_NAMES[VAL]} split, beside baselines; measured by sest "
        f"{__version__}.\n\n" + "\n".join(rows) + f"\n{said}\n"
    )


def _row(score: Score, columns: list[str]) -> str:
    values = [score.model, *(score.baselines.get(name, math.nan) for name in columns)]
    return f"| {score.metric} | " + " | ".join("-" if math.isnan(v) else f"{v:.4g}" for v in values) + " |"


def push_head(
    run: Path, repository: str, *, checkpoint: str | None, private: bool, card: str | os.PathLike[str] | None
) -> str:
    """Push a checkpoint and its card; see `sest.push`.

    Only what predictions need is pushed: no optimizer state, no configuration with paths of this machine.
    """
    named = NAME.fullmatch(repository)
    if named is None:
        raise InputError(f"{repository!r} is no repository: name it OWNER/NAME.")
    source = sound_checkpoint(find_checkpoint(run, checkpoint))
    text = card_of(source, repository.partition("@")[0])
    if card is not None:
        check_output(Path(card))
        write_durably(Path(card), text.encode())
        return str(card)
    with tempfile.TemporaryDirectory(prefix="sest-") as folder:
        copied = Path(folder) / "head"
        without_optimizer(source, copied)
        (copied / "README.md").write_text(text, encoding="utf-8")
        step = source.state["step"]
        return Repository(named[1], named[2], "").upload(copied, f"sest: step {step:,}", private=private)
