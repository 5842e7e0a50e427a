"""Arrays that are sent to a device in one copy arrive as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sest.machine.transfer import Gathered, Sender, fetch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_of_all_types_and_shapes_arrive_as_they_were(device: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2, shape).astype(name)
        for name, shape in (("bool", (3, 1, 5)), ("float16", (7,)), ("int64", (2, 3)), ("uint8", (1,)), ("int32", ()))
    }
    arrays["reversed"] = np.arange(6.0, dtype=np.float32).reshape(2, 3)[::-1, ::-1]  # not contiguous
    arrays["empty"] = np.zeros((0, 4))
    there = Sender(torch.device(device)).send(arrays).tensors()
    assert list(there) == list(arrays)
    for name, array in arrays.items():
        assert there[name].device.type == device
        np.testing.assert_array_equal(there[name].cpu().numpy(), array)
        assert there[name].cpu().numpy().dtype == array.dtype


def test_numbers_of_two_bytes_without_a_sign_arrive_with_their_bits() -> None:
    there = Sender(torch.device("cpu")).send({"genes": np.array([1, 2**16 - 1], np.uint16)}).tensors()["genes"]
    assert there.dtype == torch.int16 and (there.long() & 0xFFFF).tolist() == [1, 2**16 - 1]


def test_what_is_gathered_is_written_where_it_is_sent_from_and_all_of_it_is_one_piece() -> None:
    def write(out: np.ndarray) -> None:
        out[...] = [[1.5, 2.5]]

    sent = Sender(torch.device("cpu")).send({"a": np.ones(3, np.uint8), "b": Gathered((1, 2), np.dtype("f4"), write)})
    there = sent.tensors()
    assert there["b"].tolist() == [[1.5, 2.5]]
    assert there["a"].untyped_storage().data_ptr() == there["b"].untyped_storage().data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_a_result_comes_back_as_it_was_though_its_place_is_written_again(device: str) -> None:
    result = torch.arange(6.0, device=device).view(2, 3)
    coming = fetch(result)
    if device == "cuda":
        result.zero_()  # behind the copy
    np.testing.assert_array_equal(coming.array(), [[0, 1, 2], [3, 4, 5]])
