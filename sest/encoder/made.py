"""How the embeddings of a cache were made: what others must have in common with them to mean the same to a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sest.config import EmbedConfig
from sest.encoder.choose import FITTED, needs_weights
from sest.encoder.genes import GenesEncoder
from sest.encoder.projection import Projection
from sest.errors import InputError, shown


@dataclass(frozen=True, eq=False)
class Made:
    """Encoder, projection and what else decides about an embedding."""

    whose: str  # the cache or checkpoint that says so, for messages
    name: str  # of the encoder
    sha256: str
    native_dim: int
    dim: int  # as stored
    dtype: str
    seed: int
    max_tokens: int | None
    projection: str  # "pca", "genes", "state" or "none"
    fitted: Projection | None
    genes: tuple[str, ...] = ()  # of an encoder of `FITTED`
    means: np.ndarray | None = None  # (D,) of its genes, where they are kept

    def fitted_encoder(self, names: Mapping[str, list[str]], missing_genes: str) -> GenesEncoder:
        """The encoder of `FITTED` that it was made with.

        Args:
            names: group -> names of all genes of its file.
            missing_genes: "error", or what a gene is taken for that a file lacks.
        """
        assert self.fitted is not None
        encoder = FITTED[self.name].from_projection(list(self.genes), self.fitted, names, self.means)
        encoder.sha256 = self.sha256
        if missing_genes != "error":
            encoder.fill_missing(missing_genes)
        return encoder

    def require(self, sha256: str, given: str) -> None:
        """Refuse an encoder with another hash; `given` is what --encoder named.

        Raises:
            InputError: it is another one.
        """
        if sha256 != self.sha256:
            raise InputError(f"{given} is not the encoder that {self.whose} was made with ({self.name}).")


def alike(config: EmbedConfig, made: Made) -> EmbedConfig:
    """The configuration with all that embeddings must have in common with those that are `made`.

    Raises:
        InputError: something else is asked for, or --encoder is needed.
    """
    usual = EmbedConfig()
    taken: dict[str, Any] = {"dtype": made.dtype, "seed": made.seed, "max_tokens": made.max_tokens}
    if not needs_weights(made.name):
        taken["encoder"] = made.name
    elif not config.encoder:
        raise InputError(
            f"{made.whose} was made with the encoder {made.name}. Pass --encoder with its folder, or its name on the "
            "Hugging Face hub."
        )
    wrong = [name for name, value in taken.items() if getattr(config, name) not in (value, getattr(usual, name))]
    if config.dim not in (None, made.dim) and (config.dim != "state" or made.projection != "state"):
        wrong.append("dim")
    if wrong:
        options = shown("--" + name.replace("_", "-") for name in wrong)
        raise InputError(f"--like {made.whose} takes {options} from there. Leave it out.")
    return dataclasses.replace(config, dim="state" if made.projection == "state" else None, **taken)
