"""Readers of files, and what hypothesis makes of sound files for them: each is read, or refused in one line.

    python -m helpers.fuzzing --seconds 60 --seed 0 --out build/fuzz     (see `make fuzz`)

A file that ends otherwise is kept below `--out`; of one that ends the process itself, the last one that was tried.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import pickle
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from helpers.caches import reseal, small_screen, write_cache
from helpers.configs import small_config
from helpers.damaged_h5ad import counts, write
from sest.cache import open_cache, schema
from sest.cells.scale import scan_file
from sest.cells.split_file import read_splits
from sest.config import TrainConfig
from sest.data.labels import read_labels
from sest.data.targets import read_targets
from sest.errors import LONGEST_LINE, Error
from sest.files.cell_file import CellFile
from sest.options import read_toml
from sest.runs.checkpoint import open_checkpoint
from sest.runs.curves import curves_of, read_lines
from sest.runs.run_folder import CONFIG, METRICS, read_run_config
from sest.runs.schema import STATE
from sest.training.train import train
from sest.untrusted import probe
from sest.untrusted.plain_yaml import read_yaml
from sest.untrusted.tensors import read_vectors

SLOWEST = probe.SECONDS + 10.0  # for one file: one in which HDF5's library has no end is given up
MEMORY = 2**31  # bytes that the process may take on top
ODD = (
    *(
        b"",
        b"\0",
        b"\xff",
        b"\n",
        b'"',
        b"'",
        b"[",
        b"{",
        b"]",
        b"}",
        b",",
        b"-",
        b".",
        b"..",
        b"../",
        b"\x1b[31m",
        b"\x80",
    ),
    *(b"0", b"-1", b"1e999", b"nan", b"null", b"true", b"[]", b"{}", b'""', b"9" * 30, b"2147483648", b"\xe2\x80\xae"),
    *(n.to_bytes(8, "little") for n in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)),
)


SPLITS = """
[datasets]
d = "{a,b}.h5ad"
[training]
d = "train"
[zeroshot]
"d.x" = "test"
[fewshot."d.y"]
val = ["P"]
test = ["Q", "R"]
"""


@dataclass(frozen=True)
class Target:
    """One kind of file: a sound one, where it lies, and what reads it."""

    sound: bytes
    place: Path
    read: Callable[[], object]


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """A file that differs from a sound one in a few places."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        kind = draw(st.integers(0, 4))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            data[at : at + length] = draw(st.sampled_from(ODD))
        elif kind == 2:
            data[at : at + length] = draw(st.binary(max_size=12))
        elif kind == 3:
            other = draw(st.integers(0, len(data)))
            data[at:at] = data[other : other + 10 * length] * draw(st.sampled_from((1, 1, 1, 50, 5000)))
        else:
            del data[at : at + draw(st.sampled_from((length, len(data) // 3)))]
    return bytes(data)


def _values(file: Path) -> object:
    with CellFile(file) as opened:
        scan_file(opened)
        return opened.obs.frame(), opened.var


def _cache(path: Path, sealed: bool) -> Callable[[], object]:
    def read() -> object:
        if sealed:
            reseal(path)
        cache = open_cache(path)
        labels, _ = read_labels(cache)
        return read_targets(cache, 1e4, where="memory", controls=labels.is_control)

    return read


def targets(folder: Path) -> dict[str, Target]:
    """All readers, over sound files in a folder."""
    cache, run, files = folder / "cache.zarr", folder / "run", folder / "files"
    files.mkdir()
    group = small_screen()
    write_cache(cache, [group])
    train(cache, run, small_config(max_steps=4))
    found: dict[str, Target] = {}

    def add(name: str, place: Path, read: Callable[[], object], sound: bytes | None = None) -> None:
        found[name] = Target(place.read_bytes() if sound is None else sound, place, read)

    def add_file(name: str, text: str, read: Callable[[Path], object]) -> None:
        place = files / f"{name}.toml"
        add(name, place, lambda: read(place), text.encode())

    add("config", run / CONFIG, lambda: read_run_config(run))
    add_file("toml", 2 * '[[a]]\nb = [1, 2.5, "x", true]\nc = { d = 1979-05-27 }\n', read_toml)
    add_file("options", "lr = 1e-3\nhidden = 8\n", lambda place: TrainConfig.from_values(read_toml(place), "file"))
    add_file("splits", SPLITS, lambda place: read_splits(place, resolve_files=False))
    add("state", run / "last" / STATE, lambda: open_checkpoint(run / "last", check=False).sizes)
    add("metrics", run / METRICS, lambda: curves_of(read_lines(run / METRICS)))
    screen = cache / group.path
    add("journal", cache / schema.JOURNAL, _cache(cache, sealed=False))
    add("manifest", cache / "zarr.json", _cache(cache, sealed=True))
    add("array", screen / "X" / "data" / "zarr.json", _cache(cache, sealed=True))
    add("labels", next((screen / "obs/perturbation/categories").rglob("c/0")), _cache(cache, sealed=True))
    add("values", next((screen / "X/indices").rglob("c/0")), _cache(cache, sealed=True))
    cells = write(files / "cells.h5ad", counts())
    add("h5ad", cells, lambda: _values(cells))
    vectors = {f"G{i}": torch.arange(4.0) + i for i in range(5)}
    for suffix, sound in _vector_files(vectors).items():
        place = files / f"vectors{suffix}"
        add(suffix[1:], place, partial(read_vectors, place), sound)
    add("yaml", files / "x.yaml", lambda: read_yaml(files / "x.yaml"), b"a: [1, 2]\nb: &x {c: 1}\nd: *x\n")
    return found


def _vector_files(vectors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    pt, npz = io.BytesIO(), io.BytesIO()
    torch.save(dict(vectors), pt)
    arrays = {name: value.numpy() for name, value in vectors.items()}
    np.savez_compressed(npz, **arrays)  # type: ignore[arg-type]
    rows = "".join(f"{name},{','.join(map(str, value.tolist()))}\n" for name, value in vectors.items())
    return {
        ".safetensors": safetensors.torch.save(dict(vectors)),
        ".npz": npz.getvalue(),
        ".pt": pt.getvalue(),
        ".pkl": pickle.dumps({name: value.tolist() for name, value in arrays.items()}),
        ".csv": ("gene,a,b,c,d\n" + rows).encode(),
        ".tsv": rows.replace(",", "\t").encode(),
    }


def outcome(target: Target, data: bytes) -> str:
    """ "read", "refused", or what went wrong."""
    target.place.write_bytes(data)
    began = time.monotonic()
    try:
        target.read()
        end = "read"
    except Error as error:
        end = "refused" if "\n" not in str(error) and len(str(error)) <= LONGEST_LINE else f"its line is {error!r:.300}"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        end = f"{type(error).__name__}: {error!s:.300}"
    seconds = time.monotonic() - began
    return end if seconds < SLOWEST else f"took {seconds:.0f} seconds"


def fuzz(name: str, target: Target, examples: int, start: int, kept: Path) -> Counter[str]:
    """Try so many files; those that end otherwise than read or refused are kept."""
    ends: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(damaged(target.sound))
    def one(data: bytes) -> None:
        (kept / f"last-{name}").write_bytes(data)
        end = outcome(target, data)
        ends[end] += 1
        if end not in ("read", "refused") and ends[end] == 1:
            (kept / f"{name}-{len(ends)}-{start}").write_bytes(data)

    try:
        one()
    finally:
        target.place.write_bytes(target.sound)
    (kept / f"last-{name}").unlink()
    return ends


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> None:
    """Try all readers by turns until the time is over; exit code 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--only", default="", help="names of readers, with commas between")
    options = parser.parse_args()
    faulthandler.enable()
    options.out.mkdir(parents=True, exist_ok=True)
    ends: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        readers = targets(Path(folder))
        names = options.only.split(",") if options.only else list(readers)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
        until, number = time.monotonic() + options.seconds, options.seed
        while time.monotonic() < until:
            for name in names:
                if time.monotonic() < until:
                    ends.setdefault(name, Counter()).update(fuzz(name, readers[name], 50, number, options.out))
            number += 1
    bad = 0
    for name, found in ends.items():
        say(f"{name:<12} {found.total():>7,} files: {found['read']:,} read, {found['refused']:,} refused")
        for end, n in found.items():
            if end not in ("read", "refused"):
                bad += n
                say(f"    {n:,} {end}")
    say(f"{sum(found.total() for found in ends.values()):,} files, {bad:,} findings, kept in {options.out}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
