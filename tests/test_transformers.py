"""distclip in the Trainer of Transformers: every step against one float64 process, checkpoints, logs and mistakes."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distclip import ClipByValue, ClipConfig, Rule
from distclip.integrations.transformers import FILE, NEEDED, install
from distclip.rules import parse
from tests import oracle
from tests.losses import SEEN, LossSeen
from tests.ranks import ranks, run_ranks
from tests.test_launch import start

pytest.importorskip("transformers", reason="Transformers is not installed")
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

pytestmark = [
    # DeepSpeed, which Accelerate loads where it is installed, and torch's checkpoints of one process.
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*_all_gather_base:FutureWarning"),
]
METRICS = {"grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold", "clipped", "skipped", "nonfinite"}


def make_model() -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=32))


def sharded_model(folder: Path) -> Any:
    """Under Transformers' own FSDP2."""
    from transformers.distributed.configuration_utils import DistributedConfig

    if dist.get_rank() == 0:
        make_model().save_pretrained(folder / "model")
    dist.barrier()
    return LlamaForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
    )


def data() -> list[dict[str, Tensor]]:
    texts = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": text, "labels": text} for text in texts]


def make_trainer(folder: Path, model: Any = None, kind: type = Trainer, **arguments: Any) -> Any:
    """Steps on eight texts, all ranks and micro-batches together."""
    # Accelerate asks DeepSpeed, which would look for a GPU and tell that it found none.
    os.environ["DS_ACCELERATOR"] = "cpu"
    parts = dist.get_world_size() * arguments.get("gradient_accumulation_steps", 1)
    usual: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 8 // parts,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments_of = Seq2SeqTrainingArguments if kind is Seq2SeqTrainer else TrainingArguments
    args = arguments_of(output_dir=str(folder), **(usual | arguments))
    return kind(model=model or make_model(), args=args, train_dataset=data())


def logged(trainer: Any) -> list[dict[str, float]]:
    """What the trainer has logged of each step."""
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def watch(trainer: Any) -> list[tuple[oracle.Whole, oracle.Whole]]:
    """Fills with all gradients of each step, before and after clipping."""
    steps: list[tuple[oracle.Whole, oracle.Whole]] = []
    clip = trainer._get_grad_norm

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            steps[-1] = (steps[-1][0], oracle.whole_grads(trainer.model))

    def watched(model: Any, grad_norm: Any = None) -> Any:
        steps.append((oracle.whole_grads(trainer.model), {}))
        return clip(model, grad_norm)

    trainer._get_grad_norm = watched
    trainer.add_callback(Watch())
    return steps


def expected(rule: Rule, before: oracle.Whole) -> oracle.Whole:
    if isinstance(rule, ClipByValue):
        return oracle.clip_by_value(before, -0.01, 0.02)
    clip = oracle.clip_by_norm if str(rule).startswith("norm") else oracle.clip_by_global_norm
    return clip(before, 0.1)


def check_steps(trainer: Any, rule: str) -> None:
    """Train; every step's norm, gradients and log must be those of one process on the same gradients."""
    handle = install(trainer, rule)
    steps = watch(trainer)
    trainer.train()
    assert handle.clipper is not None
    assert len(steps) == handle.clipper.steps == 4
    for (before, after), entry in zip(steps, logged(trainer), strict=True):
        oracle.assert_same(after, expected(parse(rule), before))
        assert entry["grad_norm"] == pytest.approx(oracle.norm(before), rel=1e-6)
        assert entry["clipped"] == 1
        unknown = {"grad_norm_clipped", "clip_threshold"} if rule.startswith("value") else set()
        assert METRICS - unknown <= entry.keys()
        if rule.startswith("global"):
            assert entry["grad_norm_clipped"] == pytest.approx(0.1, rel=1e-4)
            assert entry["clip_coef"] == pytest.approx(0.1 / oracle.norm(before), rel=1e-4)


# Each rank's start costs more than its training: so, several runs in one.
@ranks(1, 2)
def test_every_gradient_is_that_of_one_process(tmp_path: Path) -> None:
    """With max_grad_norm=0 the trainer comes by in one method only, before which the gradients can be looked at."""
    for rule in ("global_norm=0.1", "norm=0.1", "value=-0.01:0.02"):
        for accumulate in (1, 2):
            check_steps(make_trainer(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=0), rule)


@ranks(2)
def test_fsdp2_of_transformers(tmp_path: Path) -> None:
    for rule in ("global_norm=0.1", "norm=0.1", "value=-0.01:0.02"):
        check_steps(make_trainer(tmp_path, sharded_model(tmp_path), max_grad_norm=0), rule)


def history(folder: Path, layout: str = "ddp", rule: str | None = "global_norm=0.5", **arguments: Any) -> Any:
    """What a training logs: the loss and the norm of each step."""
    model = sharded_model(folder) if layout == "fsdp2" else make_model()
    trainer = make_trainer(folder, model, optim="adamw_torch_fused", learning_rate=0.01, **arguments)
    if rule is not None:
        install(trainer, rule)
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in logged(trainer)]


