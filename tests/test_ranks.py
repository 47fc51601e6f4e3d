"""The bench is trusted by every multi-rank test, so it has to prove itself."""

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.conftest import no_leaks
from tests.ranks import RanksFailed, ranks, run_ranks

ONLY_HERE = "DISTCLIP_TESTS_ONLY_HERE"


def report_of(body: Any, world_size: int = 2, *args: Any, timeout: float = 20) -> str:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(body, world_size, *args, timeout=timeout)
    return str(failure.value)


# What ranks see and return


def who_am_i(greeting: str) -> tuple[str, int, int, torch.Tensor]:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return greeting, dist.get_rank(), dist.get_world_size(), total


def test_results_come_in_rank_order() -> None:
    results = run_ranks(who_am_i, 4, "hello")
    assert results == [("hello", rank, 4, torch.tensor(6.0)) for rank in range(4)]


@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
@ranks(1, 2)
@pytest.mark.parametrize(("dtype", "numbers"), [(torch.float16, [1, 2])])
def test_arguments_arrive(layout: str, dtype: torch.dtype, numbers: list[int], world_size: int, tmp_path: Path) -> None:
    assert layout in ("fsdp2", "ddp")
    assert torch.tensor(numbers, dtype=dtype).tolist() == [1, 2]
    assert tmp_path.is_dir()
    assert dist.get_world_size() == world_size == int(os.environ["WORLD_SIZE"])
    case = "1 rank" if world_size == 1 else "2 ranks"
    assert f"{case}-{layout}]" in os.environ["PYTEST_CURRENT_TEST"]


@ranks(2)
@torch.no_grad()
def test_a_decorated_body_keeps_its_decorators() -> None:
    assert not torch.is_grad_enabled()


@ranks(2)
def test_ranks_start_from_one_seed_and_one_thread() -> None:
    drawn = [torch.empty(3) for _ in range(2)]
    dist.all_gather(drawn, torch.rand(3))
    assert drawn[0].equal(drawn[1])
    assert torch.get_num_threads() == 1


@ranks(1, 2)
def test_ranks_are_on_their_device(device: str) -> None:
    """On a GPU machine this is NCCL for one rank, and two gloo ranks on one GPU."""
    one_gpu_each = device == "cuda" and dist.get_world_size() <= torch.cuda.device_count()
    assert dist.get_backend() == ("nccl" if one_gpu_each else "gloo")
    total = torch.ones((), device=device)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    assert total.device.type == device


# Nothing is shared


def set_variable(value: str) -> str | None:
    before = os.environ.get(ONLY_HERE)
    os.environ[ONLY_HERE] = value
    return before


def test_environment_comes_from_the_test_and_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(set_variable, 2, "from a rank") == [None, None]
    assert run_ranks(set_variable, 2, "from a rank") == [None, None]
    assert ONLY_HERE not in os.environ
    monkeypatch.setenv(ONLY_HERE, "from the test")
    assert run_ranks(set_variable, 2, "from a rank") == ["from the test"] * 2
    assert os.environ[ONLY_HERE] == "from the test"


@pytest.mark.parametrize("turn", ["first", "second"])
@ranks(2, 4)
def test_dtensors_work_every_time(turn: str, world_size: int) -> None:
    """A process that had seen an earlier group would find it, dead, in DTensor's cache of shardings."""
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(7.0)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    assert sharded.to_local().numel() < whole.numel()
    assert torch.linalg.vector_norm(sharded).redistribute(placements=[Replicate()]).to_local() == whole.norm()

    model = torch.nn.Linear(3, 5)
    fully_shard(model, mesh=mesh)
    model(torch.ones(2, 3)).sum().backward()
    gradient = model.weight.grad
    assert isinstance(gradient, DTensor)
    assert gradient.full_tensor().equal(torch.full((5, 3), 2.0))


# Failures


def fail_on_rank_1() -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == 1:
        two = torch.tensor(2.0)
        assert two == 3, "two is not three"
    dist.barrier()


def test_first_failure_comes_first_though_the_others_wait_for_it() -> None:
    start = time.monotonic()
    report = report_of(fail_on_rank_1, 4)
    assert time.monotonic() - start < 15, "the others were waited for"
    headline, traceback, *others = report.split("\n\n")
    assert headline == "rank 1 of 4 raised AssertionError: two is not three"
    assert traceback.splitlines()[1].startswith(f'  File "{__file__}"')
    assert "assert tensor(2.) == 3" in traceback
    assert [part.splitlines()[0] for part in others] == [
        *(f"rank {rank} raised" for rank in (0, 2, 3)),
        *(f"output of rank {rank}" for rank in range(4)),
    ]
    assert "dist.barrier()" in others[0]
    assert "tests/ranks/" not in report
    assert "rank 3 was here" in others[-1]


@ranks(2)
def fail_in_a_case() -> None:
    fail_on_rank_1()


