"""Bad input: whatever is passed, a documented error, and nothing has changed; or it works.

``DISTCLIP_TESTS_FUZZ=10000`` tries so many inputs in each test (docs/robustness.md).
"""

import copy
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import distclip
from distclip import ClipConfig, GradClipper, Monitor
from distclip.check import check_config
from distclip.files import load_mapping
from distclip.rules import Decision, Norms, StatefulRule, parse
from distclip.rules.text import NAMES
from distclip.runs import read_run
from distclip.suggest import suggest
from distclip.summary import summary_of

pytestmark = [
    # What torch and NumPy say of odd tensors and arrays before distclip sees them as numbers.
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:parameters is (an )?empty:UserWarning"),
]
MANY = int(os.environ.get("DISTCLIP_TESTS_FUZZ", "40"))
fuzz = settings(
    max_examples=MANY,
    deadline=None,
    derandomize="DISTCLIP_TESTS_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DOCUMENTED = (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError)
# Of these types, but what Python, NumPy and torch say when they stumble: nobody's message to a user.
_FOREIGN = re.compile(
    "object is not|not iterable|iteration over|has no attribute|unsupported operand|bad operand|not supported between|"
    "truth value|unhashable|cannot unpack|not enough values|too many values|must be real number|cannot be interpreted"
)


def _cyclic() -> list[Any]:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    return cyclic


def _generator() -> Iterator[Any]:
    yield torch.zeros(2)
    yield 5


# Made anew for each use: some are used up, others are changed.
ODD: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: "",
    lambda: "1",
    lambda: "inf",
    lambda: "\x00\ud800",
    lambda: b"x",
    lambda: math.nan,
    lambda: math.inf,
    lambda: -math.inf,
    lambda: -1.0,
    lambda: 0,
    lambda: -0.0,
    lambda: 0.5,
    lambda: 3,
    lambda: 10**400,
    lambda: -(10**5000),
    lambda: 2**64,
    lambda: 1e-320,
    lambda: 1j,
    list,
    dict,
    lambda: (),
    lambda: [1, 2],
    lambda: (-1, None),
    lambda: ("a", "b"),
    lambda: (10**400, 1),
    lambda: {"a": 1},
    lambda: {1: 2, "b": 3},
    lambda: {"*": {"*": 1.0}},
    _cyclic,
    lambda: object(),
    lambda: len,
    lambda: lambda step: math.nan,
    lambda: GradClipper,
    _generator,
    lambda: range(3),
    lambda: iter(()),
    lambda: np.float32(2),
    lambda: np.nan,
    lambda: np.array([1.0, 2.0]),
    lambda: np.array("x"),
    lambda: np.array(["first", "x"]),
    lambda: np.int64(3),
    lambda: torch.tensor(1.0),
    lambda: torch.tensor([1.0, 2.0]),
    lambda: torch.tensor([]),
    lambda: torch.tensor(1j),
    lambda: torch.tensor(True),
    lambda: torch.empty((), device="meta"),
    lambda: torch.eye(2).to_sparse(),
    lambda: torch.zeros(2, dtype=torch.int8),
    lambda: torch.zeros(2, requires_grad=True),
    lambda: torch.tensor(math.nan),
    lambda: nn.Linear(2, 2),
    lambda: nn.Module(),
    lambda: [nn.Linear(1, 1), None],
    lambda: torch.float16,
    lambda: Path("x"),
    lambda: distclip.ClipByNorm(1.0),
]
odd = st.sampled_from(ODD).map(lambda make: make()) | st.text(max_size=8) | st.floats() | st.integers()


def a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


def bytes_of(model: nn.Module) -> list[bytes]:
    return [param.grad.numpy().tobytes() for param in model.parameters() if param.grad is not None]


def attempt(call: Callable[[], Any]) -> Exception | None:
    """What it raised, if it was documented; anything else fails the test."""
    try:
        call()
    except (RecursionError, UnicodeError):  # subclasses of documented ones, and nobody's message to a user
        raise
    except DOCUMENTED as error:
        if not str(error) or _FOREIGN.search(str(error)):
            raise
        return error
    return None


