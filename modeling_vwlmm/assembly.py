# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Makes a model from parts, a vision tower and an LLM, or from a LLaVA, and a LLaVA from a model. Says what is wrong with
parts that do not fit.
"""

import copy
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import cached_file

from processing_vwlmm.building_vwlmm import count_extra_tokens

from .adapters_vwlmm import make_adapter
from .configuration_vwlmm import VISUAL_WORD_FIELDS, VWLMMConfig, check_fields
from .modeling_vwlmm import VWLMMForConditionalGeneration
from .placeholders_vwlmm import has_embedding
from .visual_tokenizer_vwlmm import VWLMMVisualTokenizer
from .visual_words_vwlmm import VMHead


# Fields of LLaVA's config.json that say what a checkpoint is, and are not passed on to another architecture.
NOT_OF_VWLMM = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
# Fields of ours that LLaVA has no place for.
NOT_OF_LLAVA = (
    "adapter",
    "adapter_config",
    "trained_stages",
    *VISUAL_WORD_FIELDS,
    *NOT_OF_VWLMM,
)
# What readers of weights raise for a file that is cut off, or none of theirs.
UNREADABLE = (UnpicklingError, SafetensorError, RuntimeError, EOFError, IndexError, OSError, struct.error)
# What says where a checkpoint is, for all of its files.
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_vision_text_pretrained(
    cls: type[VWLMMForConditionalGeneration], vision: str | PreTrainedModel, text: str | PreTrainedModel, **config: Any
) -> VWLMMForConditionalGeneration:
    """
    The model that stage I starts from: a pretrained vision tower, a pretrained LLM, a new adapter and VM head.

    Args:
        cls (`type`): Class of the model.
        vision (`str` or `PreTrainedModel`):
            Vision tower: name, path or module. The checkpoint of an image-text model (CLIP, SigLIP) will do.
        text (`str` or `PreTrainedModel`):
            Decoder-only LLM with its head: name, path or module.
        config:
            Fields of [`VWLMMConfig`], such as `vision_feature_layer`, and `dtype` for what is loaded here.

    Returns:
        [`VWLMMForConditionalGeneration`]

    Raises:
        ValueError: If the LLM makes its logits by more than one matrix (a bias, soft-capping, scaling) or has no
            `embed_tokens`, or if the vision tower has other tokens than patches and a class token.
        TypeError: If a keyword is no field of the config.

    Example:

    ```python
    >>> model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
    ...     "openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"
    ... )
    ```
    """
    dtype = config.pop("dtype", "auto")
    check_fields(cls.config_class, config)
    if not isinstance(vision, PreTrainedModel):
        vision_config = AutoConfig.from_pretrained(vision)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        vision = AutoModel.from_pretrained(vision, config=vision_config, dtype=dtype)
    if not isinstance(text, PreTrainedModel):
        text = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
    decoder, lm_head = text.get_decoder(), text.get_output_embeddings()
    _check_parts(vision, text)
    vision.to(text.dtype)

    has_class_token = bool(count_extra_tokens(vision.config))
    config = {
        "vision_feature_select_strategy": "default" if has_class_token else "full",
        "dtype": text.dtype,
        **config,
    }
    keeps_class_token = has_class_token and config["vision_feature_select_strategy"] == "full"
    num_patches = (vision.config.image_size // vision.config.patch_size) ** 2
    config.setdefault("image_seq_length", num_patches + keeps_class_token)
    config = cls.config_class(vision_config=vision.config, text_config=text.config, **config)
    return _assemble(cls, config, vision, decoder, lm_head, generation_config=text.generation_config)


def from_visual_tokenizer(
    cls: type[VWLMMForConditionalGeneration],
    visual_tokenizer: str | VWLMMVisualTokenizer,
    text: str | PreTrainedModel,
    merger_init: str = "tokenizer",
    **config: Any,
) -> VWLMMForConditionalGeneration:
    """
    The model that LaVIT's stage 2 starts from: a trained visual tokenizer with its tower, an LLM with rows for
    `[IMG]`, `[/IMG]` and the codes, and an adapter: by default the reader's token merger.

    The new rows are the mean of the LLM's, with little noise: what a new token means nobody knows yet.

    Args:
        cls (`type`): Class of the model.
        visual_tokenizer (`str` or [`VWLMMVisualTokenizer`]): The tokenizer: name, path or module. It is frozen.
        text (`str` or `PreTrainedModel`): Decoder-only LLM with its head: name, path or module. It is changed.
        merger_init (`str`, *optional*, defaults to `"tokenizer"`):
            How the reader's merger begins: as that of the tokenizer, which has learned to leave out what its codes
            cannot say; or with `"identity"` as the same whose blocks add nothing yet, so that the decoder reads all
            that the tower says of a kept patch.
        config: Fields of [`VWLMMConfig`], such as `adapter="mlp"`, and `dtype` for what is loaded here.

    Returns:
        [`VWLMMForConditionalGeneration`]

    Raises:
        ValueError: For the reasons of [`from_vision_text_pretrained`], if `visual_tokenizer` is no tokenizer, lacks
            tensors or has no threshold yet, or if `merger_init` is neither of the two.
    """
    if merger_init not in ("tokenizer", "identity"):
        raise ValueError(f"`merger_init` is {merger_init!r}; expected 'tokenizer' or 'identity'.")
    dtype = config.pop("dtype", "auto")
    check_fields(cls.config_class, config)
    if not isinstance(visual_tokenizer, PreTrainedModel):
        visual_tokenizer = _load_visual_tokenizer(visual_tokenizer, dtype)
    if not isinstance(text, PreTrainedModel):
        text = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
    tokenizer_config = copy.deepcopy(visual_tokenizer.config)
    if tokenizer_config.selection == "threshold" and tokenizer_config.threshold is None:
        raise ValueError(
            "The visual tokenizer keeps patches by a threshold, and has none: training finds it at its end. Train it, "
            "or set `config.selection` to 'sample' or 'top_k'."
        )
    num_text_tokens = text.config.vocab_size
    _add_rows(text, 2 + tokenizer_config.num_codes)
    config = {"adapter": "token_merger", **config}
    num_tokens = tokenizer_config.num_fixed_tokens if config["adapter"] == "token_merger" else None
    model = from_vision_text_pretrained(
        cls,
        visual_tokenizer.vision_tower,
        text,
        vision_feature_layer=tokenizer_config.vision_feature_layer,
        vision_feature_select_strategy=tokenizer_config.vision_feature_select_strategy,
        image_seq_length=num_tokens or tokenizer_config.num_patches,
        visual_tokenizer_config=tokenizer_config,
        image_start_token_id=num_text_tokens,
        image_end_token_id=num_text_tokens + 1,
        code_offset=num_text_tokens + 2,
        **config,
    )
    parts = {n: t for n, t in visual_tokenizer.state_dict().items() if not n.startswith(("vision_tower.", "decoder."))}
    # In the LLM's dtype, as they would be loaded again; codes alone stay in fp32 there, too.
    parts = {name: part if name.startswith("quantizer.") else part.to(text.dtype) for name, part in parts.items()}
    model.model.visual_tokenizer.load_state_dict(parts, assign=True)
    model.model.freeze_encoders()
    if config["adapter"] == "token_merger":
        merger = model.model.multi_modal_projector.merger
        merger.load_state_dict(visual_tokenizer.merger.state_dict())
        if merger_init == "identity":
            merger.start_as_identity()
    return model


def _load_visual_tokenizer(name: str, dtype: Any) -> VWLMMVisualTokenizer:
    expected = VWLMMVisualTokenizer.config_class.model_type
    found = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if found != expected:
        raise ValueError(
            f"{name} holds a model of the type {found!r}; expected a visual tokenizer, {expected!r}, as LaVIT's stage "
            "1 writes it."
        )
    tokenizer, loading = VWLMMVisualTokenizer.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"The visual tokenizer in {name} is not whole: {len(missing)} of its tensors are missing, {missing[0]} "
            "among them. Name the folder that LaVIT's stage 1 has written."
        )
    return tokenizer


def _add_rows(text: PreTrainedModel, num_rows: int) -> None:
    num_tokens = text.config.vocab_size
    text.resize_token_embeddings(num_tokens + num_rows, mean_resizing=False)
    with torch.no_grad():
        for module in (text.get_input_embeddings(), text.get_output_embeddings()):
            old, new = module.weight[:num_tokens], module.weight[num_tokens:]
            new.copy_(old.mean(dim=0) + torch.randn_like(new) * old.std() / 100)


def from_llava(
    cls: type[VWLMMForConditionalGeneration], name_or_path: str, **kwargs: Any
) -> VWLMMForConditionalGeneration:
    """
    The model that stage III starts from where a LLaVA is at hand: all of it, and a new VM head. With
    `adapter="sa_perceiver"`, VLSA's adapter around the LLaVA's projector, which computes what that does until it is
    trained.

    Args:
        cls (`type`): Class of the model.
        name_or_path (`str`):
            A checkpoint of Transformers' LLaVA architecture, in any layout it has been published in.
        kwargs:
            `adapter` and `adapter_config` of [`VWLMMConfig`], and everything that
            `LlavaForConditionalGeneration.from_pretrained` takes, such as `dtype`.

    Returns:
        [`VWLMMForConditionalGeneration`]

    Raises:
        ValueError: If the checkpoint is of another architecture, its tensors are not those of its config, or the
            adapter has no place for LLaVA's projector.

    Example:

    ```python
    >>> model = VWLMMForConditionalGeneration.from_llava("llava-hf/llava-1.5-7b-hf")
    ```
    """
    of_adapter = {name: kwargs.pop(name) for name in ("adapter", "adapter_config") if name in kwargs}
    llava = load_llava(name_or_path, **kwargs)
    fields = {name: value for name, value in llava.config.to_dict().items() if name not in NOT_OF_VWLMM}
    config = cls.config_class(**fields, **of_adapter, trained_stages=[1, 2])
    return _assemble(
        cls,
        config,
        llava.model.vision_tower,
        llava.model.language_model,
        llava.lm_head,
        _put_projector_into_adapter(llava.model.multi_modal_projector, config),
        generation_config=llava.generation_config,
    )


def _put_projector_into_adapter(projector: LlavaMultiModalProjector, config: VWLMMConfig) -> nn.Module:
    """The adapter of a config, with a LLaVA's projector in its layers of the same names."""
    if config.adapter == "mlp":
        return projector
    with projector.linear_1.weight.device:
        adapter = make_adapter(config)
    if not isinstance(adapter, LlavaMultiModalProjector):
        raise ValueError(
            f"`adapter` is {config.adapter!r}, which has no place for the projector of a LLaVA; expected 'mlp', "
            "'sa_perceiver' or another that is made from it. `from_vision_text_pretrained` makes a model with a new "
            "adapter."
        )
    adapter.load_state_dict(projector.state_dict(), strict=False)
    return adapter


