"""Read pickled files nobody vouches for. The only file of the project in which `torch.load` appears.

A pickle is a program. Here it never runs: the names it would import are listed without executing it, any name that
is not on a short list is refused, and the listed ones are replaced by `StandIn`, which keeps its arguments and does
nothing. Plain dictionaries of tensors (`.pt`) are read like that in this process. Lightning checkpoints (`.ckpt`) are
read in a child process (`python -m sest.untrusted.unpickle`), so that a file that crashes or hangs the reader harms
nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from sest.errors import InputError, one_line, shown

# What a malformed pickle raises (pickle's documentation: "not necessarily limited to"), found by flipping bytes.
DAMAGE = (
    *(pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError),
    *(AssertionError, OverflowError, MemoryError, OSError, struct.error),
)
_REAL = {"builtins." + kind.__name__: kind for kind in (dict, list, tuple, set, frozenset)}
_NUMPY = {f"numpy.{part}" for part in ("dtype", "ndarray")} | {
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")
}
_NAMES = (
    {"builtins." + name for name in ("int", "float", "str", "bool", "bytes", "complex", "object", "slice", "range")}
    | {"argparse.Namespace", "typing.Any", "collections.defaultdict"}
    | {
        f"pathlib.{part}{name}"
        for part in ("", "_local.")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    }
)
_PACKAGES = ("omegaconf.", "torch.nn.modules.", "state.", "vci.")
_PLAIN_BUDGET = 50_000_000  # characters and nodes of hyper-parameters; a pickle can repeat one object without end


def allowed_in_dictionary(name: str) -> bool:
    """Whether a `.pt` dictionary of vectors may mention the global `name`: containers, NumPy scalars and arrays."""
    return name in _REAL or name in _NUMPY


def allowed_in_checkpoint(name: str) -> bool:
    """Whether a Lightning checkpoint may mention the global `name` (docs/design.md, Untrusted files)."""
    return allowed_in_dictionary(name) or name in _NAMES or name.startswith(_PACKAGES)


class StandIn:
    """Takes the place of a class or function that a pickle names: keeps what it was given, does nothing."""

    global_name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> StandIn:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _substitute(name: str) -> Any:
    if name == "collections.defaultdict":  # torch fills exact dicts only
        return _empty_dict
    return _REAL.get(name) or type(name.rpartition(".")[2], (StandIn,), {"global_name": name})


def read_pickle(path: Path, allowed: Callable[[str], bool]) -> Any:
    """Return the object in the `torch.save` file `path`: containers, numbers, CPU tensors (memory-mapped), stand-ins.

    Raises InputError if the file is damaged, in an old format, or mentions a global that `allowed` refuses.
    """
    names = _listed_globals(path, allowed)
    try:
        with safe_globals([(_substitute(name), name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickle protocols, then reads or fails
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGE as error:
        raise damaged(path, error) from error


def _listed_globals(path: Path, allowed: Callable[[str], bool]) -> list[str]:
    """List what the pickle in `path` would import, without executing it; InputError if `allowed` refuses any."""
    _check_archive(path)
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except DAMAGE as error:
        raise damaged(path, error) from error
    refused = [ascii(name)[1:-1][:80] for name in sorted(names) if not allowed(name)]
    if refused:
        raise InputError(
            f"{path.name} was refused unread: it asks Python to import {shown(refused)}, which weights do not need and "
            "which may run code. Download it again from its publisher, or ask there for a .safetensors file."
        )
    return names


def damaged(path: Path, error: BaseException) -> InputError:
    """The InputError that says what the reader of `path` stumbled over."""
    # one_line takes the first: torch's further lines advise to load the file unsafely
    return InputError(
        f"{path.name} cannot be read ({type(error).__name__}: {one_line(error)}). Download or save it again."
    )


def _check_archive(path: Path) -> None:
    """Refuse what is not an uncompressed zip, the only thing `torch.save` writes since PyTorch 1.6."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            raise InputError(f"{path.name} is truncated or damaged. Download or copy it again.") from error
        if start[:1] == b"\x80":
            raise InputError(
                f"{path.name} is a bare pickle or was saved by PyTorch before 1.6, a format that is not read here. "
                "Where you trust it, load it with PyTorch and torch.save it again."
            ) from error
        raise InputError(f"{path.name} is not a PyTorch file, or it is damaged. Download or save it again.") from error
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or sum(member.file_size for member in members) > path.stat().st_size:
        raise InputError(f"{path.name} unpacks to more than its size, which no PyTorch file does. It was not read.")


