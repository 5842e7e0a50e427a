"""Files that an earlier sest wrote still open, resume and predict, byte for byte.

fixtures/before_rooms was written by commit ef954bf, on the kernels of `environment`; its README.md says how. Its
expected.json says what that commit made of it, and on which computer.

In which bits a sum of floats ends depends on the kernels that libraries choose for a processor. `environment` chooses
those that nearly every x86-64 processor has. Bits are compared where no arithmetic made them; and where it did, on a
computer like that of the files (`SAME_COMPUTER`), or one that repeats the committed steps 6 to 8 bit for bit (`exact`).
Elsewhere numbers must agree to the tolerances below. Beside each stands by how much kernels for AVX-512, for SSE, of
MKL without reproducibility, and with two threads moved those numbers; another seed or split moves them by far more.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from safetensors.numpy import load_file

from helpers.processes import Server
from sest.baselines.effects import BASELINES

BEFORE = Path(__file__).resolve().parent / "fixtures" / "before_rooms"
EXPECTED: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text())

WEIGHTS = 1e-6  # after 3 or 4 steps: 3e-8
WEIGHTS_FROM_THE_START = 3e-5  # after 8: 4e-6, as AdamW's first steps are large for gradients that are near zero
VALUES = 1e-5  # log1p units: 5e-7
METRICS = 1e-5  # relative: 2e-7
EMBEDDINGS = 0.016  # up to 8.8, in float16, which is two of its steps there: 5e-4
PROJECTION = 1e-5  # 6e-8

WRITERS = "anndata numcodecs numpy pandas zarr".split()  # packages that make the bytes of a cache's files
PACKAGES = [*WRITERS, *"h5py numba safetensors scipy torch".split()]
THREADS = {"OMP_NUM_THREADS": "1"}
KERNELS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "OPENBLAS_L2_SIZE": "512",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
UNSET = (
    "DNNL_MAX_CPU_ISA MKL_DEBUG_CPU_TYPE MKL_ENABLE_INSTRUCTIONS MKL_NUM_THREADS NPY_ENABLE_CPU_FEATURES "
    "NUMBA_CPU_FEATURES NUMBA_CPU_NAME NUMBA_NUM_THREADS OPENBLAS_NUM_THREADS"
).split()

# of a log line
MEASURED = ("it_per_s", "data_wait", "device_wait", "limit_it_per_s", "limited_by", "memory_bytes", "crc32c")
TENSORS = ("model.safetensors", "optimizer.safetensors", "projection.safetensors")
COMPUTED = re.compile(  # files of a cache whose bytes come from the PCA
    r"COMPLETE|journal\.jsonl|projection/zarr\.json|projection/\w+/c/.*|cells/obsm/X_sest/c/.*"
)
EMBED = "embed splits.toml --encoder pca --dim 6 --seed 3 --cache".split()
FEATURES = "--perturbations features.safetensors".split()
CACHE = "--cache cache".split()


def processor() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def computer() -> dict[str, str]:
    """What decides which bits come of the same sums in the same packages."""
    cpu = processor()
    return {
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        **{name: cpu.get(name, "") for name in ("vendor_id", "cpu family", "model")},
        "flags_sha256": sha256(" ".join(sorted(cpu.get("flags", "").split())).encode()),
    }


METRICS_THEN = ("val_loss", "pearson_delta", "mae", "pds")


def environment() -> dict[str, str]:
    """One thread, and the kernels of processors with AVX2 where this is one."""
    kept = {name: value for name, value in os.environ.items() if name not in (*KERNELS, *UNSET)}
    return {**kept, **THREADS, **(KERNELS if "avx2" in processor().get("flags", "").split() else {})}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


VERSIONS = {name: metadata.version(name) for name in PACKAGES}
SAME_WRITERS = all(VERSIONS[name] == EXPECTED["packages"][name] for name in WRITERS)
SAME_COMPUTER = EXPECTED["packages"] == VERSIONS and EXPECTED["computer"] == computer()
SAME_VERSION = metadata.version("sest") == EXPECTED["sest_version"]


def copy_to(folder: Path) -> Path:
    """A copy of the files to work in; where they were first written is not there any more."""
    return Path(shutil.copytree(BEFORE, folder / "copy"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copy_to(tmp_path)


@cache
def server() -> Server:
    """Its libraries chose their kernels in `environment`."""
    return Server(environment())


def sest(folder: Path, *words: str) -> str:
    """Run `sest` in a folder; returns its standard output."""
    done = server().run(["-m", "sest", *words], cwd=folder)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def info(folder: Path, path: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(sest(folder, "info", path, "--json", "--verify"))
    return facts


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder but a cache's lock."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {file.relative_to(folder).as_posix(): sha256(file.read_bytes()) for file in files}


def tensor_hashes(run: Path) -> dict[str, str]:
    """The sha256 of the tensors in best/ and last/."""
    return {
        f"{name}/{file}": digest
        for name in ("best", "last")
        for file, digest in hashes(run / name).items()
        if file in TENSORS
    }


def metrics(run: Path, after: int = 0) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock measured; of validations what means the same in all versions.

    Baselines do not: the perturbation mean is weighted by cells now.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [same_in_all_versions(line) for line in lines if line["step"] > after]


def same_in_all_versions(line: dict[str, Any]) -> dict[str, Any]:
    if "val_loss" not in line:
        return {key: value for key, value in line.items() if key not in MEASURED}
    return {key: line[key] for key in ("step", *(f"{m}{of}" for m in METRICS_THEN for of in ("", "_controls")))}


def assert_metrics(found: list[dict[str, Any]], expected: list[dict[str, Any]], exact: bool) -> None:
    assert [list(line) for line in found] == [list(line) for line in expected]
    for one, other in zip(found, expected, strict=True):
        if exact:  # means of pairs are rounded to float32 now, 6e-8 of themselves; losses are of cells
            of_means = [key for key in other if key.startswith(("mae", "pearson_delta"))]
            assert one == other | {key: pytest.approx(other[key], rel=1e-6, abs=1e-7) for key in of_means}
        else:
            assert one == pytest.approx(other, rel=METRICS)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=0, atol=tolerance)


def assert_weights(found: Path, expected: Path, tolerance: float) -> None:
    made, before = load_file(found), load_file(expected)
    assert made.keys() == before.keys()
    for name, values in before.items():
        assert_close(made[name], values, tolerance)


def assert_cache(found: Path, exact: bool) -> None:
    """A cache is as the earlier version wrote it."""
    expected, made, before = BEFORE / "cache", hashes(found), EXPECTED["cache"]
    assert made.keys() == before.keys()
    if SAME_WRITERS:
        versioned = () if SAME_VERSION else ("zarr.json", "journal.jsonl", "COMPLETE")  # these say or hash the version
        different = [name for name in made if made[name] != before[name] and name not in versioned]
        assert not [name for name in different if exact or not COMPUTED.fullmatch(name)]
    root, root_before = (json.loads((s / "zarr.json").read_text())["attributes"]["sest"] for s in (found, expected))
    assert root | {"sest_version": ""} == root_before | {"sest_version": ""}
    cells, cells_before = (ad.read_zarr(cache / "cells") for cache in (found, expected))
    pd.testing.assert_frame_equal(cells.obs, cells_before.obs)
    assert list(cells.var_names) == list(cells_before.var_names)
    assert cells.X.dtype == cells_before.X.dtype and not (cells.X != cells_before.X).nnz
    embeddings, embeddings_before = (c.obsm["X_sest"] for c in (cells, cells_before))
    assert embeddings.dtype == embeddings_before.dtype
    assert_close(embeddings, embeddings_before, EMBEDDINGS)
    projection, projection_before = (zarr.open_group(s / "projection", mode="r") for s in (found, expected))
    for name, values in projection_before.arrays():
        now = projection[name]
        assert isinstance(now, zarr.Array)
        assert_close(np.asarray(now[:]), np.asarray(values[:]), PROJECTION)


# --- caches


def test_the_files_are_those_that_the_earlier_version_wrote() -> None:
    """No editor, hook or checkout has touched them (it would look like damage)."""
    assert hashes(BEFORE / "cache") == EXPECTED["cache"]


def test_a_cache_of_an_earlier_version_opens_complete_and_sound(copy: Path) -> None:
    facts = info(copy, "cache")
    assert (facts["kind"], facts["complete"], facts["verified"]) == ("cache", True, True)
    assert (facts["n_cells"], facts["dim"], facts["encoder"]) == (160, 6, "pca")
    assert facts["sest_version"] == EXPECTED["sest_version"]


def test_embedding_again_writes_the_bytes_of_an_earlier_version(copy: Path) -> None:
    sest(copy, *EMBED, "again")
    assert_cache(copy / "again", SAME_COMPUTER)


same_version = pytest.mark.skipif(not SAME_VERSION, reason="a cache is continued by the version that began it")


@same_version
def test_a_finished_cache_of_an_earlier_version_is_found_finished(copy: Path) -> None:
    sest(copy, *EMBED, "cache")
    assert hashes(copy / "cache") == EXPECTED["cache"]


@same_version
def test_an_unfinished_cache_of_an_earlier_version_is_finished(copy: Path) -> None:
    """It lacks its embeddings, and gets them by the projection it has."""
    cache, shard = copy / "cache", "cells/obsm/X_sest/c/0/0"
    (cache / "COMPLETE").unlink()
    (cache / shard).unlink()
    lines = (cache / "journal.jsonl").read_text().splitlines(keepends=True)
    (cache / "journal.jsonl").write_text("".join(line for line in lines if shard not in line))
    assert info(copy, "cache")["complete"] is False
    sest(copy, *EMBED, "cache")
    assert info(copy, "cache")["complete"] is True
    assert_cache(cache, SAME_COMPUTER)


# --- runs


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 6 to 8 once more, from the old run's checkpoint of step 5."""
    folder = copy_to(tmp_path_factory.mktemp("repeated"))
    sest(folder, "train", "cache", "--run", "repeated", "--resume", "run/checkpoint-step-5", *FEATURES)
    return folder / "repeated"


