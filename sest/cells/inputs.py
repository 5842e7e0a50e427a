"""What `sest embed` was given: the files, their groups in the cache, and what each file's columns and values mean."""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from sest import progress
from sest.cache.schema import RESERVED
from sest.cells.columns import Columns, detect_columns, labels, perturbations
from sest.cells.genes import INDEX, GeneNames, all_names, gene_names
from sest.cells.labels import AS_IS, refuse_twins_between
from sest.cells.scale import Normalisation, Scan, decide_scale, scan_file
from sest.cells.split_file import SplitFile, read_splits
from sest.cells.splits import GroupCells, group_cells
from sest.config import EmbedConfig
from sest.errors import InputError, shown
from sest.files.cell_file import CellFile
from sest.files.containers import SUFFIXES, files_in, open_container, stem_of
from sest.files.formats import is_zarr
from sest.files.remote import UrlPath, located
from sest.machine.jit import say_slow_loops

logger = logging.getLogger(__name__)

ROWS_PER_READ = 2048


_GROUP = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9_.+@=, -]*")  # names of groups, which are folders


@dataclass(frozen=True)
class Source:
    """One input file and where it goes in the cache."""

    group: str  # "dataset", or "dataset/file stem" where a dataset has several files
    dataset: str
    path: Path


@dataclass(frozen=True)
class Cells:
    """One input file, scanned and understood; nothing has been written yet."""

    source: Source
    file: CellFile
    scan: Scan
    scale: str  # "counts" or "log1p"
    columns: Columns
    obs: pd.DataFrame  # perturbation, cell_type, batch (categorical), as the cache keeps them

    @property
    def group(self) -> str:
        return self.source.group

    @property
    def normalisation(self) -> Normalisation | None:
        """How the values of a log1p file were made; None for counts."""
        return self.scan.normalisation if self.scale == "log1p" else None

    @property
    def is_control(self) -> np.ndarray:
        """(n_cells,) bool; all False where the file has no perturbation column."""
        if "perturbation" not in self.obs:
            return np.zeros(len(self.obs), bool)
        return (self.obs["perturbation"] == self.columns.control).to_numpy()

    @property
    def perturbations(self) -> list[str]:
        """The names of its perturbations, without the control."""
        return perturbations_in(self.obs, self.columns.control)

    def read(self, rows: np.ndarray) -> scipy.sparse.csr_matrix:
        """Read chosen cells (sorted row numbers), never more than ROWS_PER_READ neighbours at once."""
        parts = chosen_rows(self.file.rows, rows)
        return parts[0] if len(parts) == 1 else scipy.sparse.vstack(parts, format="csr")

    def identity(self) -> dict[str, object]:
        """What must be the same for a cache to be continued with this file."""
        labels_hash = hashlib.sha256("\n".join(self.obs.index).encode())
        for name in self.obs:
            column = self.obs[name].cat
            labels_hash.update(
                repr((name, list(column.categories))).encode() + column.codes.to_numpy(np.int32).tobytes()
            )
        return {
            "file": self.source.path.name,
            "sha256": self.scan.sha256,
            "labels_sha256": labels_hash.hexdigest(),
            "scale": self.scale,
            "columns": self.columns.as_kept(),
        }

    def as_group(self) -> GroupCells:
        """The labels as `sest.cells.splits` reads them."""
        return group_cells(self.group, self.source.dataset, self.obs, str(self.columns.control))


def perturbations_in(obs: pd.DataFrame, control: str | None) -> list[str]:
    """The names of the perturbations of a table as the cache keeps it, without the control."""
    names = obs["perturbation"].cat.categories if "perturbation" in obs else ()
    return [name for name in names if name != control]


def chosen_rows(read: Callable[[int, int], Any], rows: np.ndarray) -> list[Any]:
    """Blocks of the chosen rows (sorted numbers) of what `read(start, stop)` reads ROWS_PER_READ neighbours of."""
    parts, i = [], 0
    while i < len(rows):
        j = int(np.searchsorted(rows, rows[i] + ROWS_PER_READ))
        block = read(int(rows[i]), int(rows[j - 1]) + 1)
        parts.append(block if block.shape[0] == j - i else block[rows[i:j] - rows[i]])
        i = j
    return parts


