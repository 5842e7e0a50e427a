"""Features of the perturbations to predict, and which of them the run can say nothing about.

Shapes: P feature width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from sest.data.features import Features, equal_vectors
from sest.data.vectors import ONE_HOT, Vectors, absent_hint, label_of, read_sources
from sest.errors import InputError, shown
from sest.runs.checkpoint import Checkpoint
from sest.runs.known import Known
from sest.runs.provenance import check_width

logger = logging.getLogger(__name__)

TRAIN_WITH_FEATURES = (
    "Train with --perturbations FILE (a vector a perturbation) or genes (of measured genes) to predict unseen ones."
)
WITH_FILE = "Pass --perturbations with a file that has them too."


def vectors_of(names: Sequence[str], checkpoint: Checkpoint, run: Known) -> dict[str, np.ndarray]:
    """Features (P,) of the perturbations to predict; their sources may have more than the run was trained on."""
    known, missing = run.features.vectors, run.config.missing_perturbations
    if label_of(run.source) != known.label:  # an imported checkpoint's
        known = read_sources(run.source, ())
    check_width(known.label, known.width, checkpoint)
    found = {name: known.find(name) for name in names}
    absent = [name for name in names if found[name] is None]
    found_nothing = f"{known.label} has no features for"
    if known.label == ONE_HOT:
        found_nothing = "The run has one-hot features and never saw"
    if absent and (missing != "zero" or known.label == ONE_HOT):
        raise InputError(
            f"{found_nothing} {len(absent)} of {len(names)} perturbations: {shown(absent)}."
            f"{absent_hint(absent, known.names)} {TRAIN_WITH_FEATURES if known.label == ONE_HOT else WITH_FILE}"
        )
    if unknown := [name for name in absent if name not in run.perturbations]:
        raise InputError(
            f"Neither {known.label} nor the run has {shown(unknown)}."
            f"{absent_hint(unknown, dict.fromkeys([*known.names, *run.perturbations[1:]]))} "
            f"There are, for example: {shown(known.names)}. {WITH_FILE}"
        )
    if absent:
        logger.info(f"No features for {shown(absent)}: predicted from zeros, as a perturbation without features.")
    there = [name for name in names if name not in absent]
    known.say_what_is_made(there)
    _refuse_untrained(there, known, run)
    zero = np.zeros(known.width, np.float32)
    vectors = {name: zero if vector is None else vector for name, vector in found.items()}
    _say_which_are_alike({name: vectors[name] for name in there}, run.features)
    return vectors


def _refuse_untrained(names: Sequence[str], known: Vectors, run: Known) -> None:
    """What has nothing but one-hot columns can only be predicted if these were trained."""
    names = [name for name in names if known.has_only_a_column(name)]
    if not names:
        return
    if run.trained is None:
        logger.info(
            "What this run with one-hot features was trained on is not known here: what it never saw, it guesses."
        )
        return
    targets = {target for name in run.trained for target in known.columns_of(name)}
    if never := [name for name in names if not targets.issuperset(known.columns_of(name))]:
        raise InputError(
            f"The run has one-hot features and was never trained on {len(never)} of {len(names)} perturbations: "
            f"{shown(never)}. It was on: {shown(run.trained)}. {TRAIN_WITH_FEATURES}"
        )


def _say_which_are_alike(asked: Mapping[str, np.ndarray], run: Features) -> None:
    """Say which of the perturbations to predict have the very vector of another one, of the run or asked as well."""
    trained = {} if run.source == ONE_HOT else dict(zip(run.names, run.matrix, strict=True))
    everyone = {name: vector for name, vector in trained.items() if name not in run.missing} | dict(asked)
    alike = [group for group in equal_vectors(everyone, everyone.values()) if not asked.keys().isdisjoint(group)]
    if alike:
        said = "; ".join(shown(group) for group in alike)
        logger.info(f"Perturbations with the same feature vector get the same prediction: {said}.")
