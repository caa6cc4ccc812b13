# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts a checkpoint of LaVIT's authors: decoder, visual tokenizer, the reader's token merger, processor.

    python -m modeling_vwlmm.conversion_lavit path/to/LaVIT path/to/output

The output holds the model, and the whole tokenizer with its decoder in `visual_tokenizer`, or with that of higher
resolution in `visual_tokenizer_highres`, where `source` has them.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.init import normal_
from transformers import AutoConfig, AutoTokenizer, Blip2VisionConfig, GenerationConfig
from transformers.utils import logging

from processing_vwlmm import VWLMMProcessor

from .configuration_vwlmm import VWLMMConfig, VWLMMVisualTokenizerConfig
from .conversion import Weights, check_is_free, complete_folder, read_bin, save_model
from .modeling_vwlmm import VWLMMForConditionalGeneration
from .visual_tokenizer_vwlmm import VWLMMVisualTokenizer


logger = logging.get_logger(__name__)

TOWER = "visual_tokenizer/eva_vitg_psz14.bin"
ENCODER = "visual_tokenizer/tokenizer_encoder.bin"
READER = "language_model/visual_weight.bin"
# Where a tokenizer with a decoder is written, and what the decoder's file is called.
DECODERS = {
    "visual_tokenizer": "visual_tokenizer/tokenizer_decoder.bin",
    "visual_tokenizer_highres": "visual_tokenizer/highres_tokenizer_decoder.bin",
}
# The authors' tensor names, and ours. Of blocks alike in tokenizer, reader and decoders:
BLOCK_NAMES = {
    r"\bblocks\.": "layers.",
    r"\btoken_causal_attn\.": "self_attn.",
    r"\btoken_cross_attn\.": "cross_attn.",
    r"attn\.proj\.": "attn.out_proj.",
    r"attn\.query\.": "attn.q_proj.",
    r"attn\.key\.": "attn.k_proj.",
    r"attn\.value\.": "attn.v_proj.",
    r"\.mlp\.": ".",
}
MERGER_NAMES = BLOCK_NAMES | {r"^causal_encoder\.": "merger.", r"\.ln_vision\.": ".feature_norm."}
ENCODER_NAMES = MERGER_NAMES | {
    r"^token_predictor\.in_conv\.0\.": "selector.norm.",
    r"^token_predictor\.in_conv\.1\.": "selector.in_proj.",
    r"^token_predictor\.out_conv\.0\.": "selector.fc1.",
    r"^token_predictor\.out_conv\.2\.": "selector.fc2.",
    r"^token_predictor\.out_conv\.4\.": "selector.fc3.",
    r"^encode_task_layer\.": "task_layer.",
    r"^quantize\.embedding\.weight$": "quantizer.embedding",
}
READER_NAMES = MERGER_NAMES | {r"^vit_proj\.": "linear."}
DECODER_NAMES = BLOCK_NAMES | {
    r"^decode_task_layer\.": "task_layer.",
    r"^unet_proj\.": "condition_projs.0.",
    r"^unet_proj_(1|2)\.": lambda match: f"condition_projs.{int(match[1]) - 1}.",
    r"^unet_attnpool\.positional_embedding$": "condition_pool.pos_embed",
    r"^unet_attnpool\.c_proj\.": "condition_pool.out_proj.",
    r"^unet_attnpool\.": "condition_pool.",
}
TOWER_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(1|2)\.": r".layer_norm\1.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.attn\.": ".self_attn.",
    r"^norm\.": "post_layernorm.",
}
LANGUAGE_MODEL_NAMES = {r"^model\.": "model.language_model."}
# The tower's classifier, which nothing reads, and a second copy of the tower, which the authors' code reads over.
UNUSED = ("head.", "encoder.", "visual_encoder.")
# Numbers of one attention head: 88 in EVA-CLIP's ViT-g/14, 64 in others. No file says how many heads there are.
HEAD_SIZES = (88, 64, 16)


