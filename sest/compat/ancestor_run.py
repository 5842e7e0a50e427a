"""What a command line of the ancestor meets on the disk: a finished cache, a run to go on with, data of other sizes."""

from __future__ import annotations

import logging
from pathlib import Path

from sest.cache import Cache, CacheError, open_cache
from sest.cache.schema import COMPLETE
from sest.cells.inputs import resolve_inputs
from sest.compat.ancestor import (
    CHECKPOINT,
    EMBEDDING_DIM,
    INPUT_DIM,
    KEYS,
    ONE_HOT,
    OUTPUT_DIM,
    PCA,
    PERT_DIM,
    SE_CHECKPOINT,
    SE_FOLDER,
    Request,
    checkpoint_folder,
)
from sest.config import TrainConfig
from sest.data.vectors import read_source
from sest.errors import InputError
from sest.files.cell_file import CellFile
from sest.runs.checkpoint import find_checkpoint, resumable
from sest.runs.run_folder import resumed_config
from sest.se.weights import COPY_SUFFIX

logger = logging.getLogger(__name__)

COLUMNS = {"pert_col": "perturbation", "cell_type_col": "cell_type", "batch_col": "batch", "control": "control"}


def find_resume(request: Request) -> str | None:
    """Where training goes on from, as `sest train --resume` takes it; None for a new run.

    A run that has checkpoints goes on from its furthest, whatever it was begun from: the same command continues it.

    Raises:
        InputError: no such checkpoint, or options that would make another run.
    """
    resume: str | None = None
    if request.run.exists() and (request.checkpoint is None or resumable(request.run)):
        resume = "auto"
        begun = f"; {CHECKPOINT} says where it began" if request.checkpoint is not None else ""
        logger.info(f"{request.run} exists: its training goes on (--resume auto){begun}.")
    elif request.checkpoint is not None:
        wanted = checkpoint_folder(request.checkpoint)
        resume = str(find_checkpoint(wanted.parent, wanted.name))
        logger.info(f"{request.run} goes on from {resume}. max_steps counts the steps before it too.")
    if resume is None:
        TrainConfig.from_values(request.train, "the command line")
    else:
        resumed_config(request.run, resume, request.train)
    return resume


def finished_cache(request: Request) -> Cache | None:
    """The cache if it is complete. Its inputs are not read again: they may be large, or gone.

    Raises:
        InputError: it was made with another encoder, width or columns than are asked for now.
    """
    if not (request.cache / COMPLETE).is_file():
        return None
    try:
        cache = open_cache(request.cache)
    except CacheError as error:  # damaged: embedding again repairs it, or says what stands in the way
        logger.info(str(error))
        return None
    _check_made_as_asked(request, cache)
    logger.info(
        f"{request.cache} is complete ({cache.n_cells:,} cells at width {cache.dim}): training starts from it, and the "
        "cells' files are not read. To embed other cells, or anew, delete it or choose another output_dir."
    )
    return cache


def _check_made_as_asked(request: Request, cache: Cache) -> None:
    made, asked = str(cache.attributes["encoder"]), request.embed.get("weights")
    if (request.encoder == PCA) != (made == PCA):
        raise _made_otherwise(request.cache, SE_FOLDER, request.encoder, made)
    if asked is not None and asked.removesuffix(COPY_SUFFIX) not in (made, made.removesuffix(".ckpt")):
        raise _made_otherwise(request.cache, SE_CHECKPOINT, asked, made)
    width = request.sizes.get(EMBEDDING_DIM, cache.dim)
    if width != cache.dim:
        raise _made_otherwise(request.cache, EMBEDDING_DIM, str(width), str(cache.dim))
    names = {key.field: key.name for key in KEYS.values()}
    for field in COLUMNS.keys() & request.embed.keys():
        found = {str(group.attributes["columns"][COLUMNS[field]]) for group in cache.groups.values()}
        if found != {request.embed[field]}:
            raise _made_otherwise(request.cache, names[field], request.embed[field], ", ".join(sorted(found)))


def _made_otherwise(cache: Path, key: str, asked: str, found: str) -> InputError:
    return InputError(
        f"{key} is {asked}, but {cache} was made with {found}. Give ++{key}={found}, or embed into another "
        "++output_dir."
    )


def check_before_embedding(request: Request) -> None:
    """Refuse what training would refuse after hours of embedding: features and numbers of genes.

    Raises:
        InputError: no readable features, or sizes that the data do not have.
    """
    check_features(request)
    files = {source.path for source in resolve_inputs([request.splits], request.data_roots)[0]}
    counts: dict[str, int] = {}
    for path in files:
        with CellFile(path) as file:
            counts[path.name] = file.n_genes
    name, n_genes = min(counts.items(), key=lambda item: item[1])
    exact = len(files) == 1
    for key in (INPUT_DIM, OUTPUT_DIM):  # of several files the common genes count, which may be fewer
        asked = request.sizes.get(key, n_genes)
        if asked > n_genes or (exact and asked != n_genes):
            raise _other_size(key, asked, f"{name} has {n_genes} genes", n_genes)


def check_features(request: Request) -> None:
    """Compare pert_dim with the features file.

    Raises:
        InputError: the file cannot be read, or is of another width.
    """
    source = request.train.get("perturbations", ONE_HOT)
    if source == ONE_HOT:
        return
    width = read_source(Path(source)).width
    asked = request.sizes.get(PERT_DIM, width)
    if asked != width:
        raise _other_size(PERT_DIM, asked, f"{source} has features of width {width}", width)


def check_genes(request: Request, cache: Cache) -> None:
    """Compare input_dim and output_dim with the genes that all groups of the cache have.

    Raises:
        InputError: they differ.
    """
    n_genes = len(set.intersection(*(set(group.genes) for group in cache.groups.values())))
    for key in (INPUT_DIM, OUTPUT_DIM):
        asked = request.sizes.get(key, n_genes)
        if asked != n_genes:
            raise _other_size(key, asked, f"the cells of {request.cache} have {n_genes} genes in common", n_genes)


def _other_size(key: str, asked: int, found: str, size: int) -> InputError:
    return InputError(f"{key} is {asked}, but {found}. Give ++{key}={size}, or leave it out.")
