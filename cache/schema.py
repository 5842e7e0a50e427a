"""Names and sizes that the writer and the reader of a cache share.

A cache is a folder, one Zarr v3 hierarchy in which every input file's group is a valid AnnData group:

    OUT.zarr/zarr.json            root group; attribute "sest" says how the cache was made
    OUT.zarr/<group>/             X (CSR targets), obs, var, obsm/X_sest; opens with anndata.read_zarr
    OUT.zarr/projection/          mean, basis, explained_variance of the PCA, where there is one
    OUT.zarr/journal.jsonl        one line a finished file: {file, size, sha256, ...}, fsynced; sorted once complete
    OUT.zarr/journal-<rank>.jsonl the same of further processes, while they write; merged into journal.jsonl at the end
    OUT.zarr/COMPLETE             written last; holds the sha256 of the journal
    OUT.zarr/.spool/              finished row blocks of unfinished shards; gone when the cache is complete
    OUT.zarr/.derived/            what was computed from all cells; no part of the cache, see sest.cache.derived
"""

from __future__ import annotations

from sest.errors import Error

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
