"""Encoders by name on the Hugging Face hub, such as arcinstitute/SE-600M: downloaded once, then read from its cache.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from sest.config import EmbedConfig
from sest.errors import InputError, nearest, shown
from sest.se.weights import CONFIG_FILE, GENES_FILE

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_SUFFIXES = (".ckpt", ".safetensors")


def with_local_encoder(config: EmbedConfig) -> EmbedConfig:
    """The same configuration with the path of the encoder where --encoder names a repository of the hub.

    What is a file or folder here, or does not look like owner/name (owner/name@revision), stays as it is. Only the
    chosen weights, the gene vectors and config.yaml are downloaded.

    Raises:
        InputError: no such repository, revision or file of weights, no access, no connection and nothing in the cache.
    """
    named = _REPOSITORY.fullmatch(config.encoder)
    if named is None or Path(config.encoder).exists():
        return config
    repository, revision = named[1], named[2]
    hub = _package(config.encoder)
    folder, names = _listing(hub, repository, revision)
    weights = _choose(repository, names, config.weights)
    if folder is None:
        folder = _download(hub, repository, revision, [n for n in (weights, GENES_FILE, CONFIG_FILE) if n in names])
        logger.info(f"{repository}: {weights} of revision {folder.name[:12]}, in {folder}.")
    return dataclasses.replace(config, encoder=str(folder / weights), weights=None)


def _package(name: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"No file or folder {name}. If it is a repository on the Hugging Face hub: pip install 'sest[hub]'. "
            + _by_hand(name)
        ) from error
    return huggingface_hub


def _gated(repository: str) -> InputError:
    return InputError(
        f"{repository} on the Hugging Face hub wants its licence accepted on its page first; then set HF_TOKEN, or run "
        f"`hf auth login`. {_by_hand(repository)}"
    )


def _by_hand(repository: str) -> str:
    return (
        f"By hand: `hf download {repository.partition('@')[0]} --local-dir FOLDER` on a machine that has access, copy "
        "FOLDER here, and pass --encoder FOLDER."
    )


def _listing(hub: ModuleType, repository: str, revision: str | None) -> tuple[Path | None, Sequence[str]]:
    """The names of a repository's files; with the folder of the cache, if only that can be reached."""
    try:
        found = hub.HfApi().model_info(repository, revision=revision)
        return None, [file.rfilename for file in found.siblings]
    except hub.errors.GatedRepoError as error:
        raise _gated(repository) from error
    except hub.errors.RevisionNotFoundError as error:
        raise InputError(f"{repository} on the Hugging Face hub has no revision {revision!r}.") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise InputError(
            f"No file or folder {repository} here, and no such repository on the Hugging Face hub that you have access "
            "to (a private one needs HF_TOKEN)."
        ) from error
    except Exception as error:  # what the library's HTTP client raises depends on their versions
        reason = f"{type(error).__name__}: {_one_line(error)}"
        cached = hub.try_to_load_from_cache(repository, GENES_FILE, revision=revision)
        if not isinstance(cached, str):
            raise InputError(
                f"{repository} cannot be fetched from the Hugging Face hub ({reason}). {_by_hand(repository)}"
            ) from error
        folder = Path(cached).parent
        logger.info(f"{repository}: the hub cannot be reached ({reason}); used as downloaded before, from {folder}.")
        return folder, sorted(file.name for file in folder.iterdir())


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


def _download(hub: ModuleType, repository: str, revision: str | None, names: list[str]) -> Path:
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=names))
    except hub.errors.GatedRepoError as error:  # its list of files is open to all
        raise _gated(repository) from error
    except Exception as error:
        raise InputError(
            f"{repository} could not be downloaded ({type(error).__name__}: {_one_line(error)}). The same command goes "
            f"on where it stopped. {_by_hand(repository)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
