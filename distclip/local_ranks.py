"""Ranks on this machine, started by a command that is one process itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

# What torchrun gets to end its ranks, in seconds, before it is ended itself. It gives them 30.
_GRACE = 40.0


def run_ranks(
    count: int, module: str, arguments: Sequence[str], *, patience: float, environment: Mapping[str, str] | None = None
) -> str:
    """Run ``python -m module arguments`` on each of ``count`` ranks of this machine, by torchrun, and wait for the end.

    Args:
        count: how many ranks.
        module: what each of them runs.
        arguments: for it.
        patience: seconds after which they are ended.
        environment: added to this process's. One thread a rank, unless it says otherwise.

    Returns:
        Why they ended: the last line on stderr, or that nothing more came.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    with subprocess.Popen(
        [*launcher, "-m", module, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=settings,
    ) as agent:
        try:
            _, told = agent.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            _end(agent)
            return f"nothing more came within {patience:g} seconds"
        except BaseException:
            _end(agent)
            raise
    return (told.strip().splitlines() or ["the ranks ended"])[-1]


def _end(agent: subprocess.Popen[str]) -> None:
    # torchrun ends its ranks, which are in sessions of their own, only if it is asked to.
    agent.terminate()
    try:
        agent.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        # Ranks that do not go hold the other end of its pipe: what they say is not waited for.
        agent.kill()
