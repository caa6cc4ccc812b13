# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The tests that Transformers runs on every model of its own, run on VW-LMM and on LLaVA with the same sizes and inputs.

LLaVA is the yardstick: what passes on it must pass on VW-LMM. conftest.py compares. `suite` says what is not run.
"""

import unittest
from unittest.mock import patch

import suite  # noqa: F401  (makes `transformers_tests` importable)
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration, VWLMMModel


# The tests look up here which classes take labels, and find Transformers' own alone.
MODEL_MAPPING_NAMES["vwlmm"] = "VWLMMModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["vwlmm"] = "VWLMMForConditionalGeneration"


class ModelTester:
    """What the tests ask for: a tiny configuration, inputs for it, and its sizes by their expected names."""

    is_training = True
    batch_size = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    image_size, patch_size = 8, 2
    num_image_tokens = (image_size // patch_size) ** 2
    seq_length = encoder_seq_length = num_image_tokens + 7
    pad_token_id = 1

    def __init__(self, config_class: type, vocab_size: int = 99, image_token_index: int = 0, **config):
        self.config_class = config_class
        self.config = config
        self.vocab_size = vocab_size
        self.image_token_index = image_token_index
        sizes = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
        }
        self.text_config = sizes | {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "max_position_embeddings": 512,
            "pad_token_id": self.pad_token_id,
        }
        self.vision_config = sizes | {
            "model_type": "clip_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "projection_dim": 32,
        }

    def get_config(self):
        return self.config_class(
            text_config=self.text_config,
            vision_config=self.vision_config,
            image_token_index=self.image_token_index,
            image_seq_length=self.num_image_tokens,
            vision_feature_layer=-1,
            **self.config,
        )

    def prepare_config_and_inputs_for_common(self):
        """Each row is an image and seven tokens of text, none of them padding."""
        text = ids_tensor([self.batch_size, self.seq_length - self.num_image_tokens], self.vocab_size - 2) + 2
        image = torch.full((self.batch_size, self.num_image_tokens), self.image_token_index, device=torch_device)
        input_ids = torch.cat([image, text], dim=1)  # [B, L]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
        }
        return self.get_config(), inputs


class TextTester(ModelTester):
    """For the tests that train on text alone, with token ids drawn from the whole of `config.vocab_size`."""

    pad_token_id = 0  # `generate` takes a prompt of padding for no prompt, and these begin with 1

    def __init__(self, config_class: type, causal_lm_class: type):
        super().__init__(config_class, vocab_size=256, image_token_index=256)
        self.causal_lm_class = causal_lm_class

    def get_config(self):
        config = super().get_config()
        config.vocab_size = self.vocab_size
        return config


class CommonTests(ModelTesterMixin, GenerationTesterMixin):
    _is_composite = True  # several models in one, each with its own attention
    # Nothing reads the last norm of LLaVA's vision tower, and the language loss reads no VM head.
    test_all_params_have_gradient = False
    config_class = None

    def setUp(self):
        self.model_tester = ModelTester(self.config_class)

    def test_config(self):
        properties = ["image_token_index", "vision_feature_layer", "image_seq_length"]
        tester = ConfigTester(self, self.config_class, has_text_modality=False, common_properties=properties)
        tester.run_common_tests()


class TextTests(TrainingTesterMixin, FSDPTesterMixin):
    model_tester = None  # abstract in the mixins
    config_class = causal_lm_class = None

    def setUp(self):
        self.model_tester = TextTester(self.config_class, self.causal_lm_class)


class TestLlava(CommonTests, unittest.TestCase):
    config_class = LlavaConfig
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)


class TestVWLMM(CommonTests, unittest.TestCase):
    config_class = VWLMMConfig
    all_model_classes = (VWLMMModel, VWLMMForConditionalGeneration)

    def test_can_init_all_missing_weights(self):
        # Below a model from outside its own package, Transformers passes over modules without weights of their own,
        # and so over CLIP's rules for its MLPs. That is its way with any such model, LLaVA's own code included.
        with patch.object(PreTrainedModel, "is_custom_code", return_value=False):
            super().test_can_init_all_missing_weights()


class TestVWLMMWithPseudoImageFeatures(TestVWLMM):
    def setUp(self):
        self.model_tester = ModelTester(self.config_class, use_pseudo_image_features=True)


class TestLlavaOnText(TextTests, unittest.TestCase):
    config_class, causal_lm_class = LlavaConfig, LlavaForConditionalGeneration


class TestVWLMMOnText(TextTests, unittest.TestCase):
    config_class, causal_lm_class = VWLMMConfig, VWLMMForConditionalGeneration
