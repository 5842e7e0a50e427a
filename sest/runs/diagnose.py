"""What the curves of a run say: is it learning, has it stopped, what should be changed.

Everything is read from metrics.jsonl alone (sest.runs.curves); each finding names the figures it rests on. Thresholds
are rules of thumb, not tests: a finding says what was seen, and the advice what usually helps.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sest.runs.curves import NOT_LEARNED, NOT_MEASURABLE, VAL_PAIRS, WITH_CELLS, Curves, judged_by

GOOD, NOTE, WARNING = "good", "note", "warning"

GIVE_FEATURES = (  # where perturbations cannot be learned
    "Pass --perturbations with a file that has a vector for each, or a splits file that holds out cell types, not "
    "perturbations."
)

RISE = 0.02  # val_loss this far above its best, three validations in a row, is rising
GAP = 1.5  # val_loss above this many times the training loss stands well above it
FLAT = 0.01  # relative change below which a curve is flat
CONVERGED_STEPS = 5_000
ROUGH = 0.06  # mean jump between neighbouring windows of the training loss, relative, above which it oscillates
ROUGH_VALIDATION = 0.08  # the same between validations
WINDOWS, STEPS_A_WINDOW = 10, 20  # of the second half of the training loss, and the least steps each must hold
SPIKE = 20.0  # a gradient norm this many times the median
SKIPPED = 0.01  # share of steps skipped for a non-finite loss or gradient
DATA_WAIT = 0.05  # share of the time waiting for batches
SLOW = 0.4  # share of the limit below which a GPU is slow
HOST_STEPS = 0.5  # at a log line, a GPU that is done within this many steps' time was waiting for the host


@dataclass(frozen=True)
class Finding:
    """One thing that the curves show."""

    name: str  # such as "overfitting"
    level: str  # "good", "note" or "warning"
    evidence: str  # one sentence with the figures
    advice: str = ""  # one sentence, or a command; empty where nothing is to be done


def diagnose(
    curves: Curves,
    *,
    run: str = "RUN",
    cache: str = "CACHE",
    max_steps: int | None = None,
    patience: int | None = None,
) -> list[Finding]:
    """Findings, warnings first, then notes, then what is good.

    Args:
        curves: of the run.
        run: its folder, for commands.
        cache: what it is trained from, for commands.
        max_steps: the steps it was to take; None: its end is not known, so nothing is said about it.
        patience: validations without improvement after which it stops early; None: it does not.
    """
    found = [
        *_baselines(curves, max_steps),
        *_overfitting(curves),
        *_underfitting(curves),
        *_unstable(curves),
        *_speed(curves),
        *_end(curves, run, cache, max_steps, patience),
    ]
    order = [WARNING, NOTE, GOOD]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _finite(columns: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column where it is a number."""
    values = columns.get(name, np.full(len(columns["step"]), np.nan))
    known = np.isfinite(values)
    return columns["step"][known], values[known]


def _last(columns: dict[str, np.ndarray], name: str) -> float:
    """The last number of a column; NaN where there is none."""
    _, values = _finite(columns, name)
    return float(values[-1]) if len(values) else math.nan


def _highest(columns: dict[str, np.ndarray], name: str) -> float:
    """The largest number of a column; NaN where there is none."""
    _, values = _finite(columns, name)
    return float(values.max()) if len(values) else math.nan


def _tail(columns: dict[str, np.ndarray], name: str, share: float = 0.25) -> float:
    """Mean of the last part of a column, by steps; NaN where there is none."""
    steps, values = _finite(columns, name)
    if not len(steps):
        return math.nan
    return float(values[steps >= steps[-1] - share * (steps[-1] - steps[0])].mean())


