"""cache/journal.py: what is promised, by whom, and whether it is still so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


def test_damage_is_another_size_or_any_other_byte_but_of_shards_on_request_alone(storage: LocalStorage) -> None:
    shard: dict[str, Any] = {"file": "c/0", "size": 1, "sha256": A["sha256"], "rows": [0, 1]}

    def damaged(*, every_byte: bool = False) -> list[str]:
        return journal.damaged_files(storage, [A, B, shard], storage.sizes(), every_byte=every_byte)

    storage.write({"a": b"1", "b/zarr.json": b"{}", "c/0": b"1"})
    assert damaged() == damaged(every_byte=True) == []
    storage.write({"a": b"2", "b/zarr.json": b"[]", "c/0": b"2"})
    assert damaged() == ["a", "b/zarr.json"]
    assert damaged(every_byte=True) == ["a", "b/zarr.json", "c/0"]
    storage.write({"a": b"12", "c/0": b"12"})
    storage.remove(["b/zarr.json"])
    assert damaged() == ["a", "b/zarr.json", "c/0"]


def test_a_file_that_goes_while_it_is_looked_at_is_damaged(storage: LocalStorage) -> None:
    storage.write({"a": b"1"})
    sizes = storage.sizes()
    storage.remove(["a"])
    assert journal.damaged_files(storage, [A], sizes) == ["a"]


LINES = st.fixed_dictionaries(
    {},
    optional={
        "file": st.one_of(
            st.text(max_size=12), st.sampled_from(["a", "../a", "/a", "a//b", ".a", "a/zarr.json"]), st.none()
        ),
        "size": st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.booleans()),
        "sha256": st.one_of(st.text("0123456789abcdef", max_size=64), st.none(), st.integers()),
        "rows": st.one_of(st.none(), st.lists(st.integers())),
    },
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(LINES, max_size=3).map(lambda lines: "\n".join(map(json.dumps, [*lines, {}]))).map(str.encode),
    )
)
def test_whatever_a_journal_holds_is_read_or_refused_in_one_line(storage: LocalStorage, data: bytes) -> None:
    (storage.root / schema.JOURNAL).write_bytes(data)
    try:
        entries, whole = journal.read_journal(storage, schema.JOURNAL)
    except CacheError as refused:
        said = str(refused)
        assert "\n" not in said and "journal.jsonl is damaged" in said
        return
    assert data.startswith(whole)
    for name, entry in entries.items():
        assert schema.is_file_name(name) and entry["size"] >= 0 and isinstance(entry["sha256"], str)


def test_a_journal_nested_without_end_is_refused(storage: LocalStorage) -> None:
    (storage.root / schema.JOURNAL).write_bytes(b"[" * 200_000 + b"\n")
    with pytest.raises(CacheError, match=r"journal.jsonl is damaged \(its brackets are nested too deep\)"):
        journal.read_journal(storage, schema.JOURNAL)


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
