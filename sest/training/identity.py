"""What makes a run this run: kept in every checkpoint, and compared when it is resumed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.features import Features
from sest.data.vectors import ONE_HOT
from sest.errors import InputError, brief
from sest.head.model import HeadSizes
from sest.runs.checkpoint import Checkpoint
from sest.runs.run_folder import PATHS, RESUMABLE

OTHER = {  # what differs, where the values are hashes
    "cache_sha256": "another cache",
    "splits_sha256": "other splits",
    "features.sha256": "other vectors of the perturbations",
    "encoder.sha256": "another encoder",
}
NOT_COMPARED = ("precision", "features.source")  # kept in a checkpoint, but free to change when it is resumed


def identity_of(data: Dataset, config: TrainConfig, precision: str) -> dict[str, Any]:
    """Plain values for state.json: configuration, cells, splits, features, encoder and scale."""
    cache = data.cache.attributes
    return {
        "config": {key: value for key, value in config.to_values().items() if key not in (*RESUMABLE, *PATHS)},
        "precision": precision,
        "cache_sha256": data.cache.sha256,
        "splits_sha256": data.split_file.sha256 if data.split_file else None,
        "features": {
            "source": data.features.source,
            "sha256": data.features.sha256,
            "width": data.features.width,
            **_one_hot(data.features),
        },
        "encoder": {
            "name": cache["encoder"],
            "sha256": cache["encoder_sha256"],
            "native_dim": cache["native_dim"],
            "max_tokens": cache.get("max_tokens"),
            "projection": cache["projection"],
            "seed": cache["seed"],
            "genes": data.cache.projection_attributes.get("genes") if data.cache.projection else None,
            "licence": cache["licence"],
            **_means(data),
        },
        "scale": data.targets.scale,
        "target_sum": data.targets.target_sum,
        "columns": next(iter(data.cache.groups.values())).attributes["columns"],
    }


def projection_to_keep(data: Dataset) -> dict[str, Tensor] | None:
    """The PCA of the embeddings, for new cells, where there is one."""
    projection = data.cache.projection
    return {name: torch.from_numpy(values) for name, values in projection.items()} if projection else None


def _means(data: Dataset) -> dict[str, Any]:
    """Means of the genes that are the embedding (`--encoder genes`), for new cells that lack some."""
    means = data.cache.projection_attributes.get("means") if data.cache.projection else None
    return {} if means is None else {"gene_means": means}


def _one_hot(features: Features) -> dict[str, Any]:
    """The perturbations of a run with one-hot columns, and what these stand for where that is not one of them each."""
    source = features.vectors.of(ONE_HOT)
    if source is None:
        return {"names": None}
    columns = list(source.rows)
    return {"names": list(features.names)} | ({"columns": columns} if columns != list(features.names[1:]) else {})


def refuse_other_run(start: Checkpoint, identity: dict[str, Any], sizes: HeadSizes) -> None:
    """Refuse to continue a checkpoint with other data or another configuration; the differences are shown.

    Raises:
        InputError: something other than what `NOT_COMPARED` names differs.
    """
    there, now = _flat(start.state), _flat({**identity, "sizes": sizes.to_values()})
    different = [key for key in now if key not in NOT_COMPARED and there.get(key) != now[key]]
    if different:
        found = "; ".join(
            OTHER.get(key) or f"{key}: {brief(there.get(key))} there, {brief(now[key])} now" for key in different
        )
        raise InputError(f"{start.folder} is of another run ({found}). Start a new run with another --run folder.")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by "outer.inner" names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