def _baselines(curves: Curves, max_steps: int | None) -> Iterator[Finding]:
    """Whether the best validation is better than what needs no network; in its first half a run need not be."""
    steps, losses = _finite(curves.validation, "val_loss")
    if not len(losses):
        return
    best = int(losses.argmin())
    metric = judged_by(curves.validation)
    value = float(curves.validation[metric][np.flatnonzero(curves.validation["step"] == steps[best])[-1]])
    others = {name.replace("_", " "): _last(curves.validation, f"{metric}_{name}") for name in WITH_CELLS}
    others = {name: other for name, other in others.items() if math.isfinite(other)}
    if not others or not math.isfinite(value) or not len(curves.log["step"]):  # without a head nothing was trained
        return
    figures = ", ".join(f"{name} {other:.4g}" for name, other in others.items())
    text = f"Best {metric} {value:.4g}" if metric == "val_loss" else f"At the best val_loss {metric} {value:.4g}"
    text += f" at step {steps[best]:,.0f} ({figures})"
    if (n := _last(curves.validation, NOT_LEARNED)) > 0:
        yield Finding(
            "validation of perturbations that cannot be learned",
            WARNING,
            f"Perturbations held out: {n:,.0f}; training says nothing about any of them. {text}: no measure of what "
            "the head learns.",
            GIVE_FEATURES,
        )
    elif 0 < (n := _last(curves.validation, NOT_MEASURABLE)) == _last(curves.validation, VAL_PAIRS):
        yield Finding(
            "no measurable effect",
            WARNING,
            f"Validation pairs: {n:,.0f}, all of cell types where half of the real cells does not predict the other. "
            f"{text}: neither a win nor a loss.",
            "Validate where there are more cells or stronger effects; `sest evaluate` shows it for other cells.",
        )
    elif value < min(others.values()):
        yield Finding("beats the baselines", GOOD, f"{text}: lower than all of them.")
    else:
        early = max_steps is not None and steps[-1] < max_steps / 2
        yield Finding(
            "does not beat the baselines",
            NOTE if early else WARNING,
            f"{text}: predicting the {min(others, key=others.__getitem__)} is better.",
            "Train longer, raise --lr, or try --dropout 0 and --control-targets; hold the encoder against "
            "--encoder pca.",
        )


def _overfitting(curves: Curves) -> Iterator[Finding]:
    """val_loss rises while the training loss falls, or stands well above it."""
    steps, losses = _finite(curves.validation, "val_loss")
    train_steps, train = _finite(curves.log, "loss")
    if len(losses) < 2 or not len(train):
        return
    best = int(losses.argmin())
    after = losses[best + 1 :]
    now = _tail(curves.log, "loss")
    jumps = _validation_roughness(curves) > ROUGH_VALIDATION  # then the last ones may be high by chance
    if len(after) >= 3 and (after[-3:] > (1 + RISE) * losses[best]).all() and not jumps:
        at_best = float(train[np.abs(train_steps - steps[best]).argmin()])
        if now <= at_best * (1 + RISE):
            yield Finding(
                "overfitting",
                WARNING,
                f"val_loss rose from {losses[best]:.4g} at step {steps[best]:,.0f} to {losses[-1]:.4g} at step "
                f"{steps[-1]:,.0f}, while the training loss is {now:.4g} ({at_best:.4g} then).",
                "Use best/, which sest predict does; next time stop there (--early-stopping), or raise --dropout or "
                "--weight-decay, or train on more perturbations.",
            )
            return
    if now > 0 and losses[-1] > GAP * now:
        yield Finding(
            "validation far above training",
            NOTE,
            f"val_loss is {losses[-1]:.4g}, {losses[-1] / now:.1f} times the training loss ({now:.4g}).",
            "The held-out cells are harder, or the head learns its training cells by heart: compare with the "
            "baselines, then try --dropout 0 (dropout's noise passes for variation between cells), fewer layers, or "
            "--control-targets for a cell type held out whole.",
        )


