"""Other projects' own tests, once with torch's clipping functions and once with distclip's in their place.

    python launch/strangers.py                          # all that can be fetched: some minutes, and the network
    python launch/strangers.py --only skorch
    python launch/strangers.py --pytorch ~/pytorch      # a checkout of PyTorch, whose tests PyPI does not have
    python launch/strangers.py --docs                   # puts the table into docs/strangers.md

Source distributions and what they need are fetched from PyPI into ``--folder``, outside of the environment, at the
versions below. It ends with status 1 where a test differs that ``EXPLAINED`` does not name, or where a project fails to
run or never clips.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "strangers.md"
#: Seconds that one run of one project's tests may take.
PATIENCE = 600


@dataclass(frozen=True)
class Peer:
    """A project, and those of its tests that clip."""

    name: str
    version: str
    tests: tuple[str, ...]
    select: str
    needs: tuple[str, ...] = ()
    """Packages as pip is to install them, without their dependencies."""
    lent: dict[str, str] = field(default_factory=dict)
    """Files of this folder, and where its tests need them."""


PEERS = (
    Peer("pytorch", "", ("test/test_nn.py",), "clip_grad", ("expecttest==0.3.0",)),
    Peer(
        "transformers",
        "5.23.0",
        ("tests/test_llama.py",),
        "overfit or plan_vs_ddp or bf16_training",
        ("parameterized==0.9.0",),
        {"peer_llama.py": "tests/test_llama.py", "peer_ranks.py": "tests/distributed_testing_utils.py"},
    ),
    Peer(
        "pytorch-forecasting",
        "1.8.0",
        ("tests/test_models/test_nbeats.py", "tests/test_models/test_nbeats_kan.py"),
        "integration",
        ("pytorch-forecasting==1.8.0", "scikit-base==1.2.0", "pandas==3.1.1"),
    ),
    Peer(
        "stable-baselines3",
        "2.9.2",
        ("tests/test_run.py", "tests/test_deterministic.py"),
        "a2c or ppo or dqn or advantage",
        (
            "stable-baselines3==2.9.2",
            "gymnasium==1.4.0",
            "cloudpickle==3.1.2",
            "farama-notifications==0.0.6",
            "pandas==3.1.1",
        ),
    ),
    Peer("pytorch_optimizer", "4.1.0", ("tests",), "sam or clip or lomo", ("pytorch_optimizer==4.1.0",)),
    Peer(
        "skorch",
        "1.4.0",
        ("skorch/tests/callbacks/test_regularization.py",),
        "",
        ("tabulate==0.10.0", "flaky==3.8.1"),
    ),
)

#: Tests that are to fail under distclip, by the end of their names, and why.
EXPLAINED = {
    "test_clip_grad_norm_error_if_nonfinite_cpu": "asks for norms of order 0 and below (`ValueError` here), and for "
    "`RuntimeError` where finite float64 gradients of 2e200 overflow (`OverflowError` here)",
}


@dataclass(frozen=True)
class Run:
    """What came of each test, and how often it clipped in pytest's own process."""

    outcomes: dict[str, str]
    calls: int

    def passed(self) -> int:
        return Counter(self.outcomes.values())["passed"]


@dataclass(frozen=True)
class Comparison:
    peer: Peer
    torch: Run
    distclip: Run

    def differing(self) -> list[str]:
        names = sorted({*self.torch.outcomes, *self.distclip.outcomes})
        return [name for name in names if self.torch.outcomes.get(name) != self.distclip.outcomes.get(name)]

    def unexplained(self) -> list[str]:
        return [name for name in self.differing() if reason(name) is None]

    def row(self) -> str:
        told = "; ".join(f"`{name.rpartition('::')[2]}`: {reason(name) or '?'}" for name in self.differing())
        asked = f", `-k '{self.peer.select}'`" if self.peer.select else ""
        cells = [
            f"{self.peer.name} {self.peer.version}".strip(),
            ", ".join(f"`{test}`" for test in self.peer.tests) + asked,
            f"{self.torch.passed()} of {len(self.torch.outcomes)}",
            f"{self.distclip.passed()} of {len(self.distclip.outcomes)}",
            f"{self.distclip.calls:,}",
            told or "none",
        ]
        return f"| {' | '.join(cells)} |"


def reason(test: str) -> str | None:
    """Why a test differs, if that is known."""
    return next((why for end, why in EXPLAINED.items() if test.endswith(end)), None)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"], check=True)


def fetched(peer: Peer, folder: Path) -> Path:
    """The project's source distribution, unpacked."""
    archives = folder / "archives" / peer.name
    if not archives.exists():
        # Only the project itself: nothing that could bring another torch along.
        partial = archives.with_suffix(".partial")
        pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(partial), f"{peer.name}=={peer.version}")
        partial.rename(archives)
    (archive,) = archives.iterdir()
    target = folder / "sources" / peer.name
    shutil.rmtree(target, ignore_errors=True)
    with tarfile.open(archive) as opened:
        opened.extractall(target, filter="data")
    (source,) = target.iterdir()
    return source


