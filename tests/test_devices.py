"""Hints about the machine that training runs on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sest.devices import slow_pages

CPU = torch.device("cpu")


def test_large_pages_are_named_where_they_are_there_for_those_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "enabled"
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert slow_pages(CPU, setting) is None  # no such setting on this system
    setting.write_text("always [madvise] never\n")
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in str(slow_pages(CPU, setting))
    assert slow_pages(torch.device("cuda"), setting) is None
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))  # musl
    assert slow_pages(CPU, setting) is None
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    setting.write_text("[always] madvise never\n")
    assert slow_pages(CPU, setting) is None
    setting.write_text("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert slow_pages(CPU, setting) is None
