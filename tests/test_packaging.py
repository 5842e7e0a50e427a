"""What is shipped, what it needs and where it can be imported; which way imports point is tests/test_rooms.py."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import sest
from helpers.packages import canonical, needed_by
from helpers.source_tree import FOLDERS, ROOT, imported, modules

DATE = {"SOURCE_DATE_EPOCH": "1764460800"}  # of all files in a wheel
PACKAGES = {name: path.parent for name, path in modules().items() if path.name == "__init__.py"}
SLOW_IMPORTS = {"torch", "anndata", "zarr", "pandas", "scipy", "h5py"}  # 0.1 to 3 s each


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_an_init_is_in_the_packages_list(project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    assert set(setuptools["packages"]) == set(PACKAGES)
    assert setuptools["package-dir"] == FOLDERS


def test_every_file_in_a_package_is_python_or_declared_as_data(project: dict[str, Any]) -> None:
    """setuptools ships only *.py unless told otherwise, so any other file would be missing from the wheel."""
    declared = project["tool"]["setuptools"].get("package-data", {})
    for package, folder in PACKAGES.items():
        shipped = {p for pattern in ["*.py", *declared.get(package, [])] for p in folder.glob(pattern)}
        assert {p for p in folder.iterdir() if p.is_file()} == shipped


def test_cli_and_cache_cannot_be_imported_by_themselves(tmp_path: Path) -> None:
    code = """
import importlib.util, sest.cli, sest.cache
assert importlib.util.find_spec("cli") is None and importlib.util.find_spec("cache") is None
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=60)


def test_the_command_line_imports_nothing_slow_before_a_command_runs() -> None:
    code = f"import sys; from sest.cli.main import app; print(*sorted({SLOW_IMPORTS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_third_party_import_is_a_declared_dependency(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    optional = ("challenge", "datasets", "eval", "filters", "hub", "sinkhorn", "tensorboard", "triton", "wandb")
    needed = [*project["project"]["dependencies"], *(package for extra in optional for package in extras[extra])]
    declared = {_canonical(re.split(r"[<>=!;\[ ]", requirement)[0]) for requirement in needed}
    declared.add("ipython")  # imported where it runs already: by the kernel of a notebook
    distributions = metadata.packages_distributions()
    for path in modules().values():
        for top in {name.split(".")[0] for name in imported(path)} - {"sest"} - sys.stdlib_module_names:
            names = {_canonical(name) for name in distributions.get(top, [top])}
            assert names & declared, f"{path.name} imports {top}, which pyproject.toml does not name"


def test_carry_txt_has_what_is_needed_beside_pytorch_but_for_what_it_says(project: dict[str, Any]) -> None:
    lines = (ROOT / "carry.txt").read_text(encoding="utf-8").splitlines()
    listed = {canonical(line): line for line in lines if not line.startswith("#")}
    needed = needed_by(project["project"]["dependencies"]) - needed_by(["torch", "numpy", "fsspec"])
    left_out = needed_by(["numba", "plotly", "pygments", "markdown-it-py", "pydantic"])
    of_some = {"pytz", "msgspec", "scverse-misc", "session-info2"}  # of pandas 2, zarr 3.4, later AnnData
    assert needed - left_out | {"packaging"} <= set(listed) <= needed | of_some
    assert all(name in "\n".join(lines) for name in ("numba", "plotly", "pygments", "markdown-it-py", "pydantic"))
    ranged = [Requirement(line.partition("#")[0]) for line in listed.values()]
    assert [each.name for each in ranged if each.specifier] == ["typer"]


def test_the_site_names_the_version() -> None:
    assert (
        yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["copyright"]
        == f"sest {sest.__version__}, MIT"
    )