def prepared(peer: Peer, source: Path, folder: Path) -> Path:
    """Install what its tests need, lend what they lack; returns where the packages are."""
    packages = folder / "packages" / peer.name
    if peer.needs and not packages.exists():
        pip("install", "--no-deps", "--target", str(packages), *peer.needs)
    for ours, theirs in peer.lent.items():
        shutil.copyfile(HERE / ours, source / theirs)
        (source / theirs).with_name("__init__.py").touch()
    return packages


def run_tests(peer: Peer, source: Path, packages: Path, patched: bool, folder: Path) -> Run:
    """Run the tests in a process of their own."""
    results = (folder / f"{peer.name}-{'distclip' if patched else 'torch'}.json").resolve()
    results.unlink(missing_ok=True)
    paths = [packages.resolve(), HERE.resolve(), HERE.parent.resolve()]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "STRANGERS_PATCH": str(int(patched)),
        "STRANGERS_RESULTS": str(results),
    }
    # Their own options may ask for plugins that are not here, and turn other packages' warnings into errors.
    options = ["-q", "-p", "peer_plugin", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default"]
    asked = ["-k", peer.select] if peer.select else []
    command = [sys.executable, "-m", "pytest", *options, *asked, *peer.tests]
    log = results.with_suffix(".log")
    with log.open("w") as output:
        try:
            done = subprocess.run(command, cwd=source, env=environment, stdout=output, stderr=output, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"strangers.py: the tests of {peer.name} ran for {PATIENCE} s: see {log}") from None
    if done.returncode not in (0, 1):
        raise SystemExit(f"strangers.py: the tests of {peer.name} did not run: see {log}")
    return Run(**json.loads(results.read_text()))


def compare(peer: Peer, source: Path, folder: Path) -> Comparison:
    packages = prepared(peer, source, folder)
    return Comparison(peer, *(run_tests(peer, source, packages, patched, folder) for patched in (False, True)))


def table(comparisons: Sequence[Comparison]) -> str:
    head = "| project | tests | pass with torch | pass with distclip | clips | differences |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(comparison.row() for comparison in comparisons)])


def complaints(comparisons: Sequence[Comparison]) -> list[str]:
    """What nobody has explained, and comparisons that compare nothing."""
    differing = [f"{test} differs" for comparison in comparisons for test in comparison.unexplained()]
    idle = [comparison.peer.name for comparison in comparisons if not comparison.distclip.calls]
    # Tests that fail either way do not differ.
    failed = [comparison.peer.name for comparison in comparisons if not comparison.torch.passed()]
    told = [f"{name} never clipped: nothing was compared" for name in idle]
    return differing + told + [f"no test of {name} passes with torch: nothing was compared" for name in failed]


def write_document(text: str) -> None:
    """Exchange the rows of the table of projects that ``text`` has; those of projects that were not run stay."""
    lines = DOCUMENT.read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| project |"))
    end = next(place for place in range(start, len(lines)) if not lines[place].startswith("|"))
    head, new = text.splitlines()[:2], text.splitlines()[2:]
    rows = {_project(row): row for row in (*lines[start + 2 : end], *new)}
    order = [peer.name for peer in PEERS]
    lines[start:end] = [*head, *(rows[name] for name in sorted(rows.keys() & {*order}, key=order.index))]
    DOCUMENT.write_text("\n".join(lines) + "\n")


def _project(row: str) -> str:
    return row.strip("| ").split()[0]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[peer.name for peer in PEERS], help="these projects alone")
    parser.add_argument("--folder", type=Path, default=Path("runs/strangers"), help="for all that is fetched")
    parser.add_argument("--pytorch", type=Path, help="a checkout of PyTorch, of the version that is installed")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/strangers.md")
    chosen = parser.parse_args(arguments)
    if chosen.pytorch and not (chosen.pytorch / "test" / "test_nn.py").is_file():
        parser.error(f"--pytorch {chosen.pytorch}: there is no test/test_nn.py in it")
    if chosen.only and "pytorch" in chosen.only and not chosen.pytorch:
        parser.error("--only pytorch: its tests are not on PyPI, name a checkout by --pytorch")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parsed(arguments)
    wanted = chosen.only or [peer.name for peer in PEERS if peer.name != "pytorch" or chosen.pytorch]
    comparisons = []
    for peer in PEERS:
        if peer.name in wanted:
            print(f"{peer.name} ...", flush=True)
            source = chosen.pytorch if peer.name == "pytorch" else fetched(peer, chosen.folder)
            comparisons.append(compare(peer, source, chosen.folder))
    text = table(comparisons)
    print(text)
    if chosen.docs:
        write_document(text)
    wrong = complaints(comparisons)
    for each in wrong:
        print(each)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
