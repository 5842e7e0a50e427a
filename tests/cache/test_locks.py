"""cache/locks.py: who may write at the same time, and who may not."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sest.cache import CacheError, locks, schema
from sest.cache.storage import NO_LOCKS, LocalStorage, storage_at


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "cache.zarr")


def refusal(storage: LocalStorage, rank: int, world_size: int) -> str:
    """What a process is told that may not write; one line."""
    with pytest.raises(CacheError) as refused, locks.writing(storage, rank, world_size):
        pass
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix(f"{storage} is being written ")


def test_a_single_process_keeps_out_all_others_and_says_which_it_is(storage: LocalStorage) -> None:
    me = os.getpid()
    with locks.writing(storage, 0, 1):
        assert (storage.root / schema.LOCK).read_text() == str(me)
        for rank, world_size in ((0, 1), (0, 2), (1, 2)):
            assert refusal(storage, rank, world_size) == f"by process {me}. Wait for it or stop it."


@pytest.mark.parametrize("number", NO_LOCKS)
def test_where_there_are_no_locks_one_process_writes_and_several_are_refused(
    storage: LocalStorage, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), locks.writing(storage, 0, 1) as lock:
        assert lock.is_there() and lock.is_alone()
    assert caplog.messages == [f"{storage.root} has no locks of files: see to it that no other process writes there."]
    assert os.strerror(number) in refusal(storage, 0, 2)


def test_ranks_of_one_size_write_together_and_know_of_each_other(storage: LocalStorage) -> None:
    me = os.getpid()
    with locks.writing(storage, 0, 3):
        assert locks.other_ranks(storage, 0) == [] and locks.other_ranks(storage, 1) == [0]
        with locks.writing(storage, 2, 3):
            assert locks.other_ranks(storage, 0) == [2] and sorted(locks.other_ranks(storage, 1)) == [0, 2]
            assert refusal(storage, 2, 3) == f"by a process with --rank 2 already ({me} of 3)."
            assert refusal(storage, 0, 1).startswith("by process")
        assert refusal(storage, 1, 2) == (
            f"with --world-size 3 (rank 0, process {me}), not 2. Wait for that, or give the same --world-size."
        )
        assert locks.other_ranks(storage, 1) == [0]  # nothing is held by those who were refused


def test_locks_are_let_go_at_the_end_and_after_an_error(storage: LocalStorage) -> None:
    for rank, world_size in ((0, 1), (1, 2)):
        with pytest.raises(ZeroDivisionError), locks.writing(storage, rank, world_size):
            raise ZeroDivisionError
    with locks.writing(storage, 0, 1):
        assert locks.other_ranks(storage, 0) == []


def test_a_rank_waits_for_what_the_lock_of_another_has_not_said_yet(storage: LocalStorage) -> None:
    """A lock is taken before its text is written: until then it is empty, or says what an earlier process wrote."""
    for said in ("", "100 of 7"):
        with locks.writing(storage, 1, 2):
            file = storage.root / schema.SPOOL / "lock-1"
            file.write_text(said)
            later = threading.Timer(0.1, file.write_text, [f"{os.getpid()} of 2"])
            later.start()
            with locks.writing(storage, 0, 2):
                pass
            later.join()


def test_a_rank_whose_lock_is_looked_at_waits_for_the_instant_that_takes(storage: LocalStorage) -> None:
    looked_at = storage.hold(locks._lock_of(1), alone=False, text="")
    later = threading.Timer(0.1, looked_at.close)
    later.start()
    with locks.writing(storage, 1, 2):
        assert locks.other_ranks(storage, 0) == [1]
    later.join()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_process_waits_for_the_instant_in_which_the_last_one_of_others_ends(
    storage: LocalStorage, world_size: int
) -> None:
    """That one asks whether it is alone, and then nobody can share the lock until it has let go."""
    with locks.writing(storage, 0, 2) as lock:
        assert lock.is_alone()
        timer = threading.Timer(0.1, lock.close)
        timer.start()
        with locks.writing(storage, 1, world_size):
            pass
        timer.join()


def test_an_object_store_has_no_locks() -> None:
    storage = storage_at("memory://bucket/cache.zarr")
    with locks.writing(storage, 0, 1), locks.writing(storage, 0, 1), locks.finishing(storage):
        assert locks.other_ranks(storage, 1) == [] and storage.here() == []


def test_one_process_at_a_time_completes_a_cache(storage: LocalStorage) -> None:
    inside, most = [], []

    def complete(number: int) -> None:
        with locks.finishing(storage):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)  # long enough for the others to come in, were they not kept out
            inside.remove(number)

    threads = [threading.Thread(target=complete, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1, 1, 1, 1] and storage.here() == []


def test_a_finished_cache_is_left_without_the_lock_once_the_last_writer_is_gone(storage: LocalStorage) -> None:
    file = storage.root / schema.LOCK
    with locks.writing(storage, 0, 1):
        pass
    assert file.exists()  # nothing is finished
    storage.write({schema.COMPLETE: b"{}"})
    with locks.writing(storage, 0, 2):
        with locks.writing(storage, 1, 2):
            pass
        assert file.exists()
        assert refusal(storage, 0, 1).startswith("by process")
    assert storage.here() == [schema.COMPLETE]


def test_of_many_processes_that_lock_a_file_which_each_deletes_one_holds_it_at_a_time(tmp_path: Path) -> None:
    """One that opened the file before it was deleted must not take the lock of what has no name any more."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sest.cache.storage import Held, lock_file\n"
        "lock, mine = Path(sys.argv[1]), Path(sys.argv[2])\nn, until = 0, time.monotonic() + 0.5\n"
        "while time.monotonic() < until:\n"
        "    try:\n        held = lock_file(lock, alone=True, text='')\n    except Held:\n        continue\n"
        "    mine.mkdir()\n    mine.rmdir()\n    lock.unlink()\n    held.close()\n    n += 1\n"
        "print(n)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock"), str(tmp_path / "held")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and int(said) > 0  # mkdir fails where another one holds it too
    assert not (tmp_path / "lock").exists()


