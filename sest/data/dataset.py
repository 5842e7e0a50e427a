"""Everything a run reads: the cells of a cache, their splits and the perturbations' features, checked together."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sest.cache import Cache, open_cache
from sest.cells.split_file import SPLIT_NAMES, TEST, TRAIN, VAL, SplitFile, read_splits
from sest.cells.splits import SplitRow, assign_splits, split_table
from sest.config import TrainConfig
from sest.data.features import Features, StoredFeatures, gene_loadings, make_features, with_sources
from sest.data.labels import Labels, pair_counts, read_embeddings, read_labels
from sest.data.targets import Targets, read_targets
from sest.data.vectors import GENES, ONE_HOT, read_sources, sources_of
from sest.errors import InputError, shown
from sest.machine.jit import say_slow_loops

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The cells of a run. N cells of all groups in the cache's order, E embedding width, G genes, P feature width."""

    cache: Cache
    labels: Labels
    mask: np.ndarray  # (N,) uint8 bits of sest.cells.splits: TRAIN, VAL, TEST; 0: unused
    features: Features
    targets: Targets
    embeddings: np.ndarray  # (controls, E) as stored
    control_rows: np.ndarray  # (controls,) which cells these are, ascending
    split_file: SplitFile | None
    table: list[SplitRow]  # what each split holds, for people
    sources: str  # of the features, with nothing left to choose: see `with_sources`
    gene_axis: str = "common"  # that of the targets
    scratch: Path | None = None  # folder for files of the targets; None: beside the cache

    def measured_in(self, context: int) -> np.ndarray | None:
        """(G,) bool: the genes that the file of a context has, by the context's code; None: all of them."""
        if self.targets.measured is None:
            return None
        genes: np.ndarray = self.targets.measured[self.labels.groups.index(self.labels.contexts[context][0])]
        return genes

    def all_targets(self) -> Targets:
        """The targets of all cells, where `targets` are of the controls alone.

        Raises:
            InputError: no room for them.
        """
        if self.targets.held is None:
            return self.targets
        return read_targets(self.cache, self.targets.target_sum, axis=self.gene_axis, scratch=self.scratch)

    def in_split(self, bit: int) -> np.ndarray:
        """(N,) bool: the cells of a split."""
        return (self.mask & bit) > 0

    def held_out_whole(self) -> list[str]:
        """Contexts with perturbed cells to validate or test on, and none to train on."""
        perturbed = ~self.labels.is_control
        seen = pair_counts(self.labels, perturbed & self.in_split(TRAIN)).any(1)
        asked = pair_counts(self.labels, perturbed & (self.in_split(VAL) | self.in_split(TEST))).any(1)
        return [" / ".join(self.labels.contexts[code]) for code in np.flatnonzero(asked & ~seen)]

    def perturbations_in(self, bit: int) -> list[str]:
        """The perturbations of a split, without the control."""
        codes = np.flatnonzero(pair_counts(self.labels, self.in_split(bit)).any(0))
        return [self.labels.perturbations[code] for code in codes if code]

    def never_learned(self) -> list[str]:
        """Perturbations that training can say nothing about; see `Features.never_learned`."""
        return self.features.never_learned(self.perturbations_in(TRAIN))

    def contexts_with_one(self, bit: int) -> list[str]:
        """Contexts with one perturbation in a split: none can be told from others there."""
        chosen = self.in_split(bit) & ~self.labels.is_control
        n_perturbations = (pair_counts(self.labels, chosen) > 0).sum(1)
        return [" / ".join(self.labels.contexts[code]) for code in np.flatnonzero(n_perturbations == 1)]


