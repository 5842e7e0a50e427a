"""What the files of a run folder may say: a run may be somebody else's, so it is checked before it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from sest.errors import InputError, one_line
from sest.untrusted.plain_json import (
    check_plain,
    flag,
    list_of,
    mapping_of,
    maybe,
    number,
    read_json,
    record,
    text,
    whole,
)

FORMAT_VERSION = 1
FILES = MODEL, PROJECTION, FEATURES, BLEND, OPTIMIZER, STATE = (
    "model.safetensors",
    "projection.safetensors",
    "features.safetensors",
    "blend.safetensors",
    "optimizer.safetensors",
    "state.json",
)
LAST, BEST = "last", "best"  # checkpoints of a run
LONGEST_LINE = 2**15  # bytes of a line of metrics.jsonl; those of a validation have 4,000
MOST_BYTES, MOST_LINES = 2**28, 10**6  # of a metrics.jsonl
MOST_NUMBERS = 500  # in a line
_NAME = re.compile(r"[A-Za-z0-9_]{1,80}")
_SUM = re.compile(rb'(.*), "crc32c": (\d{1,10})\}\n?', re.DOTALL)  # a line, and the checksum of what is before it

_names, _figure, _sha256 = list_of(text()), number(finite=False), maybe(text())
_weights = mapping_of(number(0, 1 + 1e-6))
STATE_KIND = record(
    {
        "step": whole(),
        "run": record(
            {"step": whole()},
            {
                "best_step": maybe(whole()),
                "best_val_loss": maybe(_figure),
                "val_loss": maybe(_figure),
                "validations_without_improvement": whole(),
                "skipped_steps": whole(),
                "monitored": list_of(_figure),
                "lines": whole(),
            },
        ),
        "sizes": record(
            {
                "dim": whole(1, 2**20),
                "n_features": whole(1, 2**24),
                "n_genes": whole(1, 2**22),
                "hidden": whole(1, 2**16),
                "n_layers": whole(0, 512),
                "n_heads": whole(1, 2**12),
                "ffn": whole(1, 2**20),
                "n_encoder_layers": whole(1, 512),
                "n_decoder_layers": whole(1, 512),
                "dropout": number(0, 1),
            }
        ),
        "trainable_parameters": whole(),
        "genes": _names,
        "config": mapping_of(lambda value: None),  # of a `TrainConfig`, which checks it
        "precision": text("fp32", "tf32", "bf16", "fp16"),
        "cache_sha256": _sha256,
        "splits_sha256": _sha256,
        "features": record(
            {"source": text(), "sha256": _sha256, "width": whole(), "names": maybe(_names)}, {"columns": _names}
        ),
        "encoder": record(
            {"name": text(), "sha256": _sha256, "licence": maybe(text()), "genes": maybe(_names)},
            {
                "native_dim": whole(),
                "max_tokens": maybe(whole()),
                "projection": text("pca", "genes", "state", "none"),
                "seed": whole(0, 2**63),
                "gene_means": list_of(number()),
            },
        ),
        "scale": maybe(text("counts", "log1p", "mixed")),
        "target_sum": maybe(number(0)),
        "columns": mapping_of(maybe(lambda value: (list_of(text()) if isinstance(value, list) else text())(value))),
        "sest_version": text(),
        "files": mapping_of(text()),
        "format_version": whole(),
        "sha256": text(),
    },
    {
        "scaler": mapping_of(number()),
        "cells": record(
            {
                "perturbations": _names,
                "trained": _names,
                "missing": _names,
                "sources": _names,
                "dtype": text("float16", "float32"),
                "is_one_scale": flag,
                "normalisation": maybe(
                    record(
                        {"log": text(), "is_whole": flag},
                        {"total": maybe(number()), "sums": maybe(list_of(number(), 3))},
                    )
                ),
            }
        ),
        "window": record(
            {"loss": _figure, "grad_norm": _figure, "bad": number(0), "streak": number(0), "worst_streak": number(0)}
            | {"steps": whole()},
        ),
        "baselines": maybe(mapping_of(maybe(_figure))),
        "blend": record(
            {
                "weights": _weights,
                "spread": mapping_of(number(0)),
                "n_pairs": whole(),
                "contexts": _names,
                "perturbations": _names,
            },
            {
                "stack": maybe(
                    record(
                        {},
                        {
                            "weights": mapping_of(_weights),
                            "kernel": maybe(list_of(number(), 6)),
                            "ridge": maybe(list_of(number(0), 2)),
                        },
                    )
                )
            },
        ),
        "init_from": maybe(record({"name": text(), "step": whole(), "model_sha256": text()})),
    },
)
PROVENANCE = {"cache", "sest_version", "torch_version", "resumed_from"}  # which every config.toml says
PROVENANCE_TOO = {"chosen", "sha256"}  # and some
PROVENANCE_KIND = record({}, dict.fromkeys(PROVENANCE | PROVENANCE_TOO, text()))


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint folder.

    Raises:
        FileNotFoundError: it has none.
        InputError: it cannot be read, is of another format version, or says what no checkpoint says.
    """
    try:
        state = read_json(folder / STATE)
        version = state["format_version"] if isinstance(state, dict) else None
    except (InputError, KeyError) as error:
        reason = str(error) if isinstance(error, InputError) else f"it has no {error}"
        raise InputError(f"{folder} is damaged: {STATE} cannot be read ({reason.rstrip('.')}).") from error
    if type(version) is int and version != FORMAT_VERSION:
        raise InputError(f"{folder} has checkpoint format {version}; this sest reads {FORMAT_VERSION}.")
    check_plain(state, STATE_KIND, f"{folder} is damaged: {STATE}")
    sizes, genes = state["sizes"], state["genes"]
    if foreign := sorted(set(state["files"]) - set(FILES)):
        raise InputError(f"{folder} is damaged: {STATE} names {foreign[0]!r}, which is no file of a checkpoint.")
    if (state["run"].get("best_step") is None) != (state["run"].get("best_val_loss") is None):
        raise InputError(f"{folder} is damaged: {STATE} says best_step without best_val_loss, or the other way round.")
    if sizes["hidden"] % sizes["n_heads"] or len(genes) not in (0, sizes["n_genes"]):
        raise InputError(f"{folder} is damaged: the sizes in {STATE} do not fit each other.")
    return dict(state)


def summed_line(values: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl, which ends with the CRC-32C of all before it."""
    text = json.dumps(values, allow_nan=False)[:-1]
    return f'{text}, "crc32c": {google_crc32c.value(text.encode())}}}\n'


def checked_line(line: bytes, where: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that a kill cut short.

    Raises:
        InputError: it is not as it was written, or says what no line says; `where` it stands.
    """
    summed = _SUM.fullmatch(line)
    if summed is not None and google_crc32c.value(summed[1]) != int(summed[2]):
        raise InputError(f"{where}: it is damaged, not as it was written (its CRC-32C differs). Delete that line.")
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise InputError(f"{where}: its brackets are nested too deeply.") from error
    except ValueError as error:
        if line.endswith(b"\n"):
            raise InputError(f"{where}: it is damaged, no JSON ({one_line(error)}). Delete that line.") from error
        return None
    check_plain(found, record({"step": whole()}, {"limited_by": text("compute", "memory", "launches")}), where)
    if len(found) > MOST_NUMBERS or not all(map(_NAME.fullmatch, found)):
        raise InputError(f"{where}: it has names that no line of metrics has.")
    numbers = {name: value for name, value in found.items() if name != "limited_by"}
    check_plain(numbers, mapping_of(maybe(_figure)), where)
    return {name: value for name, value in found.items() if name != "crc32c"}
