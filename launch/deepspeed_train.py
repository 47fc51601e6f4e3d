"""DeepSpeed with one of launch/deepspeed/*.json, clipped by distclip: a short script to copy from.

    SCRIPT=launch/deepspeed_train.py NPROC=2 launch/deepspeed.sh --config launch/deepspeed/zero2.json
    SCRIPT=launch/deepspeed_train.py NPROC=2 launch/torchrun.sh --config launch/deepspeed/zero3.json

The configurations have `gradient_clipping` 0.0: what the clipper says holds inside engine.step().
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    import distclip

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
except ModuleNotFoundError as missing:
    sys.exit(f"launch/deepspeed_train.py needs {missing.name}: pip install 'distclip[deepspeed]'")


def parse() -> argparse.Namespace:
    """The command line; `--distclip-rule` and its like are distclip's own."""
    parser = argparse.ArgumentParser(description="Train a small model under DeepSpeed with clipped gradients.")
    parser.add_argument("--config", required=True, metavar="FILE", help="a configuration of DeepSpeed")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--local_rank", type=int, help="DeepSpeed's launcher says it; LOCAL_RANK says the same")
    distclip.ClipConfig.add_arguments(parser)
    return parser.parse_args()


def make_model() -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def examples(step: int, micro: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a micro-batch: inputs [count, 16] and targets [count, 1], as `like` in dtype and device."""
    generator = torch.Generator().manual_seed(dist.get_rank() + 1000 * (micro + 100 * step))
    inputs = torch.randn(count, 16, generator=generator)
    return inputs.to(like), inputs.square().mean(1, keepdim=True).to(like)


def main() -> None:
    """Train; rank 0 tells of every step."""
    arguments = parse()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # Its collectives through shared memory want a compiler, and a minute, at the first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=arguments.config)
    clipper = distclip.ClipConfig.load(arguments=arguments).clipper(engine)
    for step in range(1, arguments.steps + 1):
        for micro in range(engine.gradient_accumulation_steps()):
            like = next(engine.parameters())
            inputs, targets = examples(step, micro, engine.train_micro_batch_size_per_gpu(), like)
            loss = nn.functional.mse_loss(engine(inputs).float(), targets.float())
            engine.backward(loss)
            engine.step()  # the last micro-batch's clips
        assert clipper.report is not None
        report = clipper.report.to_dict()
        if dist.get_rank() == 0:
            skipped = ", skipped" if report["skipped"] else ""
            norms = f"norm {report['total_norm']:.6f}, times {report['coefficient']:.6f}"
            print(f"step {step}: loss {loss.item():.6f}, {norms}{skipped}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
