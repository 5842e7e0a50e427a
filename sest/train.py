"""Phase two: train the head from a store. The encoder is never imported here.

`train` reads from top to bottom: read the data, build or resume, then step, log, validate, save. A step depends on
(seed, step number) and the weights alone, so a resumed run is the run. Shapes: B sets, S cells a set, G genes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sest import __version__
from sest.batches import batch_source
from sest.cache.schema import fsync_file
from sest.cell_store import CellStore, store_cells
from sest.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    copy_checkpoint,
    optimizer_to_tensors,
    save_checkpoint,
    sizes_to_values,
    step_folder,
    tensors_to_optimizer,
)
from sest.config import RESUMABLE, TrainConfig
from sest.dataset import Dataset, read_dataset
from sest.devices import DTYPES, choose_device, choose_precision, faster_precision, slow_pages
from sest.dropout import dropout_keys
from sest.errors import InputError, TrainingFailed, shown
from sest.features import ONE_HOT
from sest.limit import measure_limit
from sest.loss import make_loss
from sest.model import HeadSizes, StateTransition, n_parameters, new_model
from sest.progress import STEPS, Progress
from sest.ranks import SINGLE, Ranks
from sest.run_folder import METRICS, PATHS, SCRATCH, append_metrics, find_start, one_hot_names, opened_run
from sest.sampler import SetSampler
from sest.signals import Interrupted, stop_requests
from sest.sinks import check_sinks, open_sinks
from sest.splits import TRAIN
from sest.step_memory import largest_batch
from sest.targets import remove_scratch
from sest.team import Team, team_of
from sest.validate import Validator
from sest.window import Window

NOT_COMPARED = ("precision", "features.source")  # kept in a checkpoint, but free to change when it is resumed
GPU_SHARE = 0.6  # of free GPU memory that the cells may take; the rest is for the step


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    best_step: int | None
    best_val_loss: float | None
    reason: str  # "max_steps" or "early_stopping"
    metrics: dict[str, float]  # of the last validation
    n_parameters: int


@dataclass
class RunState:
    """What changes from step to step, beside weights and moments."""

    step: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None
    val_loss: float | None = None
    validations_without_improvement: int = 0
    skipped_steps: int = 0


def train(
    cache: Path,
    run: Path,
    config: TrainConfig,
    progress: Progress,
    *,
    resume: str | None = None,
    ranks: Ranks = SINGLE,
    on_start: Callable[[Dataset, StateTransition], None] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train the head.

    Args:
        cache: a finished store.
        run: folder for config.toml, metrics.jsonl and checkpoints; must be new unless `resume` is given.
        config: see `TrainConfig`. A resumed run keeps its own; only the fields in `RESUMABLE` may differ.
        resume: "auto" (the run's furthest sound checkpoint; its beginning before there is one), or a checkpoint folder.
        ranks: of the processes that torchrun started, which one this is; the first writes all files.
        on_start: is given the data and the model once, before the first step.
        on_log: is given every line of metrics.jsonl.

    Raises:
        InputError, StoreError: bad input; nothing was trained.
        TrainingFailed: a NaN validation, or `max_bad_steps` non-finite steps in a row; the last checkpoint is kept.
        Interrupted: after SIGINT or SIGTERM; the step was finished and saved to last/.
    """
    device = choose_device(config.device)
    with team_of(ranks, device) as team:
        return _train(cache, run, config, progress, device, team, resume, on_start, on_log)


