"""``python -m distclip.patched script.py ...``: run a script whose calls of torch's clipping functions are distclip's.

Under torchrun: ``torchrun --nproc-per-node 8 -m distclip.patched script.py ...``. ``-m package.module`` runs a module.
Processes that the script starts by itself (``torch.multiprocessing.spawn``) are not patched: start it by torchrun.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from distclip.patch import patch

_USAGE = """usage: python -m distclip.patched SCRIPT [ARGUMENT ...]
       python -m distclip.patched -m MODULE [ARGUMENT ...]

Run a training script in which torch.nn.utils.clip_grad_norm_ and clip_grad_value_ are distclip's."""


def main(arguments: list[str]) -> int:
    """Run what ``arguments`` name, as Python would; returns the exit status where there is nothing to run."""
    if arguments[:1] in ([], ["-h"], ["--help"], ["-m"]) and not (arguments[:1] == ["-m"] and arguments[1:]):
        print(_USAGE, file=sys.stderr if arguments[:1] in ([], ["-m"]) else sys.stdout)
        return 2 if arguments[:1] in ([], ["-m"]) else 0
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = str(Path.cwd())
        patch()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return 0
    script = Path(arguments[0])
    if not script.is_file():
        print(f"distclip.patched: there is no file {str(script)!r}", file=sys.stderr)
        return 2
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    patch()
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
