"""For ``launch/strangers.py``: the tests that Transformers has for all its models, of a small Llama.

They are mixins, and its source distribution has them without the models' own test files.
"""

import unittest
from importlib import import_module
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Transformers' own "tests", where this file is run, and not distclip's.
FSDP: Any = import_module("tests.test_fsdp_mixin").FSDPTesterMixin
TRAINING: Any = import_module("tests.test_training_mixin").TrainingTesterMixin


class Tiny:
    """As large as those of Transformers' own tests."""

    is_training = True
    causal_lm_class = LlamaForCausalLM

    def get_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {"input_ids": torch.ones(2, 7, dtype=torch.long)}


class LlamaTest(TRAINING, FSDP, unittest.TestCase):  # type: ignore[misc]  # classes that nobody has typed
    """Its tests are inherited."""

    model_tester = Tiny()
