"""What to predict: the run's test split, the cells of a template, a table of counts, or a list of perturbations."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sest.cells.columns import PERTURBATION_COLUMNS, Columns, detect_columns, labels, perturbations, usual_columns
from sest.cells.genes import all_names
from sest.cells.labels import AS_IS, AUTO, NoControlError, same_targets
from sest.cells.split_file import TEST
from sest.config import VCC2025, VCC2026, PredictConfig
from sest.data.dataset import Dataset
from sest.errors import InputError, nearest, shown
from sest.files.cell_file import CellFile
from sest.prediction.controls import CachedPools, Pool, cached_pool, pool_of
from sest.runs.known import Known

logger = logging.getLogger(__name__)

_NUMBERS = re.compile(r"cells|^\s*(n|num|number|counts?|n[\s_.-]?cell)\s*$", re.I)  # columns that may be n_cells

Wanted = Sequence[str] | Mapping[str, int]
"""Perturbations to predict: names, or name -> cells."""
Names = str | tuple[str, ...] | None  # as an option gives them that may be given several times


@dataclass(frozen=True, eq=False)
class Request:
    """Cells of one perturbation to predict, or real control cells to write, from one pool."""

    pool: Pool
    perturbation: str  # the control's label for real controls
    is_control: bool
    n_cells: int
    obs: pd.DataFrame | None = None  # (n_cells,) rows of the template, where there is one


TARGET_GENE, CONTEXT, CONTROL = "target_gene", "context", "non-targeting"  # as the challenge calls them


def n_cells_of(config: PredictConfig) -> int:
    """How many cells of a perturbation, where nothing else says it."""
    return config.n_cells or (400 if config.format == VCC2026 else 128)


def asked_of(requests: Sequence[Request]) -> list[Request]:
    """Those of perturbed cells."""
    return [request for request in requests if not request.is_control]


def read_wanted(wanted: Wanted | None, config: PredictConfig) -> dict[str, int] | None:
    """The perturbations to predict and how many cells of each; None where a template or the test split says it.

    Args:
        wanted: names, or name -> cells; beside it none of config.template, list and only is given, else one at most.
        config: see there; n_cells of every name, where no number stands beside it.

    Raises:
        InputError: more than one way to say what to predict, an unreadable table, or a name or number that is none.
    """
    template, table, only = config.template, config.list, config.only
    n_cells = n_cells_of(config)
    ways = [template, table, only, config.all_perturbations or None]
    if wanted is not None and any(x is not None for x in ways):
        raise InputError(
            "Name the perturbations, or pass one of --template, --list, --only and --all-perturbations, not both."
        )
    if sum(x is not None for x in ways) > 1:
        raise InputError("Pass one of --template, --list, --only and --all-perturbations.")
    if wanted is not None:
        return _checked(wanted, n_cells)
    if table is not None:
        return _read_table(Path(table), n_cells)
    if only is not None:
        return dict.fromkeys([only] if isinstance(only, str) else only, n_cells)
    if config.n_cells is not None and not config.all_perturbations:
        as_many = "real cells of the test split" if template is None else "rows of the template"
        raise InputError(f"As many cells are predicted as there are {as_many}. Leave --n-cells out.")
    return None


def named(wanted: Mapping[str, int], known: Sequence[str], *, split: bool, as_is: bool) -> dict[str, int]:
    """The perturbations asked for, as they are spelled among the `known` ones.

    Args:
        wanted: see `read_wanted`.
        known: names of the run's perturbations and of those that have features.
        split: whether text with commas is several names, unless one is called so.
        as_is: whether B+A is another than A+B.

    Raises:
        InputError: no name, or one twice.
    """
    names = [
        (name, n)
        for text, n in wanted.items()
        for name in (
            [part.strip() for part in text.split(",") if part.strip()] if split and text not in known else [text]
        )
    ]
    spelled = {} if as_is else same_targets([name for name, _ in names], known)
    result = {spelled.get(name, name): n for name, n in names}
    if not names or len(result) < len(names):
        raise InputError(
            "Name at least one perturbation, and each once (B+A is A+B); --only takes several with commas."
        )
    return result


def _checked(wanted: Wanted, n_cells: int) -> dict[str, int]:
    """Names and numbers of cells that a caller gave; one name may stand for a list of one."""
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    given: Mapping[str, Any] = wanted if isinstance(wanted, Mapping) else dict.fromkeys(names, n_cells)
    if not names or len(given) < len(names):
        raise InputError(f"Name at least one perturbation, and each once; given: {shown(names)}.")
    for name, number in given.items():
        if not isinstance(number, Integral) or number < 1:
            raise InputError(f"'{name}: {number}' is not a perturbation and a number of cells above 0.")
    return {str(name): int(number) for name, number in given.items()}


def _read_table(path: Path, n_cells: int) -> dict[str, int]:
    """Read target_gene -> n_cells, whatever the case of these names and spaces around them; other columns are ignored.

    Without the second, `n_cells` of each.
    """
    wanted: dict[str, int] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet's export begins with a mark
            reader = csv.DictReader(file)
            there = reader.fieldnames or []
            names = _column(path, there, "target_gene")
            if names is None:
                raise InputError(f"{path} needs the column target_gene; its first line has: {shown(there)}.")
            counts = _column(path, there, "n_cells")
            if counts is None:
                logger.info(f"{path} has no column n_cells: {n_cells} cells of each perturbation.")
            for row in reader:
                name = (row[names] or "").strip()
                count = str(n_cells) if counts is None else (row[counts] or "").strip()
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


def _column(path: Path, there: Sequence[str], name: str) -> str | None:
    """How a table writes the name of a column; None where it has none.

    Raises:
        InputError: several, or none, but one that may be meant.
    """
    found = [column for column in there if column.strip().casefold() == name]
    if len(found) > 1:
        raise InputError(f"{path} has the column {name} {len(found)} times: {shown(map(repr, found))}. Keep one.")
    near = [column for column in there if name == "n_cells" and _NUMBERS.search(column)]
    if not found and near:
        raise InputError(
            f"{path} has no column n_cells, but {shown(map(repr, near))}: rename it to n_cells if it is the number of "
            "cells to predict, or remove it."
        )
    return found[0] if found else None


def make_requests(
    config: PredictConfig, wanted: Mapping[str, int] | None, run: Known, new: Mapping[str, Pool] | None
) -> tuple[list[Request], Columns]:
    """Everything to write, in order, and the obs columns it is labelled in.

    Args:
        config: the template and its columns, and the cell type.
        wanted: see `read_wanted`.
        run: with its cells, unless there are new controls.
        new: control cells to start from instead of the cache's.

    Raises:
        InputError: nothing to predict, the control among the perturbations, or cell types without controls.
    """
    made = run.columns
    control, rule = str(made["control"]), made.get("labels", AUTO)
    known = [*run.perturbations[1:], *run.features.vectors.names]
    if config.template is not None:
        obs, columns = _template(Path(config.template), made, config.pert_col, config.cell_type_col, config.control)
        requests = _of_template(obs, columns, new or CachedPools(_cells_of(run)), config.cell_type, known)
        return [*requests, *_controls_of(requests, columns)], columns
    perturbation, cell_type, batch = (made[key] or key for key in ("perturbation", "cell_type", "batch"))
    columns = Columns(perturbation, cell_type, batch, control, (), rule=rule)
    if config.format == VCC2025:
        columns = replace(columns, perturbation=TARGET_GENE, control=CONTROL)
    if config.all_perturbations:
        wanted = dict.fromkeys(run.perturbations[1:], n_cells_of(config))
    elif wanted is not None:
        wanted = named(wanted, known, split=config.only is not None, as_is=rule == AS_IS)
    if wanted is not None:
        if control in wanted:
            raise InputError(f"'{control}' is the control: real control cells are added without being asked for.")
        requests = []
        for pool in _wanted_pools(new, run, config.cell_type):
            requests += [Request(pool, name, False, n) for name, n in wanted.items()]
            requests.append(Request(pool, str(columns.control), True, len(pool)))
        return requests, columns
    if new is not None:
        raise InputError("--controls gives new controls; say what to predict with --only, --list or --template.")
    return _test_split(_cells_of(run), str(columns.control), config.cell_type), columns


def _cells_of(run: Known) -> Dataset:
    assert run.data is not None, "without new controls the cache is read"
    return run.data


def _wanted_pools(new: Mapping[str, Pool] | None, run: Known, cell_types: Names) -> list[Pool]:
    """The controls of the cell types that are asked for; without one, of every cell type of `new` controls."""
    if new is None or cell_types is not None:
        pools = new or CachedPools(_cells_of(run))
        return [pool_of(pools, name) for name in _each(cell_types)] or [pool_of(pools, None)]
    if len(new) > 1:
        logger.info(f"Predicting in each cell type of --controls: {shown(new)}. Choose one with --cell-type.")
    return list(new.values())


def _each(given: Names) -> list[str]:
    """Names that were given once or several times, each once."""
    return list(dict.fromkeys([given] if isinstance(given, str) else given or ()))


def _test_split(data: Dataset, control: str, only: Names) -> list[Request]:
    """As many cells of every test (context, perturbation) as there are real ones, and all test controls.

    `only` are the cell types that are wanted, if not all are.
    """
    labels, mask = data.labels, data.in_split(TEST)
    perturbed = mask & ~labels.is_control
    if not perturbed.any():
        raise InputError("The run has no test split. Say what to predict with --only, --list or --template.")
    contexts = {context: labels.contexts[context][1] for context in np.unique(labels.context[perturbed]).tolist()}
    for name in _each(only):
        if name not in contexts.values():
            there = shown(sorted(set(contexts.values())))
            raise InputError(f"No test cells of cell type '{name}'. There are: {there}.")
    requests = []
    for context, cell_type in contexts.items():
        if only is not None and cell_type not in _each(only):
            continue
        here = labels.context == context
        pool = cached_pool(data, np.flatnonzero(mask & here & labels.is_control), cell_type)
        codes, counts = np.unique(labels.perturbation[perturbed & here], return_counts=True)
        requests += [
            Request(pool, labels.perturbations[code], False, int(n)) for code, n in zip(codes, counts, strict=True)
        ]
        requests.append(Request(pool, control, True, len(pool)))
    return requests


def _template(
    path: Path,
    made: Mapping[str, str | None],
    pert_col: str | None,
    cell_type_col: str | None,
    control: str | tuple[str, ...] | None,
) -> tuple[pd.DataFrame, Columns]:
    """The obs of a template, and what its columns are called; that of the cell types may yet have to be made.

    Args:
        made: the columns of the run's cells.
        pert_col, cell_type_col, control: as given; None where they are to be detected.
    """
    with CellFile(path) as file:
        obs, genes = file.obs.frame(), all_names(file.var)
    batch = next(iter(obs.columns), None)  # any: the template's batches are not used, so candidates are not compared
    usual = usual_columns(obs, made, pert_col=pert_col, cell_type_col=cell_type_col, control=control)
    try:
        found = detect_columns(obs, batch_col=batch, **usual, genes=genes)
    except NoControlError as error:
        column = usual["pert_col"] or next((name for name in PERTURBATION_COLUMNS if name in obs), None)
        if not isinstance(control, str) or column is None:
            raise InputError(
                f"{path}: {str(error).removesuffix('Pass --control.')}If one of these is the control, pass --control. "
                f"If none is, pass --control {made['control']} all the same: real control cells of every cell type are "
                "written under that label. --list and --only add them too."
            ) from error
        logger.info(f"{path} has no control cells: those of every cell type are written too, as {control!r}.")
        with_one = pd.concat([obs, obs.iloc[:1].assign(**{column: control})])
        found = detect_columns(with_one, batch_col=batch, **usual | {"pert_col": column}, genes=genes)
    if found.perturbation is None:
        raise InputError(f"{path} has no perturbation column. Columns: {shown(obs.columns, 30)}. Pass --pert-col.")
    if found.decided is not None and (n := found.decided.n_unassigned):
        raise InputError(
            f"{path} has {n} of {len(obs)} cells of no known perturbation: {found.decided.unassigned()}. "
            "Take them out of the template."
        )
    if perturbations(obs, found)[1] == (found.control,):
        raise InputError(f"{path} has no perturbed cells: all are '{found.control}'.")
    cell_type = found.cell_type or made["cell_type"] or "cell_type"
    return obs, replace(found, cell_type=cell_type, batch=made["batch"] or "batch", notes=())


def _of_template(
    obs: pd.DataFrame,
    columns: Columns,
    pools: Mapping[str, Pool],
    cell_type: Names,
    known: Sequence[str],
) -> list[Request]:
    """One request for every (cell type, perturbation) of the template's obs; its controls become real ones.

    `cell_type` is that of all cells where the template has no such column; `known` are names as they are to be spelled.
    """
    if columns.cell_type not in obs:
        if len(names := _each(cell_type)) > 1:
            raise InputError("The template names no cell types, so --cell-type says one for all of its cells.")
        obs[columns.cell_type] = pool_of(pools, names[0] if names else None).cell_type
    codes, there = perturbations(obs, columns)
    spelled = {} if columns.rule == AS_IS else same_targets(there, (str(columns.control), *known))
    names = np.array([spelled.get(name, name) for name in there], dtype=object)[codes]
    codes, there = labels(obs, str(columns.cell_type))
    kinds = np.array(there, dtype=object)[codes]
    return [
        Request(pool_of(pools, str(kind)), str(name), name == columns.control, len(rows), rows)
        for (kind, name), rows in obs.groupby([kinds, names], sort=True)
    ]


def _controls_of(requests: Sequence[Request], columns: Columns) -> list[Request]:
    """All control cells of the requests' pools, where none are asked for."""
    if any(request.is_control for request in requests):
        return []
    pools = {id(request.pool): request.pool for request in requests}
    return [Request(pool, str(columns.control), True, len(pool)) for pool in pools.values()]


