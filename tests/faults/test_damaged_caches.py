"""Files of a finished cache that were changed afterwards: each change is refused in one line, or changes nothing.

`damage` is what disks and people do: a bit, an end that is missing, an empty file, no file. `forge` is what somebody
does who wants it to be believed: the journal and COMPLETE are written again, and the checksums of chunks too.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from helpers.caches import reseal, small_screen, write_cache
from helpers.configs import small_config
from helpers.damage import KINDS, damage, files_of
from sest.cache import CacheError, open_cache, schema
from sest.data.labels import read_embeddings, read_labels
from sest.data.targets import read_targets
from sest.errors import Error, TrainingFailed
from sest.training.train import train

logger = logging.getLogger(__name__)

ATTEMPTS = 1000  # of each of the two sweeps, in `make faults`


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of two files with several shards each, and what training keeps beside it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROWS_PER_CHUNK": 16, "ROWS_PER_SHARD": 32, "ENTRIES_PER_CHUNK": 512}.items():
            patch.setattr(schema, name, value)
        patch.setattr(schema, "ENTRIES_PER_SHARD", 1024)
        patch.setattr("os.fsync", lambda file: None)  # no power fails here
        groups = [small_screen("a"), small_screen("ds/b", scale="log1p", seed=1)]
        path = write_cache(tmp_path_factory.mktemp("sound") / "cache.zarr", groups)
        labels, _ = read_labels(open_cache(path))
        read_targets(open_cache(path), 1e4, controls=labels.is_control)
        yield path


def content(path: Path) -> dict[str, Any]:
    """All that anything reads of a cache."""
    cache = open_cache(path)
    labels, groups = read_labels(cache)
    targets = read_targets(cache, 1e4, where="memory", controls=labels.is_control)
    controls = np.flatnonzero(labels.is_control)
    kept = read_targets(cache, 1e4, controls=labels.is_control, only_controls=True)
    found: dict[str, Any] = {
        "labels": [repr(table) for table in groups] + [repr(vars(labels))],
        "targets": [targets.indptr, targets.indices, targets.data, targets.factor],
        "controls": kept.values(controls).toarray(),
        "embeddings": read_embeddings(cache, labels),
        "projection": cache.projection,
        "genes": cache.projection_attributes,
        "attributes": cache.attributes,
    }
    for name, group in cache.groups.items():
        found[name] = group.to_anndata().obs.to_csv(), group.genes, group.embeddings(), group.attributes
    return found


def forge(file: Path, rng: np.random.Generator) -> None:
    """Change some bytes of a file; those of the chunks of a shard with their checksums."""
    data = bytearray(file.read_bytes())
    n = int(rng.integers(1, 9))
    start = int(rng.integers(len(data))) if rng.integers(2) else int(rng.integers(min(len(data), 40)))
    data[start : start + n] = rng.integers(0, 256, n, np.uint8).tobytes()[: len(data) - start]
    if "/c/" in file.as_posix() and file.parts[-2] != "codes" and not file.match("*/indptr/c/*"):
        for n_chunks in (1, 2):  # of the shards of `sound`
            at = len(data) - 16 * n_chunks - 4
            index = np.frombuffer(data[at:-4], "<u8").reshape(-1, 2) if at > 0 else np.zeros((0, 2), "<u8")
            for place, n_bytes in index.tolist():
                if 4 < n_bytes <= at - place:
                    crc = google_crc32c.value(bytes(data[place : place + n_bytes - 4]))
                    data[place + n_bytes - 4 : place + n_bytes] = crc.to_bytes(4, "little")
            if len(index):
                data[-4:] = google_crc32c.value(bytes(data[at:-4])).to_bytes(4, "little")
            if len(index) and int(index[:, 1].sum()) == at:
                break
    file.write_bytes(data)


def outcome(path: Path, expected: dict[str, Any] | None) -> str:
    """ "refused", "harmless" or "changed"; what is neither an Error nor read raises. `expected`: None where forged."""
    try:
        found = content(path)
    except Error as refused:
        said = str(refused)
        assert "\n" not in said and len(said) < 1000, said
        return "refused"
    if expected is None:
        return "read"
    try:
        np.testing.assert_equal(found, expected)
    except AssertionError:
        return "changed"
    return "harmless"


def sweep(sound: Path, folder: Path, change: Callable[[Path], None], files: list[str], expected: Any) -> Counter[str]:
    """Change one file after the other of copies of a cache; how each ended."""
    ends: Counter[str] = Counter()
    path = folder / "cache.zarr"
    for name in files:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(sound, path)
        change(path / name)
        if expected is None and not name.startswith("."):
            reseal(path)
        end = outcome(path, expected)
        assert end != "changed", name
        ends[end] += 1
    return ends


def names_of(sound: Path) -> list[str]:
    return [file.relative_to(sound).as_posix() for file in files_of(sound)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_any_file_is_refused_or_changes_nothing(sound: Path, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    names = list(rng.choice(names_of(sound), 16 if kind == "bit" else 4, replace=False))
    ends = sweep(sound, tmp_path, lambda file: damage(file, kind, rng), names, content(sound))
    kept = sum(name.startswith(schema.DERIVED) for name in names)  # is made again
    assert ends["harmless"] == kept and ends["refused"] == len(names) - kept


def test_a_forged_cache_is_read_or_refused(sound: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [name for name in names_of(sound) if name not in (schema.JOURNAL, schema.COMPLETE)]
    ends = sweep(sound, tmp_path, lambda file: forge(file, rng), [names[i] for i in rng.choice(len(names), 16)], None)
    assert ends["refused"] > 4


@pytest.mark.full
def test_a_thousand_changes_of_a_cache_are_refused_or_change_nothing(sound: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    names = list(rng.choice(names_of(sound), ATTEMPTS))
    kinds = iter(rng.choice(KINDS, ATTEMPTS, p=[0.7, 0.1, 0.1, 0.1]))
    ends = sweep(sound, tmp_path, lambda file: damage(file, str(next(kinds)), rng), names, content(sound))
    logger.info(f"{dict(ends)}")  # shown with --log-cli-level=INFO
    assert set(ends) <= {"refused", "harmless"} and ends.total() == ATTEMPTS


@pytest.mark.full
def test_a_thousand_forged_caches_are_read_or_refused(sound: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    names = [name for name in names_of(sound) if name not in (schema.JOURNAL, schema.COMPLETE)]
    ends = sweep(sound, tmp_path, lambda file: forge(file, rng), list(rng.choice(names, ATTEMPTS)), None)
    logger.info(f"{dict(ends)}")  # shown with --log-cli-level=INFO
    assert ends.total() == ATTEMPTS and ends["refused"] > ATTEMPTS // 4


def test_training_on_row_starts_that_lead_elsewhere_ends_in_one_line(sound: Path, tmp_path: Path) -> None:
    """They ended in a double free once: values were written before the beginning of an array."""
    cache = Path(shutil.copytree(sound, tmp_path / "cache.zarr"))
    shutil.rmtree(cache / schema.DERIVED)
    indptr = zarr.open_array(cache / "a/X/indptr", mode="r+")
    starts = np.array(indptr[:])
    starts[5], starts[6] = starts[6] + 40, 0
    indptr[:] = starts
    with pytest.raises(CacheError, match="a/X/indptr does not go up from 0") as refused:
        train(reseal(cache), tmp_path / "run", small_config())
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_training_whose_cache_is_deleted_saves_says_so_and_leaves_nothing_there(sound: Path, tmp_path: Path) -> None:
    cache, run = Path(shutil.copytree(sound, tmp_path / "cache.zarr")), tmp_path / "run"
    config = small_config(
        max_steps=4, val_every=2, log_every=1, checkpoint_every=4, target_sum=1e4, mixed_scales="allow"
    )
    with pytest.raises(
        TrainingFailed, match=r"was deleted or moved while it was trained on\. Step 2 is saved in"
    ) as said:
        train(cache, run, config, on_start=lambda data, model: shutil.rmtree(cache))
    assert "\n" not in str(said.value) and not cache.exists()
    shutil.copytree(sound, cache)
    assert train(cache, run, config, resume="auto").step == 4
