"""The cells of a run, ready for batches: in host memory (or mapped files), or in the memory of a GPU.

Shapes: B sets, S cells a set, E embedding width, G genes, N cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from sest.data.gather import check_rows, copy_rows, dense_log1p
from sest.data.sampler import SetRows
from sest.data.targets import Targets
from sest.head.kernels import dense_rows
from sest.machine.transfer import Gathered, Sender, Sent


class Batch(TypedDict):
    """The tensors of one forward pass, on the training device."""

    basal: Tensor  # (B, S, E) float32 embeddings of the controls
    perturbation: Tensor  # (B,) int64 codes
    target: Tensor  # (B, S, G) float32 log1p
    number: Tensor  # (B,) int64 place of every set in the sequence they were drawn from
    measured: NotRequired[Tensor]  # (B, 1, G) float32, 1 for the genes of the set's file; only where some lack some


@dataclass(frozen=True, eq=False)
class Staged:
    """A batch on its way: all that the host does for it is done."""

    sent: Sent
    shape: tuple[int, ...]  # of the cells whose expression is asked for
    n_values: int  # of them together, on a GPU
    dense: Tensor | None  # (..., G) log1p, on a CPU


def place_of(control_rows: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where cells, by row number (...,), stand among the controls (n,), ascending: (...,) int32."""
    place = np.searchsorted(control_rows, rows).astype(np.int32)
    assert np.array_equal(control_rows[np.minimum(place, len(control_rows) - 1)], rows), "a cell that is no control"
    return place


