# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint: `README.md`, with the metadata that the Hub reads."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..adapters_vwlmm import get_max_patches
from ..configuration_vwlmm import VWLMMConfig
from .stages import ADAPTER, DECODER, METHODS, MM_HEAD, STAGES, VISION_TOWER, VM_HEAD


TASK = "image-text-to-text"
TAGS = ["vw-lmm", "visual-words"]
ROMAN = ("", "I", "II", "III", "IV")
MODULES = {
    ADAPTER: "adapter",
    DECODER: "decoder",
    MM_HEAD: "MM head",
    VM_HEAD: "VM head",
    VISION_TOWER: "vision tower",
}


@dataclass(frozen=True)
class Paper:
    """
    Args:
        name (`str`): What its method is called.
        title, url (`str`): Of the paper.
        gist (`str`): What the method does, as the end of a sentence.
    """

    name: str
    title: str
    url: str
    gist: str


PAPERS = {
    "vw-lmm": Paper(
        "VW-LMM",
        "Multi-modal Auto-regressive Modeling via Visual Words",
        "https://arxiv.org/abs/2403.07720",
        "maps every image feature to a probability distribution over the LLM's vocabulary, its visual words",
    ),
    "lavit": Paper(
        "LaVIT",
        "Unified Language-Vision Pretraining with Dynamic Discrete Visual Tokenization",
        "https://arxiv.org/abs/2309.04669",
        "gives an image as many tokens as it needs, and each of them a code that the language model learns to predict",
    ),
    "vlsa": Paper(
        "VLSA",
        "Rethinking Modality Alignment in Multi-Modal Large Language Models",
        "https://openreview.net/forum?id=RLhEGWt94S",
        "reads images of high resolution as a fixed number of tokens, and learns to draw them from these",
    ),
}

TRAINING_HEADING = "## Training procedure"  # as in TRL's cards
# Transformers' cards have such a comment, too: a card without it is no draft any more.
DRAFT = """<!-- Written automatically. Proofread and complete this card, then remove this comment:
examples/push_to_hub.py then keeps your text, a training run into this folder does not. -->"""
TEMPLATE = (
    "---\n{{ card_data }}\n---\n\n"
    + DRAFT
    + """

# {{ name }}

A vision-language model by the method of [{{ paper.title }}]({{ paper.url }}) ({{ paper.name }}), which
{{ paper.gist }}.
{%- if base_model %} It was made from {% for id in base_model -%}
[{{ id }}](https://huggingface.co/{{ id }}){{ "." if loop.last else " and " if loop.revindex == 2 else ", " }}
{%- endfor %}
{%- endif %}

## Usage

{% if library_name == "peft" -%}
An adapter: it needs torch, Transformers, PEFT, Pillow and the checkpoint that it was trained on.
{%- else -%}
The repository carries its own code. It needs torch, Transformers and Pillow.

```python
from transformers import pipeline

vwlmm = pipeline("image-text-to-text", model="{{ repo_id }}", trust_remote_code=True)
messages = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "image.jpg"},  # path or URL of your image
            {"type": "text", "text": "Describe the image."},
        ],
    }
]
print(vwlmm(text=messages, return_full_text=False)[0]["generated_text"])
```

The same with model and processor at hand{{ ", and the visual words of the image" if 3 in stages }}:
{%- endif %}

```python
{% if library_name == "peft" -%}
from peft import PeftModel
{% endif -%}
from transformers import AutoModelForImageTextToText, AutoProcessor

{% if library_name == "peft" -%}
base_id = "{{ base_model[0] if base_model else "BASE CHECKPOINT" }}"  # what the adapter was trained on
base = AutoModelForImageTextToText.from_pretrained(base_id, trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{{ repo_id }}")  # Transformers alone would lose what DoRA adds
processor = AutoProcessor.from_pretrained(base_id, trust_remote_code=True)
{% else -%}
model = AutoModelForImageTextToText.from_pretrained("{{ repo_id }}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{{ repo_id }}", trust_remote_code=True)
{% endif -%}
content = [{"type": "image", "image": "image.jpg"}, {"type": "text", "text": "Describe the image."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
{%- if 3 in stages %}

words = model.get_visual_words(inputs["pixel_values"]{{ patch_boxes }}, top_k=3)  # and probabilities: [images, N, 3]
print(processor.tokenizer.convert_ids_to_tokens(words.token_ids[0, :, 0]))
{%- endif %}
```
{%- if stages %}

## Training stages

| stage | trained |
|---|---|
{%- for title, modules in stages.values() %}
| {{ title }} | {{ modules }} |
{%- endfor %}
{%- endif %}
{%- if results %}

## Results

| dataset | metric | value |
|---|---|---|
{%- for result in results %}
| {{ result.dataset_name }} | {{ result.metric_name or result.metric_type }} | {{ result.metric_value }} |
{%- endfor %}
{%- endif %}
{%- if training_procedure %}

"""
    + TRAINING_HEADING
    + """

{{ training_procedure }}
{%- endif %}

"""
)


