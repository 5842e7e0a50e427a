"""What the curves of a run say: is it learning, has it stopped, what should be changed.

Everything is read from metrics.jsonl alone (sest.runs.curves); each finding names the figures it rests on. Thresholds
are rules of thumb, not tests: a finding says what was seen, and the advice what usually helps.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sest.config import TrainConfig
from sest.machine.devices import compiles
from sest.runs.curves import NOT_LEARNED, NOT_MEASURABLE, VAL_PAIRS, Curves, best_of, finite, judged, steady_speed

GOOD, NOTE, WARNING = "good", "note", "warning"

GIVE_FEATURES = (  # where perturbations cannot be learned
    "Pass --perturbations with a file that has a vector for each, or a splits file that holds out cell types, not "
    "perturbations."
)

FEW_PAIRS = 10  # below, which perturbations are held out decides much
RISE = 0.02  # val_loss this far above its best, three validations in a row, is rising
GAP = 1.5  # val_loss above this many times the training loss stands well above it
FELL, STUCK = 0.8, 1.5  # a loss below this share of its first value, and above this many times the controls'
FLAT = 0.01  # relative change below which a curve is flat
CONVERGED_STEPS = 5_000
ROUGH = 0.06  # mean jump between neighbouring windows of the training loss, relative, above which it oscillates
ROUGH_VALIDATION = 0.08  # the same between validations
WINDOWS, STEPS_A_WINDOW = 10, 20  # of the second half of the training loss, and the least steps each must hold
SPIKE = 20.0  # a gradient norm this many times the median
SKIPPED, DATA_WAIT = 0.01, 0.05  # shares: of steps skipped as not finite, of the time waiting for batches
SLOW, NEARLY = 0.4, 0.7  # shares of the limit: below one a GPU is slow, above the other waiting costs little
AUTO = ("auto", "fp16")  # precisions that may be fp16
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
    config: TrainConfig = TrainConfig(),  # noqa: B008 - frozen
    encoder: str = "",
) -> list[Finding]:
    """Findings, warnings first, then notes, then what is good.

    Args:
        curves: of the run.
        run: its folder, for commands.
        cache: what it is trained from, for commands.
        max_steps: the steps it was to take; None: its end is not known, so nothing is said about it.
        patience: validations without improvement after which it stops early; None: it does not.
        config: what it was trained with: advice that it follows already is left out.
        encoder: that of its cache.
    """
    found = [
        *_overfitting(curves, config),
        *_underfitting(curves, config),
        *_unstable(curves, config),
        *_speed(curves, config),
        *_end(curves, run, cache, max_steps, patience, config.monitor),
    ]
    found = [*_baselines(curves, max_steps, config.monitor, _to_try(config, encoder, {f.name for f in found})), *found]
    order = [WARNING, NOTE, GOOD]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _to_try(config: TrainConfig, encoder: str, others: set[str]) -> str:
    """What may help a head that a baseline beats: not what it has already, or what another finding speaks against."""
    overfits = "overfitting" in others
    unstable = bool(others & {"unstable", "diverged", "skipped steps"})
    helps = {
        "train longer": not (overfits or unstable or others & {"converged", "stopped early"}),
        "raise --lr": not (overfits or unstable),
        "--dropout 0": not overfits and config.dropout > 0,
        "pass --control-targets": not config.control_targets,
        "hold the encoder against --encoder pca": encoder not in ("pca", "genes"),
    }
    tips = [tip for tip, does in helps.items() if does]
    tips = [f"try {tips[0]}", *tips[1:]] if tips and tips[0].startswith("--") else tips
    return _sentence(tips)


def _sentence(tips: list[str], last: str = " or ", between: str = ", ") -> str:
    """Tips as one sentence; "" of none."""
    text = last.join([*([between.join(tips[:-1])] if tips[1:] else []), *tips[-1:]])
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _last(columns: dict[str, np.ndarray], name: str) -> float:
    """The last number of a column; NaN where there is none."""
    _, values = finite(columns, name)
    return float(values[-1]) if len(values) else math.nan


def _tail(columns: dict[str, np.ndarray], name: str, share: float = 0.25) -> float:
    """Mean of the last part of a column, by steps; NaN where there is none."""
    steps, values = finite(columns, name)
    if not len(steps):
        return math.nan
    return float(values[steps >= steps[-1] - share * (steps[-1] - steps[0])].mean())


def _baselines(curves: Curves, max_steps: int | None, monitor: str, to_try: str) -> Iterator[Finding]:
    """Whether the best validation is better than what needs no network; in its first half a run need not be."""
    found = judged(curves.validation, monitor)
    if found is None or not found.baselines or not len(curves.log["step"]):  # without a head nothing was trained
        return
    figures = ", ".join(f"{name.replace('_', ' ')} {other:.4g}" for name, other in found.baselines.items())
    where = "Best" if found.metric == monitor else f"At the best {monitor}"
    text = f"{where} {found.metric} {found.value:.4g} at step {found.step:,.0f}"
    text += f", {found.smoothed:.4g} with the validations beside it ({figures})"
    best = f"the {found.best.replace('_', ' ')}"
    few = ""
    if 0 < found.n_pairs < FEW_PAIRS:
        few = f" These are {found.n_pairs} validation pairs: with other perturbations it may turn out differently."
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
    elif found.is_level:
        yield Finding(
            "level with the baselines",
            NOTE,
            f"{text}: no further from {best} than validations differ by chance (± {found.spread:.2g}).{few}",
            to_try,
        )
    elif found.smoothed < found.baselines[found.best]:
        yield Finding("beats the baselines", GOOD, f"{text}: lower than all of them.{few}")
    else:
        early = max_steps is not None and curves.validation["step"][-1] < max_steps / 2
        level = NOTE if early else WARNING
        yield Finding("does not beat the baselines", level, f"{text}: predicting {best} is better.{few}", to_try)


def _overfitting(curves: Curves, config: TrainConfig) -> Iterator[Finding]:
    """val_loss rises while the training loss falls, or stands well above it."""
    steps, losses = finite(curves.validation, "val_loss")
    train_steps, train = finite(curves.log, "loss")
    if len(losses) < 2 or not len(train):
        return
    best = int(losses.argmin())
    after, stop = losses[best + 1 :], "" if config.early_stopping else "stop there (--early-stopping), or "
    now, controls = _tail(curves.log, "loss"), _last(curves.validation, "val_loss_controls")
    jumps = _validation_roughness(curves) > ROUGH_VALIDATION  # then the last ones may be high by chance
    if len(after) >= 3 and (after[-3:] > (1 + RISE) * losses[best]).all() and not jumps:
        at_best = float(train[np.abs(train_steps - steps[best]).argmin()])
        if now <= at_best * (1 + RISE) and not now > controls:  # above them nothing was learned, by heart or else
            yield Finding(
                "overfitting",
                WARNING,
                f"val_loss rose from {losses[best]:.4g} at step {steps[best]:,.0f} to {losses[-1]:.4g} at step "
                f"{steps[-1]:,.0f}, while the training loss is {now:.4g} ({at_best:.4g} then).",
                f"Use best/, which sest predict does; next time {stop}raise --dropout or --weight-decay, or train on "
                "more perturbations.",
            )
            return
    if now > 0 and losses[-1] > GAP * now:
        yield Finding(
            "validation far above training",
            NOTE,
            f"val_loss is {losses[-1]:.4g}, {losses[-1] / now:.1f} times the training loss ({now:.4g}).",
            "The held-out cells are harder, or the head learns its training cells by heart: compare with the "
            f"baselines.{_against_a_gap(config)}",
        )


def _against_a_gap(config: TrainConfig) -> str:
    """What may bring val_loss closer to the training loss."""
    tips = {
        "try --dropout 0 (dropout's noise passes for variation between cells)": config.dropout > 0,
        "fewer layers": config.n_layers > 1,
        "--control-targets for a cell type held out whole": not config.control_targets,
    }
    return f" {_sentence([tip for tip, helps in tips.items() if helps])}".rstrip()


def _underfitting(curves: Curves, config: TrainConfig) -> Iterator[Finding]:
    """Both losses no better than predicting the controls: flat, or above where they were."""
    steps, train = finite(curves.log, "loss")
    val_steps, losses = finite(curves.validation, "val_loss")
    controls = _last(curves.validation, "val_loss_controls")
    if len(train) < 8 or len(losses) < 2 or not math.isfinite(controls):
        return
    late = steps >= (steps[0] + steps[-1]) / 2
    middle = late & (steps < steps[0] + 0.75 * (steps[-1] - steps[0]))
    before, now = float(train[middle].mean()), float(train[late & ~middle].mean())
    recent = losses[val_steps >= (steps[0] + steps[-1]) / 2]
    val_moves = abs(recent[0] - recent[-1]) / recent[0] if len(recent) > 1 and recent[0] else 0.0
    high = now > 0.98 * controls and losses.min() > 0.98 * controls
    if high and now > max(STUCK * controls, (1 - RISE) * before) and train.min() < FELL * train[0]:
        yield Finding(
            "diverged",
            WARNING,
            f"The training loss fell from {train[0]:.4g} to {train.min():.4g} and falls no more: {now:.4g}, "
            f"{now / controls:.1f} times what predicting the controls scores.",
            _lower_lr(curves, config),
        )
    elif high and abs(before - now) < FLAT * before and val_moves < FLAT:
        yield Finding(
            "underfitting",
            WARNING,
            f"Training loss {now:.4g} and val_loss {losses[-1]:.4g} are flat (under {FLAT:.0%} change over the last "
            f"half), and no lower than predicting the controls ({controls:.4g}).",
            f"Raise --lr (now {_lr(curves):.2g}), or --hidden and --n-layers; check that the features "
            "differ between perturbations.",
        )


def _unstable(curves: Curves, config: TrainConfig) -> Iterator[Finding]:
    """The training loss or val_loss oscillates, gradients spike, or steps were skipped."""
    steps, _ = finite(curves.log, "lr")
    skipped = _last(curves.log, "skipped_steps")
    lower = _lower_lr(curves, config)
    if len(steps) and skipped > SKIPPED * steps[-1]:
        yield Finding(
            "skipped steps",
            WARNING,
            f"{skipped:,.0f} of {steps[-1]:,.0f} steps had a non-finite loss or gradient and were skipped.",
            lower + (" In fp16, bf16 or fp32 reaches further (--precision)." if config.precision in AUTO else ""),
        )
    jumps = [
        ("training loss", _roughness(curves), ROUGH),
        ("val_loss", _validation_roughness(curves), ROUGH_VALIDATION),
    ]
    rough = [f"the {name} jumps by {value:.0%} on average" for name, value, most in jumps if value > most]
    _, norms = finite(curves.log, "grad_norm")
    late = norms[len(norms) // 2 :]
    if len(late) >= 10 and late.max() > SPIKE * np.median(late) > 0:
        rough.append(f"gradient norms reach {late.max():.3g}, {late.max() / np.median(late):.0f} times their median")
    if rough:
        yield Finding("unstable", WARNING, f"Over the last half {' and '.join(rough)}.", lower)


def _lr(curves: Curves) -> float:
    return float(finite(curves.log, "lr")[1].max(initial=0.0))


def _lower_lr(curves: Curves, config: TrainConfig) -> str:
    lr = _lr(curves)
    clip = ", or clip harder (--clip 0.5)" if not 0 < config.clip <= 0.5 else ""
    return f"Lower --lr (now {lr:.2g}), for example to {lr / 3:.1g}{clip}."


def _roughness(curves: Curves) -> float:
    """`_jumps` of windows (noise of single batches averages out) of the last half; 0 where too few steps are known."""
    steps, values = finite(curves.log, "loss")
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
    steps, values = finite(curves.validation, "val_loss")
    late = values[steps > steps[-1] / 2] if len(steps) else values
    return _jumps(late) if len(late) >= 4 and steps[-1] / 2 >= WINDOWS * STEPS_A_WINDOW else 0.0


def _jumps(values: np.ndarray) -> float:
    """Mean |change| between neighbours that is no trend, over the mean: half of how far changes differ in a row."""
    mean = float(np.abs(values).mean())
    return float(np.abs(np.diff(values, 2)).mean()) / 2 / mean if mean > 0 and len(values) > 2 else 0.0


def _speed(curves: Curves, config: TrainConfig) -> Iterator[Finding]:
    """How fast it is, beside what the device allows; what it waits for where that is too slow."""
    found = steady_speed(curves.log)
    if found is None:
        return
    speed, limit, compiled = found.it_per_s, found.limit, compiles(config.compile, "cuda", config.max_steps)
    wait, device_wait = _tail(curves.log, "data_wait"), _tail(curves.log, "device_wait")
    share = f", {found.share:.0%} of the limit of this device" if math.isfinite(limit) else ""
    text = f"{speed:.3g} it/s{share}"
    if wait > DATA_WAIT and not found.share > NEARLY:
        yield Finding(
            "too slow: waits for data",
            WARNING,
            f"{text}; {wait:.0%} of the time the loop waits for batches.",
            _for_data(config, is_gpu=math.isfinite(device_wait)),
        )
        return
    steps, _ = finite(curves.log, "it_per_s")
    every = float(np.median(np.diff(steps))) if len(steps) > 1 else math.nan
    if device_wait * every < HOST_STEPS and speed < SLOW * limit:
        tips = [] if compiled else ["--compile takes the host out of the step (CUDA graphs)"]
        yield Finding(
            "too slow: bound by the host",
            WARNING,
            f"{text}; the GPU has finished before the host asks ({device_wait:.1%} of the time waiting for it).",
            _sentence([*tips, "a larger --batch-size gives the GPU more to do"], "; "),
        )
    elif math.isfinite(device_wait) and speed < SLOW * limit:
        tips = [] if compiled else ["--compile fuses what goes over the memory"]
        tips.append(f"fewer genes{' or --precision bf16' if config.precision == 'fp32' else ''} move fewer bytes")
        yield Finding(
            "too slow: bound by memory",
            NOTE,
            f"{text}; the GPU is busy all the time with less than its products could do.",
            _sentence(tips, "; "),
        )
    else:
        yield Finding("speed", GOOD, f"{text}; {wait:.1%} of the time the loop waits for batches.")


def _for_data(config: TrainConfig, *, is_gpu: bool) -> str:
    """What helps a loop that waits for batches, on this device."""
    helps = {
        "more threads prepare them with --num-workers": config.num_workers < (os.cpu_count() or 1),
        "--data-device gpu keeps the cells in the GPU's memory": is_gpu and config.data_device != "gpu",
        "a faster disk for --scratch": config.data_device == "disk",
    }
    return _sentence([tip for tip, does in helps.items() if does], "; ", "; ")


def _end(
    curves: Curves, run: str, cache: str, max_steps: int | None, patience: int | None, monitor: str
) -> Iterator[Finding]:
    """Converged, stopped early, or still falling at the end."""
    steps, train = finite(curves.log, "loss")
    val_steps, losses = finite(curves.validation, "val_loss")
    if not len(steps) or not len(losses):
        return
    end, best, again = steps[-1], int(losses.argmin()), f"sest train {shlex.quote(cache)} --run {shlex.quote(run)}"
    watched = curves.validation.get(monitor, losses)
    stop = best_of(watched, monitor)  # what early stopping goes by
    if patience is not None and max_steps is not None and end < max_steps and stop is not None:
        since = len(watched) - 1 - stop
        if since >= patience:
            yield Finding(
                "stopped early",
                NOTE,
                f"{monitor} has not been better than {watched[stop]:.4g} (step {curves.validation['step'][stop]:,.0f}) "
                f"for {since} validations; training stopped at step {end:,.0f} of {max_steps:,}.",
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
    earlier, recent = losses[val_steps <= 0.75 * end], losses[val_steps > 0.75 * end]
    falls = len(earlier) and len(recent) and recent.min() < (1 - FLAT) * earlier.min()
    if max_steps is not None and end >= max_steps and falls and not _last(curves.validation, NOT_LEARNED) > 0:
        yield Finding(
            "still falling at the end",
            NOTE,
            f"val_loss fell from {earlier.min():.4g} to {losses[best]:.4g} in the last quarter of the steps.",
            f"Go on: {again} --resume auto --max-steps {2 * max_steps}",
        )
