"""Gradient clipping for distributed PyTorch: the right norm on every rank, whatever the parallelism."""

from distclip import amp, rules
from distclip.audit import Audit, audit
from distclip.clipper import GradClipper
from distclip.declare import declare, undeclare
from distclip.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, grad_norm
from distclip.report import ClipReport
from distclip.rules import ClipByGlobalNorm, ClipByNorm, ClipByValue, Rule
from distclip.warning import AuditWarning

__all__ = [
    "Audit",
    "AuditWarning",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "ClipReport",
    "GradClipper",
    "Rule",
    "amp",
    "audit",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "declare",
    "grad_norm",
    "rules",
    "undeclare",
]
__version__ = "0.1.0"
