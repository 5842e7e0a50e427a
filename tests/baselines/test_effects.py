"""Effects and queries: what is known of a pair, and how far apart contexts are."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.effects import by_hand, contexts, new_context, query
from sest.baselines.effects import Effects, some_genes
from sest.errors import InputError


def test_effects_without_pairs_are_refused() -> None:
    nothing = np.zeros(0, int)
    with pytest.raises(InputError, match="No perturbed cells"):
        Effects(contexts(np.ones((1, 2))), (), np.zeros((0, 1)), np.zeros((0, 2)), nothing, nothing, nothing)


def test_what_is_asked_is_found_by_name_among_what_trained() -> None:
    effects = by_hand()
    asked = query(effects, 1, ["b", "new", "a"])
    assert effects.contexts_of(asked).tolist() == [1, 1, 1]
    assert effects.perturbations_of(asked).tolist() == [1, -1, 0]
    assert effects.contexts_of(new_context(effects, ["a"], np.ones(2))).tolist() == [-1]
    first = effects.some(np.array([0, 2]))  # without the only pair of rpe1
    assert first.contexts_of(asked).tolist() == [-1, -1, -1] and first.perturbations_of(asked).tolist() == [1, -1, 0]
    assert effects.some(np.array([1])).perturbations_of(asked).tolist() == [-1, -1, 0]


def test_a_query_of_training_pairs_and_its_parts_are_those_pairs() -> None:
    effects = by_hand()
    asked = effects.query(np.array([2, 0, 1]))
    assert asked.perturbations == ("b", "a", "a") and asked.context.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(asked.control_means, [[1, 1], [1, 1], [2, 2]])
    parts = [(part, some.perturbations) for part, some in asked.parts(2)]
    assert parts == [(slice(0, 2), ("b", "a")), (slice(2, 4), ("a",))]


def test_distances_are_means_of_squares_in_units_of_the_spread_between_cells() -> None:
    effects = by_hand()  # variance 1 + a tenth of it
    np.testing.assert_allclose(effects.distances(effects.controls), [[0, 1 / 1.1], [1 / 1.1, 0]], atol=1e-12)
    np.testing.assert_allclose(effects.gene_sd(), np.sqrt([1.1, 1.1]))


def test_genes_that_are_sampled_are_always_the_same() -> None:
    assert some_genes(5).tolist() == [0, 1, 2, 3, 4]
    chosen = some_genes(18_080)
    assert len(chosen) == 2000 == len(set(chosen.tolist())) and (chosen == some_genes(18_080)).all()


def test_some_pairs_keep_their_perturbations_alone() -> None:
    """Features of the others are not looked at: their number makes nothing slower."""
    effects = by_hand()
    few = effects.some(np.array([1])).most_cells(10)
    (name,) = few.perturbations
    assert name == effects.perturbations[effects.perturbation[1]] and few.perturbation.tolist() == [0]
    np.testing.assert_array_equal(few.features, effects.features[effects.perturbation[[1]]])
    np.testing.assert_array_equal(few.delta, effects.delta[[1]])
    assert effects.most_cells(len(effects)) is effects
