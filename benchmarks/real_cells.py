"""Real cells: which predictions of held-out cells are better than none, on two public screens?

Through the functions behind the commands: embed, train three seeds, predict, evaluate. Folds of held-out cells
(../shared/data, or the folder in SEST_DATA; files are read where they are, all that is made goes to --work):

    replicate     papalexi: one of three replicates, which stand for cell types, is held out whole
    perturbation  papalexi: a third of the perturbations, in all replicates; features are the genes' loadings
    few-shot      papalexi: three knock-outs in one replicate
    combination   perturbench, K562: single and double activations whose targets train in others
    no effect     perturbench, A172: a cell type whose real cells show no effect; nothing can be won there

Validation pairs are taken from what trains; the test pairs are looked at once, at the end. The script fails where
benchmarks/README.md says more than the table shows (CLAIMS). Run `python benchmarks/real_cells.py` (about half an hour
on two cores; --small: one seed, one fold of each kind, few steps).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sest
from sest.baselines.effects import BASELINES
from sest.config import BlendConfig, PredictConfig, TrainConfig
from sest.evaluation.results import Evaluation
from sest.files.cell_file import CellFile
from sest.prediction.predict import predict
from sest.training.blend import blend_run
from sest.training.train import train

README = Path(__file__).with_name("README.md")
DIM = 256  # width of the embeddings
METRICS = ("mae", "pearson_delta", "pearson_delta_independent", "pds", "energy_distance")
PARTS = ("head", "blend", "ensemble")  # of the head alone; with the baselines; of all seeds
SETTLED_STEPS, SETTLING_LR = 1.4, 0.1  # every run goes on to 1.4 x max_steps at a tenth of the learning rate
TRAINING = TrainConfig(
    max_steps=1200,
    batch_size=8,
    set_size=32,
    lr=1e-3,
    control_targets=True,  # else nothing says what cells of a held-out cell type look like
    missing_perturbations="zero",
    hidden=128,
    n_layers=1,
    n_heads=4,
    ffn=256,
    n_encoder_layers=2,
    n_decoder_layers=2,
    dropout=0.0,
    val_every=100,
    checkpoint_every=100_000,
    log_every=100,
    num_workers=0,
)
SCREENS = {"papalexi": ("papalexi_eccite", "batch"), "perturbench": ("perturbench_devel", "cell_type")}


@dataclass(frozen=True)
class Fold:
    """What is held out of a screen."""

    kind: str
    name: str
    screen: str
    zeroshot: str  # a cell type that is tested whole, or ""
    fewshot: tuple[tuple[str, str, tuple[str, ...]], ...]  # (cell type, split, perturbations)
    perturbations: str = "onehot"

    def toml(self) -> str:
        """Its splits file."""
        data = SCREENS[self.screen][0]
        lines = ["[datasets]", f'{data} = "{data}.h5ad"', "[training]", f'{data} = "train"']
        lines += ["[zeroshot]", f'"{data}.{self.zeroshot}" = "test"'] if self.zeroshot else []
        for cell_type in dict.fromkeys(cell_type for cell_type, _, _ in self.fewshot):
            lines.append(f'[fewshot."{data}.{cell_type}"]')
            lines += [f"{split} = {json.dumps(names)}" for of, split, names in self.fewshot if of == cell_type]
        return "\n".join(lines) + "\n"


def data_folder() -> Path:
    """Where the screens lie: SEST_DATA, or ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SEST_DATA", beside))
    missing = [file for file, _ in SCREENS.values() if not (folder / f"{file}.h5ad").exists()]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(missing)}. Set SEST_DATA to the folder that has them.")
    return folder


def perturbations_of(cells: Path, column: str, cell_type: str) -> list[str]:
    """The perturbations of a cell type, without the control."""
    with CellFile(cells) as file:
        obs = file.obs.frame()
    found = set(obs.loc[obs[column].astype(str) == cell_type, "target_gene"].astype(str))
    return sorted(found - {"control", "non-targeting"})


