"""Settings from Python, a file, the environment and the command line, and the clipper that they make."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import distclip
from distclip import ClipByGlobalNorm, ClipByNorm, ClipConfig, PerGroup
from distclip.config import as_config
from distclip.runs import read_run
from tests.ranks import ranks


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "distclip.yaml"
    path.write_text("rule: norm=2\nnonfinite: skip\nlog_every: 5\ngroups:\n  head.*: 0.5\n  'a.*:b.*': zclip\n")
    return path


def test_each_place_overrules_those_before(file: Path) -> None:
    environ = {"DISTCLIP_NONFINITE": "raise", "DISTCLIP_LOG_EVERY": "7", "DISTCLIP_OVERLAP": "True", "PATH": "/"}
    arguments = ["--lr", "0.1", "--distclip-log-every", "9"]
    python: dict[str, Any] = {"rule": 3.0, "check": "never", "log_prefix": "clip/"}
    found = ClipConfig.load(file, arguments, environ, **python)
    assert (found.check, found.log_prefix) == ("never", "clip/")
    assert found.rule == "norm=2"
    assert found.nonfinite == "raise"
    assert found.overlap is True
    assert found.log_every == 9
    assert str(found.make_rule()) == "head.* -> global_norm=0.5 ; a.*:b.* -> zclip ; * -> norm=2"


def test_nothing_said_is_the_default() -> None:
    assert ClipConfig.load(environ={}) == ClipConfig()
    assert ClipConfig().make_rule() == ClipByGlobalNorm(1.0)


def test_the_file_is_named_by_the_environment_or_the_command_line(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("log_every: 3")
    environ = {"DISTCLIP_CONFIG": str(file)}
    assert ClipConfig.load(environ=environ).log_every == 5
    assert ClipConfig.load(environ=environ, arguments=["--distclip-config", str(other)]).log_every == 3
    assert ClipConfig.load(other, environ=environ).log_every == 3
    assert ClipConfig.load(file, environ={}, arguments=["--distclip-config", str(other)]).log_every == 3


def test_a_script_s_own_parser_takes_the_options() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    ClipConfig.add_arguments(parser)
    arguments = parser.parse_args(["--lr", "3", "--distclip-rule", "zclip", "--distclip-groups", "head.* -> norm=1"])
    found = ClipConfig.load(arguments=arguments, environ={})
    assert str(found.make_rule()) == "head.* -> norm=1.0 ; * -> zclip"
    assert "--distclip-nonfinite" in parser.format_help()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rul: 1", "unknown key 'rul'; did you mean 'rule'?"),
        ("nonfinite: skp", "nonfinite must be one of propagate, raise, skip, got 'skp'"),
        ("rule: glbal_norm=1", "unknown name 'glbal_norm'; did you mean 'global_norm'?"),
        ("rule: -1", "max_norm must be at least 0, got -1"),
        ("rule:", "rule must be a number or a rule, got None"),
        ("log_every: true", "log_every must be a whole number from 1 on, got True"),
        ("details_every: -1", "details_every must be a whole number from 0 on, got -1"),
        ("overlap: 1", "overlap must be true or false, got 1"),
        ("log: run.txt", "log must be a file that ends in .jsonl, got 'run.txt'"),
        ("groups: [1]", "groups must map patterns of parameter names to rules, got [1]"),
        ("sharded: ep", "sharded must map patterns of parameter names to axes of a DeviceMesh, got 'ep'"),
        ("pipeline_group: 1", "pipeline_group must be the name of an axis of a DeviceMesh, got 1"),
        ("- 1", "must hold settings, `name: value`, got list"),
        ("rule: [", "is no YAML"),
        ("rule: 1\nrule: 2", "is no YAML: 'rule' stands twice"),
        ("groups: {a: 1, 'a': 2}", "is no YAML: 'a' stands twice"),
        ("groups: {1: 1.0}", "a pattern of parameter names must be a text, got 1"),
        ("rule: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_bad_files_name_the_file_and_the_setting(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError)) as error:
        ClipConfig.load(path, environ={})
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"environ": {"DISTCLIP_RUEL": "1"}}, "unknown variable 'DISTCLIP_RUEL'; did you mean 'DISTCLIP_RULE'?"),
        ({"environ": {"DISTCLIP_LOG_EVERY": "often"}}, "the environment: log_every must be a whole number"),
        ({"environ": {"DISTCLIP_OVERLAP": "yes"}}, "the environment: overlap must be true or false, got 'yes'"),
        ({"environ": {"DISTCLIP_GROUPS": "zclip"}}, "groups must be 'pattern -> rule ; pattern -> rule'"),
        ({"environ": {"DISTCLIP_SHARDED": "experts"}}, "sharded must be 'pattern=axis,pattern=axis'"),
        ({"arguments": ["--distclip-rool", "1"]}, "unknown option '--distclip-rool'; did you mean '--distclip-rule'?"),
        ({"arguments": ["--distclip-check=often"]}, "the command line: check must be one of"),
        ({"file": "/no/such/file.yaml"}, "/no/such/file.yaml: cannot be read: No such file or directory"),
        ({"rul": 1}, "unknown key 'rul'; did you mean 'rule'?"),
    ],
)
def test_bad_settings_name_their_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ClipConfig.load(**({"environ": {}} | given))


def test_a_rule_that_would_never_hold() -> None:
    with pytest.raises(ValueError, match=r"groups has its own '\*', so that rule=2.0 would never hold"):
        ClipConfig(rule=2.0, groups={"*": 1})
    groups: Any = "a.* -> norm=1 ; * -> zclip"  # as YAML has it
    assert str(ClipConfig(groups=groups).make_rule()) == "a.* -> norm=1.0 ; * -> zclip"


def test_variables_of_the_test_suite_are_not_settings() -> None:
    assert ClipConfig.load(environ={"DISTCLIP_TESTS_SLOW": "1"}) == ClipConfig()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rule": st.sampled_from([1.0, 2, "zclip", "skip_above=9 | norm=1", "value=-1:2"]),
            "groups": st.dictionaries(st.sampled_from(["a.*", "b:c.*"]), st.sampled_from([0.5, "norm=1"])),
            "nonfinite": st.sampled_from(["propagate", "raise", "skip"]),
            "pipeline_group": st.sampled_from([None, "pp"]),
            "sharded": st.dictionaries(st.sampled_from(["a.*", "b"]), st.just("ep")),
            "log_every": st.integers(1, 10**6),
            "overlap": st.booleans(),
            "log_prefix": st.text(max_size=5),
        },
    )
)
def test_what_is_written_down_is_read_back(settings: dict[str, Any]) -> None:
    config = ClipConfig(**settings)
    again = ClipConfig(**config.to_dict())
    assert again == config
    assert str(again.make_rule()) == str(config.make_rule())


def test_every_clipper_has_a_memory_of_its_own() -> None:
    mine = distclip.ZClip()
    config = ClipConfig(rule=mine)
    first, second = config.clipper(nn.Linear(2, 2)), config.clipper(nn.Linear(2, 2))
    assert len({id(first.rule), id(second.rule), id(mine)}) == 3
    assert config.to_dict()["rule"] == "zclip"


def test_a_monitor_of_these_settings(tmp_path: Path) -> None:
    config = ClipConfig(rule=1.0, details_every=2, log=str(tmp_path / "run.jsonl"), log_every=2, log_prefix="clip/")
    model, seen = nn.Linear(2, 1, bias=False), []
    clipper = config.clipper(model)
    with config.monitor(clipper, lambda step, metrics: seen.append((step, metrics["clip/grad_norm"]))):  # another one
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clipper.clip().per_tensor is not None
    assert seen == [(1, 5.0)]
    del clipper
    assert [record.step for record in read_run(tmp_path / "run.jsonl").records] == [1]


def test_overlap_reaches_the_clipper() -> None:
    assert ClipConfig(overlap=True).clipper(nn.Linear(2, 2))._overlap is not None
    assert ClipConfig().clipper(nn.Linear(2, 2))._overlap is None


def test_what_integrations_take() -> None:
    assert as_config(config := ClipConfig(log_every=3)) is config
    assert as_config("zclip").make_rule() == distclip.ZClip()
    assert as_config([1.0, ClipByNorm(1.0)]).make_rule() == distclip.Chain([1.0, ClipByNorm(1.0)])
    assert isinstance(as_config({"head.*": 1.0}).make_rule(), PerGroup)


def test_without_yaml_the_extra_is_named(file: Path) -> None:
    code = (
        "import sys; sys.modules['yaml'] = None; import distclip\n"
        f"try: distclip.ClipConfig.load({str(file)!r})\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "this needs yaml: pip install 'distclip[config]'"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 1, bias=False)
        self.experts = nn.Linear(2, 1, bias=False)


@ranks(4)
def test_groups_by_their_names() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    model = Experts()
    model.dense.weight.grad = torch.full((1, 2), 1.0 + mesh["pp"].get_local_rank())
    model.experts.weight.grad = torch.full((1, 2), float(dist.get_rank()))
    clipper = ClipConfig(rule=1.0, pipeline_group="pp", sharded={"experts.*": "ep"}).clipper(model, mesh=mesh)
    # Two stages of two elements each; four experts of two elements.
    expected = (2 * (1 + 4) + 2 * (0 + 1 + 4 + 9)) ** 0.5
    assert clipper.clip().to_dict()["total_norm"] == pytest.approx(expected, rel=1e-6)

    with pytest.raises(ValueError, match="sharded: the mesh has no axis 'eq'; known are pp, ep"):
        ClipConfig(sharded={"experts.*": "eq"}).clipper(model, mesh=mesh)
    with pytest.raises(ValueError, match="pipeline_group names the axis 'pp' of a DeviceMesh: pass mesh="):
        ClipConfig(pipeline_group="pp").clipper(model)
    with pytest.raises(ValueError, match=r"replicated: no parameter of the model matches 'embed\.\*'"):
        ClipConfig(replicated={"embed.*": "pp"}).clipper(model, mesh=mesh)


def test_each_optimizer_has_a_log_of_its_own() -> None:
    from distclip.integrations.parts import config_of_part

    config = ClipConfig(rule=2.0, log="runs/mine.jsonl")
    assert [config_of_part(config, place).log for place in range(2)] == ["runs/mine.jsonl", "runs/mine.1.jsonl"]
    assert config_of_part(config, 1).rule == 2.0
    assert config_of_part(ClipConfig(), 1).log is None
