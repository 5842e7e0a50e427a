"""What `import sest` offers: the steps as functions of paths or AnnData, and what they leave as objects.

Everything here is thin: the work is in the rooms. Options are the fields of the configuration classes in sest.config.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import anndata
import pandas as pd

from sest.cache import Cache, open_cache
from sest.cache.schema import ROOT
from sest.cache.storage import is_url
from sest.config import EmbedConfig, EvaluateConfig, PredictConfig, TrainConfig
from sest.files.in_memory import file_of
from sest.notebook import shown_in_notebooks
from sest.outputs import check_output

if TYPE_CHECKING:
    from sest.encoder.made import Made
    from sest.evaluation.results import Evaluation
    from sest.head.model import StateTransition

PathLike: TypeAlias = str | os.PathLike[str]
Cells: TypeAlias = PathLike | anndata.AnnData
WHERE = "the options"


def embed(
    inputs: Cells | Sequence[PathLike],
    cache: PathLike,
    *,
    encoder: PathLike | None = None,
    dim: int | str | None = None,
    add: bool = False,
    like: PathLike | Cache | None = None,
    data_root: Sequence[PathLike] = (),
    **options: Any,
) -> Cache:
    """Embed every cell of the inputs once, into `cache`; the same call again continues where it stopped.

    Args:
        inputs: files of cells, folders of them, URLs, one .toml in cell-load's form, or an AnnData in memory (its group
            is "cells").
        cache: the folder to write, or a URL that fsspec knows.
        encoder: an SE folder, a weights file, a Hugging Face repo id; or without weights "pca", "genes", or
            "obsm:KEY" for embeddings that the files have; None: pca, or that of `like`.
        dim: stored width; "native", "state", or None: 512 (genes: 2000), or the native width where
            that is smaller.
        add: files that a finished cache does not have yet are added to it.
        like: a cache, run or checkpoint: embed as its cells were, with the same encoder and projection.
        data_root: folders that a .toml's paths may lead to; default: its own and the working folder.
        **options: further fields of `sest.config.EmbedConfig`.

    Raises:
        sest.Error: bad input; nothing was written, or everything finished before is kept.
        Interrupted: Ctrl-C; finished rows are saved.
    """
    from sest.embedding.embed import embed as run
    from sest.encoder.choose import obsm_key

    if encoder is None:
        encoder = "pca" if like is None else ""
    config = EmbedConfig.from_values({"encoder": os.fspath(encoder), "dim": dim, **options}, WHERE)
    made = None if like is None else made_by(like.storage.url if isinstance(like, Cache) else like)
    several = [inputs] if isinstance(inputs, str | os.PathLike | anndata.AnnData) else inputs
    with shown_in_notebooks(), ExitStack() as stack:
        files = [
            stack.enter_context(file_of(cells, "cells", config.layer, obsm_key(config.encoder))) for cells in several
        ]
        run(files, os.fspath(cache), config, data_roots=[Path(root) for root in data_root], add=add, like=made)
    return open_cache(os.fspath(cache))


def made_by(path: PathLike) -> Made:
    """How the embeddings of a cache, or of what a run or checkpoint was trained on, were made.

    Raises:
        sest.Error: there is none of these.
    """
    from sest.embedding.plan import made_of_cache
    from sest.hub import repository_of
    from sest.prediction.controls import made_of
    from sest.runs.checkpoint import find_checkpoint, sound_checkpoint

    where = os.fspath(path)
    if repository_of(where) is None and (is_url(where) or (Path(where) / ROOT).is_file()):
        cache = open_cache(where)
        return made_of_cache(cache.attributes, cache.storage)
    return made_of(sound_checkpoint(find_checkpoint(Path(where))))


def train(cache: PathLike | Cache, run: PathLike, *, resume: bool | PathLike = False, **options: Any) -> Run:
    """Train the head from a cache, into the folder `run`.

    Args:
        resume: True: go on from the run's furthest sound checkpoint; a path: from that checkpoint folder.
        **options: fields of `sest.config.TrainConfig`. A resumed run keeps its own; only those in
            `sest.runs.run_folder.RESUMABLE` may differ.

    Raises:
        sest.Error: bad input; nothing was trained.
        TrainingFailed: a NaN validation, or too many steps in a row that are not finite; the last checkpoint is kept.
        Interrupted: Ctrl-C; the step was finished and saved to last/. Go on with resume=True.
    """
    from sest.runs.run_folder import config_of
    from sest.training.train import train as steps

    folder, place = Path(run), cache.storage.url if isinstance(cache, Cache) else os.fspath(cache)
    start = None if resume is False else "auto" if resume is True else os.fspath(resume)
    config = config_of(folder, options, start, WHERE)
    with shown_in_notebooks():
        steps(Path(place), folder, config, resume=start, given=options)
    return open_run(folder)


@dataclass(frozen=True)
class Run:
    """The folder of one training."""

    folder: Path

    @property
    def metrics(self) -> pd.DataFrame:
        """Lines of metrics.jsonl: (lines, columns); what a line lacks is NaN. Validations have a val_loss."""
        from sest.runs.curves import read_lines
        from sest.runs.run_folder import METRICS

        return pd.DataFrame(read_lines(self.folder / METRICS))

    @property
    def best_step(self) -> int | None:
        """The step of the best validation, which best/ holds; None before the first one."""
        from sest.runs.curves import best_of

        metrics, monitor = self.metrics, self.config.monitor
        if "val_loss" not in metrics:
            return None
        validations = metrics[metrics["val_loss"].notna()]
        best = best_of(validations[monitor].to_numpy(), monitor)
        return None if best is None else int(validations["step"].iloc[best])

    @cached_property
    def config(self) -> TrainConfig:
        """The options it was trained with."""
        from sest.runs.run_folder import read_run_config

        return TrainConfig.from_values(read_run_config(self.folder)[0], str(self.folder))

    def load_model(self, checkpoint: str | None = None) -> StateTransition:
        """The head: `model(basal (B, S, E), perturbation (B, P)) -> (B, S, G)`, in eval mode on the CPU.

        Args:
            checkpoint: "best", "last" or "checkpoint-step-N"; default: best, or last where nothing was validated.
        """
        from sest.runs.checkpoint import find_checkpoint, sound_checkpoint

        return sound_checkpoint(find_checkpoint(self.folder, checkpoint)).model()

    def predict(
        self,
        perturbations: Sequence[str] | Mapping[str, int] | None = None,
        *,
        cell_type: str | tuple[str, ...] | None = None,
        controls: Cells | None = None,
        out: PathLike | None = None,
        force: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> anndata.AnnData:
        """Predict cells: X log1p (cells, G), with the real control cells they start from beside them.

        Args:
            perturbations: names (128 cells each, or `n_cells`), or a number of cells for each name; None: the cells of
                the run's test split.
            cell_type: of the controls to start from, where there are several; or several of these.
            controls: new control cells, embedded with the run's encoder; default: those of the run's cache.
            out: also write them to this .h5ad.
            force: replace `out` where it exists.
            **options: further fields of `sest.config.PredictConfig`.
        """
        config = PredictConfig.from_values({"cell_type": cell_type, "seed": seed, **options}, WHERE)
        return _predict([self.folder], perturbations, config, controls, out, force)

    def report(self, out: PathLike | None = None, *, force: bool = False, **options: Any) -> Path:
        """Write the HTML report (default: report.html in the run's folder); returns its path.

        Args:
            force: replace `out` where it exists. At its default place an older report is replaced without it.
            **options: of `sest.report.write.write_report`, such as with_model=False.
        """
        from sest.report.write import write_report

        with shown_in_notebooks():
            return write_report(self.folder, out, force=force, **options).path


def open_run(path: PathLike) -> Run:
    """Open the folder of a training.

    Raises:
        sest.Error: it is not one.
    """
    from sest.runs.run_folder import read_run_config

    read_run_config(Path(path))
    return Run(Path(path))


def predict(
    run: PathLike | Run | Sequence[PathLike | Run],
    perturbations: Sequence[str] | Mapping[str, int] | None = None,
    *,
    controls: Cells | None = None,
    out: PathLike | None = None,
    force: bool = False,
    **options: Any,
) -> anndata.AnnData:
    """Predict cells with a trained run, or with several, whose predictions are averaged; see `Run.predict`.

    `run` may be a folder that `sest train --seeds` made: all runs in it.
    """
    runs = [run] if isinstance(run, str | os.PathLike | Run) else run
    folders = [one.folder if isinstance(one, Run) else Path(one) for one in runs]
    return _predict(folders, perturbations, PredictConfig.from_values(options, WHERE), controls, out, force)


def _predict(
    folders: Sequence[Path],
    perturbations: Sequence[str] | Mapping[str, int] | None,
    config: PredictConfig,
    controls: Cells | None,
    out: PathLike | None,
    force: bool,
) -> anndata.AnnData:
    from sest.encoder.choose import obsm_key
    from sest.prediction.predict import predict_cells, runs_of
    from sest.runs.checkpoint import find_checkpoint, open_checkpoint

    with shown_in_notebooks(), ExitStack() as stack:
        if out is not None and isinstance(controls, anndata.AnnData):
            check_output(out, inputs=[controls.filename], force=force)  # the file of a backed one
        if controls is not None:
            first = find_checkpoint(runs_of(folders)[0], config.checkpoint)
            key = obsm_key(open_checkpoint(first, check=False).state["encoder"]["name"])
            file = stack.enter_context(file_of(controls, "controls", config.layer, key))
            config = dataclasses.replace(config, controls=str(file))
        return predict_cells(folders, perturbations, config, out=out, force=force)


def run(cells: PathLike, out: PathLike, **options: Any) -> Run:
    """From one file of cells to a report in the folder `out`: embed, train, predict, evaluate, report.

    As `sest run`; the same call again goes on where it stopped. The folder gets splits.toml (chosen from the cells
    where no splits are given), cache.zarr, run, predicted.h5ad, evaluation and report.html.

    Args:
        **options: fields of `sest.config.PipelineConfig`.

    Raises:
        sest.Error: bad input, or a folder that was begun with something else; finished stages are kept.
        Interrupted: Ctrl-C; the same call goes on.
    """
    from sest.pipeline.folder import run_pipeline

    with shown_in_notebooks():
        return open_run(run_pipeline(cells, out, options).plan.run)


def push(
    run: PathLike | Run,
    repository: str,
    *,
    checkpoint: str | None = None,
    private: bool = True,
    card: PathLike | None = None,
) -> str:
    """Push a head with a model card to the Hugging Face hub, where it is `hf://owner/name`.

    Args:
        run: a run folder, or one of its checkpoint folders.
        repository: owner/name; made where it does not exist.
        checkpoint: which of the run; None: best.
        private: whether a repository that this makes is.
        card: write the model card to this file and push nothing.

    Returns:
        the address, or `card`.

    Raises:
        sest.Error: no such checkpoint, or no right to write there.
    """
    from sest.report.card import push_head

    folder = run.folder if isinstance(run, Run) else Path(run)
    return push_head(folder, repository, checkpoint=checkpoint, private=private, card=card)


def evaluate(predicted: Cells, real: Cells, **options: Any) -> Evaluation:
    """Score predicted against real cells, beside baselines.

    Args:
        predicted: what `Run.predict` returns or `sest predict` writes, or cells of any other model.
        real: counts or log1p values.
        **options: fields of `sest.config.EvaluateConfig`.

    Returns:
        an `Evaluation`, whose `.table` has a row for every cell type, perturbation and predictor.

    Raises:
        sest.Error: the two do not fit each other, or a file cannot be read.
    """
    from sest.evaluation.evaluate import evaluate as scores

    with shown_in_notebooks():
        return scores(predicted, real, EvaluateConfig.from_values(options, WHERE))