def _underfitting(curves: Curves) -> Iterator[Finding]:
    """Both losses flat, and no better than predicting the controls."""
    steps, train = _finite(curves.log, "loss")
    val_steps, losses = _finite(curves.validation, "val_loss")
    controls = _last(curves.validation, "val_loss_controls")
    if len(train) < 8 or len(losses) < 2 or not math.isfinite(controls):
        return
    late = steps >= (steps[0] + steps[-1]) / 2
    middle = late & (steps < steps[0] + 0.75 * (steps[-1] - steps[0]))
    before, now = float(train[middle].mean()), float(train[late & ~middle].mean())
    recent = losses[val_steps >= (steps[0] + steps[-1]) / 2]
    val_moves = abs(recent[0] - recent[-1]) / recent[0] if len(recent) > 1 and recent[0] else 0.0
    high = now > 0.98 * controls and losses.min() > 0.98 * controls
    if high and abs(before - now) < FLAT * before and val_moves < FLAT:
        yield Finding(
            "underfitting",
            WARNING,
            f"Training loss {now:.4g} and val_loss {losses[-1]:.4g} are flat (under {FLAT:.0%} change over the last "
            f"half), and no lower than predicting the controls ({controls:.4g}).",
            f"Raise --lr (now {_highest(curves.log, 'lr'):.2g}), or --hidden and --n-layers; check that the features "
            "differ between perturbations.",
        )


