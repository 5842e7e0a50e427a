"""What an `embed` command will do, decided before anything is written: the encoder, the width, the PCA's sample.

Shapes: B cells, D native width, E stored width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sest import __version__
from sest.cache import schema
from sest.cache.journal import root_attributes
from sest.cache.layout import GroupPlan
from sest.cache.reader import Group, read_projection
from sest.cache.storage import Storage, open_group
from sest.cells.inputs import Cells, perturbations_in
from sest.cells.labels import AS_IS, refuse_twins_between
from sest.cells.scale import differing_scales
from sest.cells.split_file import TRAIN, SplitFile
from sest.cells.splits import assign_splits
from sest.config import EmbedConfig, TrainConfig
from sest.encoder.align import hash_names, name_genes_as
from sest.encoder.base import CellEncoder
from sest.encoder.choose import FITTED, make_encoder
from sest.encoder.genes import TARGET_SUM
from sest.encoder.made import Made
from sest.encoder.pca import PCA
from sest.encoder.projection import Projection
from sest.errors import InputError

logger = logging.getLogger(__name__)

SAMPLE_CELLS = 16_384  # at most, for the PCA
FIDELITY_CELLS = 64  # on which an approximate encoder is compared with the exact one


@dataclass(frozen=True)
class EmbedPlan:
    """What an `embed` command does; `--dry-run` stops here."""

    cells: list[Cells]
    encoder: CellEncoder
    dim: int  # E
    projected: bool  # whether a PCA stands between the encoder and the cache
    sample: list[np.ndarray]  # per file: sorted rows of the PCA's sample
    selected: list[np.ndarray]  # per file: sorted rows to embed
    attributes: dict[str, Any]  # of the cache's root
    given: Projection | None = None  # that of another cache, which is not fitted again
    complete: bool = False  # whether the cache is

    @property
    def n_selected(self) -> int:
        return sum(map(len, self.selected))

    @property
    def n_bytes(self) -> int:
        """Bytes of embeddings plus uncompressed targets."""
        width = np.dtype(self.attributes["dtype"]).itemsize
        cells = sum(c.file.n_cells for c in self.cells)
        return cells * self.dim * width + sum(int(c.scan.indptr[-1]) * 6 for c in self.cells)


def plan_cache(cells: list[Cells], splits: SplitFile | None, config: EmbedConfig) -> EmbedPlan:
    """Load the encoder, decide the width and the sample; everything that can be refused is refused here."""
    _refuse_copies(cells, {})
    _compare_scales(cells, config)
    encoder = make_encoder(config, cells)
    selected = _selected(cells, config.cells)
    eligible = _eligible(cells, selected, splits, config.seed)
    n_sample = min(SAMPLE_CELLS, sum(map(len, eligible)))
    dim, projected = _width(config.dim, encoder, n_sample)
    sample = _draw(eligible, n_sample, config.seed) if projected else _no_sample(cells)
    if projected and splits is not None:
        what = "genes are chosen" if encoder.projection == "genes" else "PCA is fitted"
        logger.info(f"The {what} on training cells of {splits.path.name} only.")
    encoder.prepare(cells, sample, _number(config.dim), dim)
    dim = encoder.fitted.basis.shape[1] if encoder.fitted else dim
    if config.dim in (None, "native"):
        of = {"pca": f"PCA of {encoder.native_dim}", "genes": "the most variable genes"}[encoder.projection]
        logger.info(f"Stored width: {dim} ({of if projected else 'the native width'}).")
    sample_hash = hashlib.sha256(b"".join(rows.astype(np.int64).tobytes() for rows in sample)).hexdigest()
    attributes = {
        **_attributes(cells, encoder, config),
        "dim": dim,
        "projection": encoder.projection if projected else ("state" if config.dim == "state" else "none"),
        "projection_sample_sha256": sample_hash if projected else None,
    }
    return EmbedPlan(cells, encoder, dim, projected, sample, selected, attributes)


def plan_addition(
    cells: list[Cells],
    config: EmbedConfig,
    existing: dict[str, Any],
    storage: Storage,
) -> EmbedPlan:
    """As `plan_cache`, for files that join a cache: its width and its projection hold for them too.

    Args:
        existing: the cache's attributes.
    """
    made = made_of_cache(existing, storage)
    _refuse_copies(cells, existing["inputs"])
    if config.labels != AS_IS:
        joined = {c.group: c.perturbations for c in cells}
        refuse_twins_between(_perturbations_of([g for g in existing["groups"] if g not in joined], storage) | joined)
    return _planned(cells, config, made, existing["projection_sample_sha256"])


def _perturbations_of(groups: Sequence[str], storage: Storage) -> dict[str, list[str]]:
    """The names of the perturbations of groups of a cache; none where it is unfinished, which is refused later."""
    found = dict[str, list[str]]()
    for path in groups if schema.COMPLETE in storage.here() else ():
        about = root_attributes(storage, path) or {}
        found[path] = perturbations_in(Group(storage, path, about).read_labels(), about["columns"]["control"])
    return found


def plan_alike(cells: list[Cells], config: EmbedConfig, made: Made) -> EmbedPlan:
    """As `plan_cache`, for a new cache whose embeddings mean the same as others that were `made`.

    `config` is as `sest.encoder.made.alike` gives it. What the projection was fitted on is not known of a checkpoint,
    so the cache has the projection's own hash there.
    """
    _refuse_copies(cells, {})
    plan = _planned(cells, config, made, made.fitted.sha256 if made.fitted is not None else None)
    made.require(plan.encoder.sha256, config.encoder)
    return plan


def _planned(cells: list[Cells], config: EmbedConfig, made: Made, sample_sha256: str | None) -> EmbedPlan:
    _compare_scales(cells, config)
    if config.encoder in FITTED and made.fitted is not None:
        what = "PCA" if config.encoder == PCA else "embedding"
        names = name_genes_as(
            cells,
            made.genes,
            f"the {what} of {made.whose}",
            config.gene_col,
            advice=" Make a cache of all files together instead.",
            missing_genes=config.missing_genes,
        )
        of_config = dataclasses.replace(made, name=config.encoder)
        encoder: CellEncoder = of_config.fitted_encoder(names, config.missing_genes)
    else:
        encoder = make_encoder(config, cells)
    attributes = {
        **_attributes(cells, encoder, config),
        "dim": _number(config.dim) or made.dim,
        "projection": "state" if config.dim == "state" else made.projection,
        "projection_sample_sha256": sample_sha256,
    }
    if made.fitted is not None and encoder.projection == "pca":
        logger.info(f"The new cells are projected with the PCA of {made.whose}, which they had no part in.")
    selected = _selected(cells, config.cells)
    is_projected = made.fitted is not None
    return EmbedPlan(cells, encoder, made.dim, is_projected, _no_sample(cells), selected, attributes, given=made.fitted)


def made_of_cache(attributes: Mapping[str, Any], storage: Storage) -> Made:
    """How the embeddings of a cache were made.

    Raises:
        InputError: it was begun, and its projection is not fitted yet.
    """
    fitted, kept = None, dict[str, Any]()
    if attributes.get("projection") in FITTED:
        if f"{schema.PROJECTION}/{schema.ROOT}" not in storage.sizes():
            raise InputError(f"{storage} is unfinished. Run the command that began it before adding files.")
        group = open_group(storage, schema.PROJECTION)
        fitted, kept = stored_projection(storage), dict(group.attrs)
    return Made(
        whose=str(storage),
        name=attributes["encoder"],
        sha256=attributes["encoder_sha256"],
        native_dim=attributes["native_dim"],
        dim=attributes["dim"],
        dtype=attributes["dtype"],
        seed=attributes["seed"],
        max_tokens=attributes.get("max_tokens"),
        projection=attributes["projection"],
        fitted=fitted,
        genes=tuple(map(str, kept.get("genes", ()))),
        means=np.array(kept["means"]) if "means" in kept else None,
    )


def _refuse_copies(cells: list[Cells], there: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError where two files hold the same cells, which would count twice.

    Args:
        there: what each group of the cache that the files join says of its file, see `Cells.identity`.
    """
    groups = {c.group for c in cells}
    kept = [about for group, about in there.items() if group not in groups]
    often = Counter([*(c.scan.sha256 for c in cells), *(about["sha256"] for about in kept)])
    seen = {(about["sha256"], about["labels_sha256"]): f"{about['file']}, which the cache has" for about in kept}
    for c in cells:
        if often[c.scan.sha256] > 1:
            about = c.identity()
            same = seen.setdefault((about["sha256"], about["labels_sha256"]), str(c.source.path))
            if same != str(c.source.path):
                raise InputError(
                    f"{c.source.path} has the same cells as {same}: values, names and labels. Leave one of them out."
                )


