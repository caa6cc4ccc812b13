# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The model: the authors' numbers, the two visual losses and where their gradients go, fresh models."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, make_conversation, make_image, tiny_text, tiny_vision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CLIPModel,
    GPT2Config,
    SiglipVisionModel,
)

from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration, VWLMMModel
from modeling_vwlmm.modeling_vwlmm import get_supervised_image_positions
from modeling_vwlmm.objectives_vwlmm import parse_objectives
from modeling_vwlmm.training import attach_training_modules
from modeling_vwlmm.training.trainer import set_trainable_parameters
from processing_vwlmm import VWLMMProcessor
from processing_vwlmm.chat_templates_vwlmm import CHAT_TEMPLATES


IMAGE = 480  # id of the placeholder
N = 16  # image tokens of an image
VM_HEAD = "model.vm_head.weight"


def collate(processor, *conversations, processor_kwargs=None, **kwargs) -> dict:
    """Inputs of conversations with noise images, left-padded, and labels on the last four tokens of each."""
    seed = 0
    messages = []
    for conversation in conversations:
        for message in conversation:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = make_image(seed := seed + 1)
        messages.append(conversation)
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", **(processor_kwargs or {})},
        **kwargs,
    )
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    inputs["labels"][:, -4:] = inputs["input_ids"][:, -4:]
    return dict(inputs)


@pytest.fixture
def batch(processor) -> dict:
    """Two images, none, and one in a later turn; left-padded."""
    return collate(
        processor,
        make_conversation((2, "What is left?", "A red circle.")),
        make_conversation((0, "Who?", "Me.")),
        make_conversation((0, "Hello?", "Hello."), (1, "Describe the image.", "A dog.")),
    )


def gradients(model) -> set[str]:
    """Names of the parameters that got a gradient that is not zero."""
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def names(model, *prefixes) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


class Golden:
    """A golden checkpoint and what the authors' code computed with it."""

    def __init__(self, name: str, folder: str):
        self.folder = GOLDEN / name
        self.model = VWLMMForConditionalGeneration.from_pretrained(folder)
        self.processor = VWLMMProcessor.from_pretrained(folder)
        self.tensors = load_file(self.folder / "expected.safetensors")
        self.expected = json.loads((self.folder / "expected.json").read_text())
        self.mask = self.tensors["expanded_attention_mask"]
        self.batch = {
            "input_ids": self.expand(self.tensors["input_ids"]),
            "attention_mask": self.mask.long(),
            "pixel_values": self.tensors["pixel_values"],
        }
        self.labels = self.tensors["expanded_labels"]

    def expand(self, input_ids):
        rows = [
            [t for token in row for t in ([IMAGE] * N if token == -200 else [token])] for row in input_ids.tolist()
        ]
        return torch.tensor(rows)

    def gradient(self, authors_name: str) -> torch.Tensor:
        name = authors_name.replace("model.", "model.language_model.").replace("vm_head", "model.vm_head")
        return self.model.get_parameter(name).grad


@pytest.fixture(params=["vicuna", "pif"])
def golden(request) -> Golden:
    return Golden(request.param, request.getfixturevalue(request.param))