@pytest.fixture(scope="module")
def exact(repeated: Path) -> bool:
    """Whether steps have the same bits here as where the old run was trained."""
    return SAME_COMPUTER or tensor_hashes(repeated) == tensor_hashes(BEFORE / "run")


def test_a_run_of_an_earlier_version_is_known_as_one(copy: Path) -> None:
    facts = info(copy, "run")
    assert (facts["kind"], facts["step"], facts["best_step"], facts["verified"]) == ("run", 8, 8, True)
    assert set(facts["checkpoints"]) == {"best", "last", "checkpoint-step-5"}


def test_the_checkpoint_of_an_earlier_version_leads_to_the_bytes_it_led_to(repeated: Path, exact: bool) -> None:
    assert_metrics(metrics(repeated), metrics(BEFORE / "run", after=5), exact)
    if exact:
        assert tensor_hashes(repeated) == tensor_hashes(BEFORE / "run")
    for name in ("best", "last"):
        assert_weights(repeated / name / TENSORS[0], BEFORE / "run" / name / TENSORS[0], WEIGHTS)


def test_a_run_of_an_earlier_version_resumes_to_the_same_bytes(copy: Path, exact: bool) -> None:
    sest(copy, "train", "cache", "--run", "run", "--resume", "auto", "--max-steps", "12", *FEATURES)
    expected = EXPECTED["resumed"]
    assert_metrics(
        metrics(copy / "run"), [*metrics(BEFORE / "run"), *map(same_in_all_versions, expected["metrics"])], exact
    )
    found = tensor_hashes(copy / "run")
    assert found.keys() == expected["files"].keys()
    for name, digest in expected["files"].items():
        if exact or name.endswith(TENSORS[2]):  # the projection is the cache's
            assert found[name] == digest, name
    for name in ("best", "last"):
        assert_weights(copy / "run" / name / TENSORS[0], BEFORE / "resumed.safetensors", WEIGHTS)