def folds_of(data: Path) -> list[Fold]:
    """All folds; what is drawn for them does not depend on the cells."""
    papalexi = data / f"{SCREENS['papalexi'][0]}.h5ad"
    replicates = ("rep_1", "rep_2", "rep_3")
    everyone = perturbations_of(papalexi, "batch", "rep_1")
    order = np.random.default_rng(0).permutation(len(everyone))
    found = []
    for i, held_out in enumerate(replicates):
        chosen = tuple(sorted(everyone[k] for k in order[8 * i : 8 * i + 8]))
        found.append(Fold("replicate", held_out, "papalexi", held_out, ((replicates[(i + 1) % 3], "val", chosen),)))
    for i in range(3):
        test, val = ([everyone[k] for k in order[j % 3 :: 3]] for j in (i, i + 1))
        few = [
            (r, split, tuple(sorted(names))) for r in replicates for split, names in (("val", val[:4]), ("test", test))
        ]
        found.append(Fold("perturbation", f"third {i + 1}", "papalexi", "", tuple(few), "genes"))
    few = [("rep_1", "test", ("IFNGR1", "JAK2", "STAT1")), ("rep_2", "val", ("IFNGR2", "IRF1", "STAT2"))]
    found.append(Fold("few-shot", "rep_1", "papalexi", "", tuple(few)))
    k562 = perturbations_of(data / f"{SCREENS['perturbench'][0]}.h5ad", "cell_type", "k562")
    for i, (val_names, test_names) in enumerate(covered(k562, 3)):
        few = [("k562", "val", val_names), ("k562", "test", test_names)]
        found.append(Fold("combination", f"fold {i + 1}", "perturbench", "", tuple(few)))
    few = [("T98G", "val", ("MAP2K3", "MAPK1", "TGFBR2"))]
    return [*found, Fold("no effect", "A172", "perturbench", "A172", tuple(few))]


def embedded(folds: Sequence[Fold], data: Path, work: Path, dim: int = DIM) -> dict[str, Path]:
    """The caches of the folds' screens, made in `work`, by screen."""
    caches = {}
    for screen in dict.fromkeys(fold.screen for fold in folds):
        file, column = SCREENS[screen]
        caches[screen] = work / f"{screen}.zarr"
        options: dict[str, Any] = {"pert_col": "target_gene", "cell_type_col": column, "encoder": "pca", "dim": dim}
        sest.embed(data / f"{file}.h5ad", caches[screen], **options)
    return caches


def covered(names: Sequence[str], n_folds: int, n_val: int = 3, n_test: int = 4) -> list[tuple[tuple[str, ...], ...]]:
    """Folds of (validation, test) perturbations whose every target is left in a training one; each is tested once."""
    rng, tested = np.random.default_rng(0), set[str]()
    found: list[tuple[tuple[str, ...], ...]] = []
    for _ in range(n_folds):
        out: list[str] = []
        for name in rng.permutation(names).tolist():
            is_test = len(out) < n_test
            rest = {target for other in names if other not in (*out, name) for target in other.split("+")}
            left = all(set(one.split("+")) <= rest for one in (*out, name))
            if left and len(out) < n_test + n_val and not (is_test and name in tested):
                out.append(name)
        tested |= set(out[:n_test])
        found.append((tuple(sorted(out[n_test:])), tuple(sorted(out[:n_test]))))
    return found


def train_one(cache: Path, folder: Path, fold: Fold, config: TrainConfig) -> float:
    """Train one seed into folder/runs/seed-N; returns the seconds it took."""
    torch.set_num_threads(1)  # the steps are small; two threads on busy cores wait for each other
    splits = folder / "starter.toml"
    config = replace(config, splits=str(splits), perturbations=fold.perturbations)
    run, began = folder / "runs" / f"seed-{config.seed}", time.perf_counter()
    train(cache, run, config)
    settled = replace(config, lr=config.lr * SETTLING_LR, max_steps=int(config.max_steps * SETTLED_STEPS))
    train(cache, run, settled, resume="auto")
    return time.perf_counter() - began


def score(folder: Path, cells: Path, n_seeds: int, again: bool) -> dict[str, Any]:
    """Predict and evaluate head, blend and ensemble; scores of every predictor, and MAE of every pair."""
    torch.set_num_threads(1)
    runs = [folder / "runs" / f"seed-{seed}" for seed in range(n_seeds)]
    for run in runs if again else ():
        blend_run(run, BlendConfig())
    asked = [("head", run, PredictConfig(blend="head")) for run in runs]
    asked += [("blend", run, PredictConfig()) for run in runs]
    asked.append(("ensemble", folder / "runs", PredictConfig()))
    scores: dict[str, dict[str, list[float]]] = {}
    pairs: dict[str, list[np.ndarray]] = {}
    for number, (name, run, config) in enumerate(asked):
        out = folder / f"{number}.h5ad"
        predict(run, out, config, force=again)
        evaluation: Evaluation = sest.evaluate(out, cells, cell_eval=False)
        found = {name: "model"} | (dict.fromkeys(BASELINES) | {"real_half": None} if number == 0 else {})
        for predictor, own in found.items():
            for metric in METRICS:
                value = evaluation.summary[metric].get(own or predictor, float("nan"))
                scores.setdefault(predictor, {}).setdefault(metric, []).append(value)
            rows = evaluation.table[evaluation.table["predictor"] == (own or predictor)]
            pairs.setdefault(predictor, []).append(rows["mae"].to_numpy())
    return {
        "scores": scores,
        "mae_of_pairs": {
            name: np.mean(values, axis=0).tolist() for name, values in pairs.items() if name != "real_half"
        },
        "n_pairs": len(pairs["controls"][0]),
        "measurable": all(ceiling.is_measurable for ceiling in evaluation.ceilings),
        "notes": [note for note in evaluation.notes if "no measurable effect" in note],
    }


