"""Validation during training: the loss on held-out cells and pseudobulk metrics, each beside its baselines.

Shapes: K (context, perturbation) pairs, G genes. Baselines: `perturbation_mean` (controls plus the mean training
effect of the perturbation) and `controls` (nothing happens); see sest.baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from sest.baselines import predict_baselines
from sest.cell_store import CellStore
from sest.config import TrainConfig
from sest.dataset import Dataset, split_pairs, training_means
from sest.metrics import discrimination_score, mean_absolute_error, pearson_delta
from sest.sampler import SetRows, SetSampler
from sest.splits import VAL
from sest.team import ALONE, Team


class Validator:
    """Holds the validation sets and everything about them that does not change during training."""

    def __init__(
        self,
        data: Dataset,
        store: CellStore,
        config: TrainConfig,
        device: torch.device,
        criterion: Callable[[Tensor, Tensor], Tensor],
        team: Team = ALONE,
    ) -> None:
        self._team = team
        self._data, self._store, self._device, self._criterion = data, store, device, criterion
        self._size = config.batch_size // team.size
        same_batch = config.controls == "batch"
        sampler = SetSampler(data.labels, data.in_split(VAL), config.set_size, config.seed, same_batch=same_batch)
        self.sets = sampler.fixed_sets(config.val_sets)
        self._features = torch.from_numpy(data.features.matrix).to(device)
        self._pairs = split_pairs(data, VAL)
        pair_keys = self._key(self._pairs.context, self._pairs.perturbation)
        self._pair = np.searchsorted(
            pair_keys, self._key(data.labels.context[self.sets["targets"][:, 0]], self.sets["perturbation"])
        )  # (sets,) the pair of every set
        train = training_means(data)
        names = [data.labels.perturbations[p] for p in self._pairs.perturbation]
        self._perturbation_mean = predict_baselines(train, names, self._pairs.control)["perturbation_mean"]  # (K, G)
        self.baselines = self._baselines()

    def _key(self, context: np.ndarray, perturbation: np.ndarray) -> np.ndarray:
        return context.astype(np.int64) * len(self._data.labels.perturbations) + perturbation

    def _part(self, start: int) -> SetRows:
        part = slice(start, start + self._size)
        return SetRows(
            targets=self.sets["targets"][part],
            controls=self.sets["controls"][part],
            perturbation=self.sets["perturbation"][part],
            number=self.sets["number"][part],
        )

    def _baselines(self) -> dict[str, float]:
        """Metrics of the baselines; their cells are the sets' own controls, moved by the mean effect."""
        pairs, losses = self._pairs, {"controls": 0.0, "perturbation_mean": 0.0}
        shift = torch.from_numpy(self._perturbation_mean - pairs.control).float().to(self._device)
        n_sets = len(self._pair)
        for start in range(0, n_sets, self._size):
            part = self._part(start)
            target = self._store.expression(part["targets"])
            controls = self._store.expression(part["controls"])
            moved = (controls + shift[torch.as_tensor(self._pair[start : start + self._size])].unsqueeze(1)).clamp_min(
                0
            )
            losses["controls"] += float(self._criterion(controls, target).sum())
            losses["perturbation_mean"] += float(self._criterion(moved, target).sum())
        result = {f"val_loss_{name}": total / n_sets for name, total in losses.items()}
        for name, means in (("controls", pairs.control), ("perturbation_mean", self._perturbation_mean)):
            result |= {f"{metric}_{name}": value for metric, value in self._metrics(means).items()}
        return result

    def _metrics(self, predicted: np.ndarray) -> dict[str, float]:
        """Means over the pairs of pearson_delta, mae and pds (pds within each context). predicted: (K, G)."""
        pairs, genes = self._pairs, self._data.targets.genes
        scores = np.empty(len(predicted))
        for context in np.unique(pairs.context):
            mine = pairs.context == context
            names = [self._data.labels.perturbations[p] for p in pairs.perturbation[mine]]
            scores[mine] = discrimination_score(
                predicted[mine], pairs.observed[mine], pairs.control[mine][0], names, genes
            )
        return {
            "pearson_delta": float(pearson_delta(predicted, pairs.observed, pairs.control).mean()),
            "mae": float(mean_absolute_error(predicted, pairs.observed).mean()),
            "pds": float(scores.mean()),
        }

    def run(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[None]]) -> dict[str, float]:
        """Validate: val_loss (mean over sets), pearson_delta, mae and pds (means over pairs), beside the baselines'."""
        model.eval()
        n_sets, total = len(self._pair), torch.zeros((), dtype=torch.float64, device=self._device)
        sums = torch.zeros(
            len(self._pairs.context), len(self._data.targets.genes), dtype=torch.float64, device=self._device
        )
        with torch.inference_mode():
            for number, start in enumerate(range(0, n_sets, self._size)):
                if not self._team.ranks.owns(number):
                    continue
                batch = self._store.batch(self._part(start))
                with autocast():
                    predicted = model(batch["basal"], self._features[batch["perturbation"]])
                total += self._criterion(predicted, batch["target"]).double().sum()
                pair = torch.as_tensor(self._pair[start : start + self._size], device=self._device)
                sums.index_add_(0, pair, predicted.double().mean(1))
        model.train()
        self._team.sum(total)
        counts = np.bincount(self._pair, minlength=len(sums))
        means = self._team.sum(sums).cpu().numpy() / counts[:, None]
        return {"val_loss": float(total) / n_sets, **self._metrics(means), **self.baselines}