def to_llava(model: VWLMMForConditionalGeneration) -> LlavaForConditionalGeneration:
    """
    A model as Transformers' own LLaVA, the counterpart of [`from_llava`]: all of it but the VM head, and but what
    objectives train beside it. Its logits are the model's, to the last bit.

    LLaVA looks its placeholder up, and so gets a row for it in embedding and head where the model has none: the mean
    of all rows. Its logit is then the mean of all logits, which is never the largest (and its probability at most
    `1 / (C + 1)`), and `generation_config.suppress_tokens` keeps it out of what is generated.

    Args:
        model ([`VWLMMForConditionalGeneration`]): The model. It stays as it is. Tensors are shared with it, but for
            those that get a row: save the LLaVA, or copy it, before either of them is trained.

    Returns:
        `LlavaForConditionalGeneration`, in evaluation mode.

    Raises:
        ValueError: If no LLaVA computes what the model does (pseudo image features, an adapter other than the MLP), or
            if its weights are quantised, sharded or offloaded, or have adapters of PEFT in them.

    Example:

    ```python
    >>> model = VWLMMForConditionalGeneration.from_pretrained("runs/stage4")
    >>> model.to_llava().save_pretrained("runs/llava")
    ```
    """
    _check_becomes_llava(model)
    fields = {name: value for name, value in model.config.to_dict().items() if name not in NOT_OF_LLAVA}
    parts = {
        "vision_config": model.config.vision_config,
        "text_config": model.config.text_config,
        "vision_tower": model.model.vision_tower,
        "language_model": model.model.language_model,
        "multi_modal_projector": model.model.multi_modal_projector,
        "lm_head": model.lm_head,
        "generation_config": model.generation_config,
    }
    # At once, so that modules keep the configs that they share. Parameters are new ones of the same tensors.
    shared = {id(parameter): nn.Parameter(parameter.detach()) for parameter in model.parameters()}
    parts = copy.deepcopy(parts, shared)
    attention = {"": model.config._attn_implementation}
    for name in ("vision_config", "text_config"):
        attention[name] = parts[name]._attn_implementation
        parts[name].name_or_path = fields[name].get("_name_or_path", "")  # no folder of this machine
        fields[name] = parts[name]
    config = LlavaConfig(**fields, attn_implementation=attention)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    expected = llava.state_dict().keys()
    llava.model.vision_tower = parts["vision_tower"]
    llava.model.language_model = parts["language_model"]
    llava.model.multi_modal_projector = parts["multi_modal_projector"]
    llava.lm_head = parts["lm_head"]
    llava.generation_config = parts["generation_config"]
    if unknown := sorted(llava.state_dict().keys() - expected):
        raise ValueError(
            f"The model has {len(unknown)} tensors that LLaVA has no place for, {unknown[0]} among them. Adapters of "
            "PEFT are merged first, `PeftModel.from_pretrained(base_model, adapter).merge_and_unload()`."
        )
    if not has_embedding(model.config):
        _add_placeholder(llava)
    return llava.eval()


