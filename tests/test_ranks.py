"""Several processes that write one store: it is the one that a single process writes, byte for byte."""

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
from small import Notes, counts, gene_names, hashes, small_shards, write_cells, write_se

import sest.embed
import sest.embed_plan
from sest.cache import StoreError, StoreWriter, open_cache, schema
from sest.cache.storage import LocalStorage
from sest.config import EmbedConfig
from sest.embed import embed
from sest.errors import InputError
from sest.ranks import SINGLE, Ranks, device_of_rank, ranks_of

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 8 cells; the PCA is fitted on 14 cells in pieces of 4; nobody waits long for another process."""
    small_shards(monkeypatch)
    monkeypatch.setattr(sest.embed_plan, "SAMPLE_CELLS", 14)
    monkeypatch.setattr(sest.embed, "SAMPLE_PIECE", 4)
    monkeypatch.setattr(sest.embed, "WAIT_SECONDS", 0.05)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [write_cells(tmp_path / "a.h5ad", counts(21)), write_cells(tmp_path / "b.h5ad", counts(13, seed=1))]


@pytest.fixture
def config(tmp_path: Path) -> EmbedConfig:
    return EmbedConfig(encoder=str(write_se(tmp_path / "se", gene_names(35))), dim="4", batch_size=3, device="cpu")


class Process(threading.Thread):
    """One rank in a thread of its own; file locks of separately opened files exclude each other there too."""

    def __init__(self, inputs: list[Path], cache: Path | str, config: EmbedConfig, ranks: Ranks) -> None:
        super().__init__(daemon=True)
        self.arguments, self.ranks = (inputs, cache, config), ranks
        self.notes, self.complete, self.error = Notes(), False, None
        self.start()

    def run(self) -> None:
        try:
            self.complete = embed(*self.arguments, self.notes, ranks=self.ranks).complete
        except (InputError, StoreError, InterruptedError) as error:
            self.error = error

    def done(self) -> Process:
        self.join(60)
        assert not self.is_alive()
        return self


# --- which of how many


def test_ranks_come_from_the_options_or_from_torchrun_or_there_is_one_process() -> None:
    assert ranks_of(None, None, {}) == SINGLE == Ranks(0, 1)
    assert ranks_of(None, None, {"RANK": "3", "WORLD_SIZE": "9"}) == SINGLE  # set by something else than torchrun
    assert ranks_of(None, None, TORCHRUN) == Ranks(2, 4)
    assert ranks_of(0, 3, TORCHRUN) == Ranks(0, 3)
    for rank, world_size, message in (
        (1, None, "belong together"),
        (None, 2, "belong together"),
        (2, 2, "ranks run from 0 to 1"),
        (-1, 2, "ranks run from 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            ranks_of(rank, world_size, {})


def test_every_piece_of_work_has_exactly_one_owner() -> None:
    for world_size in (1, 2, 3, 7):
        owners = [[Ranks(rank, world_size).owns(n) for rank in range(world_size)] for n in range(20)]
        assert all(sum(row) == 1 for row in owners)


def test_a_device_that_was_named_is_kept_and_without_gpus_auto_stays_auto() -> None:
    assert device_of_rank("cpu", TORCHRUN) == "cpu"
    assert device_of_rank("auto", {}) == "auto"
    assert device_of_rank("auto", TORCHRUN) in ("auto", "cuda:2")


# --- one store


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_processes_together_write_the_store_of_one_byte_for_byte(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path, world_size: int
) -> None:
    embed(inputs, tmp_path / "one.zarr", config, Notes())
    processes = [
        Process(inputs, tmp_path / "many.zarr", config, Ranks(rank, world_size)) for rank in reversed(range(world_size))
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
    embed(inputs, tmp_path / "one.zarr", config, Notes())
    write = StoreWriter.write_embedding_shard

    def dying(writer: StoreWriter, *arguments: object) -> None:
        if writer.rank == 1:
            raise InterruptedError
        write(writer, *arguments)  # type: ignore[arg-type]

    for name, again in (("same", Ranks(1, 2)), ("one process", SINGLE)):
        cache = tmp_path / f"{name}.zarr"
        with monkeypatch.context() as dead:
            dead.setattr(StoreWriter, "write_embedding_shard", dying)
            first, second = (Process(inputs, cache, config, Ranks(rank, 2)) for rank in (0, 1))
            assert isinstance(second.done().error, InterruptedError) and first.done().error is None
        assert not first.complete
        assert any("has done its part; 2 shards are left to the other processes" in text for text in first.notes.notes)
        with pytest.raises(StoreError, match="unfinished"):
            open_cache(cache)
        assert embed(inputs, cache, config, Notes(), ranks=again).complete
        assert hashes(cache) == hashes(tmp_path / "one.zarr")


def test_a_rank_waits_for_rank_0_and_says_so(inputs: list[Path], config: EmbedConfig, tmp_path: Path) -> None:
    cache = tmp_path / "s.zarr"
    second = Process(inputs, cache, config, Ranks(1, 2))
    deadline = time.monotonic() + 30
    while "Waiting for rank 0 to create the store." not in second.notes.notes:
        assert time.monotonic() < deadline and second.is_alive()
        time.sleep(0.05)
    assert not (cache / schema.ROOT).exists()
    first = Process(inputs, cache, config, Ranks(0, 2))
    assert first.done().error is second.done().error is None
    assert first.complete or second.complete


def test_two_processes_of_one_rank_or_of_different_world_sizes_are_refused(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    plan = embed(inputs, cache, config, Notes(), dry_run=True)
    with StoreWriter(cache, plan.attributes, rank=0, world_size=2):
        for ranks, message in (
            (Ranks(0, 2), rf"by a process with --rank 0 already \({os.getpid()} of 2\)"),
            (Ranks(1, 3), rf"with --world-size 2 \(rank 0, process {os.getpid()}\), not 3. Wait for that, or give the"),
            (SINGLE, f"is being written by process {os.getpid()}. Wait for it or stop it"),
        ):
            with pytest.raises(StoreError, match=message):
                embed(inputs, cache, config, Notes(), ranks=ranks)
    with (
        StoreWriter(cache, plan.attributes),
        pytest.raises(StoreError, match="is being written by process"),
    ):
        embed(inputs, cache, config, Notes(), ranks=Ranks(1, 2))


def test_a_store_damaged_while_others_write_it_is_refused(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    plan = embed(inputs, cache, config, Notes())
    (cache / schema.COMPLETE).unlink()
    (cache / "a/X/data/c/0").unlink()
    with (
        StoreWriter(cache, plan.attributes, rank=1, world_size=2),
        pytest.raises(StoreError, match=r"1 damaged files .first: a/X/data/c/0., and other processes .rank 1. are"),
    ):
        embed(inputs, cache, config, Notes(), ranks=Ranks(0, 2))
    assert embed(inputs, cache, config, Notes()).complete


def test_a_rank_with_other_options_is_refused(inputs: list[Path], config: EmbedConfig, tmp_path: Path) -> None:
    cache = tmp_path / "s.zarr"
    other = EmbedConfig.from_values({**config.to_values(), "seed": 5}, "test")
    plan = embed(inputs, cache, config, Notes(), dry_run=True)
    with (
        StoreWriter(cache, plan.attributes, rank=0, world_size=2),
        pytest.raises(StoreError, match="seed: 0 there, 5 asked"),
    ):
        embed(inputs, cache, other, Notes(), ranks=Ranks(1, 2))


def test_processes_that_finish_at_the_same_moment_do_not_disturb_each_other(
    inputs: list[Path], config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(inputs, tmp_path / "one.zarr", config, Notes())
    finish, write, both = StoreWriter.finish, LocalStorage.write, threading.Barrier(2)
    finishing = threading.local()

    def together(self: StoreWriter) -> None:
        both.wait(20)  # every process believes that it is the last
        finishing.now = True
        finish(self)

    def slowly(self: LocalStorage, files: Mapping[str, bytes]) -> None:
        write(self, files)
        if getattr(finishing, "now", False):
            for name in files:  # as if the file were still being written when the other one sweeps
                os.replace(self.root / name, self.root / (name + schema.PARTIAL))
                time.sleep(0.2)
                os.replace(self.root / (name + schema.PARTIAL), self.root / name)

    monkeypatch.setattr(StoreWriter, "finish", together)
    monkeypatch.setattr(LocalStorage, "write", slowly)
    original = sest.embed._Work.finish

    def after_the_other(self: sest.embed._Work) -> bool:
        both.wait(20)  # nothing is left to any process
        return original(self)

    monkeypatch.setattr(sest.embed._Work, "finish", after_the_other)
    processes = [Process(inputs, tmp_path / "many.zarr", config, Ranks(rank, 2)) for rank in range(2)]
    assert [process.done().error for process in processes] == [None, None]
    assert hashes(tmp_path / "many.zarr") == hashes(tmp_path / "one.zarr")


# --- real processes


def command(inputs: list[Path], cache: Path, config: EmbedConfig, *words: str) -> list[str]:
    files = [str(path) for path in inputs]
    options = ["--encoder", config.encoder, "--dim", "4", "--batch-size", "3", "--device", "cpu", "--cache", str(cache)]
    return ["-m", "sest", "embed", *files, *options, *words]


@pytest.mark.slow
def test_ranks_of_the_command_line_and_of_torchrun_make_the_same_store(tmp_path: Path) -> None:
    """Full-size shards: 40,000 cells are three."""
    path = write_cells(tmp_path / "a.h5ad", np.tile(counts(40), (1000, 1)))
    se = write_se(tmp_path / "se", gene_names(35))
    config = EmbedConfig(encoder=str(se))
    words = ("--batch-size", "256")
    for name, launcher, each in (
        ("one", [sys.executable], [()]),
        ("ranks", [sys.executable], [("--rank", str(r), "--world-size", "2") for r in range(2)]),
        ("torchrun", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], [()]),
    ):
        running = [
            subprocess.Popen(
                [*launcher, *command([path], tmp_path / f"{name}.zarr", config, *words, *more)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for more in each
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
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True) as waiting:
        deadline = time.monotonic() + 60
        while not (tmp_path / "s.zarr" / schema.SPOOL / "lock-1").exists():
            assert time.monotonic() < deadline and waiting.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        waiting.send_signal(signal.SIGTERM)
        said = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 143 and "Traceback" not in said, said
