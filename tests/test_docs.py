"""The documentation is true: its commands run, its links lead somewhere, its tables are the code's.

Every command of every ```bash block of README.md and docs/ is run, page by page and in order, in a folder of small
stand-ins of the files the pages name. Commands run as they stand, but for the reductions of `_reduced`; those of
`FORM_ONLY` are not run. Blocks of Python run as well, README's with the sizes of `PYTHON_SIZES`.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import tomli_w
import torch
import typer
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from helpers.processes import start_ranks
from helpers.se_model import write_se
from sest.baselines.effects import BASELINES
from sest.cells.columns import detect_columns
from sest.cli import se_st_train
from sest.cli.main import app, main
from sest.compat.ancestor import FIXED, KEYS, Key
from sest.config import EmbedConfig, TrainConfig
from sest.embedding.embed import embed
from sest.files.cell_file import CellFile
from sest.head.model import HeadSizes, new_model
from sest.runs.curves import read_lines
from sest.se.weights import save_safetensors_copy
from sest.training.train import train

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# Commands that are read but not run, by how they begin, and why.
FORM_ONLY = {
    "make": "installs the project, or runs the tests and this one among them; its targets are looked up",
    "pip install": "installs; its extras are looked up",
    "hf download": "downloads SE-600M",
    "jupyter lab": "a server that runs until it is stopped; tests/test_tutorials.py executes the notebooks",
    "sbatch": "needs SLURM; the script must be a block of the page",
    "tensorboard --logdir": "a server that runs until it is stopped",
    "sest push competition": "needs a token; tests/test_hub_heads.py pushes to a server on this machine",
    "sest predict hf://": "downloads; the same test predicts from there",
    "sest evaluate submission.h5ad": "runs cell-eval2; tests/compat/test_suite.py does where it is installed",
    "cell-eval2 run": "not among what tests install; tests/prediction/test_submission.py runs it where it is",
}
READY = {  # what is there before a page's first command, as made on the pages before it
    "training.md": ("vcc.zarr",),
    "staged.md": ("vcc.zarr",),
    "formats.md": ("vcc.zarr", "competition"),
}
TORCHRUN = ("training.md",)  # where two processes are started as torchrun does; elsewhere one does the work
FOREIGN = set("--nproc-per-node --local-dir --help --version".split())  # options of torchrun, hf and of `sest` itself
PERTURBATIONS = ("AARS", "NUP107", "RPUSD4", "TP53", "STAT1", "JAK2")
GENES = [*PERTURBATIONS, *(f"G{i}" for i in range(54))]
CELLS_OF = {"data/rpe1": "rpe1", "data/k562": "k562", "data/h1": "ARC_H1", "cells": "ARC_H1", "new": "ARC_H1"}
DIM, TOKENS = 8, 8  # widths and sentences that the stand-in of SE-600M (width 12, 16 slots) can give
TINY: dict[str, Any] = {  # a head of some thousand parameters and steps of milliseconds; 40,000 steps become 8
    "max_steps": 8,
    "set_size": 8,
    "hidden": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_encoder_layers": 2,
    "n_decoder_layers": 2,
    "val_every": 4,
    "checkpoint_every": 1,
    "log_every": 2,
    "num_workers": 0,
    "device": "cpu",
}
TINY_KEYS = {  # the same for se-st-train
    "training.ckpt_every_n_steps": "1",
    "training.val_check_interval": "4",
    "model.kwargs.st_hidden_dim": "16",
    "model.kwargs.cell_set_len": "8",
    "model.kwargs.n_encoder_layers": "2",
    "model.kwargs.n_decoder_layers": "2",
    "model.kwargs.transformer_backbone_kwargs.num_hidden_layers": "1",
    "model.kwargs.transformer_backbone_kwargs.num_attention_heads": "2",
    "accelerator": "cpu",
}
PYTHON_SIZES = {"dim=256": f"dim={DIM}", "max_steps=5000": "**TINY"}  # what README's Python is run with
TINY_CELLS = {
    "--n-perturbations": "12",
    "--n-cells": "8",
    "--n-controls": "16",
    "--n-genes": "60",
    "--expressed-genes": "30",
    "--umi-per-cell": "300",
}


# --- reading pages


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int  # of its first line of code
    language: str
    title: str
    text: str
    section: str  # the heading it stands below

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found, section, fence, begun = list[Block](), "", None, 0
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        if fence is None and line.startswith("```"):
            fence, begun = line[3:], number
        elif fence is not None and line.startswith("```"):
            title = re.search(r'title="([^"]+)"', fence)
            language, text = fence.split(" ")[0], "\n".join(lines[begun : number - 1]) + "\n"
            found.append(Block(page, begun + 1, language, title[1] if title else "", text, section))
            fence = None
        elif fence is None and line.startswith("#"):
            section = line
    assert fence is None, f"{page.name}: a block is not closed"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command line of a bash block: continuation lines joined, comments gone."""

    where: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def commands(block: Block) -> Iterator[Command]:
    first, text = block.line, ""
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        first = first if text else number
        if line.endswith("\\"):
            text += line[:-1] + " "
            continue
        line = re.sub(r"\$\{?SLURM_ARRAY_TASK_ID\}?", "0", text + line)
        if words := shlex.split(line, comments=True):
            yield Command(f"{block.page.relative_to(ROOT)}:{first}", words)
        text = ""


