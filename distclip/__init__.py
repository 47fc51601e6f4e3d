"""Gradient clipping for distributed PyTorch: the right norm on every rank, whatever the parallelism."""

from distclip import amp, rules
from distclip.audit import Audit, audit
from distclip.clipper import GradClipper
from distclip.config import ClipConfig
from distclip.declare import declare, undeclare
from distclip.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, grad_norm
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
    "NormalizeGradient",
    "PerGroup",
    "QuantileClip",
    "Rule",
    "SkipAbove",
    "SkipOnSpike",
    "StableSPAM",
    "ZClip",
    "amp",
    "audit",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "declare",
    "grad_norm",
    "patch",
    "rules",
    "undeclare",
]
__version__ = "0.1.0"
