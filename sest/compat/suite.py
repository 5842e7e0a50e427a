"""Scores as the Virtual Cell Challenge takes them, by its own packages: `cell-eval` (2025) and `cell-eval2` (2026).

Both score one context, read whole files and are run as the commands that they are: with their versions, their
non-commercial licences, and in an environment of their own where that is how they are installed. Beside the prediction
stand the two ends of the challenge's scale (the mean response of all perturbations, and of 2026 a replicate of the real
cells) and cells of no effect: drawn from the real controls.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sest import progress
from sest.config import VCC2025, VCC2026, EvaluateConfig
from sest.errors import InputError, shown
from sest.evaluation.evaluate import evaluate
from sest.evaluation.results import Evaluation
from sest.outputs import to_csv

logger = logging.getLogger(__name__)

SUITES = (VCC2025, VCC2026)
MADE = SCORES, FOLDERS = "suite.csv", "contexts"
PROGRAMS = {VCC2025: ("cell-eval", "eval"), VCC2026: ("cell-eval2", "challenge")}  # program, extra
MEMBERS = {  # of the score, in the challenge's order, and what its page calls them
    VCC2025: {"overlap_at_N": "DES", "discrimination_score_l1": "PDS", "mae": "MAE"},
    VCC2026: {
        "pds_cosine": "pds",
        "expr_mse_unbiased_capped_norm": "mse",
        "de_wilcoxon_lfc_nmae": "nmae",
        "de_wilcoxon_direction_fidelity_yield_raw": "fid",
        "de_wilcoxon_direction_reach_raw": "reach",
        "de_wilcoxon_sig_jaccard": "jac",
    },
}
OVERALL = "avg_score"
COLUMNS = "metric prediction controls baseline replicate score score_of_controls".split()
PERTURBATION, CONTROL, CONTEXTS = "target_gene", "non-targeting", ("context", "cell_type")
OWN, CONTROLS = "prediction", "controls"  # whose scores
N_COMMANDS = 6  # of a package, for one context; of both suites


class SuiteFailed(Exception):
    """A package cannot score these cells; one line with its reason."""


@dataclass(frozen=True)
class ContextScores:
    """What a package says of one context, and what sest does."""

    context: str
    table: pd.DataFrame
    """`COLUMNS`, one row a member and `OVERALL`: as measured of prediction, controls, baseline and replicate (NaN where
    there is none), and scores between the baseline (0) and what is perfect, or of 2026 the replicate (1)."""
    failed: str  # why there is no table; ""
    own: Evaluation


@dataclass
class _Package:
    """One of the programs, and where it works."""

    program: str
    folder: Path
    options: list[str]

    def __call__(self, *words: object) -> None:
        """Run a command of it.

        Raises:
            SuiteFailed: with the last line of what it says.
        """
        command = [self.program, *map(str, words), *(self.options if words[0] != "score" else ())]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason is given"]
            raise SuiteFailed(" ".join(lines[-1].split()))
        progress.advance()


def score_suite(predicted: Path, real: Path, suite: str, out: Path, config: EvaluateConfig) -> list[ContextScores]:
    """Score a prediction context by context, and write all that the packages write below `out`.

    Args:
        predicted: counts of 2026 with or without controls, or log1p values of 2025 with controls; obs `target_gene`,
            and of several contexts `context` or `cell_type`.
        real: counts, with controls, of the same contexts and genes.
        suite: one of `SUITES`.
        out: a folder, which gets suite.csv and a folder a context.
        config: how REAL's columns and its control are called, seed and threads.

    Raises:
        InputError: the package is not installed, or the two files do not fit each other.
    """
    from anndata import read_h5ad  # slow to import

    program, extra = PROGRAMS[suite]
    found = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if found is None:
        raise InputError(f"--suite {suite} runs {program}, which is not installed: pip install 'sest[{extra}]'.")
    pert, control = config.pert_col or PERTURBATION, _one_label(config.control)
    with ExitStack() as stack:
        ours, theirs = read_h5ad(predicted, backed="r"), read_h5ad(real, backed="r")
        for opened in (ours, theirs):
            stack.callback(opened.file.close)
        parts = _parts(predicted, ours, real, theirs, pert, control, config.cell_type_col)
        genes = _genes(predicted, ours.var_names, real, theirs.var_names)
        options = ["--pert-col", pert, "--control" if suite == VCC2026 else "--control-pert", control]
        results = []
        for name, (mine, rows) in parts.items():
            folder = out / FOLDERS / name
            folder.mkdir(parents=True)
            with tempfile.TemporaryDirectory(prefix=".pair-", dir=out) as scratch:
                cells = ours[mine].to_memory(), theirs[rows].to_memory()[:, genes].copy()
                if suite == VCC2026:
                    for side in cells:
                        side.obs[CONTEXTS[0]] = name
                pair = _write_pair(Path(scratch), *cells, pert, control, suite, config.seed)
                own = evaluate(pair[OWN], pair["real"], _own_config(config, pert, control, suite))
                own.write(folder / "sest")
                results.append(_scored(name, _Package(found, folder, options), pair, suite, config.threads, own))
    order = ["context", *COLUMNS]
    tables = [result.table.assign(context=result.context)[order] for result in results if not result.failed]
    whole = pd.concat(tables) if tables else pd.DataFrame(columns=order)
    to_csv(whole, out / SCORES)
    return results


def _scored(
    name: str, package: _Package, pair: Mapping[str, Path], suite: str, threads: int, own: Evaluation
) -> ContextScores:
    """One context by the package, or why it has no scores."""
    progress.begin(f"Running {Path(package.program).name}, context {name}", N_COMMANDS, "steps")
    try:
        table = {VCC2025: _vcc2025, VCC2026: _vcc2026}[suite](package, pair, threads)
    except SuiteFailed as error:
        return ContextScores(name, pd.DataFrame(), str(error), own)
    return ContextScores(name, table, "", own)


def _parts(
    predicted: Path, ours: Any, real: Path, theirs: Any, pert: str, control: str, context: str | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The rows of both files by context (see `_contexts`); what is missing is refused."""
    for path, cells in ((predicted, ours), (real, theirs)):
        if pert not in cells.obs:
            raise InputError(f"{path} has no column {pert!r} of obs. It has: {shown(cells.obs.columns)}. --pert-col.")
    if control not in set(theirs.obs[pert].astype(str)):
        raise InputError(f"{real} has no control cells: none is {control!r} in {pert!r}. Pass --control.")
    parts = _contexts(ours.obs, theirs.obs, context)
    if bad := [name for name in parts if Path(name).name != name or name.startswith(".")]:
        raise InputError(f"Every context gets a folder of its name, which these cannot be: {shown(bad)}.")
    return parts


