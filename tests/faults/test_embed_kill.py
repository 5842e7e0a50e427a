"""`sest embed` killed, or out of disk, at any moment: the same command then ends with the cache it would have made.

What a kill leaves behind changes with calls of the C library alone; these are counted, and each run dies at one.
"""

from __future__ import annotations

import errno
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.caches import hashes
from helpers.forked import NOTHING, Command, Ended, Fault, Forked
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.se_model import write_se
from sest.cache import CacheError, open_cache, schema

logger = logging.getLogger(__name__)

# Shards of 16 cells, batches of 5, every batch spooled: all that can happen happens in a second.
CONSTANTS = (
    ("sest.cache.schema", "ROWS_PER_CHUNK", 8),
    ("sest.cache.schema", "ROWS_PER_SHARD", 16),
    ("sest.cache.schema", "ENTRIES_PER_CHUNK", 256),
    ("sest.cache.schema", "ENTRIES_PER_SHARD", 1024),
    ("sest.embedding.plan", "SAMPLE_CELLS", 9),
    ("sest.embedding.rows", "SPOOL_SECONDS", 0.0),
    ("sest.files.containers", "check_structure", NOTHING),  # a process of its own, which takes longer than all else
)
DURABLE = ("rename", "fsync")
UNSEEN = 20  # calls at most after which the lock of a process is there, by which others know that it wrote
PARTS = 8  # of a sweep: none takes minutes


class Embedding:
    """Two files of one dataset and a model; the PCA to 4 is fitted on 9 cells."""

    def __init__(self, forked: Forked, folder: Path) -> None:
        self.forked, self.folder = forked, folder
        write_cells(folder / "a.h5ad", counts(19))
        write_cells(folder / "b.h5ad", counts(11, seed=1))
        write_se(folder / "se", gene_names(35))
        (folder / "splits.toml").write_text('[datasets]\nd = "{a,b}.h5ad"\n[training]\nd = "train"\n')
        ended = self.run(folder / "whole.zarr", Fault(str(folder / "whole.zarr")))
        assert ended.code == 0, ended
        self.whole, self.calls = hashes(folder / "whole.zarr"), ended.calls
        assert open_cache(folder / "whole.zarr").verify() == []

    def command(self, cache: Path, fault: Fault | None = None, *more: object, **options: Any) -> Command:
        words = ("embed", self.folder / "splits.toml", "--encoder", self.folder / "se", "--cache", cache)
        settings = ("--dim", 4, "--batch-size", 5, "--device", "cpu")
        return Command([str(w) for w in (*words, *settings, *more)], fault=fault, constants=CONSTANTS, **options)

    def run(self, cache: Path, fault: Fault | None = None, *more: object) -> Ended:
        return self.forked.together([self.command(cache, fault, *more)])[0]

    def calls_of(self, *kinds: str) -> int:
        """How often an uninterrupted run makes calls of these kinds."""
        cache = self.folder / "counted.zarr"
        calls = self.run(cache, Fault(str(cache), kinds)).calls
        subprocess.run(["rm", "-r", str(cache)], check=True)
        return calls

    def stop_and_repeat(self, how: str, at: int, kinds: tuple[str, ...] = Fault.kinds) -> None:
        """Stop a run at its `at`-th call, repeat it, and compare with the whole."""
        cache = self.folder / f"{how}-{at}.zarr"
        ended = self.run(cache, Fault(str(cache), kinds, at, how, errno.ENOSPC))
        if how in ("kill", "tear"):
            assert ended.code == -signal.SIGKILL, (at, ended)
        else:
            assert ended.code in (0, 2) and "Traceback" not in ended.err, (at, ended)
            last = ended.err.splitlines()[-1]
            assert ended.code == 0 or last.startswith(("Error: No space left on device: /", "Error: Cannot write")), (
                last
            )
        self.repeat(cache, (how, at))

    def repeat(self, cache: Path, what: object) -> None:
        ended = self.run(cache)
        assert ended.code == 0, (what, ended)
        found = hashes(cache)
        assert found == self.whole, (what, sorted(set(found.items()) ^ set(self.whole.items())))
        subprocess.run(["rm", "-r", str(cache)], check=True)