def check_same_training(folder: Path) -> Any:
    """Of torch, by the trainer itself, and of distclip, whose coefficient is folded into the fused step."""
    ours = history(folder)
    assert all(norm > 0.5 for _, norm in ours)
    close = pytest.approx(np.array(history(folder, rule=None, max_grad_norm=0.5)), rel=1e-5)
    assert np.array(ours) == close
    assert np.array(history(folder, rule=None, max_grad_norm=0)) != close
    return ours


def test_training_is_that_of_the_trainer_itself(tmp_path: Path) -> None:
    """On one rank and on two alike; under FSDP2 as well."""
    (alone,) = run_ranks(check_same_training, 1, tmp_path / "alone")
    for both in run_ranks(check_same_training, 2, tmp_path / "ddp"):
        assert np.array(both) == pytest.approx(np.array(alone), rel=1e-5)
    for both in run_ranks(history, 2, tmp_path, "fsdp2"):
        assert np.array(both) == pytest.approx(np.array(alone), rel=1e-5)


def resumable(folder: Path, stop: int, resume: bool, **arguments: Any) -> tuple[Any, Any]:
    """Losses and norms of this part of a run of six steps, and what its rule remembers at the end."""
    trainer = make_trainer(folder, max_steps=6, save_strategy="steps", save_steps=3, **arguments)
    handle = install(trainer, "zclip,warmup_steps=2,alpha=0.5")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == stop

    trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    assert handle.clipper is not None
    assert handle.clipper.steps == stop
    return [(entry["loss"], entry["grad_norm"]) for entry in logged(trainer)], handle.clipper.state_dict()


@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_goes_on_to_the_bit(size: int, tmp_path: Path) -> None:
    """Checkpoints hold the rule's memory; of two ranks one alone can go on."""
    whole, state = run_ranks(resumable, size, tmp_path / "whole", 6, False)[0]
    first, after_3 = run_ranks(resumable, size, tmp_path / "parts", 3, False)[0]
    assert torch.load(tmp_path / "parts" / "checkpoint-3" / FILE) == after_3 != state
    assert first == whole[:3]
    assert run_ranks(resumable, size, tmp_path / "parts", 6, True)[0] == (whole, state)
    if size == 2:
        steps, state_alone = run_ranks(resumable, 1, tmp_path / "parts", 6, True)[0]
        assert np.array(steps) == pytest.approx(np.array(whole), rel=1e-5)
        assert state_alone["steps"] == 6
        assert state_alone["rule_state"] == pytest.approx(state["rule_state"], rel=1e-5)


def parameters(trainer: Any) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def unchanged(trainer: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], param) for name, param in parameters(trainer).items())


@ranks(1)
def test_skipped_steps_change_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optim="adamw_torch", weight_decay=0.1)
    before = parameters(trainer)
    install(trainer, "skip_above=0")
    trainer.train()
    assert [entry["skipped"] for entry in logged(trainer)] == [1.0] * 4
    assert unchanged(trainer, before)


class Scaled(Trainer):
    """With the scaler of fp16=True, which Accelerate refuses on a CPU, but in float32."""

    scale = 1024.0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)


class Overflowing(Scaled):
    scale = 2.0**127


@ranks(1, 2)
def test_the_loss_scale_is_taken_off(tmp_path: Path) -> None:
    """In place and folded; a step that overflows is left out, and its scale halved."""
    for optim in ("sgd", "adamw_torch_fused"):
        plain = make_trainer(tmp_path, optim=optim, learning_rate=0.01)
        scaled = make_trainer(tmp_path, kind=Scaled, optim=optim, learning_rate=0.01)
        for trainer in (plain, scaled):
            install(trainer, "global_norm=0.1")
            trainer.train()
        norms, want = ([entry["grad_norm"] for entry in logged(trainer)] for trainer in (scaled, plain))
        assert norms == pytest.approx(want, rel=1e-5)
        for name, param in parameters(scaled).items():
            torch.testing.assert_close(param, parameters(plain)[name], rtol=1e-4, atol=1e-6)
    trainer = make_trainer(tmp_path, kind=Overflowing, max_steps=1)
    before = parameters(trainer)
    install(trainer, "global_norm=0.1")
    trainer.train()
    assert [(entry["nonfinite"], entry["skipped"]) for entry in logged(trainer)] == [(1, 1)]
    assert trainer.accelerator.scaler.get_scale() == 2.0**126
    assert unchanged(trainer, before)


