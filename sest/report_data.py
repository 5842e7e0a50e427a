"""The numbers behind `sest report`: what a run folder says, and what its store and its best checkpoint add.

Shapes: K (context, perturbation) pairs, G genes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sest.cache import Cache, open_cache
from sest.cache.schema import StoreError
from sest.cell_store import store_cells
from sest.checkpoint import Checkpoint, checkpoints, find_checkpoint, sound_checkpoint
from sest.config import TrainConfig
from sest.curves import BASELINES, HIGHER_IS_BETTER, METRICS, Curves, curves_of, read_lines
from sest.dataset import Dataset, read_dataset
from sest.devices import DTYPES, choose_precision
from sest.diagnose import Finding, diagnose
from sest.embedding_map import EmbeddingMap, map_cells
from sest.errors import InputError
from sest.features import ONE_HOT
from sest.metrics import pearson_delta
from sest.pair_scores import held_out, pair_metrics, predicted_means
from sest.predict import check_data
from sest.progress import Progress
from sest.run_folder import METRICS as METRICS_FILE
from sest.run_folder import PATHS, one_hot_names, read_run_config
from sest.splits import SPLIT_NAMES, TEST, VAL, SplitRow
from sest.targets import remove_scratch

SAME_BASELINE = 1e-4  # relative: validation baselines of the same cells agree better than this on any device


@dataclass(frozen=True, eq=False)
class Score:
    """A metric at the best validation, beside what needs no network."""

    metric: str
    head: float
    baselines: dict[str, float]  # by name

    def beats(self, baseline: str) -> bool:
        """Whether the head is better than a baseline; not where one of them is no number."""
        other = self.baselines[baseline]
        return self.head > other if self.metric in HIGHER_IS_BETTER else self.head < other


@dataclass(frozen=True, eq=False)
class RunFacts:
    """What a run folder says of itself, without its store."""

    folder: Path
    name: str
    written: datetime  # when its last line was
    config: TrainConfig
    provenance: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    curves: Curves
    findings: list[Finding]
    checkpoint: Checkpoint | None  # best/, or else the furthest one
    problem: str  # why there is no checkpoint

    @property
    def step(self) -> int:
        """The last step that a line tells of."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def cache(self) -> str:
        """Path or URL of its store, "" where that is not known."""
        return str(self.provenance.get("cache", ""))

    @property
    def state(self) -> dict[str, Any]:
        """The checkpoint's state.json, empty without one."""
        return self.checkpoint.state if self.checkpoint else {}

    def best(self) -> int | None:
        """Which validation has the lowest val_loss; None before there is one."""
        losses = self.curves.validation.get("val_loss", np.zeros(0))
        return int(np.nanargmin(losses)) if np.isfinite(losses).any() else None

    def scores(self) -> list[Score]:
        """Every metric at the best validation; empty before there is one."""
        best = self.best()
        if best is None:
            return []

        def at(name: str) -> float:
            values = self.curves.validation.get(name)
            return math.nan if values is None else float(values[best])

        return [Score(m, at(m), {b: at(f"{m}_{b}") for b in BASELINES}) for m in METRICS]

    @property
    def best_step(self) -> int | None:
        best = self.best()
        return None if best is None else int(self.curves.validation["step"][best])

    def last(self, name: str) -> Any:
        """The last value of a key over all lines, None where no line has it."""
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), None)


@dataclass(frozen=True, eq=False)
class PairResults:
    """The pairs of one split, predicted by the checkpoint."""

    split: str  # "val" or "test"
    cell_types: list[str]  # (K,)
    perturbations: list[str]  # (K,)
    n_cells: np.ndarray  # (K,)
    effect: np.ndarray  # (K,) L2 norm over genes of the observed change
    scores: dict[str, np.ndarray]  # pearson_delta, mae, pds, perturbation_mean (its pearson_delta): each (K,)
    observed: np.ndarray  # (K, G) change of the mean log1p expression against the controls
    predicted: np.ndarray  # (K, G)
    n_sets: int  # predicted
    of_sets: int  # there are


@dataclass(frozen=True, eq=False)
class StoreFacts:
    """What a run's store adds; each part is None where it could not be made, and `notes` say why."""

    attributes: dict[str, Any]  # of the store; empty where it cannot be opened
    table: list[SplitRow] | None
    genes: tuple[str, ...]
    pairs: list[PairResults] | None
    map: EmbeddingMap | None
    notes: dict[str, str]  # "store", "pairs", "map" -> one sentence