def _train(
    cache: Path,
    run: Path,
    config: TrainConfig,
    progress: Progress,
    device: torch.device,
    team: Team,
    resume: str | None,
    on_start: Callable[[Dataset, StateTransition], None] | None,
    on_log: Callable[[dict[str, Any]], None] | None,
) -> TrainResult:
    precision = choose_precision(config.precision, device, training=True)
    if config.gradients == "bf16" and device.type == "cpu":
        raise InputError("--gradients bf16 needs GPUs, which exchange gradients through NCCL. Use --gradients fp32.")
    check_sinks(config)
    if hint := faster_precision(precision, device):
        progress.note(hint)
    if hint := slow_pages(device):
        progress.note(hint)
    # float16 also where the head computes in bf16: 8 times as exact, and scaled so that it cannot overflow
    gram = torch.float16 if device.type == "cuda" and precision != "fp32" else torch.float32
    criterion = make_loss(config.loss, gram)
    start = find_start(run, resume, config, progress)
    scratch = Path(config.scratch) if config.scratch else run / SCRATCH
    data = _read_in_turn(cache, config, progress, one_hot_names(start), scratch, team)
    sizes = _sizes(data, config)
    model = (new_model(sizes, config.seed) if start is None else start.model()).to(device).train()

    def autocast() -> Any:
        return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])

    if config.batch_size == 0:
        chosen = team.size * largest_batch(model, sizes, config.set_size, criterion, autocast)
        config = dataclasses.replace(config, batch_size=-team.largest(-chosen))
        progress.note(f"{config.batch_size} sets a batch fit the free memory.")
    if config.batch_size % team.size:
        raise InputError(
            f"A batch of {config.batch_size} sets cannot be divided among {team.size} processes. Use a --batch-size "
            f"that {team.size} divides."
        )
    identity = _identity(data, config, precision)
    if start is not None:
        _refuse_other_run(start, identity, sizes)
    state = RunState() if start is None else RunState(**start.state["run"])
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if start is not None:
        tensors_to_optimizer(start.optimizer_tensors(), optimizer, names)
        if scaler.is_enabled() and start.state["scaler"]:  # empty after another precision
            scaler.load_state_dict(start.state["scaler"])
    on_device = _cells_on_device(config.data_device, device, data, progress)
    store = store_cells(data.targets, data.embeddings, data.embedding_row, device, on_device=on_device)
    sampler = SetSampler(
        data.labels,
        data.in_split(TRAIN),
        config.set_size,
        config.seed,
        same_batch=config.controls == "batch",
        control_targets=config.control_targets,
    )
    unseen = data.held_out_whole()
    if unseen and not config.control_targets:
        progress.note(
            f"The head never sees {shown(unseen)} in training. With --control-targets it learns from their control "
            "cells, which such cell types usually need (measured: benchmarks/README.md)."
        )
    alone = sampler.without_same_batch()
    if alone:
        progress.note(f"{alone:,} training cells have no control in their batch; any of their cell type serves.")
    if data.targets.on_disk:
        rate = _batches_per_second(sampler, store, config.batch_size, config.num_workers)
        progress.note(f"Batches from {scratch}: {rate:.3g} a second.")
    validator = Validator(data, store, config, device, criterion, team)
    features = torch.from_numpy(data.features.matrix).to(device)  # (perturbations, P)
    shared = team.shared(model, config.gradients)
    network: Any = shared
    if config.compile:  # on a GPU into CUDA graphs, which static shapes allow
        network = torch.compile(shared, mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
    team.wait()  # all have read what is in the folder
    per_process = config.batch_size // team.size
    limit = measure_limit(model, per_process * config.accumulate, config.set_size, DTYPES[precision])

    def forward_backward(batch_number: int, micro_size: int, last: bool) -> Tensor:
        """Add the gradient of one batch, in parts of `micro_size` sets; returns this process's share of its loss."""
        batch = batches.get(batch_number)
        keys = dropout_keys(config.seed, batch["number"])
        total = torch.zeros((), device=device)
        for i in range(0, per_process, micro_size):
            part = slice(i, i + micro_size)
            with team.apart(shared, last=last and i + micro_size >= per_process):
                with autocast():
                    predicted = network(batch["basal"][part], features[batch["perturbation"][part]], keys[part])
                loss = criterion(predicted, batch["target"][part]).sum() / config.batch_size
                scaler.scale(loss * (team.size / config.accumulate)).backward()  # gradients are averaged over the team
            total += loss.detach()
        return total

    def save(name: str, *, with_optimizer: bool = True) -> None:
        if not team.leads:
            return
        fsync_file(run / METRICS)  # lines up to this step are not written again by a run resumed from here
        save_checkpoint(
            run / name,
            {
                "sest_version": __version__,
                "step": state.step,
                "run": {**vars(state), "skipped_steps": state.skipped_steps + window.n_bad()},
                "scaler": scaler.state_dict(),
                "sizes": sizes_to_values(sizes),
                "trainable_parameters": n_parameters(model),
                "genes": list(data.targets.genes),
                **identity,
            },
            model.state_dict(),
            optimizer=optimizer_to_tensors(optimizer, names) if with_optimizer else None,
            projection={k: torch.from_numpy(v) for k, v in data.cache.projection.items()}
            if data.cache.projection
            else None,
        )

    def save_last() -> None:
        """last/ is the current step; it shares the files of the checkpoint kept at this step, where there is one."""
        if kept_at == state.step and team.leads:
            copy_checkpoint(run / step_folder(kept_at), run / LAST)
        else:
            save(LAST)

    def no_sink(line: dict[str, Any]) -> None:
        pass

    def log(line: dict[str, Any]) -> None:
        if not team.leads:
            return
        append_metrics(run / METRICS, line)
        sinks(line)
        if on_log is not None:
            on_log(line)

    window = Window(device)
    metrics: dict[str, float] = {}
    micro_size, reason, kept_at = per_process, "max_steps", -1
    with (
        opened_run(run, config, data, start, state.step) if team.leads else nullcontext(),
        stop_requests() as stop,
        batch_source(sampler, store, config.batch_size, config.num_workers, team.ranks) as batches,
        open_sinks(run, config, state.step) if team.leads else nullcontext(no_sink) as sinks,
    ):
        if on_start is not None:
            on_start(data, model)
        progress.begin("Training", config.max_steps, STEPS, state.step)
        while state.step < config.max_steps:
            # step: gradients of `accumulate` batches, clipped, applied unless something is not finite
            first = state.step * config.accumulate
            loss = torch.zeros((), device=device)
            try:
                for number in range(first, first + config.accumulate):
                    last = number == first + config.accumulate - 1
                    loss += forward_backward(number, micro_size, last) / config.accumulate
            except torch.OutOfMemoryError as error:
                micro_size = _smaller(micro_size, optimizer, team, progress, error)
                continue  # the same step again, in smaller parts: the same batch and, to rounding, the same gradient
            except torch._dynamo.exc.TorchDynamoException as error:
                raise InputError(f"--compile does not work here: {_brief_error(error)}. Leave it out.") from error
            team.sum(loss)
            scaler.unscale_(optimizer)
            norm = _clip(model, config.clip)
            bad = ~torch.isfinite(norm + loss)
            if not scaler.is_enabled():  # the scaler sets it itself
                # fused AdamW leaves weights and moments alone where this is 1
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            window.add(loss, norm, bad)
            progress.advance()

            # log
            if state.step % config.log_every == 0 or state.step == config.max_steps:
                # waits for the device
                line = window.line(state.step, config.lr, state.skipped_steps, batches.waited, limit)
                state.skipped_steps = line["skipped_steps"]
                log(line)
                if window.worst_streak >= config.max_bad_steps:
                    raise TrainingFailed(
                        f"{window.worst_streak} steps in a row before step {state.step + 1} had a non-finite loss or "
                        f"gradient. {_advice(run)}"
                    )

            # validate
            validated = False
            if state.step % config.val_every == 0 or state.step == config.max_steps:
                metrics, validated = validator.run(model, autocast), True
                improved = _judge(metrics["val_loss"], state, run)
                log({"step": state.step, **metrics})
                if improved:
                    save(BEST, with_optimizer=False)

            # save
            if state.step % config.checkpoint_every == 0:
                save(step_folder(state.step))
                kept_at = state.step
            window.pause()
            if signum := team.largest(stop()):
                save_last()
                raise Interrupted(
                    signum, f"Stopped after step {state.step}, saved in {run / LAST}. Go on with --resume auto."
                )
            if validated and config.early_stopping and state.validations_without_improvement >= config.patience:
                reason = "early_stopping"
                break
        save_last()
    if team.leads and not config.scratch:
        remove_scratch(scratch)
    return TrainResult(state.step, state.best_step, state.best_val_loss, reason, metrics, n_parameters(model))


def _sizes(data: Dataset, config: TrainConfig) -> HeadSizes:
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


def _identity(data: Dataset, config: TrainConfig, precision: str) -> dict[str, Any]:
    """What makes a run this run; kept in every checkpoint and, but for NOT_COMPARED, compared on resume."""
    cache = data.cache.attributes
    return {
        "config": {key: value for key, value in config.to_values().items() if key not in (*RESUMABLE, *PATHS)},
        "precision": precision,
        "cache_sha256": data.cache_sha256,
        "splits_sha256": data.split_file.sha256 if data.split_file else None,
        "features": {
            "source": data.features.source,
            "sha256": data.features.sha256,
            "width": data.features.width,
            "names": list(data.features.names) if data.features.source == ONE_HOT else None,
        },
        "encoder": {
            "name": cache["encoder"],
            "sha256": cache["encoder_sha256"],
            "native_dim": cache["native_dim"],
            "max_tokens": cache.get("max_tokens"),
            "projection": cache["projection"],
            "seed": cache["seed"],
            "genes": data.cache.projection_attributes.get("genes") if data.cache.projection else None,
            "licence": cache["licence"],
        },
        "scale": data.targets.scale,
        "target_sum": data.targets.target_sum,
        "columns": next(iter(data.cache.groups.values())).attributes["columns"],
    }


def _refuse_other_run(start: Checkpoint, identity: dict[str, Any], sizes: HeadSizes) -> None:
    """Refuse to continue a checkpoint with other data or another configuration; the differences are shown."""
    made, asked = _flat(start.state), _flat({**identity, "sizes": sizes_to_values(sizes)})
    different = [key for key in asked if key not in NOT_COMPARED and made.get(key) != asked[key]]
    if different:
        found = "; ".join(f"{key}: {_brief(made.get(key))} there, {_brief(asked[key])} now" for key in different)
        raise InputError(f"{start.folder} is of another run ({found}). Start a new run with another --run folder.")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by "outer.inner" names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _smaller(
    micro_size: int, optimizer: torch.optim.Optimizer, team: Team, progress: Progress, error: torch.OutOfMemoryError
) -> int:
    """Halve the sets of a forward pass after CUDA ran out of memory."""
    if team.size > 1:  # the others wait for this one's gradients
        raise InputError(
            f"Out of GPU memory on process {team.ranks.rank}. Use more processes, or a smaller --batch-size with a "
            "larger --accumulate (the same steps to rounding)."
        ) from error
    if micro_size == 1:
        raise InputError("Out of GPU memory with one set at a time. Use a smaller --set-size or --hidden.") from error
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    progress.note(
        f"Out of GPU memory: {micro_size // 2} sets a forward pass instead of {micro_size}; the batch stays the same."
    )
    return micro_size // 2


def _brief_error(error: Exception) -> str:
    return next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _clip(model: nn.Module, largest: float) -> Tensor:
    """Clip the global gradient norm (0: only measure it); returns the norm before clipping."""
    if largest > 0:
        return nn.utils.clip_grad_norm_(model.parameters(), largest)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def _advice(run: Path) -> str:
    return f"The last checkpoint is kept in {run}. Go on with --resume auto and a lower --lr, or --precision fp32."


def _judge(val_loss: float, state: RunState, run: Path) -> bool:
    """Note a validation; returns whether it is the best so far."""
    if not math.isfinite(val_loss):
        raise TrainingFailed(f"The validation loss is {val_loss} at step {state.step}. {_advice(run)}")
    state.val_loss = val_loss
    if state.best_val_loss is None or val_loss < state.best_val_loss:
        state.best_val_loss, state.best_step, state.validations_without_improvement = val_loss, state.step, 0
        return True
    state.validations_without_improvement += 1
    return False


def _read_in_turn(
    cache: Path,
    config: TrainConfig,
    progress: Progress,
    feature_names: tuple[str, ...] | None,
    scratch: Path,
    team: Team,
) -> Dataset:
    """Read the data; of several processes the first goes ahead, as it may write the files that the others map."""

    def read() -> Dataset:
        return read_dataset(cache, config, progress, feature_names=feature_names, scratch=scratch)

    if team.leads:
        data = read()
    team.wait()
    return data if team.leads else read()


def _cells_on_device(asked: str, device: torch.device, data: Dataset, progress: Progress) -> bool:
    """Whether the cells are kept in the GPU's memory: if they fit beside the step, or on request."""
    if device.type == "cpu":
        if asked == "gpu":
            raise InputError("--data-device gpu, but training runs on the CPU. Use --data-device cpu.")
        return False
    needed = data.embeddings.nbytes + data.targets.nbytes
    free = torch.cuda.mem_get_info(device)[0]
    fits = needed < GPU_SHARE * free
    if asked == "gpu" and not fits:
        raise InputError(
            f"The cells take {needed / 1e9:.1f} GB, of {free / 1e9:.1f} GB free on {device}. Use --data-device cpu."
        )
    there = asked == "gpu" or (asked == "auto" and fits and not data.targets.on_disk)
    place = "GPU" if there else "mapped files" if data.targets.on_disk else "host"
    progress.note(f"Cells ({needed / 1e9:.2f} GB) are kept in {place}{'' if place == 'mapped files' else ' memory'}.")
    return there


def _batches_per_second(sampler: SetSampler, store: CellStore, size: int, n_workers: int) -> float:
    """How fast batches come, measured on a few that no step of this run has read yet."""
    n = max(n_workers, 1)
    with batch_source(sampler, store, size, n) as batches:
        began = time.perf_counter()
        for number in range(2 * n):
            batches.get(number)
        return 2 * n / (time.perf_counter() - began)