def make_model_card(
    config: VWLMMConfig,
    repo_id: str,
    *,
    previous: ModelCard | None = None,
    training_procedure: str | None = None,
    base_model: str | list[str] | None = None,
    tags: Iterable[str] = (),
    eval_results: Iterable[EvalResult] = (),
    **metadata: Any,
) -> ModelCard:
    """
    Makes the model card of a checkpoint. What is not known is left out.

    Args:
        config ([`VWLMMConfig`]): Config of the checkpoint. It says which stages are behind the weights, and what they
            were made from.
        repo_id (`str`): Repository of the checkpoint, for the usage snippets.
        previous (`ModelCard`, *optional*): The card so far. Its metadata stays unless it is given here, and so does
            its text unless it is a draft.
        training_procedure (`str`, *optional*): Text on how the checkpoint was trained. By default that of `previous`.
        base_model (`str` or `list[str]`, *optional*): Ids on the Hub of what the checkpoint was made from. By default
            the ids that the config records: the checkpoint that was trained on, or else the LLM and the vision tower.
        tags (`Iterable[str]`, *optional*): Tags beside our own.
        eval_results (`Iterable[EvalResult]`, *optional*): Results, which become the `model-index`.
        metadata: Other fields of `ModelCardData`, such as `license`, `datasets` and `language`.

    Returns:
        `ModelCard`
    """
    known = {} if previous is None else previous.data.to_dict()
    if base_model is None:
        base_model = known.get("base_model") or find_base_models(config, repo_id)
    name = repo_id.rsplit("/", 1)[-1]
    data = ModelCardData(
        **{
            "library_name": "transformers",
            "pipeline_tag": TASK,
            **known,
            **{field: value for field, value in metadata.items() if value is not None},
            "base_model": as_list(base_model) or None,
            "tags": [*TAGS, *known.get("tags", ()), *tags],
            "trained_stages": config.trained_stages or None,
        }
    )
    eval_results = list(eval_results)
    kept = [old for old in data.eval_results or () if not any(old.is_equal_except_value(new) for new in eval_results)]
    data.eval_results = kept + eval_results or None
    data.model_name = name if data.eval_results else None

    if previous is not None and DRAFT not in previous.text:
        previous.data = data
        return previous
    if training_procedure is None and previous is not None:
        training_procedure = read_training_procedure(previous)
    # An adapter trains weights of its own in place of a stage's modules.
    stages = [] if data.library_name == "peft" else config.trained_stages
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        repo_id=repo_id,
        paper=PAPERS[find_method(config)],
        stages={number: describe_stage(number) for number in stages},
        patch_boxes="" if get_max_patches(config) is None else ', patch_boxes=inputs["patch_boxes"]',
        results=data.eval_results,
        training_procedure=training_procedure,
    )


def find_method(config: VWLMMConfig) -> str:
    """The method of the last stage that a checkpoint was trained in."""
    last = (config.trained_stages or [None])[-1]
    return last.rpartition("-")[0] if isinstance(last, str) else "vw-lmm"


def find_base_models(config: VWLMMConfig, repo_id: str | None = None) -> list[str]:
    """Ids on the Hub of the checkpoint that `config` was loaded from, or else of the LLM and the vision tower."""
    if is_hub_id(config.name_or_path) and config.name_or_path != repo_id:
        return [config.name_or_path]
    return [part.name_or_path for part in (config.text_config, config.vision_config) if is_hub_id(part.name_or_path)]


def is_hub_id(name: str) -> bool:
    """Whether `name` can be `owner/name` on the Hub, and is no folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not os.path.exists(name)


def describe_stage(record: int | str) -> tuple[str, str]:
    """The name of a stage, as `trained_stages` has it, and the modules that it trains."""
    if isinstance(record, str):
        method, _, number = record.rpartition("-")
        stage, name = METHODS[method][int(number)], f"{method} stage {number}"
    else:
        stage, name = STAGES[record], f"stage {ROMAN[record]}"
    return f"{name} ({stage.name})", ", ".join(MODULES[module] for module in stage.trains)


def read_training_procedure(card: ModelCard) -> str:
    """The section of a card, TRL's or ours, on how the checkpoint was trained; empty if it has none."""
    return card.text.partition(f"{TRAINING_HEADING}\n")[2].partition("\n## ")[0].strip()


def read_eval_results(file: str | Path) -> list[EvalResult]:
    """
    Reads results from JSON: objects with the fields of `huggingface_hub.EvalResult`, or what lmms-eval writes.

    Raises:
        ValueError: If `file` is neither.
    """
    content = json.loads(Path(file).read_text())
    try:
        if isinstance(content, list):
            return [EvalResult(**{"task_type": TASK, **entry}) for entry in content]
        return [
            _from_lmms_eval(content, task, name, value)
            for task, values in content["results"].items()
            if task in content["configs"]  # else a group, a mean over tasks
            for name, value in values.items()
            if isinstance(value, int | float) and "_stderr" not in name
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read as results ({type(error).__name__}: {error}). Expected a list of objects with "
            "`dataset_type`, `dataset_name`, `metric_type` and `metric_value`, or the results file of lmms-eval."
        ) from error


def _from_lmms_eval(content: dict, task: str, name: str, value: float) -> EvalResult:
    config, num_samples = content["configs"][task], content["n-samples"][task]
    is_limited = num_samples["effective"] < num_samples["original"]
    return EvalResult(
        task_type=TASK,
        dataset_type=config["dataset_path"] if is_hub_id(config["dataset_path"]) else task,
        dataset_name=task,
        dataset_config=config.get("dataset_name"),
        dataset_split=config.get("test_split"),
        dataset_args={"num_samples": num_samples["effective"]} if is_limited else None,
        metric_type=name.removesuffix(",none"),  # another filter of the answers is another metric
        metric_value=value,
        source_name="lmms-eval",
        source_url="https://github.com/EvolvingLMMs-Lab/lmms-eval",
    )


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