class TestGoldenValues:
    def test_batch_is_the_authors(self, golden):
        assert torch.equal(golden.batch["input_ids"] == IMAGE, golden.tensors["image_positions"])

    def test_pseudo_image_features_follow_the_checkpoint(self, golden):
        assert golden.model.config.use_pseudo_image_features == (golden.folder.name == "pif")

    def test_logits(self, golden):
        with torch.no_grad():
            logits = golden.model(**golden.batch).logits
        assert_close(logits[golden.mask], golden.tensors["logits"][golden.mask], atol=1e-5, rtol=0)

    def test_image_features_and_what_they_say(self, golden):
        pixel_values = golden.tensors["pixel_values"]
        with torch.no_grad():
            features = golden.model.get_image_features(pixel_values).image_features
        assert_close(torch.stack(features), golden.tensors["image_features"], atol=1e-5, rtol=1e-5)
        assert torch.equal(golden.model.get_nearest_tokens(pixel_values), golden.tensors["nearest_token_ids"])
        words = golden.model.get_visual_words(pixel_values)
        assert torch.equal(words.token_ids.squeeze(-1), golden.tensors["visual_word_ids"])

    def test_language_loss_alone(self, golden):
        output = golden.model(**golden.batch, labels=golden.labels)
        assert_close(output.loss, golden.tensors["loss_language"])
        assert_close(output.language_loss, golden.tensors["loss_language"])
        assert output.visual_loss is None

    def test_stage_4_losses_and_gradients(self, golden):
        output = golden.model(**golden.batch, labels=golden.labels, visual_objective="visual_words")
        assert_close(output.loss, golden.tensors["loss"])
        assert_close(output.language_loss, golden.tensors["loss_language"])
        assert_close(output.visual_loss, golden.tensors["loss_visual_stage4"])
        assert output.num_image_positions == golden.tensors["image_positions"].sum()
        assert output.num_text_positions == (golden.labels[:, 1:] != -100).sum()
        output.loss.backward()
        expected = {name[5:]: value for name, value in golden.tensors.items() if name.startswith("grad.")}
        assert len(expected) >= 4
        for name, value in expected.items():
            assert_close(golden.gradient(name), value, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")

    def test_stage_3_loss_and_gradient(self, golden):
        output = golden.model(**golden.batch, visual_objective="vm_head")
        assert_close(output.loss, golden.tensors["loss_visual_stage3"])
        if golden.folder.name == "vicuna":
            output.loss.backward()
            assert_close(golden.gradient("vm_head.weight"), golden.tensors["grad_stage3.vm_head.weight"])

    @pytest.mark.parametrize("sample", ["0", "1"])
    @pytest.mark.parametrize("golden", ["vicuna"], indirect=True)  # `pif` has no continuations
    def test_greedy_continuation_from_prompt_and_picture(self, golden, sample):
        case = golden.expected["greedy"][sample]
        picture = Image.open(golden.folder / golden.expected["samples"][int(sample)]["images"][0])
        inputs = golden.processor(images=picture, text=case["prompt"], return_tensors="pt")
        generated = golden.model.generate(**inputs, max_new_tokens=len(case["new_token_ids"]), do_sample=False)
        assert generated[0, inputs["input_ids"].shape[1] :].tolist() == case["new_token_ids"]


class TestVisualLoss:
    @pytest.fixture(params=[False, True], ids=["plain", "pseudo_image_features"])
    def model(self, model, request):
        model.config.use_pseudo_image_features = request.param
        return model

    @staticmethod
    def by_hand(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """log Q and log P' at the supervised image positions, one position at a time, in double precision."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            output = model(**inputs)
            visual_words = model.model.vm_head(output.image_hidden_states)
        log_q, log_p = [], []
        image_tokens = iter(visual_words.double().log_softmax(-1))
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for n, token in enumerate(ids):
                if token == IMAGE:
                    word = next(image_tokens)
                    if n > 0 and batch["attention_mask"][row, n - 1]:
                        log_q.append(output.logits[row, n - 1].double().log_softmax(-1))
                        log_p.append(word)
        return torch.stack(log_q), torch.stack(log_p)

    def test_stage_4_is_the_divergence_of_the_prediction_from_the_visual_words(self, model, batch):
        log_q, log_p = self.by_hand(model, batch)
        expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")  # KL(P' || Q)
        output = model(**batch, visual_objective="visual_words")
        assert_close(output.visual_loss.double(), expected, atol=1e-6, rtol=1e-5)
        assert output.num_image_positions == 3 * N == len(log_q)
        assert_close(output.loss, output.language_loss + output.visual_loss)
        assert_close(output.visual_word_entropy.double(), -(log_p.exp() * log_p).sum(-1).mean(), atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [0.25, 4.0])
    def test_temperature_is_of_the_target_alone(self, model, batch, temperature):
        log_q, log_p = self.by_hand(model, batch)
        log_p = (log_p / temperature).log_softmax(-1)
        model.config.visual_word_temperature = temperature
        output = model(**batch, visual_objective="visual_words")
        expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        assert_close(output.visual_loss.double(), expected, atol=1e-6, rtol=1e-5)
        assert_close(output.visual_word_entropy.double(), -(log_p.exp() * log_p).sum(-1).mean(), atol=1e-6, rtol=1e-5)
        stage_3 = model(**batch, visual_objective="vm_head").visual_loss
        model.config.visual_word_temperature = 1.0
        assert_close(model(**batch, visual_objective="vm_head").visual_loss, stage_3)

    def test_sharp_targets_become_the_most_probable_word(self, model, batch):
        with torch.no_grad():
            model.model.vm_head.weight.mul_(100)  # so that no two words are almost equally probable
        words = model.get_visual_words(batch["pixel_values"]).token_ids[..., 0]  # [I, N]
        hard = model(**batch, visual_objective="token_labels", image_labels=words)
        model.config.visual_word_temperature = 1e-3
        sharp = model(**batch, visual_objective="visual_words")
        assert_close(sharp.visual_loss, hard.losses["token_labels"], atol=1e-3, rtol=1e-3)

    def test_stage_3_is_the_divergence_of_the_visual_words_from_the_prediction(self, model, batch):
        log_q, log_p = self.by_hand(model, batch)
        expected = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")  # KL(Q || P')
        output = model(**batch, visual_objective="vm_head")
        assert_close(output.visual_loss.double(), expected, atol=1e-6, rtol=1e-5)
        assert_close(output.loss, output.visual_loss)
        assert output.language_loss is None

    def test_two_directions_differ(self, model, batch):
        stage_3 = model(**batch, visual_objective="vm_head").visual_loss
        stage_4 = model(**batch, visual_objective="visual_words").visual_loss
        assert abs(stage_3 - stage_4) > 1e-2

    def test_language_loss_does_not_change_with_the_objective(self, model, batch):
        alone = model(**batch).language_loss
        assert_close(model(**batch, visual_objective="visual_words").language_loss, alone)

    def test_given_counts_replace_those_of_the_batch(self, model, batch):
        means = model(**batch, visual_objective="visual_words")
        shares = model(
            **batch,
            visual_objective="visual_words",
            num_items_in_batch=torch.tensor(100),
            num_image_items_in_batch=1000,
        )
        assert_close(shares.language_loss * 100, means.language_loss * means.num_text_positions)
        assert_close(shares.visual_loss * 1000, means.visual_loss * means.num_image_positions)

    def test_counts_of_zero_do_not_divide_by_zero(self, model, processor):
        batch = collate(processor, make_conversation((0, "Who?", "Me.")))
        output = model(
            **batch, visual_objective="visual_words", num_items_in_batch=10, num_image_items_in_batch=torch.tensor(0)
        )
        assert output.visual_loss == 0
        assert output.loss.isfinite()

    def test_batch_without_images(self, model, processor):
        batch = collate(processor, make_conversation((0, "Who?", "Me.")))
        output = model(**batch, visual_objective="visual_words")
        assert output.visual_loss == 0
        assert output.num_image_positions == 0
        assert output.visual_word_entropy == 0
        assert_close(output.loss, model(**batch).loss)
        stage_3 = model(**batch, visual_objective="vm_head")
        assert stage_3.loss == 0
        stage_3.loss.backward()
        assert gradients(model) == set()

    def test_batch_without_supervised_text(self, model, batch):
        batch["labels"][:] = -100
        output = model(**batch, visual_objective="visual_words")
        assert output.language_loss == 0
        assert output.num_text_positions == 0
        assert_close(output.loss, output.visual_loss)

    def test_unknown_objective(self, model, batch):
        with pytest.raises(ValueError, match="'visual_word'.*None, 'visual_words' or 'vm_head'"):
            model(**batch, visual_objective="visual_word")

    @pytest.mark.parametrize("objective", [None, "visual_words"])
    def test_labels_may_be_the_token_ids(self, model, batch, objective):
        """A placeholder past the vocabulary has no logit to be predicted by."""
        batch["labels"] = batch["input_ids"].clone()
        found = model(**batch, visual_objective=objective)
        batch["labels"][batch["input_ids"] == IMAGE] = -100
        expected = model(**batch, visual_objective=objective)
        assert torch.equal(found.language_loss, expected.language_loss)
        assert found.num_text_positions == (batch["labels"][:, 1:] != -100).sum()

    def test_no_logits_beside_a_visual_objective_unless_they_are_asked_for(self, model, batch):
        assert model(**batch, visual_objective="visual_words").logits is None
        assert model(**batch, visual_objective="visual_words", logits_to_keep=2).logits.shape[1] == 2

    def test_padding_has_to_be_told(self, model, batch):
        batch["attention_mask"] = batch["attention_mask"][:, None, None, :].bool()
        with pytest.raises(ValueError, match=r"`attention_mask` has shape \(3, 1, 1, \d+\).*`\[B, L\]`"):
            model(**batch, visual_objective="visual_words")

    def test_objective_needs_input_ids(self, model):
        with pytest.raises(ValueError, match="needs `input_ids`"):
            model(inputs_embeds=torch.zeros(1, 3, 48), visual_objective="visual_words")


class TestSupervisedImagePositions:
    def test_image_at_the_start_loses_its_first_token(self):
        ids = torch.tensor([[IMAGE, IMAGE, 5], [5, IMAGE, IMAGE]])
        expected = [[False, True, False], [False, True, True]]
        assert get_supervised_image_positions(ids, None, IMAGE).tolist() == expected

    def test_image_behind_left_padding_loses_its_first_token(self):
        ids = torch.tensor([[0, 0, IMAGE, IMAGE, 5]])
        mask = torch.tensor([[0, 0, 1, 1, 1]])
        assert get_supervised_image_positions(ids, mask, IMAGE).tolist() == [[False, False, False, True, False]]

    def test_image_that_opens_one_of_several_samples_in_a_row(self):
        ids = torch.tensor([[IMAGE, IMAGE, 5, IMAGE, IMAGE]])
        position_ids = torch.tensor([[0, 1, 2, 0, 1]])
        found = get_supervised_image_positions(ids, None, IMAGE, position_ids)
        assert found.tolist() == [[False, True, False, False, True]]

    def test_input_ids_stay_as_they_are(self):
        ids = torch.tensor([[IMAGE, IMAGE]])
        get_supervised_image_positions(ids, torch.ones_like(ids), IMAGE)
        assert ids.tolist() == [[IMAGE, IMAGE]]

    def test_plain_template_without_bos(self, model, processor):
        without_bos = CHAT_TEMPLATES["plain"]  # as for a tokenizer that opens no sequence with BOS
        batch = collate(
            processor,
            make_conversation((1, "", "A dog.")),
            chat_template=without_bos,
            processor_kwargs={"add_special_tokens": False},
        )
        assert batch["input_ids"][0, 0] == IMAGE
        output = model(**batch, visual_objective="vm_head")
        assert output.num_image_positions == N - 1
        log_q, log_p = TestVisualLoss.by_hand(model, batch)
        expected = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")  # KL(Q || P')
        assert_close(output.visual_loss.double(), expected, atol=1e-6, rtol=1e-5)

    def test_padding_side_does_not_change_losses(self, model, batch):
        left = model(**batch, visual_objective="visual_words")
        order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
        for name in ("input_ids", "labels", "attention_mask"):
            batch[name] = batch[name].gather(1, order)
        right = model(**batch, visual_objective="visual_words")
        assert_close(right.visual_loss, left.visual_loss, atol=1e-5, rtol=1e-5)
        assert_close(right.language_loss, left.language_loss, atol=1e-5, rtol=1e-5)


class TestGradients:
    """What a stage leaves frozen gets no gradient; what it, or the user, lets train gets one."""

    @pytest.mark.parametrize("use_pseudo_image_features", [False, True])
    def test_stage_4_reaches_decoder_and_mm_head_alone(self, model, batch, use_pseudo_image_features):
        model.config.use_pseudo_image_features = use_pseudo_image_features
        set_trainable_parameters(model, 4)
        model(**batch, visual_objective="visual_words").loss.backward()
        assert gradients(model) == names(model, "model.language_model.", "lm_head.")

    @pytest.mark.parametrize("use_pseudo_image_features", [False, True])
    def test_stage_3_reaches_vm_head_alone(self, model, batch, use_pseudo_image_features):
        model.config.use_pseudo_image_features = use_pseudo_image_features
        set_trainable_parameters(model, 3)
        output = model(**batch, visual_objective="vm_head")
        output.loss.backward()
        assert gradients(model) == {VM_HEAD}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {VM_HEAD}

    def test_stage_4_reaches_an_adapter_that_its_user_lets_train(self, model, batch):
        """And not the VM head, which makes targets alone."""
        model(**batch, visual_objective="visual_words").loss.backward()
        adapter = names(model, "model.multi_modal_projector.")
        assert gradients(model) >= adapter
        assert model.model.vm_head.weight.grad is None

    def test_stage_3_runs_the_decoder_without_gradients(self, model, batch):
        needs_gradients = []
        hook = model.model.language_model.layers[0].register_forward_hook(
            lambda module, inputs, output: needs_gradients.append(torch.is_grad_enabled())
        )
        model(**batch, visual_objective="vm_head").loss.backward()
        hook.remove()
        assert needs_gradients == [False]
        assert not gradients(model) & names(model, "model.language_model.", "lm_head.")

    @pytest.mark.parametrize("objective", ["visual_words", "token_labels", {"features": 1.0}], ids=str)
    def test_targets_are_detached(self, model, batch, objective):
        """With the decoder's input cut, image features are reached as targets or not at all."""
        attach_training_modules(model, parse_objectives(objective)[0])
        batch["image_labels"] = torch.full((3, N), 7)
        cut = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].detach()}),
            with_kwargs=True,
        )
        model(**batch, visual_objective=objective).loss.backward()
        cut.remove()
        assert not gradients(model) & ({VM_HEAD} | names(model, "model.multi_modal_projector."))

    def test_a_new_or_loaded_vision_tower_is_frozen_and_keeps_no_activations(self, model, batch, vicuna):
        for fresh in (model, VWLMMModel.from_pretrained(vicuna), VWLMMForConditionalGeneration(model.config)):
            assert not any(p.requires_grad for p in fresh.base_model.vision_tower.parameters())
        # What trainers do for PEFT with gradient checkpointing: embeddings ask for gradients, the tower's as well.
        model.enable_input_require_grads()
        features = []
        hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: features.extend(inputs))
        model(**batch).loss.backward()
        hook.remove()
        assert features[0].grad_fn is None

    @pytest.mark.parametrize("objective", [None, "visual_words"])
    def test_a_vision_tower_that_its_user_unfreezes_learns_and_stays_unfrozen(self, model, batch, objective):
        model.model.vision_tower.requires_grad_(True)
        model(**batch, visual_objective=objective).loss.backward()
        assert gradients(model) & names(model, "model.vision_tower.")
        assert all(p.requires_grad for p in model.model.vision_tower.parameters())

    def test_stage_3_with_only_the_vm_head_requiring_gradients(self, model, batch):
        model.requires_grad_(False)
        model.model.vm_head.requires_grad_(True)
        model(**batch, visual_objective="vm_head").loss.backward()
        assert gradients(model) == {VM_HEAD}

    def test_language_loss_reaches_the_adapter_and_not_the_vm_head(self, model, batch):
        model(**batch).loss.backward()
        assert gradients(model) >= names(model, "model.language_model.", "lm_head.", "model.multi_modal_projector.")
        assert model.model.vm_head.weight.grad is None

    def test_language_loss_through_pseudo_image_features_reaches_vm_head_and_adapter(self, model, batch):
        model.config.use_pseudo_image_features = True
        model(**batch).loss.backward()
        assert gradients(model) >= {VM_HEAD} | names(model, "model.multi_modal_projector.")

    def test_pseudo_image_features_train_the_embeddings_of_words_that_no_text_has(self, model, batch):
        unseen = torch.ones(480, dtype=torch.bool)
        unseen[batch["input_ids"][batch["input_ids"] != IMAGE]] = False
        unseen[0] = False  # stands in for the placeholder before image features take its place
        embeddings = model.get_input_embeddings().weight
        model(**batch, visual_objective="visual_words").loss.backward()
        assert not embeddings.grad[unseen].any()
        model.config.use_pseudo_image_features = True
        model.zero_grad()
        model(**batch, visual_objective="visual_words").loss.backward()
        assert embeddings.grad[unseen].any(dim=1).all()

    def test_placeholder_teaches_no_embedding(self, model, processor):
        batch = collate(processor, make_conversation((1, "Who?", "Me.")))
        assert not (batch["input_ids"] == 0).any()
        model.get_input_embeddings().padding_idx = None  # which would hide it
        model(**batch).loss.backward()
        assert not model.get_input_embeddings().weight.grad[0].any()

    @pytest.mark.parametrize("objective", [None, "visual_words", "vm_head"])
    def test_gradient_checkpointing_changes_nothing(self, model, batch, objective):
        grads = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.train().zero_grad()
            model(**batch, visual_objective=objective, use_cache=False).loss.backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for name in grads[0]:
            assert_close(grads[0][name], grads[1][name])

    @pytest.mark.parametrize("objective", [None, "visual_words", "vm_head"])
    def test_bf16_autocast_is_close(self, model, batch, objective):
        exact = model(**batch, visual_objective=objective)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch, visual_objective=objective)
        for name in ("loss", "language_loss", "visual_loss"):
            if name in exact:
                assert output[name].dtype == torch.float32
                assert_close(output[name], exact[name], rtol=0.05, atol=0)
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_model_in_bf16(self, model, batch):
        exact = model(**batch, visual_objective="visual_words")
        output = model.bfloat16()(**batch, visual_objective="visual_words")
        assert output.loss.dtype == torch.float32
        assert_close(output.loss, exact.loss, rtol=0.05, atol=0)


