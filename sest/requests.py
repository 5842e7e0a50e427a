"""What to predict: the run's test split, the cells of a template, a table of counts, or a list of perturbations."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sest.columns import Columns, detect_columns, labels
from sest.config import PredictConfig
from sest.controls import Pool, pool_of, store_pool, store_pools, usual_columns
from sest.dataset import Dataset
from sest.errors import InputError, shown
from sest.h5ad import CellFile
from sest.splits import TEST


@dataclass(frozen=True, eq=False)
class Request:
    """Cells of one perturbation to predict, or real control cells to write, from one pool."""

    pool: Pool
    perturbation: str  # the control's label for real controls
    is_control: bool
    n_cells: int
    obs: pd.DataFrame | None = None  # (n_cells,) rows of the template, where there is one


def read_list(config: PredictConfig) -> dict[str, int] | None:
    """The perturbations of --counts or --only and how many cells of each; None without these options.

    Raises:
        InputError: more than one way to say what to predict, or an unreadable table.
    """
    if sum(x is not None for x in (config.template, config.counts, config.only)) > 1:
        raise InputError("Pass one of --template, --counts and --only.")
    if config.counts is not None:
        return _read_counts(Path(config.counts))
    if config.only is not None:
        names = [name.strip() for name in config.only.split(",") if name.strip()]
        if not names or len(set(names)) < len(names):
            raise InputError("--only takes perturbations separated by commas, each once.")
        return dict.fromkeys(names, config.n_cells)
    return None


def _read_counts(path: Path) -> dict[str, int]:
    """Read target_gene -> n_cells; other columns are ignored."""
    wanted: dict[str, int] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet's export begins with a mark
            reader = csv.DictReader(file)
            there = reader.fieldnames or []
            if not {"target_gene", "n_cells"} <= set(there):
                raise InputError(f"{path} needs the columns target_gene,n_cells; its first line has: {shown(there)}.")
            for row in reader:
                name, count = (row["target_gene"] or "").strip(), (row["n_cells"] or "").strip()
                if not name or name in wanted or not count.isdecimal() or int(count) < 1:
                    raise InputError(
                        f"{path}, line {reader.line_num}: '{name},{count}' is not a new perturbation and a number of "
                        "cells above 0."
                    )
                wanted[name] = int(count)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
    if not wanted:
        raise InputError(f"{path} lists no perturbations.")
    return wanted


def make_requests(
    config: PredictConfig,
    listed: Mapping[str, int] | None,
    columns: Mapping[str, str | None],
    data: Dataset,
    new: Mapping[str, Pool] | None,
) -> tuple[list[Request], Columns]:
    """Everything to write, in order, and the obs columns it is labelled in.

    Args:
        listed: see `read_list`.
        columns: those of the run's cells.
        new: control cells to start from instead of the store's.

    Raises:
        InputError: nothing to predict, the control among the perturbations, or cell types without controls.
    """
    control = str(columns["control"])
    perturbation, cell_type, batch = (columns[key] or key for key in ("perturbation", "cell_type", "batch"))
    usual = Columns(perturbation, cell_type, batch, control, ())
    if config.template is not None:
        return _from_template(config, columns, new or store_pools(data))
    if listed is not None:
        if control in listed:
            raise InputError(f"'{control}' is the control: real control cells are added without being asked for.")
        pool = pool_of(new or store_pools(data), config.cell_type)
        asked = [Request(pool, name, False, n) for name, n in listed.items()]
        return [*asked, Request(pool, control, True, len(pool))], usual
    if new is not None:
        raise InputError("--cells gives new controls; say what to predict with --only, --counts or --template.")
    return _test_split(data, control, config.cell_type), usual


def _test_split(data: Dataset, control: str, only: str | None) -> list[Request]:
    """As many cells of every test (context, perturbation) as there are real ones, and all test controls.

    `only` is the cell type that is wanted, if not all are.
    """
    labels, mask = data.labels, data.in_split(TEST)
    perturbed = mask & ~labels.is_control
    if not perturbed.any():
        raise InputError("The run has no test split. Say what to predict with --only, --counts or --template.")
    contexts = {context: labels.contexts[context][1] for context in np.unique(labels.context[perturbed]).tolist()}
    if only not in (None, *contexts.values()):
        raise InputError(f"No test cells of cell type '{only}'. There are: {shown(sorted(set(contexts.values())))}.")
    requests = []
    for context, cell_type in contexts.items():
        if only not in (None, cell_type):
            continue
        here = labels.context == context
        pool = store_pool(data, np.flatnonzero(mask & here & labels.is_control), cell_type)
        codes, counts = np.unique(labels.perturbation[perturbed & here], return_counts=True)
        requests += [
            Request(pool, labels.perturbations[code], False, int(n)) for code, n in zip(codes, counts, strict=True)
        ]
        requests.append(Request(pool, control, True, len(pool)))
    return requests


def _from_template(
    config: PredictConfig, columns: Mapping[str, str | None], pools: Mapping[str, Pool]
) -> tuple[list[Request], Columns]:
    """One request for every (cell type, perturbation) of the template's obs; its controls become real ones."""
    path = Path(str(config.template))
    with CellFile(path) as file:
        obs = file.obs.copy()
    batch = next(iter(obs.columns), None)  # any: the template's batches are not used, so candidates are not compared
    found = detect_columns(obs, batch_col=batch, **usual_columns(obs, config, columns))
    if found.perturbation is None:
        raise InputError(f"{path} has no perturbation column. Columns: {shown(obs.columns, 30)}. Pass --pert-col.")
    cell_type_col = found.cell_type or columns["cell_type"] or "cell_type"
    if found.cell_type is None:
        obs[cell_type_col] = pool_of(pools, config.cell_type).cell_type
    perturbation, kind = _text(obs, found.perturbation), _text(obs, cell_type_col)
    requests = []
    for (cell_type, name), rows in obs.groupby([kind, perturbation], sort=True):
        pool = pool_of(pools, str(cell_type))
        requests.append(Request(pool, str(name), name == found.control, len(rows), rows))
    if all(request.is_control for request in requests):
        raise InputError(f"{path} has no perturbed cells: all are '{found.control}'.")
    return requests, Columns(found.perturbation, cell_type_col, columns["batch"] or "batch", found.control, ())


def _text(obs: pd.DataFrame, column: str) -> np.ndarray:
    """(n,) str: the labels of a column, as every part of sest reads them."""
    codes, names = labels(obs, column)
    return np.array(names, dtype=object)[codes]


def obs_of(request: Request, chosen: np.ndarray, columns: Columns) -> pd.DataFrame:
    """Labels of written rows: the template's, or perturbation, cell type and batch of the controls `chosen` (n,)."""
    if request.obs is not None:
        return request.obs
    pool = request.pool
    names = pool.names[chosen]
    if not request.is_control:
        names = np.array([f"{pool.cell_type}_{request.perturbation}_{i}" for i in range(request.n_cells)])
    table = {
        str(columns.perturbation): request.perturbation,
        str(columns.cell_type): pool.cell_type,
        str(columns.batch): pool.batches[chosen],
    }
    return pd.DataFrame(table, index=pd.Index(names, dtype=str))


def join_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One obs table: text as categories, used categories only, every name once."""
    from anndata.utils import make_index_unique  # slow to import

    table = pd.concat(tables)
    table.index = make_index_unique(table.index.astype(str))
    for name, column in table.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            table[name] = column.cat.remove_unused_categories()
        elif pd.api.types.is_string_dtype(column.dtype) or column.dtype == object:
            table[name] = pd.Categorical(column.where(column.isna(), column.astype(str)))
    return table
