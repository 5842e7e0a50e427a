"""What a training step asks of a GPU, counted without one: operations, bytes, FLOPs, and whatever would make it wait.

The step of `sest train` itself runs on PyTorch's meta device, whose tensors have shapes and no numbers: it takes the
path of a GPU, and each operation is written down as it is dispatched. An operation whose result depends on numbers
(`.item()`, `nonzero`) cannot be computed there and fails, as it would make a GPU's step wait.

    python benchmarks/step_ops.py                     # 16 sets x 128 cells x 18,080 genes, bf16
    python benchmarks/step_ops.py --most 30           # and the 30 operations that move most
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import sest.training.prepare
from sest.config import TrainConfig
from sest.data.resident import ResidentCells, resident_cells
from sest.data.sampler import SetRows
from sest.data.targets import Targets
from sest.head.loss import HeadLoss, make_loss
from sest.head.model import HeadSizes, StateTransition
from sest.machine.devices import DTYPES
from sest.machine.team import ALONE
from sest.training.trainer import RunState, Trainer

META = torch.device("meta")
PHASES = ("data", "forward", "loss", "backward", "update")
MODELLED_BYTES_PER_S = 2.6e12
# FLOP/s of attention's forward pass on an H100 at heads of 128 over 2,049 tokens: what others measured over 2,048 (362
# and 617 TFLOP/s: Shah et al. 2024, FlashAttention-3, figure 5), less as much as the last tiles of 128 are empty
ATTENTION = {"flash": 330e12, "cudnn": 545e12}
# operations that give another view of a tensor, or memory that nobody has written
FREE = set(
    "view _unsafe_view t transpose expand slice select unsqueeze squeeze permute detach alias as_strided diagonal "
    "unbind split unflatten _reshape_alias lift_fresh split_with_sizes empty empty_like empty_strided new_empty "
    "new_empty_strided".split()
)


@dataclass(frozen=True)
class Op:
    """An operation of a step: one kernel or more."""

    phase: str  # data, forward, loss, backward or update
    name: str
    out: str  # type and shape
    n_bytes: int  # read and written
    flops: int
    from_host: bool  # a copy from the host
    waits: bool  # a copy of or to memory that is not pinned, or one that asks to be waited for
    most: int = 0  # numbers in its largest tensor
    from_python: tuple[float, ...] = ()  # the numbers that the host gives it, which a CUDA graph would repeat

    @property
    def modelled_ms(self) -> float:
        """What it would take on an H100 by a simple model; not measured.

        What an operation moves goes at 2.6 of the 3.35 TB/s, its products at 600 TFLOP/s where they fill the GPU and at
        430 or 230 where they are small, and nothing takes less than a kernel's 2.2 us. Large attention: `ATTENTION`.
        """
        if not self.flops:
            return 1e3 * max(self.n_bytes / MODELLED_BYTES_PER_S, 2.2e-6)
        rate = 600e12 if self.flops > 3e10 else 430e12 if self.flops > 5e9 else 230e12
        if rate == 600e12 and "attention" in self.name:
            rate = next(rate for kernel, rate in ATTENTION.items() if kernel in self.name)
        return 1e3 * max(self.flops / rate + 2e-6, self.n_bytes / MODELLED_BYTES_PER_S, 4e-6)


def _span(tensor: Tensor) -> int:
    """Bytes of the numbers that a tensor holds; those of expanded axes count once."""
    n = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        n *= size if stride or not size else 1
    return n


class Trace(TorchDispatchMode):
    """Writes down the operations on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.phase = "data"
        self._pinned: set[int] = set()  # where pinned memory begins

    def pin(self, n: int, *, pinned: bool) -> Tensor:
        """Memory of the host that passes for pinned, as there is none without CUDA."""
        memory = torch.empty(n, dtype=torch.uint8)
        if pinned:
            self._pinned.add(memory.untyped_storage().data_ptr())
        return memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if (back := self._to_host(name, args, kwargs)) is not None:
            return back
        with self:  # operations that are others in PyTorch stay whole where no gradient is kept
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        given = {key: value for key, value in kwargs.items() if key != "out"}
        inputs = [t for t in tree_leaves((args, given)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        places = {t.device.type for t in (*inputs, *outputs)}
        if name in FREE or "meta" not in places:
            return out
        flops = 0
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            flops = 2 * outputs[0].numel() * (inputs[0].shape[-1] if name == "linear" else inputs[-1].shape[-2])
        elif "attention" in name:
            flops = int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
        written = outputs or (inputs if name.endswith("_") else [])  # _foreach_..._ return nothing
        moved = sum(map(_span, inputs)) + sum(map(_span, written))
        hosts = [t for t in inputs if t.device.type == "cpu"] if name in ("_to_copy", "copy_") else []
        pinned = all(t.untyped_storage().data_ptr() in self._pinned for t in hosts)
        waits = bool(hosts) and not (pinned and (kwargs.get("non_blocking") or args[2:] == (True,)))
        shape = f"{str(outputs[0].dtype)[6:]}{list(outputs[0].shape)}" if outputs else ""
        most = max(t.numel() for t in (*inputs, *outputs))
        given_numbers = tuple(n for n in tree_leaves((args, kwargs)) if isinstance(n, int | float))
        self.ops.append(Op(self.phase, name, shape, moved, flops, bool(hosts), waits, most, given_numbers))
        return out

    def _to_host(self, name: str, args: Any, kwargs: Any) -> Tensor | None:
        """Note a copy to the host, which the meta device cannot make, and give the host's memory, all zeros."""
        if name == "copy_" and args[0].device.type == "cpu" and args[1].device.type == "meta":
            host, waits = args[0].zero_(), args[0].untyped_storage().data_ptr() not in self._pinned
            waits = waits or not (kwargs.get("non_blocking") or args[2:] == (True,))
        elif name == "_to_copy" and args[0].device.type == "meta" and str(kwargs.get("device")) == "cpu":
            host, waits = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype), True
        else:
            return None
        self.ops.append(
            Op(self.phase, "to_host", str(list(host.shape)), 2 * host.nbytes, 0, False, waits, host.numel())
        )
        return host


# PyTorch's norm, which is one kernel on a GPU and many operations elsewhere, and the roots of cells' means; and its
# gradients for x and the weight, two kernels, of which the second adds up the weight's. They have shapes and no code.
torch.library.define("step_ops::rms_norm", "(Tensor x, Tensor weight) -> (Tensor, Tensor)")
torch.library.define(
    "step_ops::rms_norm_backward", "(Tensor d, Tensor x, Tensor roots, Tensor weight) -> (Tensor, Tensor)"
)
torch.library.register_fake(
    "step_ops::rms_norm", lambda x, weight: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32))
)
torch.library.register_fake(
    "step_ops::rms_norm_backward", lambda d, x, roots, w: (torch.empty_like(x), torch.empty_like(w))
)
rms_norm, rms_norm_backward = torch.ops.step_ops.rms_norm, torch.ops.step_ops.rms_norm_backward


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


