"""Public screens by name: `sest.datasets.fetch("kang")` is a file of cells, downloaded once and checked.

Addresses and checksums are those that the archives publish: Zenodo's MD5 of scPerturb 1.4 (Peidli et al., Nature
Methods 2024; https://doi.org/10.5281/zenodo.13350497), and the SHA-256 that several projects state of the file of
scverse's examples.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sest.errors import InputError, nearest, one_line, shown
from sest.progress import advance, begin

FOLDER = "SEST_DATASETS"  # variable: the folder that keeps the files
SECONDS = 30  # without a byte until a server counts as gone
CHUNK = 2**20  # bytes
SCPERTURB = "https://zenodo.org/records/13350497/files/{}?download=1"


@dataclass(frozen=True)
class Dataset:
    """A public screen in one file.

    Args:
        url: where it is.
        file: its name here.
        n_bytes: its size.
        checksum: "md5:..." or "sha256:...".
        about: cells, perturbations and source, in a line.
    """

    url: str
    file: str
    n_bytes: int
    checksum: str
    about: str


def _scperturb(file: str, n_bytes: int, md5: str, about: str) -> Dataset:
    return Dataset(SCPERTURB.format(file), file, n_bytes, f"md5:{md5}", about)


DATASETS = {
    "kang": Dataset(
        "https://exampledata.scverse.org/pertpy/kang_2018.h5ad",
        "kang_2018.h5ad",
        38_356_412,
        "sha256:e6a5adac64dcdeb36eaba27db49b63e0c64bb0ed4a64c6705971506b41c39830",
        "24,673 blood cells of 8 types, with and without interferon beta (obs label: stim, ctrl); Kang et al. 2018",
    ),
    "adamson": _scperturb(
        "AdamsonWeissman2016_GSM2406675_10X001.h5ad",
        34_557_246,
        "232f7e3756d41602bbe434b50662a76f",
        "K562, CRISPRi of a few transcription factors, the pilot of Adamson et al. 2016",
    ),
    "papalexi": _scperturb(
        "PapalexiSatija2021_eccite_RNA.h5ad",
        147_215_278,
        "d9e8bfe20b0e7b0919be042e8fcf6d03",
        "THP-1, CRISPR knock-outs of 25 regulators of immune checkpoints; Papalexi et al. 2021",
    ),
    "norman": _scperturb(
        "NormanWeissman2019_filtered.h5ad",
        698_680_199,
        "c870e6967d91c017d9da827bab183cd6",
        "111,445 K562, CRISPR activation of single genes and pairs; Norman et al. 2019",
    ),
    "replogle_k562": _scperturb(
        "ReplogleWeissman2022_K562_essential.h5ad",
        1_546_729_675,
        "d8cba17576d1a8afc0f7d71b79cad0f7",
        "310,385 K562, CRISPRi of essential genes; Replogle et al. 2022",
    ),
    "replogle_rpe1": _scperturb(
        "ReplogleWeissman2022_rpe1.h5ad",
        1_236_886_900,
        "cc7f1ec50aeb3a3e1b4a6cfa713d80fa",
        "RPE1, CRISPRi of essential genes; Replogle et al. 2022",
    ),
}


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """The file of a public screen, as `sest.embed` and `sest run` take it; downloaded the first time.

    Its checksum is compared whenever it is asked for. Needs the extra `datasets`.

    Args:
        name: one of `DATASETS`.
        folder: where it is kept; default: the folder that SEST_DATASETS names, else one for caches of the user.

    Raises:
        InputError: an unknown name, no network, or bytes of another checksum, of which nothing is kept.
    """
    if name not in DATASETS:
        raise InputError(f"No dataset {name!r}. There are: {shown(DATASETS, 20)}.{nearest(name, DATASETS)}")
    dataset = DATASETS[name]
    pooch = _package(name, dataset)
    kept = Path(folder or os.environ.get(FOLDER) or pooch.os_cache("sest"))
    pooch.get_logger().setLevel("WARNING")  # it would print; progress is told instead
    bar = _Bar(f"Downloading {name}", dataset.n_bytes)
    size = f"{dataset.n_bytes / 1e6:,.0f} MB"
    by_hand = f"Download it where there is a network, put it into {kept} as {dataset.file}, and ask again."
    try:
        found = pooch.retrieve(
            dataset.url,
            dataset.checksum,
            fname=dataset.file,
            path=kept,
            downloader=pooch.HTTPDownloader(bar, chunk_size=CHUNK, timeout=SECONDS),
        )
    except ValueError as error:  # how pooch says that hashes differ
        raise InputError(
            f"What {dataset.url} sends is not the {name} that was published ({dataset.checksum}): nothing is kept. "
            f"Is it the page of a proxy or a login? {by_hand}"
        ) from error
    except OSError as error:  # requests' errors are OSErrors
        raise InputError(f"Cannot fetch {name} ({size}) from {dataset.url}: {_reason(error)}. {by_hand}") from error
    return Path(found)


def _package(name: str, dataset: Dataset) -> ModuleType:
    try:
        import pooch
    except ImportError as error:
        raise InputError(
            f"sest.datasets needs pooch: pip install 'sest[datasets]'. {name} by hand: {dataset.url}"
        ) from error
    return pooch


def _reason(error: BaseException) -> str:
    """Why there is no answer; a network library's chain of causes is one thing to its user."""
    unreached = ("Max retries exceeded", "Failed to resolve", "Connection aborted")
    return "no network, or no such server" if any(words in str(error) for words in unreached) else one_line(error)


class _Bar:
    """What pooch takes as a progress bar, told to whoever listens."""

    def __init__(self, task: str, total: int) -> None:
        self.total = total  # pooch sets it to what the server says
        self._task, self._done = task, 0

    def update(self, n: int) -> None:
        """`n` more bytes, or somewhat fewer at the end."""
        if self._done == 0:
            begin(self._task, self.total, "B")
        n = max(min(n, self.total - self._done), 0)
        self._done += n
        advance(n)

    def reset(self) -> None:
        """pooch fills its bar once more at the end."""

    def close(self) -> None:
        pass
