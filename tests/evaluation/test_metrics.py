"""pearson_delta, MAE and PDS against cell-eval 0.8.2's numbers, hand-computed values and their limits."""

from __future__ import annotations

import numpy as np
import pytest

from sest.evaluation.metrics import Ranking, discrimination_score, mean_absolute_error, mean_score, pearson_delta

# Six pseudobulks over six genes, controls first: log1p-like values with two decimals, drawn once. Predictions and real
# cells have different controls, and leaving out the target's own gene changes the PDS of A and B.
GENES = ["A", "B", "C", "D", "E", "F"]
PERTURBATIONS = ["A", "B", "C", "C+D", "X"]
PREDICTED = np.array([
    [2.56, 0.33, 1.39, 0.02, 1.73, 1.35],
    [1.10, 0.00, 1.18, 0.68, 1.63, 0.86],
    [2.30, 1.23, 1.77, 1.06, 1.27, 1.60],
    [0.37, 1.76, 0.49, 2.85, 1.08, 0.39],
    [1.59, 1.45, 1.74, 2.04, 0.69, 0.67],
    [0.34, 2.13, 1.34, 0.28, 1.98, 1.76],
])  # fmt: skip
REAL = np.array([
    [1.89, 1.02, 1.95, 0.16, 1.21, 0.75],
    [1.60, 0.35, 1.74, 1.09, 1.80, 0.95],
    [0.86, 1.58, 1.97, 0.74, 1.94, 1.86],
    [0.36, 1.22, 1.41, 1.89, 1.33, 0.27],
    [1.00, 0.99, 1.00, 1.92, 0.70, 0.45],
    [1.04, 1.28, 1.88, 1.16, 0.54, 1.86],
])  # fmt: skip
# What cell-eval 0.8.2 returned for cells that repeat these means (float32, hence the tolerance of 1e-6).
CELL_EVAL_PEARSON_DELTA = [0.6466628909, 0.3170164526, 0.9383557439, 0.7841919661, 0.5337234139]
CELL_EVAL_MAE = [0.3466666937, 0.5400000215, 0.4666666090, 0.3566666842, 0.7516667247]
CELL_EVAL_PDS_L1 = [1.0, 0.4, 1.0, 1.0, 0.6]
CELL_EVAL_PDS_L1_ALL_GENES = [0.8, 0.6, 1.0, 1.0, 0.6]


def test_pearson_delta_equals_cell_eval_with_each_side_against_its_own_controls() -> None:
    ours = pearson_delta(PREDICTED[1:], REAL[1:], REAL[0], PREDICTED[0])
    np.testing.assert_allclose(ours, CELL_EVAL_PEARSON_DELTA, atol=1e-6)


def test_mean_absolute_error_equals_cell_eval() -> None:
    np.testing.assert_allclose(mean_absolute_error(PREDICTED[1:], REAL[1:]), CELL_EVAL_MAE, atol=1e-6)


def test_discrimination_score_equals_cell_eval_without_the_target_gene() -> None:
    ours = discrimination_score(PREDICTED[1:], REAL[1:], REAL[0], PERTURBATIONS, GENES, PREDICTED[0])
    np.testing.assert_allclose(ours, CELL_EVAL_PDS_L1, atol=1e-12)


def test_discrimination_score_without_gene_names_equals_cell_eval_on_all_genes() -> None:
    ours = discrimination_score(PREDICTED[1:], REAL[1:], REAL[0], PERTURBATIONS, None, PREDICTED[0])
    np.testing.assert_allclose(ours, CELL_EVAL_PDS_L1_ALL_GENES, atol=1e-12)


def test_pearson_delta_ignores_the_size_of_the_effect_and_sees_its_sign() -> None:
    control = np.array([1.0, 2.0, 3.0])
    effect = np.array([[0.5, -0.2, 0.1]])
    assert pearson_delta(control + 0.01 * effect, control + effect, control)[0] == pytest.approx(1.0)
    assert pearson_delta(control - effect, control + effect, control)[0] == pytest.approx(-1.0)


def test_pearson_delta_takes_one_control_a_row() -> None:
    controls = np.stack([REAL[0], PREDICTED[0]])
    ours = pearson_delta(PREDICTED[1:3], REAL[1:3], controls)
    by_row = [pearson_delta(PREDICTED[[i + 1]], REAL[[i + 1]], controls[i])[0] for i in range(2)]
    np.testing.assert_array_equal(ours, by_row)


@pytest.mark.parametrize("rounding", [0.0, 1e-7], ids=["exactly", "up to float32 rounding"])
def test_predicting_the_controls_earns_a_pearson_delta_of_zero(rounding: float) -> None:
    """cell-eval gives NaN; and rounding noise must not be correlated as if it were an effect."""
    noise = rounding * np.random.default_rng(0).standard_normal((5, 6))
    np.testing.assert_array_equal(pearson_delta(REAL[0] + noise, REAL[1:], REAL[0]), np.zeros(5))


def test_effects_down_to_a_millionth_are_effects_however_many_genes() -> None:
    """FLAT is a standard deviation over genes: what it calls nothing does not grow with their number."""
    for n_genes in (6, 6000):
        effect = np.resize([1.0, -1.0], (1, n_genes))  # standard deviation 1
        control = np.ones(n_genes)
        for size, expected in ((2e-6, 1.0), (0.5e-6, 0.0)):
            found = pearson_delta(control + size * effect, control + effect, control)
            np.testing.assert_allclose(found, [expected], atol=1e-6)
            found = pearson_delta(control + effect, control + size * effect, control)
            np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_differences_that_float32_cannot_hold_decide_ranks() -> None:
    observed = np.array([[8.0], [8.0 + 1e-9]])
    assert discrimination_score(observed, observed, None, ["A", "B"]).tolist() == [1.0, 1.0]
    assert mean_absolute_error(observed[:1], observed[1:]) == pytest.approx(1e-9, rel=1e-6)


