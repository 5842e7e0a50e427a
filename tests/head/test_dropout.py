"""Dropout as a function of (seed, set, layer, place)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sest.head.dropout import SetDropout, dropout_keys


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_rest_scaled_so_that_the_mean_stays(p: float) -> None:
    x = torch.ones(16, 128, 672)
    out = SetDropout(p, 3)(x, dropout_keys(0, torch.arange(16)))
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    # 1.4 million draws: five standard errors of their share
    assert float((out == 0).float().mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    per_unit = (out == 0).float().mean((0, 1))  # 2,048 draws each; five standard errors
    assert float((per_unit - p).abs().max()) < 5 * (p * (1 - p) / 2048) ** 0.5


def test_masks_of_sets_layers_and_seeds_have_nothing_to_do_with_each_other() -> None:
    x, n = torch.ones(8, 64, 256), 64 * 256
    rows = [
        (SetDropout(0.5, layer)(x, dropout_keys(seed, torch.arange(first, first + 8))) > 0).float().flatten(1)
        for layer, seed, first in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 8))
    ]
    agreement = np.corrcoef(torch.cat(rows).numpy())
    # 16,384 draws a mask: a correlation of independent ones has the standard error 1 / 128
    assert np.abs(agreement - np.eye(32)).max() < 5 / n**0.5


def test_a_mask_does_not_depend_on_which_sets_stand_beside_it() -> None:
    layer, keys = SetDropout(0.3, 2), dropout_keys(7, torch.arange(6))
    x = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(0))
    whole = layer(x, keys)
    torch.testing.assert_close(torch.cat([layer(x[:2], keys[:2]), layer(x[2:], keys[2:])]), whole, rtol=0, atol=0)
    assert torch.equal(layer(x.flip(0), keys.flip(0)), whole.flip(0))
    vectors = layer(x[:, 0], keys)  # (B, H), as in the perturbation's MLP
    assert torch.equal(vectors, whole[:, 0])


def test_without_training_or_with_p_0_nothing_happens_and_with_p_1_nothing_is_left() -> None:
    x, keys = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), dropout_keys(0, torch.arange(2))
    assert torch.equal(SetDropout(0.5).eval()(x, None), x) and torch.equal(SetDropout(0.0)(x, None), x)
    assert not SetDropout(1.0)(x, keys).any()
    with pytest.raises(ValueError, match="needs dropout keys"):
        SetDropout(0.5)(x, None)
