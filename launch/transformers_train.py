"""Train a small Llama with the Trainer of Transformers, clipped by any rule of distclip. Copy from here.

All that distclip asks for is `install`. On one process, or on many (DDP on the CPU or on GPUs):

    python launch/transformers_train.py --rule zclip
    torchrun --nproc-per-node 2 launch/transformers_train.py --rule "skip_on_spike | norm=1"
"""

import argparse
import sys
from pathlib import Path

import torch

try:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    import data
    from distclip.integrations.transformers import install
except ModuleNotFoundError as missing:
    name = (missing.name or "").partition(".")[0]
    sys.exit(f"launch/transformers_train.py needs {name}: pip install 'distclip[train,transformers]'")


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """With random weights: nothing is downloaded."""
    # No token stands for the begin or the end of a text.
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train for some steps; the Trainer prints what it logs."""
    parser = argparse.ArgumentParser(description="Train a small Llama with the Trainer, clipped by distclip.")
    parser.add_argument("--rule", default="zclip", help="see print(distclip.rules.catalogue()); default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"), metavar="DIR", help="for checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out DIR")
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=max(1, options.steps // 2),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    text = data.load("text", None)
    windows, _ = text.draw(1024, torch.Generator().manual_seed(0))
    trainer = Trainer(
        model=make_model(text.classes),
        args=arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
    )
    install(trainer, options.rule)  # this line is distclip's
    trainer.train(resume_from_checkpoint=options.resume)
    # A process group that is still there when Python ends can take the process down.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
