"""Gradient clipping for distributed PyTorch: the right norm on every rank, whatever the parallelism."""

from distclip import alarms, amp, rules, sinks
from distclip.audit import Audit, audit
from distclip.clipper import GradClipper
from distclip.config import ClipConfig
from distclip.declare import declare, undeclare
from distclip.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, grad_norm
from distclip.monitor import AlarmWarning, Monitor
from distclip.patch import patch
from distclip.report import ClipReport
from distclip.rules import (
    AdaGC,
    AdaptiveGradientClipping,
    AutoClip,
    CentralizeGradient,
    Chain,
    ClipByAverageNorm,
    ClipByBlockRMS,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    EMARatioClip,
    NormalizeGradient,
    PerGroup,
    QuantileClip,
    Rule,
    SkipAbove,
    SkipOnSpike,
    StableSPAM,
    ZClip,
)
from distclip.warning import AuditWarning

__all__ = [
    "AdaGC",
    "AdaptiveGradientClipping",
    "AlarmWarning",
    "Audit",
    "AuditWarning",
    "AutoClip",
    "CentralizeGradient",
    "Chain",
    "ClipByAverageNorm",
    "ClipByBlockRMS",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "ClipConfig",
    "ClipReport",
    "EMARatioClip",
    "GradClipper",
    "Monitor",
    "NormalizeGradient",
    "PerGroup",
    "QuantileClip",
    "Rule",
    "SkipAbove",
    "SkipOnSpike",
    "StableSPAM",
    "ZClip",
    "alarms",
    "amp",
    "audit",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "declare",
    "grad_norm",
    "patch",
    "rules",
    "sinks",
    "undeclare",
]
__version__ = "0.1.0"