def convert_lavit_checkpoint(source: str | Path, output: str | Path, num_attention_heads: int | None = None) -> None:
    """
    Converts a checkpoint in the format of LaVIT's authors. Weights of the decoder pass file by file: memory for the
    visual parts and the largest of these files is enough.

    The authors keep patches by a draw, which they do not fix. The model does the same with `config.seed`; set
    `visual_tokenizer_config.selection` to choose otherwise. It has no VM head: the one that is written is random.

    Args:
        source (`str` or `Path`):
            Folder with `visual_tokenizer` and `language_model`.
        output (`str` or `Path`):
            Folder to write. It must not exist or be empty, and is filled only when the conversion is complete.
        num_attention_heads (`int`, *optional*):
            Heads of tower, merger and decoders. By default as many as make heads of 88, else 64, else 16 numbers.

    Raises:
        FileExistsError: If `output` exists and is not empty.
        FileNotFoundError: If `source` lacks a file.
        ValueError: If the tensors are not those of this format, or if a file holds anything but tensors.
    """
    source, output = Path(source), Path(output)
    check_is_free(output)
    for name in (TOWER, ENCODER, READER, "language_model/config.json", "language_model/tokenizer.model"):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source / name} is missing. Pass the folder of a LaVIT checkpoint.")
    tower = _read(source / TOWER, TOWER_NAMES)
    encoder, reader = _read(source / ENCODER, ENCODER_NAMES), _read(source / READER, READER_NAMES)
    _check_names(source, tower, encoder)
    tokenizer_config = _make_tokenizer_config(tower, encoder, num_attention_heads)
    text_config = AutoConfig.from_pretrained(source / "language_model")
    num_codes = tokenizer_config.num_codes
    config = VWLMMConfig(
        vision_config=tokenizer_config.vision_config,
        text_config=text_config,
        vision_feature_layer=tokenizer_config.vision_feature_layer,
        vision_feature_select_strategy="default",
        image_seq_length=tokenizer_config.num_patches,
        adapter="token_merger",
        visual_tokenizer_config=tokenizer_config,
        dtype=text_config.dtype,
    )
    num_text_tokens = len(AutoTokenizer.from_pretrained(source / "language_model"))
    if num_text_tokens != config.image_start_token_id:
        raise ValueError(
            f"{source / ENCODER} has {num_codes} codes, and the language model {text_config.vocab_size} rows: with "
            f"[IMG] and [/IMG] that leaves {config.image_start_token_id} for text, and tokenizer.model has "
            f"{num_text_tokens} tokens. Are these files of one checkpoint?"
        )
    with torch.device("meta"):
        model = VWLMMForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=text_config.bos_token_id, eos_token_id=text_config.eos_token_id, pad_token_id=0
    )
    vm_head = normal_(torch.empty_like(model.model.vm_head.weight, device="cpu"), std=text_config.initializer_range)
    visual = {
        **{f"model.vision_tower.{name}": tensor for name, tensor in tower.items()},
        **{f"model.visual_tokenizer.{name}": tensor for name, tensor in encoder.items()},
        "model.visual_tokenizer.quantizer.idle_steps": torch.zeros(num_codes, dtype=torch.long),
        **{f"model.multi_modal_projector.{name}": tensor for name, tensor in reader.items()},
        "model.vm_head.weight": vm_head,
    }
    expected = model.state_dict()
    _check_shapes(source, visual, {name: expected[name] for name in expected if not _is_text(name)})
    weights = Weights(source / "language_model", LANGUAGE_MODEL_NAMES)
    weights.check({name: tensor for name, tensor in expected.items() if _is_text(name)})
    processor = VWLMMProcessor.from_visual_tokenizer(
        tokenizer_config, source / "language_model", num_text_tokens=config.image_start_token_id
    )

    with complete_folder(output) as incomplete:
        processor.save_pretrained(incomplete)

        def shards() -> Iterator[dict[str, torch.Tensor]]:
            yield {name: _to(tensor, name, config.dtype) for name, tensor in visual.items()}
            yield from weights.shards(config.dtype)

        save_model(model, shards(), 1 + len(weights.files), incomplete)
        for folder, name in DECODERS.items():
            if (source / name).is_file():
                _save_tokenizer(tokenizer_config, tower, encoder, source / name, incomplete / folder)
            else:
                logger.warning(f"{source / name} is missing: {folder} is not written.")