@dataclass(frozen=True, eq=False)
class ResidentCells:
    """Embeddings and targets, gathered from host memory to the CPU or a GPU, or within a GPU's memory.

    To a CPU, rows become dense in one compiled pass (sest.data.gather). To a GPU only stored values travel, four bytes
    an expressed gene, and become dense there. What a batch sends is one copy, and nothing here waits for the GPU.
    """

    targets: Targets
    control_rows: np.ndarray  # (controls,) rows of the controls among all cells, ascending
    embeddings: Tensor  # (controls, E) as stored
    device: torch.device  # the training device
    on_device: DeviceValues | None  # the targets in its memory; None: in the host's
    sender: Sender  # to the training device

    @property
    def n_genes(self) -> int:
        return len(self.targets.genes)

    def expression(self, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Cells as dense log1p values on the training device: row numbers of any shape (...,) -> (..., G) float32.

        `out`, of the result's shape, is filled where the training device is the CPU.
        """
        return self._dense(self._stage(rows, {}, out))

    def basal(self, controls: np.ndarray) -> Tensor:
        """Embeddings of control cells: (...,) row numbers -> (..., E) float32 on the training device."""
        return self._embedded(self.sender.send({"basal": self._embeddings_of(controls)}).tensors()["basal"])

    def measured(self, targets: np.ndarray) -> Tensor | None:
        """(B, 1, G) float32: 1 for the genes that the file of a set (B, S) has, else 0; None: all files have all."""
        return self._measured(self.sender.send(self._measured_by(targets)).tensors())

    def batch(self, sets: SetRows, out: Tensor | None = None) -> Batch:
        """Gather sets: `stage`, then `finish`."""
        return self.finish(self.stage(sets, out))

    def stage(self, sets: SetRows, out: Tensor | None = None) -> Staged:
        """What the host does for a batch; any thread may, while the training uses another. `out`: see `expression`."""
        arrays = {
            "basal": self._embeddings_of(sets["controls"]),
            "perturbation": sets["perturbation"],
            "number": sets["number"],
            **self._measured_by(sets["targets"]),
        }
        return self._stage(sets["targets"], arrays, out)

    def finish(self, staged: Staged) -> Batch:
        """What the training device does for a batch."""
        there = staged.sent.tensors()
        batch = Batch(
            basal=self._embedded(there["basal"]),
            perturbation=there["perturbation"],
            target=self._dense(staged),
            number=there["number"],
        )
        measured = self._measured(there)
        if measured is not None:
            batch["measured"] = measured
        return batch

    def _embeddings_of(self, controls: np.ndarray) -> np.ndarray | Gathered:
        """What is sent of control cells: their embeddings, or the rows of those that are there."""
        rows = place_of(self.control_rows, controls)
        if self.on_device is not None:
            return rows
        embeddings = self.embeddings.numpy()
        return Gathered(
            (*rows.shape, embeddings.shape[1]),
            embeddings.dtype,
            lambda out: np.take(embeddings, rows, axis=0, out=out, mode="clip"),  # else NumPy makes a copy first
        )

    def _embedded(self, sent: Tensor) -> Tensor:
        return (sent if self.on_device is None else self.embeddings[sent]).float()

    def _measured_by(self, targets: np.ndarray) -> dict[str, np.ndarray | Gathered]:
        genes = self.targets.measured_by(targets[:, 0])
        return {} if genes is None else {"measured": genes[:, None]}

    @staticmethod
    def _measured(there: dict[str, Tensor]) -> Tensor | None:
        return there["measured"].float() if "measured" in there else None

    def _stage(self, rows: np.ndarray, arrays: dict[str, np.ndarray | Gathered], out: Tensor | None = None) -> Staged:
        """Send `arrays`, and to a GPU what its cells (...,) become dense from; on a CPU make them dense."""
        flat, targets = rows.ravel(), self.targets
        targets.require(flat)
        if self.device.type == "cpu" and self.on_device is None:
            dense = torch.empty(*rows.shape, self.n_genes) if out is None else out
            values = dense.view(len(flat), self.n_genes).numpy()
            dense_log1p(flat, targets.indptr, targets.indices, targets.data, targets.factor, values)
            return Staged(self.sender.send(arrays), rows.shape, 0, dense)
        check_rows(flat, len(targets.factor))
        begin, length = targets.indptr[flat], targets.indptr[flat + 1] - targets.indptr[flat]
        n_values = int(length.sum())
        if self.on_device is None:
            begin = length.cumsum() - length
            for name, values in (("indices", targets.indices), ("data", targets.data)):
                below = self.n_genes if name == "indices" else 0
                write = partial(copy_rows, flat, targets.indptr, values, below=below)
                arrays[name] = Gathered((n_values,), values.dtype, write)
        arrays |= {"begin": begin, "length": length, "factor": targets.factor[flat]}
        return Staged(self.sender.send(arrays), rows.shape, n_values, None)

    def _dense(self, staged: Staged) -> Tensor:
        if staged.dense is not None:
            return staged.dense
        there, kept = staged.sent.tensors(), self.on_device
        indices, data = (there["indices"], there["data"]) if kept is None else (kept.indices, kept.data)
        rows = there["begin"], there["length"], there["factor"]
        return dense_rows(*rows, indices, data, self.n_genes, staged.n_values).view(*staged.shape, self.n_genes)


@dataclass(frozen=True, eq=False)
class DeviceValues:
    """The values of the targets in the memory of a device; where each cell's begin the host knows."""

    indices: Tensor  # (nnz,) int32, or int16 that holds uint16
    data: Tensor  # (nnz,)


def resident_cells(
    targets: Targets,
    embeddings: np.ndarray,
    control_rows: np.ndarray,
    device: torch.device,
    *,
    on_device: bool = False,
) -> ResidentCells:
    """All cells, ready for training on `device`; `on_device`: in its memory, else in the host's."""
    kept = torch.from_numpy(embeddings)
    if on_device:
        kept = kept.to(device)
        indices = targets.indices.view(np.int16) if targets.indices.dtype == np.uint16 else targets.indices
        there = DeviceValues(torch.from_numpy(indices).to(device), torch.from_numpy(targets.data).to(device))
    return ResidentCells(targets, control_rows, kept, device, there if on_device else None, Sender(device))
