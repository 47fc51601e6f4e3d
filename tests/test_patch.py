"""torch's own functions become distclip's, in code that nobody edits."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import distclip
from tests import oracle
from tests.layouts import LAYOUTS, build
from tests.ranks import ranks, run_ranks


def overflowing() -> nn.Parameter:
    """Its norm is beyond float16, where torch returns inf."""
    param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    param.grad = torch.full((2,), 60000.0, dtype=torch.float16)
    return param


def is_distclip() -> bool:
    return bool(clip_grad_norm_([overflowing()], 1.0).isfinite())


def test_functions_imported_before_are_reached_and_given_back() -> None:
    assert not is_distclip()
    with distclip.patch():
        assert is_distclip()
        assert nn.utils.clip_grad.clip_grad_norm_ is clip_grad_norm_
        param = overflowing()
        clip_grad_value_(param, (-1.0, 2.0))  # type: ignore[arg-type]  # a pair, which torch does not take
        assert param.grad is not None
        assert param.grad.tolist() == [2.0, 2.0]
        with pytest.warns(FutureWarning):
            assert nn.utils.clip_grad_norm([overflowing()], 1.0).isfinite()
    assert not is_distclip()


def test_nested_and_undone_once() -> None:
    outer = distclip.patch()
    inner = distclip.patch()
    inner.undo()
    assert is_distclip()
    outer.undo()
    outer.undo()
    inner.undo()
    assert not is_distclip()


def test_the_same_as_torch_where_torch_is_right() -> None:
    def run() -> list[Any]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
        for param in params[:2]:
            param.grad = torch.randn_like(param)
        norms = [
            clip_grad_norm_(params, max_norm=1.0, norm_type=1.0, error_if_nonfinite=True, foreach=False),
            clip_grad_norm_((param for param in params), 0.5),
            get_total_norm([p.grad for p in params if p.grad is not None]),
            get_total_norm(params[0].grad, "inf"),  # type: ignore[arg-type]  # torch takes it
            clip_grad_norm_([], 1.0),
            get_total_norm([]),
        ]
        clip_grads_with_norm_(params, 0.1, torch.tensor(7.0))
        clip_grads_with_norm_([], 0.1, torch.tensor(7.0))
        clip_grad_value_(params, clip_value=0.01)
        return [*norms, *(param.grad for param in params[:2])]

    theirs = run()
    with distclip.patch():
        ours = run()
        clip_grad_value_([], 0.01)  # where torch's fails
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-9)


def iter_nothing() -> Iterator[Tensor]:
    yield from ()


def test_a_generator_that_is_used_up_is_told_in_torch_s_words() -> None:
    def told() -> list[tuple[type[Warning], str, str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert clip_grad_norm_(iter_nothing(), 1.0) == 0.0
        return [(one.category, str(one.message), one.filename) for one in caught]

    theirs = told()
    with distclip.patch():
        assert told() == theirs
        with pytest.warns(UserWarning, match="empty generator"):
            clip_grad_value_(iter_nothing(), 1.0)
    assert [filename for _, _, filename in theirs] == [__file__]


def full(tensor: Any) -> Tensor:
    """As many scripts write it, without asking whether they have a DTensor."""
    whole: Tensor = tensor.full_tensor()
    assert type(whole) is Tensor
    return whole


@ranks(2)
def test_the_norm_of_dtensors_answers_full_tensor() -> None:
    model = build(LAYOUTS["fsdp2"])
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    true_norm = oracle.norm(oracle.whole_grads(model))
    one = next(param for param in model.parameters() if param.grad is not None and full(param.grad).norm() > 0)
    assert one.grad is not None
    norm_of_one = full(one.grad).double().norm().item()
    with distclip.patch():
        norm = get_total_norm(grads)
        assert full(norm).item() == pytest.approx(true_norm, rel=1e-6)
        assert full(clip_grad_norm_(one, math.inf)).item() == pytest.approx(norm_of_one, rel=1e-6)
        assert full(clip_grad_norm_(model.parameters(), true_norm / 3)).item() == pytest.approx(true_norm, rel=1e-6)
        assert torch.equal(full(copy.deepcopy(norm)), norm)
        # In checkpoints it is a plain tensor, that a default torch.load() reads.
        file = io.BytesIO()
        torch.save({"norm": norm}, file)
        file.seek(0)
        for again in (pickle.loads(pickle.dumps(norm)), torch.load(file, weights_only=True)["norm"]):
            assert type(again) is Tensor
            assert torch.equal(again, norm)
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.ones(2)
        assert not hasattr(clip_grad_norm_(weight, 1.0), "full_tensor")
        assert not hasattr(get_total_norm(weight.grad), "full_tensor")


def test_sparse_and_several_dtypes_in_a_total_norm() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([3.0, 1.0]), (4,), check_invariants=True)
    with distclip.patch():
        assert get_total_norm([sparse, torch.full((1,), 3.0, dtype=torch.bfloat16)]).item() == 5.0


def test_internals_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.utils.clip_grad, "clip_grad_value_", lambda parameters: None)
    with pytest.raises(RuntimeError, match=r"distclip\.patch\(\) does not know torch .*clip_grad_value_"):
        distclip.patch()
    monkeypatch.undo()
    assert not is_distclip()


def check_layout(name: str) -> None:
    """Only the parameters, of a model that distclip has never seen: what scripts hand to torch."""
    layout = LAYOUTS[name]
    model = build(layout)
    before = oracle.whole_grads(model)
    true_norm = oracle.norm(before)
    with distclip.patch():
        norm = clip_grad_norm_(model.parameters(), true_norm / 3)
    assert type(norm) is Tensor
    assert norm.item() == pytest.approx(true_norm, rel=1e-6)
    oracle.assert_same(oracle.whole_grads(model), oracle.clip_by_global_norm(before, true_norm / 3), layout.dtype)


@pytest.mark.parametrize("name", ["ddp", "fsdp1-full_shard-orig", "fsdp1-full_shard-flat", "fsdp2", "fsdp2-ignored"])
def test_under_layouts(name: str) -> None:
    run_ranks(check_layout, 2, name)


@ranks(4)
def test_total_norm_of_dtensors_on_several_meshes() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(0)
    whole = [torch.randn(5, 3), torch.randn(4), torch.randn(2)]
    placed: list[Tensor] = [
        distribute_tensor(whole[0], mesh, [Shard(0), Shard(1)]),
        distribute_tensor(whole[1], mesh["b"], [Replicate()]),
        whole[2],
    ]
    with distclip.patch():
        norm = get_total_norm(placed)
    assert type(norm) is Tensor
    assert norm.item() == pytest.approx(torch.cat([part.flatten().double() for part in whole]).norm().item(), rel=1e-6)
    assert all(not isinstance(part, DTensor) or part.grad is None for part in placed)


SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import clip_grad_norm_
import helper

dist.init_process_group("gloo")
torch.manual_seed(0)
model = FullyShardedDataParallel(torch.nn.Linear(4, 3), device_id=torch.device("cpu"))
model(torch.ones(2, 4)).square().sum().backward()
norm = clip_grad_norm_(model.parameters(), 1.0)
# In one write, which the other rank's cannot come into.
sys.stdout.write(f"{helper.NAME} {__name__} {sys.argv[1:]} {norm.item():.5f}\\n")
del model
dist.barrier()
dist.destroy_process_group()
"""


