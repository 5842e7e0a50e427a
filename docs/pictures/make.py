"""Draws the pictures of the documentation from a folder that `sest run` made: python docs/pictures/make.py FOLDER.

The panel of the training as it was at its end, in terminals of three sizes (SVG), and the report in windows of three
widths (PNG, by Chromium).
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from sest.cli.panel import TrainingPanel
from sest.cli.train import about_run
from sest.runs.curves import read_lines
from sest.runs.run_folder import METRICS

HERE = Path(__file__).parent
TERMINALS = ((40, 24), (80, 24), (200, 60))  # columns, rows
WINDOWS = ((400, 900), (800, 1000), (1400, 1000))  # pixels


def draw_panel(folder: Path) -> None:
    """panel-COLUMNS.svg: what `sest train` shows in a terminal."""
    about = about_run(folder / "cache.zarr", folder / "run")
    panel = TrainingPanel(about["max_steps"], about=about)
    for line in read_lines(folder / "run" / METRICS):
        panel.add(line)
    for columns, rows in TERMINALS:
        console = Console(width=columns, height=rows, record=True, file=io.StringIO(), force_terminal=True)
        console.print(panel.render(columns, rows))
        svg = console.export_svg(title="sest train")
        svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # fonts from the network
        (HERE / f"panel-{columns}.svg").write_text(svg, encoding="utf-8")


def draw_report(folder: Path, chromium: str) -> None:
    """report-PIXELS.png: the beginning of the report."""
    for width, height in WINDOWS:
        out = HERE / f"report-{width}.png"
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
        page = (folder / "report.html").resolve().as_uri()
        words += ["--virtual-time-budget=4000", f"--screenshot={out}", page]
        subprocess.run([chromium, *words], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of `sest run` or `sest demo`")
    folder = parser.parse_args().folder
    draw_panel(folder)
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        sys.exit("The panel is drawn; the report needs Chromium.")
    draw_report(folder, chromium)


if __name__ == "__main__":
    main()
