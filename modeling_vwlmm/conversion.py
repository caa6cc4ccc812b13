# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts a checkpoint in the format of the authors' code to this one: model, tokenizer, chat template and processor.

    python -m modeling_vwlmm.conversion path/to/VW-LMM-vicuna-7b path/to/output

Or one of this project to Transformers' own LLaVA, for tools that know that:

    python -m modeling_vwlmm.conversion --to-llava path/to/vwlmm path/to/output
"""

import argparse
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from processing_vwlmm import VWLMMProcessor

from .assembly import explain_unreadable
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
# Names of LLaVA's tensors in Transformers, and those under which LLaVAs have been published, which every tool knows.
PUBLISHED_NAMES = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.language_model\.": "language_model.model.",
    r"^model\.multi_modal_projector\.": "multi_modal_projector.",
    r"^model\.vision_tower\.": "vision_tower.",
}
# Towers whose tensors had a prefix of their own then.
PREFIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")
# Buffers that Transformers used to store, and that are computed now.
COMPUTED_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


def convert_official_checkpoint(source: str | Path, output: str | Path, vision_tower: str | None = None) -> None:
    """
    Converts a checkpoint in the authors' format: Vicuna or Mistral, with or without pseudo image features.

    Weights pass file by file: memory for the largest of them is enough.

    Args:
        source (`str` or `Path`):
            Folder with `config.json`, the tokenizer, and the weights as safetensors or `.bin`, sharded or not, with or
            without the vision tower's tensors.
        output (`str` or `Path`):
            Folder to write. It must not exist or be empty, and is filled only when the conversion is complete.
        vision_tower (`str`, *optional*):
            Vision tower: name or path. By default the one that `mm_vision_tower` of the checkpoint names, which is
            looked for in `source` first.

    Raises:
        FileExistsError: If `output` exists and is not empty.
        FileNotFoundError: If `source` lacks `config.json` or a file of weights.
        ValueError: If the checkpoint is not of this format, if its tensors are not those that its config announces, if
            a file is damaged, or if a `.bin` file holds anything but tensors.
    """
    source, output = Path(source), Path(output)
    check_is_free(output)
    official = _read_official_config(source)
    vision_tower = vision_tower or official["mm_vision_tower"]
    if (source / vision_tower).is_dir():
        vision_tower = str(source / vision_tower)

    with torch.device("meta"):
        model = VWLMMForConditionalGeneration(_convert_config(official, vision_tower))
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    weights = Weights(source, KEY_MAPPING)
    expected = model.state_dict()
    tower = {name for name in expected if name.startswith("model.vision_tower.")}
    lacks_vision_tower = tower.isdisjoint(weights.shapes())
    weights.check({name: expected[name] for name in expected if not (lacks_vision_tower and name in tower)})
    processor = VWLMMProcessor.from_vision_text_pretrained(
        vision_tower, str(source), chat_template="mistral" if _is_mistral(official) else "vicuna_v1"
    )
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    with complete_folder(output) as incomplete:
        processor.save_pretrained(incomplete)
        shards, num_shards = weights.shards(model.config.dtype), len(weights.files) + lacks_vision_tower
        if lacks_vision_tower:
            logger.warning_once(f"{source} holds no vision tower: its tensors come from {vision_tower}.")
            shards = chain(shards, [_read_vision_tower(vision_tower, model.config)])
        save_model(model, shards, num_shards, incomplete)


def convert_to_llava(source: str | Path, output: str | Path) -> None:
    """
    Converts a saved VW-LMM to Transformers' own LLaVA, model and processor: see [`modeling_vwlmm.assembly.to_llava`].

    Args:
        source (`str` or `Path`): Folder of a VW-LMM, or its name on the Hub.
        output (`str` or `Path`): Folder to write. It must not exist or be empty, and is filled only when the
            conversion is complete.

    Raises:
        FileExistsError: If `output` exists and is not empty.
        ValueError: If `source` is of another architecture, an adapter of PEFT, or if no LLaVA computes what it does.
    """
    output = Path(output)
    check_is_free(output)
    if (Path(source) / "adapter_config.json").is_file():
        raise ValueError(
            f"{source} holds an adapter of PEFT. Merge it first, `PeftModel.from_pretrained(base_model, adapter)"
            ".merge_and_unload()`, and save the merged model."
        )
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type != VWLMMConfig.model_type:
        raise ValueError(f"{source} has the model type {model_type!r}; expected {VWLMMConfig.model_type!r}, a VW-LMM.")
    llava = VWLMMForConditionalGeneration.from_pretrained(source, dtype="auto").to_llava()
    processor = VWLMMProcessor.from_pretrained(source).to_llava()
    with complete_folder(output) as incomplete:
        # Under the names that `LlavaForConditionalGeneration.save_pretrained` gives, Transformers alone finds a tower.
        llava.save_pretrained(incomplete, state_dict=_rename_published(llava), save_original_format=False)
        processor.save_pretrained(incomplete)


def _rename_published(llava: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    names = dict(PUBLISHED_NAMES)
    if llava.config.vision_config.model_type in PREFIXED_TOWERS:
        names[r"^vision_tower\."] = "vision_tower.vision_model."
    tensors = {}
    for name, tensor in llava.state_dict().items():
        if name == "lm_head.weight" and llava.config.tie_word_embeddings:
            continue
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    return tensors


def check_is_free(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty. Remove it, or choose another output folder.")


@contextmanager
def complete_folder(output: Path) -> Iterator[Path]:
    """A folder to write, which becomes `output`, or fills it where it is there, when everything is in it."""
    output = output.resolve()  # behind a link
    is_there = output.exists()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output if is_there else output.parent, prefix=f".{output.name}-") as folder:
        incomplete = Path(folder) / output.name
        incomplete.mkdir()
        yield incomplete
        if not is_there:
            incomplete.replace(output)
            return
        # It stays what it is: a mounted volume, or the working folder. `config.json` comes last.
        for path in sorted(incomplete.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(output / path.name)


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
    vision_config.name_or_path = vision_tower
    text_config_class = MistralConfig if _is_mistral(official) else LlamaConfig
    fields = {"rope_theta", "rope_scaling", *text_config_class().to_dict()} - {"architectures", "dtype", "model_type"}
    text_config = text_config_class(**{field: official[field] for field in fields if field in official})
    # As Transformers writes it once a model has been loaded.
    vision_config.dtype = text_config.dtype = official.get("torch_dtype")
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


class Weights:
    """The tensors of a checkpoint under our names, of which no more than one file is read at a time."""

    def __init__(self, source: Path, key_mapping: dict[str, str]) -> None:
        self.source, self.key_mapping = source, key_mapping
        for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
            single, index = source / f"{stem}{suffix}", source / f"{stem}{suffix}.index.json"
            if single.is_file():
                self.files = [single]
                return
            if index.is_file():
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                self.files = [source / name for name in names]
                return
        raise FileNotFoundError(
            f"{source} has no weights: expected model.safetensors, pytorch_model.bin, or an index of their shards."
        )

    def shapes(self) -> dict[str, tuple[torch.Size, Path]]:
        """Shape and file of every tensor. The tensors themselves stay on disk."""
        return {name: (tensor.shape, file) for file in self.files for name, tensor in self._read(file)}

    def shards(self, dtype: torch.dtype | None) -> Iterator[dict[str, torch.Tensor]]:
        for file in self.files:
            yield {
                name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
                for name, tensor in self._read(file)
            }

    def check(self, expected: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` unless the tensors are those that the config announces."""
        found = self.shapes()
        missing = expected.keys() - found.keys()
        if missing:
            raise ValueError(
                f"{self.source} lacks {len(missing)} tensors, {min(missing)} among them. Is a shard missing, or is "
                "config.json that of another checkpoint?"
            )
        for name, (shape, file) in found.items():
            if name not in expected:
                raise ValueError(f"{file} has the unknown tensor {name}. Is config.json that of another checkpoint?")
            if shape != expected[name].shape:
                raise ValueError(
                    f"{file} has {name} of shape {tuple(shape)}, config.json announces {tuple(expected[name].shape)}. "
                    "Is that the config.json of another checkpoint?"
                )

    def _read(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, and the index of the checkpoint names it. Download it again.")
        for name, tensor in (_read_safetensors if file.suffix == ".safetensors" else read_bin)(file):
            for pattern, replacement in self.key_mapping.items():
                name = re.sub(pattern, replacement, name)
            if not name.endswith(COMPUTED_BUFFERS):
                yield name, tensor


def _read_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with explain_unreadable(file):
        tensors = safe_open(file, framework="pt")
    with tensors:
        for name in tensors.keys():  # noqa: SIM118 (no dict)
            yield name, tensors.get_tensor(name)


def read_bin(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with explain_unreadable(file):
        # Mapped, not read; only the format from before PyTorch 1.6 is no zip file and cannot be.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{file} has {name}, a {type(tensor).__name__}; expected tensors alone.")
        yield name, tensor


def _read_vision_tower(vision_tower: str, config: VWLMMConfig) -> dict[str, torch.Tensor]:
    tower = AutoModel.from_pretrained(vision_tower, config=config.vision_config, dtype=config.dtype)
    return {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}


def save_model(
    model: VWLMMForConditionalGeneration, shards: Iterator[dict[str, torch.Tensor]], num_shards: int, folder: Path
) -> None:
    """What `save_pretrained` writes, without ever holding all weights."""
    weight_map, total_size = {}, 0
    for number in range(1, num_shards + 1):
        shard = next(shards)
        file = f"model-{number:05}-of-{num_shards:05}.safetensors" if num_shards > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total_size += sum(tensor.nbytes for tensor in shard.values())
        del shard  # before the next one is read
    if num_shards > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    custom_object_save(model, folder, config=model.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a checkpoint in the authors' format, with --to-llava of a VW-LMM")
    parser.add_argument("output", help="folder to write; it must not exist or be empty")
    parser.add_argument("--to-llava", action="store_true", help="make a LLaVA of Transformers from a VW-LMM")
    parser.add_argument("--vision_tower", help="vision tower, by default the one that the checkpoint names")
    args = vars(parser.parse_args())
    if not args.pop("to_llava"):
        convert_official_checkpoint(**args)
    elif args.pop("vision_tower") is None:
        convert_to_llava(**args)
    else:
        parser.error("--vision_tower is for checkpoints in the authors' format; a VW-LMM holds its own.")


if __name__ == "__main__":
    main()
