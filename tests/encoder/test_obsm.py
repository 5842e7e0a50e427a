"""encoder/obsm.py: embeddings that the files have are stored as they are, and nothing else is taken for one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sest
from helpers.h5ad_files import counts, write_cells
from helpers.zarr_cells import as_zarr
from sest.cache import open_cache
from sest.cells.inputs import Source, open_cells
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.encoder.obsm import ObsmEncoder
from sest.errors import InputError

KEY = "X_scVI"


def with_obsm(path: Path, value: Any, key: str = KEY) -> Path:
    adata = ad.read_h5ad(write_cells(path, counts()))
    adata.obsm[key] = value
    adata.write_h5ad(path)
    return path


def values(width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(40, width)).astype(np.float32)


def config(**options: Any) -> EmbedConfig:
    return EmbedConfig(encoder=f"obsm:{KEY}", **{"dtype": "float32", **options})


@pytest.mark.parametrize("form", ["array", "double", "table", "sparse", "zarr"])
def test_embeddings_are_stored_as_they_are(tmp_path: Path, form: str) -> None:
    stored: Any = values()
    if form == "double":
        stored = stored.astype(np.float64)
    if form == "table":
        stored = pd.DataFrame(stored, index=[f"cell{i}" for i in range(40)], columns=list("abcde"))
    if form == "sparse":
        stored = sp.csr_matrix(stored)
    path = with_obsm(tmp_path / "a.h5ad", stored)
    if form == "zarr":
        path = as_zarr(tmp_path / "a.zarr", ad.read_h5ad(path), "zarr3")
    embed([path], tmp_path / "c.zarr", config())
    cache = open_cache(tmp_path / "c.zarr")
    np.testing.assert_array_equal(cache.groups["a"].embeddings(0, 40), values())
    told = cache.attributes
    assert (told["encoder"], told["native_dim"], told["projection"]) == ("obsm:X_scVI", 5, "none")
    assert "licence of the model that made them" in told["licence"]


def test_wide_embeddings_are_projected_as_any_other(tmp_path: Path) -> None:
    embed([with_obsm(tmp_path / "a.h5ad", values(20))], tmp_path / "c.zarr", config(dim=4))
    x = values(20).astype(np.float64) - values(20).mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    stored = open_cache(tmp_path / "c.zarr").groups["a"].embeddings(0, 40)
    np.testing.assert_allclose(np.abs(stored), np.abs(u[:, :4] * s[:4]), atol=1e-5)  # float32; signs are a convention


def test_chosen_rows_are_read_in_short_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the PCA is spread over the file: what lies between is not read."""
    monkeypatch.setattr("sest.cells.inputs.ROWS_PER_READ", 5)
    path = with_obsm(tmp_path / "a.h5ad", values())
    with ExitStack() as stack:
        (cells,) = open_cells([Source("a", "a", path)], config(), stack)
        encoder = ObsmEncoder(KEY, [cells], {"a": list(cells.file.var.index)})
        longest, dense = 0, encoder._entries["a"].dense

        def read(start: int, stop: int) -> np.ndarray:
            nonlocal longest
            longest = max(longest, stop - start)
            return dense(start, stop)

        monkeypatch.setattr(encoder._entries["a"], "dense", read)
        numbers = np.array([0, 3, 17, 39])
        np.testing.assert_array_equal(encoder.encode(cells, cells.read(numbers), numbers), values()[numbers])
        assert longest <= 5


def test_cells_in_memory_take_their_embeddings_along(tmp_path: Path) -> None:
    adata = ad.read_h5ad(with_obsm(tmp_path / "a.h5ad", values()))
    cache = sest.embed(adata, tmp_path / "c.zarr", encoder=f"obsm:{KEY}", dtype="float32")
    np.testing.assert_array_equal(cache.groups["cells"].embeddings(0, 40), values())
    with pytest.raises(InputError, match=r"no obsm 'X_none'\. There are: X_scVI"):
        sest.embed(adata, tmp_path / "d.zarr", encoder="obsm:X_none")


def test_other_embeddings_in_the_same_file_are_another_cache(tmp_path: Path) -> None:
    path = with_obsm(tmp_path / "a.h5ad", values())
    embed([path], tmp_path / "c.zarr", config())
    with_obsm(path, values(seed=1))
    with pytest.raises(sest.Error, match="embeddings_sha256"):
        embed([path], tmp_path / "c.zarr", config())


def nan(x: np.ndarray) -> np.ndarray:
    x[7, 2] = np.nan
    return x


@pytest.mark.parametrize(
    ("stored", "options", "message"),
    [
        (values(), {"encoder": "obsm:X_scvi"}, r"no obsm 'X_scvi'\. There are: X_scVI\. Did you mean 'X_scVI'"),
        (values(), {"encoder": "obsm:"}, "names no key. Pass obsm:KEY"),
        (values(), {"max_tokens": 5}, "'obsm:X_scVI' has none. Leave it out"),
        (values(), {"weights": "x.ckpt"}, "--weights is of an SE encoder"),
        (values(), {"dim": "state"}, "'obsm:X_scVI' has no dataset columns"),
        (values(), {"dim": 6}, "--dim 6 is above the native width 5"),
        (nan(values()), {}, r"obsm:X_scVI has NaN or an infinite value in cell 'cell7' \(row 7\)"),
        (pd.DataFrame({"a": ["x"] * 40}, index=[f"cell{i}" for i in range(40)]), {}, "'a' that holds no numbers"),
    ],
)
def test_what_is_no_embedding_is_refused_before_anything_is_written(
    tmp_path: Path, stored: Any, options: dict[str, Any], message: str
) -> None:
    path = with_obsm(tmp_path / "a.h5ad", stored)
    with pytest.raises(InputError, match=message) as refused:
        embed([path], tmp_path / "c.zarr", EmbedConfig(**{"encoder": f"obsm:{KEY}", **options}))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "c.zarr").exists()


def test_files_of_different_widths_are_refused(tmp_path: Path) -> None:
    paths = [with_obsm(tmp_path / f"{name}.h5ad", values(width)) for name, width in (("a", 5), ("b", 6))]
    other = ad.read_h5ad(paths[1])
    other.obs_names = [f"b {name}" for name in other.obs_names]  # the same cells twice are refused
    other.write_h5ad(paths[1])
    with pytest.raises(InputError, match=r"'X_scVI' has different widths: a\.h5ad 5, b\.h5ad 6"):
        embed(paths, tmp_path / "c.zarr", config())
