"""What is published is what is meant: one version, few dependencies, a whole wheel, nothing of one machine."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import seawall._version

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "seawall"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# Written in two pieces, or this file would find itself.
REGISTRY_HOSTS = [
    "pypi" + ".org",
    "python" + "hosted.org",
    "registry.npm" + "js.org",
    "deb.debian" + ".org",
    "index" + "-url",
    "find" + "-links",
]
HOME_DIRECTORY = re.compile(r"(?<![\w/.{}-])/(?:home/\w+|Users/\w+|root/\.)[\w./-]*")


def imported_by(path: Path) -> set[str]:
    """The top-level names that one file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def imported_by_the_package(*, except_in: str = "") -> set[str]:
    files = [path for path in PACKAGE.rglob("*.py") if not except_in or except_in not in path.parts]
    return set().union(*map(imported_by, files))


MODULES = {"prometheus-client": "prometheus_client", "PyYAML": "yaml"}


def module_of(requirement: str) -> str:
    name = Requirement(requirement).name
    return MODULES.get(name, name)


@pytest.fixture(scope="session")
def published() -> dict[str, str]:
    """Every text file that a clone would hold, by its name."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git, or no clone: the published files are not known")
    texts = {}
    for name in filter(None, listed.stdout.decode().split("\0")):
        try:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # a picture, or a file that is deleted and not committed yet
    return texts


def test_no_file_names_a_path_of_one_machine(published: dict[str, str]) -> None:
    here = f"{ROOT}/"
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in published.items()
        for number, line in enumerate(text.splitlines(), 1)
        if here in line or HOME_DIRECTORY.search(line)
    ]
    assert found == []


def test_no_file_names_a_registry(published: dict[str, str]) -> None:
    found = [f"{name}: {host}" for name, text in published.items() for host in REGISTRY_HOSTS if host in text]
    assert found == []


def test_no_lock_file_is_published(published: dict[str, str]) -> None:
    locks = {"poetry.lock", "uv.lock", "pdm.lock", "Pipfile.lock", "pylock.toml", "package-lock.json"}
    assert [name for name in published if Path(name).name in locks] == []


def test_the_version_has_one_source() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", seawall._version.__version__)
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{seawall._version.__version__}]" in changelog


def test_the_installed_version_is_the_one_of_the_source() -> None:
    try:
        installed = importlib.metadata.version("seawall")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("seawall is not installed, the tests run on its source")
    assert installed == seawall._version.__version__


def test_the_extras_are_the_documented_ones() -> None:
    assert set(EXTRAS) == {"redis", "client", "cli", "docs", "dev", "bench"}


def test_dev_has_everything_a_user_can_install() -> None:
    [itself] = [Requirement(line) for line in EXTRAS["dev"] if line.startswith("seawall")]
    assert itself.extras == {"redis", "client", "cli", "docs"}


@pytest.mark.parametrize("extra", ["", "redis", "client", "cli"])
def test_what_a_user_installs_has_a_lower_bound_and_no_upper_one(extra: str) -> None:
    for line in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        assert [specifier.operator for specifier in Requirement(line).specifier] == [">="], line


def test_every_dependency_is_imported() -> None:
    everywhere = {module_of(line) for line in PROJECT["dependencies"] if not Requirement(line).marker}
    assert everywhere - imported_by_the_package() == set()


def test_every_import_is_a_dependency() -> None:
    declared = {module_of(line) for extra in ([], *map(EXTRAS.get, ("redis", "client", "cli"))) for line in extra or ()}
    declared |= {module_of(line) for line in PROJECT["dependencies"]}
    declared.add("pydantic_core")  # pydantic asks for one exact version of it, and documents what is in it as its own
    declared.add("opentelemetry")  # the application's own: looked for, and done without
    outside = imported_by_the_package(except_in="cli") - set(sys.stdlib_module_names) - {"seawall"}
    assert outside - declared == set()


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_the_pythons_it_names_are_the_ones_it_runs_on() -> None:
    named = {line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert PROJECT["requires-python"] == f">={min(named, key=lambda version: int(version[2:]))}"
    assert f"py{PROJECT['requires-python'][2:].replace('.', '')}" == PYPROJECT["tool"]["ruff"]["target-version"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this source, built without a network."""
    if not importlib.util.find_spec("hatchling"):
        pytest.skip("hatchling is not installed, a wheel would need the network")
    if not importlib.util.find_spec("pip"):
        pytest.skip("pip is not installed, a wheel cannot be built")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    info = f"seawall-{seawall._version.__version__}.dist-info"
    names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names} == {"seawall", info}
    assert f"{info}/licenses/LICENSE" in names
    source = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("seawall/")} == source
    assert "seawall/py.typed" in source


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"seawall-{seawall._version.__version__}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Version"] == seawall._version.__version__
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)
    assert "seawall = seawall.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
