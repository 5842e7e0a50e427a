"""Predict perturbed cells with a trained head and write them as an .h5ad, real control cells beside them.

Shapes: S cells a set, E embedding width, P feature width, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse
import torch

from sest import progress
from sest.cache import open_cache
from sest.cells.scale import LARGEST_PREDICTED_LOG1P
from sest.cells.split_file import TRAIN
from sest.config import PredictConfig, TrainConfig
from sest.data.dataset import Dataset, read_dataset
from sest.data.features import equal_vectors
from sest.data.targets import remove_scratch
from sest.data.vectors import ONE_HOT, Vectors, absent_hint, label_of, read_sources
from sest.errors import InputError, nearest, shown
from sest.files.write_h5ad import H5adWriter
from sest.head.model import StateTransition
from sest.machine.devices import autocast, choose_device, choose_precision
from sest.outputs import check_output
from sest.prediction.controls import Pool, new_pools, planned_pools
from sest.prediction.draws import control_rows, draw_sets
from sest.prediction.record import baselines, is_source, provenance
from sest.prediction.requests import Request, Wanted, join_tables, make_requests, obs_of, read_wanted
from sest.runs.checkpoint import Checkpoint, find_checkpoint, sound_checkpoint
from sest.runs.provenance import check_data, check_width, files_of, find_data, saw_the_same_split
from sest.runs.run_folder import SCRATCH, stored_features

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 4096  # real control cells written at once
TRAIN_WITH_FEATURES = (
    "Train with --perturbations FILE (a vector a perturbation) or genes (of measured genes) to predict unseen ones."
)
WITH_FILE = "Pass --perturbations with a file that has them too."


@dataclass(frozen=True)
class Prediction:
    """What was written."""

    n_predicted: int
    n_controls: int
    n_genes: int
    n_perturbations: int
    checkpoint: Path
    step: int


def predict(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: PredictConfig,
    wanted: Wanted | None = None,
    *,
    force: bool = False,
) -> Prediction:
    """Predict cells and write them, with real control cells beside them.

    Args:
        run: a run folder, or one of its checkpoint folders.
        out: the .h5ad to write: X CSR float32 log1p within [0, 14]; obs perturbation, cell type, batch; var the genes;
            uns["sest"] the provenance and the baselines' pseudobulks.
        config: what to predict and from which controls.
        wanted: the perturbations, instead of config.list or config.only: names (config.n_cells of each), or
            name -> cells.
        force: replace `out` where it exists; what the prediction is made from never is.

    Raises:
        InputError, CacheError: `out` exists or is an input, no such run, a damaged checkpoint, unknown perturbations or
            cell types, features that are missing or of another width. Nothing is written then.
    """
    out = Path(out)
    given = [config.template, config.list, config.controls, config.genes, config.encoder, config.cache]
    check_output(out, inputs=[*given, config.perturbations, *files_of(Path(run))], force=force)
    listed = read_wanted(wanted, config.template, config.list, config.only, config.n_cells)
    checkpoint = sound_checkpoint(find_checkpoint(Path(run), config.checkpoint))
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, training=False)
    train_config, cache, source = find_data(checkpoint, config.cache, config.perturbations)
    if out.exists() and is_source(out, open_cache(os.fspath(cache))):
        raise InputError(f"{out} has the cells that {cache} was made from, and is never replaced. Give another name.")
    if config.all_controls and not config.controls:
        raise InputError("--all-controls says that all cells of --controls are unperturbed. Pass --controls too.")
    if config.missing_genes != "error" and not config.controls:
        raise InputError("--missing-genes is for genes that new cells lack. Pass --controls too.")
    planned = planned_pools(config, checkpoint) if config.controls else None
    data = _read(cache, train_config, checkpoint, out)
    genes, places = _genes(config.genes, data.targets.genes)
    requests, columns = make_requests(config, listed, data, planned)
    asked = [request for request in requests if not request.is_control]
    names = sorted({request.perturbation for request in asked})
    vectors = _vectors(names, source, train_config.missing_perturbations, checkpoint, data)
    if planned is not None:  # all that can be refused was, before the embedding
        pools = new_pools(config, checkpoint, data)
        requests = [dataclasses.replace(request, pool=pools[request.pool.cell_type]) for request in requests]
    uns = {"sest": provenance(checkpoint, data, columns, config.missing_genes)}
    if saw_the_same_split(checkpoint, data):  # baselines must not see other cells
        uns["sest"] |= baselines(requests, config.seed, data, vectors, places)
    else:
        logger.info("What the run was trained on is not known here, so no baselines are stored.")
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


def predict_cells(
    run: str | os.PathLike[str],
    wanted: Wanted | None = None,
    config: PredictConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> AnnData:
    """`predict` into memory; `out`: a file to keep as well, which replaces another with `force`."""
    from anndata import read_h5ad  # slow to import

    config = config or PredictConfig()
    if out is not None:
        predict(run, out, config, wanted, force=force)
        return read_h5ad(out)
    with tempfile.TemporaryDirectory(prefix="sest-") as folder:
        return predict_cells(run, wanted, config, out=Path(folder) / "predicted.h5ad")


def _read(cache: Path, config: TrainConfig, checkpoint: Checkpoint, out: Path) -> Dataset:
    """The cells of the cache, which must be the checkpoint's."""
    scratch = Path(config.scratch or out.with_name(f".{out.name}.{SCRATCH}"))  # only if memory is too small
    data = read_dataset(cache, config, stored=stored_features(checkpoint), scratch=scratch)
    if not config.scratch:
        remove_scratch(scratch)  # mapped files stay readable
    check_data(checkpoint, data)
    if not checkpoint.state["genes"]:
        logger.info(f"{checkpoint.folder} does not name its genes: they are taken to be those of {cache}, in order.")
    return data