class TestVisualWords:
    @pytest.mark.parametrize("use_pseudo_image_features", [False, True])
    def test_best_first_with_probabilities_of_the_softmax(self, model, batch, use_pseudo_image_features):
        model.config.use_pseudo_image_features = use_pseudo_image_features
        words = model.get_visual_words(batch["pixel_values"], top_k=5)
        assert words.token_ids.shape == words.probabilities.shape == (3, N, 5)
        with torch.no_grad():
            features = torch.stack(model.get_image_features(batch["pixel_values"]).image_features)
            softmax = model.model.vm_head(features).softmax(-1)  # [I, N, C]
        assert_close(words.probabilities, softmax.sort(-1, descending=True).values[..., :5])
        assert_close(softmax.gather(-1, words.token_ids), words.probabilities)

    def test_temperature(self, model, batch):
        words = model.get_visual_words(batch["pixel_values"], top_k=480)
        model.config.visual_word_temperature = 0.5
        sharp = model.get_visual_words(batch["pixel_values"], top_k=480)
        expected = words.probabilities.square() / words.probabilities.square().sum(dim=-1, keepdim=True)
        assert_close(sharp.probabilities, expected)
        # Pseudo image features have a temperature of their own.
        model.config.use_pseudo_image_features = True
        read = torch.stack(model.get_image_features(batch["pixel_values"]).pooler_output)  # [I, N, D]
        model.config.pseudo_image_feature_temperature = 0.5
        sharp_read = torch.stack(model.get_image_features(batch["pixel_values"]).pooler_output)
        embeddings = model.get_input_embeddings().weight[:480]
        for found, distribution in ((read, words), (sharp_read, sharp)):
            mixed = (distribution.probabilities.unsqueeze(-1) * embeddings[distribution.token_ids]).sum(dim=-2)
            assert_close(found, mixed)

    @pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e30])
    def test_temperature_in_fp16(self, model, batch, temperature):
        """Logits of a few units divided by 1e-4 are no fp16; their distribution is that of the most probable word."""
        model = model.half()
        pixel_values = batch["pixel_values"].half()
        words = model.get_visual_words(pixel_values)
        model.config.visual_word_temperature = model.config.pseudo_image_feature_temperature = temperature
        model.config.use_pseudo_image_features = True
        found = model.get_visual_words(pixel_values, top_k=480)
        read = torch.stack(model.get_image_features(pixel_values).pooler_output)  # [I, N, D]
        output = model(**batch | {"pixel_values": pixel_values}, visual_objective="visual_words")
        assert output.visual_loss.isfinite() and output.visual_word_entropy.isfinite()
        if temperature > 1:
            assert_close(found.probabilities, torch.full_like(found.probabilities, 1 / 480))
        else:
            is_sure = found.probabilities[..., 0] > 0.999
            assert is_sure.float().mean() > 0.9  # two words may have the same logit in fp16
            assert torch.equal(found.token_ids[..., 0][is_sure], words.token_ids[..., 0][is_sure])
            embedded = model.get_input_embeddings()(words.token_ids[..., 0])
            assert_close(read[is_sure], embedded[is_sure])

    def test_one_word_by_default_and_every_word_on_request(self, model, batch):
        assert model.get_visual_words(batch["pixel_values"]).token_ids.shape == (3, N, 1)
        probabilities = model.get_visual_words(batch["pixel_values"], top_k=480).probabilities
        assert_close(probabilities.sum(-1), torch.ones(3, N))

    def test_nearest_token_is_the_argmax_of_the_cosine(self, model, batch):
        # A long embedding must not win by its length.
        with torch.no_grad():
            model.get_input_embeddings().weight[7] *= 100
            features = torch.stack(model.get_image_features(batch["pixel_values"]).image_features)
        cosines = F.cosine_similarity(features.unsqueeze(2), model.get_input_embeddings().weight, dim=-1)  # [I, N, C]
        nearest = model.get_nearest_tokens(batch["pixel_values"])
        assert nearest.shape == (3, N)
        assert torch.equal(nearest, cosines.argmax(-1))

    def test_embedding_rows_past_the_vocabulary_are_no_words(self, model, batch):
        """Serving engines pad the embedding matrix."""
        model.config.use_pseudo_image_features = True
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            expected = model(**inputs).logits
            nearest = model.get_nearest_tokens(batch["pixel_values"])
            embeddings = model.get_input_embeddings()
            features = torch.cat(model.get_image_features(batch["pixel_values"]).image_features)
            embeddings.weight = torch.nn.Parameter(torch.cat([embeddings.weight, features]))
            assert_close(model(**inputs).logits, expected)
            assert torch.equal(model.get_nearest_tokens(batch["pixel_values"]), nearest)

    def test_pseudo_image_features_are_the_expected_embedding(self, model, batch):
        model.config.use_pseudo_image_features = True
        with torch.no_grad():
            images = model.get_image_features(batch["pixel_values"])
            features = torch.stack(images.image_features)
            expected = model.model.vm_head(features).softmax(-1) @ model.get_input_embeddings().weight
        assert_close(torch.stack(tuple(images.pooler_output)), expected)
        assert (features - expected).abs().max() > 0.1