# With arguments that they take. With one more, all that is tried would end in Python's own TypeError.
FUNCTIONS: dict[Callable[..., Any], tuple[Any, ...]] = {
    distclip.clip_grad_norm_: (1.0, 2.0, False),
    distclip.clip_grad_value_: (1.0, None),
    distclip.grad_norm: (2.0, False, None),
    distclip.clip_grads_with_norm_: (1.0, 2.0, None),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_take_what_they_are_tried_with(function: Callable[..., Any]) -> None:
    model = a_model()
    before = bytes_of(model)
    function(model, *FUNCTIONS[function])
    assert (bytes_of(model) == before) == (function is distclip.grad_norm)


@fuzz
@given(st.sampled_from([*FUNCTIONS]), odd, odd, odd)
@example(distclip.clip_grad_norm_, torch.tensor([1.0, 2.0]), 2.0, False)
@example(distclip.clip_grad_norm_, 10**400, 2.0, False)
@example(distclip.clip_grad_norm_, 1.0, 2.0, torch.tensor([1.0, 2.0]))
@example(distclip.clip_grad_value_, (10**400, 1), None, None)
@example(distclip.clip_grad_value_, 1.0, np.array([1.0, 2.0]), None)
@example(distclip.clip_grads_with_norm_, 1.0, -1.0, None)
@example(distclip.clip_grads_with_norm_, 1.0, None, None)
@example(distclip.clip_grads_with_norm_, 1.0, torch.tensor(1j), None)
def test_functions_change_nothing_when_they_raise(
    function: Callable[..., Any], first: Any, second: Any, third: Any
) -> None:
    model = a_model()
    before = bytes_of(model)
    if attempt(lambda: function(model, *(first, second, third)[: len(FUNCTIONS[function])])) is not None:
        assert bytes_of(model) == before
        norm = distclip.clip_grad_norm_(a_model(), 1.0)
        assert torch.equal(norm, distclip.grad_norm(a_model()))


TAKES_PARAMETERS: list[Callable[..., Any]] = [*FUNCTIONS, GradClipper, distclip.audit, distclip.undeclare]


@fuzz
@given(st.sampled_from(TAKES_PARAMETERS), odd)
@example(GradClipper, 5)
@example(GradClipper, torch.tensor(1.0))
@example(distclip.clip_grad_norm_, np.array("x"))
def test_parameters_of_all_kinds(function: Callable[..., Any], parameters: Any) -> None:
    arguments = {distclip.clip_grad_norm_: (1.0,), distclip.clip_grad_value_: (1.0,)}
    arguments[distclip.clip_grads_with_norm_] = (1.0, 1.0)  # type: ignore[assignment]
    attempt(lambda: function(parameters, *arguments.get(function, ())))


@fuzz
@given(odd, odd, odd)
@example(np.array([1.0, 2.0]), None, False)
@example(torch.tensor([1.0, 2.0]), None, False)
def test_declare_records_nothing_when_it_raises(sharded: Any, replicated: Any, joined: Any) -> None:
    model = a_model()
    if attempt(lambda: distclip.declare(model, sharded=sharded, replicated=replicated, joined=joined)) is not None:
        assert all(distclip.layout.declared.declared_of(param) is None for param in model.parameters())
    distclip.undeclare(model)


OPTIONS = ["rule", "optimizer", "scaler", "nonfinite", "pipeline_group", "check", "details_every", "overlap"]


@fuzz
@given(st.dictionaries(st.sampled_from(OPTIONS), odd, max_size=2))
@example({"scaler": "x"})
@example({"optimizer": 5})
@example({"optimizer": np.array("x")})
@example({"rule": _cyclic()})
@example({"check": np.array(["first", "x"])})
@example({"overlap": np.array([1.0, 2.0])})
def test_clippers_of_all_arguments(arguments: dict[str, Any]) -> None:
    model = a_model()
    before = bytes_of(model)

    def clip() -> None:
        GradClipper(model, **arguments).clip()

    if attempt(clip) is not None:
        assert bytes_of(model) == before


@fuzz
@given(odd)
@example(10**400)
@example("x")
@example({})
@example(torch.tensor([1.0, 2.0]))
@example(torch.tensor(1j))
@example(torch.empty((), device="meta"))
def test_a_clip_that_raises_leaves_the_clipper_as_it_was(loss: Any) -> None:
    model = a_model()
    clipper = GradClipper(model, distclip.SkipOnSpike(4, min_history=2))
    state, before = clipper.state_dict(), bytes_of(model)
    if attempt(lambda: clipper.clip(loss=loss)) is not None:
        assert bytes_of(model) == before
        assert clipper.state_dict() == state
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    assert float(clipper.clip().total_norm) == pytest.approx(math.sqrt(8))


@fuzz
@given(st.sampled_from(sorted(NAMES)), st.lists(odd, max_size=4))
@example("autoclip", [10, math.inf])
@example("quantile", [0.5, 10**18])
@example("value", [(-1, None)])
@example("zclip", [0.9, 2.0, 1.0, 1e-6, 10**400])
@example("agc", [0.01, 1e-3, np.array("x")])
def test_rules_of_all_arguments(name: str, arguments: list[Any]) -> None:
    attempt(lambda: GradClipper(a_model(), NAMES[name](*arguments)).clip())


@fuzz
@given(st.sampled_from([distclip.Chain, distclip.PerGroup]), odd)
@example(distclip.PerGroup, 5)
@example(distclip.Chain, _cyclic())
@example(distclip.Chain, torch.tensor(1.0))
def test_rules_of_rules(kind: Callable[[Any], Any], rules: Any) -> None:
    attempt(lambda: GradClipper(a_model(), kind(rules)).clip())


pieces = st.sampled_from([*NAMES, *"=,|;:()*->.- ", "->", "inf", "nan", "none", "true", "1", "0.5", "1e999", "alpha"])


@settings(fuzz, max_examples=MANY * 5)
@given(st.lists(pieces | st.text(max_size=3), max_size=14).map("".join))
@example("autoclip,history=inf")
@example("(" * 3000 + ")" * 3000)
@example("(a|" * 500)
def test_texts_of_rules(text: str) -> None:
    try:
        rule = parse(text)
    except ValueError:
        return
    assert parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zclip,alpha=0.5,alpha=0.6", "'alpha' stands twice"),
        ("autoclip=10,percentile=20", "'percentile' stands twice"),
        ("a -> norm=1 ; a -> norm=2", "'a' stands twice"),
        ("((" * 20, "parentheses in more than 20 levels"),
    ],
)
def test_texts_that_would_silently_lose_something(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_text_is_a_text() -> None:
    with pytest.raises(TypeError, match="must be written as a text, got None"):
        parse(None)  # type: ignore[arg-type]


FIELDS = sorted(ClipConfig.__dataclass_fields__)


@fuzz
@given(st.dictionaries(st.sampled_from(FIELDS), odd, max_size=3))
@example({"rule": _cyclic()})
@example({"nonfinite": np.array(["first", "x"])})
@example({"pipeline_group": np.array([1.0, 2.0])})
def test_configs_of_all_values(values: dict[str, Any]) -> None:
    attempt(lambda: ClipConfig(**values).to_dict())


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=10)


