"""Imported once, by the server from which ranks are forked: what is loaded here costs a rank nothing.

Nothing here may raise (the server would be gone), start a thread or touch CUDA (its forks would inherit the damage).
"""

import contextlib
import importlib
import os
import sys

from _pytest.assertion import install_importhook
from _pytest.config import get_config

# Those of the test process's modules that are worth it, as `process.py` found them: distclip, the collected tests ...
_wanted = os.environ["DISTCLIP_TESTS_PRELOAD"].split()

_HEAVY = [
    "torch._dynamo",  # DTensor imports it at its first operation: a second or two for each rank
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torch.nn.parallel",
]

# Without pytest's import hook a rank's failed assert would not show the values that it compared.
install_importhook(get_config()).mark_rewrite(*(name for name in _wanted if name not in sys.modules))

for _name in [*_HEAVY, *_wanted]:
    # What cannot be imported here fails again in the rank that needs it, and is reported there.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
