"""A submission to the Virtual Cell Challenge 2026: whole counts of all contexts, without control cells.

What `vcc prep` (vcc-cli 0.3.0) accepts unchanged: obs `target_gene` and `context`, CSR float32, genes in the asked
order. `cell-eval2 run --preset vcc2026` wants one context and its control cells; copies for it are made beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from sest.config import VCC2026, PredictConfig
from sest.errors import InputError, shown
from sest.files.write_h5ad import H5adWriter
from sest.prediction.cells import ROWS_AT_ONCE
from sest.prediction.controls import UNKNOWN, Pool
from sest.prediction.counts import changed_counts, counts_of, fold_changes
from sest.prediction.draws import COUNTS, random_of
from sest.prediction.requests import Request, asked_of, join_tables

TARGET_GENE, CONTEXT, CONTROL = "target_gene", "context", "non-targeting"  # as the challenge calls them
MOST_CELLS, MOST_STORED = 400_000, 4_750_000_000  # cells, and values that are not zero, of vcc-cli 0.3.0
MOST_A_CELL = 1_000_000  # counts

# of what, from which control cells (n,), and how far the run's genes move (G,); None: these control cells themselves
Effect = tuple[Request, np.ndarray, np.ndarray | None]


def refuse_options(config: PredictConfig) -> None:
    """Refuse options that make no submission, before anything is read.

    Raises:
        InputError: no --controls, or a --template; of other predictions, --with-controls.
    """
    if config.format != VCC2026:
        if config.with_controls is not None:
            raise InputError(f"--with-controls goes with --format {VCC2026}; other predictions have their controls.")
        return
    if config.controls is None:
        raise InputError(f"--format {VCC2026} predicts from the challenge's control cells. Pass them with --controls.")
    if config.template is not None:
        raise InputError(f"--format {VCC2026} has its own labels. Say what to predict with --list or --only.")


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


def all_controls(request: Request) -> list[tuple[np.ndarray, None]]:
    """A request of control cells as a block of `Effect`: all of the pool, as they are."""
    return [(np.arange(len(request.pool)), None)]


def write_submission(
    out: Path,
    copies: Mapping[str, Path],
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
    var, n_stored, current, rng = pd.DataFrame(index=pd.Index(genes, dtype=str)), 0, None, np.random.default_rng(seed)
    pools = {id(request.pool): request.pool for request in requests}
    contexts = {key: _Controls(pool, places, target_sum) for key, pool in pools.items()}
    about = sum(r.n_cells * contexts[id(r.pool)].stored_a_cell for r in asked_of(requests))
    if about > 1.1 * MOST_STORED:  # else it is counted while it is written
        raise _too_many_stored()
    for path in copies.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = {name: stack.enter_context(H5adWriter(p, len(genes), "float32")) for name, p in copies.items()}
        submission = stack.enter_context(H5adWriter(out, len(genes), "float32"))
        tables: dict[H5adWriter, list[pd.DataFrame]] = {file: [] for file in (submission, *files.values())}
        for request, rows, effect in effects:
            if request is not current:
                current, rng = request, random_of(request, seed, COUNTS)
            controls = contexts[id(request.pool)]
            counts = controls.counts(rows) if effect is None else controls.changed(rows, effect, rng)
            n_stored += 0 if effect is None else counts.nnz
            if n_stored > MOST_STORED:
                raise _too_many_stored()
            beside = [files[request.pool.cell_type]] if files else []
            for file in beside if effect is None else (submission, *beside):
                file.add(counts)
                tables[file].append(_obs(request, rows))
        for file, parts in tables.items():
            file.finish(join_tables(parts), var, {"sest_submission": record})


def _too_many_stored() -> InputError:
    return InputError(
        f"The cells have more than {MOST_STORED:,} values that are not zero, which a submission may not have. Predict "
        "fewer cells (--n-cells)."
    )


def _too_deep(counts: float) -> InputError:
    return InputError(
        f"A cell has {counts:,.0f} counts; a submission may have {MOST_A_CELL:,} a cell. Leave so deep control cells "
        "out of --controls."
    )


class _Controls:
    """Control cells of a context as counts of the output's genes (G,).

    Raises:
        InputError: a cell has more counts than a submission may have.
    """

    def __init__(self, pool: Pool, places: np.ndarray | None, target_sum: float) -> None:
        assert pool.totals is not None  # `new_pools` refuses controls without counts
        self._pool, self._places, self._factor = pool, places, target_sum / pool.totals
        self._typical = float(np.median(self._factor))
        parts = np.array_split(np.arange(len(pool)), -(-len(pool) // ROWS_AT_ONCE))
        sums, stored = np.zeros(len(pool.moments[0]) if places is None else len(places)), 0
        for counts in map(self.counts, parts):
            sums += np.asarray(counts.sum(0, dtype=np.float64)).ravel()
            stored += counts.nnz
            if (most := counts.sum(1).max()) > MOST_A_CELL:
                raise _too_deep(most)
        self._share, self.stored_a_cell = sums / max(sums.sum(), 1.0), stored / len(pool)

    def counts(self, rows: np.ndarray) -> scipy.sparse.csr_matrix:
        """(n, G) of the cells `rows`."""
        values = self._pool.whole(rows, self._pool.expression[rows])
        return counts_of(values if self._places is None else values[:, self._places], self._factor[rows])

    def changed(self, rows: np.ndarray, effect: np.ndarray, rng: np.random.Generator) -> scipy.sparse.csr_matrix:
        """(n, G) of the cells `rows` after an effect on the run's genes.

        Raises:
            InputError: a cell gets more counts than a submission may have.
        """
        fold = fold_changes(self._pool.moments[0], effect, self._typical)
        if self._places is not None:
            n_extra = 0 if self._pool.extra is None else self._pool.extra.shape[1]
            fold = np.concatenate([fold, np.ones(n_extra)])[self._places]
        counts = changed_counts(self.counts(rows), fold, self._share, rng)
        if (most := counts.sum(1).max()) > MOST_A_CELL:
            raise _too_deep(most)
        return counts


def _obs(request: Request, rows: np.ndarray) -> pd.DataFrame:
    """Labels of a block's cells; `join_tables` makes their names unlike."""
    name = CONTROL if request.is_control else request.perturbation
    context = request.pool.cell_type
    index = pd.Index([f"{context}_{name}"] * len(rows), dtype=str)
    return pd.DataFrame({TARGET_GENE: name, CONTEXT: context}, index=index)
