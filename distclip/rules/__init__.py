"""Clipping rules: each maps the norms of one step to what is done with its gradients."""

from distclip.rules.base import Decision, Norms, Rule
from distclip.rules.norm import ClipByGlobalNorm, ClipByNorm, ClipByValue
from distclip.rules.text import parse

__all__ = ["ClipByGlobalNorm", "ClipByNorm", "ClipByValue", "Decision", "Norms", "Rule", "parse"]
