# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What `inspect_image` says of an image is what the model's own methods and losses say of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_image, tiny_vision
from PIL import Image
from transformers import PersimmonConfig, PersimmonForCausalLM

from modeling_vwlmm import VWLMMForConditionalGeneration, convert_lavit_checkpoint
from modeling_vwlmm.inspection import inspect_image
from modeling_vwlmm.visualization import draw_image, draw_patch, draw_visual_words
from processing_vwlmm import VWLMMProcessor


@pytest.fixture(scope="module")
def inspected(vicuna):
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna, visual_word_temperature=0.5)
    return inspect_image(model, VWLMMProcessor.from_pretrained(vicuna), make_image(3), layers=[0, 1, 3], top_k=4)


def test_words_and_nearest_tokens_are_those_of_the_model(vicuna, processor, inspected):
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna, visual_word_temperature=0.5)
    pixel_values = processor(images=make_image(3), return_tensors="pt")["pixel_values"]
    words = model.get_visual_words(pixel_values, top_k=3)
    top = inspected.get_top_words(3)
    assert torch.equal(top.token_ids, words.token_ids[0])
    torch.testing.assert_close(top.values, words.probabilities[0])
    assert torch.equal(inspected.get_nearest_tokens().token_ids[:, 0], model.get_nearest_tokens(pixel_values)[0])
    assert inspected.grid == (4, 4)


def test_kl_is_the_loss_of_stage_4(vicuna, processor, inspected):
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna, visual_word_temperature=0.5)
    message = {"role": "user", "content": [{"type": "image", "image": make_image(3)}]}
    inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
    outputs = model(**inputs, visual_objective="visual_words")
    torch.testing.assert_close(inspected.get_kl().mean(), outputs.visual_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inspected.get_entropy().mean(), outputs.visual_word_entropy, rtol=1e-4, atol=1e-5)


def test_last_layer_says_what_is_predicted_of_the_next_patch(inspected):
    top = inspected.get_top_predictions(4)
    assert torch.equal(inspected.layer_tokens.token_ids[-1, :-1], top.token_ids[1:])
    torch.testing.assert_close(inspected.layer_tokens.values[-1, :-1], top.values[1:])
    assert not torch.equal(inspected.layer_tokens.token_ids[0], inspected.layer_tokens.token_ids[-1])


def test_image_is_what_the_vision_tower_sees(vicuna):
    model, processor = VWLMMForConditionalGeneration.from_pretrained(vicuna), VWLMMProcessor.from_pretrained(vicuna)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(inspect_image(model, processor, image).image), np.asarray(image))


def test_find_word_sums_the_tokens_that_read_as_it(inspected):
    word = inspected.get_text(int(inspected.get_top_words().token_ids[0, 0]))
    tokens = [token for token in range(480) if inspected.get_text(token) == word]
    torch.testing.assert_close(inspected.find_word(f" {word}"), inspected.visual_words[:, tokens].exp().sum(dim=-1))
    with pytest.raises(ValueError, match="No token reads 'zzzyx'.*tokenizer makes"):
        inspected.find_word("zzzyx")
    torch.testing.assert_close(inspected.find_near(word), inspected.cosines[:, tokens].amax(dim=-1))


def test_each_token_can_be_shown(inspected, make_model_of_words):
    """Gemma has tokens of line breaks; Persian joins letters with a sign of no width; U+202E turns what follows."""
    texts = {
        "\n\n": r"'\n\n'",
        "\t": r"'\t'",
        "\u202e": r"'\u202e'",
        "می\u200cرود": "می\u200cرود",
        "שלום": "שלום",
        "▁": "▁",
    }
    _, processor = make_model_of_words([*texts])
    shown = replace(inspected, tokenizer=processor.tokenizer)
    assert [shown.get_text(processor.tokenizer.convert_tokens_to_ids(token)) for token in texts] == [*texts.values()]
    assert shown.get_text(len(processor.tokenizer) + 5) == f"token {len(processor.tokenizer) + 5}"


def test_patches_of_high_resolution_change_what_is_read(perceiving):
    model = VWLMMForConditionalGeneration.from_pretrained(perceiving)
    processor = VWLMMProcessor.from_pretrained(perceiving)
    image = make_image(3).resize((56, 56))
    inputs = processor(images=image, return_tensors="pt")
    assert len(inputs["pixel_values"]) > 1
    found = inspect_image(model, processor, image)
    assert torch.equal(found.get_top_words().token_ids, model.get_visual_words(**inputs).token_ids[0])
    assert found.image.size == (28, 28)


def test_dropped_image_tokens_say_nothing(tmp_path):
    lavit = tmp_path / "lavit"
    convert_lavit_checkpoint(GOLDEN / "lavit" / "checkpoint", lavit)
    model, processor = VWLMMForConditionalGeneration.from_pretrained(lavit), VWLMMProcessor.from_pretrained(lavit)
    found = inspect_image(model, processor, make_image(5), top_k=2)
    dropped = ~found.keep_mask
    assert dropped.any() and found.keep_mask.any() and not found.has_visual_words
    assert (found.codes[dropped] == -1).all() and (found.codes[found.keep_mask] >= 0).all()
    assert found.get_kl()[dropped].isnan().all() and found.get_entropy()[found.keep_mask].isfinite().all()
    assert (found.get_top_predictions().token_ids[dropped] == -1).all()
    assert (found.layer_tokens.token_ids[:, dropped] == -1).all()
    assert found.get_text(-1) == ""