@pytest.fixture(scope="module")
def embedding(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Embedding:
    return Embedding(forked, tmp_path_factory.mktemp("embedding"))


def places(n: int, calls: int) -> list[int]:
    """`n` numbers of calls, from the first to the last."""
    return sorted({1 + round(i * (calls - 1) / max(n - 1, 1)) for i in range(n)})


def test_a_stopped_run_ends_with_the_same_cache_when_repeated(embedding: Embedding) -> None:
    n = embedding.calls
    for how, at in (("kill", n // 2), ("kill", n - 2), ("fail on", n // 3)):
        embedding.stop_and_repeat(how, at)
    embedding.stop_and_repeat("tear", embedding.calls_of("write") // 2, ("write",))


@pytest.mark.full
def test_a_run_killed_at_any_call_ends_with_the_same_cache_when_repeated(embedding: Embedding) -> None:
    for at in places(60, embedding.calls):
        embedding.stop_and_repeat("kill", at)


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_rename_or_fsync_ends_with_the_same_cache_when_repeated(
    embedding: Embedding, part: int
) -> None:
    n = embedding.calls_of(*DURABLE)
    logger.info(f"{n} renames and fsyncs")  # shown with --log-cli-level=INFO
    for at in range(1 + part, n + 1, PARTS):
        embedding.stop_and_repeat("kill", at, DURABLE)


@pytest.mark.full
@pytest.mark.parametrize("how", ["tear", "fail", "fail on"])
def test_a_run_whose_disk_fails_ends_with_the_same_cache_when_repeated(embedding: Embedding, how: str) -> None:
    kinds = ("write",) if how == "tear" else Fault.kinds
    for at in places(20, embedding.calls_of(*kinds)):
        embedding.stop_and_repeat(how, at, kinds)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_again_and_again_ends_with_the_same_cache(embedding: Embedding, seed: int) -> None:
    """Each time before it can do all of the work, until it ends by itself."""
    rng, cache, kills = np.random.default_rng(seed), embedding.folder / f"chain-{seed}.zarr", 0
    while True:
        at = int(rng.integers(embedding.calls // 4, embedding.calls // 2))
        if embedding.run(cache, Fault(str(cache), at=at, how="kill")).code == 0:
            break
        kills += 1
        assert kills < 100
    assert kills
    embedding.repeat(cache, seed)


def two_ranks(embedding: Embedding, cache: Path, killed: int | None = None, at: int = 0) -> list[Ended]:
    """Embed by two processes, of which one may be killed."""
    commands = []
    for rank in range(2):
        fault = Fault(str(cache), at=at, how="kill") if rank == killed else None
        commands.append(embedding.command(cache, fault, "--rank", rank, "--world-size", 2))
    return embedding.forked.together(commands, seconds=90)


def kill_one_of_two(embedding: Embedding, killed: int, at: int) -> None:
    cache = embedding.folder / f"ranks-{killed}-{at}.zarr"
    ended = two_ranks(embedding, cache, killed, at)
    other = ended[1 - killed]
    last = other.err.splitlines()[-1]
    assert "Traceback" not in other.err, (killed, at, other)
    if at <= UNSEEN:  # it waits for a process that may not have been started yet, and says so
        assert other.code == -signal.SIGKILL and f"rank {killed} does not write yet, or no longer" in last, (at, other)
    else:
        assert other.code in (0, 2) and other.seconds < 60, (killed, at, other)
        assert other.code == 0 or f"Rank {killed} has ended before its part" in last, (killed, at, other)
    two = two_ranks(embedding, cache)
    assert [one.code for one in two] == [0, 0], two
    embedding.repeat(cache, (killed, at))  # nothing is left to do


def test_one_of_two_processes_that_is_killed_ends_the_other_with_a_line(embedding: Embedding) -> None:
    kill_one_of_two(embedding, 1, embedding.calls // 4)


@pytest.mark.full
@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_processes_killed_at_any_call_costs_nothing(embedding: Embedding, killed: int) -> None:
    for at in (1, *(UNSEEN + at for at in places(5, embedding.calls // 3))):
        kill_one_of_two(embedding, killed, at)


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