def _unstable(curves: Curves) -> Iterator[Finding]:
    """The training loss or val_loss oscillates, gradients spike, or steps were skipped."""
    lr = _highest(curves.log, "lr")
    steps, _ = _finite(curves.log, "lr")
    skipped = _last(curves.log, "skipped_steps")
    lower = f"Lower --lr (now {lr:.2g}), for example to {lr / 3:.1g}, or clip harder (--clip 0.5)."
    if len(steps) and skipped > SKIPPED * steps[-1]:
        yield Finding(
            "skipped steps",
            WARNING,
            f"{skipped:,.0f} of {steps[-1]:,.0f} steps had a non-finite loss or gradient and were skipped.",
            f"{lower} In fp16, bf16 or fp32 reaches further (--precision).",
        )
    jumps = [
        ("training loss", _roughness(curves), ROUGH),
        ("val_loss", _validation_roughness(curves), ROUGH_VALIDATION),
    ]
    rough = [f"the {name} jumps by {value:.0%} on average" for name, value, most in jumps if value > most]
    _, norms = _finite(curves.log, "grad_norm")
    late = norms[len(norms) // 2 :]
    if len(late) >= 10 and late.max() > SPIKE * np.median(late) > 0:
        rough.append(f"gradient norms reach {late.max():.3g}, {late.max() / np.median(late):.0f} times their median")
    if rough:
        yield Finding("unstable", WARNING, f"Over the last half {' and '.join(rough)}.", lower)


def _roughness(curves: Curves) -> float:
    """Mean |change| between neighbouring windows of the second half of the training loss, beside its trend, over the
    mean. Windows, so that the noise of single batches averages out; 0 where too few steps are known."""
    steps, values = _finite(curves.log, "loss")
    if not len(steps):
        return 0.0
    late = steps > steps[-1] / 2
    span = steps[-1] / 2
    if late.sum() < WINDOWS or span < WINDOWS * STEPS_A_WINDOW:
        return 0.0
    window = np.ceil((steps[late] - span) / span * WINDOWS).astype(int) - 1  # a line speaks of the steps before it
    counts = np.bincount(window, minlength=WINDOWS)
    if (counts == 0).any():
        return 0.0
    return _jumps(np.bincount(window, values[late], minlength=WINDOWS) / counts)


def _validation_roughness(curves: Curves) -> float:
    steps, values = _finite(curves.validation, "val_loss")
    late = values[steps > steps[-1] / 2] if len(steps) else values
    return _jumps(late) if len(late) >= 4 else 0.0


def _jumps(values: np.ndarray) -> float:
    """Mean |change| between neighbours that is no trend, over the mean: changes around their own mean."""
    changes = np.diff(values)
    mean = float(np.abs(values).mean())
    return float(np.abs(changes - changes.mean()).mean()) / mean if mean > 0 else 0.0


def _speed(curves: Curves) -> Iterator[Finding]:
    """How fast it is, beside what the device allows; what it waits for where that is too slow."""
    speed, wait = _tail(curves.log, "it_per_s"), _tail(curves.log, "data_wait")
    limit, device_wait = _last(curves.log, "limit_it_per_s"), _tail(curves.log, "device_wait")
    if not math.isfinite(speed):
        return
    share = f", {speed / limit:.0%} of the limit of this device" if math.isfinite(limit) else ""
    text = f"{speed:.3g} it/s{share}"
    if wait > DATA_WAIT:
        yield Finding(
            "too slow: waits for data",
            WARNING,
            f"{text}; {wait:.0%} of the time the loop waits for batches.",
            "More threads prepare them with --num-workers; --data-device gpu keeps the cells in the GPU's memory; "
            "with --data-device disk a faster --scratch.",
        )
        return
    steps, _ = _finite(curves.log, "it_per_s")
    every = float(np.median(np.diff(steps))) if len(steps) > 1 else math.nan
    if device_wait * every < HOST_STEPS and speed < SLOW * limit:
        yield Finding(
            "too slow: bound by the host",
            WARNING,
            f"{text}; the GPU has finished before the host asks ({device_wait:.1%} of the time waiting for it).",
            "--compile takes the host out of the step (CUDA graphs); a larger --batch-size gives the GPU more to do.",
        )
    elif math.isfinite(device_wait) and speed < SLOW * limit:
        yield Finding(
            "too slow: bound by memory",
            NOTE,
            f"{text}; the GPU is busy all the time with less than its products could do.",
            "--compile fuses what goes over the memory; fewer genes or --precision bf16 move fewer bytes.",
        )
    else:
        yield Finding("speed", GOOD, f"{text}; {wait:.1%} of the time the loop waits for batches.")


def _end(curves: Curves, run: str, cache: str, max_steps: int | None, patience: int | None) -> Iterator[Finding]:
    """Converged, stopped early, or still falling at the end."""
    steps, train = _finite(curves.log, "loss")
    val_steps, losses = _finite(curves.validation, "val_loss")
    if not len(steps) or not len(losses):
        return
    end = steps[-1]
    best = int(losses.argmin())
    if patience is not None and max_steps is not None and end < max_steps and len(losses) - 1 - best >= patience:
        yield Finding(
            "stopped early",
            NOTE,
            f"val_loss has not been below {losses[best]:.4g} (step {val_steps[best]:,.0f}) for "
            f"{len(losses) - 1 - best} validations; training stopped at step {end:,.0f} of {max_steps:,}.",
            "best/ holds that step. A larger --patience goes on.",
        )
        return
    if end >= CONVERGED_STEPS + steps[0]:
        window = max(CONVERGED_STEPS / 10, float(np.median(np.diff(steps))))
        now = float(train[steps > end - window].mean())
        then_lines = (steps > end - CONVERGED_STEPS - window) & (steps <= end - CONVERGED_STEPS)
        then = float(train[then_lines].mean()) if then_lines.any() else math.nan
        earlier, recent = losses[val_steps <= end - CONVERGED_STEPS], losses[val_steps > end - CONVERGED_STEPS]
        not_falling = len(earlier) and len(recent) and recent.min() > (1 - FLAT) * earlier.min()
        if abs(now - then) < FLAT * then and not_falling:
            yield Finding(
                "converged",
                GOOD,
                f"Over the last {CONVERGED_STEPS:,} steps the training loss moved from {then:.4g} to {now:.4g} and "
                f"val_loss went no lower than {recent.min():.4g} ({earlier.min():.4g} before).",
                "More steps at this learning rate bring little; a lower --lr may (--resume auto --lr ...).",
            )
            return
    if max_steps is not None and end >= max_steps and _still_falling(losses, val_steps, end):
        earlier_best = losses[val_steps <= 0.75 * end].min()
        yield Finding(
            "still falling at the end",
            NOTE,
            f"val_loss fell from {earlier_best:.4g} to {losses[best]:.4g} in the last quarter of the steps.",
            f"Go on: sest train {shlex.quote(cache)} --run {shlex.quote(run)} --resume auto "
            f"--max-steps {2 * max_steps}",
        )


def _still_falling(losses: np.ndarray, steps: np.ndarray, end: float) -> bool:
    """Whether the last quarter of the steps lowered the best val_loss by more than FLAT."""
    earlier, recent = losses[steps <= 0.75 * end], losses[steps > 0.75 * end]
    return bool(len(earlier) and len(recent) and recent.min() < (1 - FLAT) * earlier.min())
