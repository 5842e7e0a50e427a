"""The `sest` command, also as `python -m sest`: Ctrl-C is quiet from the first import on."""

import gc
import signal

OBJECTS = 10_000  # made between two searches for cycles: at Python's 700, searching takes a tenth of a short command


def main() -> None:
    """Run the command line."""
    gc.set_threshold(OBJECTS)
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process without a word, wherever an import is
    from sest.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