def parts(page: Path) -> list[list[Block]]:
    """Blocks that share a folder: a page of docs tells one story; README's sections do not depend on each other."""
    if page != README:
        return [blocks(page)]
    sections: dict[str, list[Block]] = {}
    for block in blocks(page):
        sections.setdefault(block.section, []).append(block)
    return list(sections.values())


PARTS = [
    pytest.param(part, id=f"{page.name}{'' if len(parts(page)) == 1 else ' ' + part[0].section.strip('# ')}")
    for page in (README, *DOCS)
    for part in parts(page)
    if any(block.language in ("bash", "python") for block in part)
]


# --- the folder


def _write_cells(path: Path, cell_type: str, seed: int) -> None:
    """Counts of 60 genes: 24 controls and 10 cells of each of six perturbations, in two batches."""
    rng = np.random.default_rng(seed)
    labels = ["non-targeting"] * 24 + [name for name in PERTURBATIONS for _ in range(10)]
    rates = {name: rng.gamma(2.0, 1.5, len(GENES)) for name in dict.fromkeys(labels)}
    values = rng.poisson(np.stack([rates[name] for name in labels])).astype(np.float32)
    obs = pd.DataFrame(
        {
            "target_gene": pd.Categorical(labels),
            "cell_type": pd.Categorical([cell_type] * len(labels)),
            "batch": pd.Categorical([f"b{i % 2}" for i in range(len(labels))]),
        },
        index=[f"{path.stem}-{i}" for i in range(len(labels))],
    )
    path.parent.mkdir(exist_ok=True)
    obsm = {"X_scVI": values[:, :DIM].astype(np.float32)}
    ad.AnnData(scipy.sparse.csr_matrix(values), obs=obs, var=pd.DataFrame(index=GENES), obsm=obsm).write_h5ad(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages name, small: cells, splits, features, an encoder, a store and a run."""
    folder = tmp_path_factory.mktemp("docs") / "ready"
    folder.mkdir()
    for seed, (name, cell_type) in enumerate(CELLS_OF.items()):
        _write_cells(folder / f"{name}.h5ad", cell_type, seed)
    starter = next(b for b in blocks(ROOT / "docs" / "data.md") if b.title == "starter.toml")
    for place in (folder / "starter.toml", folder / "data" / "starter.toml"):
        place.write_text(starter.text)
    rng = torch.Generator().manual_seed(0)
    torch.save({name: torch.randn(16, generator=rng) for name in PERTURBATIONS}, folder / "ESM2_pert_features.pt")
    (folder / "gene_names.csv").write_text("\n".join(reversed(GENES)) + "\n")
    controls = [ad.read_h5ad(folder / f"data/{name}.h5ad") for name in ("rpe1", "k562", "h1")]
    for context, cells in zip("ABC", controls, strict=True):
        cells.obs = cells.obs[["target_gene"]].assign(context=context)
    controls[0].write_h5ad(folder / "real_A.h5ad")
    together = ad.concat([cells[cells.obs["target_gene"] == "non-targeting"] for cells in controls], index_unique="-")
    together.write_h5ad(folder / "controls.h5ad")
    (folder / "pert_counts.csv").write_text("target_gene\nTP53\nJAK2\n")
    (folder / "pert_counts_Validation.csv").write_text("target_gene,n_cells,median_umi\nTP53,9,100\nJAK2,5,100\n")
    se = write_se(folder / "SE-600M", GENES)
    torch.save({"state_dict": load_file(se / "model.safetensors")}, se / "se600m_epoch16.ckpt")
    (se / "model.safetensors").unlink()
    save_safetensors_copy(se / "se600m_epoch16.ckpt")
    sizes = HeadSizes(DIM, 16, len(GENES), hidden=16, n_layers=1, n_heads=2, ffn=64)
    backbone = {"bidirectional_attention": True, "num_attention_heads": 2}
    upstream = {"state_dict": new_model(sizes, 0).state_dict(), "global_step": 5}
    parameters = {"transformer_backbone_kwargs": backbone, "gene_names": GENES, "cell_set_len": 8}
    torch.save({**upstream, "hyper_parameters": parameters}, folder / "upstream.ckpt")
    (folder / "tiny.toml").write_text(tomli_w.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        embed([Path("starter.toml")], "vcc.zarr", EmbedConfig(encoder="pca", dim=DIM))
        files = {"splits": "starter.toml", "perturbations": "ESM2_pert_features.pt"}
        config = TrainConfig(**{**TINY, **files, "max_steps": 5, "val_every": 5})
        train(Path("vcc.zarr"), Path("competition"), config)
    return folder


def _lay_out(prepared: Path, folder: Path, part: list[Block]) -> None:
    """Copy what a part of a page may use; the encoder gets the names of weights that the part uses."""
    page, text = part[0].page, "".join(block.text for block in part)
    made = {"vcc.zarr", "competition"} - set(READY.get(page.name, ()))
    shutil.copytree(prepared, folder, ignore=lambda _, names: made & set(names), dirs_exist_ok=True)
    named = set(re.findall(r"se600m_\w+\.ckpt", text)) or {"se600m_epoch16.ckpt"}
    weights = folder / "SE-600M" / "se600m_epoch16.ckpt"
    for name in named - {weights.name}:
        shutil.copy(weights, weights.with_name(name))
    if weights.name not in named or "sest convert" in text:
        weights.with_name("se600m_epoch16.sest.safetensors").unlink()
    if weights.name not in named:
        weights.unlink()


# --- running


def _steps(number: str) -> str:
    """40,000 steps become 8, a stage of 5,000 becomes 1; of a small head 600 become 2."""
    n = int(number)
    return str(n // 5000 if n >= 5000 else max(1, n // 250))


def _with(words: list[str], option: str, value: str) -> list[str]:
    """The words with another value of an option, or with the option added."""
    if option not in words:
        return [*words, option, value]
    at = words.index(option)
    return [*words[: at + 1], value, *words[at + 2 :]]


def _reduced(words: list[str], page: str, before: list[str]) -> list[str]:
    """The command with everything that takes long, or a device that is not here, made small.

    Args:
        before: the last `se-st-train` of the page, which `...the same...` stands for.
    """
    words = [re.sub(r"(?<=checkpoint-step-)\d+", lambda m: _steps(m[0]), word) for word in words]
    if words[0] == "torchrun":
        at = words.index("sest")
        if page not in TORCHRUN:
            return _reduced(words[at:], page, before)
        n = str(min(2, int(words[words.index("--nproc-per-node") + 1])))
        return ["torchrun", *_with(words[1:at], "--nproc-per-node", n), *_reduced(words[at:], page, before)]
    if words[0] == "vcc":
        return [*words, "--expected-gene-dim", str(len(GENES))]
    if words[0] == "se-st-train":
        return _reduced_keys(words, before)
    for option in ("--max-steps", "--val-every", "--checkpoint-every"):
        if option in words:
            words = _with(words, option, _steps(words[words.index(option) + 1]))
    for option, most in (("--dim", DIM), ("--max-tokens", TOKENS)):
        if option in words and words[words.index(option) + 1].isdecimal():
            words = _with(words, option, str(most))
    for flag in (
        "--compile",
        "--tensorboard",
    ):  # a compiler, a package: tests/training/test_train.py and test_sinks.py have both
        words = [word for word in words if word != flag]
    if words[1] == "train" and "--resume" not in words:
        words += ["--config", "tiny.toml"]
    if words[1] == "run":
        words += ["--max-steps", "8"]
    if words[1] == "simulate":
        for option, value in TINY_CELLS.items():
            words = _with(words, option, value)
    return words


def _reduced_keys(words: list[str], before: list[str]) -> list[str]:
    given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    if "...the" in words:  # ... the same ...
        given = dict(word.lstrip("+").split("=", 1) for word in before[1:]) | given
    else:
        given = TINY_KEYS | given
    if int(given["training.max_steps"]) >= 5000:  # as written, not taken over from `before`
        given["training.max_steps"] = _steps(given["training.max_steps"])
    given["model.kwargs.hidden_dim"] = str(DIM)
    return ["se-st-train", *(f"++{key}={value}" for key, value in given.items())]


def _form_only(command: Command, part: list[Block]) -> bool:
    """Whether a command is not to be run; what can be checked of it is."""
    text, words = " ".join(command.words), command.words
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    if words[:2] == ["pip", "install"]:
        extras = [extra for word in words for extra in re.findall(r"\[(\w+)\]", word)]
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras), command
    if words[0] == "sbatch":
        assert words[1] in {block.title for block in part}, command
    return any(text.startswith(beginning) for beginning in FORM_ONLY) or "s3://" in text


def _run(words: list[str]) -> tuple[int, str]:
    """Run a command: in this process, or torchrun's in others. Returns its exit code and what it says of an error."""
    if words[0] == "torchrun":
        asked = get_args_parser().parse_args(words[1:])
        assert asked.module
        command = ["-m", asked.training_script, *asked.training_script_args]
        ranks = start_ranks(int(asked.nproc_per_node), command)
        said = "\n".join(rank.communicate()[1][-1000:] for rank in ranks)
        return max(abs(rank.wait(0.0)) for rank in ranks), said
    if words[0] == "vcc":
        program = str(Path(sys.executable).with_name("vcc"))
        done = subprocess.run([program, *words[1:]], capture_output=True, text=True)
        return done.returncode, done.stderr[-2000:]
    run = {"sest": main, "se-st-train": se_st_train.main}[words[0]]
    code: Any = 0
    with mock.patch.object(sys, "argv", words):
        try:
            run()
        except SystemExit as ended:
            code = ended.code
    return int(code or 0), ""


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_command_of_the_pages_runs(
    part: list[Block],
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _lay_out(prepared, tmp_path, part)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    before: list[str] = []
    for block in part:
        if block.language == "python":
            _run_python(block, names)
        for command in commands(block) if block.language == "bash" else ():
            if _form_only(command, part):
                continue
            words = _reduced(command.words, block.page.name, before)
            before = words if words[0] == "se-st-train" else before
            code, text = _run(words)
            said = capsys.readouterr()
            assert code == 0, f"{command}\nrun as {shlex.join(words)}\nexit code {code}\n{said.err}{text}"
    if part[0].page.name == "formats.md":
        _check_metrics(tmp_path / "competition" / "metrics.jsonl")


def _run_python(block: Block, names: dict[str, Any]) -> None:
    text = block.text
    if "tahoe" in text:  # has a test of its own, with files for it
        return
    if block.page == README:
        for large, small in PYTHON_SIZES.items():
            assert large in text, large
            text = text.replace(large, small)
        names = {**names, "TINY": TINY}
    try:
        exec(compile(text, str(block), "exec"), names)
    except Exception as error:
        raise AssertionError(f"{block}: {error!r}") from error


def _check_metrics(metrics: Path) -> None:
    """Every key of a metrics.jsonl is in the tables of the page on formats."""
    text = (ROOT / "docs" / "formats.md").read_text()
    for line in read_lines(metrics):
        for key in line:
            name = re.sub(rf"_({'|'.join((*BASELINES, 'real_half'))})$", "", key)
            assert f"\n| `{name}` |" in text, key


def test_every_exception_is_used() -> None:
    """A beginning in FORM_ONLY that no page has would only hide a mistake."""
    found = [" ".join(c.words) for p in (README, *DOCS) for b in blocks(p) if b.language == "bash" for c in commands(b)]
    for beginning in FORM_ONLY:
        assert any(text.startswith(beginning) for text in found), beginning
    assert set(READY) <= {page.name for page in DOCS}


@pytest.mark.parametrize("block", [b for p in DOCS for b in blocks(p) if b.language == "shell"], ids=str)
def test_scripts_are_shell(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


# --- what the pages name


def _options(command: str) -> set[str]:
    found = {"--help", "--help-all"}
    for parameter in (p for p in COMMANDS[command].params if not p.hidden):
        found |= {option for option in (*parameter.opts, *parameter.secondary_opts) if option.startswith("-")}
    return found


ALL_OPTIONS = set().union(*map(_options, COMMANDS))


def _sest_lines(page: Path) -> Iterator[str]:
    """Command lines of `sest`, in blocks and in code within sentences."""
    for block in blocks(page):
        if block.language in ("bash", "shell"):
            yield from re.sub(r"\\\n", " ", block.text).splitlines()
    yield from (span for span in _spans(page) if re.match(r"(sest|torchrun) ", span))


def _spans(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_every_option_that_is_named_exists(page: Path) -> None:
    for line in _sest_lines(page):
        if named := re.search(r"\bsest (\w+)\b(.*)", line.split(" # ")[0]):
            assert named[1] in COMMANDS, f"{page.name}: no command `sest {named[1]}`"
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", named[2])) - _options(named[1])
            assert not unknown, f"{page.name}: `sest {named[1]}` has no {unknown}"
    for span in _spans(page):
        if named := re.match(r"--[a-z][a-z0-9-]*", span):
            assert named[0] in ALL_OPTIONS | FOREIGN, f"{page.name}: {named[0]}"


def test_every_command_and_every_option_of_training_is_in_the_docs() -> None:
    text = "".join(page.read_text() for page in DOCS)
    assert [name for name in COMMANDS if f"sest {name}" not in text] == []
    training = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in sorted(_options("train") - {"-r", "-h", "--run"}) if not _is_named(name, training)] == []


def _is_named(option: str, text: str) -> bool:
    return option.startswith("--no-") or f"`{option}`" in text or option == "--help"


def test_every_room_and_module_is_in_the_tree() -> None:
    tree = README.read_text().partition("## The tree")[2]
    places = [path for path in (ROOT / "sest").iterdir() if not path.name.startswith("__") and not path.is_symlink()]
    rooms = {f"{path.name}/" for path in places if path.is_dir()}
    modules = {path.name for path in places if path.suffix == ".py"}
    assert set(re.findall(r"^  (\w+/|\w+\.py) ", tree, re.MULTILINE)) == rooms | modules
    for room in rooms:
        line = re.search(rf"^  {room} (.*(?:\n    .*)*)", tree, re.MULTILINE)
        named = {path.stem for path in (ROOT / "sest" / room).glob("*.py") if path.stem != "__init__"}
        assert line is not None and named <= set(re.findall(r"\w+", line[1])), room


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(file for entry in menu for file in entry.values()) == [page.name for page in DOCS]


def _anchors(page: Path) -> set[str]:
    """The identifiers of a page's headings, as Python-Markdown makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()))
    return found


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_file(), f"{page.name}: {target}"
        if page != README:
            assert there.is_relative_to(ROOT / "docs"), f"{page.name}: {target} is not part of the site"
        assert not anchor or anchor in _anchors(there), f"{page.name}: {target}"


def test_pictures_have_the_sizes_of_their_script_and_load_nothing() -> None:
    folder = ROOT / "docs" / "pictures"
    script = (folder / "make.py").read_text()
    sizes = {name: re.findall(r"\((\d+), \d+\)", script.partition(f"{name} = ")[2].splitlines()[0]) for name in SIZES}
    drawn = {f"{SIZES[name][0]}-{width}.{SIZES[name][1]}" for name, widths in sizes.items() for width in widths}
    assert len(drawn) == 6 and {path.name for path in folder.iterdir() if path.suffix in (".svg", ".png")} == drawn
    for picture in folder.glob("*.svg"):
        assert not re.search(r"url\(['\"]?http|href=|<image", picture.read_text()), picture.name


SIZES = {"TERMINALS": ("panel", "svg"), "WINDOWS": ("report", "png")}


def _key_row(key: Key) -> str:
    option = se_st_train._option_of(key)
    note = f"takes {', '.join(f'`{word}`' for word in key.words)}" if key.words and not key.note else key.note
    if key.kind == FIXED:
        note = f"`{' or '.join(key.words or ())}` only: {key.note}"
    return f"| `{key.name}` | {'' if option == '-' else f'`{option}`'} | {note} |"


def test_the_table_of_the_ancestors_keys_is_the_codes() -> None:
    """Where this fails, paste the rows of the message into docs/moving.md."""
    text = (ROOT / "docs" / "moving.md").read_text()
    table = text.partition("| key | of sest | note |\n|---|---|---|\n")[2].partition("\n\n")[0]
    expected = "\n".join(map(_key_row, KEYS.values()))
    assert table == expected, expected


def _messages() -> list[str]:
    """All texts in the code; what is filled in is left out."""
    found = []
    for folder in ("sest", "cache", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_every_error_in_troubleshooting_is_one_of_the_codes() -> None:
    messages = _messages()
    headings = re.findall(r"^### `([^`]+)`$", prose(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert len(headings) > 30
    assert [text for text in headings if not any(text in message for message in messages)] == []


def test_every_finding_of_the_diagnosis_is_explained() -> None:
    calls = [
        n for n in ast.walk(ast.parse((ROOT / "sest" / "runs" / "diagnose.py").read_text())) if isinstance(n, ast.Call)
    ]
    names = {c.args[0].value for c in calls if isinstance(c.func, ast.Name) and c.func.id == "Finding" and c.args}  # type: ignore[attr-defined]
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = text.partition("| finding | what was seen | what to do |\n|---|---|---|\n")[2].partition("\n\n")[0]
    assert {row.split(" | ")[0].strip("| ") for row in table.splitlines()} == names


def test_every_module_of_the_api_page_can_be_imported() -> None:
    """`make docs` finds them among links; here they are looked up in the installed package."""
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_recipe_for_tahoe_makes_cells_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two made-up shards of its layout: the marker is left out, tokens become genes, doses come from the sample."""
    for name in ("metadata", "data"):
        (tmp_path / "tahoe" / name).mkdir(parents=True)
    genes = {"token_id": [5, 3, 4], "gene_symbol": ["C", "A", "B"], "ensembl_id": ["ENSG3", "ENSG1", "ENSG2"]}
    pq.write_table(pa.table(genes), tmp_path / "tahoe/metadata/gene_metadata.parquet")
    doses = ["[('DMSO_TF', 0.0, 'uM')]", "[('Trametinib', 0.05, 'uM')]"]
    samples = pa.table({"sample": ["s1", "s2"], "drugname_drugconc": doses})
    pq.write_table(samples, tmp_path / "tahoe/metadata/sample_metadata.parquet")
    for shard in range(2):
        cells = {
            "genes": [[1, 3, 5], [1, 4], [1]],
            "expressions": [[-2.0, 7.0 + shard, 1.0], [-2.0, 2.0], [-2.0]],
            "drug": ["DMSO_TF", "Trametinib", "Trametinib"],
            "sample": ["s1", "s2", "s2"],
            "BARCODE_SUB_LIB_ID": [f"{shard}-{i}" for i in range(3)],
            "cell_line_id": ["CVCL_1"] * 3,
            "plate": ["p1"] * 3,
        }
        pq.write_table(pa.table(cells), tmp_path / f"tahoe/data/train-{shard}.parquet")
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("### Tahoe-100M")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/data.md", "exec"), {})
    with CellFile(tmp_path / "tahoe/data/train-1.h5ad") as file:
        assert file.rows(0, 3).toarray().tolist() == [[8, 0, 1], [0, 2, 0], [0, 0, 0]]
        assert file.var.index.tolist() == ["ENSG1", "ENSG2", "ENSG3"]
        assert file.obs["drugname_drugconc"].tolist() == [doses[0], doses[1], doses[1]]
        found = detect_columns(file.obs, pert_col="drugname_drugconc", batch_col="plate")
        assert (found.control, found.cell_type) == (doses[0], "cell_line")
