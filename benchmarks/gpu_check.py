"""Whether sest works on this GPU, whether it is right, and how fast it is: one command, under 8 minutes, no internet.

    python benchmarks/gpu_check.py --out gpu.json
    python benchmarks/gpu_check.py --device cpu --small        # the script itself, where there is no GPU

Every section is written to the file at once; one that fails leaves its error there and the next one runs. A second
`--only steps,embed` adds to the file. SIGTERM ends it after what is written; the last line is a row for a table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from embed_ops import encoder_of
from encoders import SE_600M, Size, gene_names, random_cells, random_tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import sest.head.kernels
import sest.se.attention
from sest.config import TrainConfig
from sest.head.dropout import dropout_keys
from sest.head.loss import energy_distance
from sest.head.model import HeadSizes, new_model
from sest.machine.devices import DTYPES, autocast, choose_device, choose_precision, float32_products
from sest.machine.team import ALONE
from sest.runs.checkpoint import find_checkpoint, open_checkpoint
from sest.runs.run_folder import CONFIG, METRICS, append_metrics
from sest.runs.schema import LAST
from sest.se.model import StateEncoder
from sest.se.weights import EncoderWeights
from sest.training.prepare import prepare
from sest.training.trainer import Trainer

Found = dict[str, Any]
SMALL = Size(2, 64, 64, 64, 4, 128, 128, 600)  # of an encoder


@dataclass
class Check:
    """What is checked, where, and what was found."""

    device: torch.device
    small: bool
    work: Path
    peers_python: str | None = None
    found: Found = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def head(self) -> Found:
        """Options of `sest train`: the default sizes, or small ones."""
        return {"batch_size": 4, "set_size": 16, "hidden": 64} if self.small else {}

    @property
    def n_genes(self) -> int:
        return 500 if self.small else 18_080

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Free what a section left, and begin a new peak of memory."""
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> Found:
        return {"peak_gb": torch.cuda.max_memory_allocated(self.device) / 1e9} if self.gpu else {}

    def seconds(self, run: Callable[[], object], at_least: float = 0.3) -> float:
        """Median seconds of one call, waited for."""
        run()
        times: list[float] = []
        while sum(times) < (0.0 if self.small else at_least) or len(times) < 3:
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return float(np.median(times))

    def trainer(self, name: str, *, resume: bool = False, **options: Any) -> Trainer:
        """A training of simulated cells, before its first step."""
        run = self.work / name
        config = TrainConfig(
            perturbations=str(self.work / "features.safetensors"),
            val_sets=1, max_steps=10**6, device=str(self.device), scratch=str(self.work),
            **self.head | {"compile": False} | options,
        )  # fmt: skip
        run.mkdir(exist_ok=True)
        (run / CONFIG).touch()  # a run folder, into which checkpoints are written
        start = open_checkpoint(find_checkpoint(run, LAST)) if resume else None
        return prepare(self.work / "cells.zarr", run, config, self.device, ALONE, start)