def test_a_failed_case_shows_the_report_alone() -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1 of 2 raised AssertionError: two is not three") as failure:
        fail_in_a_case(world_size=2)
    assert not failure.value.pytrace, "pytest would bury the report under the bench's own frames"


def fail_on_rank_1_while_the_others_are_deaf() -> None:
    if dist.get_rank() == 1:
        raise ValueError("nobody hears this")
    time.sleep(1000)


def test_stragglers_show_where_they_are() -> None:
    headline, _, other = report_of(fail_on_rank_1_while_the_others_are_deaf).split("\n\n")
    assert headline == "rank 1 of 2 raised ValueError: nobody hears this"
    assert other.startswith("rank 0 still running\n")
    assert "in fail_on_rank_1_while_the_others_are_deaf" in other
    assert "multiprocessing" not in other


def kill_rank_1(number: int) -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), number)
    dist.barrier()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_killed_rank_is_named_by_its_signal(name: str) -> None:
    report = report_of(kill_rank_1, 2, signal.Signals[name])
    assert report.startswith(f"rank 1 of 2 killed by {name}\n")
    assert ("Fatal Python error: Segmentation fault" in report) == (name == "SIGSEGV")


def exit_silently() -> None:
    os._exit(3)


def test_a_rank_that_leaves_without_a_word_is_a_failure() -> None:
    assert report_of(exit_silently).startswith("rank 0 of 2 exited with code 3\n")


def sleep_for_ever() -> None:
    time.sleep(1000)


def test_a_hang_ends_at_the_time_limit_and_shows_where() -> None:
    start = time.monotonic()
    report = report_of(sleep_for_ever, 2, timeout=1)
    assert time.monotonic() - start < 15
    assert report.startswith("2 of 2 ranks still running at the time limit of 1 s\n")
    assert report.count("in sleep_for_ever") == 2


def leave_a_collective_out() -> None:
    if dist.get_rank() == 1:
        dist.all_reduce(torch.ones(1))


def test_a_collective_that_one_rank_leaves_out_fails_long_before_the_time_limit() -> None:
    start = time.monotonic()
    report = report_of(leave_a_collective_out)
    assert time.monotonic() - start < 15
    assert report.startswith("rank 1 of 2 raised RuntimeError:")
    assert "dist.all_reduce(torch.ones(1))" in report
    assert "rank 0 returned" in report


def leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(1000,), name="left behind").start()


def test_a_rank_that_returns_must_also_end() -> None:
    report = report_of(leave_a_thread, 1, timeout=2)
    assert "rank 0 returned, but its process does not end" in report


def return_a_lambda() -> Any:
    return lambda: None


def test_results_must_pickle() -> None:
    assert "return_a_lambda.<locals>.<lambda>" in report_of(return_a_lambda)


def test_arguments_must_pickle() -> None:
    with pytest.raises(TypeError, match="arguments of who_am_i must pickle to reach the ranks"):
        run_ranks(who_am_i, 2, lambda: None)


def test_bodies_must_be_found_by_name() -> None:
    with pytest.raises(TypeError, match="must be a function of a module"):
        run_ranks(lambda: None, 2)


@pytest.mark.parametrize("world_sizes", [(), (0,)])
def test_world_sizes_are_checked(world_sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ranks(*world_sizes)


# Skips


def skip(*on: int) -> None:
    if dist.get_rank() in on:
        pytest.skip("no such hardware")


def test_a_skip_on_all_ranks_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="no such hardware"):
        run_ranks(skip, 2, 0, 1)


def test_a_skip_on_some_ranks_is_a_failure() -> None:
    assert report_of(skip, 2, 1).startswith(
        "rank 1 of 2 skipped no such hardware (a test skips on every rank or on none)"
    )


# Warnings and leaks


def warn() -> None:
    warnings.warn("mind the gap", UserWarning, stacklevel=1)


@pytest.mark.filterwarnings("error")
def test_ranks_treat_warnings_as_their_test_does() -> None:
    assert report_of(warn, 1).startswith("rank 0 of 1 raised UserWarning: mind the gap")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_ranks(warn, 1)


def test_a_leaked_variable_is_noticed_and_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCLIP_TESTS_KEPT", "before")
    leaked = f"leaked environment variables DISTCLIP_TESTS_KEPT, {ONLY_HERE}"
    with pytest.raises(pytest.fail.Exception, match=leaked), no_leaks():
        os.environ.update({ONLY_HERE: "1", "DISTCLIP_TESTS_KEPT": "after"})
    assert ONLY_HERE not in os.environ
    assert os.environ["DISTCLIP_TESTS_KEPT"] == "before"


def test_a_leaked_thread_is_noticed() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left behind")
    with pytest.raises(pytest.fail.Exception, match="leaked threads left behind"), no_leaks():
        thread.start()
    end.set()
    thread.join()


def test_a_leaked_process_group_is_noticed_and_destroyed(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="leaked an initialised process group"), no_leaks():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert not dist.is_initialized()
