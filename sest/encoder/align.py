"""The genes of several files under the same names, for encoders that read what all files have."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence

from sest.cells.genes import INDEX, agreeing_names, gene_names, names_as_known, unnamed_genes
from sest.cells.inputs import Cells, named
from sest.errors import InputError, shown

logger = logging.getLogger(__name__)

GO_ON = " Pass --missing-genes zero or mean to go on without them."


def name_genes(cells: Sequence[Cells], gene_col: str | None) -> dict[str, list[str]]:
    """Group -> the names of its file's genes, so that the same gene has the same name in all files.

    Args:
        gene_col: the var column with the names; None: see `agreeing_names`.

    Raises:
        InputError: of several files one does not name its genes.
    """
    found = agreeing_names([c.file.var for c in cells], gene_col)
    for c, names in zip(cells, found, strict=True):
        if not names.are_numbers or gene_col is not None:
            continue
        if len(cells) > 1:
            raise unnamed_genes(c.source.path)
        logger.info(f"{c.source.path.name}: its genes have no names, only numbers: no other file can be used with it.")
    return {c.group: named(c, names) for c, names in zip(cells, found, strict=True)}


def name_genes_as(
    cells: Sequence[Cells],
    known: Sequence[str],
    whose: str,
    gene_col: str | None,
    *,
    advice: str = "",
    missing_genes: str = "error",
) -> dict[str, list[str]]:
    """As `name_genes`, for files whose genes are to be found among the `known` ones of an earlier file.

    Args:
        whose: genes `known` are; for messages, as is `advice`.
        missing_genes: "error", or what genes are taken for that a file lacks (at most half of them), which is said.

    Raises:
        InputError: they are not, or these are numbers, which say nothing of another file.
    """
    result = {}
    for c in cells:
        names = names_as_known(c.file.var, known, gene_col)
        if names.are_numbers and gene_col is None:
            raise unnamed_genes(c.source.path)
        result[c.group] = named(c, names)
        there = set(result[c.group])
        if missing := [name for name in known if name not in there]:
            lacks = f"lacks {len(missing):,} of the {len(known):,} genes of {whose}: {shown(missing)}."
            few = len(missing) <= len(known) / 2  # of more, no rule makes the same cells
            if missing_genes != "error" and few:
                taken = "not expressed" if missing_genes == "zero" else "the mean of the cells there"
                logger.warning(f"{c.source.path.name} {lacks} They are taken for {taken}, as asked.")
                continue
            tried = shown((INDEX, *map(str, c.file.var.columns)))
            raise InputError(
                f"{c.file.path} {lacks}{advice}{GO_ON if few else ''} "
                f"Its genes are {shown(names.names[:3])}; tried: {tried}."
            )
    return result


def common_genes(cells: Sequence[Cells], names: Mapping[str, Sequence[str]]) -> list[str]:
    """Genes that every file has, in the order of the first; `names` as of `name_genes`.

    Raises:
        InputError: the files have none in common.
    """
    first = names[cells[0].group]
    shared = set(first).intersection(*(names[c.group] for c in cells[1:]))
    genes = [name for name in first if name in shared]
    if not genes:
        raise InputError(f"The files have no gene in common: {shown(map(_examples, cells))}.")
    if len(genes) < max(c.file.n_genes for c in cells):
        logger.info(f"{len(genes):,} genes are in all files, and used.")
    return genes


def _examples(cells: Cells) -> str:
    """A file's gene names, and the columns that may name them."""
    own = gene_names(cells.file.var)
    columns = [INDEX, *map(str, cells.file.var.columns)]
    return f"{cells.source.path.name} has {shown(own.names[:3])} (tried: {shown(columns)})"


def hash_names(names: Sequence[str]) -> str:
    """The SHA-256 of names and their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
