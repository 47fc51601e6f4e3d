"""What SECURITY.md promises: nothing is unpickled or evaluated, no shell sees text, reports hold no others' markup."""

import ast
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import distclip
from distclip.files import load_mapping

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("distclip", "launch") for path in (ROOT / folder).rglob("*.py"))
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_CALLS = {
    "eval": "evaluates text",
    "exec": "executes text",
    "system": "starts a shell",
    "popen": "starts a shell",
    "getoutput": "starts a shell",
    "mktemp": "names a file that another process can make first",
    "unsafe_load": "builds any object that YAML names",
    "full_load": "builds objects that YAML names",
    "load_module": "executes a file",
}
_OWNERS = {"eval": ("", "builtins"), "exec": ("", "builtins"), "system": ("", "os"), "popen": ("", "os")}
# torch.distributed's pickles
_OBJECTS = {"all_gather_object", "gather_object"} | {
    f"{verb}_object_list" for verb in ("broadcast", "scatter", "send", "recv")
}
_PICKLED = "unpickles what other ranks send"
# By their bare names the scan would not know their calls again.
_UNSEEN = {("torch", "load"), ("yaml", "load"), ("yaml", "load_all")}
# (file, call): why it is right there.
ALLOWED = {
    ("distclip/patched.py", "exec"): "runs the script that its user names, as Python would",
    ("distclip/files.py", "load"): "its Loader is a yaml.SafeLoader; test_yaml_builds_no_objects",
}


def dangers(source: str) -> Iterator[tuple[str, str]]:
    """What a module does that this project never does: the call's last name, and why not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((name, "unpickles") for name in _imported(node) if name in _MODULES)
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            yield from ((name, "hides a call") for name in names if (node.module, name) in _UNSEEN)
            yield from ((name, _PICKLED) for name in names if name in _OBJECTS)
        elif isinstance(node, ast.Call):
            yield from _of_call(node)
        # Called, or handed to something that calls it.
        elif isinstance(node, ast.Attribute) and node.attr in _OBJECTS:
            yield node.attr, _PICKLED


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return [name.partition(".")[0] for name in names]


def _of_call(node: ast.Call) -> Iterator[tuple[str, str]]:
    owner, _, name = ast.unparse(node.func).rpartition(".")
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    # A model's eval() and platform.system() are others.
    if name in _CALLS and owner in _OWNERS.get(name, (owner,)):
        yield name, _CALLS[name]
    if given.get("shell", "False") != "False":
        yield name, "starts a shell"
    if given.get("allow_pickle", "False") != "False":
        yield name, "unpickles"
    if (owner, name) == ("torch", "load") and given.get("weights_only") != "True":
        yield name, "unpickles any object"
    if owner == "yaml" and name in ("load", "load_all"):
        yield name, "builds what its Loader allows"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os, pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("torch.load(path)", "load"),
        ("torch.load(path, weights_only=False)", "load"),
        ("dist.all_gather_object(told, mine)", "all_gather_object"),
        ("torch.distributed.broadcast_object_list(told)", "broadcast_object_list"),
        ("gather = dist.all_gather_object", "all_gather_object"),
        ("from torch.distributed import scatter_object_list as scatter", "scatter_object_list"),
        ("from torch import load", "load"),
        ("from yaml import load", "load"),
        ("yaml.load(text, Loader)", "load"),
        ("yaml.unsafe_load(text)", "unsafe_load"),
        ("eval(text)", "eval"),
        ("builtins.exec(text)", "exec"),
        ("subprocess.run(text, shell=True)", "run"),
        ("os.system(text)", "system"),
        ("np.load(path, allow_pickle=True)", "load"),
    ],
)
def test_scan_finds(source: str, found: str) -> None:
    assert [name for name, _ in dangers(source)] == [found]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "platform.system()",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "subprocess.run([text])",
    ],
)
def test_scan_passes(source: str) -> None:
    assert list(dangers(source)) == []


def test_sources_do_nothing_dangerous() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name): why
        for path in SOURCES
        for name, why in dangers(path.read_text(encoding="utf-8"))
    }
    assert len(SOURCES) > 100, "the scan must see the package"
    assert set(found) == set(ALLOWED), {place: why for place, why in found.items() if place not in ALLOWED}


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.getcwd []", "!!python/name:os.system"])
def test_yaml_builds_no_objects(tmp_path: Path, tag: str) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "distclip.yaml"
    file.write_text(f"rule: {tag}\n")
    with pytest.raises(ValueError, match="is no YAML: could not determine a constructor for the tag"):
        load_mapping(file)


class Page(HTMLParser):
    """Tags of a page, attributes that run something, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")]

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.mark.filterwarnings("ignore::distclip.AlarmWarning")
def test_report_holds_no_markup_of_others(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from distclip.plots import plot
    from distclip.runs import read_run

    model = nn.Module()
    for name in (HOSTILE, "other"):
        model.add_module(name, nn.Linear(2, 1))
    log = tmp_path / "<iframe onload=alert(3)>.jsonl"
    rule = distclip.PerGroup({f"{HOSTILE}*": distclip.ClipByNorm(0.5), "*": distclip.ClipByNorm(1.0)})
    clipper = distclip.GradClipper(model, rule, details_every=1)
    with distclip.Monitor(clipper, [log]) as monitor:
        for _ in range(6):
            for name, param in model.named_parameters():
                # Nearly all of the norm is in one tensor, which an alarm names.
                param.grad = torch.full_like(param, 1000.0 if name == f"{HOSTILE}.weight" else 1.0)
            clipper.clip()
            monitor.log(**{HOSTILE: 1.0})
    assert HOSTILE in log.read_text(), "the log holds the names as they are; the report must not"
    run = read_run(log)
    assert any(HOSTILE in event.message for event in run.events), "an alarm names a tensor"
    for runs in ([run], [run, run]):
        check_page(plot(runs, tmp_path / "report.html", title=HOSTILE).read_text(encoding="utf-8"))


def check_page(text: str) -> None:
    page = Page()
    page.feed(text)
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert page.handlers == []
    assert HOSTILE in page.text, "it stands there as text"
