"""All baselines together: each by its name, as it is alone."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.effects import simulated
from sest.baselines.all import Baselines, baseline_pseudobulks
from sest.baselines.effects import BASELINES
from sest.baselines.kernel import Kernel
from sest.baselines.means import ContextMean, Controls, Nearest, PerturbationMean
from sest.baselines.ridge import Ridge
from sest.baselines.stack import Baseline, Stack


def test_every_baseline_is_what_it_is_alone_and_all_are_the_same_every_time() -> None:
    effects, _ = simulated(n_genes=40)
    asked = effects.query(np.array([0, 35, 89]))
    rest = effects.some(np.arange(len(effects)) < 60)
    got, again = Baselines().fit(rest).predict(asked), Baselines().fit(rest).predict(asked)
    alone: list[Baseline] = [Controls(), ContextMean(), PerturbationMean(), Nearest(), Ridge(), Kernel(), Stack()]
    assert list(got) == list(BASELINES)
    for name, one in zip(BASELINES, alone, strict=True):
        np.testing.assert_array_equal(got[name], again[name])
        np.testing.assert_allclose(got[name], one.fit(rest).predict(asked), err_msg=name)


def test_pseudobulks_are_the_controls_and_the_effects_not_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    effects, _ = simulated(n_genes=4)
    asked = effects.query(np.array([0, 35, 89]))
    fitted = Baselines().fit(effects)
    whole, alone = baseline_pseudobulks(fitted, asked), fitted.predict(asked)
    monkeypatch.setattr("sest.baselines.all.AT_ONCE", 2)
    for name, values in baseline_pseudobulks(fitted, asked).items():
        np.testing.assert_array_equal(values, whole[name])
        np.testing.assert_allclose(values, np.maximum(asked.control_means + alone[name], 0), rtol=1e-6, atol=1e-7)
