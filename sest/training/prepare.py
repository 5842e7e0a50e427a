"""All that happens before the first step: read the data, build or resume, refuse what cannot work."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sest.cache import open_cache
from sest.cells.split_file import SPLIT_NAMES, TEST, TRAIN, VAL
from sest.config import TrainConfig
from sest.data.batches import BatchSource
from sest.data.dataset import Dataset, read_dataset
from sest.data.features import equal_vectors
from sest.data.resident import ResidentCells, resident_cells
from sest.data.sampler import SetSampler, fitting_set_size
from sest.data.targets import refuse_mixed_scales
from sest.data.vectors import ONE_HOT
from sest.errors import InputError, shown
from sest.head.adamw import AdamW
from sest.head.kernels import triton_kernels
from sest.head.loss import HeadLoss, make_loss
from sest.head.model import HeadSizes, StateTransition, new_model
from sest.head.preset import TrainingData, level_of, preset_values, why
from sest.machine.devices import autocast, choose_precision, compiles
from sest.machine.team import Team
from sest.runs.checkpoint import Checkpoint, find_checkpoint, sound_checkpoint
from sest.runs.diagnose import GIVE_FEATURES
from sest.runs.initial import (
    features_to_start_with,
    freeze,
    frozen_parts,
    like_head,
    refuse_other_cells,
    started_from,
    take_over,
)
from sest.runs.run_folder import CONFIG, stored_features
from sest.runs.sinks import check_sinks
from sest.training.identity import identity_of, refuse_other_run
from sest.training.limit import measure_limit
from sest.training.step_memory import largest_batch
from sest.training.trainer import RunState, Trainer
from sest.training.validate import BASELINES, Validator
from sest.training.window import WINDOW

logger = logging.getLogger(__name__)

MUCH_FILLED = 2.0  # cells that sets hold, beside those there are, above which it is said
GPU_SHARE = 0.6  # of free GPU memory that the cells may take; the rest is for the step


def prepare(
    cache: Path,
    run: Path,
    config: TrainConfig,
    device: torch.device,
    team: Team,
    start: Checkpoint | None,
    given: Collection[str] = (),
) -> Trainer:
    """Read the data and make everything a training owns; nothing is written to the run folder.

    Args:
        start: the checkpoint to go on from; None: step 0.
        given: see `sest.training.train.train`.

    Raises:
        InputError, CacheError: bad input, or a checkpoint of another run.
    """
    precision = _precision(config, device)
    source = _source(config, start)
    config = like_head(config, source, start)
    data = read_in_turn(cache, config, start, team, source)
    begun = start is not None or (run / CONFIG).exists()
    config, why_so = (config, "") if begun else with_preset(config, data, device, given)
    config = settled(config, data)
    say_what_is_not_learned(data)
    sizes = head_sizes(data, config)
    model = _new_model(sizes, config.seed, data) if start is None else start.model()
    taken = take_over(source, model, data, config) if source is not None else None
    freeze(model, config)
    model = model.to(device).train()
    # float16 also where the head computes in bf16: 8 times as exact, and scaled so that it cannot overflow
    gram = torch.float16 if device.type == "cuda" and precision != "fp32" else torch.float32
    criterion, cast = make_loss(config.loss, gram), partial(autocast, device, precision)
    if config.batch_size == 0:
        chosen = team.size * largest_batch(model, sizes, config.set_size, criterion, cast)
        config = dataclasses.replace(config, batch_size=-team.largest(-chosen))
        logger.info(f"{config.batch_size} sets a batch fit the free memory.")
    _refuse_uneven(config.batch_size, team.size)
    identity = identity_of(data, config, precision)
    if start is not None:
        refuse_other_run(start, identity, sizes)
    optimizer, scaler = _optimizer(model, config, device, precision, start)
    on_device = _cells_on_device(config.data_device, device, data)
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, device, on_device=on_device)
    sampler = _sampler(data, config)
    validator = _validator(data, cells, config, device, criterion, team, start)
    ddp = team.ddp(HeadLoss(model, criterion, nullcontext if precision == "tf32" else cast), config.gradients)
    team.wait()  # all have read what is in the folder
    n_sets = config.batch_size // team.size * config.accumulate
    compiled = compiles(config.compile, device.type if triton_kernels(device) else "cpu", config.max_steps)
    trainer = Trainer(
        run=run,
        config=config,
        team=team,
        device=device,
        data=data,
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        scaler=scaler,
        criterion=criterion,
        autocast=cast,
        batches=BatchSource(sampler, cells, config.batch_size, config.num_workers, team.ranks),
        validator=validator,
        limit=measure_limit(model, n_sets, config.set_size, precision, passes=config.accumulate, compiled=compiled),
        identity=identity,
        precision=precision,
        compiled=compiled,
        state=RunState() if start is None else _state_of(start),
        origin=started_from(start, taken),
        chosen=why_so,
    )
    if start is not None and WINDOW in start.state:
        trainer.window.restore(start.state[WINDOW])
        trainer.state.skipped_steps -= trainer.window.n_bad()  # the next line counts them
    return trainer


def _refuse_uneven(batch_size: int, n_processes: int) -> None:
    if batch_size % n_processes:
        raise InputError(
            f"A batch of {batch_size} sets cannot be divided among {n_processes} processes. Use a --batch-size "
            f"that {n_processes} divides."
        )


def with_preset(
    config: TrainConfig, data: Dataset, device: torch.device, given: Collection[str]
) -> tuple[TrainConfig, str]:
    """The configuration with what its preset chooses for these data, but for what was given; what and why, in words.

    Raises:
        InputError: a preset for a head that has its sizes already.
    """
    preset = config.preset
    if preset is None:
        return config, ""
    if config.init_from is not None:
        raise InputError("--preset chooses a head, and --init-from brings its own. Leave one of the two out.")
    labels, trains = data.labels, data.in_split(TRAIN)
    perturbed = trains & ~labels.is_control
    facts = TrainingData(
        n_cells=int(perturbed.sum()),
        n_perturbations=len(np.unique(labels.perturbation[perturbed])),
        n_genes=len(data.targets.genes),
        set_size=fitting_set_size(labels, trains),
        unseen=bool(data.held_out_whole()),
        on_gpu=device.type == "cuda",
    )
    values = preset_values(preset, facts, max_steps=config.max_steps if "max_steps" in given else None)
    config = dataclasses.replace(config, **{key: value for key, value in values.items() if key not in given})
    layers = f"{config.n_layers} {'layer' if config.n_layers == 1 else 'layers'}"
    chosen = (
        f"Preset {level_of(preset, facts)}: hidden {config.hidden}, {layers}, {config.max_steps:,} steps of "
        f"{config.batch_size or 'auto'} sets x {config.set_size or 'auto'} cells at lr {config.lr:g}, "
        f"{why(preset, facts)}."
    )
    logger.info(chosen)
    return config, chosen


def settled(config: TrainConfig, data: Dataset) -> TrainConfig:
    """The configuration with what is left to the data: sources of features, and the size of a set.

    Raises:
        InputError: sets of one cell, which have no spread to learn.
    """
    size = config.set_size or fitting_set_size(data.labels, data.in_split(TRAIN))
    if size == 1:
        raise InputError("--set-size 1: the loss compares the cells of a set with each other. Use 2 or more, or auto.")
    if not config.set_size:
        logger.info(f"Sets have {size} cells (--set-size auto: what half of the training pairs fill).")
    return dataclasses.replace(config, perturbations=data.sources, set_size=size)


def _source(config: TrainConfig, start: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint whose head a new run takes on."""
    if config.init_from is None or start is not None:
        return None
    return sound_checkpoint(find_checkpoint(Path(config.init_from)))


