"""A blend: the weighted sum of its parts, kept in a checkpoint and read again."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.effects import new_context, query, simulated
from sest.baselines.all import Baselines
from sest.blend.blend import Blend, fit_blend, from_stored, to_stored
from sest.blend.weights import Weights


def blend() -> Blend:
    effects, _ = simulated(n_genes=20)
    return Blend(Baselines().fit(effects), Weights({"stack": 0.5, "head": 0.2, "anchored": 0.1}, {"stack": 0.01}, 7))


def test_its_effect_is_the_weighted_sum_and_the_rest_is_the_controls() -> None:
    one = blend()
    parts = {name: np.full(3, value) for name, value in (("stack", 1.0), ("head", 2.0), ("anchored", -1.0))}
    np.testing.assert_allclose(one.effect(parts), 0.5 + 0.4 - 0.1)
    assert one.of_head == pytest.approx(0.3) and one.weights.of_controls == pytest.approx(0.2)


def test_what_is_stored_is_the_same_blend() -> None:
    one = blend()
    again = from_stored(*to_stored(one))
    assert again.weights == one.weights and again.effects.perturbations == one.effects.perturbations
    asked = one.effects.query(np.array([0, 40]))
    np.testing.assert_allclose(again.stack.predict(asked), one.stack.predict(asked), atol=1e-5)  # float32


def test_it_says_what_counts_for_each_kind_of_pair() -> None:
    one = blend()
    (seen,) = one.said(query(one.effects, 0, ["p1", "p3"]))
    assert seen.startswith("k562 (new pair): stack 0.50 (") and seen.endswith(
        "head 0.20, anchored 0.10, controls 0.20."
    )
    (new,) = one.said(new_context(one.effects, ["p1"], np.ones(20)))
    assert new.startswith("new (new context): stack 0.50 (")


def test_a_part_that_predicts_the_effects_gets_the_weight() -> None:
    effects, truth = simulated()
    held = np.flatnonzero(effects.context == 2)
    wrong = np.random.default_rng(5).normal(size=truth[held].shape)
    parts = {"stack": wrong, "head": truth[held], "anchored": wrong}
    asked = (effects.delta[held], effects.context[held], effects.perturbation[held])
    found = fit_blend(Baselines().fit(effects.some(effects.context != 2)), parts, *asked, 0)
    assert found.weights.means["head"] > 0.5 > found.weights.means["stack"]
    alone = fit_blend(Baselines().fit(effects), {"stack": truth[held]}, *asked, 0)
    assert alone.weights.means["stack"] > 0.9 and alone.of_head == 0
