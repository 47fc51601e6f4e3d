"""torchtitan's clip_grad_norm_ replaced, and launch/titan.py: against one process with the whole model in float64."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from distclip.integrations.torchtitan import clip_grad_norm_
from tests import oracle
from tests.ranks import ranks
from tests.test_pipeline import batch, loss_of, make_layers, stage_of, whole_model

TITAN = Path(__file__).parent.parent / "launch" / "titan.py"
STAGES = [[0, 1], [2, 3]]
Clip = Callable[..., Tensor]


def real() -> Clip:
    """torchtitan's own function."""
    from torchtitan.distributed.utils import clip_grad_norm_ as theirs

    found: Clip = theirs
    return found


needs_torchtitan = pytest.mark.skipif(
    find_spec("torchtitan") is None or find_spec("spmd_types") is None, reason="torchtitan is not installed"
)
EACH = [pytest.param(False, id="distclip"), pytest.param(True, id="torchtitan", marks=needs_torchtitan)]


def fsdp2_stage(mesh: DeviceMesh) -> nn.Module:
    """This rank's stage of the pipeline, FSDP2 along the other axis, with the gradients of the whole batch."""
    place = mesh.get_local_rank("pp")
    stage = nn.Sequential(*(make_layers()[layer] for layer in STAGES[place]))
    for layer in stage:
        fully_shard(layer, mesh=mesh["fsdp"])
    for param, source in zip(stage.parameters(), stage_of(STAGES, place).parameters(), strict=True):
        assert source.grad is not None
        param.grad = distribute_tensor(source.grad, mesh["fsdp"], [Shard(0)])
    return stage


def check(clip: Clip, parts: list[nn.Module], truth: oracle.Whole, p: float = 2.0, **options: object) -> None:
    """As torchtitan's trainer calls it: the norm on this rank and its parts' clipped gradients."""
    norm = oracle.norm(truth, p)
    before = oracle.whole_grads(nn.ModuleList(parts))
    returned = clip([param for part in parts for param in part.parameters()], norm / 3, p, foreach=True, **options)
    assert type(returned) is Tensor
    assert returned.item() == pytest.approx(norm, rel=1e-5)
    wanted = {name: grad * (norm / 3 / (norm + 1e-6)) for name, grad in before.items()}
    for name, grad in oracle.whole_grads(nn.ModuleList(parts)).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-9)


@ranks(2, 4)
@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("theirs", EACH)
def test_pipeline_and_fsdp2(theirs: bool, p: float, world_size: int) -> None:
    """On the ground where torchtitan is right, both give the same."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("pp", "fsdp"))
    clip = real() if theirs else clip_grad_norm_
    check(clip, [fsdp2_stage(mesh)], whole_model(), p, pp_mesh=mesh["pp"])


@ranks(2)
@pytest.mark.parametrize("theirs", EACH)
def test_without_a_pipeline(theirs: bool) -> None:
    model = nn.Sequential(*make_layers())
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    tokens, targets = (part.chunk(2)[dist.get_rank()] for part in batch())
    loss_of(model(tokens), targets).backward()
    check(real() if theirs else clip_grad_norm_, [model], whole_model())


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 4)
        self.experts = nn.Parameter(torch.zeros(4, 3, 2))


@ranks(4)
@pytest.mark.parametrize("theirs", EACH)
def test_experts_on_meshes_of_their_own(theirs: bool) -> None:
    """Dense parameters along (fsdp,), experts along (ep, efsdp), as torchtitan lays them out."""
    dense = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    sparse = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "efsdp"))
    torch.manual_seed(0)
    whole = Dense()
    for param in whole.parameters():
        param.grad = torch.randn_like(param)
    part = Dense()
    for name, param in whole.named_parameters():
        mesh, placements = (sparse, [Shard(0), Shard(1)]) if name == "experts" else (dense, [Shard(0)])
        shard = nn.Parameter(distribute_tensor(param.detach(), mesh, placements))
        assert param.grad is not None
        shard.grad = distribute_tensor(param.grad, mesh, placements)
        owner = part.dense if "." in name else part
        setattr(owner, name.rpartition(".")[2], shard)
    check(real() if theirs else clip_grad_norm_, [part], oracle.whole_grads(whole), ep_enabled=True)


@ranks(2)
def test_an_embedding_tied_over_stages() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "fsdp"))
    place = mesh.get_local_rank("pp")
    everything = nn.Sequential(*make_layers(tied=True))
    loss_of(everything(batch()[0]), batch()[1]).backward()
    stage = nn.ModuleList(everything[layer] for layer in STAGES[place])
    tied = stage.get_parameter("0.embed.weight" if place == 0 else "1.head.weight")
    dist.all_reduce(tied.grad)
    distclip.declare(tied, replicated=mesh["pp"])
    check(clip_grad_norm_, [stage], whole_model(tied=True), pp_mesh=mesh["pp"])


@ranks(2)
def test_plain_experts() -> None:
    torch.manual_seed(0)
    dense, experts = nn.Linear(3, 3), nn.Linear(3, 3)
    torch.manual_seed(1)
    grads = {
        f"{rank}.{name}": torch.randn_like(param) for rank in range(2) for name, param in experts.named_parameters()
    }
    grads |= {name: torch.randn_like(param) for name, param in dense.named_parameters()}
    for name, param in dense.named_parameters():
        param.grad = grads[name].clone()
    for name, param in experts.named_parameters():
        param.grad = grads[f"{dist.get_rank()}.{name}"].clone()
    distclip.declare(experts, sharded=dist.group.WORLD)
    truth = {name: grad.double().numpy() for name, grad in grads.items()}
    check(clip_grad_norm_, [dense, experts], truth, ep_enabled=True)


@ranks(2)
def test_float16_gradients_whose_norm_is_not() -> None:
    """Finite gradients, the norm above 65504: they are scaled, not made 0."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    weight = nn.Parameter(torch.zeros(50, dtype=torch.float16))
    weight.grad = torch.full_like(weight, 4e4)
    norm = clip_grad_norm_([weight], 100.0, pp_mesh=mesh["pp"])
    assert norm.item() == pytest.approx(float(torch.tensor(4e4).half()) * 10, rel=1e-6)
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 10.0))


