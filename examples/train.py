"""
Trains one stage of VW-LMM on data in LLaVA's format. Every stage is this script with another recipe:

    python examples/train.py --config examples/recipes/small_world/stage1.yaml

    accelerate launch --config_file examples/accelerate_configs/zero2.yaml \
        examples/train.py --config examples/recipes/vicuna_7b/stage1.yaml

Any line of a recipe can be overridden on the command line (`--learning_rate 1e-4`); `--help` lists them all.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate.utils import patch_environment
from check import CheckingReader, check, make_model, make_model_with_tokenizer, make_tokenizer
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.integrations import unset_hf_deepspeed_config
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from modeling_vwlmm import (
    VWLMMConfig,
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    VWLMMVisualTokenizer,
)
from modeling_vwlmm.adapters_vwlmm import ADAPTERS, get_max_patches
from modeling_vwlmm.configuration_vwlmm import VISUAL_WORD_FIELDS
from modeling_vwlmm.training import find_last_checkpoint, tokenize_images
from processing_vwlmm import VWLMMProcessor, add_cognition_alignment, load_llava_dataset, mix_datasets


@dataclass
class ScriptArguments:
    """What to train on, and for stage I what to start from. Later stages start from `model_name_or_path`."""

    json_file: str | None = field(default=None, metadata={"help": "Data in LLaVA's JSON format."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder of the images that the JSON file names."})
    # A string for the command line, which takes JSON.
    datasets: str | None = field(
        default=None,
        metadata={
            "help": "In place of `json_file`, a list of `{json_file: ..., image_folder: ..., weight: ...}`; a weight "
            "is how often each sample is seen in a pass, by default 1."
        },
    )
    # A string for the command line, too.
    cognition_alignment: str | None = field(
        default=None,
        metadata={
            "help": "VLSA: questions on pixels and codebook indices among the others, as `{pixel_share: 0.25, "
            "index_share: 0.25, grid: 8, indices: FILE.npy}`; what is left out is as in `add_cognition_alignment`."
        },
    )
    on_bad_image: str = field(default="raise", metadata={"help": "'raise' or 'skip' samples whose image is broken."})
    vision_tower: str | None = field(default=None, metadata={"help": "Stage I: pretrained vision tower."})
    language_model: str | None = field(default=None, metadata={"help": "Stage I: pretrained LLM."})
    conversation_template: str | None = field(
        default=None,
        metadata={"help": "Stage I: template of conversations, 'vicuna_v1' or 'mistral'; of LaVIT 'lavit'."},
    )
    visual_tokenizer: str | None = field(
        default=None, metadata={"help": "LaVIT's stage 2, to begin with: trained visual tokenizer."}
    )
    visual_tokenizer_config: str | None = field(
        default=None, metadata={"help": "LaVIT's stage 1: fields of VWLMMVisualTokenizerConfig, as a mapping."}
    )
    tokenize_images: bool = field(
        default=False,
        metadata={"help": "LaVIT's stage 2: compute all codes once, before training, as FSDP and ZeRO-3 need."},
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "The adapter of a new model, by default 'mlp', in LaVIT's stage 2 'token_merger'; or of one that "
            "had another."
        },
    )
    # A string for the command line, too.
    adapter_config: str | None = field(
        default=None,
        metadata={"help": "Fields of the adapter, as a mapping, such as `{max_patches: 4}`."},
    )
    merger_init: str = field(
        default="tokenizer",
        metadata={"help": "LaVIT's stage 2, to begin with: 'tokenizer', or 'identity' to add nothing."},
    )
    use_pseudo_image_features: bool | None = field(
        default=None, metadata={"help": "Whether the decoder reads pseudo image features. By default as before."}
    )
    visual_word_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the visual words that stage IV learns. By default as before."}
    )
    pseudo_image_feature_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of the visual words in pseudo image features. By default as before."},
    )
    visual_words_images: list[str] | None = field(
        default=None,
        metadata={"help": "Images whose visual words are drawn while the run goes on, into its folder `figures`."},
    )
    visual_words_steps: int = field(
        default=500, metadata={"help": "Steps between figures of `visual_words_images`. The last step has one, too."}
    )
    check: bool = field(
        default=False, metadata={"help": "A dry run: print what the recipe makes of its data, and train nothing."}
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "With `check`: processes of the run. By default those of this launch."}
    )
    tflops: float | None = field(
        default=None, metadata={"help": "With `check`: TFLOP/s that a device reaches in training, for the time."}
    )


def load_data(script_args: ScriptArguments, seed: int, read: Callable[..., Dataset] = load_llava_dataset) -> Dataset:
    """
    The dataset of a recipe, or its mixture, whose fractions of datasets are drawn by `seed`, as are the questions of
    cognition alignment.
    """
    dataset = _load_mixture(script_args, seed, read)
    options = script_args.cognition_alignment
    if options is None:
        return dataset
    options = _parse_json(options)
    names = {"pixel_share", "index_share", "grid", "indices"}
    if not isinstance(options, dict) or not options.keys() <= names:
        raise ValueError(
            f"`cognition_alignment` is {options!r}, expected a mapping with some of {', '.join(sorted(names))}."
        )
    return add_cognition_alignment(dataset, seed, **options)


def _load_mixture(script_args: ScriptArguments, seed: int, read: Callable[..., Dataset]) -> Dataset:
    on_bad_image, entries = script_args.on_bad_image, script_args.datasets
    if entries is None:
        if script_args.json_file is None or script_args.image_folder is None:
            raise ValueError("Found no data: pass either `datasets` or `json_file` and `image_folder`.")
        return read(script_args.json_file, script_args.image_folder, on_bad_image=on_bad_image)

    if script_args.json_file is not None or script_args.image_folder is not None:
        raise ValueError(
            "Found `datasets` beside `json_file` or `image_folder`: pass either `datasets` or `json_file`."
        )
    entries = _parse_json(entries)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"`datasets` is {entries!r}, expected a list of {{json_file: ..., image_folder: ..., weight: ...}}."
        )
    for entry in entries:
        _check_entry(entry)
    datasets = [read(entry["json_file"], entry["image_folder"], on_bad_image=on_bad_image) for entry in entries]
    return mix_datasets(datasets, [entry.get("weight", 1) for entry in entries], seed)


def _parse_json(value: Any) -> Any:
    """What a string says as JSON; anything else, such as what a recipe has, as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def load_model(
    script_args: ScriptArguments, training_args: VWLMMTrainingArguments, model_args: ModelConfig
) -> tuple[PreTrainedModel, VWLMMProcessor]:
    """What a recipe starts from: a checkpoint, or the parts of a new model."""
    name, text, dtype = model_args.model_name_or_path, script_args.language_model, model_args.dtype or "float32"
    adapter = read_adapter(script_args)
    template = (
        {} if script_args.conversation_template is None else {"chat_template": script_args.conversation_template}
    )
    if name is not None:
        cls = VWLMMVisualTokenizer if training_args.trains_tokenizer else VWLMMForConditionalGeneration
        options = {
            "attn_implementation": model_args.attn_implementation,
            "quantization_config": get_quantization_config(model_args),
        }
        if training_args.trains_tokenizer:
            return cls.from_pretrained(name, dtype=dtype), VWLMMProcessor.from_pretrained(name)
        model = cls.from_pretrained(name, dtype=dtype, **options, **adapter)
        changes = {"max_patches": get_max_patches(model.config)} if adapter else {}
        return model, VWLMMProcessor.from_pretrained(name, **changes)
    if training_args.trains_tokenizer:
        fields = script_args.visual_tokenizer_config or {}
        fields = json.loads(fields) if isinstance(fields, str) else fields
        tokenizer = VWLMMVisualTokenizer.from_vision_pretrained(script_args.vision_tower, dtype=dtype, **fields)
        return tokenizer, VWLMMProcessor.from_visual_tokenizer(tokenizer.config, text, **template)
    if script_args.visual_tokenizer is not None:
        model = VWLMMForConditionalGeneration.from_visual_tokenizer(
            script_args.visual_tokenizer, text, merger_init=script_args.merger_init, dtype=dtype, **adapter
        )
        processor = VWLMMProcessor.from_pretrained(
            script_args.visual_tokenizer, max_patches=get_max_patches(model.config)
        )
        return model, processor
    processor = VWLMMProcessor.from_vision_text_pretrained(
        script_args.vision_tower, text, max_patches=get_max_patches(VWLMMConfig(**adapter)), **template
    )
    model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
        script_args.vision_tower, text, image_token_index=processor.image_token_id, dtype=dtype, **adapter
    )
    return model, processor