class TestForward:
    @pytest.fixture(autouse=True)
    def no_grad(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("objective", [None, "visual_words", "vm_head"])
    def test_tuple_holds_what_the_dict_holds(self, model, batch, objective):
        as_dict = model(**batch, visual_objective=objective, use_cache=False)
        as_tuple = model(**batch, visual_objective=objective, use_cache=False, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(as_dict.to_tuple())
        for a, b in zip(as_tuple, as_dict.to_tuple(), strict=True):
            assert_close(a, b)

    def test_language_loss_does_not_touch_the_vm_head(self, model, batch):
        expected = model(**batch, logits_to_keep=1).loss
        del model.model.vm_head
        assert torch.equal(model(**batch, logits_to_keep=1).loss, expected)

    def test_order_of_the_outputs(self, model, batch):
        output = model(**batch)
        assert list(output)[:3] == ["loss", "logits", "past_key_values"]
        del batch["labels"]
        output = model(**batch)
        assert output[0] is output.logits

    def test_tuple_of_the_base_model_and_of_the_image_features(self, model, batch):
        inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
        hidden_states = model.model(**inputs, return_dict=False)[0]
        assert_close(hidden_states, model.model(**inputs).last_hidden_state)
        assert isinstance(model.get_image_features(batch["pixel_values"], return_dict=False), tuple)

    @pytest.mark.parametrize("objective", [None, "visual_words"])
    def test_hidden_states_and_attentions(self, model, batch, objective):
        model.set_attn_implementation("eager")
        output = model(
            **batch, visual_objective=objective, output_hidden_states=True, output_attentions=True, use_cache=False
        )
        length = batch["input_ids"].shape[1]
        assert [tuple(h.shape) for h in output.hidden_states] == [(3, length, 48)] * 4
        assert [tuple(a.shape) for a in output.attentions] == [(3, 4, length, length)] * 3

    def test_image_hidden_states_are_the_image_features(self, model, batch):
        model.config.use_pseudo_image_features = True
        features = model.get_image_features(batch["pixel_values"]).image_features
        assert_close(model(**batch).image_hidden_states, torch.cat(tuple(features)))

    def test_logits_to_keep(self, model, batch):
        batch.pop("labels")
        logits = model(**batch).logits
        assert_close(model(**batch, logits_to_keep=2).logits, logits[:, -2:])
        assert_close(model(**batch, logits_to_keep=torch.tensor([3])).logits, logits[:, [3]])

    def test_image_features_in_place_of_pixel_values(self, model, batch):
        logits = model(**batch).logits
        images = model.get_image_features(batch.pop("pixel_values"))
        assert_close(model(**batch, mm_encoder_outputs={"image": images}).logits, logits)

    def test_every_image_changes_the_logits_behind_it_alone(self, model, batch):
        logits = model(**batch).logits
        batch["pixel_values"][1] += 1  # second image of the first sample
        start = (batch["input_ids"][0] == IMAGE).nonzero()[N].item()
        changed = (model(**batch).logits != logits).any(-1)
        assert changed[0, start:].all()
        assert not changed[0, :start].any()
        assert not changed[1:].any()


class TestBadInput:
    def test_placeholders_and_images_disagree(self, model, batch):
        batch["pixel_values"] = batch["pixel_values"][:2]
        with pytest.raises(ValueError, match="48 image tokens .*480.* and 32 image features"):
            model(**batch)

    def test_placeholders_without_images(self, model, batch):
        del batch["pixel_values"]
        with pytest.raises(ValueError, match="no images.*`pixel_values`"):
            model(**batch)

    def test_placeholders_without_images_inside_the_vocabulary(self, model, batch, caplog):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        inputs["input_ids"][inputs["input_ids"] == IMAGE] = model.config.image_token_id = 7
        logits = model(**inputs).logits  # LLaVA takes it for a token, too
        assert "no images" in caplog.text
        inputs_embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert_close(logits, model(**inputs, inputs_embeds=inputs_embeds).logits)
        with pytest.raises(ValueError, match="no images.*`pixel_values`"):
            model(input_ids=torch.tensor([[1, 7, 8]]), labels=torch.tensor([[1, 7, 8]]))  # nothing to learn from

    def test_images_without_placeholders(self, model, batch):
        batch["input_ids"][:] = 5
        with pytest.raises(ValueError, match="found 0 image tokens .* 48 image features"):
            model(**batch)

    def test_both_or_no_input(self, model, batch):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**batch, inputs_embeds=torch.zeros(1, 3, 48))
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(pixel_values=batch["pixel_values"])

    def test_embeddings_cannot_hold_a_placeholder_past_the_vocabulary(self, model, batch):
        with pytest.raises(ValueError, match="id 480.* past the vocabulary of 480.*`input_ids`"):
            model(inputs_embeds=torch.zeros(1, 3, 48), pixel_values=batch["pixel_values"])

    def test_images_twice(self, model, batch):
        images = model.get_image_features(batch["pixel_values"])
        with pytest.raises(ValueError, match="not as both"):
            model(**batch, mm_encoder_outputs={"image": images})


class TestFromVisionTextPretrained:
    PAIRS = [
        ("clip", "llama"),
        ("whole_clip", "llama"),
        ("siglip", "llama"),
        ("dinov2", "llama"),
        ("clip", "mistral"),
        ("siglip", "qwen3"),
        ("clip", "gemma"),
    ]

    @pytest.fixture(params=PAIRS, ids="-".join)
    def parts(self, request):
        torch.manual_seed(0)
        return tiny_vision(request.param[0]).eval(), tiny_text(request.param[1]).eval()

    @pytest.fixture(params=["modules", "folders"])
    def fresh(self, request, parts, tmp_path):
        vision, text = parts
        if request.param == "modules":
            vision = getattr(vision, "vision_model", vision) if isinstance(vision, CLIPModel) else vision
            return VWLMMForConditionalGeneration.from_vision_text_pretrained(vision, text)
        vision.save_pretrained(tmp_path / "vision")
        text.save_pretrained(tmp_path / "text")
        return VWLMMForConditionalGeneration.from_vision_text_pretrained(
            str(tmp_path / "vision"), str(tmp_path / "text")
        )

    @staticmethod
    def forward(model):
        input_ids = torch.tensor([[1, *[model.config.image_token_id] * N, 5, 6]])
        pixel_values = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
        with torch.no_grad():
            return model(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids % 7).logits

    def test_pretrained_weights_arrive_bit_for_bit(self, parts, fresh):
        vision, text = parts
        tower = {name.removeprefix("vision_model."): value for name, value in vision.state_dict().items()}
        for name, value in fresh.model.vision_tower.state_dict().items():
            assert torch.equal(value, tower[name.removeprefix("vision_model.")]), name
        decoder = text.get_decoder().state_dict()
        assert decoder.keys() == fresh.model.language_model.state_dict().keys()
        for name, value in fresh.model.language_model.state_dict().items():
            assert torch.equal(value, decoder[name]), name
        assert torch.equal(fresh.lm_head.weight, text.get_output_embeddings().weight)

    def test_adapter_and_vm_head_are_new(self, fresh):
        new = dict(fresh.model.multi_modal_projector.named_parameters(prefix="adapter"))
        new[VM_HEAD] = fresh.model.vm_head.weight
        assert len(new) == 5
        for name, value in new.items():
            assert value.isfinite().all(), name
            assert 1e-3 < value.std() < 1, name
        assert fresh.model.vm_head.weight.shape == (100, 32)
        assert not any(parameter.is_meta for parameter in fresh.parameters())
        assert not any(buffer.is_meta for buffer in fresh.buffers())

    def test_config_says_how_the_tower_is_read(self, parts, fresh):
        is_siglip = isinstance(parts[0], SiglipVisionModel)
        assert fresh.config.vision_feature_select_strategy == ("full" if is_siglip else "default")
        assert fresh.config.image_seq_length == N
        assert fresh.config.image_token_id == fresh.config.text_config.vocab_size == 100
        assert fresh.config.trained_stages == []
        assert not fresh.training

    def test_save_and_load_round_trip(self, fresh, tmp_path):
        fresh.save_pretrained(tmp_path / "saved")
        again, info = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert fresh.state_dict().keys() == again.state_dict().keys()
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(self.forward(fresh), self.forward(again))

    def test_tied_decoder_stays_tied(self, parts, fresh):
        tied = parts[1].config.tie_word_embeddings
        assert (fresh.lm_head.weight is fresh.get_input_embeddings().weight) == tied
        assert fresh.model.vm_head.weight is not fresh.lm_head.weight
        assert "model.vm_head.weight" in fresh.state_dict()

    def test_trains(self, fresh):
        input_ids = torch.tensor([[1, *[100] * N, 5, 6]])
        pixel_values = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
        fresh(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids % 7).loss.backward()
        assert gradients(fresh) >= names(fresh, "model.multi_modal_projector.", "model.language_model.layers.")


class TestFromVisionTextPretrainedOptions:
    def test_config_fields_win(self):
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            tiny_vision("clip"),
            tiny_text("llama"),
            image_token_index=7,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            use_pseudo_image_features=True,
        )
        config = model.config
        assert (config.image_token_id, config.vision_feature_layer) == (7, -1)
        assert config.vision_feature_select_strategy == "full"
        assert config.use_pseudo_image_features
        assert config.image_seq_length == N + 1  # the class token counts

    def test_dtype_of_folders(self, tmp_path):
        tiny_vision("clip").save_pretrained(tmp_path / "vision")
        tiny_text("llama").save_pretrained(tmp_path / "text")
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            str(tmp_path / "vision"), str(tmp_path / "text"), dtype=torch.bfloat16
        )
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_config_names_no_folder_of_this_machine(self, tmp_path):
        vision, text = tiny_vision("clip"), tiny_text("llama")
        vision.config.name_or_path, text.config.name_or_path = str(tmp_path), "owner/name"
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(vision, text)
        model.save_pretrained(tmp_path / "saved")
        config = (tmp_path / "saved" / "config.json").read_text()
        assert str(tmp_path) not in config
        assert "owner/name" in config
        assert vision.config.name_or_path == str(tmp_path)  # which the processor reads

    def test_head_with_a_bias_is_an_error(self):
        text = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100))
        text.lm_head = torch.nn.Linear(32, 100)
        with pytest.raises(ValueError, match="its head has bias"):
            VWLMMForConditionalGeneration.from_vision_text_pretrained(tiny_vision("clip"), text)


