"""``python -m distclip.patched script.py ...``: run a script whose calls of torch's clipping functions are distclip's.

Under torchrun: ``torchrun --nproc-per-node 8 -m distclip.patched script.py ...``. ``-m package.module`` runs a module.
Processes that the script starts by itself (``torch.multiprocessing.spawn``) are not patched: start it by torchrun.
"""

from __future__ import annotations

import sys
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType

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
        spec = _spec_of(arguments[1])
        if (
            spec is None
            or not isinstance(spec.loader, InspectLoader)
            or (code := spec.loader.get_code(spec.name)) is None
        ):
            print(f"distclip.patched: there is no module {arguments[1]!r} that can be run", file=sys.stderr)
            return 2
        sys.argv[0] = str(spec.origin)
        _run(code, spec.origin, spec)
        return 0
    script = Path(arguments[0])
    if not script.is_file():
        print(f"distclip.patched: there is no file {str(script)!r}", file=sys.stderr)
        return 2
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    _run(compile(script.read_bytes(), str(script), "exec", dont_inherit=True), str(script))
    return 0


def _spec_of(name: str) -> ModuleSpec | None:
    """Of a module, or of what a package runs."""
    try:
        spec = find_spec(name)
        return (
            find_spec(f"{name}.__main__") if spec is not None and spec.submodule_search_locations is not None else spec
        )
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        return None


def _run(code: CodeType, file: str | None, spec: ModuleSpec | None = None) -> None:
    """Run it as Python's own ``__main__``, for good.

    ``runpy`` puts back the one before, and tells multiprocessing nothing of it: processes that are spawned could not
    send back what the script defines, and the one that waits for it would wait forever.
    """
    main = ModuleType("__main__")
    vars(main).update(__file__=file, __spec__=spec, __package__=spec.parent if spec else None)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    patch()
    exec(code, vars(main))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
