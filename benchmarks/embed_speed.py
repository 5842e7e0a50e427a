"""How fast `sest embed` encodes cells, beside upstream's own `state emb transform`, in one run.

The same random weights, cells, device and threads for both. Three things are timed, each by turns (ours, theirs, ours
...), best and median of --repeats:

    end to end   sest embed into a cache, against Inference.encode_adata into an .h5ad; loading is not counted
    encoder      batches in memory
    tokenizer    cells to sentences in one process, without the encoder; theirs is the collator of its DataLoader

Upstream (arc-state 0.11.1) need not be installed where sest is: `--peers-python /path/to/python` names an interpreter
that has it. Without one its rows say "not measured". The limit is what torch's matmul and attention reach here, alone,
on the same threads. First of all the embeddings of both are compared, on log1p values without ties.

    python benchmarks/embed_speed.py --peers-python .venv-peers/bin/python      # small model, 18,080 genes
    python benchmarks/embed_speed.py --small                                    # two minutes
    python benchmarks/embed_speed.py --full-size --folder /tmp/se600            # SE-600M's shapes, a few cells
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from encoders import SE_600M, Size, random_cells, write_cells, write_encoder

import sest
from sest.machine.devices import DTYPES, choose_device
from sest.se.model import StateEncoder
from sest.se.weights import load_encoder

# `sest embed` in a process of its own, so that its peak memory is its own.
OURS = r"""
import json, sys, time, torch
import sest, sest.embedding.embed, sest.encoder.choose
from sest.progress import Silent, reporting
class Clock(Silent):
    steps, load = [], 0.0
    def begin(self, task, total, *_): self.steps.append([task, total, time.perf_counter()])
clock, load = Clock(), sest.encoder.choose.load_encoder
def timed(*words):
    began = time.perf_counter()
    weights = load(*words)
    clock.load = time.perf_counter() - began
    return weights
sest.encoder.choose.load_encoder = timed
task = json.loads(sys.argv[1])
torch.set_num_threads(task.pop("threads"))
with reporting(clock):
    sest.embed(**task)
clock.begin("end", 0)
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({"steps": clock.steps, "load": clock.load, "peak_bytes": peak}))
"""

# Run by the interpreter that has arc-state: one line of JSON a command on standard input, one a result.
PEER = r"""
import json, sys, time, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import anndata, numpy as np, state, torch
from omegaconf import OmegaConf
from state.emb.inference import Inference
from state.emb.data import create_dataloader

start = json.loads(sys.stdin.readline())
torch.set_num_threads(start["threads"])
cfg = OmegaConf.load(Path(state.__path__[0]) / "configs" / "state-defaults.yaml")
size = start["size"]
cfg.model.update(emsize=size["d_model"], d_hid=size["d_hid"], nhead=size["n_heads"], nlayers=size["n_layers"],
                 output_dim=size["output_dim"], batch_size=start["batch_size"], num_downsample=1)
cfg.tokenizer.token_dim = size["token_dim"]
cfg.dataset.pad_length, cfg.dataset.cls_token_idx = size["pad_length"], 3
cfg.embeddings[cfg.embeddings.current].update(size=size["token_dim"], num=size["n_genes"])
for part in cfg.dataset.values():
    if OmegaConf.is_dict(part) and "num_datasets" in part:
        part.num_datasets = size["n_datasets"]
genes = torch.load(start["genes"], weights_only=False)
inference = Inference(cfg=cfg, protein_embeds=genes)
inference.load_model(start["checkpoint"])
if start["device"] == "cuda":
    inference.model.to("cuda")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    began = time.perf_counter()
    if task["what"] == "embed":
        inference.encode_adata(task["cells"], task["out"], emb_key="X_state", batch_size=start["batch_size"])
        n = len(anndata.read_h5ad(task["out"], backed="r"))
    else:
        adata = anndata.read_h5ad(task["cells"])
        loader = create_dataloader(cfg, workers=1, adata=adata, adata_name="cells",
                                   shape_dict={"cells": adata.shape}, data_dir=str(Path(task["cells"]).parent),
                                   protein_embeds=genes, precision=torch.float32, gene_column=None)
        dataset, collate = loader.dataset, loader.collate_fn
        torch.set_num_threads(1)  # as in a worker of a DataLoader
        began, n = time.perf_counter(), 0
        while n < len(adata):
            stop = min(n + start["batch_size"], len(adata))
            collate([dataset[i] for i in range(n, stop)])
            n = stop
        torch.set_num_threads(start["threads"])
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss begins at what the parent had
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    print(json.dumps({"cells_per_s": n / seconds, "peak_bytes": peak}), flush=True)
"""


class Peer:
    """Upstream in a process of its own."""

    def __init__(self, python: str, folder: Path, size: Size, options: argparse.Namespace) -> None:
        self._log = open(folder / "peer.log", "w")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [python, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        start = {
            "threads": options.threads,
            "size": size.__dict__,
            "checkpoint": str(folder / "se.ckpt"),
            "genes": str(folder / "protein_embeddings.pt"),
            "batch_size": options.peers_batch_size,
            "device": choose_device(options.device).type,
        }
        self.error = ""
        self._say(start)

    def _say(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {}
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # upstream prints, too
                found: dict[str, Any] = json.loads(line)
                return found
        self._process.wait()
        self.error = Path(self._log.name).read_text().strip().rpartition("\n")[2]
        return {}

    def embed(self, cells: Path, out: Path) -> dict[str, Any]:
        out.unlink(missing_ok=True)
        return self._say({"what": "embed", "cells": str(cells), "out": str(out)})

    def tokenize(self, cells: Path) -> dict[str, Any]:
        return self._say({"what": "tokenize", "cells": str(cells)})

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._log.close()


def embed_options(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Of `sest.embed`: the columns and the number format of upstream's embeddings."""
    encoder = str(folder / "se.ckpt")
    return {
        "encoder": encoder,
        "dim": "state",
        "dtype": "float32",
        "precision": options.precision,
        "device": options.device,
    }


