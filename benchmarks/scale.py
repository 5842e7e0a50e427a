"""How the costs of every stage grow with cells, genes and perturbations: no faster than they do.

Cells are made up, and every stage is a command line in a process of its own, at three sizes of each dimension while the
other two stay as they are. Of each: seconds of the processor (user and system), peak memory, and by how much the files
grew. The exponent of growth is the slope of log cost against log size, the larger of the two between neighbouring
sizes, after what the same command costs with a few cells is taken off (Python, imports, a network of no size). What is
then left counts as at least FLOORS, since less than that is chance. A constant part that is larger than a start
(perturbations grow, but as many cells are read) hides growth from a slope. `Of the increase` is the exponent of what
one step of the size adds beside the step before it: all constant parts are gone from it, but it is noisier, and fails
nothing.

Fails (exit code 1, a line each) where

- an exponent of processor time is above 1.1,
- memory grows with cells by more bytes a cell than a stage may hold of them (HOLDS, HELD_BYTES),
- a stage took longer than --limit: it is ended, and neither larger sizes of it nor what needs its output are tried.

    python benchmarks/scale.py --small                              # 20 minutes; most of it is start-up
    python benchmarks/scale.py --plot scale.svg --json scale.json   # an hour or more
    python benchmarks/scale.py --many-cells                         # 1 and 5 million cells of 20 values: 10 minutes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

EXPONENT = 1.1  # of processor time, at most: one pass, and sorting
# What two runs of one command differ by: s, bytes, bytes. Of processor time at least this share of the start, since
# it changes by a fifth with what else the processor does.
FLOORS, START_SHARE = {"cpu": 0.5, "peak": 32e6, "written": 1e5}, 0.25
ON = 0.2  # of a cell's genes have counts
CONTROLS = 0.1  # of the cells
CELL_TYPES, BATCHES = ("A", "B"), 8
WIDTH = 16  # of the embeddings
VALUE_BYTES = 4  # a gene number of 2 bytes, a count of 2: what a value takes in memory (sest/data/targets.py)

# Memory may grow with cells by HELD_BYTES a cell in every stage: names and labels are held as tables, 0.2 to 0.3 kB a
# cell (README, Embedding memory), with a few arrays of eight bytes a cell, and the allocator may keep what was freed
# (embed: 0.73 kB in all, README, Growth). A stage that would hold the cells themselves is above it: 400 values of 4
# bytes each at 2,000 genes, or 8 as files have them. Counted from sizes on that fill a shard of values in the cache:
# below that, blocks which have a largest size are as large as the file. So --small says nothing of it.
HELD_BYTES = 1000
SHARD_VALUES = 2**24
HOLDS = {  # these may hold the values too, once and VALUE_BYTES each, where memory has the room for them
    "train": "--data-device auto keeps them in memory: a step never reads the cache",
    "train again": "as the first",
    "head none": "baselines are fitted on the same data",
    "predict": "the control cells that it starts from, a tenth of all here, with copies",
}


@dataclass(frozen=True)
class Size:
    """Of a file of cells."""

    cells: int
    genes: int
    perturbations: int


DIMENSIONS = ("cells", "genes", "perturbations")
Plan = dict[str, list[Size]]  # by dimension
TINY = Size(400, 50, 4)


def plan(small: bool, many_cells: bool = False) -> Plan:
    """The three sizes of each dimension; of many cells the two of one."""
    if many_cells:
        return {"cells": [Size(n * 1_000_000, 100, 1_000) for n in (1, 5)]}
    base = Size(2_000, 700, 70) if small else Size(20_000, 2_000, 200)
    middle = replace(base, cells=3 * base.cells)
    return {
        "cells": [replace(base, cells=n * base.cells) for n in (1, 3, 9)],
        "genes": [replace(base, genes=n * base.genes) for n in (1, 3, 9)],
        "perturbations": [replace(middle, perturbations=n * base.perturbations) for n in (1, 5, 25)],
    }


# --- cells


def write_cells(path: Path, size: Size, predicted: bool, on: float = ON) -> None:
    """Counts, or log1p values as if predicted, in blocks of rows.

    A gene is on in a cell with a probability of its own, its count is geometric, and doubled in every twentieth gene,
    which ones depending on the perturbation. All perturbations have equal numbers of cells.
    """
    import numpy as np  # here, so that the process that measures stays small: see `measured`
    import pandas as pd
    import scipy.sparse as sp

    from sest.files.write_h5ad import H5adWriter

    rng = np.random.default_rng([size.cells, size.genes, size.perturbations, int(predicted)])
    chance = rng.beta(0.5, 2.0, size.genes)
    chance = np.minimum(chance * on / chance.mean(), 1.0).astype(np.float32)
    n_controls = int(CONTROLS * size.cells)
    turn, perturbed = np.divmod(np.arange(size.cells - n_controls), size.perturbations)
    code = np.concatenate([np.zeros(n_controls, np.int64), 1 + perturbed])
    kind = np.concatenate([np.arange(n_controls), turn]) % len(CELL_TYPES)  # every pair has cells
    order = rng.permutation(size.cells)
    code, kind = code[order], kind[order]
    with H5adWriter(path, size.genes, "float32") as writer:
        for start in range(0, size.cells, 2048):
            of = code[start : start + 2048]
            rows = sp.csr_matrix(rng.random((len(of), size.genes), dtype=np.float32) < chance)
            counts = rng.geometric(0.4, rows.nnz).astype(np.float32)
            of_value = np.repeat(of, np.diff(rows.indptr))
            counts[(of_value > 0) & ((rows.indices + of_value) % 20 == 0)] *= 2
            block = sp.csr_matrix((counts, rows.indices, rows.indptr), shape=rows.shape)
            if predicted:
                total = np.maximum(np.asarray(block.sum(1)).ravel(), 1)
                block = sp.diags(1e4 / total).dot(block).tocsr().astype(np.float32).log1p()
            writer.add(block)
        names = ["control", *(f"P{i}" for i in range(size.perturbations))]
        obs = pd.DataFrame(
            {
                "target_gene": pd.Categorical.from_codes(code, names),
                "cell_type": pd.Categorical.from_codes(kind, CELL_TYPES),
                "batch": pd.Categorical.from_codes(
                    rng.integers(0, BATCHES, size.cells), [f"b{i}" for i in range(BATCHES)]
                ),
            },
            index=[f"cell{i}" for i in range(size.cells)],
        )
        writer.finish(obs, pd.DataFrame(index=[f"G{i}" for i in range(size.genes)]), {})


# --- stages


@dataclass(frozen=True)
class Stage:
    """A command line; {} is the folder of a size."""

    name: str
    words: str
    needs: tuple[str, ...] = ()  # stages whose output it reads


TRAIN = "train {}/cells.zarr --perturbations onehot --device cpu"
STEP = "--max-steps 1 --batch-size 2 --hidden 32 --n-layers 1 --n-heads 2"
STAGES = (
    Stage("embed", f"embed {{}}/cells.h5ad --encoder pca --dim {WIDTH} --cache {{}}/cells.zarr --device cpu"),
    Stage("info", "info {}/cells.zarr", ("embed",)),
    Stage("train", f"{TRAIN} --run {{}}/run {STEP}", ("embed",)),
    # Another run of the same cells: it may use what the first one left beside the cache.
    Stage("train again", f"{TRAIN} --run {{}}/again {STEP}", ("embed", "train")),
    Stage("head none", f"{TRAIN} --run {{}}/none --head none", ("embed",)),
    # A few cells: what comes before the first of them is what it takes.
    Stage("predict", "predict {}/run --only P0,P1,P2 --cell-type A --out {}/three.h5ad --device cpu", ("train",)),
    Stage("evaluate", "evaluate {}/predicted.h5ad {}/cells.h5ad --no-cell-eval --out {}/scores"),
    Stage("report", "report {}/run --sets 32 --out {}/report.html --device cpu", ("train",)),
)


def with_needs(asked: Sequence[str]) -> list[Stage]:
    """The stages of these names and all that they need, in order; all where none is asked for."""
    wanted = set(asked or (stage.name for stage in STAGES))
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(stage.needs)
    return [stage for stage in STAGES if stage.name in wanted]


@dataclass(frozen=True)
class Cost:
    """Of one command."""

    cpu: float  # s of the processor, user and system
    wall: float  # s
    peak: float  # bytes of resident memory
    written: float  # bytes by which the folder grew
    ended: bool = False  # longer than the limit: a lower bound

    def shown(self, what: str) -> str:
        value: float = getattr(self, what)
        text = f"{value:.1f}" if what == "cpu" else f"{value / 1e6:,.0f}" if what == "peak" else f"{value / 1e6:,.1f}"
        return f"> {text}, ended" if self.ended else text


Costs = dict[str, Cost]  # by the name of the stage


def folder_bytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


SEST = (sys.executable, "-m", "sest")


def measured(stage: Stage, folder: Path, limit: float, program: Sequence[str] = SEST) -> Cost:
    """Run a stage in a new process, for at most `limit` seconds.

    Its peak counts what this process held when it began the other (Linux hands that on), so this one has to stay small.

    Raises:
        SystemExit: the command failed.
    """
    command = [*program, *stage.words.replace("{}", str(folder)).split()]
    log = folder.with_suffix(".log")
    before, began = folder_bytes(folder), time.perf_counter()
    to_log = [
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    process = os.posix_spawn(sys.executable, command, {"OMP_NUM_THREADS": "1", **os.environ}, file_actions=to_log)
    ended = False
    try:
        while True:
            found, status, usage = os.wait4(process, os.WNOHANG)
            if found:
                break
            if not ended and time.perf_counter() - began > limit:
                os.kill(process, signal.SIGKILL)
                ended = True
            time.sleep(0.05)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    wall = time.perf_counter() - began
    code = os.waitstatus_to_exitcode(status)
    if code and not ended:
        raise SystemExit(f"{' '.join(command)}\nexit code {code}\n{log.read_text(errors='replace')[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(
        cpu=usage.ru_utime + usage.ru_stime,
        wall=wall,
        peak=usage.ru_maxrss * unit,
        written=max(0, folder_bytes(folder) - before),
        ended=ended,
    )


def measure(size: Size, stages: Iterable[Stage], work: Path, limit: float, ended: set[str]) -> Costs:
    """All stages at one size. Those in `ended`, and what needs them, are left out; the ones that are ended join it."""
    folder = work / f"{size.cells}-{size.genes}-{size.perturbations}"
    folder.mkdir()
    found: Costs = {}
    gone = set(ended)
    try:
        for predicted in (False, True):
            if not predicted or any(stage.name == "evaluate" for stage in stages):
                made = folder / ("predicted.h5ad" if predicted else "cells.h5ad")
                maker = get_context("spawn").Process(target=write_cells, args=(made, size, predicted))
                maker.start()
                maker.join()
                if maker.exitcode:
                    raise SystemExit("the cells could not be made")
        for stage in stages:
            if stage.name in gone or gone & set(stage.needs):
                gone.add(stage.name)
                continue
            found[stage.name] = cost = measured(stage, folder, limit)
            of = f"{size.cells:>8,} cells {size.genes:>6,} genes {size.perturbations:>5,} perturbations"
            figures = f"{cost.shown('cpu'):>8} s  {cost.shown('peak'):>6} MB  {cost.shown('written'):>8} MB written"
            print(f"{of}  {stage.name:<12}{figures}", file=sys.stderr, flush=True)
            if cost.ended:
                ended.add(stage.name)
                gone.add(stage.name)
    finally:
        shutil.rmtree(folder)
    return found


# --- growth


@dataclass(frozen=True)
class Series:
    """The costs of a stage along a dimension. May be shorter than the sizes: what was ended has no larger ones."""

    stage: str
    dimension: str
    sizes: list[Size]
    costs: list[Cost]
    tiny: Cost

    def steps(self) -> list[int]:
        return [getattr(size, self.dimension) for size in self.sizes]

    def floor(self, what: str) -> float:
        """What is chance."""
        return max(FLOORS[what], START_SHARE * self.tiny.cpu if what == "cpu" else 0.0)

    def exponent(self, what: str) -> float | None:
        """The largest slope of log cost against log size between neighbours; None: no more than the start is there."""
        floor, steps = self.floor(what), self.steps()
        own = [getattr(cost, what) - getattr(self.tiny, what) for cost in self.costs]
        if len(own) < 2 or max(own) <= floor:
            return None
        own = [max(value, floor) for value in own]
        return max(math.log(own[i + 1] / own[i]) / math.log(steps[i + 1] / steps[i]) for i in range(len(own) - 1))

    def exponent_of_increase(self, what: str) -> float | None:
        """Of a cost a + b n^k at n, rn and rrn: k. None: it did not grow by more than chance, or a size is missing."""
        if len(self.costs) < 3 or self.costs[-1].ended:
            return None
        first, second = (getattr(b, what) - getattr(a, what) for a, b in zip(self.costs, self.costs[1:], strict=False))
        if second <= self.floor(what):
            return None
        steps = self.steps()
        return math.log(second / max(first, self.floor(what))) / math.log(steps[2] / steps[1])

    def bytes_a_cell(self) -> float | None:
        """Memory that each more cell took, from the smallest size with all buffers full on; None: not known."""
        full = [i for i, size in enumerate(self.sizes) if ON * size.genes * size.cells >= SHARD_VALUES]
        if self.dimension != "cells" or len(full) < 2 or self.costs[-1].ended:
            return None
        more = self.costs[-1].peak - self.costs[full[0]].peak
        return more / (self.sizes[-1].cells - self.sizes[full[0]].cells)

    def failures(self) -> list[str]:
        """What is not as it should be."""
        found, exponent = [], self.exponent("cpu")
        where = f"{self.stage}, {self.dimension}"
        if exponent is not None and exponent > EXPONENT:
            bound = "at least " if self.costs[-1].ended else ""
            found.append(f"{where}: processor time grows with an exponent of {bound}{exponent:.2f}, above {EXPONENT}")
        if self.costs[-1].ended:
            found.append(f"{where}: ended after {self.costs[-1].wall:,.0f} s at {self.steps()[-1]:,}")
        grew, may = self.bytes_a_cell(), self.may_hold()
        if grew is not None and grew > may:
            text = f"memory grows by {grew:,.0f} bytes a cell, above {may:,.0f}"
            found.append(f"{where}: {text} (an exponent of {shown(self.exponent('peak'))})")
        return found

    def may_hold(self) -> float:
        """Bytes a cell by which memory may grow with cells."""
        values = ON * self.sizes[0].genes * VALUE_BYTES if self.stage in HOLDS else 0.0
        return HELD_BYTES + values


def shown(exponent: float | None) -> str:
    return "-" if exponent is None else f"{exponent:.2f}"


def all_series(found: dict[Size, Costs], sizes: Plan, stages: Iterable[Stage], tiny: Costs) -> list[Series]:
    """Of every stage and dimension, as far as it was measured."""
    result = []
    for stage in stages:
        for dimension, of in sizes.items():
            done = [size for size in of if stage.name in found.get(size, {})]
            if done and stage.name in tiny:
                costs = [found[size][stage.name] for size in done]
                result.append(Series(stage.name, dimension, done, costs, tiny[stage.name]))
    return result


def table(series: Iterable[Series]) -> str:
    """Markdown."""
    lines = [
        "| stage | what grows | CPU, s | exponent | of the increase | peak, MB | exponent | bytes a cell | written, MB "
        "| exponent |",
        "|---" * 10 + "|",
    ]
    for one in series:
        cells = [one.stage, one.dimension]
        for what in ("cpu", "peak", "written"):
            cells += [" / ".join(cost.shown(what) for cost in one.costs), shown(one.exponent(what))]
            if what == "cpu":
                cells.append(shown(one.exponent_of_increase(what)))
            if what == "peak":
                grew = one.bytes_a_cell()
                cells.append("-" if grew is None else f"{grew:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


COLOURS = dict(
    zip(
        (stage.name for stage in STAGES),
        ("#2f5d9b", "#8a5417", "#2b6a4d", "#7fb069", "#999999", "#c1440e", "#7b3f8c", "#d4a017"),
        strict=True,
    )
)
UNITS = {"cpu": ("CPU, s", 1.0), "peak": ("peak, MB", 1e6)}  # of the plot: its title, and what one of it is


@dataclass(frozen=True)
class Panel:
    """One drawing of the plot: where it is, and its two logarithmic axes (powers of ten)."""

    left: float
    top: float
    x: tuple[float, float]
    y: tuple[int, int]
    width: float = 230
    height: float = 200

    def place(self, n: float, value: float) -> tuple[float, float]:
        across = (math.log10(n) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(value) - self.y[0]) / (self.y[1] - self.y[0])
        return round(self.left + self.width * across, 1), round(self.top + self.height * (1 - up), 1)

    def line(self, points: Iterable[tuple[float, float]], style: str) -> str:
        return f'<polyline points="{" ".join(f"{x},{y}" for x, y in points)}" fill="none" {style}/>'

    def draw(self, what: str, dimension: str, series: Sequence[Series]) -> list[str]:
        title, unit = UNITS[what]
        steps, floor = max((one.steps() for one in series), key=len), 10.0 ** self.y[0]
        bottom, middle = self.top + self.height, self.left + self.width / 2
        parts = [f'<text x="{self.left}" y="{self.top - 6}">{title}</text>']
        for power in range(self.y[0], self.y[1] + 1):
            x, y = self.place(steps[0], 10.0**power)
            parts.append(self.line([(x, y), (x + self.width, y)], 'stroke="#ddd"'))
            parts.append(f'<text x="{x - 5}" y="{y + 4}" text-anchor="end">{10.0**power:,g}</text>')
        for n in steps:
            x = self.place(n, floor)[0]
            parts.append(f'<text x="{x}" y="{bottom + 15}" text-anchor="middle">{n:,}</text>')
        parts.append(f'<text x="{middle}" y="{bottom + 32}" text-anchor="middle">{dimension}</text>')
        rise = min(steps[-1] / steps[0], 10.0 ** self.y[1] / floor)
        straight = [self.place(steps[0], floor), self.place(steps[0] * rise, floor * rise)]
        parts.append(self.line(straight, 'stroke="#666" stroke-dasharray="4 4"'))
        for one in series:
            colour = COLOURS[one.stage]
            points = [self.place(n, getattr(c, what) / unit) for n, c in zip(one.steps(), one.costs, strict=True)]
            parts.append(self.line(points, f'stroke="{colour}" stroke-width="2"'))
            for (x, y), cost in zip(points, one.costs, strict=True):
                tip = f"<title>{one.stage}: {cost.shown(what)}</title>"
                parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}">{tip}</circle>')
        return parts


def plot(series: Sequence[Series], sizes: Plan) -> str:
    """SVG: processor time and peak memory against each dimension, start included; dashed is an exponent of 1."""
    parts = []
    for i, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<circle cx="{60 + 105 * i}" cy="16" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{69 + 105 * i}" y="20">{name}</text>')
    for row, (what, (_, unit)) in enumerate(UNITS.items()):
        values = [getattr(cost, what) / unit for one in series for cost in one.costs]
        y = math.floor(math.log10(min(values))), math.floor(math.log10(max(values))) + 1
        for column, (dimension, of) in enumerate(sizes.items()):
            here = [one for one in series if one.dimension == dimension]
            if here:
                first, last = (math.log10(getattr(size, dimension)) for size in (of[0], of[-1]))
                parts += Panel(60 + 300 * column, 50 + 270 * row, (first, last), y).draw(what, dimension, here)
    style = "<style>text { font: 12px system-ui, sans-serif; fill: #222; }</style>"
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="960" height="570">'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return f"{head}{style}{paper}{''.join(parts)}</svg>\n"


def main() -> None:
    """Measure; print the table and what is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--small", action="store_true", help="a tenth of the cells, a third of the rest: minutes")
    parser.add_argument("--many-cells", action="store_true", help="1 and 5 million cells, values mapped from a disk")
    parser.add_argument("--stage", action="append", choices=names, help="only these (and what they need); repeatable")
    parser.add_argument("--dimension", action="append", choices=DIMENSIONS, help="only these; repeatable")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a stage is ended (900)")
    parser.add_argument("--work", type=Path, help="folder for cells, caches and runs; default: a temporary one")
    parser.add_argument("--plot", type=Path, help="draw the figures here, as SVG")
    parser.add_argument("--json", type=Path, help="write all figures here")
    asked = parser.parse_args()
    stages = with_needs(asked.stage or ())
    if asked.many_cells:
        mapped = [replace(one, words=f"{one.words} --data-device disk") for one in stages if TRAIN in one.words]
        stages = [next((m for m in mapped if m.name == one.name), one) for one in stages]
    sizes = plan(asked.small, asked.many_cells)
    sizes = {name: of for name, of in sizes.items() if name in (asked.dimension or DIMENSIONS)}
    found: dict[Size, Costs] = {}
    with tempfile.TemporaryDirectory(prefix="scale-", dir=asked.work) as temporary:
        work = Path(temporary)
        tiny = least(measure(TINY, stages, work, asked.limit, set()) for _ in range(2))
        if slow := [name for name, cost in tiny.items() if cost.ended]:
            sys.exit(f"{', '.join(slow)}: longer than {asked.limit:g} s with {TINY.cells} cells; give a larger --limit")
        for of in sizes.values():
            ended: set[str] = set()
            for size in of:
                if size not in found:
                    found[size] = measure(size, stages, work, asked.limit, ended)
                ended |= {name for name, cost in found[size].items() if cost.ended}
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert own < min(cost.peak for cost in tiny.values()), "this process is larger than those it measures"
    series = all_series(found, sizes, stages, tiny)
    print(table(series))
    starts = (f"{name} {cost.shown('cpu')} s and {cost.shown('peak')} MB" for name, cost in tiny.items())
    print(f"\nWith {TINY.cells} cells: {', '.join(starts)}")
    if asked.json:
        values = [asdict(one) for one in series]
        asked.json.write_text(json.dumps(values, indent=1) + "\n")
    if asked.plot:
        asked.plot.write_text(plot(series, sizes))
    wrong = [line for one in series for line in one.failures()]
    if wrong:
        sys.exit("\n" + "\n".join(wrong))


def least(runs: Iterable[Costs]) -> Costs:
    """Of several runs of the same commands, the one that took least of each."""
    result: Costs = {}
    for run in runs:
        result |= {name: cost for name, cost in run.items() if name not in result or cost.cpu < result[name].cpu}
    return result


if __name__ == "__main__":
    main()