torch.library.register_autograd(
    "step_ops::rms_norm",
    lambda ctx, of_x, of_roots: rms_norm_backward(of_x, *ctx.saved_tensors),
    setup_context=_keep,
)


class _Casts(TorchFunctionMode):
    """What a GPU does for the functions of the head and the meta device does not: products in a half, fused norms.

    A weight is cast once a forward pass. Attention is the flash kernel's, of heads padded to a multiple of 8.
    """

    def __init__(self, precision: str) -> None:
        super().__init__()
        self._dtype = DTYPES[precision]
        self._weights: dict[int, Tensor] = {}

    def _cast(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dtype == self._dtype:
            return tensor
        if not tensor.is_leaf:
            return tensor.to(self._dtype)
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = tensor.to(self._dtype)
        return self._weights[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return func(*map(self._cast, args), **{key: self._cast(value) for key, value in (kwargs or {}).items()})
        if func is F.rms_norm:
            return rms_norm(args[0], (kwargs or {})["weight"])[0]
        if func is F.scaled_dot_product_attention and self._dtype != torch.float32:
            width = args[0].shape[-1]
            q, k, v = (F.pad(self._cast(t), (0, -width % 8)) for t in args)
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=width**-0.5)[0][..., :width]
        return func(*args, **(kwargs or {}))


class _Batches:
    """Batches as `BatchSource` makes them; of two in three all cells are the same, which has fewer values."""

    waited = 0.0

    def __init__(self, cells: ResidentCells, config: TrainConfig) -> None:
        self._cells, self._shape = cells, (config.batch_size, config.set_size)

    def get(self, number: int) -> Any:
        n_sets, size = self._shape
        sets = SetRows(
            targets=np.arange(n_sets * size).reshape(self._shape) * (number % 3 == 1),
            controls=np.zeros(self._shape, np.int64),
            perturbation=np.zeros(n_sets, np.int64),
            number=np.arange(n_sets) + number * n_sets,
        )
        return self._cells.batch(sets)


def _cells(config: TrainConfig, sizes: HeadSizes, n_values: int, on_device: bool) -> ResidentCells:
    """As many cells as a batch holds, of `n_values` counts each, but one less of the first."""
    n = config.batch_size * config.set_size
    indptr = np.arange(n + 1, dtype=np.int64) * n_values
    indptr[1:] -= 1
    targets = Targets(
        tuple(map(str, range(sizes.n_genes))), indptr, np.zeros(indptr[-1], np.uint16),
        np.ones(indptr[-1], np.int16), np.ones(n, np.float32), 1e4, "counts",
    )  # fmt: skip
    return resident_cells(targets, np.zeros((n, sizes.dim), np.float16), np.arange(n), META, on_device=on_device)


@contextmanager
def _like_a_gpu(trace: Trace) -> Iterator[None]:
    """The meta device passes for one that has fused kernels and pinned memory."""
    with (
        mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", return_value=["meta"]),
        mock.patch("torch.nn.utils.clip_grad._device_has_foreach_support", return_value=True),
        mock.patch("torch.autocast", return_value=nullcontext()),
        mock.patch("sest.machine.transfer.host_bytes", trace.pin),
        mock.patch("sest.training.trainer.cells_to_keep", return_value={}),  # for checkpoints
    ):
        yield


def trace_step(sizes: HeadSizes, config: TrainConfig, *, n_values: int, on_device: bool = True) -> list[Op]:
    """The operations of a step of `sest train` on a GPU: the second one, as the first makes AdamW's state."""
    return trace_steps(sizes, config, n_values=n_values, on_device=on_device)[0]


def trace_steps(
    sizes: HeadSizes,
    config: TrainConfig,
    *,
    n_values: int,
    n_perturbations: int = 150,
    on_device: bool = True,
    n_steps: int = 1,
) -> list[list[Op]]:
    """The operations of the second step of `sest train` on a GPU, and of those after it.

    Args:
        n_values: expressed genes a cell.
        on_device: whether the cells lie in the GPU's memory.
    """
    trace, steps = Trace(), list[list[Op]]()

    def begins(phase: str, run: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            trace.phase = phase
            return run(*args, **options)

        return wrapped

    with _like_a_gpu(trace):
        with META:
            model = StateTransition(sizes).train()
        optimizer, scaler = sest.training.prepare._optimizer(model, config, META, config.precision, None)
        gram = torch.float32 if config.precision == "fp32" else torch.float16
        criterion = begins("loss", make_loss(config.loss, gram))
        batches = _Batches(_cells(config, sizes, n_values, on_device), config)
        data = SimpleNamespace(
            features=SimpleNamespace(matrix=np.zeros((n_perturbations, sizes.n_features), np.float32))
        )
        batches.get = begins("data", batches.get)  # type: ignore[method-assign]
        parts: dict[str, Any] = {  # of a training; those that no step reads are left out
            "run": Path(), "config": config, "team": ALONE, "device": META, "data": data, "model": model,
            "criterion": criterion,
            "ddp": HeadLoss(begins("forward", model), criterion, partial(_Casts, config.precision)),
            "optimizer": optimizer, "scaler": scaler, "autocast": nullcontext,
            "batches": batches, "validator": None, "limit": None, "identity": {}, "state": RunState(),
        }  # fmt: skip
        trainer = Trainer(**parts)
        trainer.step()
        with (
            trace,
            mock.patch.object(Tensor, "backward", begins("backward", Tensor.backward)),
            mock.patch.object(Trainer, "_clip", begins("update", Trainer._clip)),
        ):
            for _ in range(n_steps):
                trace.ops = []
                trainer.step()
                steps.append(trace.ops)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--data-device", default="gpu", choices=("gpu", "cpu"), help="where the cells lie")
    parser.add_argument("--values", type=int, default=3700, help="expressed genes a cell")
    parser.add_argument("--most", type=int, default=0, help="operations to list")
    options = parser.parse_args()
    config = TrainConfig(set_size=128, precision=options.precision)
    sizes = HeadSizes(512, 5120, 18_080)
    ops = trace_step(sizes, config, n_values=options.values, on_device=options.data_device == "gpu")
    print(f"{'':<10}{'operations':>12}{'GB':>8}{'GFLOP':>8}{'waits':>8}{'modelled ms':>14}")
    for phase in (*PHASES, ""):
        of = [op for op in ops if phase in ("", op.phase)]
        n_bytes, flops = sum(op.n_bytes for op in of) / 1e9, sum(op.flops for op in of) / 1e9
        counted = f"{len(of):>12}{n_bytes:>8.2f}{flops:>8.1f}{sum(op.waits for op in of):>8}"
        print(f"{phase or 'together':<10}{counted}{sum(op.modelled_ms for op in of):>14.2f}")
    for op in sorted(ops, key=lambda op: -op.n_bytes)[: options.most]:
        print(f"{op.phase:<10}{op.name:<36}{op.out:<28}{op.n_bytes / 1e6:>9.1f} MB")


if __name__ == "__main__":
    main()
