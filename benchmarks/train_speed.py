"""Steps a second of training the State Transition head, on the same cells, sets and machine, in one run:

    sest       `sest train` from the cache
    encoder    the same steps with the encoder in the loop: sest's own encoder on every batch's control cells, as
               loaders that embed on the fly do; extrapolated where so few cells are encoded as --encoder-cells says
    SE-600M    the same at SE-600M's size, from its FLOPs alone ("computed")
    upstream   `state tx train` (arc-state 0.11.1: Lightning and cell-load) from an .h5ad with the same embeddings, the
               same head; steps are counted once the batches its loader had ready are used up

Upstream need not be installed where sest is: `--peers-python /path/to/python` names an interpreter that has it. The
cells are made up (`sest simulate`) and embedded by PCA. Every training runs in a process of its own, by turns; the best
of --repeats counts.

    python benchmarks/train_speed.py --peers-python .venv-peers/bin/python                  # 16 x 128 x 18,080 genes
    python benchmarks/train_speed.py --peers-python .venv-peers/bin/python --hidden 64
    python benchmarks/train_speed.py --small                                                # two minutes
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse
import torch
from encoders import SE_600M, Size, random_cells, write_encoder

import sest
from sest.cells.split_file import TRAIN
from sest.config import TrainConfig
from sest.data.batches import BatchSource
from sest.data.dataset import read_dataset
from sest.data.resident import resident_cells
from sest.data.sampler import SetSampler
from sest.head.model import HeadSizes, n_parameters, new_model
from sest.machine.devices import DTYPES, choose_device, choose_precision
from sest.se.model import StateEncoder
from sest.se.weights import load_encoder
from sest.training.limit import measure_limit

OURS = r"""
import json, sys, torch
from pathlib import Path
from sest.config import TrainConfig
from sest.training.train import train
a = json.loads(sys.argv[1])
torch.set_num_threads(a["threads"])
lines = []
train(Path(a["cache"]), Path(a["run"]), TrainConfig(**a["config"]), on_log=lines.append)
lines = [line for line in lines if "it_per_s" in line][1:]  # the first steps warm up
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
if torch.cuda.is_available():
    peak = torch.cuda.max_memory_allocated()
seconds = sum(1 / line["it_per_s"] for line in lines)
wait = sum(line["data_wait"] / line["it_per_s"] for line in lines) / seconds
print(json.dumps({"it_per_s": len(lines) / seconds, "data_wait": wait, "peak_bytes": peak}))
"""

# `state tx train`, with the clock read around every batch.
PEER = r"""
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import lightning.pytorch as pl, torch
from hydra import compose, initialize_config_module
import state.tx.utils as tx_utils
from state._cli._tx._train import run_tx_train
a = json.loads(sys.argv[1])
torch.set_num_threads(a["threads"])
class Clock(pl.Callback):
    def __init__(self): self.starts, self.ends = [], []
    def on_train_batch_start(self, *_): self.starts.append(time.perf_counter())
    def on_train_batch_end(self, trainer, module, *_):
        self.ends.append(time.perf_counter())
        self.parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
def direct(model_type, data, model, training, dims, original=tx_utils.get_lightning_module):
    # from embeddings straight to genes: no decoder behind a predicted embedding, the cells' expression is the target
    model = {key: value for key, value in model.items() if key != "decoder_cfg"} | {"gene_decoder_bool": False}
    module = original(
        model_type, data | {"output_space": "gene"}, model, training, dims | {"output_dim": dims["gene_dim"]})
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(
        batch | {"pert_cell_emb": batch["pert_cell_counts"]}, batch_idx)
    return module
tx_utils.get_lightning_module = direct
clock, original = Clock(), pl.Trainer.__init__
def init(self, *args, **options):
    options["callbacks"] = [clock, *(options.get("callbacks") or [])]
    options |= {"enable_progress_bar": False, "num_sanity_val_steps": 0}
    original(self, *args, **options)
pl.Trainer.__init__ = init
with initialize_config_module("state.configs", version_base=None):
    run_tx_train(compose("config", overrides=a["overrides"]))
skip = a["skip"]  # batches that its loader prepared before the first step
steps = [e - s for s, e in zip(clock.ends[skip - 1 : -1], clock.ends[skip:])]
compute = [e - s for s, e in zip(clock.starts[skip:], clock.ends[skip:])]
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
if torch.cuda.is_available():
    peak = torch.cuda.max_memory_allocated()
print(json.dumps({"it_per_s": len(steps) / sum(steps), "data_wait": 1 - sum(compute) / sum(steps), "peak_bytes": peak,
                  "parameters": clock.parameters}))
