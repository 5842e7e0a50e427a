"""Choose the device and the precision, and say what was chosen."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from sest.errors import InputError

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILED_STEPS = 10_000  # that repay a minute or two of compiling


def choose_device(name: str) -> torch.device:
    """Return the torch device for "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"No device '{name}'. Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"No device '{name}': this machine has {torch.cuda.device_count()} CUDA GPUs. Use --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"Device '{name}' is not supported. Use auto, cpu, cuda or cuda:N.")
    return device


def choose_precision(name: str, device: torch.device, *, training: bool) -> str:
    """Resolve "auto" to fp32, bf16 or fp16 for the device; check that it has what was asked for (tf32 too).

    auto: bf16 on GPUs with bf16 units; on older ones fp16 for training and fp32 for embedding; fp32 on CPU.

    Raises:
        InputError: fp16 or tf32 was asked of a CPU, or tf32 of a GPU that does not have it.
    """
    if name == "tf32" and (device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise InputError("Precision tf32 needs a GPU with TF32 units (Ampere or newer). Use --precision fp32.")
    if name == "fp16" and device.type == "cpu":
        raise InputError("Precision fp16 needs a GPU. Use --precision fp32 or bf16.")
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp16" if training else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The context of a forward pass in a precision; nothing in fp32."""
    if precision == "tf32":
        return float32_products(precision)
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, a GPU multiplies float32 numbers as TF32 where that is the precision: rounded to 10 bits, then summed.

    Around a backward pass too, which `autocast` does not reach.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    if precision == "tf32":
        products.fp32_precision = "tf32"
    try:
        yield
    finally:
        if precision == "tf32":
            products.fp32_precision = before


def compiles(asked: bool | None, device: str, n_steps: int) -> bool:
    """Whether a training on a type of device compiles its steps: as asked, else on GPUs where there are many.

    Many in all, not from here on: a run that is stopped and resumed takes the same kind of steps.
    """
    return asked if asked is not None else device == "cuda" and n_steps >= COMPILED_STEPS


def faster_precision(precision: str, device: torch.device) -> str | None:
    """A line for those who compute in float32 on a processor with bf16 units; None for all others.

    "auto" stays float32 there, so that numbers do not depend on which processor a job landed on.
    """
    if device.type != "cpu" or precision != "fp32" or not _cpu_has_bf16_units():
        return None
    return "This processor has bf16 units: --precision bf16 may be much faster here, and rounds more."


def slow_pages(device: torch.device, setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> str | None:
    """A line for those who train on a CPU where large pages are there for programs that ask; None for all others.

    A step takes and frees large tensors, whose pages the system clears 4 KB at a time unless glibc asks for large
    ones. glibc reads the variable at the start only.
    """
    if device.type != "cpu" or "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        on_request = "[madvise]" in setting.read_text()
    except OSError:
        return None
    if not on_request or platform.libc_ver()[0] != "glibc":
        return None
    return "On this machine small heads train faster with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment."


def _cpu_has_bf16_units() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
