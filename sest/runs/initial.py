"""Heads that go on with other cells: what a new run takes over from the checkpoint that it starts from.

Genes and perturbations are found by name, so that a run may have others; what is new keeps a fresh head's weights.
Shapes: H hidden width, P feature width, G genes, E embedding width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.features import StoredFeatures
from sest.data.vectors import AUTO, DRUGS, ONE_HOT, WORDS, Drugs, Source, one_hot, sources_of
from sest.errors import InputError, nearest, shown
from sest.head.model import HeadSizes, StateTransition
from sest.head.preset import SHAPE
from sest.runs.checkpoint import Checkpoint
from sest.runs.known import known_without_cells
from sest.runs.run_folder import stored_features
from sest.runs.schema import MODEL

logger = logging.getLogger(__name__)

INIT_FROM = "init_from"  # in state.json: what a run started from
PARTS = ("pert_encoder", "basal_encoder", "transformer_backbone", "project_out")


def like_head(config: TrainConfig, source: Checkpoint | None, start: Checkpoint | None) -> TrainConfig:
    """The configuration with what the head that a run starts from decides: its sizes, and where none are named the
    sources of features, if these are words.

    Args:
        source: that head; None: a fresh one, or one that a resumed run took over already.
        start: the checkpoint to go on from.
    """
    if config.init_from is None:
        return config
    theirs = source.state["features"]["source"] if source is not None else ""
    if config.perturbations == AUTO and theirs and set(sources_of(theirs)) <= set(WORDS):
        logger.info(f"Perturbation features: {theirs}, as of the head it starts from.")
        config = dataclasses.replace(config, perturbations=theirs)
    return sized_like(config, source or start)


def sized_like(config: TrainConfig, source: Checkpoint | None) -> TrainConfig:
    """The configuration with the sizes of the head that it starts from.

    Raises:
        InputError: there is no head in it, or other sizes are asked for.
    """
    assert source is not None
    if not source.has_head or config.head == "none":
        raise InputError(
            f"--init-from takes a head on; {source.folder if config.head == 'st' else 'this run'} has none."
        )
    usual, theirs = TrainConfig(), {name: getattr(source.sizes, name) for name in SHAPE}
    for name, value in theirs.items():
        if getattr(config, name) not in (value, getattr(usual, name)):
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{source.folder} has {option} {value}, which a run that starts from it keeps. Leave it out."
            )
    return dataclasses.replace(config, **theirs)


def frozen_parts(config: TrainConfig) -> tuple[str, ...]:
    """The parts of the head that do not train.

    Raises:
        InputError: no such part, all of them, or a run that starts from nothing.
    """
    parts = (config.freeze,) if isinstance(config.freeze, str) else config.freeze or ()
    if unknown := [part for part in parts if part not in PARTS]:
        raise InputError(
            f"--freeze takes parts of the head: {shown(PARTS)}; not {unknown[0]}.{nearest(unknown[0], PARTS)}"
        )
    if parts and config.init_from is None:
        raise InputError("--freeze keeps parts of the head that --init-from names; without one nothing is to be kept.")
    if set(parts) == set(PARTS):
        raise InputError("--freeze of all parts leaves nothing to train.")
    return tuple(dict.fromkeys(parts))


def freeze(model: StateTransition, config: TrainConfig) -> None:
    """Let the parts that `frozen_parts` names keep their weights."""
    for part in frozen_parts(config):
        model.get_submodule(part).requires_grad_(False)


def features_to_start_with(source: Checkpoint | None) -> StoredFeatures | None:
    """What the features of a run must have in common with those of the head it starts from: the vectors of genes."""
    stored = stored_features(source)
    return None if stored is None or stored.loadings is None else StoredFeatures(None, None, stored.loadings)


def refuse_other_cells(source: Checkpoint, data: Dataset) -> None:
    """Refuse cells whose embeddings or values mean something else than those of the checkpoint.

    Raises:
        InputError: another encoder, projection or scale.
    """
    made, here, state = source.state["encoder"], data.cache.attributes, source.state
    if data.cache.dim != source.sizes.dim:
        raise InputError(
            f"{data.cache.path} has embeddings of width {data.cache.dim}; {source.folder} takes {source.sizes.dim}. "
            f"{_embed_alike(source)}"
        )
    if made["sha256"] is None or state["cache_sha256"] is None:
        logger.warning(f"That the cells of {data.cache.path} are embedded as {source.folder} needs cannot be checked.")
    else:
        other = [key for key in ("native_dim", "max_tokens", "projection") if made.get(key) != here.get(key)]
        other += ["encoder"] if made["sha256"] != here["encoder_sha256"] else []
        theirs, ours = source.projection(), data.cache.projection
        if not other and (theirs is None) == (ours is None):
            same = theirs is None or ours is None or all(np.array_equal(ours[n], t.numpy()) for n, t in theirs.items())
            other += [] if same else ["projection"]
        if other:
            raise InputError(
                f"The cells of {data.cache.path} are not embedded as those of {source.folder} (another "
                f"{shown(dict.fromkeys(other))}). {_embed_alike(source)}"
            )
    if state["target_sum"] not in (None, data.targets.target_sum):
        raise InputError(
            f"{source.folder} was trained on counts normalised to {state['target_sum']:g}, not to "
            f"{data.targets.target_sum:g}. Pass --target-sum {state['target_sum']:g}."
        )


def _embed_alike(source: Checkpoint) -> str:
    return f"Embed them with: sest embed INPUT --like {source.folder} --cache OUT.zarr."


def take_over(source: Checkpoint, model: StateTransition, data: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Give a fresh head the weights of the checkpoint's, as far as genes and perturbations are the same, and say so.

    Returns:
        what it started from, for state.json.

    Raises:
        InputError: nothing in common, other vectors for the same perturbations, or new weights that --freeze would
            leave as they are.
    """
    if not source.state["genes"] and source.sizes.n_genes != len(data.targets.genes):
        raise InputError(
            f"{source.folder} does not name its {source.sizes.n_genes:,} genes, so only cells with as many, in the "
            f"same order, can go on with it; {data.cache.path} has {len(data.targets.genes):,}."
        )
    genes = _places(source.state["genes"] or None, data.targets.genes)
    columns = _places(_old_columns(source, data), _columns(data.features.vectors.sources))
    tensors, last = source.model_tensors(), _last(source.sizes)
    own = model.state_dict()
    for name, tensor in tensors.items():
        place = {f"project_out.{last}.weight": genes, f"project_out.{last}.bias": genes}.get(name)
        if name == "pert_encoder.0.weight":
            own[name][:, torch.from_numpy(columns >= 0)] = tensor[:, torch.from_numpy(columns[columns >= 0])]
        elif place is not None:
            own[name][torch.from_numpy(place >= 0)] = tensor[torch.from_numpy(place[place >= 0])]
        else:
            own[name].copy_(tensor)
    new = {"gene": int((genes < 0).sum()), "feature column": int((columns < 0).sum())}
    if new["gene"] == len(genes):
        raise InputError(f"{data.cache.path} has none of the genes that {source.folder} predicts.")
    for what, part in (("gene", "project_out"), ("feature column", "pert_encoder")):
        if new[what] and part in frozen_parts(config):
            raise InputError(
                f"{new[what]:,} {what}s are new to {source.folder}; --freeze {part} would never train them."
            )
    logger.info(
        f"The head starts from {source.folder} (step {source.state['step']:,}): {len(genes) - new['gene']:,} of "
        f"{len(genes):,} genes and {len(columns) - new['feature column']:,} of {len(columns):,} feature columns are "
        "known to it, the others begin as in a fresh head."
    )
    if new["feature column"] == len(columns):
        theirs, ours = source.state["features"]["source"], data.features.source
        logger.warning(
            f"{source.folder} was trained with other features ({theirs}, these are {ours}): what it knows of "
            "perturbations is not used."
        )
    return {"name": source.folder.name, "step": source.state["step"], "model_sha256": source.state["files"][MODEL]}