"""


def child(python: str, code: str, task: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run code in a process of its own; what its last line of JSON says, or {"error": ...}."""
    environment = os.environ | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if options.huge_pages else {})
    done = subprocess.run(
        [python, "-c", code, json.dumps(task)], capture_output=True, text=True, check=False, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def make_data(work: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Cells, features and splits from `sest simulate`; a cache; and the same for upstream."""
    paths = {name: work / name for name in ("cells.h5ad", "features.pt", "splits.toml", "cells.zarr")}
    sest.simulate(
        paths["cells.h5ad"],
        features=paths["features.pt"],
        splits=paths["splits.toml"],
        n_genes=options.genes,
        n_features=options.n_features,
        n_perturbations=24,
        n_cells_per_perturbation=4 * options.set_size,
        n_controls=8 * options.set_size,
        expressed_genes=options.genes // 5,
        umi_per_cell=options.genes * 4 // 5,
    )
    cache = sest.embed(paths["cells.h5ad"], paths["cells.zarr"], encoder="pca", dim=options.dim, device="cpu")

    group = next(iter(cache.groups.values()))
    theirs = anndata.read_h5ad(paths["cells.h5ad"])
    totals = np.asarray(theirs.X.sum(1)).ravel()
    scaled = np.repeat(1e4 / np.maximum(totals, 1), np.diff(theirs.X.indptr)) * theirs.X.data
    log1p = np.log1p(scaled).astype(np.float32)
    theirs.X = scipy.sparse.csr_matrix(
        (log1p, theirs.X.indices.astype(np.int32), theirs.X.indptr.astype(np.int64)), shape=theirs.shape
    )
    obs = group.obs.reset_index(drop=True).astype(str).astype("category")
    obs.index = theirs.obs_names
    theirs.obs = obs.rename(columns={"perturbation": "gene", "batch": "gem_group"})
    theirs.obsm["X_sest"] = group.embeddings().astype(np.float32)
    paths["theirs.h5ad"], paths["theirs.toml"] = work / "theirs/cells.h5ad", work / "theirs.toml"
    paths["theirs.h5ad"].parent.mkdir()
    theirs.write_h5ad(paths["theirs.h5ad"])
    name = next(n for n in theirs.obs["gene"].cat.categories if n != group.attributes["columns"]["control"])
    cell_type = theirs.obs["cell_type"].cat.categories[0]
    paths["theirs.toml"].write_text(
        f'[datasets]\nbench = "{paths["theirs.h5ad"].parent}"\n[training]\nbench = "train"\n[zeroshot]\n[fewshot]\n'
        f'[fewshot."bench.{cell_type}"]\nval = ["{name}"]\ntest = ["{name}"]\n'
    )
    return paths


def our_config(paths: dict[str, Path], options: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        perturbations=str(paths["features.pt"]),
        batch_size=options.batch_size,
        set_size=options.set_size,
        hidden=options.hidden,
        max_steps=options.steps + 1,
        val_every=options.steps + 1,
        val_sets=1,
        log_every=1,
        checkpoint_every=10**9,
        precision=options.precision,
        device=options.device,
        compile=options.compile,
    )


def skipped(options: argparse.Namespace) -> int:
    """Steps of upstream that are not counted: its loader has four batches a worker ready before the first."""
    return 1 + 4 * int(options.peers_workers)


def their_overrides(paths: dict[str, Path], out: Path, options: argparse.Namespace) -> list[str]:
    hidden = options.hidden
    backbone = {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": hidden // 8,
    }  # fmt: skip
    return [
        f"data.kwargs.toml_config_path={paths['theirs.toml']}",
        f"data.kwargs.perturbation_features_file={paths['features.pt']}",
        "data.kwargs.embed_key=X_sest",
        "data.kwargs.control_pert=non-targeting",
        f"data.kwargs.num_workers={options.peers_workers}",
        f"model.kwargs.cell_set_len={options.set_size}",
        f"model.kwargs.hidden_dim={hidden}",
        "model.kwargs.n_encoder_layers=4",
        "model.kwargs.n_decoder_layers=4",
        *(f"model.kwargs.transformer_backbone_kwargs.{key}={value}" for key, value in backbone.items()),
        f"training.batch_size={options.batch_size}",
        f"training.max_steps={options.peers_steps + skipped(options)}",
        "training.val_freq=1000000",
        "++training.use_mfu=false",
        "++training.log_every_n_steps=1",
        "use_wandb=false",
        f"output_dir={out}",
        "name=bench",
    ]


def best_of(run: Any, seconds: float = 2.0) -> float:
    """Shortest time of one call, in seconds."""
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def batch_seconds(cache: Path, config: TrainConfig, options: argparse.Namespace) -> float:
    """Seconds in which one thread prepares a batch in host memory."""
    data = read_dataset(cache, config)
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, torch.device("cpu"))
    sampler = SetSampler(data.labels, data.in_split(TRAIN), options.set_size, 0)
    with closing(BatchSource(sampler, cells, options.batch_size, 0)) as batches:
        numbers = iter(range(10**9))
        return best_of(lambda: batches.get(next(numbers)))


def encoder_seconds(work: Path, options: argparse.Namespace) -> float:
    """Seconds a cell of a small SE model of random weights."""
    size = Size(n_layers=2, d_model=64, d_hid=64, output_dim=64, n_heads=4, token_dim=512, pad_length=512,
                n_genes=options.genes) if options.small else Size(n_genes=options.genes)  # fmt: skip
    device = choose_device(options.device)
    dtype = DTYPES[choose_precision(options.precision, device, training=False)]
    model = StateEncoder(load_encoder(write_encoder(work / "se", size)), device, dtype, 0)
    genes = np.arange(size.n_genes)
    kept = model.keep(genes, genes, size.n_genes)
    cells = random_cells(options.encoder_cells, size.n_genes, log1p=False)
    step = 128 if device.type == "cuda" else 4

    def encode() -> None:
        for start in range(0, cells.shape[0], step):
            part = cells[start : start + step]
            model.run(model.stage(part, np.arange(part.shape[0]), "counts", kept), kept).cpu()

    return best_of(encode) / cells.shape[0]


def limit(options: argparse.Namespace) -> dict[str, float]:
    """What a step costs in FLOPs and bytes, and what matmul and copying reach here alone."""
    device = choose_device(options.device)
    sizes = HeadSizes(options.dim, options.n_features, options.genes, options.hidden, ffn=4 * options.hidden)
    model = new_model(sizes, 0).to(device)
    precision = choose_precision(options.precision, device, training=True)
    found = measure_limit(model, options.batch_size, options.set_size, precision, seconds=2.0)
    return {
        "flops": found.flops,
        "bytes": found.bytes,
        "matmul_flops_per_s": found.flops_per_s,
        "copy_bytes_per_s": found.bytes_per_s,
        "seconds": found.seconds,
        "parameters": n_parameters(model),
    }


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run everything in the folder `work`; returns what --json writes."""
    paths = make_data(work, options)
    config = our_config(paths, options)
    runs: dict[str, list[dict[str, Any]]] = {"sest": [], "upstream": []}
    for turn in range(options.repeats):
        task = {"cache": str(paths["cells.zarr"]), "run": str(work / f"run{turn}"), "threads": options.threads}
        runs["sest"].append(child(sys.executable, OURS, {**task, "config": config.to_values()}, options))
        if not options.peers_python:
            runs["upstream"].append({"error": "no --peers-python"})
            continue
        overrides = their_overrides(paths, work / f"theirs{turn}", options)
        task = {"overrides": overrides, "threads": options.threads, "skip": skipped(options)}
        runs["upstream"].append(child(options.peers_python, PEER, task, options))
    torch.set_num_threads(options.threads)
    a_cell = encoder_seconds(work, options)
    bound = limit(options)
    n_controls = options.batch_size * options.set_size
    ours = fastest(runs["sest"])
    if not ours:
        raise SystemExit(f"sest train failed: {runs['sest'][0]['error']}")
    head = 1 / ours["it_per_s"]
    device = choose_device(options.device)
    return {
        "runs": runs,
        "batch_seconds": batch_seconds(paths["cells.zarr"], config, options),
        "encoder_in_loop": {"it_per_s": 1 / (head + a_cell * n_controls), "seconds_a_cell": a_cell,
                            "cells_encoded": options.encoder_cells, "cells_a_step": n_controls},
        "se_600m_in_loop": {"it_per_s": 1 / (head + SE_600M.flops() * n_controls / bound["matmul_flops_per_s"])},
        "limit": bound,
        "options": {key: str(value) for key, value in vars(options).items()},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            **{name: version(name) for name in ("sest", "torch")},
        },
    }  # fmt: skip


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of the most it/s; {} where none succeeded."""
    return max((run for run in runs if "error" not in run), key=lambda run: float(run["it_per_s"]), default={})


def rows(found: dict[str, Any]) -> list[tuple[str, float, dict[str, Any], str]]:
    """(name, it/s, its run, remark) of every way that was measured."""
    best = {name: fastest(runs) for name, runs in found["runs"].items()}
    loop = found["encoder_in_loop"]
    part = loop["cells_encoded"] < loop["cells_a_step"]
    remark = f"from {loop['cells_encoded']} of {loop['cells_a_step']:,} cells" if part else ""
    table = [
        ("sest", best["sest"]["it_per_s"], best["sest"], ""),
        ("encoder in the loop", loop["it_per_s"], {}, remark),
        ("SE-600M in the loop", found["se_600m_in_loop"]["it_per_s"], {}, "computed"),
    ]
    if upstream := best["upstream"]:
        table.append(("upstream", upstream["it_per_s"], upstream, ""))
    return table


def report(found: dict[str, Any]) -> None:
    """The table, at most 80 columns."""
    machine, bound, options = found["machine"], found["limit"], found["options"]
    print(
        f"sest {machine['sest']}, torch {machine['torch']}, {machine['device']} ({machine['cpu_capability']}), "
        f"{options['threads']} threads, {options['precision']}"
    )
    print(
        f"{options['batch_size']} sets x {options['set_size']} cells x {int(options['genes']):,} genes, head of width "
        f"{options['hidden']} ({bound['parameters']:,} parameters)\n"
    )
    print(f"{'':<20}{'it/s':>10}{'s a step':>10}{'sest is':>9}{'data wait':>11}{'peak':>10}")
    table = rows(found)
    for name, speed, run, remark in table:
        wait = f"{run['data_wait']:.1%}" if run else ""
        peak = f"{run['peak_bytes'] / 1e9:.2f} GB" if run else ""
        print(f"{name:<20}{speed:>10.3g}{1 / speed:>10.3g}{table[0][1] / speed:>8.1f}x{wait:>11}{peak:>10}  {remark}")
    print(f"\nOne thread prepares a batch in {found['batch_seconds']:.3f} s.")
    share = bound["seconds"] * table[0][1]
    print(
        f"Limit: {1 / bound['seconds']:.3g} it/s ({bound['flops'] / 1e9:,.0f} GFLOP at "
        f"{bound['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s of matmul alone,\n{bound['bytes'] / 1e9:.2f} GB at "
        f"{bound['copy_bytes_per_s'] / 1e9:.1f} GB/s of copying): sest is at {share:.0%} of it."
    )
    for run in found["runs"]["upstream"]:
        if "error" in run:
            print(f"Upstream was not measured: {run['error'][:200]}")
            break


def draw(found: dict[str, Any], path: Path) -> None:
    """it/s of every way as a bar chart with a logarithmic axis."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("--png needs matplotlib: pip install matplotlib") from None
    table = [(name, speed, remark) for name, speed, _, remark in rows(found)][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(table) + 1.2), layout="constrained")
    bars = axes.barh([name for name, _, _ in table], [speed for _, speed, _ in table], color="#0072B2")
    axes.bar_label(bars, [f" {speed:.3g} {remark}" for _, speed, remark in table])
    axes.axvline(1 / found["limit"]["seconds"], color="#D55E00", linestyle="--", label="limit")
    axes.set(xscale="log", xlabel="optimizer steps a second (it/s)")
    axes.margins(x=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16, help="sets a step")
    parser.add_argument("--set-size", type=int, default=128, help="cells a set")
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--dim", type=int, default=512, help="width of the embeddings")
    parser.add_argument("--n-features", type=int, default=5120, help="width of a perturbation's features")
    parser.add_argument("--hidden", type=int, default=672)
    parser.add_argument("--steps", type=int, default=4, help="of sest, after one that is not counted")
    parser.add_argument("--peers-steps", type=int, default=3, help="of upstream that are counted")
    parser.add_argument("--peers-workers", type=int, default=1, help="of its DataLoader; upstream's default is 12")
    parser.add_argument(
        "--huge-pages", action="store_true", help="glibc asks for huge pages, for sest and upstream: fewer page faults"
    )
    parser.add_argument("--encoder-cells", type=int, default=32, help="to time the encoder with")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="sest compiles the head")
    parser.add_argument("--peers-python", help="an interpreter with arc-state 0.11.1; default: upstream is left out")
    parser.add_argument("--small", action="store_true", help="4 sets x 32 cells x 2,000 genes, once")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--png", type=Path, help="draw them here")
    options = parser.parse_args()
    if options.small:
        options.batch_size, options.set_size, options.genes, options.dim = 4, 32, 2000, 64
        options.n_features, options.hidden, options.repeats, options.encoder_cells = 256, 64, 1, 128
        options.steps = options.peers_steps = 20
    with tempfile.TemporaryDirectory(prefix="train_speed-") as folder:
        found = measure(options, Path(folder))
    report(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    if options.png:
        draw(found, options.png)


if __name__ == "__main__":
    main()
