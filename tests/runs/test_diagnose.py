"""What a run's curves are taken to say: on curves of real runs (data/curves), and on drawn ones for the edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sest.config import TrainConfig
from sest.runs.curves import NOT_LEARNED, NOT_MEASURABLE, VAL_PAIRS, Curves, curves_of, read_curves
from sest.runs.diagnose import Finding, diagnose

RECORDED = (
    Path(__file__).parent.parent / "fixtures" / "curves"
)  # metrics.jsonl of small runs; README.md there says which


def names(found: list[Finding]) -> list[str]:
    return [finding.name for finding in found]


def found_in(name: str, **options: Any) -> list[Finding]:
    return diagnose(read_curves(RECORDED / f"{name}.jsonl"), **options)


def drawn(
    loss: np.ndarray,
    val_loss: np.ndarray | None = None,
    *,
    every: int = 50,
    controls: float = 2.0,
    mean: float = 1.8,
    **columns: Any,
) -> Curves:
    """Curves with a log line every `every` steps, and validations spread evenly over them."""
    lines: list[dict[str, Any]] = [
        {
            "step": (i + 1) * every, "loss": float(value), "grad_norm": 0.5, "lr": 1e-3, "it_per_s": 100.0,
            "data_wait": 0.0, "skipped_steps": 0, "limit_it_per_s": 200.0,
            **{name: (v[i] if isinstance(v, np.ndarray) else v) for name, v in columns.items()},
        }
        for i, value in enumerate(loss)
    ]  # fmt: skip
    if val_loss is not None:
        steps = np.linspace(0, len(loss) * every, len(val_loss) + 1)[1:].astype(int)
        lines += [
            {"step": int(step), "val_loss": float(value), "val_loss_controls": controls,
             "val_loss_perturbation_mean": mean}
            for step, value in zip(steps, val_loss, strict=True)
        ]  # fmt: skip
    return curves_of(lines)


FALLING = np.linspace(2.0, 1.0, 40)


# ---- recorded


def test_a_run_that_learns_beats_the_baselines_and_nothing_is_wrong() -> None:
    found = found_in("learns")
    assert names(found)[:1] != ["does not beat the baselines"]
    assert "beats the baselines" in names(found) and not [f for f in found if f.level == "warning"]


def test_a_run_that_overfits_is_called_so_with_its_figures() -> None:
    curves = read_curves(RECORDED / "overfits.jsonl")
    overfitting = next(f for f in diagnose(curves) if f.name == "overfitting")
    best = int(curves.validation["val_loss"].argmin())
    assert overfitting.level == "warning" and "--early-stopping" in overfitting.advice
    assert f"{curves.validation['val_loss'][best]:.4g} at step {curves.validation['step'][best]:,.0f}" in (
        overfitting.evidence
    )


def test_too_high_a_learning_rate_is_unstable_and_the_advice_is_a_third_of_it() -> None:
    unstable = next(f for f in found_in("unstable") if f.name == "unstable")
    assert unstable.level == "warning" and "for example to 0.01," in unstable.advice  # of 0.03


def test_too_low_a_learning_rate_is_underfitting() -> None:
    assert {"underfitting", "does not beat the baselines"} <= set(names(found_in("underfits")))


def test_a_run_that_ends_too_soon_is_told_how_to_go_on() -> None:
    falling = next(f for f in found_in("falls", run="my run", cache="c.zarr", max_steps=600) if "falling" in f.name)
    assert falling.advice == "Go on: sest train c.zarr --run 'my run' --resume auto --max-steps 1200"
    assert "still falling at the end" not in names(found_in("falls"))  # its end is not known


def test_a_run_that_stopped_early_is_called_so() -> None:
    found = found_in("stops_early", max_steps=4000, patience=3)
    stopped = next(f for f in found if f.name == "stopped early")
    assert "for 3 validations" in stopped.evidence and "of 4,000" in stopped.evidence
    assert "stopped early" not in names(found_in("stops_early", max_steps=4000))  # it might have been interrupted


def test_a_run_that_waits_for_its_data_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, advised in ((16, True), (2, False)):  # as many threads as cores already
        monkeypatch.setattr("os.cpu_count", lambda n=cores: n)
        waits = next(f for f in found_in("waits") if f.name == "too slow: waits for data")
        assert ("--num-workers" in waits.advice) == advised


def test_a_run_near_its_limit_is_not_too_slow_whatever_it_waits_for() -> None:
    for speed, found in ((100.0, True), (180.0, False)):  # of 200
        waiting = diagnose(drawn(FALLING, data_wait=0.2, it_per_s=speed, limit_it_per_s=200.0))
        assert ("too slow: waits for data" in names(waiting)) == found


def test_a_run_that_moves_no_more_has_converged() -> None:
    assert "converged" in names(found_in("converges", max_steps=21_000))


CAUSES: dict[str, tuple[set[str], set[str]]] = {  # of tests/fixtures/curves: what is found, and what must not be
    "learns": ({"beats the baselines"}, {"overfitting", "unstable", "diverged", "underfitting"}),
    "too_early": ({"does not beat the baselines", "still falling at the end"}, {"overfitting", "unstable", "diverged"}),
    "short": ({"still falling at the end"}, {"overfitting", "unstable", "diverged", "underfitting"}),
    "noisy": ({"still falling at the end"}, {"overfitting", "unstable", "diverged", "underfitting"}),
    "mse": ({"still falling at the end"}, {"overfitting", "unstable", "diverged", "underfitting"}),
    "heavy_dropout": ({"validation far above training"}, {"overfitting", "unstable", "diverged", "underfitting"}),
    "stops_late": ({"stopped early"}, {"overfitting", "unstable", "diverged", "still falling at the end"}),
    "unseen": ({"validation of perturbations that cannot be learned"}, {"still falling at the end", "overfitting"}),
    "diverges": ({"diverged", "unstable"}, {"overfitting", "underfitting", "converged"}),
    "collapses": ({"diverged"}, {"overfitting", "underfitting", "converged"}),
    "unstable": ({"unstable"}, {"overfitting", "underfitting", "converged"}),
    "underfits": ({"underfitting"}, {"overfitting", "unstable", "diverged"}),
    "overfits": ({"overfitting"}, {"underfitting", "diverged", "still falling at the end"}),
    "papalexi_short": ({"does not beat the baselines", "still falling at the end"}, {"overfitting", "diverged"}),
    "no_effect": ({"no measurable effect"}, {"beats the baselines", "does not beat the baselines", "overfitting"}),
    "falls": ({"still falling at the end"}, {"overfitting", "underfitting", "diverged", "converged"}),
    "converges": ({"converged"}, {"overfitting", "underfitting", "diverged", "still falling at the end"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_runs_of_a_known_cause_are_given_it_and_no_other(name: str) -> None:
    steps = int(read_curves(RECORDED / f"{name}.jsonl").log["step"][-1])
    config, max_steps = TrainConfig(dropout=0.0), steps
    if name == "stops_late":
        config, max_steps = TrainConfig(dropout=0.0, early_stopping=True, patience=4), 2000
    patience = config.patience if config.early_stopping else None
    found = found_in(name, max_steps=max_steps, patience=patience, config=config, encoder="pca")
    wanted, wrong = CAUSES[name]
    assert wanted <= set(names(found)) and not wrong & set(names(found))
    advice = " ".join(finding.advice for finding in found)
    assert "--dropout 0" not in advice and "--encoder pca" not in advice and "gpu" not in advice  # has it, or cannot
    assert not ("raise --lr" in advice.lower() and "lower --lr (" in advice.lower())
    assert not ("train longer" in advice.lower() and {"stopped early", "converged"} & set(names(found)))


def test_advice_that_is_followed_already_is_left_out() -> None:
    curves = drawn(FALLING, np.full(5, 1.9), data_wait=0.2, device_wait=0.5)
    every = " ".join(f.advice for f in diagnose(curves))
    done = TrainConfig(
        dropout=0.0, control_targets=True, data_device="gpu", compile=True, clip=0.2, early_stopping=True
    )
    rest = " ".join(f.advice for f in diagnose(curves, config=done, encoder="pca"))
    for words in ("--dropout 0", "--control-targets", "--encoder pca", "--data-device gpu"):
        assert words in every and words not in rest, words
    rough = drawn(FALLING * np.tile([1.0, 1.0, 0.7, 0.7], 10))
    assert "--clip" in diagnose(rough)[0].advice and "--clip" not in diagnose(rough, config=done)[0].advice


def test_what_stops_early_is_judged_by_what_is_monitored() -> None:
    curves = drawn(FALLING, np.linspace(1.5, 1.0, 6))
    curves.validation["pearson_delta"] = np.array([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    config = TrainConfig(monitor="pearson_delta", early_stopping=True, patience=2)
    stopped = next(f for f in diagnose(curves, max_steps=9000, patience=2, config=config) if f.name == "stopped early")
    # each counts as its mean with the two before it, as training does: 0.4 at the fourth
    assert stopped.evidence.startswith("pearson_delta has not been better than 0.3 (step 1,333) for 2 validations")


def test_a_difference_that_validations_make_by_chance_is_level() -> None:
    noise = 0.05 * np.array([1, -1, 1, -1, 1, -1, 1, -1, 1])
    found = diagnose(drawn(FALLING, 1.8 + noise))
    level = next(f for f in found if f.name == "level with the baselines")
    # bends of 0.2 over 0.6745 and the root of 6, twice, over the root of three validations
    assert level.level == "note" and "(± 0.14)" in level.evidence and "1.817 with the validations" in level.evidence
    assert "beats the baselines" in names(diagnose(drawn(FALLING, 1.2 + noise)))
    assert "does not beat the baselines" in names(diagnose(drawn(FALLING, 2.4 + noise)))


def test_few_validation_pairs_are_said_to_be_few() -> None:
    curves = drawn(FALLING, np.linspace(1.5, 1.0, 5))
    curves.validation[VAL_PAIRS] = np.full(5, 3.0)
    assert "These are 3 validation pairs" in next(f for f in diagnose(curves) if "beats" in f.name).evidence
    curves.validation[VAL_PAIRS] = np.full(5, 30.0)
    assert "validation pairs" not in " ".join(f.evidence for f in diagnose(curves))


# ---- drawn


def test_nothing_is_said_of_a_run_without_lines() -> None:
    assert diagnose(curves_of([]), max_steps=10, patience=1) == []


def test_warnings_come_first_and_what_is_good_last() -> None:
    found = diagnose(drawn(FALLING, FALLING[::4] * 2, data_wait=0.5))
    levels = [finding.level for finding in found]
    assert levels == sorted(levels, key=["warning", "note", "good"].index) and levels[0] == "warning"


def test_one_bad_validation_is_no_overfitting() -> None:
    val = np.array([2.0, 1.5, 1.2, 1.1, 1.3])
    assert "overfitting" not in names(diagnose(drawn(FALLING, val)))
    assert "overfitting" in names(diagnose(drawn(FALLING, np.append(val, [1.3, 1.3]))))


def test_val_loss_that_rises_with_the_training_loss_is_no_overfitting() -> None:
    loss = np.concatenate([np.linspace(2, 1, 20), np.linspace(1, 3, 20)])
    val = np.array([2.0, 1.5, 1.1, 1.0, 1.2, 1.6, 2.2])
    assert "overfitting" not in names(diagnose(drawn(loss, val)))


def test_validation_far_above_training_is_a_note_with_the_ratio() -> None:
    found = diagnose(drawn(FALLING, np.linspace(3.0, 2.25, 10)))
    gap = next(f for f in found if f.name == "validation far above training")
    assert gap.level == "note" and "2.0 times" in gap.evidence  # 2.25 over the mean of the last quarter, 1.12


def test_a_smooth_curve_is_stable_and_one_that_jumps_is_not() -> None:
    assert "unstable" not in names(diagnose(drawn(FALLING)))
    zigzag = FALLING * np.tile([1.0, 1.0, 0.7, 0.7], 10)
    unstable = next(f for f in diagnose(drawn(zigzag)) if f.name == "unstable")
    assert "the training loss jumps by" in unstable.evidence


def test_noise_of_single_steps_is_no_instability() -> None:
    noise = 1 + 0.3 * np.random.default_rng(0).standard_normal(2000)
    assert "unstable" not in names(diagnose(drawn(np.linspace(2, 1, 2000) * noise, every=1)))


def test_gradients_that_spike_are_unstable() -> None:
    norms = np.full(40, 0.5)
    norms[35] = 50.0
    unstable = next(f for f in diagnose(drawn(FALLING, grad_norm=norms)) if f.name == "unstable")
    assert "gradient norms reach 50, 100 times their median" in unstable.evidence


def test_skipped_steps_are_counted() -> None:
    skipped = next(f for f in diagnose(drawn(FALLING, skipped_steps=100)) if f.name == "skipped steps")
    assert skipped.evidence.startswith("100 of 2,000 steps")
    assert "skipped steps" not in names(diagnose(drawn(FALLING, skipped_steps=2)))


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"data_wait": 0.2}, "too slow: waits for data"),
        # a line every 50 steps: 0.4% of the time is a fifth of a step
        ({"device_wait": 0.004, "it_per_s": 50.0}, "too slow: bound by the host"),
        ({"device_wait": 0.9, "it_per_s": 50.0}, "too slow: bound by memory"),
        ({"device_wait": 0.004, "it_per_s": 150.0}, "speed"),
        ({"it_per_s": 50.0}, "speed"),  # a CPU: nothing waits for anything
    ],
)
def test_a_slow_run_is_told_what_it_waits_for(columns: dict[str, Any], name: str) -> None:
    assert [n for n in names(diagnose(drawn(FALLING, **columns))) if "slow" in n or n == "speed"] == [name]


def test_a_run_that_has_not_been_seen_for_5000_steps_has_not_converged() -> None:
    flat, val = np.full(100, 1.0), np.full(10, 1.5)
    assert "converged" not in names(diagnose(drawn(flat, val, every=50)))
    assert "converged" in names(diagnose(drawn(flat, val, every=100)))
    falling = np.linspace(1.5, 1.4, 10)
    assert "converged" not in names(diagnose(drawn(flat, falling, every=100)))


def test_a_baseline_that_is_better_is_named() -> None:
    found = diagnose(drawn(FALLING, np.full(5, 1.9)))
    assert "predicting the perturbation mean is better" in found[0].evidence and found[0].level == "warning"


def test_in_its_first_half_a_run_need_not_beat_the_baselines() -> None:
    curves = drawn(FALLING, np.full(5, 1.9))  # 2,000 steps
    levels = {n: next(f.level for f in diagnose(curves, max_steps=n) if "baselines" in f.name) for n in (3000, 4001)}
    assert levels == {3000: "warning", 4001: "note"}


def test_numbers_that_are_not_finite_are_passed_over() -> None:
    loss = FALLING.copy()
    loss[5] = np.nan
    assert "beats the baselines" in names(diagnose(drawn(loss, np.array([np.nan, 1.5, 1.4]))))


def test_a_validation_of_what_cannot_be_learned_is_no_measure_however_low() -> None:
    curves = drawn(FALLING, np.linspace(1.5, 1.0, 5))
    assert "beats the baselines" in names(diagnose(curves))
    curves.validation[NOT_LEARNED] = np.full(5, 2.0)
    first = diagnose(curves)[0]
    assert (first.name, first.level) == ("validation of perturbations that cannot be learned", "warning")
    assert "held out: 2" in first.evidence and "--perturbations" in first.advice and "cell types" in first.advice
    assert "beats the baselines" not in names(diagnose(curves))


def test_a_validation_where_real_cells_show_nothing_is_no_win() -> None:
    curves = drawn(FALLING, np.linspace(1.5, 1.0, 5))
    curves.validation[VAL_PAIRS], curves.validation[NOT_MEASURABLE] = np.full(5, 9.0), np.full(5, 9.0)
    first = diagnose(curves)[0]
    assert (first.name, first.level) == ("no measurable effect", "warning")
    assert "Validation pairs: 9" in first.evidence and "neither a win nor a loss" in first.evidence
    assert "beats the baselines" not in names(diagnose(curves))
    curves.validation[NOT_MEASURABLE] = np.full(5, 4.0)
    assert "beats the baselines" in names(diagnose(curves))
