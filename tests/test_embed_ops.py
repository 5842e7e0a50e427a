"""A batch of cells as a GPU would embed it, traced without one: what it launches and moves, and what waits.

benchmarks/embed_ops.py traces the encoder of `sest embed` on PyTorch's meta device.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sest.se.model import StateEncoder

if TYPE_CHECKING:
    from step_ops import Op


@pytest.fixture(autouse=True)
def embed_ops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import embed_ops

    return embed_ops


def size_of(**changes: int) -> Any:
    """Two layers of SE-600M's width: all that differs is how often a layer comes."""
    from encoders import Size

    sizes = {"n_layers": 2, "d_model": 2048, "d_hid": 2048, "output_dim": 2048, "n_heads": 16, "n_genes": 19_790}
    return Size(**{**sizes, **changes})


def test_a_batch_of_the_public_models_size_launches_and_moves_no_more_than_it_did(embed_ops: ModuleType) -> None:
    """Upper bounds are what benchmarks/README.md says, rounded up: a change that adds to a phase has a reason."""
    ops: list[Op] = embed_ops.trace_batch(embed_ops.SE_600M, 128, n_values=3700)
    most = {
        "data": (1, 0.0001), "tokens": (42, 0.005), "input": (10, 0.052), "layers": (130, 2.83), "head": (14, 0.001),
        "result": (1, 0.0001),
    }  # fmt: skip
    assert {op.phase for op in ops} == most.keys() == set(embed_ops.PHASES)
    for phase, (n, gb) in most.items():
        of = [op for op in ops if op.phase == phase]
        assert len(of) <= n and sum(op.n_bytes for op in of) / 128e9 <= gb, phase
    # the formula leaves out what two rows of a cell take
    assert sum(op.flops for op in ops) / 128 == pytest.approx(embed_ops.SE_600M.flops(), rel=1e-3)
    assert sum(op.modelled_ms for op in ops) < 1e3 * 128 / 240
    assert [op.name for op in ops].count("add_norm") == 32  # sest.head.kernels


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_embedding_waits_for_nothing_and_a_batch_is_one_copy_there_and_one_back(
    embed_ops: ModuleType, precision: str
) -> None:
    ops = embed_ops.trace_batch(size_of(), 3, n_values=500, precision=precision)
    assert not [op for op in ops if op.waits]
    assert [op.phase for op in ops if op.from_host] == ["data"]
    assert [op.phase for op in ops if op.name == "to_host"] == ["result"]


def test_what_waits_is_seen(embed_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    head = StateEncoder._head
    with monkeypatch.context() as patched:
        patched.setattr(StateEncoder, "_head", lambda self, x: head(self, x.cpu().to("meta")))
        ops = embed_ops.trace_batch(size_of(), 3, n_values=500)
        assert [op.name for op in ops if op.waits] == ["to_host", "_to_copy"]
    monkeypatch.setattr(StateEncoder, "_head", lambda self, x: head(self, x[x[:, 0, 0] > 0]))  # needs the numbers
    with pytest.raises(NotImplementedError, match="nonzero"):
        embed_ops.trace_batch(size_of(), 3, n_values=500)


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({}, 170),  # rows of queries, keys and values
        ({"d_hid": 8192}, 127),  # of the feed-forward part
        ({"d_model": 128, "output_dim": 128, "d_hid": 128}, 2047),  # of the count embedding, 512 wide
        ({"d_model": 64, "output_dim": 64, "n_heads": 4, "d_hid": 64, "pad_length": 8}, 108_508),  # dense values
        ({"d_model": 64, "output_dim": 64, "n_heads": 4, "d_hid": 64, "pad_length": 64, "n_genes": 30}, 64_527),
    ],
    ids=str,
)
def test_of_all_tensors_of_the_largest_pass_none_has_numbers_beyond_32_bits_and_of_a_larger_one_some_have(
    embed_ops: ModuleType, changes: dict[str, int], cells: int
) -> None:
    size = size_of(**changes)
    model = embed_ops.encoder_of(size, "bf16")._model
    assert model.largest_pass() == cells

    def most(n: int, n_values: int) -> int:
        ops = embed_ops.trace_batch(size, n, n_values=n_values)
        return max(op.most for op in ops if op.phase not in ("data", "result"))  # bytes that are copied

    assert most(cells, min(size.n_genes, 2**20 // cells)) < 2**31
    if cells < 10_000:
        encoder = embed_ops.encoder_of(size, "bf16")
        encoder._most = cells + 1
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(embed_ops, "encoder_of", lambda *_: encoder)
            assert most(cells + 1, 10) >= 2**31


def test_the_meta_device_stands_for_a_gpu(embed_ops: ModuleType) -> None:
    assert torch.device("meta") == embed_ops.META
    assert {op.name for op in embed_ops.trace_batch(size_of(), 2, n_values=9, attention="flash")} >= {
        "_scaled_dot_product_flash_attention", "add_norm", "topk"
    }  # fmt: skip