def read_genes(config: PredictConfig, genes: Sequence[str]) -> tuple[list[str], np.ndarray | None, list[str]]:
    """The output's genes, where they stand among the run's and the extra ones (None: all, in order), and these.

    Extra are those that the run does not have; new controls may.
    """
    path = config.genes
    if path is None:
        return list(genes), None, []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
    names = [name for line in lines if (name := line.split(",")[0].strip().strip('"'))]
    place = {name: i for i, name in enumerate(genes)}
    if names and names[0] not in place and names[0].lower() in ("gene", "genes", "gene_name", "gene_names"):
        names = names[1:]  # a header
    extra = [name for name in names if name not in place]
    if extra and (config.controls is None or len(extra) == len(names)):
        raise InputError(f"{path}: {len(extra)} genes are not the run's: {shown(extra)}.{nearest(extra[0], place)}")
    if not names or len(set(names)) < len(names):
        raise InputError(f"{path} must list genes, one a line, each once.")
    if extra:
        logger.warning(
            f"{len(extra):,} of {len(names):,} genes are not the run's: {shown(extra)}. They keep the values of the "
            "control cells, in which no perturbation has an effect on them."
        )
    place |= {name: len(genes) + i for i, name in enumerate(extra)}
    return names, np.array([place[name] for name in names]), extra


def measured_genes(
    requests: Sequence[Request], genes: list[str], places: np.ndarray | None, *, asked: bool
) -> tuple[list[str], np.ndarray | None]:
    """The output's genes, and where they stand, without those that files of the control cells lack.

    Raises:
        InputError: one that the user `asked` for was not measured in cells to predict from.
    """
    masks = [pool.measured for pool in {id(r.pool): r.pool for r in requests}.values() if pool.measured is not None]
    if not masks:
        return genes, places
    at = np.arange(len(genes)) if places is None else places
    there = np.all(masks, axis=0)[at]
    lost = np.array(genes)[~there].tolist()
    if asked and lost:
        raise InputError(
            f"{len(lost):,} genes were not measured in the control cells of the run: {shown(lost)}. Leave them out of "
            "--genes, name other cell types, or pass --controls that have them."
        )
    if lost:
        logger.warning(f"{len(lost):,} genes were not measured in all cells to predict from; they are left out.")
    return np.array(genes)[there].tolist(), at[there]
