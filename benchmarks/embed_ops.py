"""What embedding a batch of cells asks of a GPU, counted without one, for an encoder of SE-600M's sizes.

As in step_ops.py: the encoder of `sest embed` itself runs on PyTorch's meta device, and each operation is written down.

    python benchmarks/embed_ops.py                        # 128 cells of 3,700 expressed genes, bf16
    python benchmarks/embed_ops.py --attention flash      # what PyTorch takes where cuDNN is older than 9.15.1
    python benchmarks/embed_ops.py --most 30              # and the 30 operations that move most
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from encoders import SE_600M, Size, gene_names, random_tensors
from step_ops import META, Op, Trace
from torch.overrides import TorchFunctionMode

from sest.encoder.state import SeEncoder
from sest.machine.devices import DTYPES
from sest.machine.transfer import fetch
from sest.se.model import N_DATASET_COLUMNS, densify
from sest.se.weights import EncoderWeights

PHASES = ("data", "tokens", "input", "layers", "head", "result")
PARTS = {  # methods of StateEncoder
    "_rows": "input",
    "_layer": "layers",
    "_head": "head",
}


class _Attention(TorchFunctionMode):
    """Attention by one of the kernels that a GPU has for it."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self._kernel == "flash":
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return torch.ops.aten._scaled_dot_product_cudnn_attention(*args, None, False)[0]


def encoder_of(size: Size, precision: str, device: torch.device = META) -> SeEncoder:
    """An encoder of random weights that knows all genes of the file "cells"."""
    tensors, vectors = random_tensors(size, device="meta" if device == META else "cpu")
    names = tuple(gene_names(size.n_genes))
    weights = EncoderWeights(tensors, size.n_heads, size.pad_length, 3, names, vectors, "0", "random")
    encoder, genes = SeEncoder(weights, [], device, precision, seed=0, max_tokens=None), np.arange(size.n_genes)
    encoder._kept["cells"] = encoder._model.keep(genes, genes, size.n_genes)
    return encoder


def cells_of(n: int, n_genes: int, n_values: int) -> scipy.sparse.csr_matrix:
    """Cells that all have the same `n_values` genes expressed."""
    genes = np.tile(np.arange(n_values, dtype=np.int32), n)
    return scipy.sparse.csr_matrix(
        (np.ones(n * n_values, np.float32), genes, np.arange(n + 1) * n_values), (n, n_genes)
    )


def trace_batch(
    size: Size, n_cells: int, *, n_values: int, precision: str = "bf16", attention: str = "cudnn"
) -> list[Op]:
    """The operations of a batch, from the host's arrays to the embeddings in the host's memory.

    Args:
        n_values: expressed genes a cell.
        attention: "cudnn" or "flash".
    """
    encoder, trace = encoder_of(size, precision), Trace()
    file: Any = SimpleNamespace(group="cells", scale="counts")

    def begins(phase: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            trace.phase = phase
            return run(*args)

        return wrapped

    for name, phase in PARTS.items():
        setattr(encoder._model, name, begins(phase, getattr(encoder._model, name)))
    with (
        mock.patch("sest.machine.transfer.host_bytes", trace.pin),
        mock.patch("sest.se.model.densify", begins("tokens", densify)),
        mock.patch("sest.encoder.state.fetch", begins("result", fetch)),
        _Attention(attention),
        trace,
    ):
        staged = encoder.stage(file, cells_of(n_cells, size.n_genes, n_values), np.arange(n_cells))
        result = encoder.start(file, staged)
        n_begun = len(trace.ops)
        numbers = result()
    assert numbers.shape == (n_cells, size.output_dim + N_DATASET_COLUMNS) and len(trace.ops) == n_begun
    return trace.ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=128, help="of a batch")
    parser.add_argument("--values", type=int, default=3700, help="expressed genes a cell")
    parser.add_argument("--precision", default="bf16", choices=[name for name in DTYPES if name != "tf32"])
    parser.add_argument("--attention", default="cudnn", choices=("cudnn", "flash"))
    parser.add_argument("--most", type=int, default=0, help="operations to list")
    options = parser.parse_args()
    n = options.cells
    ops = trace_batch(SE_600M, n, n_values=options.values, precision=options.precision, attention=options.attention)
    print(f"{'':<14}{'operations':>12}{'GB a cell':>12}{'GFLOP a cell':>14}{'waits':>8}{'modelled ms a cell':>20}")
    for phase in (*PHASES, ""):
        of = [op for op in ops if phase in ("", op.phase)]
        n_bytes, flops = sum(op.n_bytes for op in of) / 1e9 / n, sum(op.flops for op in of) / 1e9 / n
        counted = f"{len(of):>12}{n_bytes:>12.3f}{flops:>14.1f}{sum(op.waits for op in of):>8}"
        print(f"{phase or 'together':<14}{counted}{sum(op.modelled_ms for op in of) / n:>20.3f}")
    print(f"modelled, not measured: {1e3 * n / sum(op.modelled_ms for op in ops):.0f} cells/s on an H100")
    for op in sorted(ops, key=lambda op: -op.n_bytes)[: options.most]:
        print(f"{op.phase:<14}{op.name:<36}{op.out:<28}{op.n_bytes / 1e6:>9.1f} MB{op.modelled_ms:>10.3f} ms")


if __name__ == "__main__":
    main()