@ranks(2)
def test_all_ranks_hear_of_one_that_overflows(tmp_path: Path) -> None:
    """An inf in one rank's shard, in the second step."""
    trainer = make_trainer(tmp_path, sharded_model(tmp_path), kind=Scaled, max_grad_norm=0)
    handle = install(trainer, "global_norm=0.1")
    clip = trainer._get_grad_norm

    def plant(model: Any, grad_norm: Any = None) -> Any:
        if trainer.state.global_step == 1 and dist.get_rank() == 1:
            next(model.parameters()).grad.to_local().view(-1)[0] = torch.inf
        return clip(model, grad_norm)

    trainer._get_grad_norm = plant
    trainer.train()
    assert handle.clipper is not None
    assert [entry["skipped"] for entry in logged(trainer)] == [0, 1, 0, 0]
    assert trainer.accelerator.scaler.get_scale() == 512.0


@pytest.mark.gpu
@ranks(1)
def test_fp16_on_a_gpu(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, use_cpu=False, fp16=True, max_steps=8)
    install(trainer, "global_norm=0.1")
    trainer.train()
    stepped = [entry for entry in logged(trainer) if not entry["skipped"]]
    assert stepped
    assert all(entry["grad_norm_clipped"] <= 0.1001 for entry in stepped)


@ranks(1, 2)
def test_rules_see_the_loss(tmp_path: Path) -> None:
    """The mean over micro-batches and ranks, as it is logged."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    install(trainer, LossSeen())
    trainer.train()
    assert pytest.approx([entry["loss"] for entry in logged(trainer)], rel=1e-5) == SEEN


@ranks(1)
def test_subclasses_and_how_the_log_is_written(tmp_path: Path) -> None:
    config = ClipConfig(rule=0.1, log_every=2, log_prefix="train/clip/")
    trainer = make_trainer(tmp_path, kind=Seq2SeqTrainer)
    install(trainer, config)
    trainer.train()
    with_metrics = [{f"clip/{name}" for name in METRICS} <= entry.keys() for entry in logged(trainer)]
    assert with_metrics == [False, True, False, True]
    assert all(entry["grad_norm"] > 0.1 for entry in logged(trainer))


@ranks(1)
def test_deepspeed(tmp_path: Path) -> None:
    """ZeRO on one rank, clipped inside engine.step()."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }
    runs = []
    for deepspeed_settings in (None, settings):
        trainer = make_trainer(tmp_path, deepspeed=deepspeed_settings, optim="adamw_torch")
        handle = install(trainer, "global_norm=0.1")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="gradient_clipping=1.0 in DeepSpeed")
            trainer.train()
        assert handle.clipper is not None
        assert handle.clipper.steps == 4
        runs.append([[entry[name] for name in ("loss", "grad_norm", "clip_coef")] for entry in logged(trainer)])
    assert np.array(runs[1]) == pytest.approx(np.array(runs[0]), rel=1e-4)


@ranks(1)
def test_remove_gives_the_trainer_its_own_clipping_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    own = vars(trainer).keys() - {"callback_handler"}
    handle = install(trainer, 1e-3)
    with pytest.raises(RuntimeError, match="installed on this trainer already"):
        install(trainer)
    handle.remove()
    assert vars(trainer).keys() - {"callback_handler"} == own
    trainer.train()
    assert "clip_coef" not in logged(trainer)[0]
    assert handle.clipper is None


class OwnLoop(Trainer):
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.callback_handler.on_step_end(self.args, self.state, self.control)


@ranks(1)
def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer, got Linear"):
        install(torch.nn.Linear(2, 2))  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ValueError, match="did you mean 'zclip'"):
        install(make_trainer(tmp_path), "zclop")
    with pytest.warns(UserWarning, match=r"max_grad_norm=0\.3 of the training arguments is off: ZClip"):
        install(make_trainer(tmp_path, max_grad_norm=0.3), "zclip")
    trainer = make_trainer(tmp_path, kind=OwnLoop)
    install(trainer)
    with pytest.raises(RuntimeError, match=r"OwnLoop has made a step without .* its training loop is its own"):
        trainer.train()
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    install(trainer, "zclip")
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    trainer = make_trainer(tmp_path, max_steps=2)
    install(trainer, 1.0)
    with pytest.raises(ValueError, match=rf"{FILE}: state_dict is of rule ZClip.*Delete this file"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / FILE).unlink()
    with pytest.warns(UserWarning, match=rf"has no {FILE}: the rule begins without memory"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@ranks(1)
def test_other_trainers_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert all(hasattr(trainer, name) for name in NEEDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # not installed
        with pytest.raises(ImportError, match=r"pip install 'distclip\[transformers\]'"):
            install(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Trainer, "_get_grad_norm")
        with pytest.raises(RuntimeError, match=r"Trainer lacks _get_grad_norm\. Install transformers=="):
            install(trainer)
    with pytest.MonkeyPatch.context() as patch:
        xla = type(trainer.accelerator.distributed_type).XLA
        patch.setattr(type(trainer.accelerator), "distributed_type", xla)
        with pytest.raises(NotImplementedError, match="under XLA"):
            install(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_the_example(size: int, tmp_path: Path) -> None:
    done = start("--steps", "4", "--out", str(tmp_path), ranks=size, script="transformers_train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("clip_coef") == 4