class TestSavePretrained:
    def test_names_are_the_same_whatever_was_loaded(self, model, vicuna, tmp_path):
        model.save_pretrained(tmp_path / "saved")
        file = tmp_path / "saved" / "model.safetensors"
        weights = load_file(file)
        early = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
        assert early.keys() != weights.keys()
        save_file(early, file, metadata={"format": "pt"})
        again = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "saved")
        again.save_pretrained(tmp_path / "again")
        assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()


class TestResizeTokenEmbeddings:
    def test_heads_and_embeddings_keep_one_vocabulary(self, model, processor, tmp_path):
        batch = collate(processor, make_conversation((1, "Where?", "A red circle.")))
        before = model(**batch, visual_objective="visual_words")
        old_heads = model.lm_head.weight.detach().clone(), model.model.vm_head.weight.detach().clone()
        model.resize_token_embeddings(490)
        heads = model.lm_head.weight, model.model.vm_head.weight
        for matrix in (*heads, model.get_input_embeddings().weight):
            assert matrix.shape[0] == model.config.text_config.vocab_size == 490
        for head, old in zip(heads, old_heads, strict=True):
            assert torch.equal(head[:480], old)
        after = model(**batch, visual_objective="visual_words")
        assert after.visual_loss.isfinite() and after.visual_loss != before.visual_loss
        model.save_pretrained(tmp_path)
        again = VWLMMForConditionalGeneration.from_pretrained(tmp_path)
        assert_close(again(**batch, visual_objective="visual_words").loss, after.loss)

    def test_base_model(self, vicuna):
        model = VWLMMModel.from_pretrained(vicuna, use_pseudo_image_features=True)
        pixel_values = torch.randn(1, 3, *[model.config.vision_config.image_size] * 2)
        model.resize_token_embeddings(490)
        assert model.vm_head.out_features == model.config.text_config.vocab_size == 490
        assert model.get_image_features(pixel_values).pooler_output[0].isfinite().all()

    def test_visual_words_may_become_the_new_tokens(self, model):
        model.resize_token_embeddings(496, mean_resizing=False)
        pixel_values = torch.randn(2, 3, *[model.config.vision_config.image_size] * 2)
        with torch.no_grad():
            image_features = model.model.get_image_features(pixel_values).image_features
            model.model.vm_head.weight[490] = 1e3 * image_features[1][3]
        assert model.get_visual_words(pixel_values).token_ids[1, 3] == 490