def _check_becomes_llava(model: VWLMMForConditionalGeneration) -> None:
    config = model.config
    if config.use_pseudo_image_features:
        raise ValueError(
            "The decoder of this model reads pseudo image features, which are made by the VM head. A LLaVA has none "
            "and reads image features: its answers would be others. Set `model.config.use_pseudo_image_features = "
            "False` if that is what you want."
        )
    if config.adapter != "mlp":
        raise ValueError(f"`adapter` is {config.adapter!r}, and a LLaVA has the adapter 'mlp' alone.")
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "The model is quantised. Load it without `quantization_config`, and quantise the LLaVA when you load that."
        )
    for name, parameter in model.named_parameters():
        # DeepSpeed's ZeRO-3 leaves an empty tensor behind, FSDP2 one that is distributed.
        if parameter.is_meta or hasattr(parameter, "ds_id") or type(parameter.data) is not torch.Tensor:
            raise ValueError(
                f"The weights of the model are not whole in this process, {name} among them: they are sharded or "
                "offloaded. Save the model, and load it in one process without `device_map`."
            )


@torch.no_grad()
def _add_placeholder(llava: LlavaForConditionalGeneration) -> None:
    config, generation_config = llava.config, llava.generation_config
    num_tokens, placeholder = config.text_config.vocab_size, config.image_token_id
    llava.resize_token_embeddings(placeholder + 1, mean_resizing=False)
    for module in (llava.get_input_embeddings(), llava.lm_head):
        module.weight[num_tokens:] = module.weight[:num_tokens].mean(dim=0, dtype=torch.float32)
    added = range(num_tokens, placeholder + 1)
    generation_config.suppress_tokens = [*(generation_config.suppress_tokens or []), *added]


