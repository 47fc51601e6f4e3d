"""The same settings from Python, a YAML file, the environment and the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from distclip.audit.clips import When
from distclip.clipper import GradClipper
from distclip.config_values import KINDS, rule_of
from distclip.declare import declare
from distclip.engine import NonFinite
from distclip.files import load_mapping
from distclip.hints import closest, shown
from distclip.monitor import Monitor
from distclip.parameters import as_modules, named_parameters
from distclip.rules.base import Rule
from distclip.rules.compose import PerGroup
from distclip.rules.tensors import matches
from distclip.sinks.base import Sink

if TYPE_CHECKING:
    import torch

_PREFIX = "DISTCLIP_"
_FILE = "DISTCLIP_CONFIG"
# Those of the test suite.
_TESTS = "DISTCLIP_TESTS_"


@dataclass(frozen=True)
class ClipConfig:
    """How to clip, as a user writes it down. ``clipper(model)`` makes a GradClipper of it.

    ``load()`` reads it from everywhere: what Python code says is overruled by a YAML file, that by the environment
    (``DISTCLIP_RULE``, ``DISTCLIP_NONFINITE``, ...), that by the command line (``--distclip-rule``, ...).

    Raises:
        ValueError: a setting does not fit; names it, its value and what fits.
        TypeError: a setting is of another type.

    Example:
        >>> config = ClipConfig(rule="zclip", groups={"head.*": "norm=0.5"}, nonfinite="skip")
        >>> print(config.make_rule())
        head.* -> norm=0.5 ; * -> zclip
    """

    rule: float | str | Rule | Sequence[Any] | Mapping[str, Any] = 1.0
    """A number (the largest global L2 norm), a rule's text (``distclip.rules.parse``), a Rule, or a list of these."""
    groups: Mapping[Any, Any] = field(default_factory=dict)
    """Rules of their own by pattern of parameter names; ``rule`` is for all others. Text: ``a.* -> norm=1 ; ...``"""
    nonfinite: NonFinite = "propagate"
    """What an inf or NaN does: propagate, raise or skip."""
    check: When = "first"
    """When to compare the ranks' gradients with what distclip takes them for: first, always or never."""
    pipeline_group: str | None = None
    """The axis of the DeviceMesh along which the stages of a pipeline lie."""
    sharded: Mapping[str, str] = field(default_factory=dict)
    """Plain parameters that differ from rank to rank: by pattern the axis of a DeviceMesh. Text: ``experts.*=ep``"""
    replicated: Mapping[str, str] = field(default_factory=dict)
    """Parameters that the ranks of an axis hold alike under pipeline stages, which count once. As ``sharded``."""
    details_every: int = 0
    """In every so many clips reports hold the norm of each tensor; 0 for none."""
    overlap: bool = False
    """Whether gradients are measured while backward() still runs."""
    log: str | None = None
    """A file that ends in .jsonl, to which a Monitor writes what the clipper does."""
    log_every: int = 1
    """Integrations and monitors log every so many steps (and wait for the device then)."""
    log_prefix: str = "train/"
    """What their names of metrics begin with: ``train/grad_norm``."""

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, KINDS[item.name].check(item.name, getattr(self, item.name)))
        if ("*",) in self.groups and self.rule != 1.0:
            raise ValueError(f"groups has its own '*', so that rule={self.rule!r} would never hold: leave one out")
        self.make_rule()

    @classmethod
    def load(
        cls,
        file: str | os.PathLike[str] | None = None,
        arguments: argparse.Namespace | Sequence[str] | None = None,
        environ: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> ClipConfig:
        """Settings from all places, each overruling those before: ``settings``, file, environment, command line.

        Args:
            file: a YAML file whose keys are the fields of this class; ``--distclip-config`` on the command line names
                another. None: that of ``DISTCLIP_CONFIG`` in the environment, else no file.
            arguments: what a parser with ``add_arguments`` returned, or a list such as ``sys.argv[1:]``, of which
                others' options are left alone. None: no command line.
            environ: None: ``os.environ``.
            settings: fields of this class.

        Raises:
            ValueError: an unknown key (names the closest known one), one that stands twice, or a value that does not
                fit; names the place. A file that is not there or is no YAML.
            ImportError: there is a file, and PyYAML is not installed.
        """
        environment = os.environ if environ is None else environ
        given = _from_arguments(arguments)
        path = given.pop("config", None) or file or environment.get(_FILE)
        found: dict[str, Any] = {}
        for place, layer, written in (
            ("ClipConfig.load()", settings, False),
            (str(path), load_mapping(Path(path)) if path else {}, False),
            ("the environment", _from_environment(environment), True),
            ("the command line", given, True),
        ):
            found |= _checked(place, layer, written)
        return cls(**found)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add ``--distclip-rule``, ``--distclip-nonfinite`` ... and ``--distclip-config FILE`` to a parser."""
        group = parser.add_argument_group("distclip", "gradient clipping; these overrule the environment and the file")
        group.add_argument("--distclip-config", metavar="FILE", help="a YAML file of these settings")
        for item in fields(ClipConfig):
            group.add_argument(f"--distclip-{item.name.replace('_', '-')}", metavar="TEXT", help=KINDS[item.name].help)

    def make_rule(self) -> Rule:
        """A new rule, with no memory yet."""
        rule = rule_of(self.rule)
        if not self.groups:
            return rule
        groups = {key: rule_of(part) for key, part in self.groups.items()}
        groups.setdefault(("*",), rule)
        return PerGroup(groups)

    def clipper(
        self,
        model: nn.Module | Iterable[nn.Module],
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        mesh: DeviceMesh | None = None,
    ) -> GradClipper:
        """A GradClipper of these settings; declares what ``sharded`` and ``replicated`` say, and writes to ``log``.

        Args:
            model, optimizer, scaler: as for ``GradClipper``.
            mesh: the DeviceMesh whose axes ``pipeline_group``, ``sharded`` and ``replicated`` name.

        Raises:
            ValueError: an axis that the mesh has not, or no mesh; a pattern that matches no parameter.
            TypeError, RuntimeError, NotImplementedError: as ``GradClipper``.
        """
        modules = as_modules(model)
        for pattern, axis in self.sharded.items():
            declare(_matching("sharded", modules, pattern), sharded=_axis("sharded", mesh, axis))
        for pattern, axis in self.replicated.items():
            declare(_matching("replicated", modules, pattern), replicated=_axis("replicated", mesh, axis))
        pipeline = None if self.pipeline_group is None else _axis("pipeline_group", mesh, self.pipeline_group)
        clipper = GradClipper(
            modules[0] if len(modules) == 1 else modules,
            self.make_rule(),
            optimizer=optimizer,
            scaler=scaler,
            nonfinite=self.nonfinite,
            pipeline_group=pipeline,
            check=self.check,
            details_every=self.details_every,
            overlap=self.overlap,
        )
        if self.log is not None:
            self.monitor(clipper, self.log)
        return clipper

    def monitor(self, clipper: GradClipper, *sinks: Sink | Any) -> Monitor:
        """A Monitor of a clipper that sends to these sinks, ``log_every`` steps at a time.

        Raises:
            TypeError, ValueError: a sink is none.
        """
        return Monitor(clipper, sinks, log_every=self.log_every, prefix=self.log_prefix)

    def to_dict(self) -> dict[str, Any]:
        """The settings as YAML and JSON take them; a Rule as its text."""
        return {item.name: KINDS[item.name].write(getattr(self, item.name)) for item in fields(self)}


Clip = ClipConfig | float | str | Rule | Sequence[Any] | Mapping[str, Any]
"""Settings, or only a rule, as integrations take them."""


def as_config(clip: Clip | None) -> ClipConfig:
    """What a user handed to an integration: a ClipConfig, or only a rule, or None to read file and environment."""
    if isinstance(clip, ClipConfig):
        return clip
    return ClipConfig.load() if clip is None else ClipConfig(rule=clip)


def _matching(setting: str, modules: list[nn.Module], pattern: str) -> list[nn.Parameter]:
    named = [pair for module in modules for pair in named_parameters(module)]
    chosen = [param for name, param in named if matches(name, (pattern,))]
    if not chosen:
        raise ValueError(f"{setting}: no parameter of the model matches {pattern!r}")
    return chosen


def _axis(setting: str, mesh: DeviceMesh | None, axis: str) -> DeviceMesh:
    known = () if mesh is None else mesh.mesh_dim_names or ()
    if mesh is None or not known:
        raise ValueError(f"{setting} names the axis {axis!r} of a DeviceMesh: pass mesh= with mesh_dim_names")
    if axis not in known:
        raise ValueError(f"{setting}: the mesh has no axis {axis!r}{closest(axis, known)}")
    return mesh[axis]


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"the command line: {message}")


def _from_arguments(arguments: argparse.Namespace | Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(arguments, argparse.Namespace):
        # Options like --distclip are the script's own: no abbreviations.
        parser = _Parser(add_help=False, allow_abbrev=False)
        ClipConfig.add_arguments(parser)
        arguments, others = parser.parse_known_args(arguments or [])
        unknown = [other.partition("=")[0] for other in others if other.startswith("--distclip-")]
        if unknown:
            known = [option for action in parser._actions for option in action.option_strings]
            raise ValueError(f"the command line: unknown option {unknown[0]!r}{closest(unknown[0], known)}")
    start = "distclip_"
    return {key.removeprefix(start): text for key, text in vars(arguments).items() if key.startswith(start) and text}


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    known = {_PREFIX + item.name.upper() for item in fields(ClipConfig)}
    given = {name: text for name, text in environ.items() if name.startswith(_PREFIX) and text}
    for name in sorted(given.keys() - known - {_FILE}):
        if not name.startswith(_TESTS):
            # Nobody else has variables of this name: it is a setting, which would silently be lost.
            raise ValueError(f"the environment: unknown variable {name!r}{closest(name, sorted({_FILE, *known}))}")
    return {name.removeprefix(_PREFIX).lower(): given[name] for name in known & given.keys()}


def _checked(place: str, layer: Mapping[str, Any], written: bool) -> dict[str, Any]:
    """A layer's settings, of which errors name the place. ``written``: as text."""
    known = {item.name for item in fields(ClipConfig)}
    found: dict[str, Any] = {}
    for name, value in layer.items():
        if name not in known:
            raise ValueError(f"{place}: unknown key {name!r}{closest(name, sorted(known))}")
        if written and not isinstance(value, str):
            raise TypeError(f"{place}: {name} must be written as a text, got {shown(value)}")
        try:
            found[name] = KINDS[name].check(name, KINDS[name].read(name, value) if written else value)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{place}: {error}") from None
    return found