def _state_of(start: Checkpoint) -> RunState:
    """Where a checkpoint's run was; one of an earlier sest kept its best val_loss alone."""
    state = RunState(**start.state["run"])
    if not state.monitored and state.best_val_loss is not None:
        state.monitored = [state.best_val_loss]
    return state


def _precision(config: TrainConfig, device: torch.device) -> str:
    """What is computed in; refuse what this machine cannot do."""
    precision = choose_precision(config.precision, device, training=True)
    if precision == "tf32" and config.loss == "energy+sinkhorn":
        raise InputError("--loss energy+sinkhorn has float32 products, which TF32 rounds. Use --precision bf16.")
    if config.gradients == "bf16" and device.type == "cpu":
        raise InputError("--gradients bf16 needs GPUs, which exchange gradients through NCCL. Use --gradients fp32.")
    frozen_parts(config)
    check_sinks(config)
    return precision


def read_in_turn(
    cache: Path,
    config: TrainConfig,
    start: Checkpoint | None,
    team: Team,
    source: Checkpoint | None = None,
) -> Dataset:
    """Read the data; of several processes the first goes ahead, as it may write the files that the others map.

    Args:
        start: the checkpoint to go on from, whose cells do not include what was added to its cache since.
        source: the checkpoint whose head a new run takes on.

    Raises:
        InputError, CacheError: bad input, or cells that mean something else than those of `source`.
    """
    stored = stored_features(start) or features_to_start_with(source)
    then = start.state["cache_sha256"] if start is not None else None

    def read() -> Dataset:
        opened, target_sum = open_cache(os.fspath(cache)).as_of(then), config.target_sum
        if isinstance(target_sum, float):  # known before the values are read
            refuse_mixed_scales(opened, target_sum, config.mixed_scales)
        data = read_dataset(opened, config, stored=stored)
        if not isinstance(target_sum, float):
            refuse_mixed_scales(opened, data.targets.target_sum, config.mixed_scales)
        if source is not None:
            refuse_other_cells(source, data)
        return data

    if team.leads:
        data = read()
    team.wait()
    return data if team.leads else read()


