"""One of several processes that embed into one cache, as a thread."""

from __future__ import annotations

import threading
from pathlib import Path

from helpers.notes import Notes
from sest.cache import CacheError
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.errors import InputError
from sest.machine.ranks import Ranks
from sest.progress import reporting


class EmbedRank(threading.Thread):
    """One rank, already running; file locks of separately opened files exclude each other in threads too."""

    def __init__(self, inputs: list[Path], cache: Path | str, config: EmbedConfig, ranks: Ranks) -> None:
        super().__init__(daemon=True)
        self.inputs, self.cache, self.config, self.ranks = inputs, cache, config, ranks
        self.notes, self.complete = Notes(), False
        self.error: InputError | CacheError | InterruptedError | None = None
        self.start()

    def run(self) -> None:
        try:
            with reporting(self.notes):
                self.complete = embed(self.inputs, self.cache, self.config, ranks=self.ranks).complete
        except (InputError, CacheError, InterruptedError) as error:
            self.error = error

    def done(self) -> EmbedRank:
        self.join(60)
        assert not self.is_alive()
        return self
