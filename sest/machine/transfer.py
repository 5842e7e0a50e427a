"""Arrays on their way from the host to a device, all of a batch in one copy, and results on their way back.

Nobody waits for a copy before its numbers are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 16  # bytes: where an array may begin, for tensors of any type


@dataclass(frozen=True)
class Gathered:
    """An array that is made where it is sent from, rather than made and copied there."""

    shape: tuple[int, ...]
    dtype: np.dtype
    write: Callable[[np.ndarray], object]  # is given the array to fill


@dataclass(frozen=True, eq=False)
class Sent:
    """Arrays on their way to a device."""

    _tensors: dict[str, Tensor]
    _whole: Tensor  # the memory that the tensors share
    _copied: torch.cuda.Event | None  # None: there is nothing to wait for

    def tensors(self) -> dict[str, Tensor]:
        """The arrays on the device, for the current stream, which waits for the copy; the host does not."""
        if self._copied is not None:
            now = torch.cuda.current_stream(self._whole.device)
            now.wait_event(self._copied)
            self._whole.record_stream(now)  # allocated on the other stream, which must not use it again too soon
        return self._tensors


@dataclass(frozen=True, eq=False)
class Arriving:
    """A tensor on its way from a device to the host."""

    _host: Tensor
    _copied: torch.cuda.Event | None  # None: there is nothing to wait for

    def array(self) -> np.ndarray:
        """Its numbers; waits until they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        array: np.ndarray = self._host.numpy()
        return array


def fetch(tensor: Tensor) -> Arriving:
    """Start the copy of a tensor to the host, behind what the current stream does until then."""
    if tensor.device.type == "cpu":
        return Arriving(tensor, None)
    host = host_bytes(tensor.nbytes, pinned=True).view(tensor.dtype).view(tensor.shape)
    host.copy_(tensor, non_blocking=True)
    return Arriving(host, torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None)


def host_bytes(n: int, *, pinned: bool) -> Tensor:
    """Memory of the host; pinned memory is PyTorch's, which gives it out again once the copies from it are done."""
    return torch.empty(n, dtype=torch.uint8, pin_memory=pinned)


class Sender:
    """Copies arrays to a device, beside what it computes: on a stream of its own, from pinned memory.

    On a CPU nothing is copied but into one piece of memory. Any thread may use it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, arrays: Mapping[str, np.ndarray | Gathered]) -> Sent:
        """Start the copy of arrays of any shape; those of uint16 arrive as int16, with the same bits.

        PyTorch computes with few unsigned types.
        """
        begin, end = dict[str, int](), 0
        for name, array in arrays.items():
            begin[name] = -(-end // _ALIGNED) * _ALIGNED
            end = begin[name] + math.prod(array.shape) * array.dtype.itemsize

        def part(whole: Tensor, name: str) -> Tensor:
            shape, dtype = arrays[name].shape, arrays[name].dtype
            of_torch = torch.int16 if dtype == np.uint16 else torch.from_numpy(np.empty(0, dtype)).dtype
            return whole[begin[name] : begin[name] + math.prod(shape) * dtype.itemsize].view(of_torch).view(shape)

        host = host_bytes(end, pinned=self._device.type != "cpu")
        for name, array in arrays.items():
            to = part(host, name).numpy().view(array.dtype)
            if isinstance(array, Gathered):
                array.write(to)
            else:
                to[...] = array
        there, copied = self._copy(host)
        return Sent({name: part(there, name) for name in arrays}, there, copied)

    def _copy(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._stream is None:
            return host.to(self._device, non_blocking=True), None
        with torch.cuda.stream(self._stream):
            return host.to(self._device, non_blocking=True), self._stream.record_event()
