# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Objectives: what text and image positions learn.

An objective names the positions of a batch that it supervises, before the forward and from token ids and labels alone.
After the decoder has run it makes a [`Term`], the sum of its loss over them. Means, weights, accumulation and
processes are applied to all objectives alike, in [`compute_loss`]: `loss = Σ_k weight_k · total_k / count_k`, where
`count_k` counts over the whole optimiser step. The targets of an objective are detached; what else learns from it is
the business of `requires_grad`.

Shapes: `B` batch, `L` sequence length, `I` images, `N` image tokens of one image, `K` positions that an objective
supervises, `D` hidden size of the decoder, `W` width of the tower's patch features, `C` vocabulary size.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import NotRequired

from .loss_vwlmm import linear_row_losses
from .patches_vwlmm import find_snapshots
from .visual_tokenizer_vwlmm import check_codes


class Term(NamedTuple):
    """
    total (`torch.Tensor` of shape `()`):
        Sum of the loss over the supervised positions of this batch. It has no gradient where several objectives share
        one pass of a head, whose gradient is that of their weighted sum.
    count (`int` or `torch.Tensor` of shape `()`):
        Number of these positions.
    metrics (`dict[str, torch.Tensor]`):
        Further sums over these positions, for the logs.
    """

    total: torch.Tensor
    count: int | torch.Tensor
    metrics: dict[str, torch.Tensor]


class HeadRows(NamedTuple):
    """
    What one head over the vocabulary has to predict: tokens, or the distribution that a second head makes. Objectives
    that read the same head share its pass, in which nothing of size `[positions, C]` is ever held.

    head (`torch.Tensor` of shape `[C, D]`):
        Weight of the head that learns.
    hidden (`torch.Tensor` of shape `[K, D]`):
        Its inputs.
    labels (`torch.LongTensor` of shape `[K]`, *optional*):
        The tokens to predict,
    teacher (`torch.Tensor` of shape `[K, D']`, *optional*):
        or the inputs of the head that says what to predict,
    teacher_head (`torch.Tensor` of shape `[C, D']`, *optional*):
        and its weight.
    teacher_entropy, student_entropy (`str`, *optional*):
        Names under which the entropies of the two distributions are logged, in nats.
    teacher_temperature (`float`, *optional*, defaults to 1.0):
        What the teacher's logits are divided by.
    """

    head: torch.Tensor
    hidden: torch.Tensor
    labels: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    teacher_head: torch.Tensor | None = None
    teacher_entropy: str | None = None
    student_entropy: str | None = None
    teacher_temperature: float = 1.0


