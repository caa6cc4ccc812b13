# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts a checkpoint in the format of the authors' code to this one: model, tokenizer, chat template and processor.

    python -m modeling_vwlmm.conversion path/to/VW-LMM-vicuna-7b path/to/output
"""

import argparse
import json
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModel, GenerationConfig, LlamaConfig, MistralConfig
from transformers.utils import logging

from processing_vwlmm import VWLMMProcessor

from .configuration_vwlmm import VWLMMConfig
from .modeling_vwlmm import VWLMMForConditionalGeneration


logger = logging.get_logger(__name__)

# The authors' tensor names, and ours.
KEY_MAPPING = {
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^vm_head\.": "model.vm_head.",
}
# Buffers that Transformers used to store, and that are computed now.
COMPUTED_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


def convert_official_checkpoint(source: str | Path, output: str | Path, vision_tower: str | None = None) -> None:
    """
    Converts a checkpoint in the authors' format: Vicuna or Mistral, with or without pseudo image features.

    Args:
        source (`str` or `Path`):
            Folder with `config.json`, the tokenizer, and the weights as safetensors or `.bin`, sharded or not, with or
            without the vision tower's tensors.
        output (`str` or `Path`):
            Folder to write. It must not exist, and appears only when the conversion is complete.
        vision_tower (`str`, *optional*):
            Vision tower: name or path. By default the one that `mm_vision_tower` of the checkpoint names, which is
            looked for in `source` first.

    Raises:
        FileExistsError: If `output` exists.
        FileNotFoundError: If `source` has no `config.json`.
        ValueError: If the checkpoint is not of this format, or its tensors are not those that its config announces.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already. Remove it, or choose another output folder.")
    official = _read_official_config(source)
    vision_tower = vision_tower or official["mm_vision_tower"]
    if (source / vision_tower).is_dir():
        vision_tower = str(source / vision_tower)

    model = _convert_model(source, _convert_config(official, vision_tower), vision_tower)
    processor = VWLMMProcessor.from_vision_text_pretrained(
        vision_tower, str(source), chat_template="mistral" if _is_mistral(official) else "vicuna_v1"
    )
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        incomplete = Path(folder) / output.name
        # Under our names: by default Transformers would put back those it was loaded from.
        model.save_pretrained(incomplete, save_original_format=False)
        processor.save_pretrained(incomplete)
        incomplete.rename(output)


def _read_official_config(source: Path) -> dict:
    file = source / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. Pass the folder of a checkpoint in the authors' format.")
    official = json.loads(file.read_text())
    for field in ("architectures", "mm_vision_tower", "mm_vision_select_layer"):
        if field not in official:
            raise ValueError(f"{file} lacks {field}. Is this a checkpoint of the authors' code?")
    expected = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch"),
        "mm_use_im_start_end": (False,),
        "mm_use_im_patch_token": (False,),
    }
    for field, values in expected.items():
        if official.get(field) not in values:
            raise ValueError(
                f"{file} has {field}={official.get(field)!r}; a VW-LMM checkpoint has "
                f"{' or '.join(map(repr, values))}. Is this a checkpoint of the authors' code?"
            )
    return official


def _is_mistral(official: dict) -> bool:
    return "Mistral" in official["architectures"][0]


def _convert_config(official: dict, vision_tower: str) -> VWLMMConfig:
    vision_config = AutoConfig.from_pretrained(vision_tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    vision_config.name_or_path = ""  # a folder of this machine, which config.json would carry along
    text_config_class = MistralConfig if _is_mistral(official) else LlamaConfig
    fields = {"rope_theta", "rope_scaling", *text_config_class().to_dict()} - {"architectures", "dtype", "model_type"}
    text_config = text_config_class(**{field: official[field] for field in fields if field in official})
    has_class_token = official["mm_vision_select_feature"] == "cls_patch"
    return VWLMMConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_feature_layer=official["mm_vision_select_layer"],
        vision_feature_select_strategy="full" if has_class_token else "default",
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2 + has_class_token,
        use_pseudo_image_features="Pif" in official["architectures"][0],
        trained_stages=[1, 2, 3, 4],
        dtype=official.get("torch_dtype"),
    )


def _convert_model(source: Path, config: VWLMMConfig, vision_tower: str) -> VWLMMForConditionalGeneration:
    model, info = VWLMMForConditionalGeneration.from_pretrained(
        source,
        config=config,
        key_mapping=KEY_MAPPING,
        dtype=config.dtype,
        ignore_mismatched_sizes=True,  # reported below, with the names
        output_loading_info=True,
    )
    vision_tower_keys = {name for name in model.state_dict() if name.startswith("model.vision_tower.")}
    lacks_vision_tower = vision_tower_keys <= info["missing_keys"]
    missing = info["missing_keys"] - (vision_tower_keys if lacks_vision_tower else set())
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith(COMPUTED_BUFFERS)}
    for problem, names in {"lacks": missing, "has unknown": unexpected}.items():
        if names:
            raise ValueError(
                f"{source} {problem} {len(names)} tensors, {sorted(names)[0]} among them. Is a shard missing, or is "
                "config.json that of another checkpoint?"
            )
    for name, shape, expected_shape in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{source} has {name} of shape {tuple(shape)}, its config.json announces {tuple(expected_shape)}. Is that "
            "the config.json of another checkpoint?"
        )
    if lacks_vision_tower:
        logger.warning_once(f"{source} holds no vision tower: its tensors come from {vision_tower}.")
        model.model.vision_tower = AutoModel.from_pretrained(
            vision_tower, config=config.vision_config, dtype=config.dtype
        )
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a checkpoint in the authors' format")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--vision_tower", help="vision tower, by default the one that the checkpoint names")
    convert_official_checkpoint(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
