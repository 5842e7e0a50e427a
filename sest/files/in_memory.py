"""Cells in memory as a file: what reads files with care then reads them too."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sest.errors import InputError, one_line, shown
from sest.files.remote import located

if TYPE_CHECKING:
    from anndata import AnnData


@contextmanager
def file_of(
    cells: str | os.PathLike[str] | AnnData, name: str, layer: str | None, obsm: str | None = None
) -> Iterator[Path]:
    """The file of cells; those in memory are written to a temporary one, with no more than is read of it.

    Args:
        cells: a path, which is given back, or an AnnData, which stays as it is.
        name: of the temporary file, without its ending; errors call the cells so.
        obsm: the entry of obsm that is read.
        layer: the layer that is read beside X; "raw" is the raw of the cells, unless a layer has that name.

    Raises:
        InputError: neither a path nor an AnnData, no such layer, or cells that no .h5ad can hold.
    """
    if isinstance(cells, str | os.PathLike):
        yield located(os.fspath(cells))
        return
    from anndata import AnnData  # slow to import

    if not isinstance(cells, AnnData):
        raise InputError(f"The {name} cells are of type {type(cells).__name__}; pass a path or an AnnData.")
    if obsm is not None and obsm not in cells.obsm:
        raise InputError(f"The {name} cells have no obsm {obsm!r}. There are: {shown(cells.obsm)}.")
    layers = [key for key in cells.layers if key is not None]  # None: X, for anndata 0.13
    from_raw = layer == "raw" and layer not in layers and cells.raw is not None
    if layer is not None and layer not in layers and not from_raw:
        raise InputError(f"The {name} cells have no layer {layer!r}. There are: {shown(layers)}.")
    if cells.isbacked:
        cells = cells.to_memory()
    part = AnnData(
        X=cells.X,
        obs=cells.obs.copy(),  # writing makes categories of text
        var=cells.var.copy(),
        layers={} if layer is None or from_raw else {layer: cells.layers[layer]},
        obsm={} if obsm is None else {obsm: cells.obsm[obsm]},
        uns={"sest": cells.uns["sest"]} if "sest" in cells.uns else {},
    )
    if from_raw:
        part.raw = AnnData(X=cells.raw.X, obs=part.obs, var=cells.raw.var.copy())
    with tempfile.TemporaryDirectory(prefix="sest-") as folder:
        path = Path(folder) / f"{name}.h5ad"
        try:
            part.write_h5ad(path)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds, none of them promised
            raise InputError(f"The {name} cells cannot be written as an .h5ad: {one_line(error)}.") from error
        yield path
