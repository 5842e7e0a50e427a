"""The demo's cells and run, as the tests of predictions use them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import Demo
from safetensors.numpy import load_file

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.demo_cells import CONTROL, Predict, rows_of
from sest.config import PredictConfig
from sest.data.dataset import Dataset, read_dataset
from sest.errors import InputError
from sest.prediction.predict import predict


@pytest.fixture
def predicted(demo: Demo, tmp_path: Path) -> Predict:
    """Predicts with the demo's run, or another, to out.h5ad and reads it."""

    def call(run: Path = demo.run, **options: Any) -> ad.AnnData:
        predict(run, tmp_path / "out.h5ad", PredictConfig(**options), force=True)
        return ad.read_h5ad(tmp_path / "out.h5ad")

    return call


@pytest.fixture
def refusal(demo: Demo, tmp_path: Path) -> Callable[..., str]:
    """The one line with which a prediction to out.h5ad is refused; nothing is written."""

    def call(run: Path = demo.run, out: Path = tmp_path / "out.h5ad", **options: Any) -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError) as refused:
            predict(run, out, PredictConfig(**options))
        assert sorted(tmp_path.iterdir()) == before
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return call


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """P of x, and P and S of y are the test."""
    folder = tmp_path_factory.mktemp("requests")
    cache = write_cache(folder / "c.zarr", [small_screen("d")])
    text = '[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n[fewshot."d.x"]\nval = ["Q"]\ntest = ["P"]\n'
    (folder / "splits.toml").write_text(text + '[fewshot."d.y"]\ntest = ["P", "S"]\n')
    return read_dataset(cache, small_config(splits=str(folder / "splits.toml")))


@pytest.fixture(scope="module")
def real(demo: Demo) -> ad.AnnData:
    """The simulated cells: counts."""
    return ad.read_h5ad(demo.cells)


@pytest.fixture(scope="module")
def values(real: ad.AnnData) -> np.ndarray:
    """log1p of counts per 10,000, row by row in float64: nothing shared with the modules."""
    return np.stack([np.log1p(row * 1e4 / row.sum()) for row in real.X.toarray().astype(np.float64)])


@pytest.fixture(scope="module")
def whole(demo: Demo) -> ad.AnnData:
    """The demo's own prediction: of the test split."""
    return ad.read_h5ad(demo.folder / "predicted.h5ad")


@pytest.fixture(scope="module")
def held_out(demo: Demo) -> dict[str, list[str]]:
    """val and test perturbations, all of cell type beta."""
    splits: dict[str, list[str]] = tomllib.loads((demo.folder / "starter.toml").read_text())["fewshot"]["cells.beta"]
    return splits


@pytest.fixture(scope="module")
def names(demo: Demo) -> list[str]:
    """All perturbations."""
    return sorted(load_file(demo.features))


@pytest.fixture
def template(real: ad.AnnData, names: list[str], tmp_path: Path) -> ad.AnnData:
    """template.h5ad: shuffled rows of both cell types, 12 controls each, in columns that differ from the run's."""
    rng = np.random.default_rng(0)
    rows = [
        rng.choice(rows_of(real, name, cell_type), n, replace=False)
        for cell_type in ("alpha", "beta")
        for name, n in ((names[0], 20), (names[1], 5), (CONTROL, 12))
    ]
    chosen = real.obs.iloc[rng.permutation(np.concatenate(rows))]
    obs = pd.DataFrame(
        {
            "gene": chosen["target_gene"].astype(str).replace(CONTROL, "ctrl").to_numpy(),
            "cell_type": pd.Categorical(chosen["cell_type"].astype(str), categories=["gamma", "beta", "alpha"]),
            "score": rng.random(len(chosen)),
        },
        index=[f"row{i}" for i in range(len(chosen))],
    )
    made = ad.AnnData(sp.csr_matrix((len(obs), 3), dtype=np.float32), obs=obs)
    made.write_h5ad(tmp_path / "template.h5ad")
    return made
