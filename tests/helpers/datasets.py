"""Small caches opened with splits: the data of a run, without a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from helpers.caches import GENES, CellGroup, small_screen, write_cache
from helpers.configs import small_config
from sest.cache import Cache, open_cache
from sest.data.dataset import Dataset, read_dataset

Opened = tuple[Cache, list[CellGroup]]
TWO_SCREENS = """
[datasets]
screen = "screen.h5ad"
other = "other.h5ad"
[training]
screen = "train"
other = "train"
[zeroshot]
"other.y" = "test"
[fewshot."screen.x"]
val = ["P"]
"""


def two_screens() -> list[CellGroup]:
    """Two count files with the cell types x and y each; TWO_SCREENS: other/y tests, P of screen/x validates."""
    return [small_screen("screen"), small_screen("other", control="nt", seed=1)]


def dataset_of(folder: Path, groups: Sequence[CellGroup], splits: str) -> Dataset:
    """What a run of `small_config` reads of these cells, split so."""
    (folder / "splits.toml").write_text(splits)
    cache = write_cache(folder / "s.zarr", groups)
    return read_dataset(cache, small_config(splits=str(folder / "splits.toml")))


def opened(folder: Path, *groups: CellGroup) -> Cache:
    """A cache of these groups."""
    return open_cache(write_cache(folder / "s.zarr", groups))


def open_three_files(folder: Path) -> Opened:
    """Files with other genes, orders of genes, control labels and scales."""
    groups = [
        small_screen("a", genes=GENES, cell_types=("x", "y")),
        small_screen("b/one", genes=GENES[4:][::-1], control="nt", sizes={"Q": 3, "Z": 2}, seed=1),
        small_screen("b/two", genes=(*GENES[2:8], "only", *GENES[8:]), scale="log1p", cell_types=("y",), seed=2),
    ]
    return opened(folder, *groups), groups