def read_runs(folders: Iterable[Path], *, cache: str | None = None, perturbations: str | None = None) -> list[RunFacts]:
    """Read run folders, each once, and name them so that no two have the same name.

    Args:
        cache, perturbations: where the store and the features file are now, if not where the runs say.

    Raises:
        InputError: a folder is no run, its metrics.jsonl cannot be read, or it is given twice.
    """
    given = [folder.resolve() for folder in folders]
    if twice := [folder for folder in given if given.count(folder) > 1]:
        raise InputError(f"{twice[0]} is given twice. Name every run once.")
    names = [folder.name for folder in given]
    names = [f.name if names.count(f.name) == 1 else f"{f.parent.name}/{f.name}" for f in given]
    return [_read_run(f, name, cache, perturbations) for f, name in zip(given, names, strict=True)]


def _read_run(folder: Path, name: str, cache: str | None, perturbations: str | None) -> RunFacts:
    values, provenance = read_run_config(folder)
    if cache is not None:
        provenance["cache"] = cache
    if perturbations is not None:
        values["perturbations"] = perturbations
    config = TrainConfig.from_values(values, str(folder / "config.toml"))
    lines = read_lines(folder / METRICS_FILE)
    curves = curves_of(lines)
    findings = diagnose(
        curves,
        run=str(folder),
        cache=str(provenance.get("cache", "CACHE")),
        max_steps=config.max_steps,
        patience=config.patience if config.early_stopping else None,
    )
    checkpoint, problem = None, f"{folder} has no checkpoint yet."
    if checkpoints(folder):
        try:
            checkpoint = sound_checkpoint(find_checkpoint(folder))
        except InputError as error:
            problem = str(error)
    written = datetime.fromtimestamp((folder / METRICS_FILE).stat().st_mtime, UTC)
    return RunFacts(folder, name, written, config, provenance, lines, curves, findings, checkpoint, problem)


def read_store(run: RunFacts, progress: Progress, *, n_sets: int, device: torch.device, scratch: Path) -> StoreFacts:
    """Read a run's store, predict its held-out pairs and map its cells; what is not possible is noted.

    Args:
        n_sets: sets of each split to predict at most, but one of every pair; 0: all.
        device: to predict on.
        scratch: folder for the targets where memory does not hold them; removed again.
    """
    notes: dict[str, str] = {}
    try:
        cache = _open(run)
    except (InputError, StoreError) as error:
        return StoreFacts({}, None, (), None, None, dict.fromkeys(("store", "pairs", "map"), str(error)))
    data, pairs, cells = None, None, None
    try:
        data = _read_data(run, cache, progress, scratch)
        pairs = _predict_pairs(run, data, n_sets, device, progress)
    except (InputError, StoreError) as error:
        notes["store" if data is None else "pairs"] = notes["pairs"] = str(error)
    try:
        cells = map_cells(cache, progress)
    except (InputError, StoreError) as error:
        notes["map"] = str(error)
    genes = data.targets.genes if data is not None else ()
    return StoreFacts(cache.attributes, data.table if data is not None else None, genes, pairs, cells, notes)


def _open(run: RunFacts) -> Cache:
    if not run.cache:
        raise InputError(f"{run.folder} does not say where its store is. Pass --cache.")
    try:
        return open_cache(run.cache)
    except StoreError as error:
        raise InputError(f"The run's store cannot be opened: {error}") from error


def _read_data(run: RunFacts, cache: Cache, progress: Progress, scratch: Path) -> Dataset:
    config = run.config
    if config.perturbations != ONE_HOT and not Path(config.perturbations).is_file():
        raise InputError(
            f"No file {config.perturbations} with the run's perturbation features. Pass --perturbations with it."
        )
    where = Path(config.scratch) if config.scratch else scratch
    names = one_hot_names(run.checkpoint)
    data = read_dataset(Path(cache.path), config, progress, feature_names=names, scratch=where)
    if not config.scratch:
        remove_scratch(where)  # mapped files stay readable
    return data