@ranks(2)
def test_an_inf_on_one_stage_is_everybodys() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    stage = nn.Linear(3, 3)
    for param in stage.parameters():
        param.grad = torch.full_like(param, math.inf if dist.get_rank() else 1.0)
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(stage.parameters(), 1.0, error_if_nonfinite=True, pp_mesh=mesh["pp"])
    for param in stage.parameters():
        torch.testing.assert_close(param.grad, torch.full_like(param, math.inf if dist.get_rank() else 1.0))


def test_one_process_and_mistakes() -> None:
    stage = nn.Linear(2, 2)
    stage.weight.grad = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert clip_grad_norm_(stage.weight, 1.0).item() == 5.0
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm_(stage.parameters(), -1.0)


@needs_torchtitan
def test_the_signature_is_theirs() -> None:
    ours, theirs = (inspect.signature(clip).parameters.values() for clip in (clip_grad_norm_, real()))
    assert [(one.name, one.default, one.kind) for one in ours] == [(one.name, one.default, one.kind) for one in theirs]


def train(*arguments: str, ranks: int) -> list[tuple[float, ...]]:
    """Step, loss, norm and coefficient of each step that launch/titan.py makes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(TITAN), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^step (\d+): loss (\S+), norm (\S+), times (\S+)$", done.stdout, re.MULTILINE)
    return [tuple(map(float, step)) for step in told]


@pytest.mark.slow
def test_the_trainer_resumes_on_any_number_of_ranks(tmp_path: Path) -> None:
    """A rule whose memory goes through the checkpoint: to the bit on the same ranks, to rounding on others."""
    rule = ("--distclip-rule", "autoclip=10")
    whole = train(*rule, "--steps", "8", ranks=1)
    assert len({coefficient for *_, coefficient in whole[4:]}) > 2
    staged = ("--pp", "2", *rule, "--checkpoint", str(tmp_path))
    first = train(*staged, "--steps", "5", ranks=4)
    rest = train(*rule, "--steps", "8", "--checkpoint", str(tmp_path), ranks=2)
    assert [step for step, *_ in first + rest] == list(range(1, 9))
    for got, wanted in zip(first + rest, whole, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_the_trainer_resumes_to_the_bit(tmp_path: Path) -> None:
    rule = ("--distclip-rule", "autoclip=10", "--pp", "2")
    whole = train(*rule, "--steps", "8", ranks=4)
    assert len({coefficient for *_, coefficient in whole}) > 2
    saved = ("--checkpoint", str(tmp_path))
    assert train(*rule, *saved, "--steps", "5", ranks=4) + train(*rule, *saved, "--steps", "8", ranks=4) == whole


def test_a_pipeline_that_ranks_cannot_make() -> None:
    command = [sys.executable, str(TITAN), "--pp", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2
    assert "--pp 2: 1 ranks cannot be divided into so many stages" in done.stderr
