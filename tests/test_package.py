"""What `import distclip` needs and offers."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import distclip

_PROBE = """
import sys, torch
before = set(sys.modules)
import distclip
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
print(*sorted(n for n in ("torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo") if n in sys.modules))
"""


def test_import_needs_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["distclip", ""], "no other package, and none of torch's slow parts"


def test_public_names() -> None:
    assert sorted(distclip.__all__) == list(distclip.__all__)
    assert all(hasattr(distclip, name) for name in distclip.__all__)


def test_typed() -> None:
    assert (Path(distclip.__file__).parent / "py.typed").exists()


def test_version() -> None:
    assert importlib.metadata.version("distclip") == distclip.__version__
