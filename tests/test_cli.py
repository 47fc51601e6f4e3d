"""Every command of ``distclip`` but ``check``: what it prints, what its JSON holds, and what it says of bad files."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip.cli import main
from distclip.doctor import selftest
from distclip.record import Event, Record
from distclip.rules import catalogue
from distclip.sinks import JsonLines
from tests.ranks import run_ranks

COMMANDS = ("check", "plot", "summary", "suggest", "compare", "rules", "doctor", "bench")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    code = ended.value.code
    return code if isinstance(code, int) else 0, told.out, told.err


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """What a command prints with ``--json``, which is all that it prints."""
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")

    def no_constant(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return json.loads(out, parse_constant=no_constant)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return written(tmp_path / "mine.jsonl")


def written(path: Path, loss: bool = True) -> Path:
    """A run of 200 steps whose norms are 0.01 to 2, clipped at 1.5; step 40 was skipped, step 50 held a NaN."""
    sink = JsonLines(path)
    sink.start({"rule": "global_norm=1.5", "version": "0"})
    records = []
    for step in range(1, 201):
        norm = math.nan if step == 50 else step / 100
        metrics = {
            "grad_norm": norm,
            "clip_coef": min(1.0, 1.5 / norm),
            "clip_threshold": 1.5,
            "clipped": float(norm > 1.5),
            "skipped": float(step == 40),
            "nonfinite": float(step == 50),
        }
        records.append(Record(step, 0.0, metrics | ({"loss": 10.0 / step} if loss else {})))
    sink.write(records)
    sink.event(Event(50, "nonfinite", "a gradient held a NaN [bold]"))
    sink.close()
    return path


def test_help_lists_every_command_in_whole_sentences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    listed = {line.split()[0]: line for line in out.partition("Commands:")[2].splitlines() if line.strip()}
    assert set(listed) == set(COMMANDS)
    for line in listed.values():
        assert len(line) <= 80
        assert line.endswith("."), line
        assert "..." not in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Usage: distclip {command}" in out
    assert "--json" in out


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys)
    assert "Commands:" in out + err


@pytest.mark.parametrize("command", ["plot", "summary", "suggest", "compare"])
@pytest.mark.parametrize("content", [None, "", "hello\n", "{}"])
def test_bad_files_are_one_line(
    command: str, content: str | None, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    arguments = [log, bad] if command in ("compare", "plot") else [bad]
    for options in ([], ["--json"]):
        code, out, err = run(capsys, command, *arguments, *options)
        assert code == 2
        assert out == ""
        assert err.startswith(f"distclip: {bad}: ")
        assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == sorted([log, *([] if content is None else [bad])]), "nothing was written"


# plot


def test_plot(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "plot", log) == (0, f"{tmp_path / 'mine.png'}\n", "")
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "new" / "a.html"
    assert parsed(capsys, "plot", log, "--out", out, "--title", "Run <7>") == {"out": str(out), "runs": [str(log)]}
    assert "<h1>Run &lt;7&gt;</h1>" in out.read_text()


def test_plot_of_several(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = written(tmp_path / "other.jsonl", loss=False)
    assert run(capsys, "plot", log, other) == (0, f"{tmp_path / 'comparison.png'}\n", "")
    run(capsys, "plot", log, other, "--out", tmp_path / "a.SVG")
    assert "<svg" in (tmp_path / "a.SVG").read_text()


def test_plot_says_what_it_cannot_write(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = log.read_bytes()
    for out, told in (
        (tmp_path / "a.pdf", f"out must end in .png, .svg or .html, got '{tmp_path / 'a.pdf'}'"),
        (tmp_path / "a", f"out must end in .png, .svg or .html, got '{tmp_path / 'a'}'"),
        (log / "a.png", f"{log / 'a.png'}: cannot be written: "),
    ):
        code, _, err = run(capsys, "plot", log, "--out", out)
        assert code == 2
        assert err.startswith(f"distclip: {told}")
        assert err.count("\n") == 1
    image = log.rename(tmp_path / "log.png")
    code, _, err = run(capsys, "plot", image)
    assert code == 2
    assert "one of the logs" in err
    assert image.read_bytes() == content


def test_plot_without_matplotlib(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib" or "distclip.plots" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = "distclip: this needs matplotlib: pip install 'distclip[plot]'\n"
    assert run(capsys, "plot", log) == (2, "", told)
    assert run(capsys, "compare", log, log, "--plot", log.with_suffix(".png")) == (2, "", told)


# summary, suggest, compare


def test_summary(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "summary", log)
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == ["run", "steps", "grad", "clipped", "skipped", "loss", "alarm"]
    assert lines["run"].endswith("mine, rule global_norm=1.5")
    assert lines["steps"].endswith("200 (1 to 200)")
    assert lines["grad"].endswith("largest 2 at step 200")
    assert lines["clipped"].endswith("25.0% of the steps, smallest coefficient 0.75")
    assert lines["skipped"].endswith("1 steps; 1 held an inf or NaN")
    assert lines["alarm"].endswith("step 50: a gradient held a NaN [bold]")
    told = parsed(capsys, "summary", log)
    assert (told["steps"], told["clipped"], told["skipped"], told["nonfinite"]) == (200, 0.25, 1, 1)


def test_summary_without_a_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", loss=False)
    assert "\nloss " not in run(capsys, "summary", path)[1]
    assert parsed(capsys, "summary", path)["last_loss"] is None, "JSON has no NaN"


def test_suggest(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "suggest", log)
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:3]] == [
        ["50", "%", "1.01", "49.7%"],
        ["75", "%", "1.505", "25.1%"],
    ]
    told = parsed(capsys, "suggest", log)
    assert [each["percentile"] for each in told["thresholds"]] == [50, 75, 90, 95, 99, 99.9]
    assert (told["norms"], told["nonfinite"]) == (199, 1)
    assert told["advice"] in out.replace("\n", " ")


def test_suggest_has_nothing_to_learn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind":"step","step":1,"grad_norm":"nan"}')
    code, _, err = run(capsys, "suggest", path)
    assert (code, err) == (2, f"distclip: {path}: no step has a finite grad_norm to learn from\n")


def test_compare(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other = written(tmp_path / "[red]other.jsonl", loss=False)
    code, out, _ = run(capsys, "compare", log, other)
    assert code == 0
    head, *rows = [line.split() for line in out.splitlines()]
    assert head[:3] == ["run", "rule", "steps"]
    assert [row[0] for row in rows] == ["mine", "[red]other"], "brackets in names are no markup"
    assert rows[0][-4:] == ["25.0%", "1", "1", "1"]
    told = parsed(capsys, "compare", log, other, "--plot", tmp_path / "a.svg")
    assert [each["name"] for each in told] == ["mine", "[red]other"]
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_compare_needs_two(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "compare", log)
    assert (code, err) == (2, "distclip: compare needs two logs or more, got 1; `distclip summary` tells of one\n")


# rules, doctor


def test_rules(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "rules")
    assert code == 0
    told = parsed(capsys, "rules")
    assert [each["rule"] for each in told] == [entry.rule.__name__ for entry in catalogue()]
    for each in told:
        assert each["name"] in out


def test_doctor_tells_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    code, out, _ = run(capsys, "doctor", "--skip-test")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["torch"].split()[1] == torch.__version__
    assert "gloo" in lines["backends"]
    assert "matplotlib" in lines["packages"]
    assert "layout" not in out
    told = parsed(capsys, "doctor", "--skip-test")
    assert (told["torch"], told["self_test"], told["works"]) == (torch.__version__, [], True)


@pytest.mark.timeout(240)
def test_doctor_clips_under_every_layout_here(capsys: pytest.CaptureFixture[str]) -> None:
    told = parsed(capsys, "doctor")
    found = {each["layout"]: each for each in told["self_test"]}
    assert set(selftest.LAYOUTS) <= set(found)
    assert all(each["works"] for each in found.values()), found
    assert told["works"] is True


@pytest.mark.slow
def test_doctor_says_which_layout_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A name that the ranks do not know.
    monkeypatch.setattr(selftest, "LAYOUTS", {"unheard of": None, "DDP": None})
    monkeypatch.setattr(selftest, "ZERO", [])
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    failed, worked = out.splitlines()[-2:]
    assert failed.split() == ["FAILS", "unheard", "of", "KeyError:", "'unheard", "of'"]
    assert worked.split()[:3] == ["ok", "DDP", "norm"]


def under_a_gloo_that_adds_up() -> tuple[bool, str]:
    def summed() -> tuple[torch.nn.Module, dict[str, Any]]:
        model, options = selftest._ddp()
        for param in model.parameters():
            assert param.grad is not None
            param.grad *= dist.get_world_size()
        return model, options

    selftest.LAYOUTS["FSDP2"] = summed
    outcome = selftest._outcome("FSDP2")
    return outcome.works, outcome.message


def test_doctor_knows_gloo_before_torch_2_13() -> None:
    for works, message in run_ranks(under_a_gloo_that_adds_up, 2):
        assert not works
        assert "adds gradients up where FSDP2 averages them (pytorch issue 162338)" in message


def test_doctor_does_not_wait_for_ever(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_PATIENCE", 0.2)
    monkeypatch.setattr(selftest, "ZERO", [])
    code, out, err = run(capsys, "doctor", "--json")
    told = json.loads(out)
    assert (code, err, told["works"]) == (1, "", False)
    assert {each["layout"] for each in told["self_test"]} == set(selftest.LAYOUTS)
    assert all(each["message"] == "not reached: nothing more came within 0.2 seconds" for each in told["self_test"])
