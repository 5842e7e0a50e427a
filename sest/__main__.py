"""`python -m sest` is the same command as `sest`."""

from sest.cli.main import main

if __name__ == "__main__":
    main()
