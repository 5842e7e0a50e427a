"""sest: embed every cell once, then train the State Transition head from the cached embeddings.

import sest

cache = sest.embed("cells.h5ad", "cells.zarr", encoder="pca", dim=64)
run = sest.train(cache, "run", max_steps=1000)
cells = run.predict(["STAT1", "JAK2"], cell_type="k562")
sest.evaluate(cells, "cells.h5ad").table
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sest import datasets
    from sest.api import Run, embed, evaluate, open_run, predict, push, run, train
    from sest.cache import Cache, open_cache
    from sest.errors import Error
    from sest.evaluation.results import Evaluation
    from sest.head.loss import energy_distance
    from sest.runs.checkpoint import load_model
    from sest.simulation.screen import simulate

__version__ = "0.1.0"
__all__ = [
    "Cache",
    "Error",
    "Evaluation",
    "Run",
    "datasets",
    "embed",
    "energy_distance",
    "evaluate",
    "load_model",
    "open_cache",
    "open_run",
    "predict",
    "push",
    "run",
    "simulate",
    "train",
]
_HOME = {
    "Cache": "cache",
    "Error": "errors",
    "Evaluation": "evaluation.results",
    "energy_distance": "head.loss",
    "load_model": "runs.checkpoint",
    "open_cache": "cache",
    "simulate": "simulation.screen",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import sest` must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"sest.{name if name == 'datasets' else _HOME.get(name, 'api')}")
    value = globals()[name] = module if name == "datasets" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
