"""Encoders by name on the Hugging Face hub, such as arcinstitute/SE-600M: downloaded once, then read from its cache."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from sest.config import EmbedConfig
from sest.errors import InputError, nearest, shown
from sest.hub import NAME, Repository
from sest.se.weights import CONFIG_FILE, GENES_FILE

logger = logging.getLogger(__name__)

_SUFFIXES = (".ckpt", ".safetensors")


def with_local_encoder(config: EmbedConfig) -> EmbedConfig:
    """The same configuration with the path of the encoder where --encoder names a repository of the hub.

    What is a file or folder here, or does not look like owner/name (owner/name@revision), stays as it is. Only the
    chosen weights, the gene vectors and config.yaml are downloaded.

    Raises:
        InputError: no such repository, revision or file of weights, no access, no connection and nothing in the cache.
    """
    named = NAME.fullmatch(config.encoder)
    if named is None or Path(config.encoder).exists():
        return config
    repository = Repository(named[1], named[2], "pass --encoder FOLDER")
    folder, names = repository.files(GENES_FILE)
    try:
        weights = _choose(repository.name, names, config.weights)
    except InputError as error:
        raise (repository.in_part(folder) if folder is not None else None) or error from None
    wanted = [n for n in (weights, GENES_FILE, CONFIG_FILE) if n in names]
    if folder is not None:
        repository.check(folder, wanted)
    else:
        folder = repository.download(wanted)
        logger.info(f"{repository.name}: {weights} of revision {folder.name[:12]}, in {folder}.")
    return dataclasses.replace(config, encoder=str(folder / weights), weights=None)


def _choose(repository: str, names: Sequence[str], weights: str | None) -> str:
    """The file of weights among a repository's files: the one that was asked for, or the only one."""
    found = [name for name in names if name.endswith(_SUFFIXES)]
    if weights is not None:
        if weights not in found:
            raise InputError(
                f"{repository} has no weights {weights!r}.{nearest(weights, found)} It has: {shown(found)}."
            )
        return weights
    if not found:
        raise InputError(f"{repository} has no .ckpt or .safetensors: it is no SE encoder. It has: {shown(names)}.")
    if len(found) > 1:
        raise InputError(f"{repository} has several files of weights: {shown(found)}. Choose one with --weights NAME.")
    return found[0]
