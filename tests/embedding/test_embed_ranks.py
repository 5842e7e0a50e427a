"""Several processes that write one cache: it is the one that a single process writes, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import sest.embedding.embed
import sest.embedding.plan
from helpers.caches import hashes, small_shards
from helpers.embed_rank import EmbedRank
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.processes import Process, server
from helpers.se_model import write_se
from sest.cache import CacheError, CacheWriter, open_cache, schema
from sest.cache.disk import PARTIAL
from sest.cache.storage import LocalStorage
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.machine.ranks import SINGLE, Ranks


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 8 cells; the PCA is fitted on 14 cells in pieces of 4; nobody waits long for another process."""
    small_shards(monkeypatch)
    monkeypatch.setattr(sest.embedding.plan, "SAMPLE_CELLS", 14)
    monkeypatch.setattr(sest.embedding.embed, "SAMPLE_PIECE", 4)
    monkeypatch.setattr(sest.embedding.embed, "WAIT_SECONDS", 0.05)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [write_cells(tmp_path / "a.h5ad", counts(21)), write_cells(tmp_path / "b.h5ad", counts(13, seed=1))]


@pytest.fixture
def config(tmp_path: Path) -> EmbedConfig:
    return EmbedConfig(encoder=str(write_se(tmp_path / "se", gene_names(35))), dim="4", batch_size=3, device="cpu")


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_processes_together_write_the_cache_of_one_byte_for_byte(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path, world_size: int
) -> None:
    embed(inputs, tmp_path / "one.zarr", config)
    processes = [
        EmbedRank(inputs, tmp_path / "many.zarr", config, Ranks(rank, world_size))
        for rank in reversed(range(world_size))
    ]
    for process in processes:
        assert process.done().error is None
    assert sum(process.complete for process in processes) >= 1  # the last one to finish, at least
    assert hashes(tmp_path / "many.zarr") == hashes(tmp_path / "one.zarr")
    assert open_cache(tmp_path / "many.zarr").verify() == []
    assert not (tmp_path / "many.zarr" / schema.SPOOL).exists()


