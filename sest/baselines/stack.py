"""The other baselines together, each with the weight that it earned on training pairs left out of it.

Shapes as in sest.baselines.effects; B baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from typing import Any, Protocol

import numpy as np

from sest.baselines.effects import Effects, Query, some_genes
from sest.baselines.kernel import Kernel, Parameters
from sest.baselines.means import ContextMean, Nearest, PerturbationMean
from sest.baselines.ridge import Ridge

MEMBERS = ("context_mean", "perturbation_mean", "nearest", "ridge", "kernel")  # of `BASELINES`, what is stacked
FOLDS = 5
MOST_PAIRS = 600  # that weights are fitted on
NEW_CONTEXT, NEW_PERTURBATION = "new context", "new perturbation"
KINDS = ("new pair", NEW_PERTURBATION, NEW_CONTEXT, "new context and perturbation")
"""What is new about a pair to predict: only that the two were not seen together, or more. The index is 2 where the
context is new, plus 1 where the perturbation is."""


class Baseline(Protocol):
    """What predicts effects from effects; see sest.baselines.means, ridge and kernel."""

    def fit(self, effects: Effects) -> Baseline: ...

    def predict(self, query: Query) -> np.ndarray: ...


class Stack:
    """sum_b w_b f_b with w >= 0 and sum w <= 1; what is left to 1 is no effect (the controls).

    The weights are those of least squares on training pairs that were left out as the pairs to predict are new: whole
    contexts, perturbations, or pairs whose context and perturbation are both known. A pair counts as `pair_weights`
    says.
    """

    def __init__(self, learned: Mapping[str, Any] | None = None) -> None:
        """`learned`: what `learned` gave of another one that was fitted on the same effects, not to be chosen again."""
        learned = learned or {}
        self.weights: dict[str, dict[str, float]] = dict(learned.get("weights", {}))
        """Kind -> baseline -> weight, of the kinds asked for so far."""
        parameters, alphas = learned.get("kernel"), learned.get("ridge")
        self._parameters = None if parameters is None else Parameters(*parameters)
        self._alphas = None if alphas is None else (float(alphas[0]), float(alphas[1]))

    def fit(self, effects: Effects) -> Stack:
        """Members are fitted when they are first asked for anything: one without a weight never."""
        self._effects, self._fitted = effects, dict[str, Baseline]()
        return self

    def _member(self, name: str) -> Baseline:
        if name not in self._fitted:
            self._fitted[name] = _made(name, self._parameters, self._alphas).fit(self._effects)
        return self._fitted[name]

    def learned(self) -> dict[str, Any]:
        """Plain values: what was chosen for these effects, and the weights of the kinds asked for so far."""
        kernel, ridge = self._member("kernel"), self._member("ridge")
        assert isinstance(kernel, Kernel) and isinstance(ridge, Ridge) and kernel.parameters is not None
        alphas = [ridge.alpha_seen, ridge.alpha_unseen]
        return {"weights": self.weights, "kernel": list(astuple(kernel.parameters)), "ridge": alphas}

    def predict(self, query: Query, members: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """(N, G) effects; fits the weights of the kinds of pairs that are asked for the first time.

        `members`: what `members` gives for the query, where that is known.
        """
        kind = kinds_of(self._effects, query)
        result = np.zeros((len(query), self._effects.delta.shape[1]))
        for code in np.unique(kind).tolist():
            here = kind == code
            rows = slice(None) if here.all() else np.flatnonzero(here)
            weights = self.weights_of(KINDS[code])
            asked = query.some(rows)
            for name, weight in weights.items():
                if weight > 0:
                    known = self._member(name).predict(asked) if members is None else members[name][rows]
                    result[rows] += weight * known
        return result

    def members(self, query: Query) -> dict[str, np.ndarray]:
        """(N, G) effects of every baseline that is stacked."""
        return {name: self._member(name).predict(query) for name in MEMBERS}

    def weights_of(self, kind: str) -> dict[str, float]:
        """The weight of every baseline for pairs of this kind (see `KINDS`)."""
        if kind not in self.weights:
            self.weights[kind] = self._weights(KINDS.index(kind))
        return self.weights[kind]

    def _weights(self, code: int) -> dict[str, float]:
        names, kernel = MEMBERS, self._member("kernel")
        parameters = kernel.parameters if isinstance(kernel, Kernel) else None
        effects = _some_pairs(self._effects)
        effects = effects.of_genes(some_genes(effects.delta.shape[1]))
        gram, target = np.zeros((len(names), len(names))), np.zeros(len(names))
        weight = pair_weights(effects.delta, effects.context)
        for learned, asked in left_out(effects, code):
            query, some = effects.query(asked), effects.some(learned)
            f = np.stack([_made(name, parameters).fit(some).predict(query) for name in names])  # (B, n, genes)
            scaled = f * weight[asked][:, None]
            gram += np.einsum("bng,cng->bc", scaled, f)
            target += np.einsum("bng,ng->b", scaled, effects.delta[asked])
        return dict(zip(names, nonnegative_weights(gram, target).tolist(), strict=True))


def _made(name: str, parameters: Parameters | None, alphas: tuple[float, float] | None = None) -> Baseline:
    """What is stacked; the kernel with these parameters and ridge with these penalties, or with their own."""
    made: dict[str, Callable[[], Baseline]] = {
        "context_mean": ContextMean,
        "perturbation_mean": PerturbationMean,
        "nearest": Nearest,
        "ridge": lambda: Ridge(chosen=alphas),
        "kernel": lambda: Kernel(parameters),
    }
    return made[name]()


def pair_weights(delta: np.ndarray, context: np.ndarray) -> np.ndarray:
    """(n,) what each pair counts in least squares: 1 / (|its effect| |effects of its context|), root mean squares.

    1 / |effects of its context|^2 alone would leave the choice to the few strongest perturbations of a context, and
    1 / |its effect|^2 to the weakest, which are noise. Contexts count by their pairs, whatever their effects' size.

    Args:
        delta: (n, G) effects.
        context: (n,) codes.
    """
    own = (delta**2).mean(1)
    _, code = np.unique(context, return_inverse=True)
    of_context = (np.bincount(code, own) / np.bincount(code))[code]
    weights: np.ndarray = 1.0 / np.maximum(np.sqrt(own * of_context), 1e-12)
    return weights


def kinds_of(effects: Effects, query: Query) -> np.ndarray:
    """(N,) index into `KINDS` of every pair."""
    kind: np.ndarray = 2 * (effects.contexts_of(query) < 0) + (effects.perturbations_of(query) < 0)
    return kind


def left_out(effects: Effects, code: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training pairs to learn from and pairs to predict, both indices, that are new as `KINDS[code]` says.

    Where there are too few contexts or perturbations for that, pairs are left out as they can be; none of one pair.
    """
    contexts = np.unique(effects.context)
    new_context, new_perturbation = divmod(code, 2)
    fold = np.random.default_rng(len(effects.perturbations)).permutation(len(effects.perturbations)) % FOLDS
    of_perturbation = fold[effects.perturbation]
    of_pair = (of_perturbation + effects.context) % FOLDS
    everyone = np.arange(len(effects))
    if new_context and len(contexts) > 1:
        for number, context in enumerate(contexts.tolist()):
            asked = effects.context == context
            if new_perturbation:
                asked &= of_perturbation == number % FOLDS
            learned = effects.context != context
            if new_perturbation:
                learned &= of_perturbation != number % FOLDS
            if asked.any() and learned.any():
                yield everyone[learned], everyone[asked]
        return
    folds = of_perturbation if new_perturbation or len(contexts) == 1 else of_pair
    for number in np.unique(folds).tolist():
        if (folds != number).any():
            yield everyone[folds != number], everyone[folds == number]


