"""Names and sizes that the writer and the reader of a cache share, and all that a cache's metadata may say.

A cache is a folder, one Zarr v3 hierarchy in which every input file's group is a valid AnnData group:

    OUT.zarr/zarr.json            root group; attribute "sest" says how the cache was made
    OUT.zarr/<group>/             X (CSR targets), obs, var, obsm/X_sest; opens with anndata.read_zarr
    OUT.zarr/projection/          mean, basis, explained_variance of the PCA, where there is one
    OUT.zarr/journal.jsonl        one line a finished file: {file, size, sha256, ...}, fsynced; sorted once complete
    OUT.zarr/journal-<rank>.jsonl the same of further processes, while they write; merged into journal.jsonl at the end
    OUT.zarr/COMPLETE             written last; holds the sha256 of the journal
    OUT.zarr/.spool/              finished row blocks of unfinished shards; gone when the cache is complete
    OUT.zarr/.derived/            what was computed from all cells; no part of the cache, see sest.cache.derived

Whoever gives a cache away can have written anything into it, with hashes that fit. So metadata is compared with a list
of what sest writes (`check_metadata`), before anything that it describes is decoded: Zarr v3 arrays of a few types,
codecs, shapes and places, whose chunks are all in the journal. Errors of what is not in the list are ValueErrors.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from sest.errors import Error, brief, one_line, shown

SCHEMA_VERSION = 1
EMBEDDING = "X_sest"
ROWS_PER_CHUNK = 1024
ROWS_PER_SHARD = 16_384
ENTRIES_PER_CHUNK = 262_144  # stored values of the CSR targets
ENTRIES_PER_SHARD = 64 * ENTRIES_PER_CHUNK

ROOT = "zarr.json"
JOURNAL = "journal.jsonl"
COMPLETE = "COMPLETE"
LOCK = ".lock"
FINISHING = ".finishing"  # locked by the one of several processes that completes the cache
SPOOL = ".spool"
DERIVED = ".derived"
PROJECTION = "projection"
RESERVED = (JOURNAL, COMPLETE, LOCK, FINISHING, SPOOL, DERIVED, PROJECTION, ROOT)
ENCODER_FOLDER = "encoder_folder"  # root attribute: where the files of an SE encoder were
PACKED = "embedding_codec"  # root attribute: ZSTD where embeddings are compressed, else not there
ZSTD = "zstd"
MEASURED = ("fidelity", ENCODER_FOLDER)  # root attributes which may be others on another machine

LICENCE_NOTE = (
    "Embeddings made with State Embedding (SE) weights are outputs of a model whose licence is non-commercial; "
    "see https://huggingface.co/arcinstitute/SE-600M."
)


class CacheError(Error):
    """A cache that cannot be used as asked: one line that says what is wrong and what to do."""


# ---- what metadata may say

INTEGERS = ("int8", "int16", "int32", "int64")
FLOATS = ("float16", "float32", "float64")
STRING = "string"
COUNTS, LOG1P = "counts", "log1p"  # scales
TARGETS = {"X/data": ("int16", "int32", "float32"), "X/indices": ("int32",)}
PROJECTED = ("mean", "basis", "explained_variance")

MOST_PER_CHUNK = 2**24  # entries; sest's own have at most 2**22
MOST_CHUNKS = 2**10  # of a shard; sest's own have 64
MOST_PROJECTED = 2**29  # entries of an array of the projection, which is one chunk
MOST_PER_BYTE = 8  # cells or genes for each byte of the cache's files; sest's own have one at most
LARGEST = 2**53

ROOT_ATTRIBUTES = {
    **dict.fromkeys(("groups",), list),
    **dict.fromkeys(("inputs",), dict),
    **dict.fromkeys(("dim", "native_dim", "seed"), int),
    **dict.fromkeys(("encoder", "encoder_sha256", "dtype", "projection", "cells", "sest_version"), str),
    "targets": bool,
}
GROUP_ATTRIBUTES = {
    "columns": dict,
    **dict.fromkeys(("dataset", "scale"), str),
    **dict.fromkeys(("n_cells", "n_genes", "n_embedded", "perturbations", "controls"), int),
}
NEEDED = ("dim", "groups", "inputs", "columns", "dataset", "scale", "n_cells", "n_genes", "controls")


def parsed(data: bytes) -> Any:
    """JSON that others may have written. Raises ValueError."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error


def is_file_name(name: Any) -> bool:
    """Whether this names a file or a folder within the cache: not hidden, and not outside."""
    parts = name.split("/") if isinstance(name, str) and name.isprintable() else [""]
    return not any(part.startswith(".") or not part for part in parts)


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Raise ValueError where the root's attributes are not of the types that sest writes."""
    _check_types(attributes, ROOT_ATTRIBUTES, ROOT)
    groups = attributes["groups"]
    for name in groups:
        if not is_file_name(name) or name.split("/")[0] in RESERVED:
            raise ValueError(f"{ROOT} names a group {_short(name)}")
        if groups.count(name) > 1 or not isinstance(attributes["inputs"].get(name), dict):
            raise ValueError(f"{ROOT} has not one input for the group {_short(name)}")