def _compare_scales(cells: list[Cells], config: EmbedConfig) -> None:
    """Refuse, or with --mixed-scales say, files that were normalised differently.

    An SE encoder does not normalise counts, so that there is nothing to compare them with: training compares them, and
    it is only said.
    """
    logged = {c.source.path.name: c.normalisation for c in cells if c.normalisation is not None}
    counts = [c.source.path.name for c in cells if c.scale == "counts"]
    differing = differing_scales(logged, TARGET_SUM if config.encoder in FITTED else None, counts)
    if not differing and (later := differing_scales(logged, float(TrainConfig().target_sum), counts)):
        logger.warning(f"Training will not take these files together at its usual --target-sum: {later}.")
    if differing and config.mixed_scales == "allow":
        logger.warning(f"Files that were normalised differently are embedded together, as asked: {differing}.")
    elif differing:
        raise InputError(
            f"The files were normalised differently: {differing}. Give all of them as counts (often a --layer), or "
            "normalise them alike; --mixed-scales allow embeds them as they are."
        )


def _attributes(cells: list[Cells], encoder: CellEncoder, config: EmbedConfig) -> dict[str, Any]:
    """What the root of the cache says, but for the width."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "sest_version": __version__,
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        "gene_table_sha256": encoder.gene_table_sha256(),
        "native_dim": encoder.native_dim,
        "max_tokens": encoder.max_tokens,
        "dtype": config.dtype,
        "precision": encoder.precision,
        "cells": config.cells,
        "seed": config.seed,
        "groups": [c.group for c in cells],
        "inputs": {
            c.group: {
                **c.identity(),
                "genes_sha256": hash_names(encoder.gene_names(c)),
                **encoder.input_identity(c),
            }
            for c in cells
        },
        "licence": encoder.licence,
    }


def _selected(cells: list[Cells], which: str) -> list[np.ndarray]:
    """Per file, the sorted rows to embed: "all" or "controls"."""
    selected = [np.flatnonzero(c.is_control) if which == "controls" else np.arange(c.file.n_cells) for c in cells]
    if not sum(map(len, selected)):
        raise InputError("--cells controls, but no file has control cells. Pass --pert-col and --control.")
    return selected


def _no_sample(cells: list[Cells]) -> list[np.ndarray]:
    return [np.zeros(0, np.int64)] * len(cells)


def measure_fidelity(plan: EmbedPlan) -> dict[str, float] | None:
    """How close an approximate encoder comes to the exact one, on a few cells of the first file; said and recorded."""
    cells, rows = next((c, rows) for c, rows in zip(plan.cells, plan.selected, strict=True) if len(rows))
    numbers = rows[np.unique(np.linspace(0, len(rows) - 1, FIDELITY_CELLS).astype(np.int64))]
    found = plan.encoder.fidelity(cells, cells.read(numbers), numbers)
    if found is not None:
        logger.info(
            f"Approximate: cosine to the exact embedding on {found['n_cells']} cells: mean {found['cosine_mean']:.5f}, "
            f"lowest {found['cosine_min']:.5f}."
        )
    return found


def _number(dim: int | str | None) -> int | None:
    """The width that --dim gives as a number; None for a word, or nothing."""
    return dim if isinstance(dim, int) else None


def _width(asked: int | str | None, encoder: CellEncoder, n_sample: int) -> tuple[int, bool]:
    """The stored width and whether a PCA makes it."""
    native = encoder.native_dim
    if asked == "state":
        if encoder.n_extra == 0:
            raise InputError(f"--dim state is what an SE encoder gives; '{encoder.name}' has no dataset columns.")
        return native + encoder.n_extra, False
    number = _number(asked)
    dim = number or (native if asked == "native" else min(encoder.default_dim, native))
    if number is None and encoder.always_projected:
        return dim, True  # or its rank, where that is smaller
    if dim > native:
        raise InputError(f"--dim {dim} is above the native width {native} of '{encoder.name}'. Use {native} or less.")
    projected = dim < native or encoder.always_projected
    if projected and encoder.projection == "pca" and dim > n_sample - 1:
        raise InputError(
            f"A PCA to {dim} dimensions needs more than {dim} cells; there are {n_sample}. "
            f"Pass --dim native, or --dim {max(1, n_sample - 1)} or less."
        )
    return dim, projected


def _eligible(cells: list[Cells], selected: list[np.ndarray], splits: SplitFile | None, seed: int) -> list[np.ndarray]:
    """Rows the PCA may be fitted on: training cells only, where splits are given."""
    if splits is None:
        return selected
    for c in cells:
        if c.columns.perturbation is None:
            raise InputError(
                f"{c.file.path} has no perturbation column, which the splits of {splits.path} need. "
                "Pass --pert-col, or give the files instead of the .toml."
            )
    masks = assign_splits([c.as_group() for c in cells], splits, seed=seed).masks
    return [rows[(masks[c.group][rows] & TRAIN) > 0] for c, rows in zip(cells, selected, strict=True)]


def _draw(eligible: list[np.ndarray], n_sample: int, seed: int) -> list[np.ndarray]:
    """A seeded sample over all files: per file, sorted rows."""
    ends = np.cumsum([0, *map(len, eligible)])
    chosen = np.sort(np.random.default_rng([seed, 0x5A3B1E]).choice(ends[-1], n_sample, replace=False))
    return [
        rows[chosen[np.searchsorted(chosen, a) : np.searchsorted(chosen, b)] - a]
        for rows, a, b in zip(eligible, ends, ends[1:], strict=False)
    ]


def embedding_codec(which: str, existing: Mapping[str, Any] | None) -> dict[str, str]:
    """The root attribute of how embeddings are compressed; empty: not at all.

    Most rows of a cache of controls alone are NaN, in nearly every chunk, and pack to nothing. A cache that was begun
    stays as it was: its shards may be written again beside others, and those by an earlier sest are not compressed.

    Args:
        which: "all" or "controls".
        existing: the attributes of the cache that is there.
    """
    codec = (schema.ZSTD if which == "controls" else None) if existing is None else existing.get(schema.PACKED)
    return {schema.PACKED: codec} if codec else {}


def group_plan(plan: EmbedPlan, c: Cells, selected: np.ndarray) -> GroupPlan:
    """What the group of one file will hold, of which the rows `selected` are embedded."""
    attributes = {
        **c.identity(),
        "dataset": c.source.dataset,
        "n_cells": c.file.n_cells,
        "n_genes": c.file.n_genes,
        "n_embedded": len(selected),
        "perturbations": len(set(c.obs["perturbation"].cat.categories) - {c.columns.control})
        if "perturbation" in c.obs
        else 0,
        "controls": int(c.is_control.sum()),
    }
    return GroupPlan(
        path=c.group,
        indptr=c.scan.indptr if plan.attributes["targets"] else np.zeros_like(c.scan.indptr),
        n_genes=c.file.n_genes,
        target_dtype=_target_dtype(c),
        dim=plan.dim,
        embedding_dtype=plan.attributes["dtype"],
        attributes=attributes,
        packed=schema.PACKED in plan.attributes,
    )


def _target_dtype(cells: Cells) -> str:
    """The smallest type that holds a file's values exactly: integers for counts."""
    if cells.scale == "counts" and cells.scan.all_integer:
        for dtype in ("int16", "int32"):
            if cells.scan.max_value <= np.iinfo(dtype).max:
                return dtype
    return "float32"


def stored_projection(storage: Storage) -> Projection:
    """The projection of a cache, which all its shards share."""
    return Projection(**read_projection(storage))
