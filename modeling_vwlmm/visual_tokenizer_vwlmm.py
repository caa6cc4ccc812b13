# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
LaVIT's dynamic visual tokenizer (arXiv 2309.04669, section 3.1): a token selector keeps some patches of an image, a
token merger moves what the others say into them, and a codebook makes ids of them.

Shapes: `I` images, `N` patches of one image, `C` width of the patch features, `M` tokens, at most, of one image,
`kept` tokens of all images together, `d` size of a code, `K` codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from .codebook_vwlmm import Codebook
from .configuration_vwlmm import VWLMMVisualTokenizerConfig, check_fields
from .vision_vwlmm import FrozenVisionTower, run_vision_tower


# What keeps an attention over nothing finite, as in the authors' code: with all keys masked it is a plain mean.
POLICY_EPS = 1e-6


@dataclass
class VWLMMVisualTokensOutput(ModelOutput):
    """
    What [`VWLMMVisualTokenizer.encode`] returns. Tokens are in the order of images, and of patches in an image.

    selector_log_probs (`torch.Tensor` of shape `[I, N, 2]`):
        Log-probabilities to keep a patch (index 0) and to drop it.
    keep_mask (`torch.BoolTensor` of shape `[I, N]`):
        The patches that are kept.
    merged_features (`torch.Tensor` of shape `[kept, C]`):
        What the merger makes of them.
    projected (`torch.Tensor` of shape `[kept, d]`):
        The same in the space of the codebook, before it is brought to unit length.
    code_ids (`torch.LongTensor` of shape `[kept]`):
        The nearest codes.
    quantized (`torch.Tensor` of shape `[kept, d]`):
        These codes.
    patch_codes (`torch.LongTensor` of shape `[I, N]`):
        The ids in the places of their patches, and -1 where a patch is dropped.
    """

    selector_log_probs: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    merged_features: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    code_ids: torch.Tensor | None = None
    quantized: torch.Tensor | None = None
    patch_codes: torch.Tensor | None = None


@dataclass
class VWLMMVisualTokenizerOutput(ModelOutput):
    """
    What [`VWLMMVisualTokenizer.forward`] returns.

    loss (`torch.Tensor` of shape `()`):
        Equation 4, `reconstruction_loss + ratio_weight * ratio_loss + commitment_weight * commitment_loss`.
    reconstruction_loss (`torch.Tensor` of shape `()`):
        Mean over images and patches of one minus the cosine of a feature and the rebuilt one.
    ratio_loss (`torch.Tensor` of shape `()`):
        Mean over images of `(keep_rate - kept share)²`.
    commitment_loss (`torch.Tensor` of shape `()`):
        Mean over tokens of the squared distance of a token and its code, both of unit length; 0 without codes.
    tokens ([`VWLMMVisualTokensOutput`]):
        What was kept. Without codes `code_ids` and `quantized` are `None`.
    reconstruction (`torch.Tensor` of shape `[I, N, C]`):
        The rebuilt features.
    patch_features (`torch.Tensor` of shape `[I, N, C]`):
        The true ones.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    ratio_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    tokens: VWLMMVisualTokensOutput | None = None
    reconstruction: torch.Tensor | None = None
    patch_features: torch.Tensor | None = None


class TokenSelector(nn.Module):
    """Scores every patch by itself and by the mean of all patches of its image, as DynamicViT does."""

    def __init__(self, config: VWLMMVisualTokenizerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.in_proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, width // 2)
        self.fc2 = nn.Linear(width // 2, width // 4)
        self.fc3 = nn.Linear(width // 4, 2)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Of features `[I, N, C]` the log-probabilities to keep and to drop, `[I, N, 2]`, in fp32."""
        local, pooled = F.gelu(self.in_proj(self.norm(patch_features))).chunk(2, dim=-1)  # [I, N, C / 2]
        pooled = pooled.mean(dim=1, keepdim=True).expand_as(local)  # [I, N, C / 2]
        hidden = F.gelu(self.fc1(torch.cat([local, pooled], dim=-1)))  # [I, N, C / 2]
        return self.fc3(F.gelu(self.fc2(hidden))).log_softmax(dim=-1, dtype=torch.float32)


