"""Phase two: train the head from a store. The encoder is never imported here.

`train` reads from top to bottom: read the data, build or resume, then step, log, validate, save. A step depends on
(seed, step number) and the weights alone, so a resumed run is the run. Shapes: B sets, S cells a set, G genes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import Tensor, nn

from sest import __version__
from sest.batches import SetSampler, batch_source, store_cells
from sest.cache.schema import fsync_file, write_durably
from sest.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    copy_checkpoint,
    later_checkpoints,
    latest_checkpoint,
    optimizer_to_tensors,
    remove_unfinished,
    resumable,
    save_checkpoint,
    sizes_to_values,
    sound_checkpoint,
    step_folder,
    tensors_to_optimizer,
)
from sest.config import RESUMABLE, TrainConfig, read_toml
from sest.dataset import Dataset, read_dataset
from sest.devices import DTYPES, choose_device, choose_precision
from sest.errors import InputError, TrainingFailed, shown
from sest.features import ONE_HOT
from sest.loss import make_loss
from sest.model import HeadSizes, StateTransition, n_parameters, new_model
from sest.progress import Progress
from sest.signals import Interrupted, stop_requests
from sest.splits import TRAIN, SplitRow
from sest.validate import Validator

METRICS, CONFIG, SPLITS = "metrics.jsonl", "config.toml", "splits.toml"
PATHS = ("perturbations", "splits")  # where files lie is no part of a run's identity; their content is
NOT_COMPARED = ("precision", "features.source")  # kept in a checkpoint, but free to change when it is resumed
SAME_STEPS = ("lr", "weight_decay", "clip", "precision")  # RESUMABLE, but with others the steps are other ones
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
    on_start: Callable[[Dataset, StateTransition], None] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train the head.

    Args:
        cache: a finished store.
        run: folder for config.toml, metrics.jsonl and checkpoints; must be new unless `resume` is given.
        config: see `TrainConfig`. A resumed run keeps its own; only the fields in `RESUMABLE` may differ.
        resume: "auto" (the run's furthest sound checkpoint; its beginning before there is one), or a checkpoint folder.
        on_start: is given the data and the model once, before the first step.
        on_log: is given every line of metrics.jsonl.

    Raises:
        InputError, StoreError: bad input; nothing was trained.
        TrainingFailed: a NaN validation, or `max_bad_steps` non-finite steps in a row; the last checkpoint is kept.
        Interrupted: after SIGINT or SIGTERM; the step was finished and saved to last/.
    """
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, training=True)
    criterion = make_loss(config.loss)
    start = _find_start(run, resume, config, progress)
    data = read_dataset(cache, config, progress, feature_names=_one_hot_names(start))
    sizes = _sizes(data, config)
    identity = _identity(data, config, precision)
    if start is not None:
        _refuse_other_run(start, identity, sizes)
    state = RunState() if start is None else RunState(**start.state["run"])
    model = (new_model(sizes, config.seed) if start is None else start.model()).to(device).train()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if start is not None:
        tensors_to_optimizer(start.optimizer_tensors(), optimizer, names)
        if scaler.is_enabled() and start.state["scaler"]:  # empty after another precision
            scaler.load_state_dict(start.state["scaler"])
    data_device = _data_device(config.data_device, device, data, progress)
    store = store_cells(data.targets, data.embeddings, data.embedding_row, data_device)
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
    validator = Validator(data, store, config, device, criterion)
    features = torch.from_numpy(data.features.matrix).to(device)  # (perturbations, P)
    _open_run(run, cache, config, data, start, state.step)
    if on_start is not None:
        on_start(data, model)

    def autocast() -> Any:
        return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])

    def forward_backward(batch_number: int, micro_size: int) -> Tensor:
        """Add the gradient of one batch, in parts of `micro_size` sets; returns the batch's mean loss."""
        batch = batches.get(batch_number)
        total = torch.zeros((), device=device)
        for i in range(0, config.batch_size, micro_size):
            torch.manual_seed(_dropout_seed(config.seed, batch_number, i))  # dropout is a function of (seed, batch)
            part = slice(i, i + micro_size)
            with autocast():
                predicted = model(batch["basal"][part], features[batch["perturbation"][part]])
            loss = criterion(predicted, batch["target"][part]).sum() / config.batch_size
            scaler.scale(loss / config.accumulate).backward()
            total += loss.detach()
        return total

    def save(name: str, *, with_optimizer: bool = True) -> None:
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
        if kept_at == state.step:
            copy_checkpoint(run / step_folder(kept_at), run / LAST)
        else:
            save(LAST)

    def log(line: dict[str, Any]) -> None:
        _append(run / METRICS, line)
        if on_log is not None:
            on_log(line)

    window = _Window(device)
    metrics: dict[str, float] = {}
    micro_size, reason, kept_at = config.batch_size, "max_steps", -1
    progress.begin("Training", config.max_steps, "it", state.step)
    with (
        stop_requests() as stop,
        batch_source(sampler, store, device, config.batch_size, config.num_workers) as batches,
    ):
        while state.step < config.max_steps:
            # step: gradients of `accumulate` batches, clipped, applied unless something is not finite
            first = state.step * config.accumulate
            loss = torch.zeros((), device=device)
            try:
                for number in range(first, first + config.accumulate):
                    loss += forward_backward(number, micro_size) / config.accumulate
            except torch.OutOfMemoryError:
                micro_size = _smaller(micro_size, optimizer, progress)
                continue  # the same step again, in smaller parts: the same batch and, to rounding, the same gradient
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
                log(window.line(state, config))  # waits for the device
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
            if stop():
                save_last()
                raise Interrupted(
                    stop(), f"Stopped after step {state.step}, saved in {run / LAST}. Go on with --resume auto."
                )
            if validated and config.early_stopping and state.validations_without_improvement >= config.patience:
                reason = "early_stopping"
                break
        save_last()
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


