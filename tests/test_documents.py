"""README, SECURITY.md and docs/: shell commands name what exists, YAML is YAML, links lead somewhere, a script runs."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distclip

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of a user, and so not in the repository.
USERS_SCRIPTS = {"train.py", "first_clip.py"}
_PROGRAMS = {"pip", "bash", "python", "torchrun", "accelerate", "distclip"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Those of the shell blocks, without comments and without settings in front."""
    for block in blocks(text, "bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                del words[0]
            if words:
                yield words


def problem(words: list[str]) -> str:
    """Why a command cannot work, as far as its names tell; "" where it can."""
    program, *arguments = words
    if program not in _PROGRAMS and not (ROOT / program).is_file():
        return f"nobody knows the program {program!r}"
    missing = [word for word in arguments if re.fullmatch(r"[\w/.-]+\.(py|sh|yaml)", word) and not _is_there(word)]
    if missing:
        return f"there is no {missing[0]}"
    if program == "distclip":
        return _no_command(arguments)
    extras = {name for word in arguments for name in re.findall(r"distclip\[(.*)\]", word) for name in name.split(",")}
    unknown = extras - set(_extras())
    return f"there is no extra {min(unknown)}" if unknown else ""


def _is_there(name: str) -> bool:
    return name in USERS_SCRIPTS or (ROOT / name).is_file()


def _no_command(arguments: list[str]) -> str:
    import typer

    from distclip.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if arguments[0] not in known:
        return f"distclip has no command {arguments[0]}"
    options = {option for parameter in known[arguments[0]].params for option in parameter.opts}
    unknown = [word for word in arguments if word.startswith("--") and word not in options]
    return f"distclip {arguments[0]} has no option {unknown[0]}" if unknown else ""


def _extras() -> list[str]:
    import tomllib

    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    pytest.importorskip("typer")
    problems = {shlex.join(words): problem(words) for words in commands(document.read_text())}
    assert {command: why for command, why in problems.items() if why} == {}


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("distclip draw a.jsonl", "distclip has no command draw"),
        ("distclip plot a.jsonl --to b.png", "distclip plot has no option --to"),
        ("X=1 bash launch/nothing.sh  # comment", "there is no launch/nothing.sh"),
        ("launch/nothing.sh", "nobody knows the program 'launch/nothing.sh'"),
        ('pip install "distclip[cli,nothing]"', "there is no extra nothing"),
    ],
)
def test_missing_ones_are_found(command: str, why: str) -> None:
    pytest.importorskip("typer")
    ((words),) = commands(f"```bash\n{command}\n```\n")
    assert problem(words) == why


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_yaml_is_settings() -> None:
    pytest.importorskip("yaml")
    from distclip.files import load_yaml

    found = [load_yaml(block) for document in DOCUMENTS for block in blocks(document.read_text(), "yaml")]
    assert found
    assert all(isinstance(each, dict) for each in found)


def test_rules_of_the_table_are_rules() -> None:
    table = (ROOT / "docs" / "choosing_a_rule.md").read_text().partition("## The threshold")[0]
    texts = [
        text.replace("\\|", "|") for row in re.findall(r"^\| .*$", table, re.MULTILINE)[1:] for text in _codes(row)
    ]
    assert len(texts) >= 10
    for text in texts:
        distclip.rules.parse(text)


def _codes(row: str) -> list[str]:
    return re.findall(r"`([^`]+)`", row.rstrip("| ").rpartition(" | ")[2] if r"\|" not in row else row)


def test_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def test_first_clip(tmp_path: Path) -> None:
    """As the page says: two ranks, one number, which is that of one process with all the data."""
    pytest.importorskip("typer")
    page = (ROOT / "docs" / "first_clip.md").read_text()
    (script,) = (block for block in blocks(page, "python") if block.startswith("# first_clip.py"))
    (tmp_path / "first_clip.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun, *after = [words for words in commands(page) if words[0] in ("torchrun", "distclip")]
    done = [
        subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path)
        for words in (
            [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun[1:]],
            *([sys.executable, "-m", *words] for words in after),
        )
    ]
    assert [each.returncode for each in done] == [0, 0, 0], [each.stderr for each in done]
    told = dict(line.split() for line in done[0].stdout.splitlines())
    assert set(told) == {"0", "1"}
    assert told["0"] == told["1"]
    assert float(told["0"]) == pytest.approx(norm_of_one_process(100), rel=1e-4)
    assert "steps      100 (1 to 100)" in done[1].stdout
    assert (tmp_path / "first.html").read_text().startswith("<!doctype html>")


def norm_of_one_process(steps: int) -> float:
    """The global norm in the last step of the page's script, by torch alone in float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    parts = []
    for rank in range(2):
        torch.manual_seed(rank + 1)
        parts.append(torch.randn(64, 8))
    inputs = torch.cat(parts).double()
    targets = inputs.sum(dim=1, keepdim=True)
    norm = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(norm)