def test_an_effect_that_is_the_same_for_all_genes_has_pearson_delta_zero() -> None:
    assert pearson_delta(REAL[[1]], REAL[[0]] + 0.5, REAL[0]).tolist() == [0.0]


def test_nan_in_the_data_stays_nan_in_every_metric_but_never_becomes_zero() -> None:
    broken = REAL[1:].copy()
    broken[0, 0] = np.nan
    assert np.isnan(pearson_delta(broken, REAL[1:], REAL[0])[0])
    assert np.isnan(mean_absolute_error(broken, REAL[1:])[0])


def test_mean_absolute_error_by_hand() -> None:
    assert mean_absolute_error(np.array([[0.0, 1.0, 2.0]]), np.array([[1.0, 1.0, 0.0]])).tolist() == [1.0]


def test_discrimination_score_by_hand_counts_the_perturbations_that_are_nearer() -> None:
    observed = np.array([[0.0], [1.0], [2.0], [3.0]])
    predicted = np.array([[2.9], [1.1], [1.9], [0.1]])  # 0 and 3 are swapped: three others are nearer
    np.testing.assert_allclose(discrimination_score(predicted, observed, None, list("wxyz")), [0.25, 1.0, 1.0, 0.25])


def test_one_control_for_both_sides_cancels_in_the_discrimination_score() -> None:
    with_control = discrimination_score(PREDICTED[1:], REAL[1:], REAL[0], PERTURBATIONS, GENES)
    np.testing.assert_array_equal(
        with_control, discrimination_score(PREDICTED[1:], REAL[1:], None, PERTURBATIONS, GENES)
    )


def test_the_same_prediction_for_all_perturbations_averages_the_chance_score() -> None:
    n = len(PERTURBATIONS)
    same = np.repeat(REAL[[0]], n, axis=0)
    assert discrimination_score(same, REAL[1:], None, PERTURBATIONS).mean() == pytest.approx((n + 1) / (2 * n))


def test_one_prediction_for_all_is_ranked_as_each_row_alone_would_be() -> None:
    predicted = np.tile(PREDICTED[1], (5, 1))
    found = discrimination_score(predicted, REAL[1:], REAL[0], PERTURBATIONS, GENES, PREDICTED[0])
    by_hand = []
    for i, name in enumerate(PERTURBATIONS):
        kept = [j for j, gene in enumerate(GENES) if gene != name]
        distances = np.abs((predicted[i] - PREDICTED[0]) - (REAL[1:] - REAL[0]))[:, kept].sum(1)
        by_hand.append(1 - (distances < distances[i]).sum() / 5)
    np.testing.assert_allclose(found, by_hand, rtol=1e-12)


def test_equal_distances_count_half_so_that_the_order_of_names_does_not_matter() -> None:
    """cell-eval gives 1.0, 0.75, 0.5, 0.25 here, by alphabet."""
    same = np.ones((4, 3))
    np.testing.assert_allclose(discrimination_score(same, same, None, list("wxyz")), np.full(4, 1 - 1.5 / 4))


def test_only_the_gene_named_exactly_like_the_perturbation_is_left_out() -> None:
    """The knocked-out gene alone would identify A and the combination; only the single one loses it."""
    observed = np.array([[5.0, 0.0, 1.0], [0.0, 5.0, 0.0]])
    predicted = np.array([[5.0, 0.0, 0.0], [0.0, 5.0, 1.0]])
    genes = ["A", "B", "C"]
    alone = discrimination_score(predicted, observed, None, ["A", "X"], ["A", "none", "C"])
    assert alone.tolist() == [1.0, 1.0]  # gene none (5.0) still separates A
    hidden = discrimination_score(predicted[:, [0, 2]], observed[:, [0, 2]], None, ["A", "X"], ["A", "C"])
    assert hidden.tolist() == [0.5, 1.0]
    combined = discrimination_score(predicted, observed, None, ["A+B", "X"], genes)
    assert combined.tolist() == [1.0, 1.0]


def test_some_predictions_are_ranked_among_all_that_was_observed() -> None:
    effects, rows = PREDICTED[1:] - PREDICTED[0], np.array([3, 0])
    whole = discrimination_score(PREDICTED[1:], REAL[1:], REAL[0], PERTURBATIONS, GENES, PREDICTED[0])
    ranking = Ranking(REAL[1:] - REAL[0], PERTURBATIONS, GENES)
    np.testing.assert_array_equal(ranking.scores(effects[rows], rows), whole[rows])
    assert len(ranking.scores(effects[:0], rows[:0])) == 0


def test_one_perturbation_cannot_be_told_from_others_so_it_has_no_pds_and_means_leave_it_out() -> None:
    effect = np.array([[1.0, 2.0]])
    assert np.isnan(discrimination_score(effect, effect, None, ["A"])).tolist() == [True]
    assert mean_score("pds", np.array([np.nan, 1.0, 0.5])) == 0.75
    assert np.isnan(mean_score("pds", np.array([np.nan])))
    assert np.isnan(mean_score("mae", np.array([np.nan, 1.0])))  # there a NaN is a fault
