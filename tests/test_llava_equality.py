# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Without visual words VW-LMM is LLaVA: `LlavaForConditionalGeneration` with the same weights does the same."""

import pytest
import torch
from conftest import make_conversation, make_image
from torch import nn
from torch.testing import assert_close
from transformers import LlavaConfig, LlavaForConditionalGeneration, set_seed

from modeling_vwlmm import VWLMMForConditionalGeneration


IMAGE = 480  # id of the placeholder, one past the vocabulary
INSIDE = 200  # a byte that stands nowhere in the prompts


@pytest.fixture(params=[IMAGE, INSIDE], ids=["past_vocabulary", "inside_vocabulary"])
def image_token_id(request) -> int:
    return request.param


@pytest.fixture
def model(vicuna, image_token_id) -> VWLMMForConditionalGeneration:
    return VWLMMForConditionalGeneration.from_pretrained(vicuna, image_token_index=image_token_id)


@pytest.fixture
def llava(model) -> LlavaForConditionalGeneration:
    config = LlavaConfig(**{**model.config.to_dict(), "model_type": "llava", "auto_map": None})
    llava = LlavaForConditionalGeneration(config).eval()
    if config.image_token_id == IMAGE:
        # LLaVA looks its placeholder up. No logit follows from this row.
        padding_idx = model.get_input_embeddings().padding_idx
        embeddings = nn.Embedding(IMAGE + 1, config.text_config.hidden_size, padding_idx)
        embeddings.weight.data[:IMAGE] = model.get_input_embeddings().weight.data
        llava.set_input_embeddings(embeddings)
    weights = model.state_dict()
    del weights["model.vm_head.weight"]
    if config.image_token_id == IMAGE:
        weights["model.language_model.embed_tokens.weight"] = embeddings.weight.data
    llava.load_state_dict(weights)
    llava.generation_config = model.generation_config
    return llava


@pytest.fixture
def prompts(processor, image_token_id) -> dict:
    """Prompts with one, no and two images, left-padded."""
    conversations = [
        make_conversation((1, "What is the color of the circle?", "")),
        make_conversation((0, "Who?", "")),
        make_conversation((1, "Describe the image.", "A dog."), (1, "Where?", "")),
    ]
    conversations = [conversation[:-1] for conversation in conversations]
    parts = [part for conversation in conversations for message in conversation for part in message["content"]]
    for seed, part in enumerate(part for part in parts if part["type"] == "image"):
        part["image"] = make_image(seed)
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert (inputs["attention_mask"][:, 0] == 0).any()
    assert not (inputs["input_ids"] == INSIDE).any()
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = image_token_id
    return dict(inputs)


@pytest.fixture
def batch(prompts, image_token_id) -> dict:
    labels = prompts["input_ids"].clone()
    labels[:, ::3] = -100
    labels[(prompts["attention_mask"] == 0) | (labels == image_token_id)] = -100
    return {**prompts, "labels": labels}


def test_logits(model, llava, prompts):
    with torch.no_grad():
        ours, theirs = model(**prompts).logits, llava(**prompts).logits
    assert ours.shape == theirs.shape
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_items_in_batch", [None, 37, torch.tensor(1000)])
def test_language_loss_and_gradients(model, llava, batch, num_items_in_batch):
    kwargs = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    ours, theirs = model.train()(**batch, **kwargs), llava.train()(**batch, **kwargs)
    assert_close(ours.loss, theirs.loss, atol=1e-6, rtol=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.pop("model.vm_head.weight") is None
    for name, parameter in llava.named_parameters():
        gradient, expected = gradients.pop(name), parameter.grad
        if name.startswith("model.vision_tower."):  # frozen in every stage of VW-LMM
            expected = None
        assert (gradient is None) == (expected is None), name
        if expected is not None:
            assert_close(gradient, expected[: len(gradient)], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not gradients


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.2},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "beam", "sampling", "sampling_twice", "no_cache"],
)
def test_generations(model, llava, prompts, how):
    generations = []
    for one in (model, llava):
        set_seed(5)
        generations.append(one.generate(**prompts, **how, max_new_tokens=12))
    ours, theirs = generations
    assert torch.equal(ours, theirs)
    assert ours.shape[1] > prompts["input_ids"].shape[1]


def test_a_prompt_alone_continues_as_in_the_batch(model, prompts):
    together = model.generate(**prompts, do_sample=False, max_new_tokens=8)[1, prompts["input_ids"].shape[1] :]
    alone = prompts["input_ids"][1:2, prompts["attention_mask"][1].bool()]
    assert model.generate(input_ids=alone, do_sample=False, max_new_tokens=8)[0, alone.shape[1] :].equal(together)


@pytest.mark.parametrize("image_token_id", [INSIDE], indirect=True)
def test_embeddings_with_pixel_values(model, llava, prompts):
    input_ids = prompts.pop("input_ids")
    with torch.no_grad():
        expected = model(input_ids=input_ids, **prompts).logits
        prompts["inputs_embeds"] = model.get_input_embeddings()(input_ids)
        assert_close(model(**prompts).logits, expected, atol=1e-6, rtol=1e-6)
        assert_close(llava(**prompts).logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("image_token_id", [INSIDE], indirect=True)
def test_generation_from_embeddings_with_pixel_values(model, llava, prompts):
    prompts["inputs_embeds"] = model.get_input_embeddings()(prompts.pop("input_ids")).detach()
    ours, theirs = (one.generate(**prompts, do_sample=False, max_new_tokens=8) for one in (model, llava))
    assert torch.equal(ours, theirs)


def test_generation_from_embeddings_of_text(model, llava, prompts):
    input_ids = prompts["input_ids"][1:2, prompts["attention_mask"][1].bool()]
    embeds = model.get_input_embeddings()(input_ids).detach()
    ours, theirs = (one.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=8) for one in (model, llava))
    assert torch.equal(ours, theirs)


def test_two_forwards_over_one_cache(model, llava, prompts):
    """A second turn with a new image on top of what the first has cached."""
    row = prompts["input_ids"][2:]
    pixel_values = prompts["pixel_values"][1:]
    start = (row[0] == model.config.image_token_id).nonzero()[16].item() - 1
    for one in (model, llava):
        with torch.no_grad():
            whole = one(input_ids=row, pixel_values=pixel_values).logits[:, start:]
            first = one(input_ids=row[:, :start], pixel_values=pixel_values[:1], use_cache=True)
            second = one(
                input_ids=row[:, start:], pixel_values=pixel_values[1:], past_key_values=first.past_key_values
            ).logits
        assert_close(second, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, -1, 2, [-2, -3]])
def test_vision_feature_options(model, llava, layer, strategy, image_token_id):
    if isinstance(layer, list):
        # Several layers stand side by side: the adapter reads that many features.
        for one in (model, llava):
            set_seed(0)
            adapter = one.model.multi_modal_projector
            adapter.linear_1 = nn.Linear(len(layer) * 32, 48)
    tokens = 17 if strategy == "full" else 16
    input_ids = torch.tensor([[1, *[image_token_id] * tokens, 7]])
    options = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    pixel_values = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        ours, theirs = (
            one(input_ids=input_ids, pixel_values=pixel_values, **options).logits for one in (model, llava)
        )
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
