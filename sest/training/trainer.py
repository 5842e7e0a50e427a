"""What a training owns, and the four things the loop does with it: a step, a log line, a validation, a checkpoint.

Shapes: B sets, S cells a set, G genes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sest import __version__
from sest.blend.blend import Blend
from sest.cache.disk import flush
from sest.config import TrainConfig
from sest.data.batches import BatchSource
from sest.data.dataset import Dataset
from sest.errors import InputError, TrainingFailed, one_line
from sest.head.adamw import AdamW, bytes_of_state
from sest.head.average import WeightAverage
from sest.head.dropout import dropout_keys
from sest.head.model import StateTransition, n_parameters
from sest.machine.behind import Behind
from sest.machine.devices import float32_products
from sest.machine.team import Team
from sest.runs.checkpoint import (
    add_blend,
    copy_checkpoint,
    find_checkpoint,
    open_checkpoint,
    resumable,
    save_checkpoint,
    step_folder,
)
from sest.runs.curves import best_of
from sest.runs.kept import check_disk, delete_older
from sest.runs.known import CELLS, cells_to_keep, features_to_keep
from sest.runs.run_folder import METRICS, run_is_there
from sest.runs.schema import BEST, LAST
from sest.training.blend import blend_of
from sest.training.identity import projection_to_keep
from sest.training.limit import Limit
from sest.training.validate import BASELINES, Validator
from sest.training.window import WINDOW, Window, learning_rate

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """What changes from step to step, beside weights and moments."""

    step: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None
    val_loss: float | None = None
    validations_without_improvement: int = 0
    skipped_steps: int = 0
    monitored: list[float] = field(default_factory=list)  # what the run monitors, of all validations
    lines: int = 0  # of the folder's metrics.jsonl


@dataclass(eq=False)
class Trainer:
    """One process's model, optimizer, batches and state; made by `sest.training.prepare.prepare`."""

    run: Path
    config: TrainConfig
    team: Team
    device: torch.device
    data: Dataset
    model: StateTransition
    ddp: nn.Module  # the model with its loss, in DistributedDataParallel where there are several processes
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    criterion: Callable[[Tensor, Tensor], Tensor]  # (B, S, G), (B, T, G) -> (B,)
    autocast: Callable[[], AbstractContextManager[Any]]
    batches: BatchSource
    validator: Validator
    limit: Limit
    identity: dict[str, Any]
    state: RunState
    precision: str = "fp32"
    compiled: bool = False  # whether head and loss are
    origin: dict[str, Any] = field(default_factory=dict)  # for state.json: what the head was taken over from
    chosen: str = ""  # what a preset chose, and why
    window: Window = field(init=False)
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    blend: Blend | None = None  # once training has ended

    def __post_init__(self) -> None:
        self.window = Window(self.device)
        self._features = torch.from_numpy(self.data.features.matrix).to(self.device)  # (perturbations, P)
        self._n_sets = self.config.batch_size // self.team.size  # of a batch, this process's
        self._micro_size = self._n_sets  # sets a forward pass; fewer once memory ran out
        self._compile()
        self._kept_at = -1  # step of the newest checkpoint-step-N
        self.saves = Behind()  # checkpoints are copied between steps and written during the next ones
        self._kept_cells = cells_to_keep(self.data) if self.team.leads else {}  # reads some: while the cache is there
        self._average = WeightAverage(self.model, self.optimizer, self.config.ema) if self.config.ema else None

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.config.max_steps

    def _compile(self) -> None:
        """Compile the model with its loss, inside of what averages gradients; or take that back.

        On a GPU into CUDA graphs, where one of them makes all gradients of a step: the next one would write over them.
        """
        inside: Any = self.ddp if self.team.size == 1 else self.ddp.module
        if self.compiled:
            inside.compile(mode="reduce-overhead" if self._graphs else None, dynamic=False)
        else:
            inside._compiled_call_impl = None

    @property
    def _graphs(self) -> bool:
        one = self.team.size == self.config.accumulate == 1 and self._micro_size == self._n_sets
        return self.compiled and self.device.type == "cuda" and one

    # --- step

    def step(self) -> None:
        """The next optimizer step: gradients of `accumulate` batches, clipped, applied unless something is not finite.

        Nothing here waits for a GPU.

        Raises:
            InputError: not even one set fits the GPU's memory, or --compile does not work here.
        """
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self._accumulate(self.state.step)
        self.team.sum(loss)
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]  # it has what is asked for
        norm = self._clip()
        bad = ~torch.isfinite(norm + loss)
        if not self.scaler.is_enabled():  # the scaler sets it itself
            self.optimizer.found_inf = bad.float()
        self.optimizer.lr = learning_rate(self.config, self.state.step)
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]
        self.scaler.update()
        self.optimizer.zero_grad()
        self.state.step += 1
        if self._average is not None:
            self._average.update(self.state.step)
        self.window.add(loss, norm, bad)

    def _clip(self) -> Tensor:
        """Clip the global gradient norm (0: only measure it); returns the norm before clipping.

        On a GPU fused AdamW divides the gradients as it reads them, which saves a pass over them.
        """
        parameters, largest = self.model.parameters(), self.config.clip
        if largest > 0 and (self.device.type == "cpu" or self.scaler.is_enabled()):
            return nn.utils.clip_grad_norm_(parameters, largest)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if largest > 0:
            self.optimizer.grad_scale = ((norm + 1e-6) / largest).clamp_min(1.0)
        return norm

    def _accumulate(self, step: int) -> Tensor:
        """Gradients of all batches of a step; returns this process's share of the loss."""
        n = self.config.accumulate
        while True:
            loss = torch.zeros((), device=self.device)
            try:
                self.optimizer.new_moments()  # before a batch takes the memory that they need
                for number in range(step * n, (step + 1) * n):
                    loss += self._forward_backward(number, last=number == (step + 1) * n - 1) / n
                return loss
            except torch.OutOfMemoryError as error:
                self._halve(error)  # the same batch and, to rounding, the same gradient
            except Exception as error:
                if not (self.compiled and isinstance(error, torch._dynamo.exc.TorchDynamoException)):
                    raise
                if self.config.compile:
                    raise InputError(f"--compile does not work here: {one_line(error)}. Leave it out.") from error
                logger.info(f"Steps are not compiled, as that does not work here ({one_line(error)}).")
                self.compiled = False
                self._compile()
                self.optimizer.zero_grad()

    def _forward_backward(self, number: int, *, last: bool) -> Tensor:
        """Add the gradient of one batch, `_micro_size` sets at a time; returns this process's share of its loss."""
        batch = self.batches.get(number)
        keys = dropout_keys(self.config.seed, batch["number"])
        total = torch.zeros((), device=self.device)
        for i in range(0, self._n_sets, self._micro_size):
            part = slice(i, i + self._micro_size)
            alone = self.team.no_sync(self.ddp, last=last and i + self._micro_size >= self._n_sets)
            with alone, float32_products(self.precision):
                features = self._features[batch["perturbation"][part]]
                measured = batch["measured"][part] if "measured" in batch else None
                losses = self.ddp(batch["basal"][part], features, keys[part], batch["target"][part], measured)
                loss = losses.sum() / self.config.batch_size
                # gradients are averaged over the team
                self.scaler.scale(loss * (self.team.size / self.config.accumulate)).backward()
            total += loss.detach()
        return total

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Halve the sets of a forward pass after CUDA ran out of memory."""
        if self.team.size > 1:  # the others wait for this one's gradients
            raise InputError(
                f"Out of GPU memory on process {self.team.ranks.rank}. Use more processes, or a smaller --batch-size "
                "with a larger --accumulate (the same steps to rounding)."
            ) from error
        if self._micro_size == 1:
            raise InputError(
                "Out of GPU memory with one set at a time. Use a smaller --set-size or --hidden."
            ) from error
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        logger.info(
            f"Out of GPU memory: {self._micro_size // 2} sets a forward pass instead of {self._micro_size}; the batch "
            "stays the same."
        )
        self._micro_size //= 2
        self._compile()

    # --- log and evaluate

    def log_line(self) -> dict[str, Any]:
        """The line of metrics.jsonl about the steps since the last one; waits for the device."""
        state = self.state
        rate = learning_rate(self.config, state.step - 1)
        line = self.window.line(state.step, rate, state.skipped_steps, self.batches.waited, self.limit)
        state.skipped_steps = line["skipped_steps"]
        return line

    def check_steps(self) -> None:
        """Give up where too many steps in a row had a loss or gradient that is not finite; after `log_line`.

        Raises:
            TrainingFailed: `max_bad_steps` of them; the last checkpoint is kept.
        """
        if self.window.worst_streak >= self.config.max_bad_steps:
            raise TrainingFailed(
                f"{self.window.worst_streak} steps in a row before step {self.state.step + 1} had a non-finite loss or "
                f"gradient. {self._advice()}"
            )

    def evaluate(self) -> bool:
        """Validate; returns whether this is the best validation so far, by what the run monitors.

        Raises:
            TrainingFailed: it is not finite, or the cache is not there any more.
        """
        state, cache = self.state, self.data.cache
        if not cache.is_there:
            self.save_last()
            raise TrainingFailed(
                f"{cache.path} was deleted or moved while it was trained on. Step {state.step} is saved in "
                f"{self.run / LAST}; with the cache back in its place, go on with --resume auto."
            )
        with self._averaged():
            self.metrics = self.validator.run(self.model, self.autocast)
        loss = state.val_loss = self.metrics["val_loss"]
        if not math.isfinite(loss):
            raise TrainingFailed(f"The validation loss is {loss} at step {state.step}. {self._advice()}")
        monitor = self.config.monitor
        state.monitored.append(self.metrics[monitor])
        if best_of(state.monitored, monitor) == len(state.monitored) - 1:
            state.best_val_loss, state.best_step, state.validations_without_improvement = loss, state.step, 0
            return True
        state.validations_without_improvement += 1
        return False

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that predict: its own, or with --ema their average."""
        return nullcontext() if self._average is None else self._average.in_place()

    def _advice(self) -> str:
        return (
            f"The last checkpoint is kept in {self.run}. Go on with --resume auto and a lower --lr, or "
            "--precision fp32."
        )

    def out_of_memory(self) -> str:
        """What is said where the host has no memory left: what is kept, what goes on with it, what takes less."""
        self.saves.close()
        saved = resumable(self.run)
        kept = f"The last checkpoint is {saved[0].name} of {self.run}" if saved else "No checkpoint was saved yet"
        again = ": go on with --resume auto, where memory is free or with --data-device disk" if saved else ""
        return (
            f"Out of host memory after step {self.state.step:,}. {kept}{again}. A new run with a smaller --batch-size, "
            "--set-size or --hidden takes less."
        )

    # --- save

    def check_disk(self) -> None:
        """Say what the checkpoints of the steps ahead will take; where there are none ahead, nothing.

        Raises:
            InputError: the disk cannot hold them.
        """
        if not self.team.leads or self.finished:
            return
        kept = (self.model.state_dict(), projection_to_keep(self.data), features_to_keep(self.data))
        best = sum(tensor.nbytes for tensors in kept for tensor in (tensors or {}).values())
        moments = bytes_of_state(self.model.parameters(), averaged=self._average is not None)
        check_disk(
            self.run,
            self.config,
            self.state.step,
            n_bytes=best + moments,
            best_bytes=best if self.state.best_step is None else 0,
        )

    def save_best(self) -> None:
        """best/: the head alone, for predictions."""
        with self._averaged():
            self._save(BEST, with_optimizer=False)

    def save_step(self) -> None:
        """checkpoint-step-N/, which stays, or with --keep-last until enough newer ones are there."""
        self._save(step_folder(self.state.step))
        self._kept_at = self.state.step

    def save_last(self) -> None:
        """last/: the present step; it shares the files of the checkpoint kept at this step, where there is one.

        All checkpoints are on the disk when this returns.
        """
        if self._kept_at != self.state.step:
            self._save(LAST)
        elif self.team.leads:
            self._write(partial(copy_checkpoint, self.run / step_folder(self._kept_at), self.run / LAST))
        self.saves.wait()

    def close(self) -> None:
        """Checkpoints that are copied are written; threads end."""
        self.saves.close()
        self.batches.close()

    def _write(self, work: Callable[[], None]) -> None:
        """Have a checkpoint written while the next steps are taken."""
        step = self.state.step

        def write() -> None:
            with run_is_there(self.run):
                flush(self.run / METRICS)  # lines up to this step are not written again by a run resumed from here
                work()
                if self.config.keep_last:
                    delete_older(self.run, step, self.config.keep_last)

        self.saves.do(write)

    def save_blend(self) -> None:
        """Fit what head and baselines are to count in predictions, and put it into best/."""
        if not self.team.leads or self.state.best_step is None:
            return
        best, known = open_checkpoint(find_checkpoint(self.run, BEST), check=False), self.validator
        model = best.model().to(self.device)
        self.blend = blend_of(
            model, self.data, known.cells, known.held, known.not_measurable, self.config, self.autocast
        )
        add_blend(best.folder, self.blend)

    def _save(self, name: str, *, with_optimizer: bool = True) -> None:
        if not self.team.leads:
            return
        names = [parameter for parameter, _ in self.model.named_parameters()]
        save_checkpoint(
            self.run / name,
            {
                "sest_version": __version__,
                "step": self.state.step,
                "run": {**vars(self.state), "skipped_steps": self.state.skipped_steps + self.window.n_bad()},
                WINDOW: self.window.to_values(),
                "scaler": self.scaler.state_dict(),
                "sizes": self.model.sizes.to_values(),
                "trainable_parameters": n_parameters(self.model),
                "genes": list(self.data.targets.genes),
                CELLS: self._kept_cells,
                BASELINES: self.validator.to_keep(),
                **self.origin,
                **self.identity,
            },
            self.model.state_dict(),
            optimizer=self.optimizer.to_tensors(names) if with_optimizer else None,
            projection=projection_to_keep(self.data),
            features=features_to_keep(self.data),
            write=self._write,
        )