def _read(file: Path, names: dict) -> dict[str, torch.Tensor]:
    """The tensors of a file under our names. Queries, keys and values that stand in one matrix come apart."""
    tensors, unused = {}, []
    for name, tensor in read_bin(file):
        if name.startswith(UNUSED):
            unused.append(name)
            continue
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        if "self_attn.qkv." in name and names is not TOWER_NAMES:
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                tensors[name.replace("qkv", part)] = rows.contiguous()
        else:
            tensors[name] = tensor
    if unused:
        logger.warning(f"{file} has tensors that the authors' code does not read. They are left out: {unused}")
    for name in [name for name in tensors if name.endswith(".q_bias")]:
        if name.replace("q_bias", "v_bias") not in tensors:
            raise ValueError(f"{file} has {name}, and no v_bias beside it. Was it downloaded to its end?")
        # The keys of EVA's attention have no bias.
        q, v = tensors.pop(name), tensors.pop(name.replace("q_bias", "v_bias"))
        tensors[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return tensors


# Of these tensors sizes are read, before all of them are accounted for.
SIZED = {
    TOWER: ("embeddings.patch_embedding.weight", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1.weight"),
    ENCODER: ("quantizer.embedding", "merger.layers.0.fc1.weight"),
}


def _check_names(source: Path, tower: dict[str, torch.Tensor], encoder: dict[str, torch.Tensor]) -> None:
    for file, tensors in ((TOWER, tower), (ENCODER, encoder)):
        for name in SIZED[file]:
            if name not in tensors:
                raise ValueError(
                    f"{source / file} has no tensor that would become {name}. Is it the file of LaVIT's authors, "
                    "downloaded to its end?"
                )


def _make_tokenizer_config(
    tower: dict[str, torch.Tensor], encoder: dict[str, torch.Tensor], num_attention_heads: int | None
) -> VWLMMVisualTokenizerConfig:
    patch_embedding, positions = tower["embeddings.patch_embedding.weight"], tower["embeddings.position_embedding"]
    width, patch_size = patch_embedding.shape[0], patch_embedding.shape[-1]
    num_patches = positions.shape[1] - 1
    heads = num_attention_heads or next((width // size for size in HEAD_SIZES if width % size == 0), None)
    if heads is None:
        raise ValueError(f"No file says how many heads an attention of width {width} has. Pass `num_attention_heads`.")
    num_codes, code_dim = encoder["quantizer.embedding"].shape
    return VWLMMVisualTokenizerConfig(
        vision_config=Blip2VisionConfig(
            hidden_size=width,
            intermediate_size=tower["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count_layers(tower, "encoder."),
            num_attention_heads=heads,
            image_size=round(num_patches**0.5) * patch_size,
            patch_size=patch_size,
            layer_norm_eps=1e-6,
        ),
        num_merger_layers=_count_layers(encoder, "merger."),
        intermediate_size=encoder["merger.layers.0.fc1.weight"].shape[0],
        num_codes=num_codes,
        code_dim=code_dim,
        selection="sample",
        # As the paper's equation 4 has it, and the released modules allow.
        commitment_weight=0.0,
        decoder_selects=False,
    )


def _count_layers(tensors: dict[str, torch.Tensor], prefix: str = "") -> int:
    return 1 + max(int(match[1]) for name in tensors if (match := re.match(rf"{prefix}layers\.(\d+)\.", name)))


def _is_text(name: str) -> bool:
    return name.startswith(("model.language_model.", "lm_head."))


def _check_shapes(where: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{where} has {name} of shape {shapes[0]}, and the rest of the checkpoint asks for {shapes[1]}. Are "
                "these files of one checkpoint?"
            )


def _to(tensor: torch.Tensor, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    # Codes stay as they are: in half precision neighbours would fall together.
    keeps = dtype is None or not tensor.is_floating_point() or name.endswith("quantizer.embedding")
    return (tensor if keeps else tensor.to(dtype)).contiguous()


def _save_tokenizer(
    config: VWLMMVisualTokenizerConfig,
    tower: dict[str, torch.Tensor],
    encoder: dict[str, torch.Tensor],
    file: Path,
    folder: Path,
) -> None:
    """A tokenizer by itself, with its tower and the decoder of a file."""
    decoder = _read(file, DECODER_NAMES)
    pooled = decoder.get("condition_pool.out_proj.weight")
    projections = [decoder[name] for name in sorted(decoder) if re.match(r"condition_projs\.\d+\.weight", name)]
    config = VWLMMVisualTokenizerConfig(
        **{
            **config.to_dict(),
            "num_decoder_layers": _count_layers(decoder),
            "condition_dims": [len(weight) for weight in projections],
            "pooled_condition_dim": None if pooled is None else len(pooled),
        }
    )
    tensors = {
        **{f"vision_tower.{name}": tensor for name, tensor in tower.items()},
        **encoder,
        "quantizer.idle_steps": torch.zeros(config.num_codes, dtype=torch.long),
        **{f"decoder.{name}": tensor for name, tensor in decoder.items()},
    }
    with torch.device("meta"):
        tokenizer = VWLMMVisualTokenizer(config)
    _check_shapes(file, tensors, tokenizer.state_dict())
    tokenizer.load_state_dict(tensors, assign=True)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder with visual_tokenizer and language_model")
    parser.add_argument("output", help="folder to write; it must not exist or be empty")
    parser.add_argument("--num_attention_heads", type=int, help="heads of tower, merger and decoders")
    convert_lavit_checkpoint(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