def _last(sizes: HeadSizes) -> int:
    """Number of the last layer of `project_out`."""
    return 3 * (sizes.n_decoder_layers - 1)


def _places(old: Sequence[Hashable] | None, new: Sequence[Hashable]) -> np.ndarray:
    """Where each of the new names is among the old ones, -1 where it is not; unnamed old ones are in the same order."""
    place = {name: i for i, name in enumerate(new if old is None else old)}
    return np.array([place.get(name, -1) for name in new])


def _columns(sources: Sequence[Source]) -> list[Hashable]:
    """What each feature column stands for."""
    columns: list[Hashable] = []
    for source in sources:
        if isinstance(source, Drugs):
            columns += [(DRUGS, name, what) for what in source.parts for name in source.rows]
        elif source.name == ONE_HOT:
            columns += [(ONE_HOT, name) for name in source.rows]
        else:
            columns += [(source.name, source.width, number) for number in range(source.width)]
    return columns


def _old_columns(source: Checkpoint, data: Dataset) -> list[Hashable] | None:
    """What the feature columns of the checkpoint stand for; None: the same as those of the data.

    Raises:
        InputError: a file has other vectors than it was trained with, or what its features were is not known.
    """
    known, vectors = known_without_cells(source, None), data.features.vectors
    if known is None:
        names = source.state["features"].get("columns") or (source.state["features"].get("names") or [None])[1:]
        if names:
            return _columns([one_hot(names, names)])
        if source.sizes.n_features != data.features.width:
            raise InputError(
                f"{source.folder} takes features of width {source.sizes.n_features}; these have {data.features.width}. "
                "Pass --perturbations with those it was trained with."
            )
        logger.warning(f"What the features of {source.folder} were is not known: they are taken to be these.")
        return None
    for theirs in known.features.vectors.sources:
        ours = vectors.of(theirs.name)
        if ours is None or theirs.name in WORDS or ours.width != theirs.width:
            continue
        for name in known.perturbations[1:]:
            a, b = theirs.find(name), ours.find(name)
            if a is not None and b is not None and not _proportional(a, b):
                raise InputError(
                    f"{theirs.name} has another vector for {name} than the features that {source.folder} was trained "
                    "with. Pass --perturbations with their file, or one that adds perturbations to it."
                )
    return _columns(known.features.vectors.sources)


def _proportional(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two vectors are the same but for the factor by which a file beside others is scaled."""
    return bool(abs(float(a @ b)) >= (1 - 1e-5) * float(np.linalg.norm(a) * np.linalg.norm(b)))


def started_from(start: Checkpoint | None, taken: dict[str, Any] | None) -> dict[str, Any]:
    """For state.json: what a run started from, which a resumed one keeps."""
    found = taken or (start.state.get(INIT_FROM) if start is not None else None)
    return {} if found is None else {INIT_FROM: found}