def add_image_codes(
    dataset: Dataset, script_args: ScriptArguments, training_args: VWLMMTrainingArguments, name: str | None
) -> Dataset:
    """The dataset with the codes of its images, by the tokenizer that a recipe names, or that of the model `name`."""
    source = name or script_args.visual_tokenizer
    if source is None:
        raise ValueError(
            "`tokenize_images` is set, and there is no tokenizer to make codes of images. Pass `visual_tokenizer`, or "
            "a `model_name_or_path` that has one."
        )
    cls = VWLMMVisualTokenizer if name is None else VWLMMForConditionalGeneration
    with load_whole(training_args):
        model = cls.from_pretrained(source).eval().to(training_args.device)
    tokenizer = model if name is None else model.model.visual_tokenizer
    if tokenizer is None:
        raise ValueError(f"`tokenize_images` is set, and {source} has no visual tokenizer. Leave it out.")
    # Of what makes the codes, so that a run that goes on finds them, and the same data. Other processes wait for one.
    tower = tokenizer.borrowed_tower[0] or tokenizer.vision_tower
    made_of = [dataset._fingerprint, tokenizer.config.to_json_string(), tokenizer.state_dict(), tower.state_dict()]
    with training_args.main_process_first():
        return dataset.map(
            tokenize_images(model, VWLMMProcessor.from_pretrained(source)),
            batched=True,
            batch_size=32,
            new_fingerprint=Hasher.hash(made_of),
            desc="Codes of images",
        )


