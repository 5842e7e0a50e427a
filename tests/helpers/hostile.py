"""Files that somebody made to do harm, by name; a maker is given a path without an ending and returns its file."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp
import torch

from helpers.damaged_h5ad import counts, write
from helpers.pickles import Pickled

Maker = Callable[[Path], Path]
ODD = "a\x1b[31mb\u202ec\u2066[/nope]<script>d</script>=1+1"  # a label that a terminal, a table or a page might obey


def canary(path: Path) -> Path:
    """What is there if code of a file ran."""
    return path.with_name("canary")


def _call(path: Path) -> Pickled:
    return Pickled(os.system, f"touch {canary(path)}")


def _cells(change: Callable[[h5py.File], object], dense: bool = False) -> Maker:
    def make(path: Path) -> Path:
        file = write(path.with_suffix(".h5ad"), counts() if dense else sp.csr_matrix(counts()))
        with h5py.File(file, "r+") as opened:
            change(opened)
        return file

    return make


def _set(name: str, at: Any, value: Any) -> Maker:
    return _cells(lambda file: file[name].__setitem__(at, value))


def _put(name: str, make: Callable[[h5py.Group, str], object]) -> Maker:
    """Another node in the place of one."""

    def change(file: h5py.File) -> None:
        parent, _, last = name.rpartition("/")
        group = file[parent] if parent else file
        attributes = dict(group[last].attrs)
        del group[last]
        made = make(group, last)
        if isinstance(made, h5py.HLObject):
            made.attrs.update(attributes)

    return _cells(change)


def _unwritten(shape: tuple[int, ...], dtype: str, **options: Any) -> Callable[[h5py.Group, str], object]:
    return lambda group, last: group.create_dataset(last, shape, dtype, **options)


def _virtual(group: h5py.Group, last: str) -> object:
    layout = h5py.VirtualLayout((53,), "i4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (53,))
    return group.create_virtual_dataset(last, layout)


def _filtered(number: int) -> Callable[[h5py.Group, str], object]:
    def make(group: h5py.Group, last: str) -> object:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((100,))
        plan.set_filter(number, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((1000,))
        h5py.h5d.create(group.id, last.encode(), h5py.h5t.IEEE_F32LE, space, plan)
        return None

    return make


def _cycle(file: h5py.File) -> None:
    file["obs/target_gene/codes_"] = file["obs/target_gene"]
    del file["obs/target_gene/codes"]
    file["obs/target_gene/codes"] = file["obs/target_gene"]


def _deep(file: h5py.File) -> None:
    group = file["uns"] if "uns" in file else file.create_group("uns")
    for _ in range(3000):
        group = group.create_group("g")


def _labels(text: str) -> Maker:
    return _cells(lambda file: file["obs/target_gene/categories"].__setitem__(0, text))


def _genes(text: str) -> Maker:
    return _cells(lambda file: file["var/_index"].__setitem__(slice(0, 2), text))


def _columns(file: h5py.File) -> None:
    for i in range(30_000):
        file["obs"].attrs.get("column-order")
        file["obs"][f"c{i}"] = file["obs/n"]
    file["obs"].attrs["column-order"] = np.array(["target_gene", "n"], dtype=h5py.string_dtype())


def _bytes(suffix: str, data: bytes | Callable[[], bytes]) -> Maker:
    def make(path: Path) -> Path:
        file = path.with_suffix(suffix)
        file.write_bytes(data if isinstance(data, bytes) else data())
        return file

    return make


CELLS: dict[str, Maker] = {
    "link to another file": _put(
        "obs", lambda group, last: group.__setitem__(last, h5py.ExternalLink("/etc/x.h5", "/"))
    ),
    "link to itself": _put("X", lambda group, last: group.__setitem__(last, h5py.SoftLink("/X"))),
    "virtual data": _put("X/indices", _virtual),
    "storage elsewhere": _put("X/data", _unwritten((8,), "f4", external=[("/etc/hostname", 0, 32)])),
    "cycle of hard links": _cells(_cycle),
    "groups without end": _cells(_deep),
    "row starts of 64 GB": _put("X/indptr", _unwritten((2**33,), "i8", chunks=(2**20,))),
    "values of 8 GB": _put("X/data", _unwritten((2**31,), "f4", chunks=(2**20,))),
    "a chunk of 2 GB": _put("X/data", _unwritten((2**29,), "f4", chunks=(2**29 - 1,), compression="gzip")),
    "a dense matrix of 10^15": _put("X", _unwritten((2**25, 2**25), "f4", chunks=(64, 64))),
    "a row start below zero": _set("X/indptr", 3, -5),
    "row starts that go down": _set("X/indptr", 3, 10_000),
    "a gene out of range": _set("X/indices", 4, 31),
    "a gene below zero": _set("X/indices", 4, -1),
    "a gene twice": _cells(lambda file: file["X/indices"].__setitem__(slice(0, 40), 0)),
    "not a number": _set("X/data", 3, np.nan),
    "infinite": _set("X/data", 3, np.inf),
    "counts below zero": _set("X/data", 3, -7),
    "counts of 10^30": _set("X/data", 3, 1e30),
    "a code out of range": _set("obs/target_gene/codes", 3, 77),
    "a shape of 2^62": _cells(lambda file: file["X"].attrs.__setitem__("shape", np.array([2**62, 31]))),
    "a shape below zero": _cells(lambda file: file["X"].attrs.__setitem__("shape", np.array([-1, 31]))),
    "complex values": _put("X/data", _unwritten((8,), "c8")),
    "values that are references": _put("X/data", lambda g, last: g.create_dataset(last, (8,), h5py.ref_dtype)),
    "values that are records": _put("X/data", _unwritten((8,), "i4,f4")),
    "values that are lists": _put("X/data", lambda g, last: g.create_dataset(last, (8,), h5py.vlen_dtype("f4"))),
    "a filter that nobody knows": _put("X/data", _filtered(310)),
    "a group instead of names": _put("var/_index", lambda group, last: group.create_group(last)),
    "labels that a terminal obeys": _labels(ODD),
    "a label of a megabyte": _labels("x" * 10**6),
    "a gene of a megabyte, twice": _genes("x" * 10**6),
    "30,000 columns": _cells(_columns),
    "an encoding from elsewhere": _cells(lambda file: file["obs"].attrs.__setitem__("encoding-type", "os.system")),
    "half a file": lambda path: _half(_cells(lambda file: None)(path)),
    "a signature alone": _bytes(".h5ad", b"\x89HDF\r\n\x1a\n" + bytes(2000)),
    "noise behind a signature": _bytes(".h5ad", lambda: b"\x89HDF\r\n\x1a\n" + np.random.default_rng(0).bytes(100_000)),
    "zarr with a pickle filter": lambda path: _zarr(path, "pickle"),
    "zarr with a link": lambda path: _zarr(path, "link"),
    "zarr of 10^15 cells": lambda path: _zarr(path, "large"),
}


def _half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _zarr(path: Path, kind: str) -> Path:
    import anndata as ad

    from helpers.zarr_cells import as_zarr

    cells = as_zarr(path.with_suffix(".zarr"), ad.read_h5ad(write(path.with_suffix(".h5ad"), counts())), "zarr2")
    (cells / ".zmetadata").unlink(missing_ok=True)
    about = cells / "X" / ".zarray"
    if kind == "link":
        chunk = next(file for file in (cells / "X").iterdir() if file.name[0].isdigit())
        chunk.unlink()
        chunk.symlink_to("/etc/hostname")
    else:
        values = json.loads(about.read_text())
        values |= (
            {"filters": [{"id": "pickle"}]} if kind == "pickle" else {"shape": [10**15, 31], "chunks": [10**15, 31]}
        )
        about.write_text(json.dumps(values))
    if kind == "pickle":
        for chunk in (cells / "X").iterdir():
            if chunk.name[0].isdigit():
                chunk.write_bytes(pickle.dumps(_call(path)))
    return cells


def _archive(members: dict[str, bytes], suffix: str = ".npz") -> Maker:
    def make(path: Path) -> Path:
        with zipfile.ZipFile(path.with_suffix(suffix), "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path.with_suffix(suffix)

    return make


def _npy(shape: tuple[int, ...], dtype: str = "<f4", data: bytes = b"") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


def _bomb(path: Path) -> Path:
    """The case npz-bomb: zeros of 6 GB."""
    archive = zipfile.ZipFile(path.with_suffix(".npz"), "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("A.npy", "w", force_zip64=True) as member:
        member.write(_npy((3 * 2**29,)))
        for _ in range(6 * 2**30 // 2**26):
            member.write(bytes(2**26))
    return path.with_suffix(".npz")


def _saved(value: Callable[[Path], Any], suffix: str = ".pt") -> Maker:
    def make(path: Path) -> Path:
        torch.save(value(path), path.with_suffix(suffix))
        return path.with_suffix(suffix)

    return make


def _pickled(value: Callable[[Path], Any]) -> Maker:
    def make(path: Path) -> Path:
        path.with_suffix(".pkl").write_bytes(pickle.dumps(value(path)))
        return path.with_suffix(".pkl")

    return make


def _laughs(path: Path) -> list[Any]:
    value: list[Any] = [1.0]
    for _ in range(40):
        value = [value] * 10
    return value


def _tensors(header: dict[str, Any] | bytes, length: int | None = None, data: bytes = b"") -> Maker:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    n = len(text) if length is None else length
    return _bytes(".safetensors", n.to_bytes(8, "little") + text + data)


def _tensor(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


VECTORS: dict[str, Maker] = {
    "npz of 6 GB in 6 MB": _bomb,
    "npz with a pickle": _archive({"A.npy": _npy((1,), "|O", pickle.dumps([os.system]))}),
    "npz that leads upwards": _archive({"../../A.npy": _npy((2,), data=bytes(8))}),
    "npz of 2^60 values": _archive({"A.npy": _npy((2**60,))}),
    "npz with a header that is code": _archive(
        {"A.npy": b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').abort()".ljust(118)}
    ),
    "pt that runs": _saved(lambda path: {"A": _call(path)}),
    "pt of one number for 10^12": _saved(lambda path: {"A": torch.zeros(1).expand(10**12)}),
    "pt that is a zip of something": _archive({"x/data.pkl": b"\x80\x02.", "x/version": b"3"}, ".pt"),
    "pickle that runs": _pickled(lambda path: {"A": _call(path)}),
    "pickle of 10^40 lists": _pickled(lambda path: {"A": _laughs(path)}),
    "pickle of brackets": _bytes(".pkl", b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."),
    "pickle with 2^40 bytes": _bytes(".pkl", b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x"),
    "tensors that overlap": _tensors({"A": _tensor(0, 8, [2]), "B": _tensor(4, 12, [2])}, data=bytes(12)),
    "tensors out of the file": _tensors({"A": _tensor(0, 2**40, [2**38])}),
    "tensors of 2^64 values": _tensors({"A": _tensor(0, 8, [2**32, 2**32])}, data=bytes(8)),
    "a header of 2^60 bytes": _tensors({"A": _tensor(0, 8, [2])}, 2**60, bytes(8)),
    "a header of brackets": _tensors(b"[" * 200_000),
    "tensors of a type that nobody knows": _tensors({"A": _tensor(0, 8, [2], "PICKLE")}, data=bytes(8)),
    "a table with zeros": _bytes(".csv", b"A,1,2\n\x00\x00,1,2\n"),
    "a table that is no text": _bytes(".tsv", bytes(range(256)) * 10),
    "a table of one line": _bytes(".csv", b"A" + b",1" * 3_000_000),
    "a field of a megabyte": _bytes(".csv", b'"' + b"x" * 10**6 + b'",1\n'),
    "a web page": _bytes(".npz", b"<!DOCTYPE html><script>x</script>"),
}

SETTINGS: dict[str, Maker] = {
    "400,000 dots": _bytes(".toml", b"a" + b".a" * 400_000 + b" = 1\n"),
    "200,000 brackets": _bytes(".toml", b"lr = " + b"[" * 200_000),
    "10^12 steps, sets of 10^12": _bytes(".toml", b"max_steps = 1000000000000\nset_size = 1000000000000\n"),
    "a head of 2^62": _bytes(".toml", b"hidden = 4611686018427387904\n"),
    "a rate that is no number": _bytes(".toml", b"lr = nan\n"),
    "a number of 100,000 digits": _bytes(".toml", b"max_steps = " + b"9" * 100_000),
    "a name that a terminal obeys": _bytes(".toml", b'"a\\u001b[31m\\u202e" = 1\n'),
    "a scratch folder that is a device": _bytes(".toml", b'data_device = "disk"\nscratch = "/dev/null"\n'),
    "text that is no UTF-8": _bytes(".toml", b"\xff\xfe = 1"),
}


def _run(change: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    def make(sound: Path, path: Path) -> Path:
        shutil.copytree(sound, path)
        change(path)
        return path

    return make


def _state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], Path]:
    """A changed state.json whose own hash fits."""

    def apply(run: Path) -> None:
        from sest.runs.checkpoint import _state_sha256

        for file in run.glob("*/state.json"):
            state = json.loads(file.read_text())
            change(state)
            state["sha256"] = _state_sha256(state)
            file.write_text(json.dumps(state))

    return _run(apply)


def _all(name: str, data: bytes) -> Callable[[Path, Path], Path]:
    return _run(lambda run: [file.write_bytes(data) for file in run.rglob(name)])


def _url(run: Path) -> None:
    config = run / "config.toml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("cache = ")]
    config.write_text("\n".join([*lines, 'cache = "reference://x::/tmp/ref.json"']))


RUNS: dict[str, Callable[[Path, Path], Path]] = {
    "a cache at a URL that leads on": _run(_url),
    "sizes of 10^12": _state(lambda state: state["sizes"].update(n_genes=10**12)),
    "sizes below zero": _state(lambda state: state["sizes"].update(hidden=-1)),
    "a step that is null": _state(lambda state: state.update(step=None)),
    "files that lead upwards": _state(lambda state: state["files"].update({"../../../etc/passwd": "0" * 64})),
    "no genes": _state(lambda state: state.update(genes=[])),
    "a state of 200,000 brackets": _all("state.json", b"[" * 200_000),
    "metrics of 200,000 brackets": _all("metrics.jsonl", b'{"step": ' + b"[" * 200_000 + b"\n"),
    "metrics of 10^308": _all("metrics.jsonl", b'{"step": 1, "loss": 1e999, "lr": -1}\n'),
    "weights of another shape": _all("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
    "a configuration that is a list": _all("config.toml", b"[[provenance]]\ncache = 1\n"),
}
