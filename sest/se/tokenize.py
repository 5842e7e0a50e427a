"""Cells to sentences of genes, as the State Embedding model reads them.

Shapes: B cells, K kept genes (those of the file that the encoder knows), L = pad_length slots (slot 0 is CLS).
Source: `state emb transform` of arc-state 0.11.1 (docs/design.md, The encoder, exactly: steps 1, 3 and 4). Upstream
breaks ties at random; here the order is a hash of (seed, cell index, gene), so that a sentence depends on nothing else.

Genes are ordered by the values of the file, and log1p of counts serves the shares alone: the last bit of a float32
log1p differs between a CPU and a GPU, and counts above half a million can share one. This is the form for GPUs;
`sest.se.tokenize_cpu` gives the same sentences on a CPU and makes nothing dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sest.head.mix import mix32


def cell_keys(seed: int, cells: Tensor) -> Tensor:
    """Hash of (seed, cell index): (B,) int64 row numbers in the file -> (B,) int32."""
    start = mix32(torch.full_like(cells, seed ^ 0x5E57).to(torch.int32))  # keeps the lower 32 bits
    return mix32(mix32(start ^ cells.to(torch.int32)) ^ (cells >> 32).to(torch.int32))


def sentences(values: Tensor, tokens: Tensor, keys: Tensor, pad_length: int) -> Tensor:
    """Choose the genes of every cell's sentence.

    The pad_length - 1 genes with the largest value, descending, ties by hash. With fewer kept genes than slots: the
    expressed ones first, then unexpressed ones drawn with replacement (all kept genes, where every one is expressed).

    Args:
        values: (B, K) float32, counts or log1p, neither negative nor -0.
        tokens: (K,) int32 token of every kept gene (its index in the encoder's gene table).
        keys: (B,) int32 from `cell_keys`.
        pad_length: slots of a sentence, CLS included.

    Returns:
        (B, pad_length - 1) int64 positions among the K kept genes.
    """
    n_slots, n_kept = pad_length - 1, values.shape[1]
    tie = mix32(keys.unsqueeze(1) ^ tokens)  # (B, K); one to one for a cell, so no two genes of it are equal
    # bits of floats >= 0 sort like the floats; a hash with its first bit turned sorts signed as it did unsigned
    order = values.view(torch.int32).long().bitwise_left_shift_(32).add_(tie.bitwise_xor_(-(2**31)))
    ranked = torch.topk(order, min(n_slots, n_kept), dim=1, sorted=True).indices
    if n_kept >= n_slots:
        return ranked
    n_expressed = (values > 0).sum(1, keepdim=True)  # (B, 1)
    slots = torch.arange(n_slots, device=values.device, dtype=torch.int32)
    draws = mix32(mix32(keys.unsqueeze(1) ^ 0xD2A3) ^ slots).long() & 0xFFFFFFFF  # (B, slots)
    first = torch.where(n_expressed < n_kept, n_expressed, 0)  # where the genes to draw from begin in `ranked`
    drawn = first + draws % (n_kept - first)
    return ranked.gather(1, torch.where(slots < n_expressed, slots.clamp_max(n_kept - 1), drawn))


def tokenize(
    values: Tensor, tokens: Tensor, keys: Tensor, pad_length: int, cls_count_gene: int, *, scale: str
) -> tuple[Tensor, Tensor]:
    """Turn cells into sentences and their count features.

    Args:
        values: (B, K) float32 of the kept genes; negative ones count as zero.
        tokens: (K,) int32 tokens of the kept genes.
        keys: (B,) int32 from `cell_keys`.
        pad_length: slots of a sentence, CLS included.
        cls_count_gene: the kept gene whose weight slot 0 carries (3, as in training).
        scale: "counts" (log1p is taken for the shares) or "log1p".

    Returns:
        positions (B, pad_length - 1) int64 among the kept genes, and count features (B, pad_length) float32:
        100 x the share of the cell's summed log1p value (an all-zero cell: uniform shares).
    """
    values = torch.where(values > 0, values, 0.0)  # not clamp, which keeps -0
    positions = sentences(values, tokens, keys, pad_length)
    logs = torch.log1p(values) if scale == "counts" else values
    total = logs.sum(1, keepdim=True, dtype=torch.float64).float()  # (B, 1); float64: whatever the order of adding
    shown = torch.cat([logs[:, cls_count_gene : cls_count_gene + 1], logs.gather(1, positions)], dim=1)
    return positions, 100.0 * torch.where(total > 0, shown / total, 1.0 / values.shape[1])