@fuzz
@given(st.dictionaries(st.sampled_from(FIELDS).map(lambda name: f"DISTCLIP_{name.upper()}") | words, words, max_size=3))
def test_environments(environ: dict[str, str]) -> None:
    environ.pop("DISTCLIP_CONFIG", None)
    attempt(lambda: ClipConfig.load(environ=environ))


@fuzz
@given(st.lists(st.sampled_from([f"--distclip-{name.replace('_', '-')}" for name in FIELDS]) | words, max_size=4))
@example(["--distclip-rule"])
def test_command_lines(arguments: list[str]) -> None:
    attempt(lambda: ClipConfig.load(arguments=arguments, environ={}))


def test_a_command_line_without_a_value_is_an_error_of_ours() -> None:
    with pytest.raises(ValueError, match="the command line: argument --distclip-rule: expected one argument"):
        ClipConfig.load(arguments=["--distclip-rule"], environ={})


YAML = [
    "rule: &a [*a]",
    "2001-99-99",
    '!!int ""',
    '!!float ""',
    "!!bool x",
    "!!timestamp x",
    "[" * 1000,
    "a: 1\na: 2",
    "=",
    "0b_",
]


@fuzz
@given(st.binary(max_size=60) | st.text("!&*:[]{}-? \n\"'|>%@`#ab1._", max_size=30).map(str.encode))
def test_files_of_settings(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    _read_settings(tmp_path_factory.getbasetemp(), content)


@pytest.mark.parametrize("text", YAML)
def test_files_that_yaml_chokes_on(tmp_path: Path, text: str) -> None:
    _read_settings(tmp_path, text.encode())


def _read_settings(folder: Path, content: bytes) -> None:
    for name in ("settings.yaml", "settings.json"):
        path = folder / name
        path.write_bytes(content)
        for read in (load_mapping, check_config, lambda file: ClipConfig.load(file, environ={})):
            error = attempt(lambda read=read, path=path: read(path))  # type: ignore[misc]
            assert error is None or (isinstance(error, ValueError | TypeError) and str(path) in str(error))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda part: st.lists(part, max_size=3),
    max_leaves=4,
)
SECTIONS = ["fsdp_config", "deepspeed_config", "parallelism_config", "zero_optimization", "fp16", "gradient_clipping"]
SECTIONS += ["distributed_type", "num_processes", "num_machines", "mixed_precision", "optimizer", "use_cpu"]
KEYS = ["fsdp_version", "fsdp_sharding_strategy", "deepspeed_config_file", "zero_stage", "stage", "enabled", "tp_size"]


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(SECTIONS), values | st.dictionaries(st.sampled_from(KEYS), values, max_size=3), min_size=1
    )
)
@example({"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": 5}})
def test_configs_to_check(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(content))
    error = attempt(lambda: str(check_config(path)))
    assert error is None or isinstance(error, ValueError)


