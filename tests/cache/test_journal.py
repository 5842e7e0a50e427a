"""cache/journal.py: what is promised, by whom, and whether it is still so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sest.cache import CacheError, journal, schema
from sest.cache.storage import LocalStorage

A = {"file": "a", "size": 1, "sha256": hashlib.sha256(b"1").hexdigest()}
B = {"file": "b/zarr.json", "size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def test_every_process_has_a_journal_and_they_are_listed_by_rank() -> None:
    ranks = (0, 1, 2, 10)
    assert [journal.journal_name(rank) for rank in ranks] == [
        "journal.jsonl",
        "journal-1.jsonl",
        "journal-2.jsonl",
        "journal-10.jsonl",
    ]
    names = ["journal-10.jsonl", "a", "journal-2.jsonl", "journal.jsonl", "journal-1.jsonl", "journal.jsonl.partial"]
    assert journal.journals(names) == [journal.journal_name(rank) for rank in ranks]


def test_lines_do_not_depend_on_who_wrote_what_when() -> None:
    expected = b'{"file": "a", "sha256": "%s", "size": 1}\n' % str(A["sha256"]).encode()
    assert journal.line_of(A) == journal.line_of(dict(reversed(A.items()))) == expected
    assert journal.merged({"b/zarr.json": B, "a": A}) == expected + journal.line_of(B)


def test_a_journal_is_read_up_to_its_last_whole_line(storage: LocalStorage) -> None:
    assert journal.read_journal(storage, "journal.jsonl") == ({}, b"")
    whole = journal.line_of(A) + journal.line_of(B)
    for torn in (b"", b'{"file": "c', journal.line_of(A)[:-1]):
        storage.write({"journal.jsonl": whole + torn})
        assert journal.read_journal(storage, "journal.jsonl") == ({"a": A, "b/zarr.json": B}, whole)


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"file": "a/zarr.json"}', b"\xff\xfe"])
def test_a_whole_line_that_promises_nothing_is_refused(storage: LocalStorage, line: bytes) -> None:
    storage.write({"journal.jsonl": line + b"\n"})
    with pytest.raises(CacheError, match=r"journal.jsonl is damaged .* Delete the cache and run"):
        journal.read_journal(storage, "journal.jsonl")


def test_journals_are_read_together_and_the_first_process_has_the_last_word(storage: LocalStorage) -> None:
    of_2, of_10, later = ({**A, "size": size} for size in (2, 10, 11))
    storage.write({"journal-2.jsonl": journal.line_of(of_2), "journal-10.jsonl": journal.line_of(of_10)})
    assert journal.read_journals(storage) == {"a": of_2}
    storage.write({"journal.jsonl": journal.line_of(B) + journal.line_of(A) + journal.line_of(later)})
    assert journal.read_journals(storage) == {"a": later, "b/zarr.json": B}  # within one, the last line holds


def test_complete_promises_the_journal_as_it_is(storage: LocalStorage) -> None:
    assert not journal.is_promised(storage)
    merged = journal.merged({"a": A, "b/zarr.json": B})
    complete = journal.complete_line({"b/zarr.json": B, "a": A})
    assert json.loads(complete) == {"files": 2, "journal_sha256": hashlib.sha256(merged).hexdigest()}
    storage.write({schema.JOURNAL: merged, schema.COMPLETE: complete})
    assert journal.is_promised(storage)
    storage.write({schema.JOURNAL: merged + b"\n"})
    assert not journal.is_promised(storage)
    storage.write({schema.JOURNAL: merged})
    for content in (b"", b"{}", b"[]", b"null", b"\xff"):
        storage.write({schema.COMPLETE: content})
        assert not journal.is_promised(storage)


def test_damage_is_another_size_or_other_metadata_or_on_request_any_other_byte(storage: LocalStorage) -> None:
    entries = [A, B]
    storage.write({"a": b"1", "b/zarr.json": b"{}"})
    assert journal.damaged_files(storage, entries) == journal.damaged_files(storage, entries, every_byte=True) == []
    storage.write({"a": b"2", "b/zarr.json": b"[]"})
    assert journal.damaged_files(storage, entries) == ["b/zarr.json"]
    assert journal.damaged_files(storage, entries, every_byte=True) == ["a", "b/zarr.json"]
    storage.write({"a": b"12"})
    storage.remove(["b/zarr.json"])
    assert journal.damaged_files(storage, entries) == ["a", "b/zarr.json"]


def test_a_group_says_what_it_is_and_foreign_ones_say_nothing(storage: LocalStorage) -> None:
    def group(attributes: object) -> bytes:
        return json.dumps({"attributes": attributes}).encode()

    storage.write({"zarr.json": group({"sest": {"dim": 3}}), "g/zarr.json": group({"sest": {"n_cells": 7}})})
    assert journal.root_attributes(storage) == {"dim": 3}
    assert journal.root_attributes(storage, "g") == {"n_cells": 7}
    for foreign in (group({"mine": 1}), group({"sest": 1}), group(None), b"{}", b"[]"):
        storage.write({"zarr.json": foreign})
        assert journal.root_attributes(storage) is None
    storage.write({"zarr.json": b"{"})
    for name in ("", "none"):
        with pytest.raises(CacheError, match=r"zarr.json cannot be read .* If sest made it, delete it"):
            journal.root_attributes(storage, name)
