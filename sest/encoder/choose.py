"""Which encoder `--encoder` names: a State Embedding model, `obsm:KEY`, or `pca` and `genes`, which need no weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from sest.cells.inputs import Cells
from sest.config import EmbedConfig
from sest.encoder.align import common_genes, name_genes
from sest.encoder.base import CellEncoder
from sest.encoder.genes import GENES, GenesEncoder
from sest.encoder.obsm import PREFIX, ObsmEncoder
from sest.encoder.pca import PCA, PcaEncoder
from sest.encoder.state import SeEncoder
from sest.errors import InputError, nearest, nearest_file
from sest.machine.devices import choose_device, choose_precision, faster_precision
from sest.se.weights import find_encoder, load_encoder

logger = logging.getLogger(__name__)

FITTED: dict[str, type[GenesEncoder]] = {PCA: PcaEncoder, GENES: GenesEncoder}  # made from the cells themselves


def needs_weights(encoder: str) -> bool:
    """Whether `--encoder` names a model that is to be loaded."""
    return encoder not in FITTED and not encoder.startswith(PREFIX)


def obsm_key(encoder: str) -> str | None:
    """The key of obsm that `--encoder` names; None for other encoders."""
    return encoder.removeprefix(PREFIX) if encoder.startswith(PREFIX) else None


def check_encoder(config: EmbedConfig) -> None:
    """Refuse what can be refused before the inputs are read: an encoder, device or precision that is not there."""
    if not config.encoder:
        raise InputError(
            "No encoder. Pass --encoder with an SE folder, a file of weights, 'pca', 'genes' or 'obsm:KEY'."
        )
    if obsm_key(config.encoder) == "":
        raise InputError("--encoder obsm: names no key. Pass obsm:KEY, as obsm:X_scVI.")
    if not needs_weights(config.encoder):
        if config.max_tokens is not None:
            raise InputError(
                f"--max-tokens shortens the sentences of an SE encoder; {config.encoder!r} has none. Leave it out."
            )
        if config.weights is not None:
            raise InputError(f"--weights is of an SE encoder; {config.encoder!r} has none. Leave it out.")
        if config.precision not in ("auto", "fp32"):
            raise InputError(
                f"--precision {config.precision} is of an SE encoder; {config.encoder!r} is float32. Leave it out."
            )
    else:
        choose_precision(config.precision, choose_device(config.device), training=False)
        if not Path(config.encoder).exists() and os.sep not in config.encoder:
            close = nearest(config.encoder, FITTED) or nearest_file(config.encoder)
            raise InputError(
                f"No encoder {config.encoder!r}: no SE folder or file of weights has that name here, and without "
                f"weights there are pca, genes and obsm:KEY.{close} SE-600M is arcinstitute/SE-600M (extra hub)."
            )
        find_encoder(Path(config.encoder), config.weights)


def make_encoder(config: EmbedConfig, cells: Sequence[Cells]) -> CellEncoder:
    """Build the encoder that --encoder names and match it with every file's genes.

    Raises:
        InputError: no such encoder, unusable weights, or a file whose genes it does not know.
    """
    check_encoder(config)
    if not needs_weights(config.encoder):
        names = name_genes(cells, config.gene_col)
        if key := obsm_key(config.encoder):
            return ObsmEncoder(key, cells, names)
        return FITTED[config.encoder](common_genes(cells, names), names)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, training=False)
    if hint := faster_precision(precision, device):
        logger.info(hint)
    weights = load_encoder(Path(config.encoder), config.weights)
    return SeEncoder(
        weights,
        cells,
        device,
        precision,
        seed=config.seed,
        max_tokens=config.max_tokens,
        gene_col=config.gene_col,
    )