def read_dictionary(path: Path) -> dict[Any, Any]:
    """Return the `.pt` dictionary in `path`, NumPy names and values decoded. Raises InputError if it is none."""
    content = read_pickle(path, allowed_in_dictionary)
    if not isinstance(content, dict):
        raise InputError(f"{path.name} holds a {type(content).__name__}, not a dict of name -> vector.")
    try:
        decoded = {_numpy_value(key): _numpy_value(value) for key, value in content.items()}
    except DAMAGE as error:
        raise damaged(path, error) from error
    if len(decoded) < len(content):
        raise InputError(f"{path.name} has the same name twice.")
    return decoded


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers and text; whatever else a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(
            f"a pickle that asks Python to import {ascii(module + '.' + name)[1:-1][:80]} is refused; only a dict of "
            "name -> list of numbers is read. Save the vectors as .npz, with the program that wrote them"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise InputError("a pickle that refers to other files is refused")


def plain_pickle(content: dict[str, Any]) -> bytes:
    """A pickle of containers, numbers and text, for programs that read nothing else; `read_plain_pickle` reads it."""
    return pickle.dumps(content, protocol=4)


def read_plain_pickle(path: Path) -> dict[Any, Any]:
    """Return the dictionary of lists of numbers in a plain pickle. Raises InputError if it is anything else."""
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except InputError as error:
        raise InputError(f"{path.name}: {error}.") from None
    except (*DAMAGE, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} holds a {type(content).__name__}, not a dict of name -> vector.")
    return content


def _numpy_value(value: Any) -> Any:
    """Return the number, text or array of numbers that a NumPy stand-in was pickled from; anything else as it is.

    They are decoded from their bytes here: NumPy's own unpickling code is not made for hostile input.
    """
    if not isinstance(value, StandIn):
        return value
    name, args, state = value.global_name, value.args, value.state
    if name in _NUMPY and name.endswith(".scalar") and len(args) == 2:
        order, code = _dtype(args[0])
        if code.startswith("U"):
            return args[1].decode("utf-32-be" if order == ">" else "utf-32-le").rstrip("\0")
        return np.frombuffer(args[1], dtype=order + code)[0].item()
    if name in _NUMPY and name.endswith("._reconstruct") and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, raw = state
        return np.frombuffer(raw, dtype="".join(_dtype(dtype))).reshape(shape, order="F" if fortran else "C")
    raise ValueError(f"{name} is not a NumPy value")


def _dtype(stand_in: Any) -> tuple[str, str]:
    """Byte order and code ("<", "f4") of a pickled NumPy type."""
    if isinstance(stand_in, StandIn) and stand_in.args and isinstance(stand_in.state, tuple):
        code, order = stand_in.args[0], stand_in.state[1]
        if re.fullmatch(r"[biuf]\d|U\d+", str(code)) and order in ("<", ">", "|", "="):
            return order, code
    raise ValueError("a NumPy type that is neither a number nor text")


class _Plain:
    """Turns hyper-parameters into what JSON can hold; what it cannot hold becomes the name of its class."""

    def __init__(self) -> None:
        self.budget = _PLAIN_BUDGET

    def __call__(self, value: Any) -> Any:
        self.budget -= 1 + (len(value) if isinstance(value, str) else 0)
        if self.budget < 0:
            raise InputError("The hyper-parameters of this checkpoint are too large to be genuine.")
        if isinstance(value, Mapping):
            return {str(self(key)): self(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self(item) for item in value]
        if isinstance(value, StandIn):
            return self._stand_in(value)
        if value is None or type(value) in (bool, int, float, str):
            return value
        return value.__name__ if isinstance(value, type) else type(value).__name__

    def _stand_in(self, value: StandIn) -> Any:
        name, state = value.global_name, value.state if isinstance(value.state, dict) else {}
        if name.startswith("omegaconf.") and "_content" in state:
            return self(state["_content"])
        if name.startswith("omegaconf.") and "_val" in state:
            return self(state["_val"])
        if name == "argparse.Namespace":
            return self(state)
        if name.startswith("pathlib."):
            return self(str(PurePosixPath(*map(str, value.args))))
        if name in _NUMPY and name.endswith(".scalar"):
            return self(_numpy_value(value))
        return type(value).__name__


@dataclass(frozen=True)
class Checkpoint:
    """A Lightning checkpoint as the child process read it."""

    tensors: dict[str, torch.Tensor]  # its state_dict, stored types, mapped from a file that is already unlinked
    genes: dict[str, torch.Tensor] | None  # symbol -> (token_dim,), in order, where asked for and there
    plain: dict[str, Any]  # hyper_parameters, cfg_yaml, global_step: JSON values


def read_checkpoint(path: Path, genes: bool) -> Checkpoint:
    """Read the Lightning checkpoint `path` in a child process that dies with this one.

    The tensors pass through a temporary file (their size, in tempfile's folder), not through memory. `genes` asks for
    the checkpoint's own `protein_embeds_dict` as well. Raises InputError for a file that is refused, damaged or
    crashes its reader.
    """
    _listed_globals(path, allowed_in_checkpoint)  # the child checks again; this refuses without starting it
    with tempfile.TemporaryDirectory(prefix="sest-") as folder:
        out = Path(folder) / "checkpoint.safetensors"
        command = [sys.executable, "-P", "-W", "ignore", "-m", "sest.untrusted.unpickle", str(path), str(out)]
        path_of_parent = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with subprocess.Popen(
            command + ["genes"] * genes,
            env={**os.environ, "PYTHONPATH": path_of_parent},
            stdin=subprocess.PIPE,  # stays open while this process lives: the child watches it
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as child:
            assert child.stderr is not None
            said = child.stderr.read().decode(errors="replace").strip().splitlines() or ["no message"]
            code = child.wait()
        if code == 2:
            raise InputError(said[-1])
        if code != 0:
            raise InputError(f"{path.name} cannot be read: its reader ended with {code} ({said[-1][:200]}).")
        with safe_open(out, framework="pt") as file:
            plain = json.loads(file.metadata()["plain"])
        stored = load_file(out)
    names = plain.pop("genes")
    return Checkpoint(
        tensors={name[2:]: tensor for name, tensor in stored.items() if name.startswith("w ")},
        genes=None if names is None else {name: stored[f"g {i}"] for i, name in enumerate(names)},
        plain=plain,
    )


def _write_checkpoint(path: Path, out: Path, genes: bool) -> None:
    """In the child: put tensors and plain values of checkpoint `path` into `out`."""
    content = read_pickle(path, allowed_in_checkpoint)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{path.name} holds no state_dict: it is not a Lightning checkpoint.")
    found = content.get("protein_embeds_dict") if genes else None
    own = found if isinstance(found, dict) else None
    tensors = {f"w {name}": tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    for i, (name, tensor) in enumerate((own or {}).items()):
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path.name}: its protein_embeds_dict does not map gene symbols to tensors.")
        tensors[f"g {i}"] = tensor
    as_plain = _Plain()
    plain = {key: as_plain(content.get(key)) for key in ("hyper_parameters", "cfg_yaml", "global_step")}
    plain["genes"] = None if own is None else list(own)
    need = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise InputError(
            f"Reading {path.name} takes {need / 1e9:.1f} GB in {out.parent.parent}, which has {free / 1e9:.1f} GB. "
            "Set TMPDIR to a folder with room."
        )
    save_file(_unshared(tensors), out, metadata={"plain": json.dumps(plain)})


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give every tensor memory of its own, as safetensors demands; what has it already is not copied."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise InputError(f"Tensor {name[2:]!r} is sparse, quantized or without data, which is not read here.")
        tensor = tensor.detach()
        start = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone(memory_format=torch.contiguous_format) if start in seen else tensor.contiguous()
        seen.add(start)
    return result


def _die_with_parent(out: Path) -> None:
    os.read(0, 1)  # returns when the parent's end of the pipe closes
    out.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # only ever removes an empty folder
        out.parent.rmdir()
    os._exit(1)


def main(arguments: list[str]) -> int:
    """The child: read checkpoint `arguments[0]` into the safetensors file `arguments[1]`; 2 after a bad input."""
    path, out = Path(arguments[0]), Path(arguments[1])
    threading.Thread(target=_die_with_parent, args=(out,), daemon=True).start()
    try:
        _write_checkpoint(path, out, "genes" in arguments[2:])
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