def _predict_pairs(
    run: RunFacts, data: Dataset, n_sets: int, device: torch.device, progress: Progress
) -> list[PairResults]:
    if run.checkpoint is None:
        raise InputError(run.problem)
    check_data(run.checkpoint, data)
    precision = choose_precision("auto", device, training=False)

    def autocast() -> Any:
        return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])

    store = store_cells(data.targets, data.embeddings, data.embedding_row, device)
    features = torch.from_numpy(data.features.matrix).to(device)
    model, labels, results = run.checkpoint.model().to(device), data.labels, []
    perturbed = data.mask[~labels.is_control]
    for bit in (VAL, TEST):
        if not (perturbed & bit).any():
            continue
        held = held_out(data, run.config, bit, n_sets)
        pairs = held.pairs
        progress.begin(f"Predicting the {SPLIT_NAMES[bit]} split", len(held.pair), "sets")
        means = predicted_means(
            model,
            store,
            held,
            features,
            run.config.batch_size,
            autocast,
            each=lambda sets, _: progress.advance(len(sets["perturbation"])),
        )
        baseline = pearson_delta(held.perturbation_mean, pairs.observed, pairs.control)
        change = pairs.observed - pairs.control
        contexts = [labels.contexts[c] for c in pairs.context]
        results.append(
            PairResults(
                split=SPLIT_NAMES[bit],
                cell_types=["/".join(c) if len(labels.groups) > 1 else c[1] for c in contexts],
                perturbations=[labels.perturbations[p] for p in pairs.perturbation],
                n_cells=pairs.n_cells,
                effect=np.linalg.norm(change, axis=1),
                scores={**pair_metrics(data, pairs, means), "perturbation_mean": baseline},
                observed=change,
                predicted=means - pairs.control,
                n_sets=len(held.pair),
                of_sets=held.n_sets,
            )
        )
    return results


# --- several runs


def ranking(runs: list[RunFacts]) -> str:
    """One sentence: which run has the lower best val_loss, and by how much."""
    found = [(run.scores()[0].head, run) for run in runs if run.scores()]
    if len(found) < 2:
        return "Fewer than two of these runs have been validated, so there is nothing to compare yet."
    (low, best), *others = sorted(found, key=lambda pair: pair[0])
    texts = [f"{loss:.4g} of {run.name} ({(loss - low) / loss if loss else 0.0:.1%} lower)" for loss, run in others]
    word = "lower" if len(found) == 2 else "lowest"
    return f"{best.name} has the {word} best val_loss: {low:.4g}, against {', '.join(texts)}."


def different_tasks(runs: list[RunFacts]) -> list[str]:
    """What makes val_losses of these runs incomparable, each in a few words; empty where nothing is known to."""
    kept = ("set_size", "loss", "controls", "val_sets", "seed", "val_fraction")
    found = [f"--{name.replace('_', '-')}" for name in kept if len({getattr(run.config, name) for run in runs}) > 1]
    if all(run.config.splits for run in runs) and "--val-fraction" in found:
        found.remove("--val-fraction")
    states = [run.state for run in runs if run.state]
    for key, words in (
        ("splits_sha256", "the splits"),
        ("target_sum", "the target sum"),
        ("scale", "the scale of the targets"),
        ("genes", "the genes"),
    ):
        if len({repr(state.get(key)) for state in states}) > 1:
            found.append(words)
    controls = [scores[0].baselines["controls"] for run in runs if (scores := run.scores())]
    if not same_baselines(runs):
        found.append(
            f"the validation cells (predicting the controls scores {min(controls):.4g} to {max(controls):.4g})"
        )
    return found


def same_baselines(runs: list[RunFacts]) -> bool:
    """Whether predicting the controls scores the same val_loss in all runs: they validate on the same cells."""
    controls = [scores[0].baselines["controls"] for run in runs if (scores := run.scores())]
    return not controls or max(controls) - min(controls) <= SAME_BASELINE * max(map(abs, controls))


def differing_options(runs: list[RunFacts]) -> dict[str, list[Any]]:
    """Options and facts of the encoder that are not the same in all runs: name -> one value a run."""
    table = {name: [getattr(run.config, name) for run in runs] for name in TrainConfig.names()}
    for name in PATHS:  # where files lie is no difference; their content is
        del table[name]
    table["splits sha256"] = [run.state.get("splits_sha256") for run in runs]
    table["features sha256"] = [run.state.get("features", {}).get("sha256") for run in runs]
    encoders = [run.state.get("encoder", {}) for run in runs]
    for key in ("name", "native_dim", "projection", "max_tokens"):
        table[f"encoder {key}"] = [encoder.get(key) for encoder in encoders]
    table["width of the embeddings"] = [run.state.get("sizes", {}).get("dim") for run in runs]
    table["precision, as run"] = [run.state.get("precision") for run in runs]
    table["store"] = [run.cache for run in runs]
    return {name: values for name, values in table.items() if len(set(map(repr, values))) > 1}


def changed_options(config: TrainConfig) -> dict[str, tuple[Any, Any, str]]:
    """Options that are not at their default: name -> (value, default, help)."""
    return {n: row for n, row in all_options(config).items() if row[0] != row[1]}


def all_options(config: TrainConfig) -> dict[str, tuple[Any, Any, str]]:
    """Every option: name -> (value, default, help)."""
    return {
        f.name: (getattr(config, f.name), f.default, str(f.metadata["help"])) for f in dataclasses.fields(TrainConfig)
    }