def patched(*command: str, cwd: Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, *launcher, "-m", "distclip.patched", *command]
    return subprocess.run(start, capture_output=True, text=True, timeout=90, env=environment, cwd=cwd)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("NAME = 'helped'")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_a_script_under_torchrun(script: Path) -> None:
    done = patched("script.py", "--lr", "3", cwd=script, ranks=2)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model(torch.ones(2, 4)).square().sum().backward()
    expected = clip_grad_norm_(model.parameters(), 1.0)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.8 prints there
    assert lines == [f"helped __main__ ['--lr', '3'] {expected:.5f}"] * 2


@pytest.mark.parametrize("start", [["script.py"], ["-m", "script"]])
def test_a_script_or_a_module(start: list[str], tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "script.py").write_text(
        "import sys, torch, helper\n"
        "param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))\n"
        "param.grad = torch.full((2,), 60000.0, dtype=torch.float16)\n"
        "print(sys.argv[1:], torch.nn.utils.clip_grad_norm_(param, 1.0).item())\n"
        "raise SystemExit(3)\n"
    )
    done = patched(*start, "--flag", cwd=tmp_path)
    assert done.stdout == "['--flag'] 84852.8125\n"
    assert done.returncode == 3, done.stderr


SPAWNING = """
import atexit, inspect, multiprocessing, pickle

class Sent:
    text: str = "sent"

def make(_):
    return Sent()

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map_async(make, [0]).get(timeout=60)[0].text, inspect.get_annotations(Sent))
    atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Sent()))).__name__))
"""


@pytest.mark.parametrize("start", [["script.py"], ["-m", "package.module"]])
def test_what_a_script_defines_travels(start: list[str], tmp_path: Path) -> None:
    """Back from a spawned process, and at the very end, as in a script that Python itself runs."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    for name in ("script.py", "package/module.py"):
        (tmp_path / name).write_text(SPAWNING)
    done = patched(*start, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sent {'text': <class 'str'>}\nSent\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "usage:"),
        (("-m",), "usage:"),
        (("no.py",), "distclip.patched: there is no file 'no.py'"),
        (("-m", "no.module"), "distclip.patched: there is no module 'no.module' that can be run"),
    ],
)
def test_mistakes_of_the_command(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = patched(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(told)
    assert "Traceback" not in done.stderr
