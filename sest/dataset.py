"""Everything a run reads: the store's cells, their splits and the perturbations' features, checked together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse

from sest.baselines import TrainingMeans
from sest.cache import Cache, open_cache
from sest.cells import Labels, read_embeddings, read_labels
from sest.config import TrainConfig
from sest.errors import InputError, shown
from sest.features import Features, make_features
from sest.progress import Progress
from sest.splits import SPLIT_NAMES, TEST, TRAIN, VAL, SplitFile, SplitRow, assign_splits, read_splits, split_table
from sest.targets import Targets, read_targets

ROWS_PER_BLOCK = 8192


@dataclass(frozen=True, eq=False)
class Dataset:
    """The cells of a run. N cells, E embedding width, G genes, P feature width."""

    cache: Cache
    labels: Labels
    mask: np.ndarray  # (N,) uint8 bits of sest.splits: TRAIN, VAL, TEST; 0: unused
    features: Features
    targets: Targets
    embeddings: np.ndarray  # (controls, E)
    embedding_row: np.ndarray  # (N,) int64
    split_file: SplitFile | None
    table: list[SplitRow]

    def in_split(self, bit: int) -> np.ndarray:
        """(N,) bool: the cells of a split."""
        return (self.mask & bit) > 0

    def held_out_whole(self) -> list[str]:
        """Contexts with perturbed cells to validate or test on, and none to train on."""
        perturbed = ~self.labels.is_control
        seen = set(self.labels.context[perturbed & self.in_split(TRAIN)].tolist())
        asked = set(self.labels.context[perturbed & (self.in_split(VAL) | self.in_split(TEST))].tolist())
        return [" / ".join(self.labels.contexts[code]) for code in sorted(asked - seen)]

    @property
    def cache_sha256(self) -> str:
        """Hash of how the store was made: a run resumes on the same cells and embeddings only."""
        return hashlib.sha256(json.dumps(self.cache.attributes, sort_keys=True).encode()).hexdigest()


def read_dataset(
    cache_path: Path,
    config: TrainConfig,
    progress: Progress,
    *,
    feature_names: tuple[str, ...] | None = None,
    scratch: Path | None = None,
) -> Dataset:
    """Open a store and read what training, prediction and validation need.

    Args:
        feature_names: the perturbations of a one-hot run, in its order (a resumed run or a prediction).
        scratch: folder for the targets where memory does not hold them, or config.data_device is "disk".

    Raises:
        InputError, StoreError: an unusable store, splits that do not fit it, features that are missing.
    """
    cache = open_cache(cache_path)
    labels, groups = read_labels(cache)
    split_file = read_splits(Path(config.splits), resolve_files=False) if config.splits else None
    splits = assign_splits(groups, split_file, seed=config.seed, val_fraction=config.val_fraction)
    for note in splits.notes:
        progress.note(note)
    mask = np.concatenate([splits.masks[path] for path in labels.groups])
    features = _features(labels, mask, config, progress, feature_names)
    dropped = np.isin(
        labels.perturbation, [i for i, name in enumerate(labels.perturbations) if name in features.missing]
    )
    if config.missing_perturbations == "drop":
        mask = np.where(dropped, 0, mask).astype(np.uint8)
        for bit in (TRAIN, VAL):
            if not (~labels.is_control & ((mask & bit) > 0)).any():
                raise InputError(
                    f"None of the perturbations of the {SPLIT_NAMES[bit]} split has features "
                    f"({shown(features.missing)}). Name others in a splits file, or pass --missing-perturbations zero."
                )
    table = split_table(groups, dataclasses.replace(splits, masks=_per_group(mask, labels)))
    where = {"disk": "disk", "auto": "auto"}.get(config.data_device, "memory")
    targets = read_targets(cache, config.target_sum, progress, where=where, scratch=scratch)
    embeddings, embedding_row = read_embeddings(cache, labels)
    return Dataset(cache, labels, mask, features, targets, embeddings, embedding_row, split_file, table)


def _per_group(mask: np.ndarray, labels: Labels) -> dict[str, np.ndarray]:
    return {path: mask[a:b] for path, a, b in zip(labels.groups, labels.first, labels.first[1:], strict=False)}


def _features(
    labels: Labels, mask: np.ndarray, config: TrainConfig, progress: Progress, names: tuple[str, ...] | None
) -> Features:
    """Features of the perturbations of the data; those no split uses need none."""
    used = np.unique(labels.perturbation[mask > 0])
    needed = {labels.perturbations[code] for code in used if code}
    features = make_features(
        config.perturbations, names or labels.perturbations, config.missing_perturbations, needed=needed
    )
    if features.names != labels.perturbations:
        raise InputError("The run was trained with one-hot features of other perturbations than this store has.")
    if features.missing:
        what = "their cells are left out" if config.missing_perturbations == "drop" else "zero vectors stand in"
        progress.note(f"No features for {len(features.missing)} perturbations, {what}: {shown(features.missing)}.")
    return features


def pseudobulks(targets: Targets, code: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean log1p expression of groups of cells.

    Args:
        code: (N,) int group of every cell, -1 for cells in none.
        n_groups: how many groups; every one must have a cell.

    Returns:
        (n_groups, G) float64.
    """
    rows = np.flatnonzero(code >= 0)
    sums = np.zeros((n_groups, len(targets.genes)))
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = rows[start : start + ROWS_PER_BLOCK]
        values = targets.log1p(block).astype(np.float64)
        member = scipy.sparse.csr_matrix(
            (np.ones(len(block)), (code[block], np.arange(len(block)))), shape=(n_groups, len(block))
        )
        sums += (member @ values).toarray()
    counts = np.bincount(code[rows], minlength=n_groups)
    assert (counts > 0).all(), "a group without cells"
    return sums / counts[:, None]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pseudobulks of the (context, perturbation) pairs of a split, beside those of their controls. K pairs, G genes."""

    context: np.ndarray  # (K,) codes of Labels.contexts
    perturbation: np.ndarray  # (K,) codes of Labels.perturbations
    n_cells: np.ndarray  # (K,)
    observed: np.ndarray  # (K, G) float64
    control: np.ndarray  # (K, G) float64


def split_pairs(data: Dataset, bit: int) -> Pairs:
    """Pseudobulks of all perturbed cells and of the controls of a split."""
    labels, mask = data.labels, data.in_split(bit)
    n_perturbations = len(labels.perturbations)
    key = np.where(
        mask & ~labels.is_control, labels.context.astype(np.int64) * n_perturbations + labels.perturbation, -1
    )
    keys = np.unique(key[key >= 0])
    context, perturbation = keys // n_perturbations, keys % n_perturbations
    contexts = np.unique(context)
    code = np.full(len(labels), -1)
    code[key >= 0] = np.searchsorted(keys, key[key >= 0])
    controls = mask & labels.is_control & np.isin(labels.context, contexts)
    code[controls] = len(keys) + np.searchsorted(contexts, labels.context[controls])
    means = pseudobulks(data.targets, code, len(keys) + len(contexts))
    counts = np.bincount(code[code >= 0], minlength=len(keys))[: len(keys)]
    return Pairs(
        context, perturbation, counts, means[: len(keys)], means[len(keys) + np.searchsorted(contexts, context)]
    )


def training_means(data: Dataset) -> TrainingMeans:
    """Effects of the training perturbations, from which the baselines learn."""
    pairs = split_pairs(data, TRAIN)
    contexts, which = np.unique(pairs.context, return_inverse=True)
    perturbations, pair = np.unique(pairs.perturbation, return_inverse=True)
    return TrainingMeans(
        contexts=tuple("/".join(data.labels.contexts[c]) for c in contexts),
        perturbations=tuple(data.labels.perturbations[p] for p in perturbations),
        delta=pairs.observed - pairs.control,
        pair_context=which,
        pair_perturbation=pair,
        n_cells=pairs.n_cells,
    )
