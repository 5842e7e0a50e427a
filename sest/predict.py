"""Predict perturbed cells with a trained head and write them as an .h5ad, real control cells beside them.

Shapes: S cells a set, E embedding width, P feature width, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch

from sest import __version__
from sest.baselines import predict_baselines
from sest.cache.storage import is_url
from sest.cell_eval_scores import MAX_LOG1P
from sest.checkpoint import Checkpoint, find_checkpoint, sound_checkpoint
from sest.columns import Columns
from sest.config import PredictConfig, TrainConfig
from sest.controls import Pool, new_pools
from sest.dataset import Dataset, read_dataset, training_means
from sest.devices import DTYPES, choose_device, choose_precision
from sest.errors import InputError, nearest, shown
from sest.features import ONE_HOT
from sest.model import StateTransition
from sest.progress import Progress
from sest.requests import Request, join_tables, make_requests, obs_of, read_list
from sest.run_folder import CONFIG, SCRATCH, one_hot_names, read_run_config
from sest.targets import remove_scratch
from sest.weights import load_features
from sest.write_h5ad import H5adWriter, check_writable

ROWS_PER_BLOCK = 4096  # real control cells written at once
_SET_STREAM, _CONTROL_STREAM = 5, 6  # what a random stream is for


@dataclass(frozen=True)
class Prediction:
    """What was written."""

    n_predicted: int
    n_controls: int
    n_genes: int
    n_perturbations: int
    checkpoint: Path
    step: int


def predict(run: Path, out: Path, config: PredictConfig, progress: Progress) -> Prediction:
    """Predict cells and write them, with real control cells beside them.

    Args:
        run: a run folder, or one of its checkpoint folders.
        out: the .h5ad to write: X CSR float32 log1p within [0, 14]; obs perturbation, cell type, batch; var the genes;
            uns["sest"] the provenance and the baselines' pseudobulks.
        config: what to predict and from which controls.

    Raises:
        InputError, StoreError: no such run, a damaged checkpoint, unknown perturbations or cell types, features that
            are missing or of another width. Nothing is written then.
    """
    check_writable(out)
    for given in (config.template, config.cells):
        if given is not None and out.exists() and Path(given).exists() and out.samefile(given):
            raise InputError(f"{out} is read for this prediction. Write to another file.")
    listed = read_list(config)
    checkpoint = sound_checkpoint(find_checkpoint(run, config.checkpoint))
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, training=False)
    train_config, cache, source = _run_of(checkpoint, config)
    scratch = Path(train_config.scratch or out.with_name(f".{out.name}.{SCRATCH}"))  # only if memory is too small
    data = read_dataset(cache, train_config, progress, feature_names=one_hot_names(checkpoint), scratch=scratch)
    if not train_config.scratch:
        remove_scratch(scratch)  # mapped files stay readable
    check_data(checkpoint, data)
    genes, places = _genes(config.genes, data.targets.genes)
    made_columns = next(iter(data.cache.groups.values())).attributes["columns"]
    pools = new_pools(config, checkpoint, data, progress) if config.cells else None
    requests, columns = make_requests(config, listed, made_columns, data, pools)
    asked = [request for request in requests if not request.is_control]
    vectors = _vectors(sorted({request.perturbation for request in asked}), source, checkpoint, train_config, data)
    if not checkpoint.state["genes"]:
        progress.note(f"{checkpoint.folder} does not name its genes: they are taken to be those of {cache}, in order.")
    uns = {"sest": _provenance(checkpoint, data, columns)}
    if _is_own_split(checkpoint, data):
        uns["sest"] |= _baselines(requests, config.seed, data, vectors, places)
    else:
        progress.note("What the run was trained on is not known here, so no baselines are stored.")
    model = checkpoint.model().to(device)
    progress.begin("Predicting", sum(request.n_cells for request in requests), "cells")
    tables = []
    with H5adWriter(out, len(genes), "float32") as writer:
        for request in requests:
            if request.is_control:
                chosen = control_rows(request, config.seed)
                blocks = _real_cells(request.pool, chosen)
            else:
                sets = draw_sets(request, train_config.set_size, config.seed)
                chosen = sets.ravel()[: request.n_cells]
                vector = vectors[request.perturbation]
                blocks = _predicted_cells(request, sets, model, vector, train_config.batch_size, precision)
            for block in blocks:
                writer.add(block if places is None else block[:, places])
                progress.advance(block.shape[0])
            tables.append(obs_of(request, chosen, columns))
        writer.finish(join_tables(tables), pd.DataFrame(index=pd.Index(genes, dtype=str)), uns)
    return Prediction(
        n_predicted=sum(request.n_cells for request in asked),
        n_controls=sum(request.n_cells for request in requests if request.is_control),
        n_genes=len(genes),
        n_perturbations=len(vectors),
        checkpoint=checkpoint.folder,
        step=checkpoint.state["step"],
    )


def _run_of(checkpoint: Checkpoint, config: PredictConfig) -> tuple[TrainConfig, Path, str]:
    """The configuration the checkpoint was trained with, the store of its control cells and its features (a file)."""
    run = checkpoint.folder.parent
    values: dict[str, Any] = dict(checkpoint.state["config"])
    provenance: dict[str, Any] = {}
    if (run / CONFIG).is_file():
        values, provenance = read_run_config(run)
    elif config.perturbations is None and checkpoint.state["features"]["source"] != ONE_HOT:
        # an imported or moved checkpoint knows its sizes, not where files lie
        raise InputError(f"{checkpoint.folder} does not say where its perturbation features are. Pass --perturbations.")
    if config.perturbations is not None:
        values["perturbations"] = config.perturbations
    source = values.get("perturbations", ONE_HOT)
    if source != ONE_HOT and not Path(source).is_file():
        raise InputError(f"No file {source} with the run's perturbation features. Pass --perturbations.")
    cache = config.cache or provenance.get("cache")
    if cache is None:
        raise InputError(f"{checkpoint.folder} does not say where its store is. Pass --cache.")
    if not (is_url(cache) or Path(cache).exists()):
        raise InputError(f"The store {cache} does not exist. Pass --cache with the one the run was trained on.")
    if checkpoint.state["cache_sha256"] is None:  # imported: only what is asked for needs features, not the whole store
        values["perturbations"] = ONE_HOT
    return TrainConfig.from_values(values, str(run / CONFIG)), Path(cache), source


def check_data(checkpoint: Checkpoint, data: Dataset) -> None:
    """Refuse a store or features that are not those of the checkpoint.

    Raises:
        InputError: another store, width, features or genes than it was trained with.
    """
    state, sizes, store, features = checkpoint.state, checkpoint.sizes, data.cache.path, data.features
    if state["cache_sha256"] not in (None, data.cache_sha256):
        raise InputError(f"{store} is not the store {checkpoint.folder} was trained on. Pass --cache with that one.")
    if data.cache.dim != sizes.dim:
        raise InputError(f"{store} has embeddings of width {data.cache.dim}; the checkpoint takes {sizes.dim}.")
    if state["features"]["sha256"] is not None:
        _check_width(features.source, features.width, checkpoint)
    if state["features"]["sha256"] not in (None, features.sha256):
        raise InputError(
            f"{features.source} has other features than the checkpoint was trained with. "
            "Pass --perturbations with the file it was trained with."
        )
    genes = data.targets.genes
    if len(genes) != sizes.n_genes:
        raise InputError(f"{store} has {len(genes)} genes; the checkpoint predicts {sizes.n_genes}.")
    if state["genes"] and list(genes) != state["genes"]:
        first = next(f"{b} instead of {a}" for a, b in zip(state["genes"], genes, strict=True) if a != b)
        raise InputError(f"{store} has other genes, or in another order, than the checkpoint predicts: {first}.")


def _check_width(source: str, width: int, checkpoint: Checkpoint) -> None:
    if width != checkpoint.sizes.n_features:
        raise InputError(
            f"{source} has features of width {width}; the checkpoint takes {checkpoint.sizes.n_features}. "
            "Pass --perturbations with the file it was trained with."
        )


def _is_own_split(checkpoint: Checkpoint, data: Dataset) -> bool:
    """Whether `data` says which cells the checkpoint was trained on: baselines must not see others."""
    state, file = checkpoint.state, data.split_file
    same_splits = state["splits_sha256"] == (file.sha256 if file is not None else None)
    return state["cache_sha256"] == data.cache_sha256 and same_splits


def _vectors(
    names: Sequence[str], source: str, checkpoint: Checkpoint, config: TrainConfig, data: Dataset
) -> dict[str, np.ndarray]:
    """Features (P,) of the perturbations to predict; a file may have more than the run was trained on."""
    known = data.features.as_mapping() if source == ONE_HOT else load_features(Path(source))
    absent = [name for name in names if name not in known]
    if absent and source == ONE_HOT:
        raise InputError(
            f"The run has one-hot features and never saw {shown(absent)}.{nearest(absent[0], known)} "
            "Train with --perturbations FILE to predict unseen perturbations."
        )
    if absent and config.missing_perturbations != "zero":
        raise InputError(
            f"{source} has no features for {len(absent)} of {len(names)} perturbations: {shown(absent)}."
            f"{nearest(absent[0], known)} Pass --perturbations with a file that has them too."
        )
    zero = np.zeros(checkpoint.sizes.n_features, np.float32)
    vectors = {name: known.get(name, zero) for name in names}
    _check_width(source, len(next(iter(known.values()))), checkpoint)
    return vectors


def _random(request: Request, seed: int) -> np.random.Generator:
    """Randomness of a request depends on the seed and on what is asked, not on its place among others."""
    name = hashlib.sha256(f"{request.pool.cell_type}\n{request.perturbation}".encode()).digest()
    stream = _CONTROL_STREAM if request.is_control else _SET_STREAM
    return np.random.default_rng([seed, stream, int.from_bytes(name[:8], "little")])


def control_rows(request: Request, seed: int) -> np.ndarray:
    """Which cells of the pool are written for real controls (n,): all, or as many as the template has."""
    n_pool = len(request.pool)
    if request.n_cells == n_pool:
        return np.arange(n_pool)
    return np.sort(_random(request, seed).choice(n_pool, request.n_cells, replace=request.n_cells > n_pool))


def draw_sets(request: Request, set_size: int, seed: int) -> np.ndarray:
    """Sets of control cells to predict from, as in training: (sets, S) rows of the pool, a set within one file."""
    files, rng = request.pool.files, _random(request, seed)
    sets = []
    for _ in range(-(-request.n_cells // set_size)):
        of_file = np.flatnonzero(files == files[rng.integers(len(files))])
        sets.append(rng.choice(of_file, set_size, replace=len(of_file) < set_size))
    return np.stack(sets)


def _real_cells(pool: Pool, chosen: np.ndarray) -> Iterator[scipy.sparse.csr_matrix]:
    """The control cells `chosen` (n,), in blocks of (rows, G)."""
    for start in range(0, len(chosen), ROWS_PER_BLOCK):
        yield pool.expression[chosen[start : start + ROWS_PER_BLOCK]]


def _predicted_cells(
    request: Request, sets: np.ndarray, model: StateTransition, vector: np.ndarray, batch_size: int, precision: str
) -> Iterator[scipy.sparse.csr_matrix]:
    """Predicted cells of a request, `batch_size` sets a block: (rows, G) within [0, 14]; the last set is cut."""
    left = request.n_cells
    for start in range(0, len(sets), batch_size):
        basal = request.pool.embeddings[sets[start : start + batch_size]]  # (B, S, E)
        cells = _forward(model, basal, vector, precision)[:left]
        if not np.isfinite(cells).all():
            raise InputError(f"The prediction of {request.perturbation} is not finite. Try --precision fp32.")
        left -= len(cells)
        yield scipy.sparse.csr_matrix(cells)


def _forward(model: StateTransition, basal: np.ndarray, vector: np.ndarray, precision: str) -> np.ndarray:
    """(B, S, E) and (P,) -> (B * S, G) float32, cut at 14."""
    device = next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
        perturbation = torch.from_numpy(vector).to(device).expand(len(basal), -1)
        predicted = model(torch.from_numpy(basal.astype(np.float32)).to(device), perturbation)
        cells: np.ndarray = predicted.float().clamp_max(MAX_LOG1P).flatten(0, 1).cpu().numpy()
    return cells


def _genes(path: str | None, genes: Sequence[str]) -> tuple[list[str], np.ndarray | None]:
    """The output's genes, and where they stand among the run's (None: all, in its order)."""
    if path is None:
        return list(genes), None
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
    names = [name for line in lines if (name := line.split(",")[0].strip().strip('"'))]
    place = {name: i for i, name in enumerate(genes)}
    if names and names[0] not in place and names[0].lower() in ("gene", "genes", "gene_name", "gene_names"):
        names = names[1:]  # a header
    missing = [name for name in names if name not in place]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} genes are not the run's: {shown(missing)}.{nearest(missing[0], place)}"
        )
    if not names or len(set(names)) < len(names):
        raise InputError(f"{path} must list genes of the run, one a line, each once.")
    return names, np.array([place[name] for name in names])


def _provenance(checkpoint: Checkpoint, data: Dataset, columns: Columns) -> dict[str, Any]:
    """What the file says of itself: scale, columns and where it comes from."""
    state, is_log1p = checkpoint.state, data.targets.scale == "log1p"
    return {
        "columns": {key: getattr(columns, key) for key in ("perturbation", "cell_type", "control")},
        "scale": "log1p" if is_log1p else "counts",
        **({} if is_log1p else {"target_sum": data.targets.target_sum}),
        "provenance": {
            "sest_version": __version__,
            "checkpoint": checkpoint.folder.name,
            "run": checkpoint.folder.parent.name,
            "step": state["step"],
            "model_sha256": state["files"]["model.safetensors"],
            "cache_sha256": data.cache_sha256,
            "encoder": state["encoder"]["name"],
            "licence": state["encoder"]["licence"] or "",
        },
    }


def _baselines(
    requests: Sequence[Request], seed: int, data: Dataset, vectors: dict[str, np.ndarray], places: np.ndarray | None
) -> dict[str, Any]:
    """Pseudobulks of the baselines for `sest evaluate`, (pairs, G), around the mean of the controls in this file.

    `sest evaluate` subtracts that mean again: a baseline's effect is then what it learned, whichever controls a
    template asks for.
    """
    pairs = list(dict.fromkeys((r.pool.cell_type, r.perturbation) for r in requests if not r.is_control))
    control = _control_means(requests, seed)
    features = None if data.features.source == ONE_HOT else {**data.features.as_mapping(), **vectors}
    means = np.stack([control[cell_type] for cell_type, _ in pairs])
    baselines = predict_baselines(training_means(data), [name for _, name in pairs], means, features)
    return {
        "baselines": {
            name: (values if places is None else values[:, places]).astype(np.float32)
            for name, values in baselines.items()
        },
        "pairs": {
            key: np.array([pair[i] for pair in pairs], dtype=object)
            for i, key in enumerate(("cell_type", "perturbation"))
        },
    }


def _control_means(requests: Sequence[Request], seed: int) -> dict[str, np.ndarray]:
    """Mean (G,) float64 of each cell type's controls that are written; of its whole pool where none are."""
    parts: dict[str, list[tuple[Pool, np.ndarray]]] = {}
    for request in requests:
        if request.is_control:
            parts.setdefault(request.pool.cell_type, []).append((request.pool, control_rows(request, seed)))
    for request in requests:
        pool = request.pool
        parts.setdefault(pool.cell_type, [(pool, np.arange(len(pool)))])
    means = {}
    for cell_type, chosen in parts.items():
        sums = np.stack([np.asarray(pool.expression[rows].sum(0, dtype=np.float64)).ravel() for pool, rows in chosen])
        means[cell_type] = sums.sum(0) / sum(len(rows) for _, rows in chosen)
    return means
