"""``distclip bench``: how long clips take on this machine, next to torch's documented way and a plain read.

``cases.py`` says what is measured, ``layouts.py`` and ``values.py`` make the model and its gradients, ``sides.py`` the
ways of clipping, ``rounds.py`` times them in turns, ``counters.py`` counts what time does not show, ``measure.py`` puts
one case together, and ``run.py`` all of them, on this process and on ranks (``ranks.py``) that it starts.
"""

from distclip.bench.cases import Case, default_cases, product_of
from distclip.bench.measure import Row
from distclip.bench.run import Results, bench

__all__ = ["Case", "Results", "Row", "bench", "default_cases", "product_of"]
