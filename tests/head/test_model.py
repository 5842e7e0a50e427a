"""The head against upstream's numbers (arc-state 0.11.1) and against itself written out plainly; its size, its
symmetries and its first weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.special
import torch
from safetensors.torch import load_file
from torch import Tensor

from sest.head.dropout import SetDropout, dropout_keys
from sest.head.loss import energy_distance
from sest.head.model import HeadSizes, RMSNorm, StateTransition, n_parameters, new_model

SMALL = HeadSizes(
    dim=6, n_features=5, n_genes=9, hidden=16, n_layers=2, n_heads=4, ffn=24, n_encoder_layers=2, n_decoder_layers=3
)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def upstream(folder: Path) -> tuple[StateTransition, dict[str, Tensor]]:
    """Upstream's weights in our head, in eval mode, and the arrays of its reference.npz."""
    made = json.loads((folder / "config.json").read_text())
    sizes = HeadSizes(
        dim=made["dim"],
        n_features=made["pert_dim"],
        n_genes=made["genes"],
        hidden=made["hidden"],
        n_layers=made["layers"],
        n_heads=made["heads"],
        ffn=made["ffn"],
        n_encoder_layers=made["mlp"],
        n_decoder_layers=made["mlp"],
    )
    weights = load_file(folder / "state.safetensors")
    frozen = weights.pop("transformer_backbone.embed_tokens.weight", None)
    assert frozen is None or not frozen.any()
    model = StateTransition(sizes)
    model.load_state_dict(weights)
    with np.load(folder / "reference.npz") as arrays:
        return model.eval(), {name: torch.from_numpy(array) for name, array in arrays.items()}


def one_vector_a_set(perturbation: Tensor) -> Tensor:
    """Upstream repeats a set's vector for every cell: (B, S, P) -> (B, P)."""
    if perturbation.ndim == 2:
        return perturbation
    assert (perturbation == perturbation[:, :1]).all()
    return perturbation[:, 0]


@pytest.mark.parametrize("at_once", [1, 12, 10_000])
def test_means_of_cells_are_those_of_the_predicted_cells(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("sest.head.model.VALUES_AT_ONCE", at_once)
    model = new_model(SMALL, seed=0).eval()
    basal, perturbation = noise(3, 4, SMALL.dim), noise(3, SMALL.n_features, seed=2)
    with torch.inference_mode():
        expected = model(basal, perturbation).mean(1)
        torch.testing.assert_close(model.cell_means(basal, perturbation), expected, rtol=0, atol=1e-6)


def test_predictions_losses_and_gradients_are_upstreams(shared_reference: Path) -> None:
    model, made = upstream(shared_reference / "st")
    predicted = model(made["basal"], one_vector_a_set(made["pert"]))
    # float32 sums of up to 96 terms in another order: 1e-7 was measured
    torch.testing.assert_close(predicted, made["pred"], rtol=0, atol=1e-6)
    losses = energy_distance(predicted, made["target"])
    # 3.3e-5 was measured: upstream's float32 Gram matrix leaves noise in the distance of a cell to itself, another one
    # on each kind of CPU (geomloss itself is 3.1e-5 from the stored loss on this one); here that distance is 0
    torch.testing.assert_close(losses, made["per_set_loss"], rtol=1e-4, atol=0)
    losses.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert {f"grad/{name}" for name in gradients} == {name for name in made if name.startswith("grad/")}
    for name, gradient in gradients.items():
        assert gradient is not None
        error = (gradient - made[f"grad/{name}"]).norm() / made[f"grad/{name}"].norm()
        assert error < 1e-4, (name, float(error))


def plain_head(model: StateTransition, basal: np.ndarray, perturbation: np.ndarray) -> np.ndarray:
    """The head of one set in float64, from its parameters alone: (S, E), (P,) -> (S, G)."""
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def mlp(name: str, x: np.ndarray) -> np.ndarray:
        for i in sorted(int(key.split(".")[1]) for key in w if key.startswith(name) and key.endswith("bias")):
            if i:
                x = x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
            x = x @ w[f"{name}.{i}.weight"].T + w[f"{name}.{i}.bias"]
        return x

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    controls = mlp("basal_encoder", basal)
    x = controls + mlp("pert_encoder", perturbation)
    for layer in (f"transformer_backbone.layers.{i}" for i in range(model.sizes.n_layers)):
        y = norm(f"{layer}.input_layernorm", x)
        q, k, v = (
            np.split(y @ w[f"{layer}.self_attn.{name}_proj.weight"].T, model.sizes.n_heads, axis=1) for name in "qkv"
        )
        heads = [
            scipy.special.softmax(a @ b.T / np.sqrt(a.shape[1]), axis=1) @ c for a, b, c in zip(q, k, v, strict=True)
        ]
        x = x + np.concatenate(heads, axis=1) @ w[f"{layer}.self_attn.o_proj.weight"].T
        y = norm(f"{layer}.post_attention_layernorm", x)
        gate = y @ w[f"{layer}.mlp.gate_proj.weight"].T
        x = x + (gate * scipy.special.expit(gate) * (y @ w[f"{layer}.mlp.up_proj.weight"].T)) @ (
            w[f"{layer}.mlp.down_proj.weight"].T
        )
    return np.maximum(mlp("project_out", norm("transformer_backbone.norm", x) + controls), 0)


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["usual", "so small that the norms' eps decides"])
def test_predictions_are_those_of_the_head_written_out_in_float64(size: float) -> None:
    model = new_model(SMALL, 0).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):  # first weights hide much: norms of 1, 0.02
            drawn = noise(*parameter.shape, seed=i)
            parameter.copy_(1 + 0.3 * drawn if "norm" in name else drawn / parameter.shape[-1] ** 0.5)
        for name in ("basal_encoder.3", "pert_encoder.3"):  # the last layers
            for parameter in model.get_submodule(name).parameters():
                parameter.mul_(size)
    basal, perturbation = noise(3, 7, 6), noise(3, 5, seed=2)
    expected = [
        plain_head(model, b.double().numpy(), p.double().numpy()) for b, p in zip(basal, perturbation, strict=True)
    ]
    # float32 sums of up to 24 terms
    torch.testing.assert_close(model(basal, perturbation).double(), torch.tensor(np.array(expected)), rtol=0, atol=1e-5)