def _assemble(
    cls: type[VWLMMForConditionalGeneration],
    config: VWLMMConfig,
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    lm_head: nn.Linear,
    adapter: nn.Module | None = None,
    *,
    generation_config: GenerationConfig,
) -> VWLMMForConditionalGeneration:
    check_is_dense(config.text_config)
    # Only what is new is made: everything else is built on no device, then put in place.
    with torch.device("meta"):
        model = cls(config)
    with lm_head.weight.device:
        vm_head = VMHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        adapter = make_adapter(config) if adapter is None else adapter
    model.model.vision_tower = vision_tower.requires_grad_(False)
    model.model.language_model = language_model
    model.model.vm_head = vm_head.to(lm_head.weight.dtype)
    model.model.multi_modal_projector = adapter.to(lm_head.weight.dtype)
    model.lm_head = lm_head
    if model.model.visual_tokenizer is not None:
        model.model.visual_tokenizer.borrowed_tower = [vision_tower]
    model.tie_weights()
    model.generation_config = generation_config
    return model.eval()


def check_is_dense(text_config: PreTrainedConfig) -> None:
    """Raises `ValueError` if a decoder shares its tokens out among experts."""
    if hasattr(text_config, "output_router_logits") or getattr(text_config, "num_experts", None):
        raise ValueError(
            f"A decoder of type {text_config.model_type!r} shares its tokens out among experts, whose router needs a "
            "loss of its own, and VW-LMM has none for it. Use a dense LLM, as Llama, Mistral and Qwen3 are."
        )