def test_a_fixed_number_of_tokens_is_shown_in_its_places(tmp_path):
    """With `top_k` a prompt has a placeholder for each token that is kept, and does not say of which patch."""
    lavit = tmp_path / "lavit"
    convert_lavit_checkpoint(GOLDEN / "lavit" / "checkpoint", lavit)
    model, processor = VWLMMForConditionalGeneration.from_pretrained(lavit), VWLMMProcessor.from_pretrained(lavit)
    options = model.model.visual_tokenizer.config
    options.selection, options.keep_rate = "top_k", 0.3
    processor.num_image_tokens = options.num_fixed_tokens
    found = inspect_image(model, processor, make_image(5), layers=[0, 2])
    assert len(found.keep_mask) == 16 and found.keep_mask.sum() == processor.num_image_tokens == 5
    assert (found.codes >= 0).equal(found.keep_mask)
    message = {"role": "user", "content": [{"type": "image", "image": make_image(5)}]}
    inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    assert is_image.sum() == 5
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        predictions = outputs.logits[0, :-1][is_image[1:]].log_softmax(dim=-1)
        layer = model.lm_head(model.model.language_model.norm(outputs.hidden_states[0][0, is_image]))
    torch.testing.assert_close(found.predictions[found.keep_mask], predictions)
    assert torch.equal(
        found.get_nearest_tokens().token_ids[found.keep_mask, 0], model.get_nearest_tokens(inputs["pixel_values"])[0]
    )
    assert torch.equal(found.layer_tokens.token_ids[0, found.keep_mask], layer.topk(5).indices)


def test_a_patch_that_opens_the_sequence_is_not_predicted(make_model_of_words):
    """As with the template `plain`, where the tokenizer writes no BOS (Qwen's)."""
    model, processor = make_model_of_words([*"abcdefgh"])
    processor.chat_template = processor.get_chat_template("plain")
    found = inspect_image(model, processor, make_image(3), top_k=2)
    assert found.predictions[0].isnan().all() and found.predictions[1:].isfinite().all()
    assert found.get_top_predictions(2).token_ids[0].tolist() == [-1, -1]
    assert torch.equal(found.get_top_predictions(2).token_ids[1:], found.layer_tokens.token_ids[-1, :-1])
    assert found.get_kl()[0].isnan() and found.get_kl()[1:].isfinite().all() and found.get_entropy().isfinite().all()
    assert draw_visual_words(found).axes and draw_patch(found, 0, 0, top_k=2).axes


def test_adapters_of_peft_count(vicuna, processor):
    peft = pytest.importorskip("peft")
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
    before = inspect_image(model, processor, make_image(3), layers=())
    config = peft.LoraConfig(target_modules=["v_proj"], exclude_modules=".*vision_tower.*", init_lora_weights=False)
    found = inspect_image(peft.get_peft_model(model, config).eval(), processor, make_image(3), layers=())
    assert torch.equal(found.visual_words, before.visual_words)
    assert not torch.allclose(found.predictions, before.predictions, atol=1e-2)


def test_dropout_does_not_count(vicuna, processor, inspected):
    """As of a model that a trainer leaves behind."""
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna).train()
    model.model.vision_tower.eval()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = inspect_image(model, processor, make_image(3), layers=())
    assert torch.equal(found.predictions, inspected.predictions)
    assert model.training and not model.model.vision_tower.training


def test_without_layers_a_decoder_needs_no_norm(vicuna, processor):
    """Persimmon's has another name."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = PersimmonForCausalLM(PersimmonConfig(vocab_size=480, **size))
    model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
        tiny_vision("clip"), text, image_token_index=processor.image_token_id
    ).eval()
    with pytest.raises(ValueError, match=r"has no `norm` .* Pass `layers=\(\)`"):
        inspect_image(model, processor, make_image(3))
    found = inspect_image(model, processor, make_image(3), layers=())
    assert found.layers == () and found.layer_tokens.token_ids.shape == (0, 16, 5)
    assert found.get_kl().isfinite().all()
    assert draw_image(model, processor, make_image(3)).axes


def test_refusals(vicuna, processor):
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
    with pytest.raises(ValueError, match=r"`layers` has \[9\]; expected numbers from 0 to 3"):
        inspect_image(model, processor, make_image(1), layers=[1, 9])
    with pytest.raises(ValueError, match="`image` is a list of 2; expected one image"):
        inspect_image(model, processor, [make_image(1), make_image(2)])
    with pytest.raises(ValueError, match=r"`top_k` is 481; expected a number from 1 to 480"):
        inspect_image(model, processor, make_image(1), top_k=481)


def test_a_word_for_certain_has_no_entropy(vicuna):
    """Probabilities that are too small for a float are 0, and neither NaN nor a reason for one."""
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna, visual_word_temperature=1e-4)
    found = inspect_image(model, VWLMMProcessor.from_pretrained(vicuna), make_image(3))
    assert (found.visual_words == -torch.inf).any()
    torch.testing.assert_close(found.get_entropy(), torch.zeros(16))
    (words,) = found.get_top_words().token_ids.T  # [N]
    torch.testing.assert_close(found.get_kl(), -found.predictions[range(16), words])
