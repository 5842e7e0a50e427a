"""benchmarks/gpu_check.py, which measures a GPU: here all that it does without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_every_section_runs_without_a_gpu_and_says_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), *words], capture_output=True, text=True, check=True
    )
    found = json.loads(out.read_text())
    assert not [name for name, section in found.items() if "error" in json.dumps(section)], found
    assert found["parity"]["fp32"]["gradient"] < 1e-5 and found["parity"]["bf16"]["cosine"] > 0.999
    assert set(found["steps"]) == {"host", "disk", "controls of the batch", "took_s"}
    assert found["steps"]["host"]["it_per_s"] > 0
    assert all(found["resume"][f"set_size {size}"] == {"twice": True, "resumed": True} for size in (16,))
    assert found["stop"]["exit_code"] == 143 and found["stop"]["saved"]
    assert found["embed"]["fp32"]["batch 4"]["cells_per_s"] > 0
    assert len({line.count("|") for line in done.stdout.splitlines()[-3:]}) == 1  # the row under its head


def test_a_section_that_fails_leaves_its_error_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    def environment(check: gpu_check.Check) -> gpu_check.Found:
        raise torch.OutOfMemoryError("no room")

    def parity(check: gpu_check.Check) -> gpu_check.Found:
        sys.exit(143)  # as SIGTERM does

    monkeypatch.setattr(gpu_check, "SECTIONS", (environment, gpu_check.upstream, parity))
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit, match="143"):
        gpu_check.main()
    found = json.loads(out.read_text())
    assert found["environment"]["error"] == "OutOfMemoryError: no room"
    assert found["upstream"]["skipped"] == "no --peers-python" and "parity" not in found
    assert capsys.readouterr().out.splitlines()[-1].startswith("| - | - |")