def test_the_configuration_of_an_earlier_version_trains_the_same_run(copy: Path, exact: bool) -> None:
    sest(copy, "train", "cache", "--run", "anew", "--config", "run/config.toml", "--splits", "splits.toml", *FEATURES)
    assert_metrics(metrics(copy / "anew"), metrics(BEFORE / "run"), exact)
    if exact:
        assert tensor_hashes(copy / "anew") == tensor_hashes(BEFORE / "run")
    for name in ("best", "last"):
        assert_weights(copy / "anew" / name / TENSORS[0], BEFORE / "run" / name / TENSORS[0], WEIGHTS_FROM_THE_START)


# --- predictions


@pytest.mark.parametrize("recorded", [False, True], ids=["paths given", "paths of the run"])
def test_a_run_of_an_earlier_version_predicts_the_same_cells(copy: Path, exact: bool, recorded: bool) -> None:
    """The cache and the features are found by the options, or by what config.toml says, moved to where they are now."""
    if recorded:
        config = copy / "run" / "config.toml"
        config.write_text(config.read_text().replace(EXPECTED["folder"], str(copy)))
    paths = () if recorded else (*CACHE, *FEATURES)
    sest(copy, "predict", "run", "--out", "p.h5", "--device", "cpu", *paths)
    expected, cells, before = EXPECTED["prediction"], ad.read_h5ad(copy / "p.h5"), ad.read_h5ad(BEFORE / "predicted.h5")
    made, own = cells.uns["sest"], expected["uns_sest"]
    assert list(cells.var_names) == expected["var_names"]
    cells.obs.pop("sest_control")  # there was none then
    draws = cells.obs.pop("sest_draw")
    is_control = (cells.obs[made["columns"]["perturbation"]] == made["columns"]["control"]).to_numpy()
    assert set(draws[is_control]) == {-1} and draws[~is_control].min() == 0
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert_close(cells.X.toarray(), before.X.toarray(), VALUES)
    if exact:
        with h5py.File(copy / "p.h5") as file:
            found = {name: file["X"][name][()] for name in expected["X_sha256"]}
            found["indptr"] = found["indptr"].astype(np.int64)  # of the indices' type now, which scipy needs to sort
            found = {name: sha256(values.tobytes()) for name, values in found.items()}
        assert found == expected["X_sha256"]
    version = {"sest_version": metadata.version("sest")}
    assert {key: made[key] for key in own} == own | {"provenance": own["provenance"] | version}
    for key, names in before.uns["sest"]["pairs"].items():
        assert list(made["pairs"][key]) == list(names)
    assert list(made["baselines"]) == sorted(BASELINES[1:])  # others than then, and of one name not the same
    if SAME_WRITERS:
        assert sha256(cells.obs.to_csv().encode()) == expected["obs_csv_sha256"]
