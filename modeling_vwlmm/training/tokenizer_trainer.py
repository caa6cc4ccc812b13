# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training of the visual tokenizer, LaVIT's stage 1: images alone, no LLM.

It runs in two phases, the first of which has a beginning of its own. What the first learns decides whether the second
collapses:

1. Without a codebook: the decoder reads what would become codes. First patches are kept at random, until tokens carry
   something; only then does the selector learn which to keep, or it would polarise on whatever is there.
2. With a codebook, which starts by k-means of what there is. The selector is frozen.

Shapes: `I` images, `N` patches of one image, `kept` tokens of all images together.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from processing_vwlmm import VWLMMProcessor

from ..codebook_vwlmm import gather
from ..visual_tokenizer_vwlmm import VWLMMVisualTokenizer
from .arguments import VWLMMTrainingArguments


logger = logging.get_logger(__name__)

# Images whose probabilities make the threshold.
THRESHOLD_IMAGES = 4096
# By how much tokens have to improve the mean cosine of rebuilt features before they are worth anything.
LEAST_GAIN = 0.02
# A selector of which so many patches are decided has polarised.
DECIDED, MOST_DECIDED = 0.05, 0.9


class VisualTokenizerTrainer(Trainer):
    """
    Trainer of a [`VWLMMVisualTokenizer`], which `VWLMMTrainer` becomes with `method="lavit"` and `stage=1`.

    Logged beside `loss`: `reconstruction_loss`, `ratio_loss` and `commitment_loss` of equation 4; `kept_share` and the
    least and most of an image; `token_gain`, by how much the mean cosine of rebuilt features is above that of a
    decoder that gets no tokens; `codes_used` and `code_perplexity` since the last log. A warning says if tokens carry
    nothing, or if the selector has polarised before they do.

    At its end, and in every checkpoint, `config.threshold` is the probability that a share of `keep_rate` of all
    patches reaches.

    Args:
        model ([`VWLMMVisualTokenizer`] or `str`): Tokenizer, or name or path of one.
        args ([`VWLMMTrainingArguments`]): Arguments, with `method="lavit"` and `stage=1`.
        train_dataset (`Dataset` or `IterableDataset`): A column `images`, lists of images, or `image`.
        processing_class ([`VWLMMProcessor`], *optional*): By default the one saved with the tokenizer. What it makes
            of images is what the tokenizer sees.
        kwargs: Everything else that `Trainer` takes.

    Raises:
        TypeError: If `model` is no [`VWLMMVisualTokenizer`].
        ValueError: If the data have no images.
    """

    def __init__(
        self,
        model: VWLMMVisualTokenizer | str,
        args: VWLMMTrainingArguments,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: ProcessorMixin | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            processing_class = processing_class or VWLMMProcessor.from_pretrained(model)
            model = VWLMMVisualTokenizer.from_pretrained(model, **(args.model_init_kwargs or {}))
        if not isinstance(model, VWLMMVisualTokenizer):
            raise TypeError(f"`model` is a {type(model).__name__}; stage 1 of LaVIT trains a VWLMMVisualTokenizer.")
        if processing_class is None:
            raise ValueError("`processing_class` is missing: pass the processor that makes pixel values of images.")
        model.requires_grad_(True)  # also what an earlier run has frozen on the way
        model.freeze_encoders()
        args.remove_unused_columns = False  # images become pixel values in the collator
        args.ddp_find_unused_parameters = True  # the selector is frozen on the way
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=ImageCollator(processing_class),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # losses are divided by the images of the whole step
        self._tokenizer = model
        self._seed = args.seed if args.data_seed is None else args.data_seed
        self._probabilities: deque[torch.Tensor] = deque()
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._last: torch.Tensor | None = None  # features of the last batch
        self.add_callback(CodebookCallback(self))

    def steps_until(self, steps: float) -> int:
        """A number of steps, or below 1 a share of all of them."""
        return round(steps * self.state.max_steps) if steps < 1 else int(steps)

    @property
    def has_codebook(self) -> bool:
        """Whether the second phase has begun."""
        return self.state.global_step >= self.steps_until(self.args.continuous_steps)

    def make_generator(self, *keys: int) -> torch.Generator:
        """Randomness that the seed, the step and `keys` say, whatever the layout of processes and batches."""
        text = " ".join(map(str, (self._seed, self.state.global_step, *keys)))
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int]:
        """The micro-batches of an optimiser step, and the number of images in them on all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        num_images = torch.tensor(sum(len(batch["pixel_values"]) for batch in batches), device=device)
        if self.accelerator.num_processes > 1:
            num_images = self.accelerator.reduce(num_images, "sum")
        if self.has_codebook and any(weight.requires_grad for weight in self._tokenizer.selector.parameters()):
            self._tokenizer.selector.requires_grad_(False)
            self._probabilities.clear()  # of what the selector was
        if batches and self.state.global_step == self.steps_until(self.args.continuous_steps):
            self._start_codebook(batches, device)
        return batches, num_images

    def _start_codebook(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        features = []
        for batch in batches:
            pixel_values, noise = batch["pixel_values"].to(device), self._draw(batch["image_keys"])
            features.append(self._tokenizer.encode(pixel_values, gumbel_noise=noise.to(device)).projected)
        self._tokenizer.quantizer.start(torch.cat(features), self.make_generator())

    def _draw(self, image_keys: torch.Tensor) -> torch.Tensor:
        """Gumbel noise, `[I, N, 2]`, of its own for every image."""
        shape = (self._tokenizer.config.num_patches, 2)
        rows = [-torch.empty(shape).exponential_(generator=self.make_generator(k)).log() for k in image_keys.tolist()]
        return torch.stack(rows)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """See `Trainer.compute_loss`."""
        if not self.model.training:
            outputs = model(pixel_values=inputs["pixel_values"])
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        noise = self._draw(inputs["image_keys"]).to(inputs["pixel_values"].device)  # [I, N, 2]
        options = {"gumbel_noise": noise}
        if self.state.global_step < self.steps_until(self.args.random_mask_steps):
            options = {"keep_mask": self._keep_at_random(noise)}
        outputs = model(
            pixel_values=inputs["pixel_values"],
            quantize=self.has_codebook,
            num_items_in_batch=num_items_in_batch,
            **options,
        )
        self._note(outputs)
        loss = outputs.loss
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, and each has divided by the images of all.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _keep_at_random(self, noise: torch.Tensor) -> torch.Tensor:
        # The difference of two Gumbel numbers is logistic.
        uniform = (noise[..., 0] - noise[..., 1]).sigmoid()  # [I, N]
        keep_mask = uniform < self._tokenizer.config.keep_rate
        return keep_mask.scatter(1, uniform.argmin(dim=1, keepdim=True), True)  # one at least

    @torch.no_grad()
    def _note(self, outputs: Any) -> None:
        tokens = outputs.tokens
        probabilities = tokens.selector_log_probs[..., 0].detach().exp()  # [I, N]
        self._probabilities.append(probabilities.cpu())
        while sum(map(len, self._probabilities)) - len(self._probabilities[0]) >= THRESHOLD_IMAGES:
            self._probabilities.popleft()
        cosine = torch.cosine_similarity(outputs.reconstruction, outputs.patch_features, dim=-1)  # [I, N]
        kept = tokens.keep_mask.float().mean(dim=1)  # [I]
        values = {"cosine": cosine.mean(dim=1), "kept_share": kept, "decided": _share_decided(probabilities)}  # [I]
        if tokens.code_ids is not None:
            values["code_ids"] = tokens.code_ids
            values["commitment_loss"] = outputs.commitment_loss.reshape(1)
        values["ratio"] = (self._tokenizer.config.keep_rate - kept).square()
        for name, value in values.items():
            self._sums.setdefault(name, []).append(value.detach())
        self._last = outputs.patch_features

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`. In training it adds what the tokenizer does, and warns of the two known collapses."""
        if self._sums and self.model.training:
            noted = {name: gather(torch.cat(values)) for name, values in self._sums.items()}
            self._sums = {}
            with torch.no_grad():
                features = self._last
                nothing = features.new_zeros(len(features), 1, self._tokenizer.config.code_dim)
                empty = self._tokenizer.decoder(nothing, nothing[..., 0])  # [I, N, C]
                baseline = gather(torch.cosine_similarity(empty, features, dim=-1).mean(dim=1)).mean()
            gain, decided = (noted["cosine"].mean() - baseline).item(), noted["decided"].mean().item()
            logs |= {
                "reconstruction_loss": 1 - noted["cosine"].mean().item(),
                "ratio_loss": noted["ratio"].mean().item(),
                "kept_share": noted["kept_share"].mean().item(),
                "least_kept_share": noted["kept_share"].min().item(),
                "most_kept_share": noted["kept_share"].max().item(),
                "token_gain": gain,
            }
            if "code_ids" in noted:
                counts = noted["code_ids"].bincount(minlength=self._tokenizer.config.num_codes).double()
                shares = counts / counts.sum().clamp_min(1)
                logs |= {
                    "commitment_loss": noted["commitment_loss"].mean().item(),
                    "codes_used": int((counts > 0).sum()),
                    "code_perplexity": torch.special.entr(shares).sum().exp().item(),
                }
            self._warn(gain, decided, "code_ids" in noted)
        super().log(logs, start_time)

    def _warn(self, gain: float, decided: float, has_codes: bool) -> None:
        is_random = self.state.global_step <= self.steps_until(self.args.random_mask_steps)
        if gain >= LEAST_GAIN or is_random:
            return
        if decided > MOST_DECIDED:
            logger.warning(
                f"Step {self.state.global_step}: the selector has decided about {decided:.0%} of all patches, and "
                f"tokens improve the rebuilt features by a cosine of {gain:.3f} alone: it has polarised before they "
                "carry anything, and keeps whatever it happened to. Raise `random_mask_steps`, or lower "
                "`learning_rate`."
            )
        elif has_codes:
            logger.warning(
                f"Step {self.state.global_step}: codes improve the rebuilt features by a cosine of {gain:.3f} alone, "
                "however many of them are used: they are dead. Raise `continuous_steps`, so that tokens carry "
                "something before there is a codebook."
            )

    def find_threshold(self) -> float | None:
        """The probability that a share of `keep_rate` of the patches of the last images reaches, on all processes."""
        if not self._probabilities:
            return None
        probabilities = gather(torch.cat(list(self._probabilities)).flatten()).sort().values  # [patches]
        index = round((1 - self._tokenizer.config.keep_rate) * (len(probabilities) - 1))
        return probabilities[index].item()


