"""Who writes a cache: one lock for the cache, shared by the ranks, and one for every rank. None on object stores."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager

from sest.cache import schema
from sest.cache.schema import CacheError
from sest.cache.storage import Held, LocalStorage, Lock, Storage

_BETWEEN_TRIES, _LONGEST_PAUSE = 0.05, 1.0  # seconds
_TRIES = 10
LOOKS = 3  # in a row, at which a process is not there that was: a look by others holds a lock for an instant
STARTING = 30.0  # seconds that a process which wrote earlier has to begin anew
LONGEST_WAIT = 3600.0  # seconds in which nobody writes anything


@contextmanager
def writing(storage: Storage, rank: int, world_size: int) -> Iterator[Lock]:
    """Hold the locks of one process that writes; that of the cache is given. A finished cache keeps no files of locks.

    Raises:
        CacheError: another process writes the cache, as this rank, or as one of another number of ranks.
    """
    alone = world_size == 1
    with ExitStack() as locks:
        try:
            lock = _hold(storage, schema.LOCK, str(os.getpid()), alone=alone)
        except Held as held:
            raise CacheError(f"{storage} is being written by process {held}. Wait for it or stop it.") from held
        locks.callback(_let_go, storage, lock)
        if not alone:
            try:
                locks.callback(_hold(storage, _lock_of(rank), f"{os.getpid()} of {world_size}").close)
            except Held as held:
                raise CacheError(
                    f"{storage} is being written by a process with --rank {rank} already ({held})."
                ) from held
            _refuse_other_size(storage, rank, world_size)
        yield lock


def _let_go(storage: Storage, lock: Lock) -> None:
    """Let go of a cache; the last process of a finished one takes the files of locks with it."""
    if isinstance(storage, LocalStorage) and schema.COMPLETE in storage.here() and lock.is_alone():
        storage.remove_folder(schema.SPOOL)
        storage.remove([schema.LOCK])
    lock.close()


def other_ranks(storage: Storage, rank: int) -> list[int]:
    """Ranks but `rank` whose processes write the cache now; unknown on object stores."""
    return [other for other, _ in _held_by_others(storage, rank)]


class Watch:
    """Tells a process that waits for others whether that can still end.

    Args:
        storage: of the cache.
        rank: of this process.
    """

    def __init__(self, storage: Storage, rank: int) -> None:
        self._storage, self._rank = storage, rank
        self._seen: set[int] = set()
        self._missed = 0  # looks in a row at which one that was seen was not there
        self._absent = dict[int, float]()  # rank whose process began once and is not there -> since when
        self._bytes, self._changed = -1, time.monotonic()

    def look(self, ranks: Collection[int]) -> list[int]:
        """Those of the `ranks` that are waited for which do not write now; unknown (none) on object stores.

        Raises:
            CacheError: one of them wrote before or during this wait, and does no longer; or nothing was written for an
                hour.
        """
        now = set(other_ranks(self._storage, self._rank))
        self._seen |= now
        gone = sorted(self._seen.intersection(ranks) - now)
        self._missed = self._missed + 1 if gone else 0
        begun = [other for other in ranks if other not in now and _began(self._storage, other)]
        self._absent = {other: self._absent.get(other, time.monotonic()) for other in begun}
        late = [other for other, since in self._absent.items() if time.monotonic() - since > STARTING]
        if self._missed >= LOOKS or late:
            raise CacheError(
                f"Rank {(gone + late)[0]} has ended before its part of {self._storage} was done. Run its command "
                "again, then this one; what is finished is kept."
            )
        n_bytes = sum(self._storage.sizes().values())
        if n_bytes != self._bytes:
            self._bytes, self._changed = n_bytes, time.monotonic()
        if time.monotonic() - self._changed > LONGEST_WAIT:
            raise CacheError(
                f"Nothing was written to {self._storage} for {LONGEST_WAIT / 60:.0f} minutes: the processes that this "
                "one waits for do not run. Start them, then this one; what is finished is kept."
            )
        is_local = isinstance(self._storage, LocalStorage)
        return sorted(set(ranks) - now) if is_local else []


@contextmanager
def finishing(storage: Storage) -> Iterator[None]:
    """Of several processes that complete a cache at once, one enters and the others wait."""
    with closing(in_turn(lambda: storage.hold(schema.FINISHING, alone=True, text=str(os.getpid())))):
        yield
        storage.remove([schema.FINISHING])


def in_turn(hold: Callable[[], Lock], waiting: Callable[[str], None] = lambda held: None) -> Lock:
    """A lock, once no other process holds it; `waiting` is told, once, what that one wrote into the file."""
    pause = _BETWEEN_TRIES
    while True:
        try:
            return hold()
        except Held as held:
            if pause == _BETWEEN_TRIES:
                waiting(str(held))
        time.sleep(pause)
        pause = min(1.2 * pause, _LONGEST_PAUSE)


def _lock_of(rank: int) -> str:
    return f"{schema.SPOOL}/lock-{rank}"


def _began(storage: Storage, rank: int) -> bool:
    """Whether a process of this rank wrote the cache once, and may have ended."""
    return isinstance(storage, LocalStorage) and (storage.root / _lock_of(rank)).exists()


def _hold(storage: Storage, name: str, text: str, *, alone: bool = True) -> Lock:
    """A lock. Another process that ends, or looks who writes, may hold it for an instant: that is waited out."""
    for _ in range(_TRIES):
        with contextlib.suppress(Held):
            return storage.hold(name, alone=alone, text=text)
        time.sleep(_BETWEEN_TRIES)
    return storage.hold(name, alone=alone, text=text)


def _held_by_others(storage: Storage, rank: int) -> Iterator[tuple[int, str]]:
    """Other ranks that write now, and what their locks say."""
    if not isinstance(storage, LocalStorage):
        return
    for file in (storage.root / schema.SPOOL).glob("lock-*"):
        other = int(file.name.removeprefix("lock-"))
        if other != rank:
            try:
                storage.hold(_lock_of(other), alone=False, text="").close()
            except Held as held:
                yield other, str(held)


def _refuse_other_size(storage: Storage, rank: int, world_size: int) -> None:
    """What a lock says follows the lock itself by an instant, so what does not fit is looked at again."""
    others: list[tuple[int, str]] = []
    for _ in range(_TRIES):
        others = [(other, says) for other, says in _held_by_others(storage, rank) if not _fits(says, world_size)]
        if not others:
            return
        time.sleep(_BETWEEN_TRIES)
    other, says = others[0]
    process, _, size = says.partition(" of ")
    raise CacheError(
        f"{storage} is being written with --world-size {size} (rank {other}, process {process}), not {world_size}. "
        "Wait for that, or give the same --world-size."
    )


def _fits(says: str, world_size: int) -> bool:
    return says.partition(" of ")[2] == str(world_size)