# --- what the table shows


def mean(result: dict[str, Any], predictor: str, metric: str = "mae") -> float:
    """Over the seeds."""
    return statistics.fmean(result["scores"][predictor][metric])


def best_baseline(result: dict[str, Any]) -> str:
    """The single baseline of the lowest MAE."""
    return min((name for name in BASELINES if name != "stack"), key=lambda name: mean(result, name))


def standard_error(result: dict[str, Any], a: str, b: str) -> float:
    """Of the difference of two predictors' MAE, over pairs."""
    difference = np.subtract(result["mae_of_pairs"][a], result["mae_of_pairs"][b])
    return float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0


def not_above(result: dict[str, Any], a: str, b: str) -> bool:
    """Whether the MAE of `a` is at or below that of `b`, within the standard error of the difference."""
    return mean(result, a) <= mean(result, b) + standard_error(result, a, b)


Results = list[dict[str, Any]]
CLAIMS: dict[str, Callable[[Results], bool]] = {
    "The blend's MAE is at or below that of the controls in every fold.": lambda results: all(
        mean(r, "blend") <= mean(r, "controls") for r in results
    ),
    "The blend's MAE is at or below that of the controls, within a standard error, in every fold.": lambda results: all(
        not_above(r, "blend", "controls") for r in results
    ),
    "The blend's MAE is within a standard error of the best single baseline's, or below, in every fold.": (
        lambda results: all(not_above(r, "blend", best_baseline(r)) for r in results)
    ),
    "The blend's MAE is below the best single baseline's in at least three folds.": lambda results: (
        sum(mean(r, "blend") < mean(r, best_baseline(r)) for r in results) >= 3
    ),
    "The ensemble's MAE is at or below the mean single run's in every fold.": lambda results: all(
        mean(r, "ensemble") <= mean(r, "blend") for r in results
    ),
    "The blend's PDS, over all folds with an effect, is at least the stack's.": lambda results: (
        statistics.fmean(mean(r, "blend", "pds") for r in results if r["measurable"])
        >= statistics.fmean(mean(r, "stack", "pds") for r in results if r["measurable"])
    ),
    "In A172 sest itself says that there is nothing to see.": lambda results: all(
        bool(r["notes"]) for r in results if r["fold"] == "A172"
    ),
}


def claims(results: Results, readme: str) -> list[str]:
    """What is claimed in the README and is not so, and what is so."""
    text = " ".join(readme.split())
    wrong = []
    for sentence, holds in CLAIMS.items():
        if not holds(results) and sentence in text:
            wrong.append(sentence)
        print(f"{'so' if holds(results) else 'NOT so'}{'' if sentence in text else ' (not claimed)'}: {sentence}")
    return wrong


def over_seeds(values: list[float]) -> str:
    """Mean and, of several, the sample standard deviation."""
    if not np.isfinite(values).all():
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def tables(results: Results) -> str:
    """Markdown: every predictor and metric of each fold, then MAE of all folds side by side."""
    text = []
    for result in results:
        effect = "" if result["measurable"] else "; no measurable effect: nothing here is a win"
        text += [f"\n{result['kind']}, {result['fold']} ({result['n_pairs']} pairs{effect})", ""]
        text += [f"| predictor | {' | '.join(METRICS)} |", "|---" * (1 + len(METRICS)) + "|"]
        for name in (*BASELINES, *PARTS, "real_half"):
            values = " | ".join(over_seeds(result["scores"][name][metric]) for metric in METRICS)
            text.append(f"| {name.replace('_', ' ')} | {values} |")
    shown = (*BASELINES, *PARTS)
    text += ["\nMAE", "", f"| fold | {' | '.join(name.replace('_', ' ') for name in shown)} |"]
    text += ["|---" * (1 + len(shown)) + "|"]
    for result in results:
        least = min(mean(result, name) for name in shown)
        figures = [f"{mean(result, n):.4f}" for n in shown]
        figures = [f"**{f}**" if f == f"{least:.4f}" else f for f in figures]
        text.append(f"| {result['kind']}, {result['fold']} | {' | '.join(figures)} |")
    return "\n".join(text)