def test_a_dead_ranks_part_is_done_by_running_it_again_or_by_one_process(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(inputs, tmp_path / "one.zarr", config)
    write = CacheWriter.write_embedding_shard

    def dying(writer: CacheWriter, *arguments: object) -> None:
        if writer.rank == 1:
            raise InterruptedError
        write(writer, *arguments)  # type: ignore[arg-type]

    for name, again in (("same", Ranks(1, 2)), ("one process", SINGLE)):
        cache = tmp_path / f"{name}.zarr"
        with monkeypatch.context() as dead:
            dead.setattr(CacheWriter, "write_embedding_shard", dying)
            first, second = (EmbedRank(inputs, cache, config, Ranks(rank, 2)) for rank in (0, 1))
            assert isinstance(second.done().error, InterruptedError) and first.done().error is None
        assert not first.complete
        assert any("has done its part; 2 shards are left to the other processes" in text for text in first.notes.notes)
        with pytest.raises(CacheError, match="unfinished"):
            open_cache(cache)
        assert embed(inputs, cache, config, ranks=again).complete
        assert hashes(cache) == hashes(tmp_path / "one.zarr")


def test_a_rank_waits_for_rank_0_and_says_so(inputs: list[Path], config: EmbedConfig, tmp_path: Path) -> None:
    cache = tmp_path / "s.zarr"
    second = EmbedRank(inputs, cache, config, Ranks(1, 2))
    deadline = time.monotonic() + 30
    said = "Waiting for rank 0 to create the cache; rank 0 does not write yet, or no longer."
    while said not in second.notes.notes:
        assert time.monotonic() < deadline and second.is_alive()
        time.sleep(0.05)
    assert not (cache / schema.ROOT).exists()
    first = EmbedRank(inputs, cache, config, Ranks(0, 2))
    assert first.done().error is second.done().error is None
    assert first.complete or second.complete


def test_a_rank_whose_peer_died_ends_and_says_which(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sest.embedding.embed, "LOOK_SECONDS", 0.05)
    cache = tmp_path / "s.zarr"
    plan = embed(inputs, cache, config, dry_run=True)
    with CacheWriter(cache, plan.attributes, rank=0, world_size=2):  # makes the root, and dies before any group
        second = EmbedRank(inputs, cache, config, Ranks(1, 2))
        deadline = time.monotonic() + 30
        while "Waiting for rank 0 to create the cache." not in second.notes.notes:
            assert time.monotonic() < deadline and second.is_alive()
            time.sleep(0.05)
    error = second.done().error
    assert str(error).startswith(f"Rank 0 has ended before its part of {cache} was done. Run its command again")
    assert embed(inputs, cache, config).complete  # nothing is in the way


def test_two_processes_of_one_rank_or_of_different_world_sizes_are_refused(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    plan = embed(inputs, cache, config, dry_run=True)
    with CacheWriter(cache, plan.attributes, rank=0, world_size=2):
        for ranks, message in (
            (Ranks(0, 2), rf"by a process with --rank 0 already \({os.getpid()} of 2\)"),
            (Ranks(1, 3), rf"with --world-size 2 \(rank 0, process {os.getpid()}\), not 3. Wait for that, or give the"),
            (SINGLE, f"is being written by process {os.getpid()}. Wait for it or stop it"),
        ):
            with pytest.raises(CacheError, match=message):
                embed(inputs, cache, config, ranks=ranks)
    with (
        CacheWriter(cache, plan.attributes),
        pytest.raises(CacheError, match="is being written by process"),
    ):
        embed(inputs, cache, config, ranks=Ranks(1, 2))


def test_a_cache_damaged_while_others_write_it_is_refused(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    plan = embed(inputs, cache, config)
    (cache / schema.COMPLETE).unlink()
    (cache / "a/X/data/c/0").unlink()
    with (
        CacheWriter(cache, plan.attributes, rank=1, world_size=2),
        pytest.raises(CacheError, match=r"1 damaged files .first: a/X/data/c/0., and other processes .rank 1. are"),
    ):
        embed(inputs, cache, config, ranks=Ranks(0, 2))
    assert embed(inputs, cache, config).complete


def test_a_rank_with_other_options_is_refused(inputs: list[Path], config: EmbedConfig, tmp_path: Path) -> None:
    cache = tmp_path / "s.zarr"
    other = EmbedConfig.from_values({**config.to_values(), "seed": 5}, "test")
    plan = embed(inputs, cache, config, dry_run=True)
    with (
        CacheWriter(cache, plan.attributes, rank=0, world_size=2),
        pytest.raises(CacheError, match="seed: 0 there, 5 asked"),
    ):
        embed(inputs, cache, other, ranks=Ranks(1, 2))


def test_processes_that_finish_at_the_same_moment_do_not_disturb_each_other(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(inputs, tmp_path / "one.zarr", config)
    finish, write, both = CacheWriter.finish, LocalStorage.write, threading.Barrier(2)
    finishing = threading.local()

    def together(self: CacheWriter) -> None:
        both.wait(20)  # every process believes that it is the last
        finishing.now = True
        finish(self)

    def slowly(self: LocalStorage, files: Mapping[str, bytes]) -> None:
        write(self, files)
        if getattr(finishing, "now", False):
            for name in files:  # as if the file were still being written when the other one sweeps
                os.replace(self.root / name, self.root / (name + PARTIAL))
                time.sleep(0.2)
                os.replace(self.root / (name + PARTIAL), self.root / name)

    monkeypatch.setattr(CacheWriter, "finish", together)
    monkeypatch.setattr(LocalStorage, "write", slowly)
    original = sest.embedding.embed._Work.finish

    def after_the_other(self: sest.embedding.embed._Work) -> bool:
        both.wait(20)  # nothing is left to any process
        return original(self)

    monkeypatch.setattr(sest.embedding.embed._Work, "finish", after_the_other)
    processes = [EmbedRank(inputs, tmp_path / "many.zarr", config, Ranks(rank, 2)) for rank in range(2)]
    assert [process.done().error for process in processes] == [None, None]
    assert hashes(tmp_path / "many.zarr") == hashes(tmp_path / "one.zarr")


# --- real processes


def command(inputs: list[Path], cache: Path, config: EmbedConfig, *words: str) -> list[str]:
    files = [str(path) for path in inputs]
    options = ["--encoder", config.encoder, "--dim", "4", "--batch-size", "3", "--device", "cpu", "--cache", str(cache)]
    return ["-m", "sest", "embed", *files, *options, *words]


@pytest.mark.slow
def test_ranks_of_the_command_line_and_of_torchrun_make_the_same_cache(tmp_path: Path) -> None:
    """Full-size shards: 40,000 cells are three."""
    path = write_cells(tmp_path / "a.h5ad", np.tile(counts(40), (1000, 1)))
    se = write_se(tmp_path / "se", gene_names(35))
    config = EmbedConfig(encoder=str(se))
    words = ("--batch-size", "256")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, each in (
        ("one", [()]),
        ("ranks", [("--rank", str(r), "--world-size", "2") for r in range(2)]),
        ("torchrun", [()]),
    ):
        asked = [command([path], tmp_path / f"{name}.zarr", config, *words, *more) for more in each]
        running: list[Process | subprocess.Popen[str]] = [
            subprocess.Popen([*torchrun, *one], stderr=subprocess.PIPE, text=True)
            if name == "torchrun"
            else server().start(one)
            for one in asked
        ]
        for process in running:
            said = process.communicate(timeout=200)[1]
            assert process.returncode == 0, said
            assert name == "one" or "[rank " in said
        assert open_cache(tmp_path / f"{name}.zarr").n_cells == 40_000
    expected = hashes(tmp_path / "one.zarr")
    assert hashes(tmp_path / "ranks.zarr") == hashes(tmp_path / "torchrun.zarr") == expected


def test_a_waiting_rank_stops_when_asked(inputs: list[Path], config: EmbedConfig, tmp_path: Path) -> None:
    words = command(inputs, tmp_path / "s.zarr", config, "--rank", "1", "--world-size", "2")
    waiting = server().start(words)
    deadline = time.monotonic() + 60
    while not (tmp_path / "s.zarr" / schema.SPOOL / "lock-1").exists():
        assert time.monotonic() < deadline and waiting.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    waiting.send_signal(signal.SIGTERM)
    said = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 143 and "Traceback" not in said, said