def nonnegative_weights(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(B,) w of least w' gram w - 2 w' target with w >= 0 and sum w <= 1."""
    import scipy.optimize  # slow to import, and not needed where weights are known

    values, vectors = np.linalg.eigh(gram)
    if values[-1] <= 0:
        return np.zeros(len(target))
    root = np.sqrt(np.maximum(values, values[-1] * 1e-10))
    a, b = (vectors * root).T, (vectors.T @ target) / root  # gram = a'a, target = a'b
    weights, _ = scipy.optimize.nnls(a, b)
    if weights.sum() <= 1:
        return np.asarray(weights)
    heavy = 1e4 * root[-1]  # the optimum lies on sum w = 1
    weights, _ = scipy.optimize.nnls(np.vstack([a, heavy * np.ones(len(target))]), np.append(b, heavy))
    return np.asarray(weights / weights.sum())


def _some_pairs(effects: Effects) -> Effects:
    """At most MOST_PAIRS pairs, of whole perturbations."""
    if len(effects) <= MOST_PAIRS:
        return effects
    order = np.random.default_rng(len(effects)).permutation(len(effects.perturbations))
    counts = np.bincount(effects.perturbation, minlength=len(order))[order]
    chosen = order[: max(int(np.searchsorted(counts.cumsum(), MOST_PAIRS, side="right")), FOLDS)]
    return effects.some(np.flatnonzero(np.isin(effects.perturbation, chosen)))
