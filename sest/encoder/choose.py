"""Which encoder `--encoder` names: a State Embedding model, or `pca`, the control that needs no weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sest.cells.inputs import Cells
from sest.config import EmbedConfig
from sest.encoder.align import common_genes, name_genes
from sest.encoder.base import CellEncoder
from sest.encoder.pca import PCA, PcaEncoder
from sest.encoder.state import SeEncoder
from sest.errors import InputError
from sest.machine.devices import choose_device, choose_precision, faster_precision
from sest.se.weights import find_encoder, load_encoder

logger = logging.getLogger(__name__)


def check_encoder(config: EmbedConfig) -> None:
    """Refuse what can be refused before the inputs are read: an encoder, device or precision that is not there."""
    if not config.encoder:
        raise InputError("No encoder. Pass --encoder with an SE folder, a file of weights, or 'pca'.")
    if config.encoder == PCA and config.max_tokens is not None:
        raise InputError("--max-tokens shortens the sentences of an SE encoder; 'pca' has none. Leave it out.")
    if config.encoder != PCA:
        choose_precision(config.precision, choose_device(config.device), training=False)
        find_encoder(Path(config.encoder), config.weights)


def make_encoder(config: EmbedConfig, cells: Sequence[Cells]) -> CellEncoder:
    """Build the encoder that --encoder names and match it with every file's genes.

    Raises:
        InputError: no such encoder, unusable weights, or a file whose genes it does not know.
    """
    check_encoder(config)
    if config.encoder == PCA:
        names = name_genes(cells, config.gene_col)
        return PcaEncoder(common_genes(cells, names), names)
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