def check_metadata(
    attributes: Mapping[str, Any], files: Mapping[str, int], read: Callable[[str], bytes]
) -> dict[str, dict[str, Any]]:
    """Compare what a cache says of its arrays with what sest writes.

    Args:
        attributes: of the root, checked.
        files: the journal's, with their sizes.
        read: gives the bytes of one.

    Returns:
        The groups' attributes.

    Raises:
        ValueError: something is said that sest never says, or shards are missing.
    """
    nodes = metadata_of(files, read)
    most = MOST_PER_BYTE * sum(files.values())
    check_projection(nodes)
    return {name: _check_group(name, nodes, files, attributes["dim"], most) for name in attributes["groups"]}


def metadata_of(files: Iterable[str], read: Callable[[str], bytes]) -> dict[str, Any]:
    """What the metadata of folders says, by their names. Raises ValueError."""
    return {name.rpartition("/")[0]: parsed(read(name)) for name in files if name.rpartition("/")[2] == ROOT}


def check_projection(nodes: Mapping[str, Any]) -> None:
    """Raise ValueError where the projection, if there is one, is not as sest writes it."""
    arrays = [node for node in nodes if node.startswith(f"{PROJECTION}/")]
    if PROJECTION in nodes or arrays:
        _check_node(nodes, PROJECTION, "group")
    for name in arrays:
        if name.removeprefix(f"{PROJECTION}/") not in PROJECTED:
            raise ValueError(f"there is an array {name}")
        shape = _check_array(nodes, name, FLOATS, most_per_chunk=MOST_PROJECTED)
        if len(shape) != (2 if name.endswith("basis") else 1) or math.prod(shape) > MOST_PROJECTED:
            raise ValueError(f"{name}/{ROOT} has the shape {shape}")


