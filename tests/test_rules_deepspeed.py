"""Rules inside ``engine.step()``: rows cut by flat partitions, two passes over scaled gradients, steps left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import distclip
from distclip import GradClipper
from tests.formulas import FORMULAS, Formula, Whole, agc, global_clip
from tests.ranks import ranks
from tests.test_deepspeed import BY_NAME, Net, backward, make_engine, masters, pytestmark, whole_grads

__all__ = ["pytestmark"]


def limited(self: Formula, grads: Whole, weights: Whole) -> Whole:
    return global_clip({name: np.clip(grad, -0.02, 0.01) for name, grad in grads.items()}, 0.05)


RULES: dict[str, Callable[[], Formula]] = {
    "agc": lambda: Formula(distclip.AdaptiveGradientClipping, agc),
    "centralize": FORMULAS["centralize"],
    "stable_spam": FORMULAS["stable_spam"],
    "adagc": FORMULAS["adagc"],
    "block_rms": lambda: Formula(lambda: distclip.ClipByBlockRMS(0.3), FORMULAS["block_rms"]().step),
    "value, norm": lambda: Formula(lambda: distclip.Chain([distclip.ClipByValue((-0.02, 0.01)), 0.05]), limited),
    "skip": lambda: Formula(lambda: distclip.SkipAbove(0.0), lambda self, grads, weights: None),
}
CASES = [
    "zero0-fp32",
    "zero1-fp32",
    "zero2-fp32",
    "zero2-fp16",
    "zero2-bf16",
    "zero3-fp32",
    "zero3-fp32-sub_group_size",
]


SKIPS = ["zero0-bf16", "zero0-fp16", "zero0-fp16-fused", "zero1-bf16+fp32", "zero3-fp16"]


@ranks(2)
@pytest.mark.parametrize("case", SKIPS)
def test_a_step_that_is_left_out(case: str) -> None:
    engine: Any = make_engine(BY_NAME[case], Net())
    clipper = GradClipper(engine, distclip.Chain([distclip.SkipAbove(lambda step: 0.0 if step else 1e9), 0.05]))
    for step in range(3):
        backward(engine, step)
        before = masters(engine)
        engine.step()
        assert clipper.report is not None
        assert bool(clipper.report.skipped) == (step > 0)
        assert not clipper.report.nonfinite
        moved = [bool((weight != before[name]).any()) for name, weight in masters(engine).items()]
        assert any(moved) == (step == 0)


@ranks(2)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "case",
    [case if case == "zero3-fp32" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_rule(case: str, rule: str) -> None:
    formula = RULES[rule]()
    engine: Any = make_engine(BY_NAME[case], Net(), gradient_accumulation_steps=2)
    clipper = GradClipper(engine, formula.rule(), check="never")
    exact = case.endswith(("fp32", "size"))
    for step in range(3):
        backward(engine, step)
        grads, before = whole_grads(engine), masters(engine)
        want = formula(grads, before)
        engine.step()
        assert clipper.report is not None
        assert bool(clipper.report.skipped) == (want is None)
        for name, weight in masters(engine).items():
            step_taken = np.zeros(()) if want is None else want.get(name, np.zeros(()))
            largest = float(np.abs(step_taken).max())
            atol = (1e-5 if exact else 2e-2) * largest + 1e-6
            np.testing.assert_allclose(before[name] - weight, step_taken + np.zeros_like(weight), rtol=1e-4, atol=atol)
