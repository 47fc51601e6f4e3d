"""launch/strangers.py sees where a project's tests tell distclip from torch; what docs/strangers.md shows of it.

Nothing is fetched: the project is a file of the test's own.
"""

import importlib
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "strangers.md"

PROJECT = """
import pytest, torch
from torch.nn.utils import clip_grad_norm_

def norm(value, dtype):
    param = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    param.grad = torch.full((2,), value, dtype=dtype)
    return clip_grad_norm_(param, 1.0)

def test_alike():
    assert norm(3.0, torch.float32).item() == pytest.approx(18**0.5)

def test_overflow_of_half():
    assert norm(60000.0, torch.float16).isinf()

@pytest.mark.skip
def test_left_out():
    pass
"""


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, as if it knew one project, already fetched."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    module = importlib.import_module("strangers")
    monkeypatch.setattr(module, "PEERS", (module.Peer("some", "1.0", ("tests/test_some.py",), ""),))
    (tmp_path / "test_some.py").write_text(PROJECT)
    archive = tmp_path / "folder" / "archives" / "some" / "some-1.0.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(tmp_path / "test_some.py", "some-1.0/tests/test_some.py")
    return module


def test_a_difference_is_told(strangers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert strangers.main(["--folder", str(tmp_path / "folder")]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| some 1.0 | `tests/test_some.py` | 2 of 3 | 1 of 3 | 2 | `test_overflow_of_half`: ? |",
        "tests/test_some.py::test_overflow_of_half differs",
    ]


@pytest.mark.slow
def test_tests_that_do_not_run_are_no_success(strangers: Any, tmp_path: Path) -> None:
    peer = strangers.Peer("some", "1.0", ("tests/no_such.py",), "")
    source = strangers.fetched(peer, tmp_path / "folder")
    with pytest.raises(SystemExit, match=r"the tests of some did not run: see .*some-torch\.log"):
        strangers.compare(peer, source, tmp_path / "folder")


def test_what_is_complained_of(strangers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def comparison(calls: int, **theirs: str) -> Any:
        torch, ours = strangers.Run({"a::b": "passed"}, calls), strangers.Run(theirs or {"a::b": "passed"}, calls)
        return strangers.Comparison(strangers.PEERS[0], torch, ours)

    failed = comparison(1, **{"a::b": "failed"})
    assert strangers.complaints([comparison(1)]) == []
    assert strangers.complaints([comparison(0)]) == ["some never clipped: nothing was compared"]
    assert strangers.complaints([failed]) == ["a::b differs"]
    both = strangers.Comparison(strangers.PEERS[0], failed.distclip, failed.distclip)
    assert strangers.complaints([both]) == ["no test of some passes with torch: nothing was compared"]
    assert strangers.complaints([comparison(1, **{"c::d": "passed"})]) == ["a::b differs", "c::d differs"]
    monkeypatch.setitem(strangers.EXPLAINED, "::b", "torch's mistake")
    assert strangers.complaints([failed]) == []
    assert failed.row() == "| some 1.0 | `tests/test_some.py` | 1 of 1 | 0 of 1 | 1 | `b`: torch's mistake |"


def test_the_document_s_table_is_exchanged(strangers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "DOCUMENT", tmp_path / "document.md")
    others = [strangers.Peer(name, "", (), "") for name in ("first", "third")]
    monkeypatch.setattr(strangers, "PEERS", (others[0], *strangers.PEERS, others[1]))
    old = "before\n| project |\n|---|\n| first 1 | old |\n| gone 3 | old |\n| third 2 | old |\n\n| other |\n"
    (tmp_path / "document.md").write_text(old)
    strangers.write_document("| project | new |\n|---|---|\n| some 1.0 | new |\n| third 3 | new |")
    assert (tmp_path / "document.md").read_text() == (
        "before\n| project | new |\n|---|---|\n| first 1 | old |\n| some 1.0 | new |\n| third 3 | new |\n\n| other |\n"
    ), "what was not run stays, what is no project any more goes"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--pytorch", "/nowhere"], "--pytorch /nowhere: there is no test/test_nn.py in it"),
        (["--only", "pytorch"], "--only pytorch: its tests are not on PyPI, name a checkout by --pytorch"),
        (["--only", "nobody"], "invalid choice: 'nobody'"),
    ],
)
def test_mistakes_of_the_command(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    with pytest.raises(SystemExit):
        importlib.import_module("strangers").main(arguments)
    assert told in capsys.readouterr().err


def test_the_document_has_every_project_and_no_unexplained_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    module = importlib.import_module("strangers")
    text = DOCUMENT.read_text()
    (table,) = (block for block in text.split("\n\n") if block.startswith("| project |"))
    rows = table.splitlines()[2:]
    assert [row.split(" | ")[0].lstrip("| ") for row in rows] == [f"{p.name} {p.version}".strip() for p in module.PEERS]
    assert "`: ? |" not in table
    assert "`: ?;" not in table