def say_what_is_not_learned(data: Dataset) -> None:
    """Say which perturbations the head cannot learn or tell apart, and which scores therefore say nothing."""
    labels, features, never = data.labels, data.features, data.never_learned()
    if features.source != ONE_HOT:
        codes = np.unique(labels.perturbation[data.mask > 0]).tolist()
        used = [code for code in codes if features.names[code] not in features.missing]
        if alike := equal_vectors((features.names[code] for code in used), features.matrix[used]):
            said = "; ".join(shown(group) for group in alike)
            logger.info(f"Perturbations with the same feature vector, which the head cannot tell apart: {said}.")
    elif never:
        logger.info(
            f"With one-hot features the head can never learn {len(never)} of {len(labels.perturbations) - 1} "
            f"perturbations, as they have no training cells in any context: {shown(never)}."
        )
    for bit, harm in ((VAL, "val_loss, its other scores and best/ are"), (TEST, "predictions of them are")):
        names = data.perturbations_in(bit)
        if names and set(names) <= set(never):
            logger.warning(
                f"The {SPLIT_NAMES[bit]} split has only perturbations that cannot be learned ({len(names)}): "
                f"{harm} no measure of this head. {GIVE_FEATURES}"
            )
    if alone := data.contexts_with_one(VAL):
        logger.info(f"One perturbation each is validated in {shown(alone)}: no pds there (-), as it ranks several.")


def head_sizes(data: Dataset, config: TrainConfig) -> HeadSizes:
    if config.hidden % config.n_heads:
        raise InputError(f"hidden ({config.hidden}) must divide by n-heads ({config.n_heads}).")
    return HeadSizes(
        dim=data.cache.dim,
        n_features=data.features.width,
        n_genes=len(data.targets.genes),
        hidden=config.hidden,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        ffn=config.ffn or 4 * config.hidden,
        n_encoder_layers=config.n_encoder_layers,
        n_decoder_layers=config.n_decoder_layers,
        dropout=config.dropout,
    )


