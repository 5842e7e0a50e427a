"""What the genes of a file are called, and which of them an encoder or another file knows."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sest.errors import InputError, shown

# Conventional names of var columns that name genes: symbols before ids, as features of perturbations are symbols.
GENE_COLUMNS = (
    "gene_name gene_names gene_symbol gene_symbols symbol symbols feature_name feature_names hgnc_symbol "
    "gene_short_name gene genes gene_id gene_ids ensembl_id ensembl_ids ensembl ensembl_gene_id feature_id"
).split()
FEATURE_TYPES, GENES = ("feature_types", "feature_type"), "gene expression"  # 10x's columns of var, and what genes are
INDEX = "var index"  # as messages call it; --gene-col takes "index"
VERSION = re.compile(r"(ENS[A-Z]*[GTP]\d{6,})\.\d+")
MIN_GENES = 4  # slot 0 of a sentence carries the weight of kept gene number 3 (upstream's cls_token_idx)


@dataclass(frozen=True)
class GeneNames:
    """What the genes of a file (G) are called."""

    column: str  # the var column, or "var index"
    names: tuple[str, ...]  # (G,) "" where it has none

    @property
    def are_numbers(self) -> bool:
        """Whether they name no gene: row numbers, also as `var_names_make_unique` leaves those of joined files."""
        return all(re.fullmatch(r"\d+([-_.]\d+)*", name) for name in self.names)

    @property
    def have_versions(self) -> bool:
        """Whether some are Ensembl ids with versions."""
        return any(VERSION.match(name) for name in self.names)

    def without_versions(self, known: Mapping[str, str] | None = None) -> GeneNames:
        """The same with Ensembl ids as `known` has them: id without version -> name; None: without versions."""
        bare = [VERSION.sub(r"\1", name) for name in self.names]
        names = bare if known is None else [known.get(b, name) for b, name in zip(bare, self.names, strict=True)]
        return GeneNames(f"{self.column}, whatever the version", tuple(names))


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """The genes of a file (G) that an encoder knows."""

    column: str  # the var column whose names matched best, or "var index"
    names: tuple[str, ...]  # (G,) all names in that column, "" where it has none
    positions: np.ndarray  # (kept,) int64 ascending: the genes that are known
    tokens: np.ndarray  # (kept,) int64: where each of them is in `known`


def gene_names(var: pd.DataFrame, given: str | None = None) -> GeneNames:
    """What a file calls its genes: the var index, or where that holds numbers, the usual column that names genes.

    Args:
        given: the column to read instead; "index" for the index, whatever it holds.

    Raises:
        InputError: no column `given`.
    """
    if given not in (None, "index"):
        if given not in var:
            there = ("index", *map(str, var.columns))
            raise InputError(f"No column {given!r} in var. Available: {shown(there)}. Pass --gene-col.")
        return GeneNames(str(given), tuple(_names(var[given])))
    index = GeneNames(INDEX, tuple(_names(var.index.to_series())))
    if given == "index" or not index.are_numbers:
        return index
    plain = {re.sub(r"[^a-z0-9]+", "_", names.column.lower()): names for names in _text_columns(var)}
    usual = (plain[name] for name in GENE_COLUMNS if name in plain)
    return next(filter(_may_name_genes, usual), index)


def all_names(var: pd.DataFrame) -> frozenset[str]:
    """Whatever a file may call its genes: the var index and the text columns that may name genes.

    Rows that say that they are no gene, as 10x's guides and antibodies do, are left out.
    """
    texts = [names for names in _text_columns(var) if names.column not in FEATURE_TYPES and _may_name_genes(names)]
    columns = [gene_names(var, "index"), *texts]
    is_gene = _are_genes(var)
    return frozenset(
        name for names in columns for name, gene in zip(names.names, is_gene, strict=True) if gene and name
    )


def _are_genes(var: pd.DataFrame) -> list[bool]:
    """Of each row (G), whether its type of feature, where it has one, is that of genes."""
    for column in FEATURE_TYPES:
        if column in var:
            kinds = [name.strip().casefold() for name in _names(var[column])]
            if GENES in kinds:  # else the column says something else, such as protein_coding
                return [kind in ("", GENES) for kind in kinds]
    return [True] * len(var)


def agreeing_names(tables: Sequence[pd.DataFrame], given: str | None = None) -> list[GeneNames]:
    """What several files call their genes, so that the same gene has the same name.

    Each file's own names (`gene_names`), unless fewer than a tenth of the smallest file's are common to all, or
    Ensembl ids have versions: then those columns, with or without versions, that have more in common.
    """
    own = [gene_names(var, given) for var in tables]
    least = max(1, math.ceil(0.1 * min(map(len, tables))))
    if len(own) == 1 or given == "index":
        return own
    shared = 0 if any(names.are_numbers for names in own) else _n_common(own)
    if shared >= least and not any(names.have_versions for names in own):
        return own
    best, most = own, max(shared, least - 1)
    options = [_namings(var, names, given) for var, names in zip(tables, own, strict=True)]
    for first in options[0]:
        known = set(first.names) - {""}
        chosen = [first, *(max(o, key=lambda n: len(known.intersection(n.names))) for o in options[1:] if o)]
        if len(chosen) == len(own) and (found := _n_common(chosen)) > most:
            best, most = chosen, found
    return best


def names_as_known(var: pd.DataFrame, known: Sequence[str], given: str | None = None) -> GeneNames:
    """What a file calls its genes, where these are to be found among `known` names: its own names if they have all.

    Otherwise the column with most of them, with Ensembl ids of any version; the first of equals.
    """
    own, wanted = gene_names(var, given), set(known)
    if wanted <= set(own.names) and not own.are_numbers:
        return own
    bare = {VERSION.sub(r"\1", name): name for name in known}
    options = [own, *(n for n in _namings(var, own, given) if n != own)]
    options += [n.without_versions(bare) for n in options if "version" not in n.column]
    return max(options, key=lambda n: len(wanted.intersection(n.names)))


def column_of_targets(var: pd.DataFrame, targets: Collection[str]) -> GeneNames | None:
    """The text column of var that has at least half of the targets of perturbations, where the file's own names do not.

    So it is with Ensembl ids in the index and symbols beside them. None: there is none.
    """
    own, wanted = gene_names(var), set(targets)
    found = max(_text_columns(var), key=lambda names: len(wanted.intersection(names.names)), default=own)
    n_own, n_found = (len(wanted.intersection(names.names)) for names in (own, found))
    return found if 2 * n_own < len(wanted) <= 2 * n_found and _may_name_genes(found) else None


def unnamed_genes(path: object) -> InputError:
    """The error of a file that is to agree with others by gene, and does not name its genes."""
    return InputError(
        f"{path} does not name its genes: its var index holds numbers and no text column of var has the names. "
        "Add them as column gene_name, or pass --gene-col: a column of var, or index if these numbers are the names."
    )


def match_genes(
    var: pd.DataFrame, known: Sequence[str], *, minimum: float = 0.1, given: str | None = None
) -> GeneMatch:
    """Find the genes of a file among the `known` names, by the var index or the text column with most matches.

    Ensembl ids match without their versions where they do not with them. `given` as in `gene_names`.

    Raises InputError if fewer than 4 genes or less than the share `minimum` of the file's genes is known (a small panel
    of known genes is fine), and if two genes of the file have the same known name.
    """
    index = pd.Index(known)
    assert index.is_unique
    if given is not None:
        columns = [gene_names(var, given)]
    else:
        columns = [gene_names(var, "index"), *_text_columns(var)]
    bare = [names.without_versions() for names in columns if names.have_versions]
    columns += [names for names in bare if index.isin(names.names).any()]
    tried = {names.column: list(names.names) for names in columns}
    tokens = {column: index.get_indexer(names) for column, names in tried.items()}
    found = {column: len(np.unique(t[t >= 0])) for column, t in tokens.items()}  # different genes
    best = max(tried, key=lambda column: (found[column], -int((tokens[column] >= 0).sum())))  # first of equals
    if found[best] < max(MIN_GENES, math.ceil(minimum * len(var))):
        raise InputError(_too_few(tried, found, known))
    positions = np.flatnonzero(tokens[best] >= 0)
    kept = tokens[best][positions]
    twice = np.flatnonzero(np.bincount(kept) > 1)
    if len(twice):
        raise InputError(
            f"{len(twice)} known genes are there more than once ({best}): {shown(known[i] for i in twice.tolist())}. "
            "Sum or drop the extra ones and save the file again."
        )
    return GeneMatch(best, tuple(tried[best]), positions.astype(np.int64), kept.astype(np.int64))


def _names(values: pd.Series) -> list[str]:
    return ["" if missing else str(value) for value, missing in zip(values, values.isna(), strict=True)]


def _text_columns(var: pd.DataFrame) -> list[GeneNames]:
    """The text columns of var."""
    return [
        GeneNames(str(column), tuple(_names(var[column])))
        for column in var.columns
        if isinstance(var[column].dtype, pd.CategoricalDtype | pd.StringDtype) or var[column].dtype == object
    ]


def _namings(var: pd.DataFrame, own: GeneNames, given: str | None) -> list[GeneNames]:
    """All names that a file may know its genes by, its own first; none that are numbers, or few names for many."""
    columns = [own] if given is not None else [own, gene_names(var, "index"), *_text_columns(var)]
    columns = list({names.column: names for names in columns}.values())
    columns = list(filter(_may_name_genes, columns))
    return columns + [names.without_versions() for names in columns if names.have_versions]


def _may_name_genes(names: GeneNames) -> bool:
    """Whether a column has different names for more than half of the genes, and they are not numbers."""
    there = set(names.names) - {""}
    return len(there) > len(names.names) / 2 and not GeneNames(names.column, tuple(there)).are_numbers


def _n_common(files: Sequence[GeneNames]) -> int:
    """How many names all files have."""
    return len(set(files[0].names).intersection(*(names.names for names in files[1:])) - {""})


def _too_few(tried: dict[str, list[str]], found: dict[str, int], known: Sequence[str]) -> str:
    """Say how many genes each column has in common with `known`, and what its names look like."""
    lower = {name.lower() for name in known}
    tries = []
    for column, names in tried.items():
        ignoring_case = len({name.lower() for name in names} & lower)
        case = f", {ignoring_case} ignoring case" if ignoring_case > 2 * found[column] else ""
        tries.append(f"{column} {found[column]}{case}{_looks_like(names)}")
    genes = len(next(iter(tried.values())))
    return (
        f"Too few of the file's {genes} genes are known to the encoder; matches by var column: {shown(tries)}. "
        f"It knows {len(known)} names such as {shown(known[:3])}{_looks_like(known)}. Add a var column with such names."
    )


def _looks_like(names: Sequence[str]) -> str:
    sample = [name for name in names[:1000] if name]
    for pattern, words in ((r"ENS[A-Z]*[GTP]\d{6,}(\.\d+)?", "ENSEMBL ids"), (r"\d+", "Entrez numbers")):
        if sum(re.fullmatch(pattern, name) is not None for name in sample) > len(sample) / 2:
            return f" (these look like {words})"
    return ""
