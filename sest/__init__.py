"""sest: embed every cell once, then train the State Transition head from the stored embeddings."""

__version__ = "0.1.0"
