"""LoRA: most parameters frozen, the trained ones small; adapters of peft, and written by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ClipByNorm, GradClipper
from tests import oracle
from tests.nets import Block, loss_of, make_batch, make_net
from tests.ranks import run_ranks


class Lora(nn.Module):
    """A frozen linear and the product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.lora_B(self.lora_A(x))
        return out


def by_hand() -> nn.Module:
    net = make_net().requires_grad_(False)
    torch.manual_seed(0)
    for block in net.blocks:
        assert isinstance(block, Block)
        block.up, block.down = Lora(block.up), Lora(block.down)  # type: ignore[assignment]
    return net


def by_peft() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(make_net(), config(["up", "down"]))


def config(targets: list[str]) -> LoraConfig:
    # Adapters begin as zero by default, and half of the gradients with them.
    return LoraConfig(target_modules=targets, r=2, init_lora_weights=False)


MODELS = {"by hand": by_hand, "peft": by_peft}


def blocks_of(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Each block below its parent, under its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Block)
    ]


def fsdp1_orig(model: nn.Module) -> nn.Module:
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    for parent, name, block in blocks_of(model):
        setattr(parent, name, FullyShardedDataParallel(block, **options))
    return FullyShardedDataParallel(model, **options)


def fsdp1_flat(model: nn.Module) -> nn.Module:
    """One flat parameter cannot hold frozen and trained tensors: each adapter is a unit of its own."""

    def trained(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.weight.requires_grad

    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    for parent, name, child in found:
        if trained(child):
            setattr(parent, name, FullyShardedDataParallel(child, device_id=torch.device("cpu")))
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2(model: nn.Module, replicas: int = 1) -> nn.Module:
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replicate", "shard"))
    data = mesh if replicas > 1 else mesh["shard"]
    for _, _, block in blocks_of(model):
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    return model


def hsdp(model: nn.Module) -> nn.Module:
    return fsdp2(model, replicas=2)


def single(model: nn.Module) -> nn.Module:
    return model


WRAPS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    "single": (single, 1),
    "ddp": (DistributedDataParallel, 2),
    "fsdp1-orig": (fsdp1_orig, 2),
    "fsdp1-flat": (fsdp1_flat, 2),
    "fsdp2": (fsdp2, 2),
    "hsdp": (hsdp, 4),
}


def backward(model: nn.Module) -> None:
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    tokens, targets = make_batch()
    loss_of(model, (tokens[mine], targets[mine])).backward()


def check_clips(model: nn.Module) -> set[str]:
    """By the function and by the object, by the norm of all tensors and of each; the names of those clipped."""
    model.zero_grad()
    backward(model)
    before = oracle.whole_grads(model)
    true_norm = oracle.norm(before)
    assert distclip.clip_grad_norm_(model, true_norm / 2).item() == pytest.approx(true_norm, rel=1e-6)
    after = oracle.whole_grads(model)
    oracle.assert_same(after, oracle.clip_by_global_norm(before, true_norm / 2))
    # What scripts hand to the optimizer.
    trained = [param for param in model.parameters() if param.requires_grad]
    assert distclip.grad_norm(trained).item() == pytest.approx(true_norm / 2, rel=1e-5)
    report = GradClipper(model, ClipByNorm(true_norm / 8)).clip().to_dict()
    oracle.assert_same(oracle.whole_grads(model), oracle.clip_by_norm(after, true_norm / 8))
    clipped = {name for name, norm in report["per_tensor"].items() if norm > 0}
    assert clipped == {name for name, grad in before.items() if grad.any()}
    return clipped


def check_lora(model: str, wrap: str) -> None:
    clipped = check_clips(WRAPS[wrap][0](MODELS[model]()))
    assert len(clipped) == 8
    assert all("lora_" in name for name in clipped)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("model", MODELS)
def test_lora(model: str, wrap: str) -> None:
    run_ranks(check_lora, WRAPS[wrap][1], model, wrap)


def check_adapters(wrap: str) -> None:
    """One clipper over a model whose trained adapter is switched, and whose parameters are merged away."""
    torch.manual_seed(0)
    model = get_peft_model(make_net(), config(["up", "down"]))
    assert isinstance(model, PeftModel)
    model.add_adapter("other", config(["up"]))
    wrapped = WRAPS[wrap][0](model)
    clipper = GradClipper(wrapped, 0.1)
    for adapter, count in (("default", 8), ("other", 4), ("default", 8)):
        model.set_adapter(adapter)
        wrapped.zero_grad()
        backward(wrapped)
        before = oracle.whole_grads(wrapped)
        assert len([name for name in before if adapter in name]) == count
        assert clipper.clip().total_norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
        oracle.assert_same(oracle.whole_grads(wrapped), oracle.clip_by_global_norm(before, 0.1))


# DDP and FSDP1 fix what is trained when they wrap.
@pytest.mark.parametrize("wrap", ["single", "fsdp2"])
def test_switched_adapters(wrap: str) -> None:
    run_ranks(check_adapters, WRAPS[wrap][1], wrap)


def check_merged() -> None:
    model: Any = by_peft()
    clipper = GradClipper(model, 0.1)
    check_clips(model)
    merged = model.merge_and_unload().requires_grad_()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    check_clips(merged)
    # The clipper of the model around it finds the parameters that took the adapters' place.
    merged.zero_grad()
    backward(merged)
    true_norm = oracle.norm(oracle.whole_grads(merged))
    assert clipper.clip().total_norm.item() == pytest.approx(true_norm, rel=1e-6)
    # And once more, wrapped anew.
    check_clips(fsdp2(merged))


def test_merge_and_unload() -> None:
    run_ranks(check_merged, 2)


def check_in_backward(wrap: str) -> None:
    model = WRAPS[wrap][0](by_peft())
    clipper = GradClipper(model, ClipByNorm(0.05))
    clipper.clip_in_backward()
    backward(model)
    norms = {name: oracle.norm({name: grad}) for name, grad in oracle.whole_grads(model).items()}
    assert len(norms) == 8
    assert norms == pytest.approx(dict.fromkeys(norms, 0.05), rel=1e-5)


@pytest.mark.parametrize("wrap", ["single", "fsdp2"])
def test_in_backward(wrap: str) -> None:
    run_ranks(check_in_backward, WRAPS[wrap][1], wrap)
