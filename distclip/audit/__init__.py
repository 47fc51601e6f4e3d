"""Does reality agree with the layouts? ``audit`` asks everything, ``GradClipper`` asks cheaply at its first clip.

Every rank tells, of each tensor of which it has a piece, what it takes the tensor and the piece for, and a number for
the gradient's bits (or, cheaply, its norm). All ranks then look at the same table (``compare.py``): are replicas equal,
distinct pieces not, does every tensor count in every norm? Only where something is suspicious do they tell names, and
word what they found (``findings.py``), all alike. Nothing a rank finds out by itself decides whether it communicates.
"""

from distclip.audit.findings import Finding
from distclip.audit.full import audit
from distclip.audit.table import Audit, AuditRow

__all__ = ["Audit", "AuditRow", "Finding", "audit"]
