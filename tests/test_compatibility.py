"""What docs/compatibility.md promises: versions, a bare installation with torch alone, the suite with another torch."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distclip

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = torch.__version__.partition("+")[0]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, **environment}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=110, env=settings, cwd=ROOT)


def test_version_is_semantic() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", distclip.__version__)


def test_document_tells_what_the_package_asks_for() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    assert PROJECT["dependencies"] == [f"torch{re.findall(r'^[|] torch [|] (>=[0-9.]+) [|]', text, re.MULTILINE)[0]}"]
    assert PROJECT["requires-python"] == re.findall(r"^\| python \| (>=[0-9.]+) \|", text, re.MULTILINE)[0]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    table = dict(re.findall(r"^\| (\S+) \| [^|]*\| ([^| ]+) \|$", text, re.MULTILINE))
    packages = {"torch", "accelerate", "transformers", "lightning", "deepspeed"}
    assert {name: table[name] for name in packages} == {name: pins[name] for name in packages}
    asked = {
        name: requirement
        for extra in PROJECT["optional-dependencies"].values()
        for name, _, requirement in (re.split(r"(?=>=)()", wanted) for wanted in extra if ">=" in wanted)
    }
    for name in packages - {"torch"}:
        assert re.search(rf"^\| {name} \| {asked[name]} \|", text, re.MULTILINE), (name, asked[name])


@pytest.mark.parametrize("version", ["", "2.9", "latest; ls"])
def test_another_torch_must_be_named(version: str) -> None:
    done = run("bash", "launch/test_torch.sh", version)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == f"test_torch.sh: name a version of torch such as 2.9.1, got '{version}'"


def test_another_build_is_another_torch(tmp_path: Path) -> None:
    """2.13.0+cpu is not the 2.13.0+cu128 that was asked for; nothing is fetched here: the interpreter is not one."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2.13.0+cpu\n")
    python.chmod(0o755)
    done = run("bash", "launch/test_torch.sh", "2.13.0", PYTHON=str(python), TORCH_BUILD="cu128")
    assert done.returncode == 1
    assert ".venv-torch-2.13.0-cu128/bin/python" in done.stderr
    assert "test_torch.sh: pip could not install torch==2.13.0+cu128: see above" in done.stderr
    done = run("bash", "launch/test_torch.sh", "2.13.0", PYTHON=str(python), TORCH_BUILD="cpu")
    assert (done.returncode, done.stdout) == (0, "2.13.0+cpu\n")


@pytest.mark.slow
def test_suite_runs_with_a_torch_that_is_there() -> None:
    chosen = ("-p", "no:cacheprovider", "tests/test_package.py", "-k", "typed")
    done = run("bash", "launch/test_torch.sh", TORCH, *chosen, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_audit_names_what_it_needs(tmp_path: Path) -> None:
    # Not /usr/bin, where a system may have its own pip-audit.
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    done = run("/bin/bash", "launch/audit_dependencies.sh", PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("audit_dependencies.sh: needs pip-audit, which is no part of this project")


def test_audit_takes_what_could_not_be_looked_up_for_a_failure(tmp_path: Path) -> None:
    """Without --strict pip-audit says "No known vulnerabilities found" of a mirror that knows no advisories."""
    (tmp_path / "pip-audit").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "pip-audit").chmod(0o755)
    done = run("/bin/bash", "launch/audit_dependencies.sh", "--desc", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.stdout.split() == [
        *("--strict", "--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--desc")
    ]


def needed_by_torch() -> Iterator[Path]:
    """Folders and files in site-packages that torch needs to be imported, its own among them."""
    names, seen = ["torch"], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        yield from (Path(str(found.locate_file(top))) for top in sorted(tops))
        wanted = (requirement for requirement in found.requires or () if "extra ==" not in requirement)
        names += [re.split(r"[^\w.-]", requirement)[0] for requirement in wanted if _fits(requirement)]


def _fits(requirement: str) -> bool:
    try:
        importlib.metadata.distribution(re.split(r"[^\w.-]", requirement)[0])
    except importlib.metadata.PackageNotFoundError:
        return False  # of another system or Python
    return True


_EVERYTHING = """
import importlib, pkgutil, distclip
print(distclip.__version__)
for module in pkgutil.walk_packages(distclip.__path__, "distclip.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        print(module.name, "|", error)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_built_and_installed_with_torch_alone(tmp_path: Path) -> None:
    """Sdist, and the wheel that is built of it; pip fetches hatchling, as it does for everyone who installs."""
    tools, bare = tmp_path / "tools", tmp_path / "bare"
    for command in (
        (sys.executable, "-m", "venv", tools),
        (tools / "bin/pip", "install", "--quiet", "hatchling"),
        (tools / "bin/hatchling", "build", "--target", "sdist", "--directory", tmp_path),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.name == f"distclip-{distclip.__version__}.tar.gz"
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")

    done = run(sys.executable, "-m", "venv", "--without-pip", bare)
    assert done.returncode == 0, done.stderr
    (packages,) = bare.glob("lib/python*/site-packages")
    for path in needed_by_torch():
        (packages / path.name).symlink_to(path)
    done = run(sys.executable, "-m", "pip", "--python", bare / "bin/python", "install", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr

    done = run(bare / "bin/python", "-P", "-c", "import distclip; print(distclip.__file__)", PYTHONPATH="")
    assert done.stdout.strip() == str(packages / "distclip" / "__init__.py"), done.stderr
    help_ = run(bare / "bin/distclip", "--help", PYTHONPATH="")
    assert (help_.returncode, help_.stdout) == (1, "")
    assert help_.stderr.strip().splitlines()[-1] == (
        "distclip: the command line needs typer: pip install 'distclip[cli]'"
    )
    version, *missing = run(bare / "bin/python", "-P", "-c", _EVERYTHING, PYTHONPATH="").stdout.splitlines()
    assert version == distclip.__version__
    assert missing, "some modules need an extra, or this environment is not bare"
    outside = ("distclip.cli", "distclip.plots", "distclip.bench.", "distclip.integrations.", "distclip.kernels.")
    assert [line for line in missing if not line.startswith(outside)] == []