def _find_start(run: Path, resume: str | None, config: TrainConfig, progress: Progress) -> Checkpoint | None:
    """The checkpoint to resume from; None for a new run, or one that was stopped before its first checkpoint."""
    if resume is None:
        if not _is_unused(run):
            raise InputError(f"{run} exists. Continue it with --resume auto, or choose another --run folder.")
        return None
    if not (_is_unused(run) or (run / CONFIG).is_file()):
        raise InputError(f"{run} exists and is no run folder: it has no {CONFIG}. Choose another --run folder.")
    if resume == "auto":
        if not resumable(run):
            progress.note(f"{run} has no checkpoint yet: training starts at step 0.")
            return None
        checkpoint, problems = latest_checkpoint(run)
        for problem in problems:
            progress.note(f"Passed over: {problem}")
    else:
        checkpoint = sound_checkpoint(Path(resume), to_resume=True)
        _refuse_to_mix(run, checkpoint, config)
    progress.note(f"Resuming from {checkpoint.folder} at step {checkpoint.state['step']:,}.")
    return checkpoint


def _is_unused(run: Path) -> bool:
    """Whether a run folder is yet to be made, or was not even begun when it was stopped."""
    if not run.is_dir():
        return not run.exists()
    return all(file.name.endswith(".partial") for file in run.iterdir())


def _refuse_to_mix(run: Path, start: Checkpoint, config: TrainConfig) -> None:
    """Going back in a run folder repeats the same steps; other steps would lie beside the later checkpoints there."""
    later = later_checkpoints(start) if start.folder.resolve().parent == run.resolve() else []
    before = TrainConfig.from_values(read_run_config(run)[0], str(run / CONFIG)) if later else config
    changed = [name for name in SAME_STEPS if getattr(before, name) != getattr(config, name)]
    if changed:
        options = shown("--" + name.replace("_", "-") for name in changed)
        raise InputError(
            f"{run} has later checkpoints ({shown(folder.name for folder in later)}), made with another {options}. "
            f"Go on from {start.folder.name} in another --run folder."
        )


def _one_hot_names(start: Checkpoint | None) -> tuple[str, ...] | None:
    names = start.state["features"]["names"] if start is not None else None
    return tuple(names) if names else None


def resumed_config(run: Path, resume: str, options: dict[str, Any]) -> TrainConfig:
    """The configuration of a run to resume, with the options given now on top.

    Raises:
        InputError: no configuration there, or an option that a resumed run cannot change (see `RESUMABLE`).
    """
    if resume == "auto" and _is_unused(run):
        return TrainConfig.from_values(options, "the command line")
    folder = run if resume == "auto" or (run / CONFIG).exists() else Path(resume).resolve().parent
    values, _ = read_run_config(folder)
    before = TrainConfig.from_values(values, str(folder / CONFIG))
    config = TrainConfig.from_values({**values, **options}, "the command line")
    for name in TrainConfig.names():
        old, new = getattr(before, name), getattr(config, name)
        if old != new and name not in (*RESUMABLE, *PATHS):
            raise InputError(
                f"--{name.replace('_', '-')} {new} would make another run; this one has {old}. Use a new --run."
            )
    return config