def test_the_default_head_has_exactly_48_931_616_parameters_in_the_documented_parts() -> None:
    with torch.device("meta"):
        model = StateTransition(HeadSizes(dim=512, n_features=5120, n_genes=18_080))
    parts = {name: n_parameters(part) for name, part in model.named_children()}
    assert parts == {
        "pert_encoder": 4_798_080,
        "basal_encoder": 1_701_504,
        "transformer_backbone": 28_907_424,
        "project_out": 13_524_608,
    }
    assert n_parameters(model) == 48_931_616
    names = set(model.state_dict())
    assert {"pert_encoder.0.weight", "project_out.9.weight"} <= names
    assert "transformer_backbone.layers.0.self_attn.q_proj.weight" in names
    assert not any("embed_tokens" in name for name in names)


def test_permuting_the_cells_of_a_set_permutes_its_predictions() -> None:
    model = new_model(SMALL, 0).eval()
    basal, perturbation = noise(3, 7, 6), noise(3, 5)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    # sums over cells in another order: float32 rounding
    torch.testing.assert_close(
        model(basal[:, order], perturbation), model(basal, perturbation)[:, order], rtol=0, atol=1e-6
    )


def test_the_sets_of_a_batch_do_not_see_each_other() -> None:
    model = new_model(SMALL, 0).eval()
    basal, perturbation = noise(3, 7, 6), noise(3, 5)
    together = model(basal, perturbation)
    for i in range(3):  # matrix products of another shape round differently
        torch.testing.assert_close(model(basal[i : i + 1], perturbation[i : i + 1])[0], together[i], rtol=0, atol=1e-6)


def test_a_perturbation_encoded_once_equals_one_repeated_for_every_cell() -> None:
    model = new_model(SMALL, 0).eval()
    basal, perturbation = noise(2, 4, 6), noise(2, 5)
    controls = model.basal_encoder(basal)
    repeated = model.pert_encoder(perturbation.unsqueeze(1).expand(-1, 4, -1))
    expected = torch.relu(model.project_out(model.transformer_backbone(controls + repeated) + controls))
    torch.testing.assert_close(model(basal, perturbation), expected, rtol=0, atol=1e-6)