@dataclass
class ObjectiveInputs:
    """
    What an objective may read.

    model (`VWLMMForConditionalGeneration`):
        The model, with its heads and, from `get_training_module`, what objectives have added.
    batch (`dict[str, torch.Tensor]`):
        `input_ids`, `[B, L]`, and where there are some `labels`, `attention_mask`, `position_ids`, `pixel_values`,
        and the columns that objectives ask for.
    hidden_states (`torch.Tensor` of shape `[B, L, D]`):
        Output `h` of the decoder. Behind a dropped image token stands that of the last one that is kept.
    layers (`Sequence[torch.Tensor]`, *optional*):
        Outputs of all layers, `[B, L, D]` each, if an objective asks for one.
    images ([`VWLMMImageFeaturesOutput`], *optional*):
        What tower and adapter made of the images.
    logits (`torch.Tensor` of shape `[B, L, C]`, *optional*):
        The logits of all positions, if they have been computed anyway.
    supervised_positions ([`SupervisedPositions`], *optional*):
        The positions, if they have been found.
    kwargs (`dict`):
        What `forward` was called with beside its own arguments.
    """

    model: nn.Module
    batch: dict[str, torch.Tensor]
    hidden_states: torch.Tensor
    layers: Sequence[torch.Tensor] | None = None
    images: Mapping[str, Any] | None = None
    logits: torch.Tensor | None = None
    supervised_positions: "SupervisedPositions | None" = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def positions_of(self, objective: "Objective") -> torch.Tensor:
        """
        The positions that an objective supervises, counted through the rows of the batch (`n + L * row`), `[K]`. Of
        one that counts images the indices of images: of all of them, or of none where a batch fills up an epoch.
        """
        if self.supervised_positions is not None:
            return self.supervised_positions["by_objective"][objective.name]
        return _where(objective.positions(self.batch, self.model.config.image_token_id))

    def hidden_before(self, positions: torch.Tensor) -> torch.Tensor:
        """`h_{n-1}`, from which the decoder predicts position `n`: `[K, D]`."""
        return self.hidden_states.flatten(0, 1)[positions.to(self.hidden_states.device) - 1]

    def at_image_tokens(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of what there is one row of for each image token, `[I * N, ...]`, the rows of `positions`: `[K, ...]`."""
        indices = torch.searchsorted(self.supervised_positions["image_tokens"], positions)  # [K]
        indices = indices.clamp(max=max(len(rows) - 1, 0))  # of a position that is no image token, whatever
        return rows[indices.to(rows.device)].to(self.hidden_states.device)

    def image_features_at(self, positions: torch.Tensor) -> torch.Tensor:
        """`x_n`, what the adapter made of the image there: `[K, D]`."""
        if self.images is None:
            return self.hidden_states.new_empty(0, self.hidden_states.shape[-1])
        return self.at_image_tokens(torch.cat(tuple(self.images["image_features"])), positions)


class Objective:
    """
    One supervision. A subclass says `positions` and makes `predict`; its options are the arguments of `__init__`.
    """

    name: ClassVar[str]
    # The modules that can learn from it. If nothing teaches the decoder, it runs without gradients.
    teaches: ClassVar[tuple[str, ...]] = ("adapter", "decoder", "mm_head", "vision_tower")
    # Whether labels in the batch are learned beside it, unless they are asked for.
    beside_language: ClassVar[bool] = True
    # What it reads of a batch beside token ids, labels and images: arguments of `forward`, and columns of a dataset.
    columns: ClassVar[tuple[str, ...]] = ()
    # And what it reads where there is some.
    optional_columns: ClassVar[tuple[str, ...]] = ()
    # Whether its loss and the text's are one mean over the positions of both, and not a mean each.
    counts_with_text: bool = False
    # Whether it learns from the VM head at `config.visual_word_temperature`.
    reads_visual_words: ClassVar[bool] = False
    # Layers of the decoder whose outputs it reads, as indices of `hidden_states`.
    layers: tuple[int, ...] = ()
    # Whether it supervises the images of a batch and no positions: its loss is then a mean over images.
    counts_images: ClassVar[bool] = False
    # Whether it is refused where all that it teaches is frozen. Else its own module may learn alone.
    must_teach: ClassVar[bool] = False
    # Whether a later run goes on with the module that one has trained, which lies beside its checkpoint.
    continues_module: ClassVar[bool] = False

    def positions(self, batch: Mapping[str, Any], image_token_id: int) -> torch.Tensor:
        """
        The positions that it supervises. Nobody asks one that counts images.

        Args:
            batch (`Mapping`): `input_ids` `[B, L]`, and where there are some `labels`, `attention_mask`,
                `position_ids` (0 where one of several samples in a row begins) and the columns that it asks for.
            image_token_id (`int`): Id of the image placeholder.

        Returns:
            `torch.BoolTensor` of shape `[B, L]`.
        """
        raise NotImplementedError

    def predict(self, inputs: ObjectiveInputs) -> Term | HeadRows:
        """The term, or what a head over the vocabulary has to predict, over `inputs.positions_of(self)`."""
        raise NotImplementedError

    def make_modules(self, model: nn.Module) -> nn.Module | None:
        """The module that it trains beside the model's own, if it needs one: for training alone, in no checkpoint."""
        return None

    def collate(
        self, examples: list[dict[str, Any]], processor: Any, image_seq_length: int
    ) -> dict[str, torch.Tensor]:
        """The columns that it asks for, from samples whose images have so many tokens, as tensors of a batch."""
        return {}


def get_supervised_image_positions(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_token_id: int,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The image positions that the decoder predicts, `S_VM`: those with a predecessor that is not padding.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, L]`): Token ids, every image expanded to its placeholders.
        attention_mask (`torch.Tensor` of shape `[B, L]`, *optional*): 0 where `input_ids` is padding.
        image_token_id (`int`): Id of the placeholder.
        position_ids (`torch.LongTensor` of shape `[B, L]`, *optional*): 0 where a sample begins, for several in a row.

    Returns:
        `torch.BoolTensor` of shape `[B, L]`.
    """
    is_supervised = input_ids == image_token_id  # [B, L]
    is_supervised[:, 0] = False
    if attention_mask is not None:
        is_supervised[:, 1:] &= attention_mask[:, :-1].bool()
    if position_ids is not None:
        is_supervised &= position_ids != 0
    return is_supervised


class Language(Objective):
    """Cross-entropy with the text (equation 2 of the paper)."""

    name = "language"

    def positions(self, batch: Mapping[str, Any], image_token_id: int) -> torch.Tensor:
        is_supervised = batch["labels"] != -100  # [B, L]
        is_supervised[:, 0] = False
        return is_supervised

    def predict(self, inputs: ObjectiveInputs) -> Term | HeadRows:
        labels = inputs.batch["labels"]
        if inputs.logits is None:
            positions = inputs.positions_of(self)  # [T]
            targets = labels.flatten()[positions.to(labels.device)].to(inputs.hidden_states.device)  # [T]
            return HeadRows(inputs.model.lm_head.weight, inputs.hidden_before(positions), targets)
        # All logits are there anyway: LLaVA's own loss, to the last digit. Divided by 1, it is a sum.
        total = inputs.model.loss_function(
            logits=inputs.logits,
            labels=labels,
            vocab_size=inputs.model.config.text_config.vocab_size,
            num_items_in_batch=1,
            **inputs.kwargs,
        )
        return Term(total, (labels[:, 1:] != -100).sum(), {})


class ImageObjective(Objective):
    """An objective of the image positions that have something before them to be predicted from."""

    def positions(self, batch: Mapping[str, Any], image_token_id: int) -> torch.Tensor:
        return get_supervised_image_positions(
            batch["input_ids"], batch.get("attention_mask"), image_token_id, batch.get("position_ids")
        )


class VisualWords(ImageObjective):
    """
    Stage IV, `KL(P' ‖ Q)`: the decoder predicts the visual words (equation 6 of the paper), at
    `config.visual_word_temperature`.
    """

    name = "visual_words"
    reads_visual_words = True

    def predict(self, inputs: ObjectiveInputs) -> HeadRows:
        positions = inputs.positions_of(self)  # [V]
        return HeadRows(
            inputs.model.lm_head.weight,
            inputs.hidden_before(positions),
            teacher=inputs.image_features_at(positions).detach(),
            teacher_head=inputs.model.model.vm_head.weight,
            teacher_entropy="visual_word_entropy",
            teacher_temperature=inputs.model.config.visual_word_temperature,
        )


class VMHeadObjective(ImageObjective):
    """Stage III, `KL(Q ‖ P')`: the VM head learns from what the decoder predicts."""

    name = "vm_head"
    teaches = ("vm_head", "adapter", "vision_tower")
    beside_language = False

    def predict(self, inputs: ObjectiveInputs) -> HeadRows:
        positions = inputs.positions_of(self)  # [V]
        return HeadRows(
            inputs.model.model.vm_head.weight,
            inputs.image_features_at(positions),
            teacher=inputs.hidden_before(positions).detach(),
            teacher_head=inputs.model.lm_head.weight,
            student_entropy="visual_word_entropy",
        )


class TokenLabels(ImageObjective):
    """
    Cross-entropy with one given token for each image position, its hard visual word: the column `image_labels`,
    `[images][N]` tokens of a sample (ids or words; digits are an id), and -100 or None where none is given, or None
    for a whole sample.
    """

    name = "token_labels"
    columns = ("image_labels",)

    def positions(self, batch: Mapping[str, Any], image_token_id: int) -> torch.Tensor:
        is_image = batch["input_ids"] == image_token_id  # [B, L]
        labels = batch["image_labels"].flatten()  # [I * N]
        if len(labels) != is_image.sum():
            raise ValueError(
                f"Found {len(labels)} `image_labels` for {int(is_image.sum())} image tokens; expected one for each, "
                "`[images, tokens of an image]`, and -100 where none is given."
            )
        has_label = torch.zeros_like(is_image).masked_scatter(is_image, labels != -100)
        return super().positions(batch, image_token_id) & has_label

    def predict(self, inputs: ObjectiveInputs) -> HeadRows:
        positions = inputs.positions_of(self)
        labels = inputs.at_image_tokens(inputs.batch["image_labels"].flatten(), positions)  # [K]
        return HeadRows(inputs.model.lm_head.weight, inputs.hidden_before(positions), labels)

    def collate(
        self, examples: list[dict[str, Any]], processor: Any, image_seq_length: int
    ) -> dict[str, torch.Tensor]:
        rows = []
        for example in examples:
            labels, num_images = example.get("image_labels"), len(example.get("images") or [])
            if labels is None:  # of a sample without, among others
                labels = [[-100] * image_seq_length] * num_images
            _check_is_list("The `image_labels` of a sample", labels, "a list with one list for each image")
            if len(labels) != num_images:
                raise ValueError(
                    f"There are `image_labels` for {len(labels)} images, and {num_images} images; expected one list "
                    "for each image."
                )
            rows += [self._read(image, image_seq_length, processor) for image in labels]
        return {"image_labels": torch.tensor(rows, dtype=torch.long).reshape(-1, image_seq_length)}  # [I, N]

    @staticmethod
    def _read(image: Sequence[int | str | None], num_tokens: int, processor: Any) -> list[int]:
        _check_is_list("The `image_labels` of an image", image, "a list with one label for each of its tokens")
        if len(image) != num_tokens:
            raise ValueError(
                f"An image has {len(image)} `image_labels`; expected {num_tokens}, one for each of its tokens, and "
                "-100 or None where none is given."
            )
        tokenizer, ids = processor.tokenizer, []
        for label in image:
            if label is None:  # which a column of words has in place of -100
                ids.append(-100)
                continue
            if isinstance(label, str) and re.fullmatch("-?[0-9]+", label):
                label = int(label)  # in a column of words an id is one, too
            if isinstance(label, str):
                # A word inside a text: most tokenizers know it with a mark of the space in front of it.
                forms = tokenizer.convert_tokens_to_ids([f"Ġ{label}", f"▁{label}", label])
                known = [form for form in forms if form not in (None, tokenizer.unk_token_id)]
                if not known or not label:
                    raise ValueError(
                        f"The image label {label!r} is no token of the tokenizer. Give the id of a token, or a word "
                        "that is one."
                    )
                label = known[0]
            elif isinstance(label, bool) or not hasattr(label, "__index__"):  # a tensor would cut 5.7 to 5
                raise ValueError(
                    f"The image label {label!r} is a {type(label).__name__}; expected the id of a token as an "
                    "integer, a word, or -100 or None where none is given."
                )
            if label != -100 and not (0 <= label < len(tokenizer) and label != processor.image_token_id):
                raise ValueError(
                    f"The image label {label} is no id of a token to predict; expected one below {len(tokenizer)}, "
                    f"not the image placeholder's ({processor.image_token_id}), or -100 where none is given."
                )
            ids.append(label)
        return ids


def _check_is_list(name: str, value: Any, expected: str) -> None:
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise ValueError(f"{name} are {value!r}; expected {expected}.")


class Features(ImageObjective):
    """
    The next image feature by regression through a linear head: `x_n` from `h_{n-1}` (figure 2b of the paper; Emu).
    With `shift=False` and a `layer`, the aligned variant (VIRAL): the tower's patch feature of position `n` from the
    output of that layer at `n` itself.

    Args:
        loss (`str`, *optional*, defaults to `"mse"`): `"mse"`, the mean over the elements of a feature, or `"cosine"`,
            one minus the cosine.
        shift (`bool`, *optional*, defaults to `True`): Whether position `n` is predicted from the one before it.
        layer (`int`, *optional*): Index into the decoder's `hidden_states` (0 are the embeddings), with `shift=False`
            alone. By default the last one.

    Raises:
        ValueError: If `loss` is neither, or there is a `layer` beside `shift`.
    """

    name = "features"
    teaches = ("adapter", "decoder", "vision_tower")

    def __init__(self, loss: str = "mse", shift: bool = True, layer: int | None = None) -> None:
        if loss not in ("mse", "cosine"):
            raise ValueError(f"`loss` of `features` is {loss!r}; expected 'mse' or 'cosine'.")
        if shift and layer is not None:
            raise ValueError(
                f"`layer` of `features` is {layer}, and `shift` is true: the next image feature is predicted from the "
                "last layer. Set `shift` to false to align a layer with the tower."
            )
        self.loss = loss
        self.shift = shift
        self.layers = () if shift else (-1 if layer is None else layer,)

    def positions(self, batch: Mapping[str, Any], image_token_id: int) -> torch.Tensor:
        return super().positions(batch, image_token_id) if self.shift else batch["input_ids"] == image_token_id

    def make_modules(self, model: nn.Module) -> nn.Module:
        num_layers = model.config.text_config.num_hidden_layers
        for layer in self.layers:
            if layer not in range(-num_layers - 1, num_layers + 1):
                raise ValueError(
                    f"`layer` of `features` is {layer!r}, and the decoder has {num_layers} layers; expected 0 (the "
                    f"embeddings) to {num_layers}, or counted from the last, -1."
                )
        hidden_size = model.config.text_config.hidden_size
        return nn.Linear(hidden_size, hidden_size if self.shift else model.model.get_patch_feature_size())

    def predict(self, inputs: ObjectiveInputs) -> Term:
        positions, head = inputs.positions_of(self), inputs.model.get_training_module(self.name)
        if self.shift:
            hidden, targets = inputs.hidden_before(positions), inputs.image_features_at(positions)  # [K, D], [K, D]
        else:
            layer = inputs.layers[self.layers[0]].flatten(0, 1)  # [B * L, D]
            hidden = layer[positions.to(layer.device)]  # [K, D]
            patch_features = (
                hidden.new_empty(0, head.out_features) if inputs.images is None else inputs.images["patch_features"]
            )
            targets = inputs.at_image_tokens(patch_features.flatten(0, -2), positions)  # [K, W]
        predicted = head(hidden.to(head.weight.dtype)).float()  # [K, D or W]
        targets = targets.detach().float()
        cosines = F.cosine_similarity(predicted, targets, dim=-1)  # [K]
        losses = 1 - cosines if self.loss == "cosine" else (predicted - targets).square().mean(dim=-1)  # [K]
        return Term(losses.sum(), len(positions), {"features_cosine": cosines.detach().sum()})


class Codes(ImageObjective):
    """
    Cross-entropy with the code of the next image token, which the frozen visual tokenizer makes of the image (LaVIT,
    equation 5), and with `[/IMG]` behind the last: how many tokens an image has is part of what is learned.

    Codes may be computed once, by `dataset.map(tokenize_images(...))`, which writes the column `image_codes`.

    Args:
        learns_end (`bool`, *optional*, defaults to `True`): Whether what stands behind an image is learned, too. Where
            no `[/IMG]` does, that is the next token of the text, which the language loss has already.
        normalization (`str`, *optional*, defaults to `"apart"`): `"apart"`, each loss is a mean over its own
            positions, or `"together"`, one mean over those of text and codes, as LaVIT has it.

    Raises:
        ValueError: If `normalization` is neither.
    """

    name = "codes"
    optional_columns = ("image_codes",)

    def __init__(self, learns_end: bool = True, normalization: str = "apart") -> None:
        if normalization not in ("apart", "together"):
            raise ValueError(f"`normalization` of `codes` is {normalization!r}; expected 'apart' or 'together'.")
        self.learns_end, self.counts_with_text = learns_end, normalization == "together"

    def positions(self, batch: Mapping[str, Any], image_token_id: int) -> torch.Tensor:
        is_supervised = super().positions(batch, image_token_id)  # [B, L]
        if self.learns_end:
            is_image = batch["input_ids"] == image_token_id
            is_supervised[:, 1:] |= is_image[:, :-1] & ~is_image[:, 1:]
        return is_supervised

    def predict(self, inputs: ObjectiveInputs) -> HeadRows:
        config, tokenizer = inputs.model.config, inputs.model.model.visual_tokenizer
        if tokenizer is None:
            raise ValueError(
                "The objective `codes` learns the codes of a visual tokenizer, and the model has none: make it with "
                "`from_visual_tokenizer`."
            )
        positions = inputs.positions_of(self)  # [K]
        targets = inputs.batch["input_ids"].flatten()[positions.to(inputs.batch["input_ids"].device)]  # [K]
        targets = targets.to(inputs.hidden_states.device)
        if inputs.images is not None and len(inputs.images["patch_features"]):
            features = inputs.images["patch_features"]  # [I, N, W]
            if features.shape[1] != tokenizer.config.num_patches:
                raise ValueError(
                    f"The objective `codes` makes codes of {tokenizer.config.num_patches} patches, and finds "
                    f'{features.shape[1]} features an image: those that `selection="top_k"` keeps. Train with '
                    "another selection, and `top_k` afterwards."
                )
            codes, keep_mask = inputs.batch.get("image_codes"), inputs.images.get("keep_mask")  # [I, N] each
            if codes is not None:
                check_codes(codes, features.shape[:2], tokenizer.config.num_codes, "image_codes")
                if keep_mask is None and codes.device.type == "cpu" and (codes < 0).any():
                    raise ValueError(
                        "`image_codes` has patches without a code, -1, and no `keep_mask` says that they are dropped. "
                        "Pass `keep_mask=image_codes >= 0`, too."
                    )
            else:
                codes = inputs.images.get("patch_codes")  # if some images are read as codes
            if codes is None:
                codes = inputs.model.model.find_codes(features, keep_mask)
            is_image = targets == config.image_token_id  # [K]
            codes = inputs.at_image_tokens(codes.flatten(), positions) + config.code_offset  # [K]
            targets = torch.where(is_image, codes, targets)
        return HeadRows(inputs.model.lm_head.weight, inputs.hidden_before(positions), targets)

    def collate(
        self, examples: list[dict[str, Any]], processor: Any, image_seq_length: int
    ) -> dict[str, torch.Tensor]:
        rows = [image for example in examples for image in example.get("image_codes") or []]
        if not rows:
            return {}
        codes = torch.tensor(rows)  # [I, N]
        num_images = sum(len(example.get("images") or []) for example in examples)
        if codes.shape != (num_images, image_seq_length):
            raise ValueError(
                f"There are `image_codes` of shape {tuple(codes.shape)} for {num_images} images of {image_seq_length} "
                "tokens; expected one code for each token, and -1 where it is dropped, as `tokenize_images` writes "
                "them. Every sample of a dataset has them, or none."
            )
        tokenizer = processor.tokenizer
        num_codes = processor.image_token_id - tokenizer.convert_tokens_to_ids(processor.image_end_token) - 1
        if codes.max() >= num_codes or codes.min() < -1:
            raise ValueError(
                f"`image_codes` go from {int(codes.min())} to {int(codes.max())}; expected codes from 0 to "
                f"{num_codes - 1}, and -1 where a token is dropped. Were they written by another tokenizer?"
            )
        return {"image_codes": codes, "keep_mask": codes >= 0}


# Every objective that `visual_objective` may name. A class of your own joins by standing here.
OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (Language, VisualWords, VMHeadObjective, TokenLabels, Features, Codes)
}

# A weight, or a mapping with `weight` and the options of the objective.
Weight = float | Mapping[str, Any]


def parse_objectives(
    visual_objective: str | Mapping[str, Weight] | None, visual_loss_weight: float = 1.0, has_labels: bool = True
) -> tuple[dict[str, Objective], dict[str, float]]:
    """
    The objectives that are asked for, with their weights.

    Args:
        visual_objective (`str` or mapping, *optional*): A name, or names with their weights. In place of a weight
            there may be a mapping with `weight` and the objective's options. `"language"` is named to weigh or, at 0,
            to drop it.
        visual_loss_weight (`float`, *optional*, defaults to 1.0): The weight where `visual_objective` is a name.
        has_labels (`bool`, *optional*, defaults to `True`): Whether there is text to learn.

    Returns:
        Objectives and weights by name. Those of weight 0 are left out.

    Raises:
        ValueError: If a name is unknown, a weight is negative or not finite, or an option does not fit.
    """
    if visual_objective is None or isinstance(visual_objective, str):
        visual_objective = {} if visual_objective is None else {visual_objective: visual_loss_weight}
    if not isinstance(visual_objective, Mapping):
        raise ValueError(
            f"`visual_objective` is {visual_objective!r}; expected a name or a mapping of names to weights. Names are "
            f"{_names()}."
        )
    objectives, weights = {}, {}
    for name, options in visual_objective.items():
        if name not in OBJECTIVES:
            raise ValueError(f"`visual_objective` is {name!r}; expected None, {_names()}.")
        options = dict(options) if isinstance(options, Mapping) else {"weight": options}
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"The weight of `{name}` is {weight!r}; expected a finite number that is not negative.")
        try:
            objectives[name] = OBJECTIVES[name](**options)
        except TypeError as error:
            raise ValueError(f"`{name}` has no such options as {sorted(options)}: {error}") from error
        weights[name] = float(weight)
    beside_language = not objectives or any(objective.beside_language for objective in objectives.values())
    if has_labels and "language" not in objectives and beside_language:
        objectives, weights = {"language": Language(), **objectives}, {"language": 1.0, **weights}
    if not has_labels:
        objectives.pop("language", None)
    objectives = {name: objective for name, objective in objectives.items() if weights[name] > 0}
    return objectives, {name: weights[name] for name in objectives}


def _names() -> str:
    others = [repr(name) for name in OBJECTIVES if name not in ("language", "visual_words", "vm_head")]
    return f"'visual_words' or 'vm_head' of the paper, or one of {', '.join(others)}"


class SupervisedPositions(TypedDict):
    """
    What of a batch is learned, as a mapping that trainers move between devices. A collator finds it on the host; on an
    accelerator the host would have to wait for it.

    by_objective (`dict[str, torch.LongTensor]`):
        The positions that each objective supervises, counted through the rows (`n + num_columns * row`), `[K]`; of
        those that count images the indices of images.
    image_tokens (`torch.LongTensor` of shape `[I * N]`):
        Where the image tokens are, counted in the same way.
    num_columns (`int`):
        Columns that are needed: without text to learn, those up to the last image token. What stands behind it cannot
        reach what is predicted up to it.
    image_rows (`torch.LongTensor` of shape `[I]`, *optional*):
        Where an objective counts images: the rows of `pixel_values` that are whole images, and no patches of one.
    num_padding (`int`, *optional*):
        Positions of the batch that are padding, for the logs.
    """

    by_objective: dict[str, torch.Tensor]
    image_tokens: torch.Tensor
    num_columns: int
    image_rows: NotRequired[torch.Tensor]
    num_padding: NotRequired[int]


def find_supervised_positions(
    objectives: Mapping[str, Objective], batch: Mapping[str, Any], image_token_id: int
) -> SupervisedPositions:
    """
    The positions of a batch that objectives supervise.

    Args:
        objectives (`Mapping[str, Objective]`): As [`parse_objectives`] returns them.
        batch (`Mapping`): What `Objective.positions` reads, and `pixel_values` for who counts images.
        image_token_id (`int`): Id of the image placeholder.
    """
    is_image = batch["input_ids"] == image_token_id  # [B, L]
    by_position = {name: objective for name, objective in objectives.items() if not objective.counts_images}
    masks = {name: objective.positions(batch, image_token_id) for name, objective in by_position.items()}  # [B, L]
    num_columns = is_image.shape[1]
    if "language" not in objectives:
        columns = torch.stack([is_image, *masks.values()]).any(dim=0).any(dim=0).nonzero()  # [columns, 1]
        num_columns = int(columns[-1]) + 1 if len(columns) else 1
    masks = {name: mask[:, :num_columns] for name, mask in masks.items()}
    positions = {name: _where(mask) for name, mask in masks.items()}
    found = {"by_objective": positions, "image_tokens": _where(is_image[:, :num_columns]), "num_columns": num_columns}
    if len(by_position) < len(objectives):
        found["image_rows"] = find_image_rows(batch.get("pixel_values"), batch.get("patch_boxes"))  # [I]
        images = torch.arange(len(found["image_rows"]), device=found["image_rows"].device)  # [I]
        found["by_objective"] = {name: positions.get(name, images) for name in objectives}
    return found


def find_image_rows(pixel_values: torch.Tensor | None, patch_boxes: torch.Tensor | None = None) -> torch.Tensor:
    """
    The rows of `pixel_values` that are whole images.

    Args:
        pixel_values (`torch.Tensor` of shape `[rows, 3, H, W]`, *optional*): Preprocessed images and patches of them.
        patch_boxes (`torch.Tensor` of shape `[rows, 4]`, *optional*): Where in its image each row lies, zeros for the
            whole of it. Without, every row is an image.

    Returns:
        `torch.LongTensor` of shape `[I]`.

    Raises:
        ValueError: If there are not as many boxes as rows.
    """
    if pixel_values is None:
        return torch.empty(0, dtype=torch.long)
    if patch_boxes is None:
        return torch.arange(len(pixel_values), device=pixel_values.device)
    if len(patch_boxes) != len(pixel_values):
        raise ValueError(
            f"`patch_boxes` has {len(patch_boxes)} rows, and `pixel_values` {len(pixel_values)}; expected one box for "
            "each. Pass both as the processor has made them."
        )
    return _where(find_snapshots(patch_boxes))


def leave_out_dropped(
    positions: SupervisedPositions, keep_mask: torch.Tensor | None, objectives: Mapping[str, Objective]
) -> SupervisedPositions:
    """The positions without those of image tokens that are dropped: `keep_mask`, `[I, N]`, is false there."""
    if keep_mask is None or not len(keep_mask):
        return positions
    image_tokens = positions["image_tokens"]
    dropped = image_tokens[~keep_mask.flatten().to(image_tokens.device)]
    supervised = {
        name: rows if objectives[name].counts_images else rows[~torch.isin(rows, dropped)]
        for name, rows in positions["by_objective"].items()
    }
    return {**positions, "by_objective": supervised}


def _where(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)


def cut_columns(batch: Mapping[str, Any], num_columns: int) -> dict[str, Any]:
    """A batch without the columns behind the first so many."""
    rows = ("input_ids", "attention_mask", "position_ids", "labels")
    return {
        name: value[:, :num_columns] if name in rows and value is not None else value for name, value in batch.items()
    }


def prepare_batch(
    objectives: Mapping[str, Objective],
    batch: dict[str, Any],
    kwargs: dict[str, Any],
    supervised_positions: SupervisedPositions | None,
    image_token_id: int,
) -> tuple[dict[str, Any], SupervisedPositions | None]:
    """
    What objectives read of a batch, and which of its positions they supervise.

    Args:
        objectives (`Mapping[str, Objective]`): As [`parse_objectives`] returns them.
        batch (`dict`): `input_ids`, `labels`, `attention_mask`, `position_ids` and `pixel_values`.
        kwargs (`dict`): What else `forward` was called with. The columns that objectives ask for are taken out of it.
        supervised_positions ([`SupervisedPositions`], *optional*): What a collator has found.
        image_token_id (`int`): Id of the image placeholder.

    Returns:
        The batch, with these columns and without what nobody reads behind the last image token, and its positions:
        none where there is only text to learn and no collator has found them.

    Raises:
        ValueError: If a visual objective has no `input_ids`, or a column is missing.
    """
    is_visual = any(name != "language" for name in objectives)
    if is_visual and batch["input_ids"] is None:
        raise ValueError("A `visual_objective` needs `input_ids`: they say which positions are image tokens.")
    mask = batch["attention_mask"]
    if is_visual and mask is not None and getattr(mask, "ndim", None) != 2:
        found = f"has shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"is a {type(mask).__name__}"
        raise ValueError(
            f"`attention_mask` {found}; beside a `visual_objective` it has to say what is padding, `[B, L]`. Samples "
            "in one row are kept apart by `position_ids` that start again."
        )
    for name, objective in objectives.items():
        for column in objective.columns:
            if column not in kwargs:
                raise ValueError(f"The objective `{name}` needs `{column}`, which is not among the inputs. Pass it.")
            batch = {**batch, column: kwargs[column]}
        batch = {**batch, **{column: kwargs[column] for column in objective.optional_columns if column in kwargs}}
    for column in batch:
        kwargs.pop(column, None)
    if supervised_positions is not None and supervised_positions["by_objective"].keys() != objectives.keys():
        supervised_positions = None  # found for others
    if supervised_positions is None and is_visual:
        supervised_positions = find_supervised_positions(objectives, batch, image_token_id)
    if supervised_positions is not None:
        batch = cut_columns(batch, supervised_positions["num_columns"])
    return batch, supervised_positions


def teaches_decoder(objectives: Mapping[str, Objective]) -> bool:
    """Whether the decoder may learn. Without objectives, what learns is the caller's business."""
    return not objectives or any("decoder" in objective.teaches for objective in objectives.values())


def reads_layers(objectives: Mapping[str, Objective]) -> bool:
    """Whether an objective reads the outputs of the decoder's layers."""
    return any(objective.layers for objective in objectives.values())


def name_counts(
    objectives: Mapping[str, Objective],
    num_items_in_batch: int | torch.Tensor | Mapping[str, int | torch.Tensor] | None,
    num_image_items_in_batch: int | torch.Tensor | None,
) -> dict[str, int | torch.Tensor]:
    """
    The positions of an optimiser step by objective. A number alone counts those of the text, and
    `num_image_items_in_batch` those of every objective that counts positions of images and has none of its own.
    """
    if num_items_in_batch is None:
        counts = {}
    elif isinstance(num_items_in_batch, Mapping):
        counts = dict(num_items_in_batch)
    else:
        counts = {"language": num_items_in_batch}
    if num_image_items_in_batch is not None:
        for name in objectives:
            if name != "language" and not objectives[name].counts_images:
                counts.setdefault(name, num_image_items_in_batch)
    return counts


def compute_loss(
    objectives: Mapping[str, Objective],
    weights: Mapping[str, float],
    inputs: ObjectiveInputs,
    counts: Mapping[str, int | torch.Tensor],
) -> tuple[torch.Tensor, dict[str, Term]]:
    """
    The loss, `Σ_k weight_k · total_k / count_k`, and its terms.

    Args:
        objectives, weights: As [`parse_objectives`] returns them.
        inputs ([`ObjectiveInputs`]): What the objectives read.
        counts: The positions of the whole optimiser step by objective. Those of this batch where there is none.
    """
    terms, divisors, passes = {}, {}, []
    for name, objective in objectives.items():
        term = objective.predict(inputs)
        if isinstance(term, Term):
            terms[name] = term
        else:
            _check_on_device(term, inputs.hidden_states)
            _join_pass(passes, name, term)
        divisors[name] = counts.get(name, term.count if isinstance(term, Term) else len(term.hidden))
    together = [name for name, objective in objectives.items() if name == "language" or objective.counts_with_text]
    if any(objective.counts_with_text for objective in objectives.values()):
        divisors |= dict.fromkeys(together, sum(divisors[name] for name in together))
    scales = {name: weights[name] / at_least_one(divisors[name]) for name in objectives}
    losses = [scales[name] * term.total for name, term in terms.items()]
    term = None  # or its rows would be held during the pass
    while passes:
        loss, shared = _run_pass(passes.pop(0), scales)
        losses.append(loss)
        terms |= shared
    return sum(losses), {name: terms[name] for name in objectives}


def at_least_one(count: int | torch.Tensor) -> torch.Tensor:
    """A count to divide by: without positions a loss is zero, not 0 / 0."""
    count = torch.as_tensor(count)
    return count.where(count > 0, 1)


def _check_on_device(rows: HeadRows, hidden_states: torch.Tensor) -> None:
    if any(head is not None and head.is_meta for head in (rows.head, rows.teacher_head)) and not hidden_states.is_meta:
        raise ValueError(
            "The heads' weights are offloaded, and this loss reads them. Load the model with a `device_map` that "
            "keeps `lm_head` and `model.vm_head` on a device."
        )


def _join_pass(passes: list[dict[str, HeadRows]], name: str, rows: HeadRows) -> None:
    # One pass has one head that learns, and at most one that teaches.
    for others in passes:
        if all(other.head is rows.head for other in others.values()) and (
            rows.teacher is None or all(other.teacher is None for other in others.values())
        ):
            others[name] = rows
            return
    passes.append({name: rows})


def _run_pass(rows: dict[str, HeadRows], scales: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Term]]:
    """The weighted sum over all rows of one head, and the term of each objective among them."""
    hidden = torch.cat([r.hidden for r in sorted(rows.values(), key=lambda r: r.teacher is not None)])  # [T + V, D]
    rows = {name: r._replace(hidden=hidden[:0]) for name, r in rows.items()}  # nobody holds them twice
    labelled = {name: r for name, r in rows.items() if r.teacher is None}
    taught = {name: r for name, r in rows.items() if r.teacher is not None}  # one at most
    head = next(iter(rows.values())).head
    teacher, teacher_head, teacher_temperature = hidden[:0], head, 1.0
    for r in taught.values():
        teacher, teacher_head, teacher_temperature = r.teacher, r.teacher_head, r.teacher_temperature
    sizes = [len(r.labels) for r in labelled.values()]
    labels = [r.labels for r in labelled.values()] or [hidden.new_empty(0, dtype=torch.long)]
    text_scales = [
        scales[name].to(hidden.device).float().expand(size) for name, size in zip(labelled, sizes, strict=True)
    ]
    loss, cross_entropies, kl_div, teacher_entropy, student_entropy = linear_row_losses(
        hidden,
        head,
        torch.cat(labels),
        teacher,
        teacher_head,
        torch.cat(text_scales) if text_scales else 0.0,
        scales[next(iter(taught))] if taught else 0.0,
        teacher_temperature,
    )
    sums = [part.sum() for part in cross_entropies.split(sizes)] if sizes else []
    terms = {name: Term(total, size, {}) for name, total, size in zip(labelled, sums, sizes, strict=True)}
    for name, r in taught.items():
        entropies = {r.teacher_entropy: teacher_entropy, r.student_entropy: student_entropy}
        terms[name] = Term(kl_div, len(teacher), {n: entropy for n, entropy in entropies.items() if n is not None})
    return loss, terms