def environment(check: Check) -> Found:
    """Versions, and what the device reaches alone: products, copies, copies from the host, starts of kernels."""
    found: Found = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    found |= {"cores": os.cpu_count(), "cuda": torch.version.cuda}
    for package in ("sest", "torch", "numpy", "pandas", "zarr", "anndata", "numba", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    n = 512 if check.small else 8192
    for name in ("float32", *(("bfloat16", "float16") if check.gpu else ())):
        a = torch.randn(n, n, device=check.device, dtype=getattr(torch, name))
        found[f"{name}_tflops"] = 2 * n**3 / check.seconds(partial(torch.mm, a, a)) / 1e12
    source = torch.ones(2**20 if check.small else 2**28, device=check.device)
    out = torch.empty_like(source)
    found["copy_gb_s"] = 2 * source.nbytes / check.seconds(lambda: out.copy_(source)) / 1e9
    if check.gpu:
        properties = torch.cuda.get_device_properties(check.device)
        found |= {"device": properties.name, "memory_gb": properties.total_memory / 1e9}
        host = torch.ones(2**26, pin_memory=True)
        there = out[: len(host)]
        found["from_host_gb_s"] = host.nbytes / check.seconds(lambda: there.copy_(host, non_blocking=True)) / 1e9
    one = torch.ones(1, device=check.device)
    found["launch_us"] = 1e6 / 500 * check.seconds(lambda: [one.add_(1) for _ in range(500)])
    return found


def _exact_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """The energy distance in float64, all differences written out."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, :, None] - b[:, None]).square().sum(3).clamp_min(1e-8).sqrt().mean((1, 2))

    return mean(predicted, target) - 0.5 * mean(predicted, predicted) - 0.5 * mean(target, target)


def parity(check: Check) -> Found:
    """Loss and gradient of a step in every precision against float64 on the CPU."""
    n_sets, set_size, n_genes = (2, 8, 200) if check.small else (2, 32, 2000)
    sizes = HeadSizes(128, 256, n_genes, 128, ffn=512)
    generator = torch.Generator().manual_seed(1)
    basal = torch.randn(n_sets, set_size, 128, generator=generator)
    features = torch.randn(n_sets, 256, generator=generator)
    target = 4 * torch.rand(n_sets, set_size, n_genes, generator=generator) - 3
    target, keys = target.clamp_min(0.0), dropout_keys(0, torch.arange(n_sets))

    def gradient(loss: Tensor, model: torch.nn.Module, scale: float = 1.0) -> tuple[float, Tensor]:
        (loss * scale).backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(parts).double().cpu() / scale

    exact = new_model(sizes, 0).double().train()
    expected, slope = gradient(
        _exact_distance(exact(basal.double(), features.double(), keys), target.double()).sum(), exact
    )
    found: Found = {}
    for precision in ("fp32", "tf32", "bf16", "fp16") if check.gpu else ("fp32", "bf16"):
        model = new_model(sizes, 0).to(check.device).train()
        with autocast(check.device, precision):
            predicted = model(basal.to(check.device), features.to(check.device), keys.to(check.device))
        gram = torch.float16 if check.gpu and precision != "fp32" else torch.float32
        loss = energy_distance(predicted, target.to(check.device), gram).sum()
        with float32_products(precision):
            value, ours = gradient(loss, model, 2.0**12 if precision == "fp16" else 1.0)
        found[precision] = {
            "loss": abs(value / expected - 1),
            "gradient": float((ours - slope).norm() / slope.norm()),
            "cosine": float(torch.nn.functional.cosine_similarity(ours, slope, dim=0)),
        }
    return found


def data(check: Check) -> Found:
    """Simulated cells and their cache, for the sections that train."""
    size = check.head.get("set_size", 128)
    work, n_genes = check.work, check.n_genes
    sest.simulate(
        work / "cells.h5ad", features=work / "features.safetensors", n_genes=n_genes,
        n_features=64 if check.small else 5120, n_perturbations=12, n_cells_per_perturbation=4 * size,
        n_controls=8 * size, expressed_genes=n_genes // 5, umi_per_cell=n_genes * 4 // 5,
    )  # fmt: skip
    cache = sest.embed(work / "cells.h5ad", work / "cells.zarr", encoder="pca", dim=32 if check.small else 512)
    return {"cells": cache.n_cells}


def syncs(check: Check) -> Found:
    """Lines of a step, and of a batch that is embedded, that make the host wait for the GPU: none should."""
    if not check.gpu:
        return {"skipped": "needs a GPU"}
    found: Found = {}
    for place in ("gpu", "cpu"):
        trainer = check.trainer(f"syncs-{place}", data_device=place)
        with closing(trainer.batches), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(4):
                trainer.step()
            torch.cuda.set_sync_debug_mode("warn")
            trainer.step()
            torch.cuda.set_sync_debug_mode("default")
        found[place] = _waits(seen)
    encoder = encoder_of(SMALL, "bf16", check.device)
    cells, numbers = random_cells(8, SMALL.n_genes, log1p=False), np.arange(8)
    file: Any = SimpleNamespace(group="cells", scale="counts")
    encoder.encode(file, cells, numbers)
    staged = encoder.stage(file, cells, numbers)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        embeddings = encoder.start(file, staged)
        torch.cuda.set_sync_debug_mode("default")
    embeddings()
    return found | {"embed": _waits(seen)}


def _waits(seen: list[warnings.WarningMessage]) -> list[str]:
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)})


WAYS: dict[str, Found] = {  # of training; on a CPU those without a GPU's options
    "resident": {"data_device": "gpu"},
    "resident, compiled": {"data_device": "gpu", "compile": True},
    "host": {"data_device": "cpu"},
    "host, 8 threads": {"data_device": "cpu", "num_workers": 8},
    "disk": {"data_device": "disk"},
    "controls of the batch": {"match_controls": "batch"},
    "accumulate 2": {"accumulate": 2},
    "accumulate 2, compiled": {"accumulate": 2, "compile": True},
    "fp16": {"precision": "fp16"},
    "fp32": {"precision": "fp32"},
    "tf32": {"precision": "tf32"},
}


def _possible(check: Check, options: Found) -> bool:
    """Whether a device can do it, and in the small form whether it adds to what is tried."""
    if check.small and options in ({"accumulate": 2}, WAYS["host, 8 threads"]):
        return False
    return check.gpu or not (options.get("compile") or options.get("precision") or options.get("data_device") == "gpu")


def steps(check: Check) -> Found:
    """it/s of `sest train`'s own steps, by where cells are kept and how they are computed."""
    warm, n = (2, 4) if check.small else (12, 200)
    found: Found = {}
    for name, options in WAYS.items():
        if not _possible(check, options):
            continue
        try:
            trainer = check.trainer(f"steps-{len(found)}", **options)
            with closing(trainer.batches):
                for _ in range(warm):
                    trainer.step()
                trainer.log_line()
                began = time.perf_counter()
                for _ in range(n):
                    trainer.step()
                given = time.perf_counter() - began
                line = trainer.log_line()
            wanted = ("it_per_s", "data_wait", "device_wait", "limit_it_per_s", "limited_by", "loss")
            found[name] = {key: line[key] for key in wanted if key in line} | {"host_ms": 1e3 * given / n}
            found[name] |= check.peak()
        except Exception as error:  # noqa: BLE001  the other ways are measured
            found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
        check.forget()
    return found


def kernels(check: Check) -> Found:
    """Kernels of a step, the time they take together, and those that take most."""
    if not check.gpu:
        return {"skipped": "needs a GPU"}
    from torch.profiler import ProfilerActivity, profile

    found: Found = {}
    for name in ("resident", "resident, compiled"):
        trainer, n = check.trainer(f"kernels-{len(found)}", **WAYS[name]), 5
        with closing(trainer.batches):
            for _ in range(6):
                trainer.step()
            check.wait()
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
                for _ in range(n):
                    trainer.step()
                check.wait()
        events = [e for e in profiled.events() or [] if str(e.device_type).endswith("CUDA")]
        took: Counter[str] = Counter()
        for event in events:
            took[event.name[:90]] += event.device_time_total / 1e3 / n
        found[name] = {
            "kernels": len(events) / n,
            "busy_ms": sum(took.values()),
            "most_ms": {kernel: round(ms, 4) for kernel, ms in took.most_common(14)},
        }
    return found


def triton(check: Check) -> Found:
    """Operations of `sest.head.kernels` at full size: ms by Triton and by PyTorch, and how far they differ."""
    if not check.gpu:
        return {"skipped": "needs a GPU; tests/head/test_triton_kernels.py has Triton's interpreter"}
    plain, own = sest.head.kernels, sest.head.kernels.triton_kernels(check.device)
    if own is None:
        return {"works": False}
    n, n_genes, at = 16 if check.small else 2048, check.n_genes, Found(device=check.device)
    length = torch.full((n,), n_genes // 5, **at)
    genes = torch.rand(n, n_genes, **at).argsort(1)[:, : n_genes // 5].flatten().short()
    cells = (length.cumsum(0) - length, length, torch.rand(n, **at) + 0.1, genes, torch.ones_like(genes))
    whole, one = (torch.randn(n // 8, 8, width, **at) for width in (n_genes, 1))
    gates = torch.randn(3, n, 2688, **at).bfloat16()
    given: dict[str, Any] = {
        "centre_and_largest": (whole,),
        "add_norm": (gates[0].clone(), gates[1], gates[2, 0], gates[2, 1], 1e-5),
        "swiglu": tuple(gates[1:]),
        "swiglu_backward": tuple(gates),
        "set_keys": (torch.arange(16, **at), 7),
        "kept_units": (torch.arange(16, dtype=torch.int32, **at), 3, 6, 42 * n, 2**28),
        "dense_rows": (*cells, n_genes, len(genes)),
        "weighted_sum": (whole, whole.half(), one, whole[:, :1], one, one[:, :1], torch.bfloat16),
    }
    found: Found = {"works": True}
    for name, arguments in given.items():
        ours, theirs = partial(getattr(own, name), *arguments), partial(getattr(plain, f"plain_{name}"), *arguments)
        a, b = (torch.cat([t.flatten().double() for t in tree_leaves(run())]) for run in (ours, theirs))
        found[name] = {
            "triton_ms": 1e3 * check.seconds(ours),
            "torch_ms": 1e3 * check.seconds(theirs),
            "difference": float((a - b).abs().max() / b.abs().max()),
        }
    return found


def _weights(check: Check, name: str, n: int, **options: Any) -> Tensor:
    trainer = check.trainer(name, **options)
    with closing(trainer.batches):
        for _ in range(n):
            trainer.step()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).double().cpu()


def equality(check: Check) -> Found:
    """What compiled steps move weights by, beside what the same steps in float32 do: of the eager steps' own way."""
    if not check.gpu:
        return {"skipped": "compiling takes a minute on a CPU; tests/training has it"}
    n, found = 6, dict[str, Any]()
    ways: dict[str, Found] = {"": {}, "accumulate 2": {"accumulate": 2}}
    for name, options in ways.items():
        start, eager = (_weights(check, f"equal-{name}-{k}", k, **options) for k in (0, n))
        for other in ("compile", "fp32"):
            more: Found = {"compile": True} if other == "compile" else {"precision": "fp32"}
            moved = _weights(check, f"equal-{name}-{other}", n, **options, **more)
            found[f"{other} {name}".strip()] = float((moved - eager).norm() / (eager - start).norm())
    return found


def graph(check: Check) -> Found:
    """A CUDA graph of whole steps, which `sest train` does not take: what its weights are off by, and its it/s."""
    if not check.gpu:
        return {"skipped": "needs a GPU; tests/test_step_ops.py has what the host decides in a step"}
    n, found = 10, dict[str, Any]()
    start, eager = (_weights(check, f"graph-{k}", k, data_device="gpu") for k in (0, n))
    for name, options in (("eager", {}), ("compiled", {"compile": True})):
        try:
            weights, it_per_s = _recorded(check, f"graph-{name}", n, **options)
            off = float((weights - eager).norm() / (eager - start).norm())
            found[name] = {"off": off, "it_per_s": it_per_s, **check.peak()}
        except Exception as error:  # noqa: BLE001  the other way is tried
            found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
        check.forget()
    return found


def _recorded(check: Check, name: str, n: int, warm: int = 4, **options: Any) -> tuple[Tensor, float]:
    """Weights after n steps, of which all but the first few are a graph's, and it/s of 100 more."""
    with mock.patch.object(Trainer, "_graphs", False):  # those of the compiler, which would stand inside
        trainer = check.trainer(name, data_device="gpu", **options)
        get, batch = trainer.batches.get, dict[str, Tensor]()

        def in_place(number: int) -> Any:
            for key, value in dict[str, Any](get(number)).items():
                batch.setdefault(key, torch.empty_like(value)).copy_(value)
            return batch

        def take(first: int, last: int) -> None:
            for number in range(first, last):
                in_place(number)
                recorded.replay()

        with closing(trainer.batches):
            aside, recorded = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside), mock.patch.object(trainer.batches, "get", in_place):
                for _ in range(warm):
                    trainer.step()
            torch.cuda.current_stream().wait_stream(aside)
            recording = torch.cuda.graph(recorded, capture_error_mode="thread_local")  # other threads send batches
            with recording, mock.patch.object(trainer.batches, "get", return_value=batch):
                trainer.step()  # recorded, and not run
            take(warm, n)
            weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).double().cpu()
            began = time.perf_counter()
            take(n, n + 100)
            check.wait()
            return weights, 100 / (time.perf_counter() - began)


def _files(check: Check, name: str, *parts: int, **options: Any) -> list[str]:
    """sha256 of the checkpoint after these numbers of steps, each in a trainer that resumes the one before."""
    for i, n in enumerate(parts):
        trainer = check.trainer(name, resume=i > 0, **options)
        with closing(trainer):
            for _ in range(n):
                trainer.step()
            append_metrics(trainer.run / METRICS, trainer.log_line())
            trainer.save_last()
    files = [check.work / name / LAST / f"{kind}.safetensors" for kind in ("model", "optimizer")]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    shutil.rmtree(check.work / name)
    return hashes


def resume(check: Check) -> Found:
    """Whether the same steps give the same bytes: twice, and stopped half-way; also in sets of over 128 cells."""
    found: Found = {}
    for size in (check.head.get("set_size", 128), 16 if check.small else 256):
        options = {"set_size": size, "batch_size": 4}
        whole = _files(check, f"resume-{size}-a", 8, **options)
        found[f"set_size {size}"] = {
            "twice": _files(check, f"resume-{size}-b", 8, **options) == whole,
            "resumed": _files(check, f"resume-{size}-c", 4, 4, **options) == whole,
        }
    return found


def embed(check: Check) -> Found:
    """Cells a second of an SE encoder of random weights in every precision and batch size, and its cosine to fp32."""
    size = SMALL if check.small else SE_600M
    tensors, vectors = random_tensors(size)
    weights = EncoderWeights(
        tensors, size.n_heads, size.pad_length, 3, tuple(gene_names(size.n_genes)), vectors, "0", "random"
    )
    cells = random_cells(4 if check.small else 256, size.n_genes, log1p=False)
    genes, exact, found = np.arange(size.n_genes), None, dict[str, Any]()
    for precision in ("fp32", "tf32", "bf16", "fp16") if check.gpu else ("fp32",):
        try:
            choose_precision(precision, check.device, training=False)
            model = StateEncoder(weights, check.device, DTYPES[precision], 0)
            kept = model.keep(genes, genes, size.n_genes)

            def run(n: int, model: StateEncoder = model, kept: Any = kept, precision: str = precision) -> Tensor:
                with float32_products(precision):
                    return model.encode(cells[:n], np.arange(n), "counts", kept)[:, : model.native_dim].double().cpu()

            out = run(min(8, cells.shape[0]))
            exact = out if exact is None else exact
            cosine = float(torch.nn.functional.cosine_similarity(out, exact).min())
            found[precision] = {"cosine": cosine, "attention": model.attention_kernel}
            for n in (4,) if check.small else (16,) if precision.endswith("32") else (32, 64, 128, 256):
                check.forget()
                found[precision][f"batch {n}"] = {"cells_per_s": n / check.seconds(partial(run, n)), **check.peak()}
            del model, kept
        except Exception as error:  # noqa: BLE001  the other precisions are measured
            found[precision] = found.get(precision, {}) | {"error": f"{type(error).__name__}: {error}"[:400]}
    return found


def attention(check: Check) -> Found:
    """TFLOP/s of each of PyTorch's kernels for attention at SE-600M's sizes, in bf16; 330 and 545 are modelled."""
    if not check.gpu:
        return {"skipped": "needs a GPU"}
    n, rows, width, n_heads = 2 if check.small else 16, 2049, 2048, 16
    packed = torch.randn(n, rows, 3 * width, device=check.device, dtype=torch.bfloat16)
    q, k, v = packed.split(width, dim=-1)
    found: Found = {}
    for backend in (None, *SDPBackend.__members__.values()):
        if backend in (SDPBackend.ERROR, SDPBackend.OVERRIDEABLE):
            continue
        name = "as PyTorch chooses" if backend is None else backend.name
        try:
            with torch.inference_mode(), nullcontext() if backend is None else sdpa_kernel(backend):
                took = check.seconds(lambda: sest.se.attention.attention(q, k, v, n_heads))
            found[name] = 4e-12 * n * rows**2 * width / took
        except RuntimeError as error:
            found[name] = {"not here": str(error)[:200]}
    return found


def stop(check: Check) -> Found:
    """What SIGTERM does to `sest train`: its exit code (143), and seconds until it had saved."""
    run = check.work / "stop"
    words = ["train", check.work / "cells.zarr", "-r", run, "--device", check.device, "--log-every", 1]
    words += ["--perturbations", check.work / "features.safetensors", "--val-every", 10**6]
    words += [word for key, value in check.head.items() for word in (f"--{key.replace('_', '-')}", value)]
    process = subprocess.Popen(
        [sys.executable, "-m", "sest", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.perf_counter() + 120
        while not (run / METRICS).exists() and process.poll() is None and time.perf_counter() < until:
            time.sleep(0.05)
        began = time.perf_counter()
        process.terminate()
        code = process.wait(60)
    finally:
        process.kill()
    return {"exit_code": code, "seconds": time.perf_counter() - began, "saved": (run / LAST / "state.json").exists()}


def upstream(check: Check) -> Found:
    """it/s of upstream's `state tx train`, where an interpreter that has it is named (see train_speed.py)."""
    if not check.peers_python:
        return {"skipped": "no --peers-python"}
    out = check.work / "peers.json"
    words = ["--peers-python", check.peers_python, "--json", out, "--device", check.device, "--repeats", 1]
    script = Path(__file__).with_name("train_speed.py")
    subprocess.run([sys.executable, str(script), *map(str, words)], check=True, capture_output=True)
    runs = json.loads(out.read_text())["runs"]
    return {"sest": runs["sest"][0], "upstream": runs["upstream"][0]}


SECTIONS = (
    environment,
    parity,
    data,
    syncs,
    steps,
    kernels,
    triton,
    equality,
    graph,
    resume,
    stop,
    embed,
    attention,
    upstream,
)


def run_section(section: Callable[[Check], Found], check: Check) -> None:
    """Run it; its result, or its error, is in `check.found`."""
    began = time.perf_counter()
    try:
        found = section(check)
    except Exception as error:  # noqa: BLE001  the next section runs
        found = {"error": f"{type(error).__name__}: {error}"[:600], "where": traceback.format_exc().splitlines()[-8:]}
    check.found[section.__name__] = found | {"took_s": round(time.perf_counter() - began, 1)}
    check.forget()


def row(found: Found) -> str:
    """A row for a table of machines, under its head."""

    def of(*path: str) -> str:
        value: Any = found
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = {
        "device": of("environment", "device"),
        "torch": of("environment", "torch"),
        "resident it/s": of("steps", "resident", "it_per_s"),
        "compiled": of("steps", "resident, compiled", "it_per_s"),
        "host": of("steps", "host", "it_per_s"),
        "disk": of("steps", "disk", "it_per_s"),
        "waits": of("syncs", "gpu"),
        "kernels": of("kernels", "resident", "kernels"),
        "SE bf16 cells/s": of("embed", "bf16", "batch 128", "cells_per_s"),
        "resumed": of("resume", "set_size 128", "resumed"),
        "SIGTERM": of("stop", "exit_code"),
    }
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), columns.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="gets all that was found")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--only", help=f"sections, separated by commas: {', '.join(s.__name__ for s in SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=460, help="no section begins after these")
    parser.add_argument("--peers-python", help="an interpreter with arc-state 0.11.1")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [section.__name__ for section in SECTIONS]
    unknown = set(names) - {section.__name__ for section in SECTIONS}
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}")
    began, work = time.perf_counter(), Path(tempfile.mkdtemp(prefix="gpu_check-"))
    check = Check(choose_device(options.device), options.small, work, options.peers_python)
    check.found = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    trains = {"syncs", "steps", "kernels", "equality", "graph", "resume", "stop"} & set(names)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for section in SECTIONS:
            name = section.__name__
            if name not in names and not (section is data and trains):
                continue
            if time.perf_counter() - began > options.seconds:
                check.found[name] = {"skipped": f"no time left of {options.seconds:.0f} seconds"}
            else:
                run_section(section, check)
            options.out.write_text(json.dumps(check.found, indent=1, default=str) + "\n")
            print(name, json.dumps(check.found[name], default=str)[:2000], flush=True)
    finally:
        print(row(check.found), flush=True)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
