"""The cells of a run, ready for batches: in host memory (or mapped files), or in the memory of a GPU.

Shapes: B sets, S cells a set, E embedding width, G genes, N cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from sest.data.gather import dense_log1p, take_rows
from sest.data.sampler import SetRows
from sest.data.targets import Targets


class Batch(TypedDict):
    """The tensors of one forward pass, on the training device."""

    basal: Tensor  # (B, S, E) float32 embeddings of the controls
    perturbation: Tensor  # (B,) int64 codes
    target: Tensor  # (B, S, G) float32 log1p
    number: Tensor  # (B,) int64 place of every set in the sequence they were drawn from
    measured: NotRequired[Tensor]  # (B, 1, G) float32, 1 for the genes of the set's file; only where some lack some


@dataclass(frozen=True, eq=False)
class ResidentCells:
    """Embeddings and targets, gathered from host memory to the CPU or a GPU, or within a GPU's memory.

    To a CPU, rows become dense in one compiled pass (sest.data.gather). To a GPU only stored values travel, four bytes
    an expressed gene, and become dense there.
    """

    targets: Targets
    embedding_row: np.ndarray  # (N,) int32
    embeddings: Tensor  # (controls, E) as stored
    device: torch.device  # the training device
    on_device: DeviceValues | None  # the targets in its memory; None: in the host's

    @property
    def n_genes(self) -> int:
        return len(self.targets.genes)

    def expression(self, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Cells as dense log1p values on the training device: row numbers of any shape (...,) -> (..., G) float32.

        `out`, of the result's shape, is filled where the training device is the CPU.
        """
        flat, targets = rows.ravel(), self.targets
        targets.require(flat)
        if self.on_device is not None:
            return self.on_device.expression(flat, self.n_genes).view(*rows.shape, self.n_genes)
        if self.device.type == "cpu":
            dense = torch.empty(*rows.shape, self.n_genes) if out is None else out
            values = dense.view(len(flat), self.n_genes).numpy()
            dense_log1p(flat, targets.indptr, targets.indices, targets.data, targets.factor, values)
            return dense
        indptr, indices, data = take_rows(flat, targets.indptr, targets.indices, targets.data, self.n_genes)
        lengths = np.diff(indptr)
        dense = _dense(
            self._send(lengths),
            len(data),
            self._send(indices),
            self._send(data),
            self._send(targets.factor[flat]),
            self.n_genes,
        )
        return dense.view(*rows.shape, self.n_genes)

    def _send(self, values: np.ndarray) -> Tensor:
        """To the training device; from pinned memory, so that nothing waits for the copy."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def basal(self, controls: np.ndarray) -> Tensor:
        """Embeddings of control cells: (...,) row numbers -> (..., E) float32 on the training device."""
        rows = self.embedding_row[controls]
        assert (rows >= 0).all(), "a control without an embedding row"
        if self.embeddings.device.type == "cpu":
            return self._send(self.embeddings.numpy()[rows]).float()
        return self.embeddings[self._send(rows)].float()

    def measured(self, targets: np.ndarray) -> Tensor | None:
        """(B, 1, G) float32: 1 for the genes that the file of a set (B, S) has, else 0; None: all files have all."""
        genes = self.targets.measured_by(targets[:, 0])
        return None if genes is None else self._send(genes[:, None].astype(np.float32))

    def batch(self, sets: SetRows, out: Tensor | None = None) -> Batch:
        """Gather sets."""
        batch = Batch(
            basal=self.basal(sets["controls"]),
            perturbation=self._send(sets["perturbation"]),
            target=self.expression(sets["targets"], out),
            number=self._send(sets["number"]),
        )
        measured = self.measured(sets["targets"])
        if measured is not None:
            batch["measured"] = measured
        return batch


@dataclass(frozen=True, eq=False)
class DeviceValues:
    """The targets in the memory of a device."""

    indptr: np.ndarray  # (N + 1,) int64, on the host: sizes are known without asking the device
    starts: Tensor  # (N,) int64
    indices: Tensor  # (nnz,) int32, or int16 that holds uint16
    data: Tensor  # (nnz,)
    factor: Tensor  # (N,) float32

    def expression(self, rows: np.ndarray, n_genes: int) -> Tensor:
        """Cells (n,) -> (n, G) float32 on the device."""
        device = self.data.device
        lengths = self.indptr[rows + 1] - self.indptr[rows]
        where, length = torch.as_tensor(rows, device=device), torch.as_tensor(lengths, device=device)
        n_values = int(lengths.sum())
        # value v of the batch stands at `at[v]` here
        offset = self.starts[where] - (length.cumsum(0) - length)  # (n,)
        at = torch.arange(n_values, device=device) + torch.repeat_interleave(offset, length, output_size=n_values)
        return _dense(length, n_values, self.indices[at], self.data[at], self.factor[where], n_genes)


def _dense(length: Tensor, n_values: int, indices: Tensor, data: Tensor, factor: Tensor, n_genes: int) -> Tensor:
    """CSR values as dense log1p rows: values a row (n,), values (m,), factors (n,) -> (n, G) float32.

    The formula of `sest.cells.scale.log1p_rows`, against which tests/data hold it.
    """
    row = torch.repeat_interleave(torch.arange(len(length), device=data.device), length, output_size=n_values)
    genes = indices.long() & 0xFFFF if indices.dtype == torch.int16 else indices.long()
    values, scale = data.float(), factor[row]
    dense = torch.zeros(len(length) * n_genes, device=data.device)
    dense[row * n_genes + genes] = torch.where(scale > 0, torch.log1p(values * scale), values)
    return dense.view(len(length), n_genes)


def _device_values(targets: Targets, device: torch.device) -> DeviceValues:
    """Copy the targets into the memory of a device."""
    wide = targets.indices.dtype != np.uint16
    return DeviceValues(
        targets.indptr,
        torch.from_numpy(targets.indptr[:-1].copy()).to(device),
        torch.from_numpy(targets.indices if wide else targets.indices.view(np.int16)).to(device),
        torch.from_numpy(targets.data).to(device),
        torch.from_numpy(targets.factor).to(device),
    )


def resident_cells(
    targets: Targets,
    embeddings: np.ndarray,
    embedding_row: np.ndarray,
    device: torch.device,
    *,
    on_device: bool = False,
) -> ResidentCells:
    """All cells, ready for training on `device`; `on_device`: in its memory, else in the host's."""
    tensor = torch.from_numpy(embeddings)
    return ResidentCells(
        targets,
        embedding_row,
        tensor.to(device) if on_device else tensor,
        device,
        _device_values(targets, device) if on_device else None,
    )