class CodebookCallback(TrainerCallback):
    """Moves the codebook once a step, and has a threshold in what is saved."""

    def __init__(self, trainer: VisualTokenizerTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_optimizer_step`."""
        if self.trainer.has_codebook:
            self.trainer._tokenizer.quantizer.update(self.trainer.make_generator())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_step_end`."""
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            self.trainer._tokenizer.config.threshold = self.trainer.find_threshold()


class ImageCollator:
    """
    Makes batches of the images of samples: `pixel_values`, `[I, 3, H, W]`, and `image_keys`, `[I]`, numbers of the
    images' own that do not depend on the batch.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = []
        for sample in samples:
            if "images" not in sample and "image" not in sample:
                raise ValueError(
                    f"A sample has the columns {', '.join(sample)}; a visual tokenizer learns from `images` or "
                    "`image`."
                )
            images += sample.get("images") or ([sample["image"]] if sample.get("image") is not None else [])
        if not images:
            raise ValueError(
                f"{len(samples)} samples have no image, and a visual tokenizer learns from nothing else. Leave out "
                "samples without images."
            )
        pixel_values = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]  # [I, 3, H, W]
        keys = [zlib.crc32(image.numpy().tobytes()) for image in pixel_values]
        return {"pixel_values": pixel_values, "image_keys": torch.tensor(keys)}


def _share_decided(probabilities: torch.Tensor) -> torch.Tensor:
    return ((probabilities < DECIDED) | (probabilities > 1 - DECIDED)).float().mean(dim=1)  # [I]
