"""Control cells that predictions start from: those of the run's cache, or new ones embedded as the run's were.

Shapes: n control cells of one cell type, E embedding width, G genes of the run. Space: log1p, as the run's targets.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from sest import progress
from sest.cells.columns import CONTEXT, detect_columns, labels, perturbations, usual_columns
from sest.cells.genes import all_names
from sest.cells.inputs import Cells, open_cells, resolve_inputs
from sest.cells.scale import Normalisation, cut_log1p, factors_to, log1p_rows, total_counts, totals_of
from sest.config import VCC2026, EmbedConfig, PredictConfig
from sest.data.dataset import Dataset
from sest.data.gather import gene_moments
from sest.data.resident import place_of
from sest.encoder.align import name_genes_as
from sest.encoder.base import CellEncoder
from sest.encoder.choose import FITTED, make_encoder, needs_weights, obsm_key
from sest.encoder.made import Made
from sest.encoder.obsm import ObsmEncoder
from sest.encoder.pca import PCA
from sest.encoder.projection import Projection
from sest.errors import InputError, nearest, shown
from sest.evaluation.means import context_name
from sest.files.cell_file import CellFile
from sest.files.remote import located
from sest.runs.checkpoint import Checkpoint
from sest.runs.known import CELLS, Known, mean_of_controls
from sest.se.hub import with_local_encoder

logger = logging.getLogger(__name__)

DONORS = 256  # cells
UNKNOWN = "unknown"  # the cell type of cells whose file names none


@dataclass(frozen=True, eq=False)
class Pool:
    """Control cells of one cell type."""

    cell_type: str
    embeddings: np.ndarray  # (n, E) as stored
    expression: scipy.sparse.csr_matrix  # (n, G) log1p within [0, 14]
    names: np.ndarray  # (n,) str, of the cells in their file
    batches: np.ndarray  # (n,) str
    files: np.ndarray  # (n,) int, which file each is of: a set never mixes files
    context: str = ""  # what baselines call the context of most of them (`context_name`); "" for new cells
    extra: scipy.sparse.csr_matrix | None = None  # (n, genes) log1p of genes that the run does not have
    measured: np.ndarray | None = None  # (G,) bool: the genes that all of its files have; None: all of them
    totals: np.ndarray | None = None  # (n,) counts of each cell over all genes of its file; None: not counts

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance over the cells, both (G,) float64."""
        return gene_moments(self.expression)

    def __len__(self) -> int:
        return len(self.names)

    def whole(self, rows: np.ndarray, values: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """Values (n, G) of cells that start from the cells `rows`, and beside them these cells' own extra genes."""
        return values if self.extra is None else scipy.sparse.hstack([values, self.extra[rows]], format="csr")

    @cached_property
    def donors(self) -> np.ndarray:
        """(n, G) some of the cells, for values of genes that none of the cells to move has."""
        return np.asarray(self.expression[:DONORS].toarray())


def pool_of(pools: Mapping[str, Pool], cell_type: str | None) -> Pool:
    """The controls of a cell type; without one, of the only cell type there is.

    Raises:
        InputError: no controls of that cell type, or of several and none is named.
    """
    if cell_type is None and len(pools) > 1:
        raise InputError(f"There are controls of several cell types: {shown(pools)}. Pass --cell-type.")
    name = cell_type if cell_type is not None else next(iter(pools))
    if name not in pools:
        raise InputError(f"No control cells of cell type '{name}'. There are: {shown(pools)}.{nearest(name, pools)}")
    return pools[name]


def cached_pool(data: Dataset, rows: np.ndarray, cell_type: str) -> Pool:
    """Control cells of the cache, by row number (n,), ascending."""
    files = np.searchsorted(data.labels.first, rows, side="right") - 1
    parts = [([*data.cache.groups.values()][i], rows[files == i] - data.labels.first[i]) for i in np.unique(files)]
    counted = all(group.attributes["scale"] == "counts" for group, _ in parts)
    return Pool(
        cell_type,
        data.embeddings[place_of(data.control_rows, rows)],
        cut_log1p(data.targets.log1p(rows)),
        np.concatenate([group.names(mine) for group, mine in parts]),
        np.concatenate([group.read_labels()["batch"].iloc[mine].astype(str).to_numpy(str) for group, mine in parts]),
        files,
        context_name(data, int(np.bincount(data.labels.context[rows]).argmax())),
        measured=None if data.targets.measured is None else np.all(data.targets.measured[np.unique(files)], axis=0),
        totals=totals_of(data.targets.target_sum, data.targets.factor[rows]) if counted else None,
    )


class CachedPools(Mapping[str, Pool]):
    """All control cells of the cache by cell type; those of a cell type are read when they are asked for."""

    def __init__(self, data: Dataset) -> None:
        self._data, self._made, labels = data, dict[str, Pool](), data.labels
        kinds = np.array([cell_type for _, cell_type in labels.contexts])
        codes = {name: np.flatnonzero(kinds == name) for name in np.unique(kinds).tolist()}
        rows = {name: np.flatnonzero(labels.is_control & np.isin(labels.context, of)) for name, of in codes.items()}
        self._rows = {name: of for name, of in rows.items() if len(of)}

    def __getitem__(self, name: str) -> Pool:
        if name not in self._made:
            self._made[name] = cached_pool(self._data, self._rows[name], name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def planned_pools(config: PredictConfig, checkpoint: Checkpoint) -> dict[str, Pool] | None:
    """The pools that `new_pools` will give, without values: what they are asked for is checked before the embedding.

    None without --controls.

    Raises:
        InputError: options of --controls without it; no such file, no controls in it, or an encoder that is not known.
    """
    if not config.controls:
        if config.template is None and (config.pert_col, config.cell_type_col, config.control) != (None, None, None):
            raise InputError(
                "--pert-col, --cell-type-col and --control are of --template or --controls. Pass one of these."
            )
        if config.all_controls:
            raise InputError("--all-controls says that all cells of --controls are unperturbed. Pass --controls too.")
        if config.missing_genes != "error":
            raise InputError("--missing-genes is for genes that new cells lack. Pass --controls too.")
        return None
    _check_encoder(config, checkpoint)
    path = located(str(config.controls))
    with CellFile(path, config.layer, config.modality) as file:
        columns = detect_columns(file.obs, **_columns(file, checkpoint, config), genes=all_names(file.var))
        if columns.perturbation is None and not config.all_controls:
            raise InputError(
                f"{path} has no perturbation column, so which of its cells are controls is not known. Columns of obs: "
                f"{shown(file.obs.columns, 30)}. Pass --all-controls if all are, or --pert-col and --control, or add a "
                f"column {checkpoint.state['columns']['perturbation']!r} with the label of controls."
            )
        if columns.perturbation is not None and config.all_controls:
            raise InputError(
                f"{path} has perturbations in column {columns.perturbation!r} of obs, so not all of its cells are "
                f"controls. Leave --all-controls out: the control is {columns.control!r}."
            )
        mine = np.arange(file.n_cells)
        if columns.perturbation is not None:
            codes, names = perturbations(file.obs, columns)
            mine = np.flatnonzero(codes == names.index(str(columns.control)))
        cell_types = np.full(len(mine), UNKNOWN)
        if columns.cell_type is not None:
            codes, names = labels(file.obs, columns.cell_type)
            cell_types = np.array(names, str)[codes[mine]]
    nothing = np.zeros((0, 0), np.float32)
    return {
        name: Pool(name, nothing, scipy.sparse.csr_matrix(nothing), np.full(n, ""), np.full(n, ""), np.zeros(n, int))
        for name, n in zip(*map(np.ndarray.tolist, np.unique(cell_types, return_counts=True)), strict=True)
    }


def _check_encoder(config: PredictConfig, checkpoint: Checkpoint) -> None:
    """Refuse new controls where nothing can embed them as the run's were."""
    made = checkpoint.state["encoder"]
    if made["sha256"] is None:
        raise InputError(
            f"{checkpoint.folder} does not say which encoder it was trained with. "
            "Embed the cells with `sest embed` and pass the cache with --cache."
        )
    if needs_weights(made["name"]) and config.encoder is None:
        raise InputError(
            f"The run was made with the encoder {made['name']}. Pass --encoder with its folder, or its name "
            "on the Hugging Face hub."
        )


def made_of(checkpoint: Checkpoint) -> Made:
    """How the embeddings were made that the checkpoint was trained on.

    Raises:
        InputError: it does not say: it was imported, or is of an earlier sest.
    """
    state, made = checkpoint.state, checkpoint.state["encoder"]
    if made["sha256"] is None or "projection" not in made:
        raise InputError(f"{checkpoint.folder} does not say how the cells that it was trained on were embedded.")
    tensors = checkpoint.projection()
    return Made(
        whose=str(checkpoint.folder),
        name=made["name"],
        sha256=made["sha256"],
        native_dim=made["native_dim"],
        dim=checkpoint.sizes.dim,
        dtype=state.get(CELLS, {}).get("dtype", EmbedConfig().dtype),
        seed=made["seed"],
        max_tokens=made.get("max_tokens"),
        projection=made["projection"],
        fitted=Projection(**{name: t.numpy() for name, t in tensors.items()}) if tensors else None,
        genes=tuple(made["genes"] or ()),
        means=np.array(made["gene_means"]) if "gene_means" in made else None,
    )


def _columns(file: CellFile, checkpoint: Checkpoint, config: PredictConfig) -> dict[str, Any]:
    """How the obs of new controls is to be read (see `usual_columns`)."""
    is_submission = config.format == VCC2026
    return usual_columns(
        file.obs,
        checkpoint.state["columns"],
        pert_col=config.pert_col,
        cell_type_col=config.cell_type_col or (CONTEXT[0] if is_submission and CONTEXT[0] in file.obs else None),
        control=config.control,
    )


def new_pools(
    config: PredictConfig, checkpoint: Checkpoint, known: Known, extra: Sequence[str] = ()
) -> dict[str, Pool]:
    """Embed the control cells of `config.controls` with the run's encoder and projection, by cell type.

    `extra` are genes to keep values of that the run does not have.

    Raises:
        InputError: no such file or no controls in it, another encoder than the run's, genes of the run that the file
            lacks, or values of another kind (counts, log1p) than the run was trained on.
    """
    _check_encoder(config, checkpoint)
    state, made, path = checkpoint.state, made_of(checkpoint), located(str(config.controls))
    with CellFile(path, config.layer, config.modality) as file:
        columns = _columns(file, checkpoint, config)
        columns["labels"] = columns.pop("rule")
    embed_config = EmbedConfig(
        encoder=str(config.encoder) if needs_weights(made.name) else made.name,
        layer=config.layer,
        modality=config.modality,
        device=config.device,
        max_tokens=made.max_tokens,
        seed=made.seed,
        gene_col=config.gene_col,
        missing_genes=config.missing_genes,
        **columns,
    )
    embed_config = with_local_encoder(embed_config)
    with ExitStack() as stack:
        cells = open_cells(resolve_inputs([path])[0], embed_config, stack)[0]
        is_control = np.ones(cells.file.n_cells, bool) if config.all_controls else cells.is_control
        if not is_control.any():
            raise InputError(f"{path} has no control cells. Pass --pert-col and --control.")
        if state["scale"] not in (None, "mixed", cells.scale):
            raise InputError(
                f"{path} holds {cells.scale}; the run was trained on {state['scale']}. Choose with --layer."
            )
        if config.format == VCC2026 and cells.scale != "counts":
            raise InputError(f"{path} holds {cells.scale}; --format {VCC2026} needs counts. Choose with --layer.")
        _compare_scales(cells, known.normalisation, config.mixed_scales)
        encoder = _encoder(cells, embed_config, made, known.genes)
        names = encoder.gene_names(cells)
        if config.missing_genes == "error":
            _need_genes(path, names, known.genes, "the run")
        _need_genes(path, names, extra, "--genes that are not the run's")
        fill = None if config.missing_genes == "error" else np.zeros(len(known.genes), np.float32)
        if config.missing_genes == "mean":
            fill = mean_of_controls(checkpoint, known)
        return _embed(cells, np.flatnonzero(is_control), encoder, made.fitted, names, fill, known, extra)


def _compare_scales(cells: Cells, own: Normalisation, mixed_scales: str) -> None:
    """Refuse, or with --mixed-scales say, log1p controls that were normalised otherwise than the run's cells."""
    if cells.normalisation is None or not cells.normalisation.differs_from(own):
        return
    text = f"{cells.source.path.name} is {cells.normalisation}, but the run was trained on {own}"
    if mixed_scales != "allow":
        raise InputError(
            f"{text}. Give the cells as they were trained on (often a --layer), or normalise them so; --mixed-scales "
            "allow takes them as they are."
        )
    logger.warning(f"{text}; they are taken as they are, as asked.")


def _encoder(cells: Cells, config: EmbedConfig, made: Made, genes: Sequence[str]) -> CellEncoder:
    """The encoder that the run's embeddings were `made` with, ready for these cells.

    `genes` of the run are found in the file by name; those of its PCA are among them, or are more.
    """
    if made.name in FITTED:
        known = list(dict.fromkeys((*made.genes, *genes)))
        whose = "the run's PCA" if made.name == PCA and len(known) == len(made.genes) else "the run"
        names = name_genes_as([cells], known, whose, config.gene_col, missing_genes=config.missing_genes)
        return made.fitted_encoder(names, config.missing_genes)
    if key := obsm_key(made.name):
        names = name_genes_as([cells], genes, "the run", config.gene_col, missing_genes=config.missing_genes)
        encoder: CellEncoder = ObsmEncoder(key, [cells], names)
        if encoder.native_dim != made.native_dim:
            raise InputError(
                f"obsm {key!r} of {cells.file.path} is {encoder.native_dim} wide; the run's cells have "
                f"{made.native_dim}. Embed the new cells with the model that made theirs."
            )
        logger.info("That the model of the run's cells made these embeddings cannot be checked.")
        return encoder
    encoder = make_encoder(config, [cells])
    made.require(encoder.sha256, config.encoder)
    return encoder


def _need_genes(path: Path, names: Sequence[str], genes: Sequence[str], whose: str) -> None:
    there = set(names)
    missing = [name for name in genes if name not in there]
    if missing:
        raise InputError(f"{path} lacks {len(missing)} of the {len(genes)} genes of {whose}: {shown(missing)}.")


def _embed(
    cells: Cells,
    rows: np.ndarray,
    encoder: CellEncoder,
    projection: Projection | None,
    names: Sequence[str],
    fill: np.ndarray | None,
    known: Known,
    extra: Sequence[str],
) -> dict[str, Pool]:
    """Embeddings and log1p values of a file's controls `rows`; `names` are its genes as the encoder names them.

    `fill` (G,) has the values of genes that the file lacks; `extra` are genes of the file beside the run's.
    """
    size = encoder.batch_size(0)
    place = {name: i for i, name in enumerate(names)}
    columns = np.array([place.get(name, -1) for name in known.genes])
    more = np.array([place[name] for name in extra], int)
    embeddings, expression, others, totals = [], [], [], []
    progress.begin("Embedding controls", len(rows), "cells")
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        block = cells.read(part)
        begun = encoder.start(cells, encoder.stage(cells, block, part))  # a GPU encodes while this goes on
        factor = np.zeros(len(part), np.float32)
        if cells.scale == "counts":  # totals over all genes of the file, as in a cache
            totals.append(total_counts(block))
            factor = factors_to(known.target_sum, totals[-1]).astype(np.float32)
        expression.append(_filled(log1p_rows(block[:, columns[columns >= 0]], factor), columns, fill))
        others.append(log1p_rows(block[:, more], factor))
        encoded = begun()
        if projection is not None:
            encoded = projection.apply(encoded[:, : encoder.native_dim])
        embeddings.append(encoded[:, : known.dim].astype(known.dtype))
        progress.advance(len(part))
    embedded, values = np.concatenate(embeddings), cut_log1p(scipy.sparse.vstack(expression, format="csr"))
    beside, counted = cut_log1p(scipy.sparse.vstack(others, format="csr")), np.concatenate(totals) if totals else None
    obs = cells.obs.iloc[rows]
    batches, cell_types = (obs[name].astype(str).to_numpy(str) for name in ("batch", "cell_type"))
    pools = {}
    for name in np.unique(cell_types).tolist():
        mine = np.flatnonzero(cell_types == name)
        pools[name] = Pool(
            cell_type=name,
            embeddings=embedded[mine],
            expression=values[mine],
            names=obs.index[mine].to_numpy(str),
            batches=batches[mine],
            files=np.zeros(len(mine), np.int64),
            extra=beside[mine] if extra else None,
            totals=None if counted is None else counted[mine],
        )
    return pools


def _filled(rows: scipy.sparse.csr_matrix, columns: np.ndarray, fill: np.ndarray | None) -> scipy.sparse.csr_matrix:
    """(n, genes the file has) -> (n, G) CSR; `columns` (G,) is -1 where the file has no such gene."""
    if fill is None or (columns >= 0).all():
        return rows
    whole = np.tile(np.where(columns < 0, fill, 0), (rows.shape[0], 1)).astype(np.float32)
    whole[:, columns >= 0] = rows.toarray()
    return scipy.sparse.csr_matrix(whole)