def _check_types(attributes: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    for name, kind in types.items():
        value = attributes.get(name)
        if (name in attributes or name in NEEDED) and type(value) is not kind:
            raise ValueError(f"{where} has {_short(value)} for {name}")
        if kind is int and value is not None and not 0 <= value < LARGEST:
            raise ValueError(f"{where} has {_short(value)} for {name}")


def _check_group(group: str, nodes: Mapping[str, Any], files: Collection[str], dim: int, most: int) -> dict[str, Any]:
    """The attributes of one file's group, once its arrays are what they say."""
    about = _check_node(nodes, group, "group").get("sest")
    if not isinstance(about, dict):
        raise ValueError(f"{group}/{ROOT} does not say how the group was made")
    _check_types(about, GROUP_ATTRIBUTES, f"{group}/{ROOT}")
    n_cells, n_genes = about["n_cells"], about["n_genes"]
    if max(n_cells, n_genes) > most:
        raise ValueError(f"{group}/{ROOT} has {n_cells:,} cells of {n_genes:,} genes, more than its files can hold")
    if about["scale"] not in (COUNTS, LOG1P):
        raise ValueError(f"{group}/{ROOT} has {_short(about['scale'])} for scale")
    if not all(isinstance(name, str | None) for name in about["columns"].values()):
        raise ValueError(f"{group}/{ROOT} has a column whose name is no text")
    _check_table(nodes, f"{group}/obs", n_cells, most)
    _check_table(nodes, f"{group}/var", n_genes, most)
    for folder in ("X", "obsm"):
        _check_node(nodes, f"{group}/{folder}", "group")
    _check_array(nodes, f"{group}/X/indptr", ("int64",), (n_cells + 1,))
    n_values = {_check_array(nodes, f"{group}/{name}", types, files=files) for name, types in TARGETS.items()}
    if len(n_values) > 1 or len(*n_values) != 1:
        raise ValueError(f"{group}/X has values and places of them in numbers that differ")
    _check_array(nodes, f"{group}/obsm/{EMBEDDING}", FLOATS[:2], (n_cells, dim), files=files)
    return about


def _check_table(nodes: Mapping[str, Any], table: str, length: int, most: int) -> None:
    """A table whose columns are labels: categories, and the code of one for every row."""
    attributes = _check_node(nodes, table, "group")
    names = attributes.get("column-order")
    index = attributes.get("_index")
    if not isinstance(names, list) or not all(is_file_name(name) and "/" not in name for name in (*names, index)):
        raise ValueError(f"{table}/{ROOT} describes no table")
    _check_array(nodes, f"{table}/{index}", (STRING,), (length,))
    for name in names:
        if _check_node(nodes, f"{table}/{name}", "group").get("encoding-type") != "categorical":
            raise ValueError(f"{table}/{name}/{ROOT} describes no labels")
        _check_array(nodes, f"{table}/{name}/codes", INTEGERS, (length,))
        shape = _check_array(nodes, f"{table}/{name}/categories", (STRING,))
        if len(shape) != 1 or shape[0] > most:
            raise ValueError(f"{table}/{name}/categories/{ROOT} has the shape {shape}")


def _check_node(nodes: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    """The attributes of a group or an array."""
    about, file = nodes.get(name), f"{name}/{ROOT}"
    if about is None:
        raise ValueError(f"{JOURNAL} has no {file}")
    if not isinstance(about, dict) or about.get("zarr_format") != 3 or about.get("node_type") != kind:
        raise ValueError(f"{file} describes no {kind} of Zarr version 3")
    attributes = about.get("attributes", {})
    if not isinstance(attributes, dict) or about.get("consolidated_metadata") or about.get("storage_transformers"):
        raise ValueError(f"{file} has other metadata than sest writes")
    return attributes


def _check_array(
    nodes: Mapping[str, Any],
    name: str,
    types: Collection[str],
    shape: tuple[int, ...] | None = None,
    *,
    files: Collection[str] | None = None,
    most_per_chunk: int = MOST_PER_CHUNK,
) -> tuple[int, ...]:
    """The shape of an array.

    Args:
        types: one of which it must have.
        shape: which it must have, if given.
        files: the journal's, which must have all of its shards; None: it is not in shards.
        most_per_chunk: entries.
    """
    _check_node(nodes, name, "array")
    about, file = nodes[name], f"{name}/{ROOT}"
    try:
        grid, places, kind = about["chunk_grid"], about["chunk_key_encoding"], about["data_type"]
        of, chunk = _lengths(about["shape"]), _lengths(grid["configuration"]["chunk_shape"])
        if grid["name"] != "regular" or (places["name"], *places.get("configuration", {}).values()) != ("default", "/"):
            raise ValueError("its chunks lie elsewhere")
        if kind not in types or not isinstance(about["fill_value"], int | float | str):
            raise ValueError(f"its type is {_short(kind)}, empty {_short(about['fill_value'])}")
        inner = _check_codecs(about["codecs"], kind, chunk if files is not None else None) or chunk
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not as sest writes it: {one_line(error)} is missing or of another type") from error
    except ValueError as error:
        raise ValueError(f"{file} is not as sest writes it: {error}") from error
    if len(chunk) != len(of) or 0 in inner or math.prod(inner) > most_per_chunk or shape not in (None, of):
        raise ValueError(f"{file} is not as sest writes it: the shape is {of}, that of a chunk {inner}")
    if files is not None:
        _check_shards(name, of, chunk, files)
    return of


def _check_shards(name: str, shape: tuple[int, ...], shard: tuple[int, ...], files: Collection[str]) -> None:
    """Every shard of an array must have been written."""
    n_shards = [-(-length // of) for length, of in zip(shape, shard, strict=True)]
    n_missing = math.prod(n_shards)
    if n_missing <= len(files):
        places = itertools.product(*map(range, n_shards))
        n_missing = sum(f"{name}/c/{'/'.join(map(str, place))}" not in files for place in places)
    if n_missing:
        raise ValueError(f"{n_missing:,} shards of {name} are not in {JOURNAL}")


def _check_codecs(codecs: Any, kind: str, shard: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Those of an array; of one in shards, whose shape is given, returns the shape of a chunk in them."""
    if shard is None:
        first, *others = [codec["name"] for codec in codecs]
        known = (["zstd"], []) if kind == STRING else (["zstd"], [], ["zstd", "crc32c"], ["blosc"])
        if first != ("vlen-utf8" if kind == STRING else "bytes") or others not in known:
            raise ValueError(f"it names the codecs {shown([first, *others])}")
        return None
    (sharding,) = codecs
    inner = sharding["configuration"]
    names = [codec["name"] for codec in inner["codecs"]]
    of_index = [codec["name"] for codec in inner["index_codecs"]]
    plain = ["bytes", "crc32c"]
    if (
        sharding["name"] != "sharding_indexed"
        or names not in (plain, ["bytes", "blosc", "crc32c"])
        or of_index != plain
    ):
        raise ValueError(f"it names the codecs {shown([sharding['name'], *names, *of_index])}")
    chunk = _lengths(inner["chunk_shape"])
    if len(chunk) != len(shard) or 0 in chunk or any(a % b for a, b in zip(shard, chunk, strict=True)):
        raise ValueError(f"shards are {shard}, chunks in them {chunk}")
    if math.prod(shard) > MOST_CHUNKS * math.prod(chunk):
        raise ValueError(f"there are more than {MOST_CHUNKS:,} chunks in a shard")
    return chunk


def _lengths(shape: Any) -> tuple[int, ...]:
    """A shape of one or two dimensions."""
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2:
        raise ValueError(f"a shape is {_short(shape)}")
    if not all(type(length) is int and 0 <= length < LARGEST for length in shape):
        raise ValueError(f"a shape is {_short(shape)}")
    return tuple(shape)


def _short(value: Any) -> str:
    """A value of metadata for an error's line."""
    return brief(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