def _own_config(config: EvaluateConfig, pert: str, control: str, suite: str) -> EvaluateConfig:
    """How sest scores the pairs: a submission of 2026 has no record of its columns."""
    column = CONTEXTS[0] if suite == VCC2026 else None
    return EvaluateConfig(
        pert_col=pert,
        control=control,
        cell_type_col=column,
        target_sum=config.target_sum,
        cell_eval=False,
        seed=config.seed,
    )


def _one_label(given: str | tuple[str, ...] | None) -> str:
    if isinstance(given, tuple):
        raise InputError("--suite takes one --control: the packages know one.")
    return given or CONTROL


def _genes(predicted: Path, ours: Sequence[str], real: Path, theirs: Sequence[str]) -> np.ndarray:
    """Where the prediction's genes stand among REAL's; REAL may have more."""
    place = {name: i for i, name in enumerate(theirs)}
    if missing := [name for name in ours if name not in place]:
        raise InputError(f"{real} lacks {len(missing):,} of the {len(ours):,} genes of {predicted}: {shown(missing)}.")
    if len(place) > len(ours):
        logger.info(f"{len(place) - len(ours):,} genes of {real.name} are not predicted; they are left out.")
    return np.array([place[name] for name in ours])


def _contexts(ours: pd.DataFrame, theirs: pd.DataFrame, column: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The rows of both files by context; of files without such a column all rows are one."""
    named = [column] if column is not None else list(CONTEXTS)
    mine, real = (next((name for name in named if name in obs), None) for obs in (ours, theirs))
    if column is not None and real is None:
        raise InputError(f"REAL has no column {column!r} of obs. It has: {shown(theirs.columns)}.")
    kinds = np.full(len(ours), "all") if mine is None else ours[mine].astype(str).to_numpy()
    of_real = np.full(len(theirs), "") if real is None else theirs[real].astype(str).to_numpy()
    names = np.unique(kinds).tolist()
    if real is None and len(names) > 1:
        raise InputError(f"The prediction has the contexts {shown(names)}; REAL names none. Pass --cell-type-col.")
    parts = {}
    for name in names:
        rows = np.flatnonzero(of_real == name) if real is not None and mine is not None else np.arange(len(theirs))
        if len(rows):
            parts[name] = (np.flatnonzero(kinds == name), rows)
    if left := [name for name in names if name not in parts]:
        there = f"REAL has no cells of the contexts {shown(left)}"
        if not parts:
            raise InputError(f"{there}. It has: {shown(sorted(set(of_real)))}.")
        logger.info(f"{there}: they are not scored.")
    return parts


def _write_pair(
    folder: Path, predicted: Any, real: Any, pert: str, control: str, suite: str, seed: int
) -> dict[str, Path]:
    """Write what the packages take of one context: the prediction, the real cells, and cells of no effect (AnnData).

    All have the same perturbations, those that both files have, and genes in the same order.
    """
    from anndata import AnnData, concat

    for cells in (predicted, real):
        cells.obs[pert] = cells.obs[pert].astype(str)
    known = set(predicted.obs[pert]) & set(real.obs[pert]) - {control}
    for cells, whose in ((predicted, "predicted, and REAL has none"), (real, "real, and none is predicted")):
        if left := sorted(set(cells.obs[pert]) - known - {control}):
            logger.info(f"Cells of {len(left)} perturbations are {whose}; they are left out: {shown(left)}.")
    if not known:
        raise InputError("No perturbation is both predicted and real in a context that both files have.")
    real = real[real.obs[pert].isin([*known, control])].copy()
    controls = real[real.obs[pert] == control].copy()
    if not len(controls):
        raise InputError("REAL has no control cells in a context that is predicted.")
    kept = [*known, control] if suite == VCC2025 else list(known)
    predicted = predicted[predicted.obs[pert].isin(kept)].copy()
    rng, sizes = np.random.default_rng(seed), predicted.obs[pert].value_counts()
    names = [name for name in sorted(known) for _ in range(int(sizes[name]))]
    drawn = rng.integers(len(controls), size=len(names))
    obs = controls.obs.iloc[drawn].set_axis([f"{name}_{i}" for i, name in enumerate(names)]).assign(**{pert: names})
    unmoved = AnnData(controls.X[drawn], obs=obs, var=controls.var[[]])
    uns = predicted.uns
    if suite == VCC2026:  # the scorer takes the real controls
        predicted = concat([predicted, controls], join="inner", index_unique="-")
    elif control not in set(predicted.obs[pert]):
        raise InputError(f"The prediction has no control cells ({control!r} in {pert!r}), which {VCC2025} needs.")
    predicted.uns.update({key: value for key, value in uns.items() if key == "sest"})
    written = {OWN: predicted, "real": real, CONTROLS: concat([unmoved, controls], join="inner", index_unique="-")}
    paths = {}
    for name, cells in written.items():
        cells.obs_names_make_unique()
        paths[name] = folder / f"{name}.h5ad"
        cells.write_h5ad(paths[name])
    return paths


def _vcc2026(package: _Package, pair: Mapping[str, Path], threads: int) -> pd.DataFrame:
    preset = ["--preset", VCC2026]
    scratch = pair["real"].parent / "baseline.h5ad"
    package("run", "-ap", pair[OWN], "-ar", pair["real"], "-o", OWN, *preset)
    package("run", "-ap", pair[CONTROLS], "-ar", pair["real"], "-o", CONTROLS, *preset)
    package("baseline", "-ar", pair["real"], "-o", "baseline", "--save-pred", scratch, *preset)
    package("prep-real-bundle", "--real", pair["real"], "--baseline", scratch, "-o", "bundle", *preset)
    for name in (OWN, CONTROLS):
        package("score", "--user-agg", f"{name}/agg_results.csv", "--real-bundle", "bundle", "-o", f"{name}/score.csv")
    replicate = _replicate(package.folder / "bundle" / "anchor_agg.parquet")
    return _table(package.folder, VCC2026, "baseline/baseline_agg.csv", "from_replicate", replicate)


def _replicate(path: Path) -> Mapping[str, float]:
    """What half of the real cells scores against the other half, by member; nothing where no package reads the file."""
    try:
        table = pd.read_parquet(path)
    except ImportError:
        logger.info("The replicate's own values are not shown: reading them needs pyarrow.")
        return {}
    return dict(zip(table["metric"], table["replicate"], strict=True))


def _vcc2025(package: _Package, pair: Mapping[str, Path], threads: int) -> pd.DataFrame:
    scratch = pair["real"].parent / "baseline.h5ad"
    run = ["--profile", "vcc", "--num-threads", threads]
    package("baseline", "-a", pair["real"], "-o", scratch, "-O", scratch.with_suffix(".csv"), "--skip-de")
    package("run", "-ap", scratch, "-ar", pair["real"], "-o", "baseline", *run)
    for name in (OWN, CONTROLS):
        package("run", "-ap", pair[name], "-ar", pair["real"], "-o", name, *run)
        score = ("-i", f"{name}/agg_results.csv", "-I", "baseline/agg_results.csv", "-o", f"{name}/score.csv")
        package("score", *score)
    return _table(package.folder, VCC2025, "baseline/agg_results.csv", "from_baseline", {})


def _table(folder: Path, suite: str, baseline: str, scored: str, replicate: Mapping[str, float]) -> pd.DataFrame:
    """The members of the score and their mean, as `ContextScores.table`."""

    def measured(file: str) -> pd.Series:
        return pd.read_csv(folder / file).set_index("statistic").loc["mean"]

    scores = {n: pd.read_csv(folder / n / "score.csv").set_index("metric")[scored] for n in (OWN, CONTROLS)}
    metrics = [*MEMBERS[suite], OVERALL]
    columns = {OWN: f"{OWN}/agg_results.csv", CONTROLS: f"{CONTROLS}/agg_results.csv", "baseline": baseline}
    values = {name: measured(file).reindex(metrics).to_numpy(float) for name, file in columns.items()}
    ends = [replicate.get(name, np.nan) for name in metrics]
    of = [scores[name].reindex(metrics).to_numpy(float) for name in (OWN, CONTROLS)]
    return pd.DataFrame(dict(zip(COLUMNS, (metrics, *values.values(), ends, *of), strict=True)))