@contextlib.contextmanager
def load_whole(training_args: VWLMMTrainingArguments) -> Iterator[None]:
    """What is loaded meanwhile is whole in each process, whatever shards the model that trains."""
    unset_hf_deepspeed_config()
    try:
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        if training_args.deepspeed_plugin is not None:
            training_args.deepspeed_plugin.set_deepspeed_weakref()


def read_adapter(script_args: ScriptArguments) -> dict[str, Any]:
    """Fields of the model's config that say which adapter it has, as far as a recipe does."""
    adapter = {} if script_args.adapter is None else {"adapter": script_args.adapter}
    options = _parse_json(script_args.adapter_config)
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"`adapter_config` is {options!r}; expected a mapping, such as {{max_patches: 4}}.")
    if script_args.adapter is not None and script_args.adapter not in ADAPTERS:
        raise ValueError(f"`adapter` is {script_args.adapter!r}; expected one of {', '.join(sorted(ADAPTERS))}.")
    return adapter if options is None else {**adapter, "adapter_config": options}


def read_visual_words(script_args: ScriptArguments) -> Callable[[VWLMMTrainer], TrainerCallback] | None:
    """
    What makes the callback that draws visual words, if a recipe asks for it, before data and weights are read.

    Raises:
        FileNotFoundError: If an image does not exist.
        ImportError: If matplotlib is not installed.
    """
    images = script_args.visual_words_images
    if not images:
        return None
    from modeling_vwlmm.visualization import LogsVisualWords  # an optional dependency

    if missing := [image for image in images if not os.path.isfile(image)]:
        raise FileNotFoundError(f"`visual_words_images` has {', '.join(missing)}; expected paths of image files.")
    return partial(LogsVisualWords, images=images, steps=script_args.visual_words_steps)


def read_config_changes(script_args: ScriptArguments, trains_tokenizer: bool) -> dict[str, Any]:
    """
    Fields of the model's config that a recipe sets, of which any model with an LLM has all.

    Raises:
        ValueError: If a temperature is no finite number above 0, or a visual tokenizer is trained.
    """
    changes = {name: value for name in VISUAL_WORD_FIELDS if (value := getattr(script_args, name)) is not None}
    if changes and trains_tokenizer:
        raise ValueError(
            f"`{'`, `'.join(changes)}` is set, and stage 1 of LaVIT trains a visual tokenizer, which has no visual "
            "words. Leave it out."
        )
    VWLMMConfig(**changes)
    return changes