# --- states -----------------------------------------------------------------------------------------------------------

STATEFUL = ["autoclip", "autoclip,history=5", "quantile=0.5,window=5", "zclip,warmup_steps=2", "adagc,warmup_steps=2"]
STATEFUL += ["ema_ratio=1.1,beta=0.9", "stable_spam", "skip_on_spike,window=5,min_history=2", "zclip | autoclip"]
STATEFUL += ["weight -> autoclip ; * -> adagc", "global_norm=1"]


def run(rule: str, steps: int = 3) -> tuple[nn.Module, GradClipper]:
    model = a_model()
    clipper = GradClipper(model, parse(rule))
    for step in range(steps):
        for param in model.parameters():
            param.grad = torch.full_like(param, step + 1.0)
        clipper.clip()
    return model, clipper


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in state if isinstance(state, dict) else range(len(state)) if isinstance(state, list) else ():
        yield from places(state[key], (*path, key))


def damaged(state: dict[str, Any], path: tuple[Any, ...], how: str, value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    holder: Any = state
    for key in path[:-1]:
        holder = holder[key]
    if how == "delete":
        del holder[path[-1]]
    elif how == "truncate" and isinstance(holder[path[-1]], list):
        del holder[path[-1]][-1:]
    elif how == "extra" and isinstance(holder, dict):
        holder["of another version"] = value
    else:
        holder[path[-1]] = value
    return state


@fuzz
@given(st.sampled_from(STATEFUL), st.integers(0, 200), st.sampled_from(["delete", "truncate", "extra", "set"]), odd)
def test_damaged_states_load_whole_or_not_at_all(rule: str, place: int, how: str, value: Any) -> None:
    _, other = run(rule, 4)
    state = other.state_dict()
    every = list(places(state))
    model, clipper = run(rule)
    before = pickle.dumps(clipper.state_dict())
    error = attempt(lambda: clipper.load_state_dict(damaged(state, every[place % len(every)], how, value)))
    if error is not None:
        assert isinstance(error, ValueError | TypeError)
        assert pickle.dumps(clipper.state_dict()) == before
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    assert float(clipper.clip().total_norm) == pytest.approx(math.sqrt(8))


@pytest.mark.parametrize(
    ("rule", "path", "how", "value", "message"),
    [
        ("zclip", ("steps",), "set", "3", r"steps.* must be a whole number from 0 on, got '3'"),
        ("zclip", ("nonfinite_steps",), "set", torch.zeros(2), "nonfinite_steps"),
        ("zclip", ("rule_state", "mean"), "set", math.nan, "mean holds a NaN"),
        ("zclip", ("rule_state", "mean"), "set", math.inf, "mean must be at least 0 and finite"),
        ("zclip", ("rule_state", "variance"), "set", -1.0, "variance must be at least 0"),
        ("zclip", ("rule_state", "mean"), "set", torch.ones(2), r"mean must be a number, got \[1.0, 1.0\]"),
        ("zclip", ("rule_state", "mean"), "delete", None, r"must hold \['mean', 'seen', 'variance'\]"),
        ("zclip", ("rule",), "set", None, "of rule None, this clipper has ZClip"),
        ("zclip", ("rule",), "extra", 1, "'of another version'.*, which this version of distclip does not know"),
        ("zclip", ("in_backward",), "set", {"coefficient": 1.0}, "must hold coefficient and threshold"),
        ("autoclip", ("rule_state", "norms"), "truncate", None, "norms holds 3 values, but seen says that 4.0 came"),
        (
            "quantile=0.5,window=5",
            ("rule_state", "norms"),
            "truncate",
            None,
            "norms holds 4 values, this rule looks back",
        ),
        ("adagc", ("rule_state", "gamma"), "truncate", None, "gamma holds 1 numbers for 2 names"),
        ("adagc", ("rule_state", "names"), "set", [1, 2], "names must be a list of the tensors' names"),
        ("adagc", ("rule_state", "names"), "set", ["a", "a"], "names must be distinct"),
        ("global_norm=1", ("rule_state",), "set", None, "keeps no state, but state_dict holds None"),
        ("global_norm=1", ("rule_state",), "set", np.ones(2), "keeps no state, but state_dict holds array"),
        ("zclip", ("in_backward",), "set", np.ones(2), "must hold coefficient and threshold, got array"),
        ("zclip | autoclip", ("rule_state", "1", "seen"), "set", 7.0, "seen says that 7.0 came"),
    ],
)
def test_errors_of_damaged_states(rule: str, path: tuple[Any, ...], how: str, value: Any, message: str) -> None:
    state = run(rule, 4)[1].state_dict()
    _, clipper = run(rule)
    before = clipper.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        clipper.load_state_dict(damaged(state, path, how, value))
    assert clipper.state_dict() == before, "whole or not at all"


@pytest.mark.parametrize("kept", [torch.tensor, np.array, tuple])
@pytest.mark.parametrize("rule", STATEFUL[:7])
def test_states_that_other_formats_bring_back(rule: str, kept: Callable[[Any], Any]) -> None:
    state = run(rule, 4)[1].state_dict()
    double = {"dtype": torch.float64} if kept is torch.tensor else {}
    lists = {
        key: kept(value, **double)
        for key, value in state["rule_state"].items()
        if isinstance(value, list) and key != "names"
    }
    _, clipper = run(rule)
    counts = {"steps": np.int64(4), "nonfinite_steps": torch.tensor(0)}
    clipper.load_state_dict({**state, **counts, "rule_state": state["rule_state"] | lists})
    assert json.dumps(clipper.state_dict()) == json.dumps(state)


@pytest.mark.parametrize(
    "start", [0, False, (0.0, 1.0), np.zeros(2), torch.zeros(()), torch.zeros(3), [[0.0, 1.0], [2.0, 3.0]], []]
)
def test_whatever_a_rule_s_memory_begins_with_is_loaded_again(start: Any) -> None:
    class Counts(StatefulRule):
        def initial(self) -> dict[str, Any]:
            return {"count": start}

        def decide(self, norms: Norms) -> Decision:
            self.learn(count=self.recall(norms)["count"] + 1)
            return Decision(torch.ones_like(norms.total), norms.total)

    model = a_model()
    for steps in (0, 2):
        clipper, other = GradClipper(model, Counts()), GradClipper(model, Counts())
        for _ in range(steps):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            clipper.clip()
        state = clipper.state_dict()
        other.load_state_dict(json.loads(json.dumps(state)))
        assert other.state_dict() == state
        for damage in ("text", None, [[0.0], [1.0, 2.0]], [[[1.0]]]):
            with pytest.raises(ValueError, match=r"count must be|expected sequence|must hold"):
                other.load_state_dict({**state, "rule_state": {"count": damage}})
        assert other.state_dict() == state


class HalfTaken(distclip.ZClip):
    """A rule of somebody's own, which looks at its state after it has taken it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["mean"] > 100:
            raise KeyError("mean")


def test_a_rule_that_raises_half_way_has_the_state_of_before() -> None:
    clipper = GradClipper(a_model(), HalfTaken())
    clipper.clip()
    before = clipper.state_dict()
    with pytest.raises(KeyError, match="mean"):
        clipper.load_state_dict(damaged(before, ("rule_state", "mean"), "set", 1000.0))
    assert clipper.state_dict() == before


# --- watching ---------------------------------------------------------------------------------------------------------


@fuzz
@given(st.dictionaries(st.sampled_from(["clipper", "sinks", "log_every", "prefix", "alarms", "main"]), odd, max_size=2))
@example({"clipper": None})
@example({"alarms": [1, 2]})
@example({"alarms": 0.0})
@example({"alarms": torch.tensor(1.0)})
@example({"sinks": torch.tensor(1.0)})
@example({"log_every": math.inf})
@example({"main": np.array([1.0, 2.0])})
def test_monitors_of_all_arguments(arguments: dict[str, Any]) -> None:
    model = a_model()
    clipper = GradClipper(model)
    monitors: list[Monitor] = []
    if attempt(lambda: monitors.append(Monitor(**{"clipper": clipper, **arguments}))) is not None:
        assert not clipper._report_hooks, "a Monitor that was refused watches nothing"
    for monitor in monitors:
        monitor.close()


@fuzz
@given(odd)
@example(torch.empty((), device="meta"))
@example(torch.tensor(1j))
@example(10**400)
def test_what_is_logged_is_refused_at_once_or_never(value: Any) -> None:
    clipper = GradClipper(a_model())
    seen: list[Any] = []
    with Monitor(clipper, [lambda step, metrics: seen.append(metrics)]) as monitor:
        clipper.clip()
        refused = attempt(lambda: monitor.log(value=value))
    assert len(seen) == 1, "flushing does not fail"
    assert ("train/value" in seen[0]) == (refused is None)


# --- logs -------------------------------------------------------------------------------------------------------------

GOOD = '{"kind":"step","step":1,"time":0,"grad_norm":1.5,"loss":2.0}'
LINES = [
    GOOD,
    GOOD[:-9],
    "",
    "[]",
    "null",
    "5",
    "[" * 5000,
    "\x00\x01",
    '{"kind":"step"}',
    '{"kind":"step","step":true}',
    '{"kind":"step","step":-1}',
    f'{{"kind":"step","step":1{"0" * 400}}}',
    f'{{"kind":"step","step":2,"loss":1{"0" * 400}}}',
    '{"kind":"step","step":3,"loss":{"a":1},"grad_norm":[1],"per_tensor":5,"time":"x"}',
    '{"kind":"step","step":4,"loss":1.7e308}',
    '{"kind":"step","step":5,"loss":1.7e308}',
    '{"kind":"alarm","step":1}',
    '{"kind":"alarm","step":1,"alarm":5,"message":[1],"values":[]}',
    '{"kind":"run","rule":[5],"prefix":{}}',
    '{"kind":"run","rule":"((((((((((((((((((((((((((("}',
    '{"kind":"run","rule":"\\ud800"}',
    '{"kind":5}',
    GOOD,
]


def tell(folder: Path, content: bytes) -> None:
    path = folder / "log.jsonl"
    path.write_bytes(content)

    def look() -> None:
        found = read_run(path)
        summary_of(found).name.encode()
        json.dumps(suggest(found).to_dict()).encode()

    error = attempt(look)
    assert error is None or (isinstance(error, ValueError) and str(path) in str(error))


@fuzz
@given(st.lists(st.sampled_from(LINES).map(str.encode) | st.binary(max_size=40), max_size=12).map(b"\n".join))
def test_logs_of_all_kinds(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    tell(tmp_path_factory.getbasetemp(), content)


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_lines_that_do_no_harm(tmp_path: Path, line: str) -> None:
    """One at a time beside a good one, which is found again."""
    path = tmp_path / "log.jsonl"
    path.write_text(f"{line}\n{GOOD}\n")
    found = read_run(path)
    assert found.records[0].step == 1
    assert found.records[0].norm == 1.5
    summary_of(found)
    tell(tmp_path, f"{GOOD}\n{line}\n".encode())


def test_sums_of_the_largest_losses(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(f'{{"kind":"step","step":{step},"loss":1.7e308}}' for step in range(40)))
    assert summary_of(read_run(path)).last_loss == pytest.approx(1.7e308)


@pytest.mark.parametrize("path", ["", "there/is/none.jsonl", "a\x00b.jsonl", "x" * 5000])
@pytest.mark.parametrize("read", [read_run, load_mapping])
def test_places_that_hold_no_file(tmp_path: Path, read: Callable[[Path], Any], path: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_log_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(GOOD)
    path.chmod(0)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        read_run(path)
