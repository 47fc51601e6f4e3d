"""Tests whose body is what each rank runs.

    @ranks(2, 4)                                      # one pytest case for each world size
    @pytest.mark.parametrize("layout", LAYOUTS)       # arguments and fixtures travel to the ranks by plain pickle
    def test_norm(layout: Layout, device: str) -> None:
        assert dist.is_initialized()                  # the process group stands; `device` is the rank's

Every case gets fresh processes, forked from a server that has torch loaded (`launch.py`, `preload.py`); what a rank
does before and after the body is in `child.py`, and how a failure is told in `report.py`.

A rank on "cuda" (the body's `device` argument, or `backend="nccl"`) talks over NCCL where every rank has a GPU of its
own, and over gloo where ranks share one.
"""

from tests.ranks.launch import RanksFailed, ranks, run_ranks

__all__ = ["RanksFailed", "ranks", "run_ranks"]