def ours_end_to_end(cells: Path, folder: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Cells/s and peak memory of `sest embed`, from opening the file to the finished cache; loading is not counted."""
    task = {
        "inputs": str(cells),
        "cache": str(out),
        **embed_options(folder, options),
        "batch_size": options.batch_size,
        "threads": options.threads,
    }
    done = subprocess.run([sys.executable, "-c", OURS, json.dumps(task)], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    times = {task: (total, at) for task, total, at in result["steps"]}
    ends = [at for _, _, at in result["steps"]]
    total, _ = times["Embedding"]
    spent = {task: ends[i + 1] - at for i, (task, _, at) in enumerate(result["steps"][:-1])}
    return {
        "cells_per_s": total / (sum(spent.values()) - result["load"]),
        "seconds": spent,
        "peak_bytes": result["peak_bytes"],
    }


def best_of(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Shortest time of one call, in seconds, over calls of at least `seconds` in all."""
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def limits(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s that matmul, and attention at the model's head size, reach alone on this device."""
    n, t, width = 2048, size.pad_length + 1, size.d_model // size.n_heads
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    q, k, v = (torch.randn(2, size.n_heads, t, width, device=device, dtype=dtype) for _ in range(3))

    def seconds(run: Callable[[], torch.Tensor]) -> float:
        def to_the_end() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return best_of(to_the_end)

    with torch.inference_mode():
        matmul = seconds(lambda: a @ b)
        attention = seconds(lambda: F.scaled_dot_product_attention(q, k, v))
    return {"matmul": 2 * n**3 / matmul, "attention": 2 * 4 * t * t * size.d_model / attention}


def share_of_limit(size: Size, cells_per_s: float, limit: dict[str, float]) -> float:
    """Time the limits give to a cell, over the time it takes."""
    t, d = size.pad_length + 1, size.d_model
    attention = (size.n_layers - 1) * 4 * t * t * d
    seconds = attention / limit["attention"] + (size.flops() - attention) / limit["matmul"]
    return cells_per_s * seconds


def compare(peer: Peer, folder: Path, size: Size, options: argparse.Namespace, work: Path) -> float | None:
    """Largest difference between upstream's embeddings and ours, on log1p values without ties."""
    cells = write_cells(work / "agree.h5ad", random_cells(min(8, options.cells), size.n_genes, log1p=True))
    if not peer.embed(cells, work / "agree-theirs.h5ad"):
        return None
    cache = sest.embed(cells, work / "agree.zarr", **embed_options(folder, options))
    with h5py.File(work / "agree-theirs.h5ad") as file:
        theirs = file["obsm/X_state"][:]
    return float(np.abs(theirs - cache.groups["agree"].embeddings()).max())


def encoder_and_tokenizer(
    folder: Path, size: Size, values: scipy.sparse.csr_matrix, options: argparse.Namespace
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Functions that measure our cells/s of the encoder alone and of the tokenizer alone."""
    torch.set_num_threads(options.threads)
    model = StateEncoder(load_encoder(folder / "se.ckpt"), choose_device(options.device), DTYPES[options.precision], 0)
    genes = np.arange(size.n_genes)
    kept = model.keep(genes, genes, size.n_genes)
    batch = values[: options.batch_size or 4]
    numbers = np.arange(values.shape[0])
    staged = model.stage(batch, numbers[: batch.shape[0]], "counts", kept)
    many = scipy.sparse.vstack([values] * max(1, 256 // values.shape[0]), format="csr")

    def encode() -> float:
        return batch.shape[0] / best_of(lambda: model.run(staged, kept).cpu(), 2.0)

    def tokenize() -> float:
        places = np.arange(many.shape[0])
        return many.shape[0] / best_of(lambda: model.stage(many, places, "counts", kept))

    return encode, tokenize


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; returns what --json writes."""
    work = Path(tempfile.mkdtemp(prefix="embed_speed-"))
    size = SE_600M if options.full_size else Size(
        options.layers, options.d_model, options.d_hid, options.d_model, options.heads, options.token_dim,
        options.pad_length, options.genes,
    )  # fmt: skip
    folder = options.folder or work / "se"
    if not (folder / "se.ckpt").exists():
        write_encoder(folder, size)
    device = choose_device(options.device)
    values = random_cells(options.cells, size.n_genes, log1p=False)
    cells = write_cells(work / "cells.h5ad", values)
    peer = Peer(options.peers_python, folder, size, options)
    found: dict[str, Any] = {"ours": {}, "theirs": {}, "agreement": None}
    if not peer.error:
        found["agreement"] = compare(peer, folder, size, options, work)
    encode, tokenize = encoder_and_tokenizer(folder, size, values, options)
    for turn in range(options.repeats):
        runs: dict[str, dict[str, Any]] = {
            "ours": {
                "end to end": ours_end_to_end(cells, folder, work / f"{turn}.zarr", options),
                "encoder": {"cells_per_s": encode()},
                "tokenizer": {"cells_per_s": tokenize()},
            },
            "theirs": {
                "end to end": {} if peer.error else peer.embed(cells, work / "theirs.h5ad"),
                "tokenizer": {} if peer.error or options.full_size else peer.tokenize(cells),
            },
        }
        for side, parts in runs.items():
            for part, result in parts.items():
                if result:
                    found[side].setdefault(part, []).append(result)
    peer.close()
    found["limit"] = limits(size, device, DTYPES[options.precision])
    ours = max(run["cells_per_s"] for run in found["ours"]["end to end"])
    found |= {
        "size": size.__dict__,
        "flops_per_cell": size.flops(),
        "share_of_limit": share_of_limit(size, ours, found["limit"]),
        "not_measured": peer.error or None,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": options.threads,
            "precision": options.precision,
            "batch_sizes": [options.batch_size or "auto", options.peers_batch_size],
            **{name: version(name) for name in ("sest", "torch")},
        },
    }
    return found


def report(found: dict[str, Any]) -> None:
    """The table, at most 80 columns."""
    machine, limit = found["machine"], found["limit"]
    print(
        f"sest {machine['sest']}, torch {machine['torch']}, {machine['device']} ({machine['cpu_capability']}), "
        f"{machine['threads']} threads, {machine['precision']}"
    )
    print(
        f"batch sizes (ours, upstream's): {machine['batch_sizes']}; {found['flops_per_cell'] / 1e9:.2f} GFLOP a cell\n"
    )
    print(f"{'cells/s, best (median)':<24}{'sest':>18}{'upstream':>18}{'ratio':>9}")
    for part in ("end to end", "encoder", "tokenizer"):
        sides = []
        for side in ("ours", "theirs"):
            speeds = [run["cells_per_s"] for run in found[side].get(part, [])]
            sides.append((max(speeds), statistics.median(speeds)) if speeds else None)
        texts = [f"{s[0]:,.4g} ({s[1]:,.4g})" if s else "not measured" for s in sides]
        ratio = f"{sides[0][0] / sides[1][0]:.2f}x" if sides[0] and sides[1] else ""
        print(f"{part:<24}{texts[0]:>18}{texts[1]:>18}{ratio:>9}")
    peaks = [
        f"{max(run['peak_bytes'] for run in found[side]['end to end']) / 1e9:.2f} GB" if found[side] else "not measured"
        for side in ("ours", "theirs")
    ]
    print(f"{'peak memory':<24}{peaks[0]:>18}{peaks[1]:>18}")
    speed = max(run["cells_per_s"] for run in found["ours"]["end to end"])
    reached = f"{limit['matmul'] / 1e9:,.0f}, its attention {limit['attention'] / 1e9:,.0f}"
    print(f"\n{speed * found['flops_per_cell'] / 1e9:,.0f} GFLOP/s end to end; alone, torch's matmul reaches")
    print(f"{reached}: {found['share_of_limit']:.0%} of the limit.")
    if found["agreement"] is not None:
        print(f"Largest difference between the embeddings: {found['agreement']:.1e}.")
    if found["not_measured"]:
        print(f"Upstream was not measured: {found['not_measured'][:200]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = Size()
    parser.add_argument("--layers", type=int, default=small.n_layers)
    parser.add_argument("--d-model", type=int, default=small.d_model)
    parser.add_argument("--d-hid", type=int, default=small.d_hid)
    parser.add_argument("--heads", type=int, default=small.n_heads)
    parser.add_argument("--token-dim", type=int, default=small.token_dim)
    parser.add_argument("--genes", type=int, default=small.n_genes)
    parser.add_argument("--pad-length", type=int, default=small.pad_length)
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=0, help="of sest; 0: as it chooses")
    parser.add_argument("--peers-batch-size", type=int, default=16)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter with arc-state")
    parser.add_argument("--folder", type=Path, help="a folder of benchmarks/encoders.py to use instead of a new one")
    parser.add_argument("--full-size", action="store_true", help="SE-600M's shapes; two cells, once")
    parser.add_argument("--small", action="store_true", help="16 cells, once")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    if options.full_size:
        options.cells, options.repeats, options.peers_batch_size = min(options.cells, 2), 1, 1
    if options.small:
        options.cells, options.repeats = 16, 1
    found = measure(options)
    report(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
