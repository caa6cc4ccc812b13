# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Every adapter with every objective: the step teaches what the objective says it does, or the pair is refused."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import BY_HAND, GOLDEN, make_image, tiny_text, tiny_vision
from datasets import Dataset
from test_reconstruction import awaken

from modeling_vwlmm import (
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    VWLMMVisualTokenizer,
)
from modeling_vwlmm.adapters_vwlmm import ADAPTERS, get_max_patches
from modeling_vwlmm.objectives_vwlmm import OBJECTIVES
from modeling_vwlmm.training.stages import MODULES
from processing_vwlmm import VWLMMProcessor


N = 16  # image tokens of an image
PAGE = Path(__file__).parents[1] / "docs" / "method.md"
# What stands in the table's cells, and what the error says where a pair is refused.
TRAINS = "yes"
REFUSALS = {
    "no: it needs a token for each place": "'token_merger' drops tokens, and `denoiser: per_token` has a token"
}
# Rows of the table that are no name of an objective alone.
VARIANTS = {"reconstruction, per token": "per_token", "reconstruction, SD3": "sd3"}


def read_table() -> dict[tuple[str, str], str]:
    """The table of pairs in docs/method.md: (adapter, objective) to what is said of them."""
    rows = PAGE.read_text().partition("## Any adapter with any objective")[2].partition("\n## ")[0]
    head, _, *body = [
        [cell.strip().replace("`", "") for cell in row.strip("|").split("|")]
        for row in rows.splitlines()
        if row.startswith("|")
    ]
    return {(adapter, name): cell for name, *cells in body for adapter, cell in zip(head[1:], cells, strict=True)}


TABLE = read_table()


@pytest.fixture(scope="module")
def tokenizer():
    """A visual tokenizer that keeps a part of the patches of each image."""
    torch.manual_seed(0)
    tokenizer = VWLMMVisualTokenizer.from_vision_pretrained(
        tiny_vision("clip"),
        vision_feature_layer=-2,
        num_merger_layers=1,
        num_decoder_layers=1,
        num_codes=8,
        code_dim=4,
    )
    with torch.no_grad():
        tokenizer.selector.fc3.weight.mul_(20)
        pixel_values = torch.randn(8, 3, 28, 28)
        probabilities = tokenizer.selector(tokenizer.encode_patches(pixel_values))[..., 0].exp()  # [8, N]
    tokenizer.config.threshold = probabilities.quantile(0.5).item()
    return tokenizer


def make_processor(tokenizer, config) -> VWLMMProcessor:
    """With patches, two to four of each image here, for the adapter that reads them."""
    return VWLMMProcessor.from_visual_tokenizer(
        tokenizer.config, str(GOLDEN / "vicuna"), num_text_tokens=500, max_patches=get_max_patches(config)
    )


@pytest.fixture(scope="module")
def samples():
    """Of one image, two and none."""
    rows = []
    for count in (1, 2, 0, 1):
        content = [*[{"type": "image", "text": None}] * count, {"type": "text", "text": "what is it"}]
        answer = [{"type": "text", "text": "a picture"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        images = [make_image(10 * len(rows) + n) for n in range(count)]
        labels = [[(7 * n + 3 * len(rows)) % 400 for n in range(N)] for _ in images]
        rows.append({"id": str(len(rows)), "messages": messages, "images": images, "image_labels": labels})
    return Dataset.from_list(rows)


def test_table_has_every_pair():
    names = {*OBJECTIVES, *VARIANTS} - {"language", "reconstruction"}
    assert TABLE.keys() == {(adapter, name) for adapter in ADAPTERS for name in names}
    assert set(TABLE.values()) == {TRAINS, *REFUSALS}


def test_options_of_every_objective():
    """The page has them all, under their names."""
    section = PAGE.read_text().partition("### Options of objectives")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \| (?:`(\w+)`|none) \|", section, flags=re.MULTILINE)
    found = {name: set() for name in OBJECTIVES}
    for names, option in rows:
        for name in re.findall(r"\w+", names):
            found[name] |= {option} - {""}
    assert found == {name: set(inspect.signature(objective).parameters) for name, objective in OBJECTIVES.items()}


@pytest.mark.parametrize(("adapter", "name"), TABLE, ids=str)
def test_pair(request, tokenizer, samples, tmp_path, adapter, name):
    options = {"weight": 1.0}
    if name in VARIANTS:
        folder = str(request.getfixturevalue("pipeline"))
        options |= {"vae": folder, "denoiser": folder if VARIANTS[name] == "sd3" else VARIANTS[name]}
    objective = name.partition(",")[0]
    torch.manual_seed(0)
    model = VWLMMForConditionalGeneration.from_visual_tokenizer(
        tokenizer, tiny_text("llama", vocab_size=500), adapter=adapter
    )
    taught = {module for module in OBJECTIVES[objective].teaches if module != "vision_tower"}  # the tokenizer's, too
    args = VWLMMTrainingArguments(
        str(tmp_path),
        stage=2,
        chat_template="vicuna_v1",
        trains=sorted(taught),
        visual_objective={"language": 0, objective: options},
        per_device_train_batch_size=2,
        global_batch_size=4,
        max_steps=1,
        max_length=None,
        **{**BY_HAND, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0},
    )

    def make_trainer():
        processor = make_processor(tokenizer, model.config)
        return VWLMMTrainer(model=model, args=args, train_dataset=samples, processing_class=processor)

    said = TABLE[adapter, name]
    if said in REFUSALS:
        with pytest.raises(ValueError, match=re.escape(REFUSALS[said])):
            make_trainer()
        return
    trainer = make_trainer()
    own = getattr(model, "training_modules", {})
    if objective == "reconstruction":
        awaken(own[objective])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    (logs,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < logs[f"{objective}_loss"] < 100 and "language_loss" not in logs
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    parts = {*(MODULES[module] for module in taught), *(f"training_modules.{module}" for module in own)}
    assert {part for part in parts if any(key.startswith(f"{part}.") for key in changed)} == parts
    assert not [key for key in changed if not key.startswith(tuple(f"{part}." for part in parts))]