class PolicyAttention(nn.Module):
    """
    Attention whose mask is a factor of the exponentials, `(e m + ε / N) / (Σ e m + ε)`, and not a term of the logits:
    so a decision to keep a patch has a gradient. The largest logit that is subtracted is that of all keys.
    """

    def __init__(self, config: VWLMMVisualTokenizerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, hidden: torch.Tensor, context: torch.Tensor, policy: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor` of shape `[I, M, C]`): What asks.
            context (`torch.Tensor` of shape `[I, N, C]`): What is asked.
            policy (`torch.Tensor` of shape `[I, M or 1, N]`, *optional*): 1 where a key may be seen, and 0 where not.
        """
        q, k, v = (
            proj(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, states in ((self.q_proj, hidden), (self.k_proj, context), (self.v_proj, context))
        )  # [I, heads, M or N, C / heads]
        if policy is None:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float()  # [I, heads, M, N]
            weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * policy.unsqueeze(1)
            weights = (weights + POLICY_EPS / k.shape[2]) / (weights.sum(dim=-1, keepdim=True) + POLICY_EPS)
            attended = weights.to(v.dtype) @ v
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # [I, M, C]


class Block(GradientCheckpointingLayer):
    """Self-attention, cross-attention and an MLP, each behind its norm and added to what it reads."""

    def __init__(self, config: VWLMMVisualTokenizerConfig) -> None:
        super().__init__()
        self.norm0, self.norm1, self.norm2 = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(3)
        )
        self.self_attn, self.cross_attn = PolicyAttention(config), PolicyAttention(config)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(
        self,
        hidden: torch.Tensor,
        context: torch.Tensor,
        self_policy: torch.Tensor | None,
        cross_policy: torch.Tensor,
    ) -> torch.Tensor:
        """Of `[I, M, C]`, which asks, and `[I, N, C]`, which is asked, the next `[I, M, C]`."""
        normed = self.norm0(hidden)
        hidden = hidden + self.self_attn(normed, normed, self_policy)
        hidden = hidden + self.cross_attn(self.norm1(hidden), context, cross_policy)
        return hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden))))


class TokenMerger(nn.Module):
    """
    Moves what dropped patches say into kept ones: these see each other, the earlier ones, in self-attention, and the
    dropped ones in cross-attention (section 3.1).
    """

    def __init__(self, config: VWLMMVisualTokenizerConfig) -> None:
        super().__init__()
        self.feature_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_merger_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Lets no block add anything yet: what comes out are the features themselves, normalised."""
        for layer in self.layers:
            for linear in (layer.self_attn.out_proj, layer.cross_attn.out_proj, layer.fc2):
                linear.weight.zero_()
                linear.bias.zero_()
        self.norm.reset_parameters()

    def forward(self, patch_features: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patch_features (`torch.Tensor` of shape `[I, N, C]`): Features of all patches.
            policy (`torch.Tensor` of shape `[I, N]`): 1 for kept patches and 0 for dropped ones.

        Returns:
            `torch.Tensor` of shape `[I, N, C]`. Rows of dropped patches mean nothing.
        """
        num_patches = patch_features.shape[1]
        policy = policy.to(patch_features.dtype)
        itself = torch.eye(num_patches, device=policy.device, dtype=policy.dtype)  # [N, N]
        # Every patch sees itself, or a dropped one would see nothing.
        self_policy = (policy.unsqueeze(1) * (1 - itself) + itself).tril()  # [I, N, N]
        cross_policy = 1 - policy.unsqueeze(1)  # [I, 1, N]
        hidden, context = patch_features, self.feature_norm(patch_features)
        for layer in self.layers:
            hidden = layer(hidden, context, self_policy, cross_policy)
        return self.norm(hidden)


class FeatureDecoder(nn.Module):
    """Rebuilds the features of all patches from the tokens of an image: learned queries ask the tokens."""

    def __init__(self, config: VWLMMVisualTokenizerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query_embed = nn.Parameter(torch.zeros(1, config.num_patches, width))
        # By rank among the kept patches, not by place in the image: place has to be in the codes.
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, width))
        self.in_proj = nn.Linear(config.code_dim, width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_decoder_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.condition_projs = nn.ModuleList(nn.Linear(width, size) for size in config.condition_dims)
        self.condition_pool = None if config.pooled_condition_dim is None else AttentionPool(config)

    def forward(self, tokens: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
        """
        Args:
            tokens (`torch.Tensor` of shape `[I, M, d]`): Candidates.
            policy (`torch.Tensor` of shape `[I, M]`): 1 for those that are tokens.

        Returns:
            `torch.Tensor` of shape `[I, N, C]`.
        """
        ranks = policy.detach().round().long().cumsum(dim=1).sub(1).clamp_min(0)  # [I, M]
        context = self.in_proj(tokens.to(self.in_proj.weight.dtype)) + self.pos_embed[0, ranks]  # [I, M, C]
        hidden = self.query_embed.expand(len(tokens), -1, -1)  # [I, N, C]
        for layer in self.layers:
            hidden = layer(hidden, context, None, policy.unsqueeze(1).to(context.dtype))
        return self.task_layer(self.norm(hidden))


class AttentionPool(nn.Module):
    """The mean of the features of an image, with a place of its own, asks them and itself, as in CLIP's ResNets."""

    def __init__(self, config: VWLMMVisualTokenizerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.pos_embed = nn.Parameter(torch.zeros(config.num_patches + 1, config.hidden_size))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.out_proj = nn.Linear(config.hidden_size, config.pooled_condition_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Of features `[I, N, C]` one for each image, `[I, pooled]`."""
        features = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1) + self.pos_embed  # [I, N + 1, C]
        q, k, v = (
            proj(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, states in ((self.q_proj, features[:, :1]), (self.k_proj, features), (self.v_proj, features))
        )  # [I, heads, 1 or N + 1, C / heads]
        pooled = F.scaled_dot_product_attention(q, k, v)  # [I, heads, 1, C / heads]
        return self.out_proj(pooled.transpose(1, 2).flatten(1))


class VWLMMVisualTokenizer(FrozenVisionTower, PreTrainedModel):
    """
    Token selector, token merger, task layer, codebook and decoder on a frozen vision tower.

    A tokenizer that is part of a [`VWLMMForConditionalGeneration`] reads the tower of that model, and has no decoder.

    Args:
        config ([`VWLMMVisualTokenizerConfig`]): Configuration.
        vision_tower (`PreTrainedModel`, *optional*): A tower of someone else's to read, in place of one of its own.
    """

    config: VWLMMVisualTokenizerConfig
    config_class = VWLMMVisualTokenizerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["quantizer.embedding"]

    def __init__(self, config: VWLMMVisualTokenizerConfig, vision_tower: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        # In a list, so that a tower of someone else's is no part of this module.
        self.borrowed_tower = [vision_tower]
        if vision_tower is None:
            self.vision_tower = AutoModel.from_config(config.vision_config).requires_grad_(False)
        self.selector = TokenSelector(config)
        self.merger = TokenMerger(config)
        width = config.hidden_size
        self.task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.code_dim))
        self.quantizer = Codebook(config.num_codes, config.code_dim, config.ema_decay, config.revive_after)
        self.decoder = FeatureDecoder(config) if vision_tower is None else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Through `torch.nn.init`, which Transformers keeps from what has been loaded.
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, FeatureDecoder):
            nn.init.normal_(module.query_embed, std=self.config.initializer_range)
            nn.init.normal_(module.pos_embed, std=self.config.initializer_range)
            # Tokens of unit length have small elements: from these the decoder would be slow to learn anything.
            nn.init.normal_(module.in_proj.weight, std=1.0)
        elif isinstance(module, AttentionPool):
            nn.init.normal_(module.pos_embed, std=self.config.initializer_range)
        elif isinstance(module, Codebook):
            module.reset()

    @classmethod
    def from_vision_pretrained(cls, vision: str | PreTrainedModel, **config: Any) -> "VWLMMVisualTokenizer":
        """
        A tokenizer to train, on a pretrained vision tower.

        Args:
            vision (`str` or `PreTrainedModel`): The tower, or its name or path: CLIP, SigLIP, DINOv2, BLIP-2's EVA ...
            config: What else [`VWLMMVisualTokenizerConfig`] takes, and `dtype`, by default fp32, or `"auto"` for the
                tower's. All but the codes, which stay in fp32, has it: a folder is loaded in one.

        Raises:
            ValueError: If the tower has other tokens than patches and a class token.
            TypeError: If a keyword is no field of the config.
        """
        dtype = config.pop("dtype", torch.float32)
        check_fields(VWLMMVisualTokenizerConfig, config)
        if not isinstance(vision, PreTrainedModel):
            vision_config = AutoConfig.from_pretrained(vision)
            vision_config = getattr(vision_config, "vision_config", vision_config)  # of a whole CLIP or SigLIP
            vision = AutoModel.from_pretrained(vision, config=vision_config)
        # Not a relative import: it would make the file travel with every tokenizer.
        has_class_token = import_module("processing_vwlmm.building_vwlmm").count_extra_tokens(vision.config)
        config = {"vision_feature_select_strategy": "default" if has_class_token else "full", **config}
        model = cls(VWLMMVisualTokenizerConfig(vision_config=vision.config, **config))
        model.vision_tower.load_state_dict(vision.state_dict())
        dtype = vision.dtype if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model.to(dtype).quantizer.float()
        return model

    def freeze_encoders(self) -> None:
        """Freezes the vision tower."""
        if self.borrowed_tower[0] is None:
            self.vision_tower.requires_grad_(False)

    def encode_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The features of the frozen tower that everything here reads, of images `[I, 3, H, W]`: `[I, N, C]`."""
        tower = self.borrowed_tower[0] or self.vision_tower
        with torch.no_grad():
            features, _ = run_vision_tower(tower, self.config, pixel_values.to(tower.dtype))
        return features.to(self.task_layer[0].weight.dtype)

    def select(
        self,
        selector_log_probs: torch.Tensor,
        gumbel_noise: torch.Tensor | None = None,
        selection: str | None = None,
    ) -> torch.Tensor:
        """
        Which patches are kept.

        Args:
            selector_log_probs (`torch.Tensor` of shape `[I, N, 2]`): What the selector says.
            gumbel_noise (`torch.Tensor` of shape `[I, N, 2]`, *optional*): A draw made elsewhere. It decides alone,
                also where an image then keeps nothing.
            selection (`str`, *optional*): In place of that of the config.

        Returns:
            `torch.BoolTensor` of shape `[I, N]`.

        Raises:
            ValueError: If patches are selected by a threshold that no training has found, or noise has another shape.
        """
        if gumbel_noise is not None:
            one_for_all = (1, *selector_log_probs.shape[1:])
            if gumbel_noise.shape not in (selector_log_probs.shape, one_for_all):
                raise ValueError(
                    f"`gumbel_noise` has shape {tuple(gumbel_noise.shape)}; expected "
                    f"{tuple(selector_log_probs.shape)}, two numbers for each patch of each image."
                )
            scores = selector_log_probs + gumbel_noise.to(selector_log_probs)  # [I, N, 2]
            return scores[..., 0] >= scores[..., 1]
        selection = selection or self.config.selection
        keep = selector_log_probs[..., 0]  # [I, N]
        if selection == "top_k":
            return _keep_best(keep, max(round(self.config.keep_rate * keep.shape[1]), 1))
        if selection == "sample":
            generator = torch.Generator().manual_seed(self.config.seed)
            noise = -torch.empty(1, keep.shape[1], 2).exponential_(generator=generator).log()  # [1, N, 2]
            keep_mask = self.select(selector_log_probs, noise)
        elif self.config.threshold is None:
            raise ValueError(
                "Patches are selected by a threshold, and the config has none: training the tokenizer finds it at "
                "its end. Set `config.threshold`, or `config.selection` to 'sample' or 'top_k'."
            )
        else:
            keep_mask = keep.exp() >= self.config.threshold
        if self.config.min_tokens:
            keep_mask = keep_mask | _keep_best(keep, self.config.min_tokens)
        return keep_mask

    def select_patches(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Which patches of features `[I, N, C]` are kept: `torch.BoolTensor` of shape `[I, N]`."""
        with torch.no_grad():
            return self.select(self.selector(patch_features.to(self.task_layer[0].weight.dtype)))

    @torch.no_grad()
    def encode(
        self,
        pixel_values: torch.Tensor | None = None,
        gumbel_noise: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
    ) -> VWLMMVisualTokensOutput:
        """
        Makes codes of images.

        Args:
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.
            gumbel_noise (`torch.Tensor` of shape `[I, N, 2]`, *optional*): Repeats a draw made elsewhere.
            keep_mask (`torch.Tensor` of shape `[I, N]`, *optional*): Which patches to keep, in place of a selection.
            patch_features (`torch.Tensor` of shape `[I, N, C]`, *optional*): What the tower made of the images, in
                place of these.

        Returns:
            [`VWLMMVisualTokensOutput`]
        """
        if patch_features is None:
            patch_features = self.encode_patches(pixel_values)
        patch_features = patch_features.to(self.task_layer[0].weight.dtype)  # [I, N, C]
        log_probs = self.selector(patch_features)  # [I, N, 2]
        if keep_mask is None:
            keep_mask = self.select(log_probs, gumbel_noise)
        keep_mask = keep_mask.to(log_probs.device).bool()
        self._check_keep_mask(keep_mask, patch_features)
        merged = self.merger(patch_features, keep_mask)[keep_mask]  # [kept, C]
        projected = self.task_layer(merged)  # [kept, d]
        code_ids, quantized = self.quantizer(projected)
        patch_codes = torch.full_like(keep_mask, -1, dtype=torch.long).masked_scatter(keep_mask, code_ids)  # [I, N]
        return VWLMMVisualTokensOutput(log_probs, keep_mask, merged, projected, code_ids, quantized, patch_codes)

    @torch.no_grad()
    def decode(
        self, code_ids: torch.Tensor | Sequence[torch.Tensor], keep_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Rebuilds the features of images from their codes.

        Args:
            code_ids (`torch.LongTensor` of shape `[kept]`, or one for each image):
                Codes, of one image unless `keep_mask` says how many each has.
            keep_mask (`torch.Tensor` of shape `[I, N]`, *optional*): The patches that the codes stand for.

        Returns:
            `torch.Tensor` of shape `[I, N, C]`.

        Raises:
            ValueError: If this tokenizer has no decoder, if an id is no code, or if there are more codes than patches
                or not as many as are kept.
        """
        if self.decoder is None:
            raise ValueError(
                "This tokenizer is part of a model and has no decoder. Load the tokenizer that it was made from, or "
                "`visual_tokenizer` in the folder of a converted model, with `VWLMMVisualTokenizer.from_pretrained`."
            )
        if keep_mask is not None:
            lengths = keep_mask.sum(dim=1).tolist()
            if len(code_ids) != sum(lengths):
                raise ValueError(
                    f"There are {len(code_ids)} codes, and `keep_mask` keeps {sum(lengths)} patches; expected one "
                    "code for each, in the order of images and patches."
                )
            code_ids = code_ids.split(lengths)
        elif isinstance(code_ids, torch.Tensor):
            code_ids = [code_ids]
        num_patches, num_codes = self.config.num_patches, self.config.num_codes
        for ids in code_ids:
            if len(ids) > num_patches:
                raise ValueError(f"An image has {len(ids)} codes; expected {num_patches} at most, one for each patch.")
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_codes:
                raise ValueError(
                    f"Codes go from {int(ids.min())} to {int(ids.max())}; expected ids from 0 to {num_codes - 1}. Of "
                    "token ids subtract `config.code_offset`."
                )
        tokens = pad_sequence([self.quantizer.embedding[ids] for ids in code_ids], batch_first=True)  # [I, M, d]
        lengths = torch.tensor([[len(ids)] for ids in code_ids], device=tokens.device)  # [I, 1]
        if not tokens.shape[1]:
            tokens = tokens.new_zeros(len(code_ids), 1, tokens.shape[2])
        policy = (torch.arange(tokens.shape[1], device=tokens.device) < lengths).to(tokens)  # [I, M]
        return self.decoder(tokens, policy)

    @torch.no_grad()
    def get_conditions(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        What the diffusion model of the authors reads in place of a text.

        Args:
            features (`torch.Tensor` of shape `[I, N, C]`): What [`decode`] has rebuilt.

        Returns:
            `prompt_embeds`, `[I, N, sum of condition_dims]`, and `pooled_prompt_embeds`, `[I, pooled_condition_dim]`,
            if there are some.

        Raises:
            ValueError: If the decoder was not trained for a diffusion model.
        """
        if self.decoder is None or not len(self.decoder.condition_projs):
            raise ValueError("This decoder makes features, and no conditions of a diffusion model (`condition_dims`).")
        prompt = torch.cat([proj(features) for proj in self.decoder.condition_projs], dim=-1)
        return prompt, None if self.decoder.condition_pool is None else self.decoder.condition_pool(features)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        gumbel_noise: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        quantize: bool = True,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | VWLMMVisualTokenizerOutput:
        """
        The loss of equation 4. In training patches are kept by a draw, whose decisions have the gradients of the soft
        ones, and the codebook notes which features its codes stand for; [`Codebook.update`] then moves them.

        Args:
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.
            gumbel_noise (`torch.Tensor` of shape `[I, N, 2]`, *optional*): Repeats a draw made elsewhere.
            keep_mask (`torch.Tensor` of shape `[I, N]`, *optional*): Which patches to keep: then the selector does not
                learn.
            patch_features (`torch.Tensor` of shape `[I, N, C]`, *optional*): What the tower made of the images.
            quantize (`bool`, *optional*, defaults to `True`): Whether the decoder reads codes, or what would become
                them.
            num_items_in_batch (`int`, *optional*): Images of the whole optimiser step, to divide by. The commitment
                is then divided by `keep_rate * N` tokens of each, however many there are.

        Returns:
            [`VWLMMVisualTokenizerOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If this tokenizer has no decoder.
        """
        if self.decoder is None:
            raise ValueError("This tokenizer is part of a model and has no decoder to train; train one by itself.")
        config = self.config
        if patch_features is None:
            patch_features = self.encode_patches(pixel_values)  # [I, N, C]
        log_probs = self.selector(patch_features)  # [I, N, 2]
        if keep_mask is not None:
            policy = keep_mask.to(log_probs)  # [I, N]
            # A part of the graph, so that no process waits for gradients that another has.
            policy = policy + 0 * log_probs.sum(dim=-1).exp()
        elif gumbel_noise is not None or self.training:
            if gumbel_noise is None:
                gumbel_noise = -torch.empty_like(log_probs).exponential_().log()
            soft = (log_probs + gumbel_noise.to(log_probs)).softmax(dim=-1)[..., 0]  # [I, N]
            policy = self.select(log_probs, gumbel_noise).to(soft) + (soft - soft.detach())
        else:
            policy = self.select(log_probs).to(log_probs)
        keep_mask = policy.detach() > 0.5
        self._check_keep_mask(keep_mask, patch_features)

        merged = self.merger(patch_features, policy)  # [I, N, C]
        projected = self.task_layer(merged)  # [I, N, d]
        tokens, code_ids, quantized = F.normalize(projected.float(), dim=-1), None, None  # [I, N, d]
        commitment = tokens.new_zeros(())
        num_images = len(patch_features) if num_items_in_batch is None else num_items_in_batch
        if quantize:
            all_ids, codes = self.quantizer(projected)  # [I, N], [I, N, d]
            if self.training:
                self.quantizer.note(tokens[keep_mask], all_ids[keep_mask])
            code_ids, quantized = all_ids[keep_mask], codes[keep_mask]
            distances = (tokens - codes).square().mean(dim=-1)[keep_mask]  # [kept]
            # Of a whole step the tokens are not known, but how many there should be: any cut of it has the same sum.
            aim = config.keep_rate * keep_mask.shape[1]
            commitment = distances.sum() / (len(distances) or 1 if num_items_in_batch is None else num_images * aim)
            tokens = tokens + (codes - tokens).detach()
        decoder_policy = policy if config.decoder_selects else policy.detach()
        reconstruction = self.decoder(tokens, decoder_policy)  # [I, N, C]
        cosine = F.cosine_similarity(reconstruction.float(), patch_features.float(), dim=-1)  # [I, N]
        reconstruction_loss = (1 - cosine).mean(dim=1).sum() / num_images
        ratio_loss = (config.keep_rate - policy.mean(dim=1)).square().sum() / num_images
        return VWLMMVisualTokenizerOutput(
            loss=reconstruction_loss + config.ratio_weight * ratio_loss + config.commitment_weight * commitment,
            reconstruction_loss=reconstruction_loss.detach(),
            ratio_loss=ratio_loss.detach(),
            commitment_loss=commitment.detach(),
            tokens=VWLMMVisualTokensOutput(
                log_probs, keep_mask, merged[keep_mask], projected[keep_mask], code_ids, quantized
            ),
            reconstruction=reconstruction,
            patch_features=patch_features,
        )

    def _check_keep_mask(self, keep_mask: torch.Tensor, patch_features: torch.Tensor) -> None:
        if keep_mask.shape != patch_features.shape[:2]:
            raise ValueError(
                f"`keep_mask` has shape {tuple(keep_mask.shape)}; expected {tuple(patch_features.shape[:2])}, one "
                "value for each patch of each image."
            )


def check_codes(codes: torch.Tensor, shape: tuple[int, ...], num_codes: int, name: str) -> None:
    """
    Checks codes of images, -1 where a patch is dropped. On a GPU not their range: that would wait for the device.

    Raises:
        ValueError: If they have another shape, or one is no code.
    """
    if codes.shape != shape:
        raise ValueError(
            f"`{name}` has shape {tuple(codes.shape)}; expected {tuple(shape)}, a code for each patch of each image, "
            "and -1 where one is dropped."
        )
    if codes.device.type == "cpu" and codes.numel() and not -1 <= codes.min() <= codes.max() < num_codes:
        raise ValueError(
            f"`{name}` goes from {int(codes.min())} to {int(codes.max())}; expected codes from 0 to {num_codes - 1}, "
            "and -1 where a patch is dropped. Of token ids subtract `config.code_offset`."
        )


def _keep_best(scores: torch.Tensor, num_tokens: int) -> torch.Tensor:
    best = scores.topk(min(num_tokens, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)  # [I, N]


VWLMMVisualTokenizer.register_for_auto_class("AutoModel")

__all__ = ["VWLMMVisualTokenizer", "VWLMMVisualTokenizerConfig"]