def _check_parts(vision: PreTrainedModel, text: PreTrainedModel) -> None:
    head, config = text.get_output_embeddings(), text.config
    extras = [
        name
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
        if getattr(config, name, None) not in (None, 1, 1.0)
    ]
    if head.bias is not None:
        extras.append("bias")
    if extras:
        raise ValueError(
            f"The logits of {type(text).__name__} are more than one matrix times the hidden state: its head has "
            f"{', '.join(extras)}. VW-LMM needs an LLM whose head is a matrix alone, as Llama's and Mistral's are."
        )
    if not hasattr(text.get_decoder(), "embed_tokens"):
        raise ValueError(
            f"The decoder of {type(text).__name__} has no `embed_tokens`; VW-LMM needs a decoder built as Llama's is."
        )
    if getattr(vision.config, "num_register_tokens", 0):
        raise ValueError(
            f"{type(vision).__name__} has {vision.config.num_register_tokens} register tokens beside its patches; "
            "VW-LMM needs a vision tower with patches, and a class token at most."
        )


def load_llava(name_or_path: str, **kwargs: Any) -> LlavaForConditionalGeneration:
    """
    A LLaVA of which every tensor was in its checkpoint, and whose checkpoint has no others.

    Args:
        name_or_path (`str`): A checkpoint of Transformers' LLaVA architecture.
        kwargs: Everything else that `LlavaForConditionalGeneration.from_pretrained` takes.

    Raises:
        ValueError: If the checkpoint is of another architecture, if its tensors are not those of its config, or if a
            file is damaged or holds more than tensors.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    config = AutoConfig.from_pretrained(name_or_path, **where)
    if config.model_type != "llava":
        raise ValueError(
            f"{name_or_path} has the model type {config.model_type!r}; expected 'llava', Transformers' LLaVA."
        )
    try:
        llava, loading = LlavaForConditionalGeneration.from_pretrained(
            # Shapes that differ are an error below.
            name_or_path,
            **{**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True},
        )
    except UNREADABLE:
        _find_tensors(name_or_path, **where)  # says which file it is
        raise
    _check_tensors(name_or_path, loading, **where)
    return llava


def _check_tensors(name_or_path: str, loading: dict, **where: Any) -> None:
    if unexpected := sorted(loading["unexpected_keys"]):
        file = next(
            (f for name, f in _find_tensors(name_or_path, **where).items() if name.endswith(unexpected[0])),
            name_or_path,
        )
        raise ValueError(
            f"{file} has tensors that its config.json does not announce, {len(unexpected)} in all, {unexpected[0]} "
            "among them. Expected a layout that Transformers' LLaVA has been published in, and a config.json of these "
            "weights."
        )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{cached_file(name_or_path, 'config.json', **where)} announces {len(missing)} tensors that the weights "
            f"beside it lack, {missing[0]} among them. Is a file of weights missing, or is this the config of another "
            "checkpoint?"
        )
    for name, found, expected in sorted(loading["mismatched_keys"]):
        # Layouts differ in what stands before the module's own path.
        path = re.sub(r"^(model\.)?(language_model|vision_tower)\.", "", name)
        file = next((f for n, f in _find_tensors(name_or_path, **where).items() if n.endswith(path)), name_or_path)
        raise ValueError(
            f"{file} has {name} of shape {tuple(found)}, config.json announces {tuple(expected)}. Is that the "
            "config.json of another checkpoint?"
        )


def _find_tensors(name_or_path: str, **where: Any) -> dict[str, Path]:
    """The file of every tensor, under the name it has there. Raises `ValueError` for a file that cannot be read."""
    folder = Path(cached_file(name_or_path, "config.json", **where)).parent
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with explain_unreadable(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as content:
                    tensors |= dict.fromkeys(content.keys(), file)
            else:
                tensors |= dict.fromkeys(torch.load(file, map_location="meta", weights_only=True), file)
    return tensors


@contextmanager
def explain_unreadable(file: Path) -> Iterator[None]:
    """Raises `ValueError`, with the file and what to do, where a file of weights cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        # What begins neither as a zip file nor as a pickle is another file under this name, such as a Git LFS pointer.
        with file.open("rb") as content:
            is_pickle = content.read(1) in (b"P", b"\x80")
        if isinstance(error, UnpicklingError) and is_pickle:
            raise ValueError(
                f"{file} holds more than tensors, and reading it could run any code. Ask its authors for safetensors."
            ) from error
        reason = "no file of weights" if isinstance(error, UnpicklingError) else str(error) or "empty"
        raise ValueError(f"{file} is damaged ({reason}). Download it again.") from error