def _check_entry(entry: dict[str, Any]) -> None:
    needed = {"json_file", "image_folder"}
    if not needed <= entry.keys() <= needed | {"weight"}:
        raise ValueError(
            f"An entry of `datasets` has the keys {sorted(entry)}, expected 'json_file' and 'image_folder', and "
            "where it is not 1 'weight'."
        )


def _check(script_args: ScriptArguments, training_args: VWLMMTrainingArguments, model_args: ModelConfig) -> int:
    """The exit status: 1 if a sample would stop the run."""
    reader = CheckingReader()
    dataset = load_data(script_args, training_args.seed, reader)
    training_args.check_columns(dataset)
    name, parts = model_args.model_name_or_path, (script_args.vision_tower, script_args.language_model)
    adapter = read_adapter(script_args)
    if training_args.trains_tokenizer:
        model = make_tokenizer(name, script_args.vision_tower, _parse_json(script_args.visual_tokenizer_config) or {})
        text = script_args.language_model
        processor = (
            VWLMMProcessor.from_visual_tokenizer(model.config, text)
            if name is None
            else VWLMMProcessor.from_pretrained(name)
        )
    elif name is None and script_args.visual_tokenizer is not None:
        model = make_model_with_tokenizer(script_args.visual_tokenizer, script_args.language_model, **adapter)
        max_patches = get_max_patches(model.config)
        processor = VWLMMProcessor.from_pretrained(script_args.visual_tokenizer, max_patches=max_patches)
    elif name is None:
        template = script_args.conversation_template or "vicuna_v1"
        max_patches = get_max_patches(VWLMMConfig(**adapter))
        processor = VWLMMProcessor.from_vision_text_pretrained(*parts, chat_template=template, max_patches=max_patches)
        model = make_model(name, *parts, processor.image_token_id, **adapter)
    else:
        changes = {"max_patches": get_max_patches(VWLMMConfig.from_pretrained(name, **adapter))} if adapter else {}
        processor = VWLMMProcessor.from_pretrained(name, **changes)
        model = make_model(name, *parts, processor.image_token_id, **adapter)
    num_processes = script_args.num_processes or int(os.environ.get("WORLD_SIZE", 1))
    refused = check(dataset, training_args, processor, model, model_args, reader, num_processes, script_args.tflops)
    return int(refused > 0)


def parse_arguments(
    args: list[str] | None = None,
) -> tuple[ScriptArguments, VWLMMTrainingArguments, ModelConfig]:
    """What the command line, or `args` in its place, and the recipe that it names say."""
    return TrlParser((ScriptArguments, VWLMMTrainingArguments, ModelConfig)).parse_args_and_config(args)


def main(args: list[str] | None = None) -> None:
    """Trains the stage that the command line, or `args` in its place, describes."""
    script_args, training_args, model_args = parse_arguments(args)
    changes = read_config_changes(script_args, training_args.trains_tokenizer)
    make_visual_words = read_visual_words(script_args)
    set_seed(training_args.seed)  # stage I draws adapter and VM head
    if script_args.check:
        sys.exit(_check(script_args, training_args, model_args))
    dataset = load_data(script_args, training_args.seed)
    training_args.check_columns(dataset)  # before any weight is loaded
    if script_args.tokenize_images:
        dataset = add_image_codes(dataset, script_args, training_args, model_args.model_name_or_path)
    model, processor = load_model(script_args, training_args, model_args)
    for name, value in changes.items():
        setattr(model.config, name, value)

    trainer = VWLMMTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        **({} if training_args.trains_tokenizer else {"peft_config": get_peft_config(model_args)}),
    )
    if make_visual_words is not None:
        trainer.add_callback(make_visual_words(trainer))
    # An interrupted run goes on from its last checkpoint that is whole, or from the one that is asked for.
    checkpoint = training_args.resume_from_checkpoint or find_last_checkpoint(training_args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