def read_run_config(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's configuration and its provenance (where its cache is).

    Raises:
        InputError: no config.toml there.
    """
    if not (run / CONFIG).is_file():
        raise InputError(f"{run} is no run folder: it has no {CONFIG}.")
    values = read_toml(run / CONFIG)
    provenance = values.pop("provenance", {})
    if "splits" in values and (run / SPLITS).exists():
        values["splits"] = str(run / SPLITS)
    return values, provenance


def _open_run(run: Path, cache: Path, config: TrainConfig, data: Dataset, start: Checkpoint | None, step: int) -> None:
    """Create or continue the run folder: configuration, splits, metrics up to the step resumed from."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        remove_unfinished(run)
        paths = {
            key: str(Path(getattr(config, key)).resolve())
            for key in PATHS
            if getattr(config, key) not in (None, ONE_HOT)
        }
        provenance = {
            "cache": data.cache.storage.url,
            "sest_version": __version__,
            "torch_version": torch.__version__,
            "resumed_from": str(start.folder) if start else "",
        }
        content = {**config.to_values(), **paths, "provenance": provenance}
        write_durably(run / CONFIG, tomli_w.dumps(content).encode())
        if config.splits:
            write_durably(run / SPLITS, Path(config.splits).read_bytes())
        lines = (run / METRICS).read_text().splitlines() if (run / METRICS).exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_durably(run / METRICS, "".join(line + "\n" for line in kept).encode())
    except OSError as error:
        raise InputError(f"Cannot write to {run}: {error.strerror}. Choose another --run folder.") from error


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a kill


def _append(path: Path, line: dict[str, Any]) -> None:
    """Add a line, to be made durable with the next checkpoint; a number that is not finite becomes null."""
    plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
    with open(path, "a") as file:
        file.write(json.dumps(plain, allow_nan=False) + "\n")


def _dropout_seed(seed: int, batch: int, part: int) -> int:
    """A seed for one forward pass, from (seed, batch number, first set)."""
    return int(np.random.SeedSequence([seed, 0xD0, batch, part]).generate_state(1, np.uint64)[0] >> 1)


def _smaller(micro_size: int, optimizer: torch.optim.Optimizer, progress: Progress) -> int:
    """Halve the sets of a forward pass after CUDA ran out of memory."""
    if micro_size == 1:
        raise InputError("Out of GPU memory with one set at a time. Use a smaller --set-size or --hidden.")
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    progress.note(
        f"Out of GPU memory: {micro_size // 2} sets a forward pass instead of {micro_size}; the batch stays the same."
    )
    return micro_size // 2


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


def _data_device(asked: str, device: torch.device, data: Dataset, progress: Progress) -> torch.device:
    """Where the cells are kept: on the GPU if they fit beside the step, else in host memory."""
    host = torch.device("cpu")
    if device.type == "cpu":
        if asked == "gpu":
            raise InputError("--data-device gpu, but training runs on the CPU. Use --data-device cpu.")
        return host
    needed = (
        data.embeddings.nbytes + data.targets.data.nbytes + data.targets.indices.nbytes + data.targets.indptr.nbytes
    )
    free = torch.cuda.mem_get_info(device)[0]
    fits = needed < GPU_SHARE * free
    if asked == "gpu" and not fits:
        raise InputError(
            f"The cells take {needed / 1e9:.1f} GB, of {free / 1e9:.1f} GB free on {device}. Use --data-device cpu."
        )
    where = device if asked == "gpu" or (asked == "auto" and fits) else host
    progress.note(f"Cells ({needed / 1e9:.2f} GB) are kept in {'GPU' if where == device else 'host'} memory.")
    return where


class _Window:
    """Sums since the last log line, kept on the device until it is written."""

    def __init__(self, device: torch.device) -> None:
        self._loss, self._norm, self._bad, self._streak, self._worst = torch.zeros(5, device=device).unbind()
        self._steps, self._paused = 0, 0.0
        self._began = self._mark = time.monotonic()
        self.worst_streak = 0

    def add(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        self._loss += torch.where(bad, 0.0, loss)
        self._norm += torch.where(bad, 0.0, norm)
        self._bad += bad
        self._streak.copy_((self._streak + 1) * bad)
        self._worst.copy_(torch.maximum(self._worst, self._streak))
        self._steps += 1
        self._mark = time.monotonic()

    def pause(self) -> None:
        """What happened since the last step (validation, saving) is no training time."""
        self._paused += time.monotonic() - self._mark
        self._mark = time.monotonic()

    def n_bad(self) -> int:
        """Skipped steps since the last line; waits for the device."""
        return int(self._bad)

    def line(self, state: RunState, config: TrainConfig) -> dict[str, Any]:
        """The log line of the steps since the last one."""
        loss, norm, bad, worst = torch.stack([self._loss, self._norm, self._bad, self._worst]).tolist()
        state.skipped_steps += int(bad)
        self.worst_streak = int(worst)
        seconds = time.monotonic() - self._began - self._paused
        good = max(self._steps - int(bad), 1)
        line = {
            "step": state.step,
            "loss": loss / good if bad < self._steps else math.nan,
            "grad_norm": norm / good if bad < self._steps else math.nan,
            "lr": config.lr,
            "it_per_s": self._steps / max(seconds, 1e-9),
            "skipped_steps": state.skipped_steps,
        }
        for tensor in (self._loss, self._norm, self._bad, self._worst):
            tensor.zero_()
        self._steps, self._paused = 0, 0.0
        self._began = self._mark = time.monotonic()
        return line


def split_lines(table: list[SplitRow]) -> list[list[str]]:
    """The rows of the split table as text."""
    return [
        [r.dataset, r.cell_type, r.split, f"{r.n_perturbations:,}", f"{r.n_perturbed_cells:,}", f"{r.n_controls:,}"]
        for r in table
    ]
