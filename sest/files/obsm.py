"""Embeddings that a file has already, in obsm: an array, a table of numbers, or a sparse matrix; read by rows.

Shapes: N cells, D columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sest.files.matrix import open_matrix
from sest.files.nodes import Node, attribute, bad, check_numbers, is_array
from sest.files.tables import Table

MAX_WIDTH = 2**16  # columns of an embedding


class Embedding:
    """One entry of obsm.

    Args:
        node: as it lies in the file.
        n_cells: rows that it must have.

    Raises:
        InputError: it is no table of numbers with a row for every cell.
    """

    shape: tuple[int, int]  # (N, D)

    def __init__(self, node: Node, n_cells: int) -> None:
        self._read: Callable[[int, int], np.ndarray]
        if is_array(node):
            check_numbers(node)
            self.shape, self._read = tuple(node.shape), lambda start, stop: node[start:stop]
        elif attribute(node, "encoding-type") == "dataframe":
            frame = Table(node).frame()
            if odd := [name for name in frame if frame[name].dtype.kind not in "fiub"]:
                raise bad(node, f"has a column {odd[0]!r} that holds no numbers")
            values = frame.to_numpy(np.float32)
            self.shape, self._read = values.shape, lambda start, stop: values[start:stop]
        else:
            matrix = open_matrix(node)
            self.shape, self._read = matrix.shape, lambda start, stop: matrix.read(start, stop).toarray()
        if len(self.shape) != 2 or self.shape[0] != n_cells or not 1 <= self.shape[1] <= MAX_WIDTH:
            raise bad(node, f"has shape {self.shape}; an embedding has a row for each of the {n_cells} cells")

    def dense(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop): (stop-start, D) float32, as stored: also NaN."""
        with np.errstate(over="ignore"):
            return np.asarray(self._read(start, stop)).astype(np.float32)