def plot(results: Results) -> str:
    """SVG: MAE of every predictor over the controls' in each fold."""
    colours = {"stack": "#8a5417", "head": "#999999", "blend": "#2b6a4d", "ensemble": "#2f5d9b"}
    height, left, width = 26, 150, 420
    rows = []
    for i, result in enumerate(results):
        y = 40 + height * i
        label = f"{result['kind']}, {result['fold']}"
        rows.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
        rows.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        for name, colour in colours.items():
            ratio = mean(result, name) / mean(result, "controls")
            x = left + width * min(max((ratio - 0.5) / 0.7, 0), 1)
            rows.append(
                f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{colour}"><title>{name} {ratio:.3f}</title></circle>'
            )
    bottom = 40 + height * len(results)
    for ratio in (0.6, 0.8, 1.0, 1.2):
        x = left + width * (ratio - 0.5) / 0.7
        rows.insert(0, f'<line x1="{x}" x2="{x}" y1="28" y2="{bottom}" stroke="{"#333" if ratio == 1 else "#ddd"}"/>')
        rows.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{ratio:g}</text>')
    for i, (name, colour) in enumerate(colours.items()):
        rows.append(f'<circle cx="{left + 100 * i}" cy="12" r="5" fill="{colour}"/>')
        rows.append(f'<text x="{left + 100 * i + 10}" y="16">{name}</text>')
    rows.append(
        f'<text x="{left + width / 2}" y="{bottom + 34}" text-anchor="middle">MAE over that of the controls</text>'
    )
    style = "<style>text { font: 12px system-ui, sans-serif; fill: #222; }</style>"
    size = f'width="{left + width + 20}" height="{bottom + 44}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(rows)}</svg>\n'


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = {name: version(name) for name in ("torch", "numpy", "anndata", "zarr")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "sest": sest.__version__,
        **packages,
    }


def main() -> None:
    """Run every fold and seed, print the tables and which claims hold, write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one seed, a fold of each kind, 300 + 120 steps")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every fold (3)")
    parser.add_argument("--kind", help="only folds of this kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trainings at one time (one a core)")
    parser.add_argument("--out", type=Path, help="JSON file for all figures; the plot goes beside it as .svg")
    parser.add_argument("--work", type=Path, help="new folder for caches and runs; default: a temporary one")
    parser.add_argument("--again", action="store_true", help="score the runs in --work again, without training")
    asked = parser.parse_args()
    n_seeds, training = (1, replace(TRAINING, max_steps=300)) if asked.small else (asked.seeds, TRAINING)
    data = data_folder()
    folds = [fold for fold in folds_of(data) if asked.kind in (None, fold.kind)]
    if asked.small:
        folds = list({fold.kind: fold for fold in folds}.values())
    results: Results = []
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        made = {fold.screen: work / f"{fold.screen}.zarr" for fold in folds}
        caches = made if asked.again else embedded(folds, data, work)
        with ProcessPoolExecutor(asked.workers, get_context("spawn")) as pool:
            waiting: list[tuple[Fold, Path, list[Future[float]]]] = []
            for fold in folds:
                folder = work / f"{fold.kind}-{fold.name}".replace(" ", "-")
                if asked.again:
                    waiting.append((fold, folder, []))
                    continue
                folder.mkdir()
                (folder / "starter.toml").write_text(fold.toml())
                seeds = [replace(training, seed=seed) for seed in range(n_seeds)]
                runs = [pool.submit(train_one, caches[fold.screen], folder, fold, config) for config in seeds]
                waiting.append((fold, folder, runs))
            scored = []
            for fold, folder, runs in waiting:
                seconds = [run.result() for run in runs]
                cells = data / f"{SCREENS[fold.screen][0]}.h5ad"
                scored.append((fold, seconds, pool.submit(score, folder, cells, n_seeds, asked.again)))
            for fold, seconds, found in scored:
                results.append({"kind": fold.kind, "fold": fold.name, "seconds": seconds, **found.result()})
                shown = {name: round(mean(results[-1], name), 4) for name in (*BASELINES, *PARTS)}
                print(fold.kind, fold.name, json.dumps(shown), flush=True)
    print(tables(results))
    record = {"hardware": hardware(), "training": training.to_values(), "results": results}
    print("\n" + json.dumps(record["hardware"]))
    if asked.out:
        asked.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        asked.out.with_suffix(".svg").write_text(plot(results))
    print()
    wrong = claims(results, README.read_text())
    if wrong and not (asked.small or asked.kind):
        sys.exit(f"benchmarks/README.md claims what the table does not show: {' '.join(wrong)}")


if __name__ == "__main__":
    main()