def test_a_wait_ends_when_a_rank_dies_or_nobody_writes(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = locks.Watch(storage, 1)
    with locks.writing(storage, 1, 3):
        assert watch.look([0]) == [0]  # not begun: that may still come
        with locks.writing(storage, 0, 3), locks.writing(storage, 2, 3):
            assert watch.look([0]) == []
        for _ in range(locks.LOOKS - 1):
            assert watch.look([0]) == [0]
        with pytest.raises(CacheError, match=r"Rank 0 has ended before its part of .* Run its command again"):
            watch.look([0])
        monkeypatch.setattr(locks, "LONGEST_WAIT", 0.05)
        other = locks.Watch(storage, 1)
        for number in range(3):  # somebody writes: that lasts as long as it lasts
            (storage.root / f"{number}").write_text("x" * number)
            other.look([0])
            time.sleep(0.06)
        with pytest.raises(CacheError, match=r"Nothing was written to .* Start them"):
            other.look([0])


def test_a_wait_ends_for_a_rank_that_died_before_it_and_was_not_started_anew(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock has nobody who holds it: another process of that rank has a while to begin."""
    monkeypatch.setattr(locks, "STARTING", 0.3)
    with locks.writing(storage, 1, 3):
        with locks.writing(storage, 0, 3):
            pass
        watch = locks.Watch(storage, 1)
        assert watch.look([0, 2]) == [0, 2]
        with locks.writing(storage, 0, 3):
            time.sleep(0.35)
            assert watch.look([0, 2]) == [2]  # begun anew in time
        assert locks.Watch(storage, 1).look([2]) == [2]
        other = locks.Watch(storage, 1)
        assert other.look([0, 2]) == [0, 2]
        time.sleep(0.35)
        with pytest.raises(CacheError, match=r"Rank 0 has ended before its part of .* Run its command again"):
            other.look([0, 2])