def resolve_inputs(inputs: Sequence[Path], roots: Sequence[Path] = ()) -> tuple[list[Source], SplitFile | None]:
    """Turn the command's arguments into files: files of cells, folders of them, URLs, or one .toml that names datasets.

    Args:
        inputs: what was given on the command line.
        roots: folders, beside the TOML's own and the working folder, that its paths may lead to.

    Raises:
        InputError: nothing there, no file of cells (by its content), two files of one name, or a TOML beside others.
    """
    if not inputs:
        raise InputError(
            "No input. Give files of cells (.h5ad, .h5mu, .zarr), folders of them, or one .toml that lists some."
        )
    tomls = [path for path in inputs if path.suffix == ".toml"]
    if tomls:
        if len(inputs) > 1:
            raise InputError(f"Give one .toml or several files of cells, not both ({shown(map(str, inputs))}).")
        splits = read_splits(tomls[0], roots=tuple(roots))
        sources = [
            Source(name if len(files) == 1 else f"{name}/{group_name(stem_of(file))}", name, file)
            for name, files in splits.datasets.items()
            for file in files
        ]
    else:
        splits = None
        files = [(group_name(stem_of(path)), path) for given in inputs for path in _files_of(given)]
        sources = [Source(name, name, path) for name, path in files]
    for source in sources:
        known = isinstance(source.path, UrlPath) or (source.path.exists() and source.path.name.endswith(SUFFIXES))
        if not known:
            open_container(source.path)[1]()  # says what it is, if it is something else, before its name is judged
        for part in source.group.split("/"):
            if not _GROUP.fullmatch(part) or part in RESERVED:
                raise InputError(
                    f"'{part}' ({source.path}) cannot name a group of the cache: letters, digits and _.+@=,- can. "
                    "Rename the file or the dataset."
                )
    twice = sorted(group for group, n in Counter(source.group for source in sources).items() if n > 1)
    if twice:
        raise InputError(
            f"Several input files are named {shown(twice)}. Rename them, or make each a dataset of a .toml."
        )
    return sources, splits