def _new_model(sizes: HeadSizes, seed: int, data: Dataset) -> StateTransition:
    """A fresh head; one-hot columns start at zero, so that one which never trains has no effect."""
    model, columns = new_model(sizes, seed), data.features.vectors.one_hot
    if columns is not None:
        with torch.no_grad():
            model.pert_encoder.get_parameter("0.weight")[:, columns] = 0.0
    return model


def _optimizer(
    model: StateTransition, config: TrainConfig, device: torch.device, precision: str, start: Checkpoint | None
) -> tuple[AdamW, torch.amp.GradScaler]:
    """AdamW and, for fp16, the scaler of the loss; as they were at the checkpoint."""
    optimizer = AdamW(model.parameters(), config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if start is not None:
        names = [name for name, _ in model.named_parameters()]
        optimizer.load_tensors(start.optimizer_tensors(), names)
        if scaler.is_enabled() and start.state["scaler"]:  # empty after another precision
            scaler.load_state_dict(start.state["scaler"])
    return optimizer, scaler


def _sampler(data: Dataset, config: TrainConfig) -> SetSampler:
    """The sets of the training split; says which cells they cannot serve as asked."""
    sampler = SetSampler(
        data.labels,
        data.in_split(TRAIN),
        config.set_size,
        config.seed,
        same_batch=config.match_controls == "batch",
        control_targets=config.control_targets,
    )
    if sampler.filled > MUCH_FILLED:
        logger.info(
            f"Sets of {config.set_size} cells are filled by repeating cells: {sampler.filled:.3g} times the cells that "
            "there are, and the work of as many. --set-size auto takes about as many as the pairs have."
        )
    unseen = data.held_out_whole()
    if unseen and not config.control_targets:
        logger.info(
            f"The head never sees {shown(unseen)} in training. With --control-targets it learns from their control "
            "cells, which such cell types usually need (measured: benchmarks/README.md)."
        )
    alone = sampler.without_same_batch()
    if alone:
        logger.info(f"{alone:,} training cells have no control in their batch; any of their cell type serves.")
    return sampler


def _validator(
    data: Dataset,
    cells: ResidentCells,
    config: TrainConfig,
    device: torch.device,
    criterion: Callable[[Tensor, Tensor], Tensor],
    team: Team,
    start: Checkpoint | None,
) -> Validator:
    """What validates; the scores of its baselines are those that the checkpoint keeps."""
    known = None if start is None else start.state.get(BASELINES)
    validator = Validator(data, cells, config, device, criterion, team, known)
    if config.monitor == "pds" and not validator.can_rank:
        raise InputError(
            "--monitor pds, but no cell type has two validation perturbations, so there is no pds. Monitor another "
            "metric, or hold out more perturbations."
        )
    return validator


def _cells_on_device(data_device: str, device: torch.device, data: Dataset) -> bool:
    """Whether the cells are kept in the GPU's memory: if they fit beside the step, or on request."""
    if device.type == "cpu":
        if data_device == "gpu":
            raise InputError("--data-device gpu, but training runs on the CPU. Use --data-device cpu.")
        return False
    needed, free = data.embeddings.nbytes + data.targets.nbytes, torch.cuda.mem_get_info(device)[0]
    fits = needed < GPU_SHARE * free
    if data_device == "gpu" and not fits:
        raise InputError(
            f"The cells take {needed / 1e9:.1f} GB, of {free / 1e9:.1f} GB free on {device}. Use --data-device cpu."
        )
    there = data_device == "gpu" or (data_device == "auto" and fits and not data.targets.on_disk)
    place = "GPU" if there else "mapped files" if data.targets.on_disk else "host"
    logger.info(f"Cells ({needed / 1e9:.2f} GB) are kept in {place}{'' if place == 'mapped files' else ' memory'}.")
    return there
