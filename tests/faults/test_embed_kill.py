"""`sest embed` killed, or out of disk, at any moment: the same command then ends with the cache it would have made.

The sweep runs in a process of its own (this file as a script), which has imported everything and never used Zarr, and
so can fork: every run is a child that really dies of SIGKILL before its k-th file operation.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the helpers, when run as a script
import sest.embedding.embed
import sest.embedding.plan
import sest.embedding.rows
from helpers.caches import hashes
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.se_model import write_se
from sest.cache import CacheError, open_cache, schema
from sest.cache.storage import LocalStorage
from sest.config import EmbedConfig
from sest.se.model import StateEncoder

CHANGES = ("replace", "unlink", "truncate")  # of the os module; Zarr and pathlib use them too


class Child:
    """One run of `sest embed` in a forked process, which stops before its k-th file operation.

    Args:
        folder: has the input, the model and the caches.
        way: "killed": SIGKILL; "torn": SIGKILL in the middle of the k-th write to the journal; "full": from the k-th
            operation on, nothing can be written (ENOSPC).
    """

    def __init__(self, folder: Path, way: str = "", k: int = -1) -> None:
        self.folder, self.way, self.k = folder, way, k
        self.count = 0

    def run(self, cache: Path) -> int:
        """Fork, embed into `cache`; returns the exit code, negative for a signal."""
        pid = os.fork()
        if not pid:
            code = 1
            try:
                self._break()
                code = self._embed(cache)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def operations(self, cache: Path) -> int:
        """How many operations (or journal writes) an uninterrupted run makes."""
        self.run(cache)
        return int((self.folder / "count").read_text())

    def _embed(self, cache: Path) -> int:
        # Shards of 8 cells, batches of 3, every batch spooled: all that can happen happens in a second.
        schema.ROWS_PER_CHUNK, schema.ROWS_PER_SHARD, schema.ENTRIES_PER_CHUNK, schema.ENTRIES_PER_SHARD = 4, 8, 64, 256
        sest.embedding.plan.SAMPLE_CELLS, sest.embedding.rows.SPOOL_SECONDS = 9, 0.0
        config = EmbedConfig(encoder=str(self.folder / "se"), dim="4", batch_size=3, device="cpu")
        try:
            sest.embedding.embed.embed([self.folder / "splits.toml"], cache, config)
            if not self.way:
                assert open_cache(cache).verify() == []
        except Exception as error:  # noqa: BLE001 - shown, and the exit code says so
            if self.way == "full" and (isinstance(error, CacheError) or getattr(error, "errno", 0) == errno.ENOSPC):
                return errno.ENOSPC
            traceback.print_exc()
            return 1
        if self.k < 0:
            (self.folder / "count").write_text(str(self.count))
        return 0

    def _break(self) -> None:
        if self.way == "torn":
            append = LocalStorage.append

            def tearing(storage: LocalStorage, name: str, data: bytes) -> None:
                if self._now():
                    with open(storage.root / name, "ab") as file:
                        file.write(data[: int(len(data) * 0.6)])
                    os.kill(os.getpid(), signal.SIGKILL)
                append(storage, name, data)

            LocalStorage.append = tearing  # type: ignore[method-assign, assignment]
        elif self.way:
            # what a kill leaves behind changes by these alone; a full disk is also noticed by fsync
            for name in CHANGES if self.way == "killed" else (*CHANGES, "fsync"):
                setattr(os, name, self._stopping(getattr(os, name)))

    def _now(self) -> bool:
        self.count += 1
        return self.count > self.k >= 0

    def _stopping(self, operation: Callable[..., object]) -> Callable[..., object]:
        def stopping(*args: object, **options: object) -> object:
            if self._now():
                if self.way == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return operation(*args, **options)

        return stopping


def make_input(folder: Path) -> None:
    """Two files of one dataset and a model; the PCA to 4 is fitted on 9 cells."""
    write_cells(folder / "a.h5ad", counts(19))
    write_cells(folder / "b.h5ad", counts(11, seed=1))
    write_se(folder / "se", gene_names(35))
    (folder / "splits.toml").write_text('[datasets]\nd = "{a,b}.h5ad"\n[training]\nd = "train"\n')


def sweep(folder: Path, way: str, points: int) -> None:
    """Stop a run at `points` places (0: at every one), each time go on to the end, and compare with the whole."""
    whole = folder / f"whole-{way}.zarr"
    n = Child(folder, way).operations(whole)
    expected = hashes(whole)
    assert n > 10, n
    for k in range(n) if not points else [int((i + 0.5) * n / points) for i in range(points)]:
        cache = folder / f"{way}{k}.zarr"
        code = Child(folder, way, k).run(cache)
        assert code == (errno.ENOSPC if way == "full" else -signal.SIGKILL), (way, k, code)
        assert Child(folder).run(cache) == 0, (way, k)
        found = hashes(cache)
        assert found == expected, (way, k, sorted(set(found.items()) ^ set(expected.items())))
        subprocess.run(["rm", "-r", str(cache)], check=True)


def chain(folder: Path, seed: int) -> None:
    """Kill one run again and again, each time before it can do all of the work, until it ends by itself."""
    whole, cache = folder / f"whole-chain{seed}.zarr", folder / f"chain{seed}.zarr"
    n, rng, kills = Child(folder, "killed").operations(whole), np.random.default_rng(seed), 0
    while (code := Child(folder, "killed", int(rng.integers(n // 3, n // 2))).run(cache)) == -signal.SIGKILL:
        kills += 1
        assert kills < 200
    assert code == 0 and kills, (code, kills)
    assert Child(folder).run(cache) == 0 and hashes(cache) == hashes(whole)


def in_a_process(folder: Path, *plan: str) -> None:
    """Run this file as a script. Each word of the plan: a way and how many points of it, or "chain" and a seed."""
    make_input(folder)
    done = subprocess.run([sys.executable, __file__, str(folder), *plan], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stopped_run_ends_with_the_same_cache_when_repeated(tmp_path: Path) -> None:
    in_a_process(tmp_path, "killed:4", "torn:1", "full:1")


@pytest.mark.full
@pytest.mark.parametrize("plan", ["killed:0", "torn:0", "full:100"])
def test_a_run_stopped_at_any_operation_ends_with_the_same_cache_when_repeated(tmp_path: Path, plan: str) -> None:
    in_a_process(tmp_path, plan)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_again_and_again_ends_with_the_same_cache(tmp_path: Path, seed: int) -> None:
    in_a_process(tmp_path, f"chain:{seed}")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)]
)
def test_the_command_saves_its_rows_and_exits_when_the_scheduler_asks(tmp_path: Path, signum: int, code: int) -> None:
    path = write_cells(tmp_path / "a.h5ad", counts(20_000))
    se, cache = write_se(tmp_path / "se", gene_names(35), pad_length=64), tmp_path / "s.zarr"
    words = [path, "--encoder", se, "--cache", cache, "--batch-size", 1, "--device", "cpu"]
    command = [sys.executable, "-m", "sest", "embed", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        journal, deadline = cache / schema.JOURNAL, time.monotonic() + 120
        while not (journal.exists() and "X/indices/c/0" in journal.read_text()):
            assert run.poll() is None and time.monotonic() < deadline, run.stderr and run.stderr.read()
            time.sleep(0.05)
        time.sleep(0.5)  # of the encoding, which takes a minute
        run.send_signal(signum)
        said = run.communicate(timeout=60)[1]
    assert run.returncode == code, said
    assert said.splitlines()[-1] == f"Stopped. Finished rows are in {cache}; the same command continues there."
    assert "Traceback" not in said
    (spooled,) = (cache / schema.SPOOL).rglob("*.npy")
    rows = np.load(spooled)
    assert 0 < len(rows) < 16_384
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    with pytest.raises(CacheError, match="unfinished"):
        open_cache(cache)


if __name__ == "__main__":
    assert StateEncoder.__module__ in sys.modules  # torch is imported before the first fork
    for word in sys.argv[2:]:
        name, number = word.split(":")
        if name == "chain":
            chain(Path(sys.argv[1]), int(number))
        else:
            sweep(Path(sys.argv[1]), name, int(number))
