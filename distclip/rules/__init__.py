"""Clipping rules: each maps the norms of one step to what is done with its gradients."""

from distclip.rules.adaptive import AdaptiveGradientClipping, CentralizeGradient
from distclip.rules.base import Decision, Norms, Rule
from distclip.rules.catalogue import catalogue
from distclip.rules.compose import Chain, PerGroup
from distclip.rules.history import AutoClip, QuantileClip, ZClip
from distclip.rules.norm import ClipByAverageNorm, ClipByBlockRMS, ClipByGlobalNorm, ClipByNorm, NormalizeGradient
from distclip.rules.skip import SkipAbove, SkipOnSpike
from distclip.rules.spam import StableSPAM
from distclip.rules.state import StatefulRule
from distclip.rules.tensor_history import AdaGC, EMARatioClip
from distclip.rules.tensors import Tensors
from distclip.rules.text import parse
from distclip.rules.value import ClipByValue

__all__ = [
    "AdaGC",
    "AdaptiveGradientClipping",
    "AutoClip",
    "CentralizeGradient",
    "Chain",
    "ClipByAverageNorm",
    "ClipByBlockRMS",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "Decision",
    "EMARatioClip",
    "NormalizeGradient",
    "Norms",
    "PerGroup",
    "QuantileClip",
    "Rule",
    "SkipAbove",
    "SkipOnSpike",
    "StableSPAM",
    "StatefulRule",
    "Tensors",
    "ZClip",
    "catalogue",
    "parse",
]
