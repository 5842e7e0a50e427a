"""Where a checkpoint's cache and features are, and whether those at hand are the ones it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sest.cache import Cache, open_cache
from sest.cache.storage import is_url
from sest.cells.split_file import read_splits
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.features import Features
from sest.data.vectors import GENES, ONE_HOT, source_files, sources_of
from sest.errors import InputError
from sest.options import read_toml
from sest.runs.checkpoint import Checkpoint, checkpoints
from sest.runs.run_folder import CONFIG, METRICS, SPLITS, own_cache, read_run_config


def files_of(run: Path) -> list[Path]:
    """What a run, or the run of a checkpoint folder, consists of and was made from, as far as it says.

    Its configuration, metrics, splits and checkpoints; its cache, features and splits, and the cells these name.
    """
    is_run = (run / CONFIG).is_file()
    folder = run if is_run else run.parent
    files = [*([] if is_run else [run]), *(folder / name for name in (CONFIG, METRICS, SPLITS)), *checkpoints(folder)]
    with suppress(InputError):
        values = read_toml(folder / CONFIG)
        made, splits = values.get("provenance"), values.get("splits")
        cache, features = made.get("cache") if isinstance(made, dict) else None, values.get("perturbations")
        files += [Path(path) for path in (cache, splits) if isinstance(path, str)]
        files += source_files(features) if isinstance(features, str) else []
        if isinstance(splits, str):
            files += [file for found in read_splits(Path(splits)).datasets.values() for file in found]
    return files


def find_data(checkpoint: Checkpoint, cache: str | None, perturbations: str | None) -> tuple[TrainConfig, Cache, str]:
    """What a checkpoint was trained with, by its run folder.

    Args:
        cache, perturbations: where the cache and the features file are now, if not where the run says.

    Returns:
        Its configuration, the cache as it was trained on (see `Cache.as_of`) and the sources of its features. The
        configuration of an imported checkpoint says one-hot whatever the source: of its features only those of the
        perturbations to predict are needed, not those of a whole cache.

    Raises:
        InputError, CacheError: a checkpoint without its run folder that is not told where they are, or nothing is
            there that can be used.
    """
    run = checkpoint.folder.parent
    values: dict[str, Any] = dict(checkpoint.state["config"])
    provenance: dict[str, Any] = {}
    if (run / CONFIG).is_file():
        values, provenance = read_run_config(run)
    elif perturbations is None and checkpoint.state["features"]["source"] != ONE_HOT:
        # an imported or moved checkpoint knows its sizes, not where files lie
        raise InputError(f"{checkpoint.folder} does not say where its perturbation features are. Pass --perturbations.")
    if perturbations is not None:
        values["perturbations"] = perturbations
    source = values.get("perturbations", ONE_HOT)
    require_sources(source)
    if GENES in sources_of(source) and "genes" not in checkpoint.features():
        raise InputError(f"{checkpoint.folder} keeps no vectors of genes. Pass --perturbations with a file.")
    if cache is None:
        cache = own_cache(checkpoint.folder, provenance)
    elif not (is_url(cache) or Path(cache).exists()):
        raise InputError(f"The cache {cache} does not exist. Pass --cache with the one the run was trained on.")
    if checkpoint.state["cache_sha256"] is None:  # imported
        values["perturbations"] = ONE_HOT
    opened = open_cache(cache).as_of(checkpoint.state["cache_sha256"])
    return TrainConfig.from_values(values, str(run / CONFIG)), opened, source


def require_sources(source: str) -> None:
    """Raise InputError where a file of the features that `source` names is not there."""
    for path in source_files(source):
        if not path.is_file():
            raise InputError(f"No file {path} with the run's perturbation features. Pass --perturbations with it.")


def check_data(checkpoint: Checkpoint, data: Dataset) -> None:
    """Refuse a cache or features that are not those of the checkpoint.

    Raises:
        InputError: another cache, width, features or genes than it was trained with.
    """
    state, sizes, cache, features = checkpoint.state, checkpoint.sizes, data.cache.path, data.features
    if state["cache_sha256"] not in (None, data.cache.sha256):
        raise InputError(f"{cache} is not the cache {checkpoint.folder} was trained on. Pass --cache with that one.")
    if data.cache.dim != sizes.dim:
        raise InputError(f"{cache} has embeddings of width {data.cache.dim}; the checkpoint takes {sizes.dim}.")
    check_features(checkpoint, features)
    genes = data.targets.genes
    if len(genes) != sizes.n_genes:
        raise InputError(f"{cache} has {len(genes)} genes; the checkpoint predicts {sizes.n_genes}.")
    if state["genes"] and list(genes) != state["genes"]:
        first = next(f"{b} instead of {a}" for a, b in zip(state["genes"], genes, strict=True) if a != b)
        raise InputError(f"{cache} has other genes, or in another order, than the checkpoint predicts: {first}.")


def check_features(checkpoint: Checkpoint, features: Features) -> None:
    """Refuse features of the run's perturbations that are not those it was trained with.

    Raises:
        InputError: another width, or other vectors.
    """
    known = checkpoint.state["features"]["sha256"]
    if known is None:  # imported
        return
    check_width(features.source, features.width, checkpoint)
    if features.sha256 != known:
        raise InputError(
            f"{features.source} has other features than the checkpoint was trained with. "
            "Pass --perturbations with the file it was trained with."
        )


def check_width(source: str, width: int, checkpoint: Checkpoint) -> None:
    """Refuse features of another width than the checkpoint takes; `source` is their file.

    Raises:
        InputError: they are.
    """
    if width != checkpoint.sizes.n_features:
        raise InputError(
            f"{source} has features of width {width}; the checkpoint takes {checkpoint.sizes.n_features}. "
            "Pass --perturbations with the file it was trained with."
        )


def saw_the_same_split(checkpoint: Checkpoint, data: Dataset) -> bool:
    """Whether `data` says which cells the checkpoint was trained on: same cache, same splits."""
    splits = data.split_file.sha256 if data.split_file is not None else None
    return bool(checkpoint.state["cache_sha256"] == data.cache.sha256 and checkpoint.state["splits_sha256"] == splits)


def first_of_alike(checkpoints: Sequence[Checkpoint], *, by_split: bool) -> Checkpoint:
    """The first; averages of different cells, genes or scales are refused.

    Args:
        by_split: the test split is predicted: one run must not have trained on what another one tests.
    """
    first, differ = checkpoints[0], {"cache_sha256": "on another cache", "genes": "with other genes"}
    differ["target_sum"] = "with another --target-sum"
    for other in checkpoints[1:]:
        for key, what in differ.items():
            if first.state[key] != other.state[key] or first.state["cache_sha256"] is None:
                raise InputError(f"{other.folder} was trained {what} than {first.folder}: they cannot be averaged.")
        if by_split and first.state["splits_sha256"] != other.state["splits_sha256"]:
            raise InputError(
                f"{other.folder} was trained with other --splits than {first.folder}: what one tests the other may "
                "have trained on. Name what to predict with --only, --list or --template."
            )
    return first