def test_predictions_are_not_negative() -> None:
    model = new_model(SMALL, 0).eval()
    predicted = model(noise(4, 5, 6), noise(4, 5))
    assert predicted.shape == (4, 5, 9) and (predicted >= 0).all() and (predicted > 0).any()


def test_first_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = new_model(SMALL, 3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second, other = new_model(SMALL, 3).state_dict(), new_model(SMALL, 4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.isfinite().all(), name
        if "norm" not in name:
            assert not torch.equal(value, other[name]), name


def test_first_weights_are_drawn_from_the_documented_distributions() -> None:
    model = new_model(HeadSizes(dim=64, n_features=64, n_genes=64, hidden=128, n_layers=1, ffn=512), 0)
    weight = model.basal_encoder.get_parameter("3.weight").detach()  # uniform within 1 / sqrt(128)
    assert weight.abs().max() <= 128**-0.5 and float(weight.std()) == pytest.approx((3 * 128) ** -0.5, rel=0.02)
    query = model.transformer_backbone.get_parameter("layers.0.self_attn.q_proj.weight").detach()
    # 16,384 draws: the standard error of their standard deviation is 0.6%
    assert float(query.std()) == pytest.approx(0.02, rel=0.03) and abs(float(query.mean())) < 1e-3
    assert (model.transformer_backbone.norm.weight == 1).all()


def test_dropout_acts_in_training_only_and_in_the_mlps_only() -> None:
    model = new_model(SMALL, 0)
    basal, perturbation = noise(2, 4, 6), noise(2, 5)
    assert torch.equal(model.eval()(basal, perturbation), model(basal, perturbation))
    model.train()
    keys = dropout_keys(0, torch.arange(4))
    assert not torch.equal(model(basal, perturbation, keys[:2]), model(basal, perturbation, keys[2:]))
    with pytest.raises(ValueError, match="needs dropout keys"):
        model(basal, perturbation)
    dropouts = [name for name, m in model.named_modules() if isinstance(m, SetDropout)]
    assert dropouts and not any(name.startswith("transformer_backbone") for name in dropouts)


def test_no_two_dropout_layers_of_the_head_drop_the_same_units() -> None:
    model = new_model(replace(SMALL, n_encoder_layers=4, n_decoder_layers=4, dropout=0.5), 0)
    layers = [m for m in model.modules() if isinstance(m, SetDropout)]
    assert len(layers) == 9 and {layer.p for layer in layers} == {0.5}
    ones, keys = torch.ones(8, 64, 256), dropout_keys(0, torch.arange(8))
    agreement = np.corrcoef(torch.stack([layer(ones, keys).flatten() for layer in layers]).numpy())
    # 131,072 draws a mask: five standard errors of the correlation of independent ones
    assert np.abs(agreement - np.eye(9)).max() < 5 / ones.numel() ** 0.5


def test_a_hidden_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden \(16\) must divide by n_heads \(3\)"):
        HeadSizes(dim=6, n_features=5, n_genes=9, hidden=16, n_heads=3)


def test_bf16_autocast_gives_the_float32_prediction_to_bf16_rounding_and_warns_of_nothing() -> None:
    model = new_model(SMALL, 0).eval()
    basal, perturbation = noise(2, 4, 6), noise(2, 5)
    exact = model(basal, perturbation)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(basal, perturbation)  # warnings are errors: one kernel for each norm
    assert predicted.dtype == torch.bfloat16
    torch.testing.assert_close(predicted.float(), exact, rtol=0, atol=8 * 2.0**-8 * float(exact.detach().max()))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_norm_keeps_the_type_of_its_input_whatever_autocast_does_to_norms(device: str) -> None:
    """On a GPU too, by tensors without numbers: PyTorch's own rule there changed with 2.12."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(),
        torch.no_grad(),
        torch.device(device),
    ):
        norm, x = RMSNorm(672, 1e-6), torch.empty(4, 672, dtype=torch.bfloat16)
        with torch.autocast(device, torch.bfloat16):
            assert norm(x).dtype == torch.bfloat16 and norm(x.float()).dtype == torch.float32
