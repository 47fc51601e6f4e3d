"""``distclip check CONFIG``: which layout a config of Accelerate or DeepSpeed makes, what clips, and what is amiss.

``read.py`` brings each kind of file to the same ``Facts``, ``layouts.py`` tells what they mean for a clip, and
``traps.py`` holds one small function for each thing that can be wrong.
"""

from distclip.check.checked import Checked, check_config
from distclip.check.facts import Finding

__all__ = ["Checked", "Finding", "check_config"]
