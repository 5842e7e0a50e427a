"""The stack: what is left out as what is asked is new, weights by a second way, and predictions as weighted sums."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.optimize

from helpers.effects import by_hand, new_context, query, simulated
from sest.baselines.ridge import Ridge
from sest.baselines.stack import KINDS, Stack, kinds_of, left_out, nonnegative_weights


def test_pairs_are_of_the_kind_that_says_what_is_new_about_them() -> None:
    effects = by_hand()
    assert kinds_of(effects, query(effects, 1, ["a", "b", "new"])).tolist() == [0, 0, 1]
    assert kinds_of(effects, new_context(effects, ["a", "new"], np.ones(2))).tolist() == [2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_new_in_that_way_and_every_pair_is_left_out_once(kind: str) -> None:
    effects, _ = simulated(n_genes=3)
    asked_for = []
    for learned, asked in left_out(effects, KINDS.index(kind)):
        assert not set(learned) & set(asked)
        some = effects.some(learned)
        kinds = kinds_of(some, effects.query(asked))
        assert {KINDS[code] for code in kinds} == {kind}
        asked_for += asked.tolist()
    assert len(asked_for) == len(set(asked_for))
    whole = kind != KINDS[3]  # of new contexts and perturbations a fold of each context stands for all
    assert (sorted(asked_for) == list(range(len(effects)))) == whole


def test_a_single_context_leaves_out_perturbations_and_a_single_pair_nothing() -> None:
    effects, _ = simulated(n_contexts=1, n_genes=3)
    for code in range(4):
        assert sum(len(asked) for _, asked in left_out(effects, code)) == len(effects)
    assert list(left_out(effects.some(np.array([0])), 0)) == []
    assert sum(Stack().fit(effects.some(np.array([0]))).weights_of(KINDS[0]).values()) == 0  # nothing shows more


@pytest.mark.parametrize("seed", range(8))
def test_weights_are_those_of_a_general_solver(seed: int) -> None:
    rng = np.random.default_rng(seed)
    f, y = rng.normal(size=(40, 4)), rng.normal(size=40)
    y = y + f @ rng.uniform(-0.5, 1.5, 4) * (seed % 3)
    gram, target = f.T @ f, f.T @ y
    got = nonnegative_weights(gram, target)
    found = scipy.optimize.minimize(
        lambda w: w @ gram @ w - 2 * w @ target,
        np.full(4, 0.1),
        jac=lambda w: 2 * (gram @ w - target),
        bounds=[(0, None)] * 4,
        constraints={"type": "ineq", "fun": lambda w: 1 - w.sum()},
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    np.testing.assert_allclose(got, found.x, atol=1e-4)
    assert (got >= 0).all() and got.sum() <= 1 + 1e-9


def test_predictions_are_weighted_sums_of_the_members_and_come_near_the_truth() -> None:
    effects, truth = simulated()
    asked = np.flatnonzero(effects.context == 2)
    fitted = Stack().fit(effects.some(effects.context != 2))
    query_of = effects.query(asked)
    got, weights = fitted.predict(query_of), fitted.weights["new context"]
    members = fitted.members(query_of)
    np.testing.assert_allclose(got, sum(weights[name] * members[name] for name in members), atol=1e-12)
    best = min(np.abs(member - truth[asked]).mean() for member in members.values())
    assert np.abs(got - truth[asked]).mean() < 1.1 * best


def test_where_there_is_no_effect_the_controls_have_nearly_all_the_weight() -> None:
    effects, _ = simulated(signal=0.0)
    weights = Stack().fit(effects.some(effects.context != 2)).weights_of("new context")
    members = Stack().fit(effects).members(effects.query(np.array([70])))
    assert sum(w * np.abs(members[name]).mean() for name, w in weights.items()) < 0.02


def test_weights_are_fitted_on_whole_perturbations_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    effects, _ = simulated()
    monkeypatch.setattr("sest.baselines.stack.MOST_PAIRS", 30)
    fitted = Stack().fit(effects)
    assert sum(fitted.weights_of("new context").values()) > 0.5


def test_what_a_stack_learned_makes_another_one_that_predicts_the_same_and_fits_what_counts_alone() -> None:
    effects, _ = simulated(n_genes=30)
    stack, asked = Stack().fit(effects), effects.query(np.arange(3))
    expected = stack.predict(asked)
    learned = json.loads(json.dumps(stack.learned()))  # as a checkpoint keeps it
    again = Stack(learned).fit(effects)
    np.testing.assert_array_equal(again.predict(asked), expected)
    (weights,) = learned["weights"].values()
    assert set(again._fitted) == {name for name, weight in weights.items() if weight > 0}
    ridge = again._member("ridge")
    assert isinstance(ridge, Ridge) and not hasattr(ridge, "_y")  # no penalty was tried
    assert again.learned() == learned
