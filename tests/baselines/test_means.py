"""Baselines without a parameter, against values computed by hand."""

from __future__ import annotations

import numpy as np

from helpers.effects import by_hand, new_context, query
from sest.baselines.means import ContextMean, Controls, Nearest, PerturbationMean, cosines


def test_controls_say_that_nothing_happens() -> None:
    effects = by_hand()
    np.testing.assert_array_equal(Controls().fit(effects).predict(query(effects, 0, ["a", "new"])), np.zeros((2, 2)))


def test_a_context_mean_is_that_of_its_perturbations_and_of_a_new_context_that_of_all_contexts() -> None:
    effects = by_hand()
    fitted = ContextMean().fit(effects)
    np.testing.assert_allclose(fitted.predict(query(effects, 0, ["a", "new"])), [[-1.0, 0.25]] * 2)
    np.testing.assert_allclose(fitted.predict(query(effects, 1, ["b"])), [[0.0, -0.5]])
    np.testing.assert_allclose(fitted.predict(new_context(effects, ["a"], np.ones(2))), [[-0.5, -0.125]])


def test_a_perturbation_mean_is_weighted_by_cells_and_an_unseen_one_is_the_context_s() -> None:
    effects = by_hand()
    fitted = PerturbationMean().fit(effects)
    expected = [[100 / 110, -5 / 110], [-3.0, 0.5], [-1.0, 0.25]]
    np.testing.assert_allclose(fitted.predict(query(effects, 0, ["a", "b", "new"])), expected)


def test_nearest_is_the_same_perturbation_in_the_nearest_context() -> None:
    effects = by_hand()
    fitted = Nearest().fit(effects)
    np.testing.assert_array_equal(fitted.predict(query(effects, 1, ["a", "b"])), [[0.0, -0.5], [-3.0, 0.5]])
    near_k562 = new_context(effects, ["a"], np.array([1.1, 1.0]))
    near_rpe1 = new_context(effects, ["a"], np.array([1.9, 2.0]))
    np.testing.assert_array_equal(fitted.predict(near_k562), [[1.0, 0.0]])
    np.testing.assert_array_equal(fitted.predict(near_rpe1), [[0.0, -0.5]])


def test_nearest_to_an_unseen_perturbation_is_the_most_similar_one_or_the_context_s_mean() -> None:
    effects = by_hand()
    fitted = Nearest().fit(effects)
    like_b = query(effects, 0, ["new"], np.array([[0.1, 2.0]]))
    np.testing.assert_array_equal(fitted.predict(like_b), [[-3.0, 0.5]])
    np.testing.assert_allclose(fitted.predict(query(effects, 0, ["new"])), [[-1.0, 0.25]])


def test_cosines_with_a_vector_of_zeros_are_zero() -> None:
    a, b = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 2.0]])
    np.testing.assert_allclose(cosines(a, b), [[0.96, 0.8], [0.0, 0.0]])
