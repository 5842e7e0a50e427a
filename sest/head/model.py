"""The State Transition (ST) head: control cells and a perturbation in, perturbed cells out.

Shapes: B sets, S cells a set, E embedding width, P perturbation-feature width, H hidden width, G genes.
Parameter names are those of upstream's state_dict (arc-state 0.11.1, `state tx`), so that its checkpoints load.
Source of the architecture: Adduri et al. 2025, "Predicting cellular responses to perturbation across diverse contexts
with State"; the sizes of the default configuration are in docs/design.md, The head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sest.head import kernels
from sest.head.dropout import SetDropout, kept_units

RMS_NORM_EPS = 1e-6
BACKBONE_INIT_STD = 0.02  # Llama's initializer_range
VALUES_AT_ONCE = 2**18  # predicted for means of cells: a block that stays in a processor's cache


@dataclass(frozen=True)
class HeadSizes:
    """Every size of the head. The first three come from the data, the rest from the configuration."""

    dim: int  # E, width of the control-cell embeddings
    n_features: int  # P, width of a perturbation's feature vector
    n_genes: int  # G
    hidden: int = 672  # H
    n_layers: int = 4  # transformer layers
    n_heads: int = 8  # attention heads; H must divide by it
    ffn: int = 2688  # SwiGLU width
    n_encoder_layers: int = 4  # Linear layers of pert_encoder and basal_encoder
    n_decoder_layers: int = 4  # Linear layers of project_out
    dropout: float = 0.1  # in the MLPs; the transformer has none

    def to_values(self) -> dict[str, int | float]:
        """Plain values for state.json."""
        return asdict(self)

    def __post_init__(self) -> None:
        if self.hidden % self.n_heads:
            raise ValueError(f"hidden ({self.hidden}) must divide by n_heads ({self.n_heads})")


class Mlp(nn.Sequential):
    """`n_layers` Linear layers with GELU and dropout between them (parameters 0, 3, 6, 9 ...)."""

    def __init__(self, n_in: int, hidden: int, n_out: int, n_layers: int, dropout: float) -> None:
        widths = [n_in, *[hidden] * (n_layers - 1), n_out]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            if i:
                layers += [nn.GELU(), SetDropout(dropout)]
            layers.append(nn.Linear(a, b))
        super().__init__(*layers)

    @property
    def dropouts(self) -> list[SetDropout]:
        return [layer for layer in self if isinstance(layer, SetDropout)]

    def forward(self, x: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
        """(B, ..., n_in) -> (B, ..., n_out); `kept` of `kept_units`, one for each dropout, where they drop."""
        masks = iter(kept)
        for layer in self:
            x = layer(x, None, next(masks, None)) if isinstance(layer, SetDropout) else layer(x)
        return x


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, in the type of x: PyTorch's fused kernel wants both in one, and sums in float32.

    Not under autocast, which on GPUs makes it float32 from PyTorch 2.12 on and left it alone before.
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., H) -> (..., H)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SetAttention(nn.Module):
    """Multi-head attention over the cells of a set: no mask, no positions, no bias."""

    def __init__(self, hidden: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, H) -> (B, S, H)
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, heads, S, H / heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no bias."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, H) -> (B, S, H)
        gated = kernels.operator_or(kernels.plain_swiglu, kernels.swiglu, x.device)  # which is one kernel backward too
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class BackboneLayer(nn.Module):
    """A Llama layer without rotary embedding and mask: a set has no order."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden, RMS_NORM_EPS)
        self.self_attn = SetAttention(sizes.hidden, sizes.n_heads)
        self.post_attention_layernorm = RMSNorm(sizes.hidden, RMS_NORM_EPS)
        self.mlp = SwiGLU(sizes.hidden, sizes.ffn)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, H) -> (B, S, H)
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """The transformer over the cells of a set."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BackboneLayer(sizes) for _ in range(sizes.n_layers))
        self.norm = RMSNorm(sizes.hidden, RMS_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, H) -> (B, S, H)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class StateTransition(nn.Module):
    """h = basal_encoder(controls); y = ReLU(project_out(backbone(h + pert_encoder(p)) + h))."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, dropout = sizes.hidden, sizes.dropout
        self.pert_encoder = Mlp(sizes.n_features, hidden, hidden, sizes.n_encoder_layers, dropout)
        self.basal_encoder = Mlp(sizes.dim, hidden, hidden, sizes.n_encoder_layers, dropout)
        self.transformer_backbone = Backbone(sizes)
        self.project_out = Mlp(hidden, hidden, sizes.n_genes, sizes.n_decoder_layers, dropout)
        for number, layer in enumerate(layer for mlp in self._mlps for layer in mlp.dropouts):
            layer.number = number

    @property
    def _mlps(self) -> tuple[Mlp, Mlp, Mlp]:
        return self.pert_encoder, self.basal_encoder, self.project_out

    def _kept(self, keys: Tensor | None, set_size: int) -> list[Sequence[Tensor]]:
        """Which units the dropouts of each MLP keep: of a perturbation (H,), of cells (S, H)."""
        of_pert, *of_cells = ([] if not self.training or self.sizes.dropout == 0 else m.dropouts for m in self._mlps)
        cells = [layer for layers in of_cells for layer in layers]
        first = len(of_cells[0])
        pert = kept_units(of_pert, keys, (self.sizes.hidden,)).unbind() if of_pert else ()
        kept = kept_units(cells, keys, (set_size, self.sizes.hidden)).unbind() if cells else ()
        return [pert, kept[:first], kept[first:]]

    def forward(self, basal: Tensor, perturbation: Tensor, keys: Tensor | None = None) -> Tensor:
        """Predict perturbed cells.

        Args:
            basal: (B, S, E) embeddings of control cells.
            perturbation: (B, P) one feature vector a set; it is encoded once and broadcast over the cells.
            keys: (B,) int32 of `sest.head.dropout.dropout_keys`; needed in training mode with dropout.

        Returns:
            (B, S, G) log1p expression, not negative.
        """
        of_pert, of_basal, of_out = self._kept(keys, basal.shape[-2])
        controls = self.basal_encoder(basal, of_basal)  # (B, S, H)
        shift = self.pert_encoder(perturbation, of_pert).unsqueeze(-2)  # (B, 1, H)
        cells = self.project_out(self.transformer_backbone(controls + shift) + controls, of_out)
        return F.relu(cells, inplace=not torch.is_grad_enabled())

    def cell_means(self, basal: Tensor, perturbation: Tensor) -> Tensor:
        """The mean of the cells of each set that `forward` predicts, (B, G) float32; on a CPU some genes at a time.

        Args: as of `forward`; in evaluation mode.
        """
        assert not self.training
        controls = self.basal_encoder(basal)
        shift = self.pert_encoder(perturbation).unsqueeze(-2)
        cells = self.transformer_backbone(controls + shift) + controls
        *inner, last = self.project_out.children()
        for layer in inner:
            cells = layer(cells, None) if isinstance(layer, SetDropout) else layer(cells)
        assert isinstance(last, nn.Linear)
        at_once = max(VALUES_AT_ONCE // cells.shape[:-1].numel(), 1) if cells.device.type == "cpu" else len(last.bias)
        genes = zip(last.weight.split(at_once), last.bias.split(at_once), strict=True)
        alone = not torch.is_grad_enabled()
        return torch.cat([F.relu(F.linear(cells, *some), inplace=alone).float().mean(-2) for some in genes], -1)


def new_model(sizes: HeadSizes, seed: int) -> StateTransition:
    """Build a head with fresh weights that depend on the seed alone.

    Linear layers of the MLPs: uniform within 1/sqrt(fan_in) (PyTorch's default); backbone: normal(0, 0.02) (Llama's).
    """
    with torch.device("meta"):  # no weights that are overwritten
        model = StateTransition(sizes)
    _allocate(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Linear) and name.startswith("transformer_backbone."):
                module.weight.normal_(0.0, BACKBONE_INIT_STD, generator=generator)
            elif isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
    return model


def _allocate(model: nn.Module) -> None:
    """Give weights on the meta device memory, as `to_empty` does, which imports SymPy for it."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape)))
    assert not any(buffer.is_meta for buffer in model.buffers())


def n_parameters(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
