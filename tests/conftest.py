"""What every test gets: the `--device` option, the marks `gpu` and `slow`, a check that it leaves nothing behind."""

import contextlib
import os
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

# Doctests are looked for in every module; that of the forkserver works in the forkserver alone.
collect_ignore = ["ranks/preload.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: tests on the CPU, and on CUDA where there is one; cuda: only the tests marked gpu",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: more of what others test, skipped unless DISTCLIP_TESTS_SLOW=1")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU, and is skipped where there is none")
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch.cuda.is_available() is False here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("device")
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    on_cpu = [item for item in items if not item.get_closest_marker("gpu")]
    if chosen != "auto":
        config.hook.pytest_deselected(items=on_gpu if chosen == "cpu" else on_cpu)
        items[:] = on_cpu if chosen == "cpu" else on_gpu
    elif not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    if os.environ.get("DISTCLIP_TESTS_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="more of the same, for minutes: DISTCLIP_TESTS_SLOW=1 runs it"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test once on each kind of device; the ranks of a rank test that asks for it are on that device."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with no_leaks():
        yield


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if the block leaves an environment variable, a thread or a process group behind, and clean up after it."""
    environment, threads = _environment(), set(threading.enumerate())
    yield
    leaks = []
    after = _environment()
    if changed := sorted(dict(environment.items() ^ after.items())):
        leaks.append(f"environment variables {', '.join(changed)}")
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update((name, environment[name]) for name in changed if name in environment)
    if alive := [thread.name for thread in threading.enumerate() if thread not in threads and not thread.daemon]:
        leaks.append(f"threads {', '.join(alive)}")
    if dist.is_initialized():
        leaks.append("an initialised process group")
        dist.destroy_process_group()
    if leaks:
        pytest.fail(f"leaked {' and '.join(leaks)}", pytrace=False)


def _environment() -> dict[str, str]:
    # The second is torch's own doing, when its compiler is imported (making an optimizer is enough).
    ignored = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
    return {name: value for name, value in os.environ.items() if name not in ignored}