def test_the_conda_recipe_is_of_this_version_and_needs_the_same(project: dict[str, Any]) -> None:
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == sest.__version__
    names = {"torch": "pytorch"}  # the others are called alike
    parts = [re.match(r"([\w-]+)(.*)", text) for text in project["project"]["dependencies"]]
    needed = [f"{names.get(part[1], part[1])} {part[2]}" for part in parts if part is not None]
    assert recipe["requirements"]["run"] == [f"python {project['project']['requires-python']}", *needed]
    scripts = [f"{name} = {place}" for name, place in project["project"]["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts
    assert set(project["build-system"]["requires"]) <= {
        text.replace(" ", "") for text in recipe["requirements"]["host"]
    }


CONTAINERS = ("Dockerfile", "apptainer.def")


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_installs_this_at_the_pinned_versions(name: str, project: dict[str, Any]) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    version = re.search(r"(?:FROM|From:) python:(3\.\d+)-slim", text)
    assert version is not None and (3, 11) <= tuple(map(int, version[1].split("."))) <= (3, 13)  # as constraints.txt
    install = next(line for line in text.splitlines() if "pip install" in line)
    extras = re.search(r'EXTRAS="([\w,]+)"' if name == "Dockerfile" else r"/src\[([\w,]+)\]", text)
    assert "-c /src/constraints.txt" in install and extras is not None
    assert set(extras[1].split(",")) <= set(project["project"]["optional-dependencies"])
    copied = {*re.findall(r"[\w.]+(?= (?:[\w.]+ )*/src)", text)} & {path.name for path in ROOT.iterdir()}
    needed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "sest",
        *project["tool"]["setuptools"]["package-dir"].values(),
    }
    assert copied == needed
    assert re.search(r'ENTRYPOINT \["sest"\]' if name == "Dockerfile" else r'exec sest "\$@"', text)


def test_the_dockerfile_and_the_recipe_are_well_formed() -> None:
    joined = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= {"FROM", "RUN", "ARG", "ENV", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert lines[0].startswith("FROM ")
    recipe = (ROOT / "apptainer.def").read_text(encoding="utf-8")
    sections = re.findall(r"^%(\w+)$", recipe, re.MULTILINE)
    assert sections == ["files", "post", "environment", "runscript", "test"]
    header = [line for line in recipe.partition("%files")[0].splitlines() if line and not line.startswith("#")]
    assert dict(line.split(": ") for line in header) == {"Bootstrap": "docker", "From": "python:3.12-slim"}
    for section in ("post", "environment", "runscript"):  # shell
        body = recipe.partition(f"%{section}\n")[2].partition("\n%")[0]
        subprocess.run(["bash", "-n", "-c", body], check=True, timeout=10)


@pytest.mark.parametrize(
    ("name", "expected"), [("ci", ["bash .ci/run", "make docs"]), ("versions", ["make newest", "make oldest"])]
)
def test_the_workflows_run_what_anyone_can_run(name: str, expected: list[str]) -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == expected and (ROOT / ".ci" / "run").is_file()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"docs", "newest", "oldest"} <= set(targets)


def test_the_citation_and_the_changes_are_of_this_version(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert citation["version"] == sest.__version__ and citation["license"] == project["project"]["license"]
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changes[0] == "Unreleased" and sest.__version__ in changes


def test_every_extra_an_error_message_names_exists(project: dict[str, Any]) -> None:
    extras = set(project["project"]["optional-dependencies"])
    for path in modules().values():
        assert set(re.findall(r"sest\[(\w+)\]", path.read_text(encoding="utf-8"))) <= extras, path.name


def test_the_installed_version_is_that_of_the_source() -> None:
    """An old install left beside a new checkout fails here and not in stranger ways."""
    import sest

    assert metadata.version("sest") == sest.__version__


# ---- an installation that is not editable


@dataclass(frozen=True)
class Installed:
    """sest in an environment of its own, which finds the other packages where this one has them."""

    sdist: Path
    wheel: Path
    site: Path  # site-packages
    python: Path

    def run(self, folder: Path, *words: str | Path) -> str:
        """What Python prints, started in a folder."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.python, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of the sdist of this tree, as `pip install .` makes it."""
    work = tmp_path_factory.mktemp("install")
    tree, venv = work / "tree", work / "venv"
    tree.mkdir()  # a copy: setuptools builds in place, and would ship what an earlier build left there
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    _python("-m", "build", "--no-isolation", "--outdir", work / "dist", tree, **DATE)
    _python("-m", "venv", "--without-pip", venv)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv), "platbase": str(venv)}))
    (wheel,), (sdist,) = (list((work / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    _python("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel)
    # Python reads no .pth files of a folder that one names: an editable sest in there stays unknown.
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return Installed(sdist, wheel, site, Path(sysconfig.get_path("scripts", "venv", {"base": str(venv)}), "python"))


def _python(*words: str | Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"


def test_an_installation_has_every_module_and_every_data_file_and_nothing_at_the_top_but_sest(
    installed: Installed, project: dict[str, Any]
) -> None:
    expected = set[str]()
    for package, folder in PACKAGES.items():
        patterns = ["*.py", *project["tool"]["setuptools"]["package-data"].get(package, [])]
        expected |= {f"{package.replace('.', '/')}/{p.name}" for pattern in patterns for p in folder.glob(pattern)}
    files = [path for path in (installed.site / "sest").rglob("*") if path.is_file()]
    assert {path.relative_to(installed.site).as_posix() for path in files if path.suffix != ".pyc"} == expected
    assert not any(path.is_symlink() for path in files)
    rest = {path.name for path in installed.site.iterdir()} - {"sest", "bin", "others.pth"}
    assert all(name.endswith(".dist-info") for name in rest), rest


def test_the_wheel_is_the_same_bytes_again(installed: Installed, tmp_path: Path) -> None:
    """From the sdist and at another time; what says when is SOURCE_DATE_EPOCH."""
    with tarfile.open(installed.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    _python("-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "again", tree, **DATE)
    (again,) = (tmp_path / "again").iterdir()
    assert again.name == installed.wheel.name and again.read_bytes() == installed.wheel.read_bytes()


def test_an_sdist_holds_every_module_once_and_no_links(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    found = sorted(name for m in members if (name := m.name.partition("/")[2]).endswith(".py") and name != "setup.py")
    assert found == sorted(path.relative_to(ROOT).as_posix() for path in modules().values())


@pytest.mark.parametrize("where", ["in the checkout", "elsewhere"])
def test_every_package_imports_without_an_editable_installation(
    installed: Installed, finished: Path, tmp_path: Path, where: str
) -> None:
    """The README's example too. In the checkout Python finds the checkout's sest first, and its parts by the links."""
    folder = ROOT if where == "in the checkout" else tmp_path
    code = f"""
import sys, sest, sest.cache, sest.cli, sest.cache.reader, sest.cli.main
{_imports_of_the_readme()}
print(len(sest.cache.open_cache({str(finished)!r}).groups))
print(*(sys.modules[name].__file__ for name in ("sest", "sest.cache", "sest.cli")), sep="\\n")
"""
    n_groups, *files = installed.run(folder, "-c", code).splitlines()
    assert n_groups == "2"
    home = ROOT if where == "in the checkout" else installed.site
    assert [Path(file).parent for file in files] == [home / "sest", home / "sest/cache", home / "sest/cli"]
    assert "embed" in installed.run(folder, "-m", "sest", "--help")


def _imports_of_the_readme() -> str:
    """The import lines of its Python examples."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    nodes = [node for text in examples for node in ast.parse(text).body]
    lines = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert lines
    return "\n".join(lines)


@pytest.mark.parametrize("where", ["in the checkout", "elsewhere"])
def test_mypy_resolves_every_package(installed: Installed, tmp_path: Path, where: str) -> None:
    """By the links alone, or from what is installed. `skip`: whether a module is found is known without reading it."""
    folder, option = (ROOT, "--no-site-packages")
    if where == "elsewhere":
        folder, option = tmp_path, f"--python-executable={installed.python}"
    command = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir=/dev/null", "--follow-imports=skip", option]
    code = "import sest.cache.reader, sest.cli.main, sest.head.loss\nimport sest.cache.nothing"
    done = subprocess.run([*command, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    found = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(found) == 1 and '"sest.cache.nothing"' in found[0], done.stdout + done.stderr


def test_git_keeps_the_links_that_make_packages_of_cli_and_cache() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    command = ["git", "ls-files", "--stage", "sest/cache", "sest/cli"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["120000", "120000"]
    for name in ("cache", "cli"):
        assert os.readlink(ROOT / "sest" / name) == f"../{name}"


def _canonical(name: str) -> str:
    """PEP 503: `tomli_w`, `Tomli-W` -> `tomli-w`."""
    return re.sub(r"[-_.]+", "-", name).lower()