def _vectors(
    names: Sequence[str], source: str, missing: str, checkpoint: Checkpoint, data: Dataset
) -> dict[str, np.ndarray]:
    """Features (P,) of the perturbations to predict; their sources may have more than the run was trained on.

    `missing` as in TrainConfig.missing_perturbations.
    """
    known = data.features.vectors
    if label_of(source) != known.label:  # an imported checkpoint's
        known = read_sources(source, ())
    check_width(known.label, known.width, checkpoint)
    found = {name: known.find(name) for name in names}
    absent = [name for name in names if found[name] is None]
    found_nothing = f"{known.label} has no features for"
    if known.label == ONE_HOT:
        found_nothing = "The run has one-hot features and never saw"
    if absent and (missing != "zero" or known.label == ONE_HOT):
        raise InputError(
            f"{found_nothing} {len(absent)} of {len(names)} perturbations: {shown(absent)}."
            f"{absent_hint(absent, known.names)} {TRAIN_WITH_FEATURES if known.label == ONE_HOT else WITH_FILE}"
        )
    if unknown := [name for name in absent if name not in data.labels.perturbations]:
        raise InputError(
            f"Neither {known.label} nor the cache has {shown(unknown)}."
            f"{absent_hint(unknown, dict.fromkeys([*known.names, *data.labels.perturbations[1:]]))} "
            f"There are, for example: {shown(known.names)}. {WITH_FILE}"
        )
    if absent:
        logger.info(f"No features for {shown(absent)}: predicted from zeros, as a perturbation without features.")
    there = [name for name in names if name not in absent]
    known.say_what_is_made(there)
    _refuse_untrained(there, known, checkpoint, data)
    zero = np.zeros(known.width, np.float32)
    vectors = {name: zero if vector is None else vector for name, vector in found.items()}
    _say_which_are_alike({name: vectors[name] for name in there}, data)
    return vectors


def _refuse_untrained(names: Sequence[str], known: Vectors, checkpoint: Checkpoint, data: Dataset) -> None:
    """What has nothing but one-hot columns can only be predicted if these were trained."""
    names = [name for name in names if known.has_only_a_column(name)]
    if not names:
        return
    if not saw_the_same_split(checkpoint, data):
        logger.info(
            "What this run with one-hot features was trained on is not known here: what it never saw, it guesses."
        )
        return
    trained = data.perturbations_in(TRAIN)
    targets = {target for name in trained for target in known.columns_of(name)}
    if never := [name for name in names if not targets.issuperset(known.columns_of(name))]:
        raise InputError(
            f"The run has one-hot features and was never trained on {len(never)} of {len(names)} perturbations: "
            f"{shown(never)}. It was on: {shown(trained)}. {TRAIN_WITH_FEATURES}"
        )


def _say_which_are_alike(asked: Mapping[str, np.ndarray], data: Dataset) -> None:
    """Say which of the perturbations to predict have the very vector of another one, of the run or asked as well."""
    run = data.features
    trained = {} if run.source == ONE_HOT else dict(zip(run.names, run.matrix, strict=True))
    everyone = {name: vector for name, vector in trained.items() if name not in run.missing} | dict(asked)
    alike = [group for group in equal_vectors(everyone, everyone.values()) if not asked.keys().isdisjoint(group)]
    if alike:
        said = "; ".join(shown(group) for group in alike)
        logger.info(f"Perturbations with the same feature vector get the same prediction: {said}.")


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
    with torch.inference_mode(), autocast(device, precision):
        perturbation = torch.from_numpy(vector).to(device).expand(len(basal), -1)
        predicted = model(torch.from_numpy(basal.astype(np.float32)).to(device), perturbation)
        cells: np.ndarray = predicted.float().clamp_max(LARGEST_PREDICTED_LOG1P).flatten(0, 1).cpu().numpy()
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