def read_dataset(
    cache: Cache | str | os.PathLike[str],
    config: TrainConfig,
    *,
    stored: StoredFeatures | None = None,
    like: Dataset | None = None,
    only_controls: bool = False,
) -> Dataset:
    """Read what training, prediction and validation need from a cache.

    Args:
        like: of the same cache and target sum, whose targets and embeddings are taken instead of read again.
        cache: opened, or its path or URL.
        stored: what the checkpoint to go on from, or to predict with, keeps of its features.
        only_controls: targets of the control cells alone, where these are kept beside the cache.

    Raises:
        InputError, CacheError: an unusable cache, splits that do not fit it, features that are missing.
    """
    if not isinstance(cache, Cache):
        cache = open_cache(os.fspath(cache))
    config = with_sources(config, cache)
    labels, groups = read_labels(cache)
    split_file = read_splits(Path(config.splits), resolve_files=False) if config.splits else None
    splits = assign_splits(
        groups,
        split_file,
        seed=config.seed,
        val_fraction=config.val_fraction,
        one_context=holds_out_in_one_context(config.val_contexts, config.perturbations),
    )
    for note in splits.notes:
        logger.info(note)
    if not only_controls:
        say_slow_loops()
    mask = np.concatenate([splits.masks[path] for path in labels.groups])
    targets = like.targets if like is not None else None
    scratch = Path(config.scratch) if config.scratch else None

    def read() -> Targets:
        return targets or read_targets(
            cache,
            config.target_sum,
            axis=config.gene_axis,
            where={"disk": "disk", "auto": "auto"}.get(config.data_device, "memory"),
            scratch=scratch,
            controls=labels.is_control,
            only_controls=only_controls,
        )

    if GENES in sources_of(config.perturbations) and (stored is None or stored.loadings is None):
        targets = read()
    features = _features(labels, mask, config, targets, stored)
    if config.missing_perturbations == "drop":
        mask = _without(features.missing, labels, mask)
    of_group = {path: mask[a:b] for path, a, b in zip(labels.groups, labels.first, labels.first[1:], strict=False)}
    table = split_table(groups, dataclasses.replace(splits, masks=of_group))
    if like is not None:
        embeddings, control_rows = like.embeddings, like.control_rows
    else:
        embeddings, control_rows = read_embeddings(cache, labels)
    return Dataset(
        cache=cache,
        labels=labels,
        mask=mask,
        features=features,
        targets=read(),
        embeddings=embeddings,
        control_rows=control_rows,
        split_file=split_file,
        table=table,
        sources=config.perturbations,
        gene_axis=config.gene_axis,
        scratch=scratch,
    )


def holds_out_in_one_context(val_contexts: str, source: str) -> bool:
    """Whether perturbations are held out in one context each; both as in TrainConfig, `source` its perturbations."""
    return val_contexts == "one" or (val_contexts == "auto" and source == ONE_HOT)


def _features(
    labels: Labels, mask: np.ndarray, config: TrainConfig, targets: Targets | None, stored: StoredFeatures | None
) -> Features:
    """Features of the perturbations of the data; those no split uses need none.

    `targets` where the vectors of genes are to be made from them; `stored` see `read_dataset`.
    """
    loadings = stored.loadings if stored is not None else None
    if targets is not None and loadings is None and GENES in sources_of(config.perturbations):
        if targets.measured is not None:
            raise InputError(
                "--perturbations genes takes the genes' loadings in all control cells, so it needs genes that all "
                "files have: --gene-axis common, or features from a file."
            )
        rows = np.flatnonzero(labels.is_control & ((mask & TRAIN) > 0))
        loadings = gene_loadings(targets, rows, labels.context[rows], config.seed)
    names, columns = (stored.names, stored.columns) if stored is not None else (None, None)
    names = names or labels.perturbations
    if not columns and (labels.as_is or (stored is not None and stored.names)):  # one column a perturbation
        columns = names[1:]
    vectors = read_sources(config.perturbations, names[1:], columns=columns, loadings=loadings)
    used = np.unique(labels.perturbation[mask > 0])
    needed = {labels.perturbations[code] for code in used if code}
    features = make_features(vectors, names, config.missing_perturbations, needed=needed)
    if features.names != labels.perturbations:
        raise InputError("The run was trained with one-hot features of other perturbations than this cache has.")
    if features.missing:
        what = "their cells are left out" if config.missing_perturbations == "drop" else "zero vectors stand in"
        logger.info(f"No features for {len(features.missing)} perturbations, {what}: {shown(features.missing)}.")
    return features


def _without(missing: tuple[str, ...], labels: Labels, mask: np.ndarray) -> np.ndarray:
    """The mask (N,) without the cells of the perturbations `missing`; splits must not become empty."""
    dropped = np.isin(labels.perturbation, [i for i, name in enumerate(labels.perturbations) if name in missing])
    mask = np.where(dropped, 0, mask).astype(np.uint8)
    for bit in (TRAIN, VAL):
        if not (~labels.is_control & ((mask & bit) > 0)).any():
            raise InputError(
                f"None of the perturbations of the {SPLIT_NAMES[bit]} split has features ({shown(missing)}). "
                "Name others in a splits file, or pass --missing-perturbations zero."
            )
    return mask
