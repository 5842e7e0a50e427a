"""machine/devices.py: what is chosen where nothing is asked for, what is refused, and hints about the machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
import torch

from sest.errors import InputError
from sest.machine.devices import (
    autocast,
    choose_device,
    choose_precision,
    compiles,
    faster_precision,
    float32_products,
    slow_pages,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_device_that_is_not_there_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cpu") == CPU
    assert [choose_device(name) for name in ("cuda", "cuda:1")] == [CUDA, torch.device("cuda:1")]
    for name, message in (
        ("tpu", r"No device 'tpu'\. Use auto, cpu, cuda or cuda:N\."),
        ("meta", "Device 'meta' is not supported"),
        ("cuda:2", r"No device 'cuda:2': this machine has 2 CUDA GPUs\. Use --device cpu\."),
    ):
        with pytest.raises(InputError, match=message):
            choose_device(name)
    for there, device in ((True, CUDA), (False, CPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == device


@pytest.mark.parametrize(
    ("capability", "training", "embedding"),
    [((7, 0), "fp16", "fp32"), ((8, 0), "bf16", "bf16"), ((9, 0), "bf16", "bf16")],
)
def test_auto_is_a_half_where_the_gpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], training: str, embedding: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA, training=True) == training
    assert choose_precision("auto", CUDA, training=False) == embedding
    assert choose_precision("fp32", CUDA, training=True) == "fp32"
    assert choose_precision("fp16", CUDA, training=False) == "fp16"
    with pytest.raises(InputError, match=r"Precision fp16 needs a GPU\. Use --precision fp32 or bf16\."):
        choose_precision("fp16", CPU, training=True)
    if capability >= (8, 0):
        assert choose_precision("tf32", CUDA, training=True) == "tf32"
    for device in (CPU,) if capability >= (8, 0) else (CPU, CUDA):
        with pytest.raises(InputError, match=r"Precision tf32 needs a GPU with TF32 units \(Ampere or newer\)\."):
            choose_precision("tf32", device, training=False)


def test_a_processor_with_bf16_units_is_told_of_but_auto_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for units in (True, False):
        monkeypatch.setattr("sest.machine.devices._cpu_has_bf16_units", lambda units=units: units)
        assert choose_precision("auto", CPU, training=True) == choose_precision("auto", CPU, training=False) == "fp32"
        hint = faster_precision("fp32", CPU)
        assert (hint is not None and "--precision bf16" in hint) if units else hint is None
        assert faster_precision("bf16", CPU) is None
    monkeypatch.undo()
    assert isinstance(faster_precision("fp32", CPU), str | None)


def test_a_forward_pass_computes_products_in_the_precision() -> None:
    x = torch.full((2, 2), 1 + 2**-10)  # not a bfloat16, which has 8 bits
    for precision, dtype, product in (("fp32", torch.float32, 2 * (1 + 2**-10) ** 2), ("bf16", torch.bfloat16, 2.0)):
        with autocast(CPU, precision):
            y = x @ x
        assert y.dtype == dtype and y[0, 0].item() == pytest.approx(product, abs=1e-6)


@pytest.mark.parametrize("begin", [partial(autocast, CUDA), float32_products])
def test_tf32_is_set_inside_alone(begin: Callable[[str], AbstractContextManager[None]]) -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    for precision, inside in (("tf32", "tf32"), ("fp32", before)):
        with begin(precision):
            assert products.fp32_precision == inside
        assert products.fp32_precision == before != "tf32"


def test_a_training_is_compiled_as_asked_or_on_gpus_where_it_pays() -> None:
    assert [compiles(asked, "cpu", 10) for asked in (True, False, None)] == [True, False, False]
    assert [compiles(None, device, n) for device, n in (("cuda", 9_999), ("cuda", 10_000), ("cpu", 10_000))] == [
        False,
        True,
        False,
    ]


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