def group_name(stem: str) -> str:
    """What a file's name is as that of a group: itself, if it may be one.

    Else letters lose their accents and all that is not allowed becomes _; where that lost more than accents, the first
    six digits of the name's sha256 follow, so that two names stay two.
    """
    if _GROUP.fullmatch(stem) or stem in RESERVED:
        return stem
    plain = "".join(c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c))
    if _GROUP.fullmatch(plain):
        return plain
    kept = re.sub(r"[^A-Za-z0-9.+@=, -]+", "_", plain).lstrip("_.+@=, -").rstrip("_. ")
    digits = hashlib.sha256(unicodedata.normalize("NFC", stem).encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{kept}-{digits}" if _GROUP.fullmatch(kept) else f"cells-{digits}"


def _files_of(given: Path) -> list[Path]:
    """A file, or the files of a folder, which are said."""
    path = located(given)
    if not path.is_dir() or is_zarr(path) or not (files := files_in(path)):
        return [path]
    logger.info(f"{path}: {len(files)} files of cells, {shown(file.name for file in files)}.")
    return files


def open_cells(sources: Sequence[Source], config: EmbedConfig, stack: ExitStack) -> list[Cells]:
    """Open and read every file once: fingerprint, scale, columns. Nothing is written.

    Args:
        stack: closes the files.

    Raises:
        InputError: for every kind of unusable file (see `sest.files.cell_file` and `sest.cells.columns`).
    """
    files = [stack.enter_context(CellFile(source.path, config.layer, config.modality)) for source in sources]
    columns = [columns_of(file, config) for file in files]
    tables = [_obs(source, file, found) for source, file, found in zip(sources, files, columns, strict=True)]
    if config.labels != AS_IS:
        there = zip(sources, tables, columns, strict=True)
        refuse_twins_between({str(s.path): perturbations_in(obs, found.control) for s, obs, found in there})
    result = []
    say_slow_loops()
    progress.begin("Reading", sum(file.n_cells for file in files), "cells")
    for source, file, found, obs in zip(sources, files, columns, tables, strict=True):
        scan = scan_file(file, progress.advance)
        scale = decide_scale(scan, config.counts, file.path, file.choices, file.log_base)
        result.append(Cells(source, file, scan, scale, found, obs))
    for cells in result:
        _describe(cells)
    return result


def columns_of(file: CellFile, config: EmbedConfig) -> Columns:
    """The label columns of an input, as the options name them or found by name.

    Raises:
        InputError: see `detect_columns`.
    """
    return detect_columns(
        file.obs,
        pert_col=config.pert_col,
        cell_type_col=config.cell_type_col,
        batch_col=config.batch_col,
        control=config.control,
        rule=config.labels,
        genes=all_names(file.var),
    )


def read_group(source: Source, config: EmbedConfig) -> GroupCells:
    """The labels of a file, of which nothing else is read.

    Raises:
        InputError: no columns that are understood, or no perturbation among them.
    """
    with CellFile(source.path, config.layer, config.modality) as file:
        found = columns_of(file, config)
        if found.perturbation is None:
            raise InputError(
                f"{source.path} has no perturbation column that is known by its name. It has: "
                f"{shown(map(str, file.obs.columns))}. Pass --pert-col."
            )
        return group_cells(source.group, source.dataset, _obs(source, file, found), str(found.control))


def unique_names(cells: Cells, names: Sequence[str]) -> list[str]:
    """Names for all genes; one without a name, or whose name repeats, keeps its name in the var index (which is said).

    Where the index holds numbers, these stand behind the name, so that other files' numbers are no names of it.

    Raises:
        InputError: that names two genes the same.
    """
    often = Counter(names)
    index = gene_names(cells.file.var, "index")
    kept = list(index.names)
    if index.are_numbers and index.names != tuple(names):
        kept = [f"{name or cells.group}-{i}" for name, i in zip(names, kept, strict=True)]
    result = [name if name and often[name] == 1 else i for name, i in zip(names, kept, strict=True)]
    changed = sum(a != b for a, b in zip(result, names, strict=True))
    if changed:
        logger.info(f"{cells.source.path.name}: {changed:,} genes without a name of their own keep their var index.")
    if len(set(result)) < len(result):
        twice = [name for name, n in Counter(result).items() if n > 1]
        raise InputError(f"{cells.source.path.name} names {len(twice)} genes twice: {shown(twice)}. Rename them.")
    return result


def named(cells: Cells, found: GeneNames) -> list[str]:
    """Unique names of a file's genes from the column that was `found`, which is said where it is not the var index."""
    if found.column != INDEX:
        logger.info(f"{cells.source.path.name}: genes are named by {found.column} ({shown(found.names[:3])}).")
    return unique_names(cells, found.names)


def _obs(source: Source, file: CellFile, columns: Columns) -> pd.DataFrame:
    """The obs table of the cache: perturbation, cell_type and batch as categories, the index as in the file."""
    table = {}
    for name, column in (
        ("perturbation", columns.perturbation),
        ("cell_type", columns.cell_type),
        ("batch", columns.batch),
    ):
        if column is not None:
            if name == "perturbation":
                codes, names = perturbations(file.obs, columns)
            else:
                codes, names = labels(file.obs, column, twins=name == "batch")
            table[name] = pd.Categorical.from_codes(codes, categories=list(names))
        elif name != "perturbation":
            table[name] = pd.Categorical.from_codes(np.zeros(file.n_cells, np.int32), categories=["unknown"])
    return pd.DataFrame(table, index=file.obs.index.astype(str).rename(None))


def _describe(cells: Cells) -> None:
    """Say what was found in a file."""
    name, columns = cells.source.path.name, cells.columns
    scale = str(found) if (found := cells.normalisation) else "counts"
    if not found and not cells.scan.all_integer:
        scale += f", of which {cells.scan.n_fractional / int(cells.scan.indptr[-1]):.0%} are not whole"
    logger.info(f"{name}: {cells.file.n_cells:,} cells x {cells.file.n_genes:,} genes, {scale}.")
    for note in columns.notes:
        logger.info(f"{name}: {note}")
    if columns.perturbation is None:
        logger.info(f"{name}: no perturbation column: its embeddings are stored, but nothing can be trained on it.")
    elif columns.cell_type is None:
        logger.info(f"{name}: no cell type column: all cells count as one cell type, 'unknown'.")
    empty = int((np.diff(cells.scan.indptr) == 0).sum())
    if empty:
        logger.info(f"{name}: {empty:,} cells have no counts at all; they are embedded with uniform gene shares.")
    if cells.scan.n_negative:
        logger.info(
            f"{name}: {cells.scan.n_negative:,} negative values are read as 0 by the encoder, and stay targets."
        )
