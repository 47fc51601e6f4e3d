"""``distclip doctor``: what is installed on this machine, and whether every layout clips right on it."""

from distclip.doctor.facts import facts
from distclip.doctor.selftest import Outcome, self_test

__all__ = ["Outcome", "facts", "self_test"]