class TestConfig:
    @pytest.mark.parametrize("name", ["visual_word_temperature", "pseudo_image_feature_temperature"])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, 1e-40, 10**400])
    def test_temperature_that_is_none(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` is {value}; expected a finite number above 0"):
            VWLMMConfig(**{name: value})
        config = VWLMMConfig()
        with pytest.raises(ValueError, match=f"`{name}` is {value}; expected a finite number above 0"):
            setattr(config, name, value)  # as on the config of a model
        assert getattr(config, name) == 1

    def test_temperatures_that_are_set_later(self, vicuna, tmp_path):
        """By keywords, which are checked as in the config; and they are saved, also as whole numbers."""
        with pytest.raises(ValueError, match="`visual_word_temperature` is -1.0; expected a finite number above 0"):
            VWLMMForConditionalGeneration.from_pretrained(vicuna, visual_word_temperature=-1.0)
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna, visual_word_temperature=2)
        model.save_pretrained(tmp_path)
        loaded = VWLMMForConditionalGeneration.from_pretrained(tmp_path)
        assert loaded.config.visual_word_temperature == 2 and loaded.config.pseudo_image_feature_temperature == 1.0

    def test_placeholder_is_one_past_the_vocabulary(self):
        assert VWLMMConfig().image_token_id == VWLMMConfig().text_config.vocab_size == 32000

    def test_model_from_config_has_new_weights_everywhere(self, model):
        torch.manual_seed(0)
        fresh = VWLMMForConditionalGeneration(model.config)
        for name, value in fresh.named_parameters():
            assert value.isfinite().all(), name
        # A uniform VM head has entropy log C: random weights begin near it.
        words = fresh.get_visual_words(torch.zeros(1, 3, 28, 28), top_k=480).probabilities
        entropy = -(words * words.log()).sum(-1).mean().item()
        assert 0.9 * math.log(480) < entropy <= math.log(480) + 1e-4
