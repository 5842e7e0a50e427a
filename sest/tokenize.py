"""Cells to sentences of genes, as the State Embedding model reads them.

Shapes: B cells, K kept genes (those of the file that the encoder knows), L = pad_length slots (slot 0 is CLS).
Source: `state emb transform` of arc-state 0.11.1 (DESIGN section 4, steps 1, 3 and 4). Upstream breaks ties at
random; here the order is a hash of (seed, cell index, gene), so that a sentence depends on nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64, one to one (lowbias32 of C. Wellons' hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK_32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK_32
    return x ^ (x >> 16)


def cell_keys(seed: int, cells: Tensor) -> Tensor:
    """Hash of (seed, cell index): (B,) int64 row numbers in the file -> (B,) int64 of 32 bits."""
    start = mix32(torch.full_like(cells, seed & _MASK_32) ^ 0x5E57)
    return mix32(mix32(start ^ (cells & _MASK_32)) ^ (cells >> 32))


def sentences(values: Tensor, tokens: Tensor, keys: Tensor, pad_length: int) -> Tensor:
    """Choose the genes of every cell's sentence.

    The pad_length - 1 genes with the largest value, descending, ties by hash. With fewer kept genes than slots: the
    expressed ones first, then unexpressed ones drawn with replacement (all kept genes, where every one is expressed).

    Args:
        values: (B, K) float32 log1p values, not negative.
        tokens: (K,) int64 token of every kept gene (its index in the encoder's gene table).
        keys: (B,) int64 from `cell_keys`.
        pad_length: slots of a sentence, CLS included.

    Returns:
        (B, pad_length - 1) int64 positions among the K kept genes.
    """
    n_slots, n_kept = pad_length - 1, values.shape[1]
    tie = mix32(keys.unsqueeze(1) ^ tokens)  # (B, K); one to one for a cell, so no two genes of it are equal
    order = (values.contiguous().view(torch.int32).long() << 32) | tie  # bits of floats >= 0 sort like the floats
    ranked = torch.topk(order, min(n_slots, n_kept), dim=1, sorted=True).indices
    if n_kept >= n_slots:
        return ranked
    n_expressed = (values > 0).sum(1, keepdim=True)  # (B, 1)
    slots = torch.arange(n_slots, device=values.device)
    draws = mix32(mix32(keys.unsqueeze(1) ^ 0xD2A3) ^ slots)  # (B, slots)
    first = torch.where(n_expressed < n_kept, n_expressed, 0)  # where the genes to draw from begin in `ranked`
    drawn = first + draws % (n_kept - first)
    return ranked.gather(1, torch.where(slots < n_expressed, slots.clamp_max(n_kept - 1), drawn))


def tokenize(
    values: Tensor, tokens: Tensor, keys: Tensor, pad_length: int, cls_count_gene: int
) -> tuple[Tensor, Tensor]:
    """Turn cells into sentences and their count features.

    Args:
        values: (B, K) float32 log1p values of the kept genes, not negative.
        tokens: (K,) int64 tokens of the kept genes.
        keys: (B,) int64 from `cell_keys`.
        pad_length: slots of a sentence, CLS included.
        cls_count_gene: the kept gene whose weight slot 0 carries (3, as in training).

    Returns:
        positions (B, pad_length - 1) int64 among the kept genes, and count features (B, pad_length) float32:
        100 x the share of the cell's summed log1p value (an all-zero cell: uniform shares).
    """
    total = values.sum(1, keepdim=True)  # (B, 1)
    shares = torch.where(total > 0, values / total, 1.0 / values.shape[1])
    positions = sentences(values, tokens, keys, pad_length)
    counts = torch.cat([shares[:, cls_count_gene : cls_count_gene + 1], shares.gather(1, positions)], dim=1)
    return positions, 100.0 * counts
