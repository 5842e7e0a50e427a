"""A submission to the Virtual Cell Challenge 2026: whole counts of all contexts, without control cells.

What `vcc prep` (vcc-cli 0.3.0) accepts unchanged: obs `target_gene` and `context`, CSR float32, genes in the asked
order. Beside it, where asked for: the package that `vcc prep` would make of it, which `vcc submit` uploads, and copies
of one context with its control cells, as `cell-eval2 run --preset vcc2026` takes them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sest import __version__, progress
from sest.cache.disk import file_aside
from sest.config import VCC2025, VCC2026, PredictConfig
from sest.errors import InputError, shown
from sest.files.write_h5ad import H5adWriter
from sest.prediction.controls import UNKNOWN
from sest.prediction.counts import Effect, count_blocks, counted
from sest.prediction.effects import check_table
from sest.prediction.record import COUNTS_RECORD, join_tables
from sest.prediction.requests import CONTEXT, CONTROL, TARGET_GENE, Request, asked_of

logger = logging.getLogger(__name__)

MOST_CELLS, MOST_STORED = 400_000, 4_750_000_000  # cells, and values that are not zero, of vcc-cli 0.3.0
MOST_A_CELL = 1_000_000  # counts
MOST_CELLS_2025 = 200_000  # with controls
CELLS_EACH = 400  # of a perturbation in a context
CELLS, META, SCHEMA = "pred.h5ad.zst", "meta.json", 1  # in a package
LEVEL, AT_ONCE = 3, 2**24  # of Zstandard, as `vcc prep` has it; bytes that are compressed at once


def refuse_options(config: PredictConfig) -> None:
    """Refuse options that make no submission, before anything is read.

    Raises:
        InputError: what a format needs is not there, or does not go with it.
    """
    if config.format != VCC2026 and config.with_controls is not None:
        raise InputError(f"--with-controls goes with --format {VCC2026}; other predictions have their controls.")
    if config.vcc is not None:
        _refuse_package(config)
    if config.format in (VCC2026, "counts") and config.target_sum is not None:
        raise InputError(f"--target-sum is of log1p values; --format {config.format} writes counts. Leave it out.")
    if config.format in (VCC2025, VCC2026) and config.template is not None:
        raise InputError(f"--format {config.format} has its own labels. Say what to predict with --list or --only.")
    if config.effects is not None:
        check_table(Path(config.effects))
    if config.format != VCC2026:
        return
    if config.effects is not None:
        raise InputError(f"--effects compares with controls, which --format {VCC2026} leaves out. Write it of another.")
    if config.controls is None:
        raise InputError(f"--format {VCC2026} predicts from the challenge's control cells. Pass them with --controls.")


def _refuse_package(config: PredictConfig) -> None:
    """Refuse what makes no package: nobody checks it any more before it is uploaded."""
    if Path(str(config.vcc)).suffix != ".vcc":
        raise InputError(f"--vcc {config.vcc} does not end in .vcc. Give a name that does.")
    if config.format != VCC2026 or config.genes is None or config.list is None:
        raise InputError(
            f"--vcc packs what the challenge asks for: pass --format {VCC2026}, --genes gene_names.csv and --list "
            "pert_counts.csv with it."
        )
    if importlib.util.find_spec("zstandard") is None:
        raise InputError("--vcc compresses with zstandard, which is not installed: pip install 'sest[challenge]'.")


def copies_of(requests: Sequence[Request], config: PredictConfig) -> dict[str, Path]:
    """The files to write beside the submission, by context; what the challenge would refuse is refused here.

    Nothing is embedded yet.

    Raises:
        InputError: no contexts, a control among the perturbations, or more cells than a submission may have.
    """
    contexts = sorted({request.pool.cell_type for request in requests})
    if contexts == [UNKNOWN]:
        raise InputError(
            f"--controls has no column {CONTEXT!r} of obs, which names the contexts. Pass --cell-type-col."
        )
    if config.with_controls is not None and (
        bad := [name for name in contexts if Path(name).name != name or name.startswith(".")]
    ):
        raise InputError(f"--with-controls writes a file of each context's name, which these cannot be: {shown(bad)}.")
    asked = asked_of(requests)
    if CONTROL in {request.perturbation for request in asked}:
        raise InputError(f"{CONTROL!r} is the control, and no control cell may be submitted. Take it out of the list.")
    if (n := sum(request.n_cells for request in asked)) > MOST_CELLS:
        raise InputError(f"{n:,} cells are asked for; a submission has at most {MOST_CELLS:,}. Lower --n-cells.")
    return {name: Path(config.with_controls) / f"{name}.h5ad" for name in contexts} if config.with_controls else {}


def refuse_too_many(requests: Sequence[Request], config: PredictConfig) -> None:
    """Refuse more cells than a submission of 2025 may have.

    Raises:
        InputError: there are.
    """
    n = sum(request.n_cells for request in requests)
    if config.format == VCC2025 and n > MOST_CELLS_2025:
        raise InputError(
            f"{n:,} cells with controls; a submission of 2025 has at most {MOST_CELLS_2025:,}. Lower --n-cells."
        )


def all_controls(request: Request) -> list[tuple[np.ndarray, None]]:
    """A request of control cells as a block of `Effect`: all of the pool, as they are."""
    return [(np.arange(len(request.pool)), None)]


def write_submission(
    out: Path,
    copies: Mapping[str, Path],
    package: Path | None,
    requests: Sequence[Request],
    effects: Iterable[Effect],
    genes: Sequence[str],
    places: np.ndarray | None,
    record: dict[str, Any],
    target_sum: float,
    seed: int,
) -> None:
    """Write the submission, and the copies with controls.

    Args:
        out: the .h5ad to write.
        copies: see `copies_of`.
        package: the .vcc to write too.
        requests: all that is written; those of controls too where there are copies.
        effects: of these, in blocks.
        genes: of the output (G,).
        places: where they stand among the pools' (None: all, in order).
        record: provenance.
        target_sum: counts a cell that the values are normalised to.
        seed: of the counts.

    Raises:
        InputError: more counts a cell or stored values than a submission may have; nothing is written then.
    """
    var, n_stored, contexts = pd.DataFrame(index=pd.Index(genes, dtype=str)), 0, counted(requests, places, target_sum)
    _refuse_deep(max(controls.most for controls in contexts.values()))
    about = sum(r.n_cells * contexts[id(r.pool)].stored_a_cell for r in asked_of(requests))
    if about > 1.1 * MOST_STORED:  # else it is counted while it is written
        raise _too_many_stored()
    for path in copies.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as scratch:
        bare = None  # what is in the package: the same cells, and no word of where they come from
        if package is not None:
            folder = scratch.enter_context(tempfile.TemporaryDirectory(prefix=".vcc-", dir=package.parent))
            bare = Path(folder) / CELLS.removesuffix(".zst")
        with ExitStack() as stack:
            files = {name: stack.enter_context(H5adWriter(p, len(genes), "float32")) for name, p in copies.items()}
            whole = [stack.enter_context(H5adWriter(out, len(genes), "float32"))]
            if bare is not None:  # not compressed in itself, as `vcc prep` has it
                whole.append(stack.enter_context(H5adWriter(bare, len(genes), "float32", compress=False)))
            tables: dict[H5adWriter, list[pd.DataFrame]] = {file: [] for file in (*whole, *files.values())}
            for request, rows, counts in count_blocks(effects, contexts, seed):
                _refuse_deep(counts.sum(1).max())
                n_stored += 0 if request.is_control else counts.nnz
                if n_stored > MOST_STORED:
                    raise _too_many_stored()
                beside = [files[request.pool.cell_type]] if files else []
                for file in beside if request.is_control else (*whole, *beside):
                    file.add(counts)
                    tables[file].append(_obs(request, rows))
            for file, parts in tables.items():
                file.finish(join_tables(parts), var, {} if file in whole[1:] else {COUNTS_RECORD: record})
        if package is not None and bare is not None:
            _pack(bare, package, _meta(asked_of(requests), n_stored, len(genes)))


def _meta(asked: Sequence[Request], n_stored: int, n_genes: int) -> dict[str, Any]:
    """What a package says of its cells, by which the challenge knows for which contexts it is and how large.

    Source: vcc-cli 0.3.0, vccfile.py and panel.py. The perturbations are told by the hash of their sorted names.
    """
    if sizes := {request.n_cells for request in asked} - {CELLS_EACH}:
        logger.warning(
            f"The challenge takes {CELLS_EACH} cells of each perturbation in a context, unless its list says "
            f"otherwise; here some have {shown(map(str, sorted(sizes)))}."
        )
    names = sorted({request.perturbation for request in asked})
    return {
        "schema": SCHEMA,
        "nnz": n_stored,
        "n_obs": sum(request.n_cells for request in asked),
        "n_vars": n_genes,
        "contexts": sorted({request.pool.cell_type for request in asked}),
        "perts_fingerprint": "sha256:" + hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "made_by": f"sest {__version__}",
    }


def _pack(cells: Path, package: Path, meta: dict[str, Any]) -> None:
    """Write `package`: a tar of `meta` and the compressed file of cells, which say nothing of this machine."""
    import zstandard

    compressed, told = cells.with_name(CELLS), cells.with_name(META)
    told.write_text(json.dumps(meta, sort_keys=True), encoding="utf-8")
    progress.begin(f"Packing {package.name}", cells.stat().st_size >> 20, "MB")
    compressor = zstandard.ZstdCompressor(level=LEVEL, threads=torch.get_num_threads())
    with open(cells, "rb") as source, compressor.stream_writer(open(compressed, "wb")) as writer:  # closes the file
        while block := source.read(AT_ONCE):
            writer.write(block)
            progress.advance(len(block) >> 20)
    cells.unlink()  # before the next copy takes room
    with file_aside(package) as aside, tarfile.open(aside, "w") as tar:
        for member in (told, compressed):
            tar.add(member, member.name, filter=_anonymous)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def _too_many_stored() -> InputError:
    return InputError(
        f"The cells have more than {MOST_STORED:,} values that are not zero, which a submission may not have. Predict "
        "fewer cells (--n-cells)."
    )


def _refuse_deep(counts: float) -> None:
    if counts > MOST_A_CELL:
        raise InputError(
            f"A cell has {counts:,.0f} counts; a submission may have {MOST_A_CELL:,} a cell. Leave so deep control "
            "cells out of --controls."
        )


def _obs(request: Request, rows: np.ndarray) -> pd.DataFrame:
    """Labels of a block's cells; `join_tables` makes their names unlike."""
    name = CONTROL if request.is_control else request.perturbation
    context = request.pool.cell_type
    index = pd.Index([f"{context}_{name}"] * len(rows), dtype=str)
    return pd.DataFrame({TARGET_GENE: name, CONTEXT: context}, index=index)
