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

import time
import zlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from processing_vwlmm import VWLMMProcessor

from ..codebook_vwlmm import gather
from ..visual_tokenizer_vwlmm import VWLMMVisualTokenizer, VWLMMVisualTokenizerOutput
from .arguments import VWLMMTrainingArguments
from .saving import SavesWholeCheckpoints
from .watching import StopsWhenDiverged


logger = logging.get_logger(__name__)

# Images whose probabilities make the threshold, and the file of a checkpoint that has these.
THRESHOLD_IMAGES = 4096
PROBABILITIES = "_selector_probabilities.safetensors"  # `push_to_hub` leaves out what begins like this
# By how much an image's own tokens have to improve the mean cosine of rebuilt features to be worth anything.
LEAST_GAIN = 0.02
# A selector of which so many patches are decided has polarised.
DECIDED, MOST_DECIDED = 0.05, 0.9


class VisualTokenizerTrainer(SavesWholeCheckpoints, StopsWhenDiverged, Trainer):
    """
    Trainer of a [`VWLMMVisualTokenizer`], which `VWLMMTrainer` becomes with `method="lavit"` and `stage=1`.

    Logged beside `loss`: `reconstruction_loss`, `ratio_loss` and `commitment_loss` of equation 4; `kept_share` and the
    least and most of an image; `token_gain`, by how much the mean cosine of rebuilt features is above that of features
    rebuilt from another image's tokens; `codes_used` and `code_perplexity` since the last log; speed and time as of
    `VWLMMTrainer`, where tokens are those that are kept. A warning says if tokens carry nothing, or if the selector
    has polarised before they do.

    Evaluation computes the same of the phase that training is in. The draw that keeps patches is the image's own, and
    the same every time.

    At its end, and in every checkpoint, `config.threshold` is the probability that a share of `keep_rate` of all
    patches reaches. Checkpoints are those of `VWLMMTrainer`, at signals as well.

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
        TrainingDiverged: While training, if the loss or the norm of the gradients is NaN or infinite, or far outside
            of its own history (`spike_threshold`).
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
        self._prepare_run(model, train_dataset)
        self._tokenizer = model
        self._seed = args.seed if args.data_seed is None else args.data_seed
        # Whether the second phase has begun. Without a run the tokenizer is evaluated as it is.
        self.has_codebook = True
        self._probabilities: deque[torch.Tensor] = deque(maxlen=THRESHOLD_IMAGES)  # [N] each
        self._means = {mode: TokenMeans(model) for mode in ("train", "eval")}
        self.add_callback(CodebookCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See [`SavesWholeCheckpoints.train`]."""
        self._tokenizer.selector.requires_grad_(True)
        self.has_codebook = False
        return super().train(*args, **kwargs)

    def _record_stage(self) -> None:
        self._set_threshold(self._gather_probabilities())

    def steps_until(self, steps: float) -> int:
        """A number of steps, or below 1 a share of all of them."""
        return round(steps * self.state.max_steps) if steps < 1 else int(steps)

    @property
    def keeps_at_random(self) -> bool:
        """Whether patches are kept at random, as a run begins."""
        return self.state.max_steps > 0 and self.state.global_step < self.steps_until(self.args.random_mask_steps)

    def make_generator(self, *keys: int) -> torch.Generator:
        """Randomness that the seed and `keys` say, whatever the layout of processes and batches."""
        text = " ".join(map(str, (self._seed, *keys)))
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int]:
        """The micro-batches of an optimiser step, and the number of images in them on all processes."""
        begun = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        self._stopwatch.waited += time.perf_counter() - begun
        num_images = torch.tensor(sum(len(batch["pixel_values"]) for batch in batches), device=device)
        if self.accelerator.num_processes > 1:
            votes = torch.full_like(num_images, self._stop_signals.received)
            num_images, self._stop_votes = self.accelerator.reduce(torch.stack([num_images, votes]), "sum")
        if self.state.global_step == self.steps_until(self.args.random_mask_steps):
            self._forget_steps()  # without gradients of the selector
        is_second_phase = self.state.global_step >= self.steps_until(self.args.continuous_steps)
        if batches and is_second_phase and not self.has_codebook:
            self._start_codebook(batches, device)
        self._tokenizer.selector.requires_grad_(not self.has_codebook)
        return batches, num_images

    def _start_codebook(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        features, step = [], self.state.global_step
        for batch in batches:
            pixel_values, noise = batch["pixel_values"].to(device), self._draw(batch["image_keys"], step)
            features.append(self._tokenizer.encode(pixel_values, gumbel_noise=noise.to(device)).projected)
        self._tokenizer.quantizer.start(torch.cat(features), self.make_generator(step))
        self.has_codebook = True
        self._probabilities.clear()  # of what the selector was
        self._forget_steps()  # of another loss

    def _draw(self, image_keys: torch.Tensor, step: int) -> torch.Tensor:
        """Gumbel noise, `[I, N, 2]`, of its own for every image in a step."""
        shape = (self._tokenizer.config.num_patches, 2)
        generators = [self.make_generator(step, key) for key in image_keys.tolist()]
        return torch.stack([-torch.empty(shape).exponential_(generator=each).log() for each in generators])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """See `Trainer.compute_loss`."""
        is_training = self.model.training
        step = self.state.global_step if is_training else 0
        noise = self._draw(inputs["image_keys"], step).to(inputs["pixel_values"].device)  # [I, N, 2]
        outputs = model(
            pixel_values=inputs["pixel_values"],
            quantize=self.has_codebook,
            num_items_in_batch=num_items_in_batch,
            **({"keep_mask": self._keep_at_random(noise)} if self.keeps_at_random else {"gumbel_noise": noise}),
        )
        self._means["train" if is_training else "eval"].add(outputs)
        loss = outputs.loss
        if is_training:
            self._note_probabilities(outputs.tokens.selector_log_probs)
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, and each has divided by the images of all.
            loss = loss * self.accelerator.num_processes
            parts = ("reconstruction_loss", "ratio_loss", "commitment_loss")
            self._watch_loss(loss, {name: getattr(outputs, name) for name in parts})
        return (loss, outputs) if return_outputs else loss

    def _keep_at_random(self, noise: torch.Tensor) -> torch.Tensor:
        # The difference of two Gumbel numbers is logistic.
        uniform = (noise[..., 0] - noise[..., 1]).sigmoid()  # [I, N]
        keep_mask = uniform < self._tokenizer.config.keep_rate
        return keep_mask.scatter(1, uniform.argmin(dim=1, keepdim=True), True)  # one at least

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`. In training it adds what the tokenizer does, and warns of the two known collapses."""
        if self.model.training and (means := self._means["train"].pop()):
            decided = means.pop("decided")
            logs |= self._stopwatch.pop(self.state, means.pop("num_tokens"), means.pop("num_images"))
            logs |= means
            self._warn(means.get("token_gain"), decided, "codes_used" in means)
        super().log(logs, start_time)

    def _warn(self, gain: float | None, decided: float, has_codes: bool) -> None:
        is_random = self.state.global_step <= self.steps_until(self.args.random_mask_steps)
        if gain is None or gain >= LEAST_GAIN or is_random:
            return
        if decided > MOST_DECIDED:
            logger.warning(
                f"Step {self.state.global_step}: the selector has decided about {decided:.0%} of all patches, and "
                f"an image's own tokens rebuild its features better than another's by a cosine of {gain:.3f} alone: "
                "it has polarised before they carry anything, and keeps whatever it happened to. Raise "
                "`random_mask_steps`, or lower `learning_rate`."
            )
        elif has_codes:
            logger.warning(
                f"Step {self.state.global_step}: the codes of an image rebuild its features better than another's by "
                f"a cosine of {gain:.3f} alone, however many of them are used: they are dead. Raise "
                "`continuous_steps`, so that tokens carry something before there is a codebook."
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """See `Trainer.prediction_step`. There is a loss, and nothing to predict."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """See `Trainer.evaluation_loop`. The metrics have what is logged in training, as means over images."""
        self._means["eval"].clear()  # of an evaluation that failed
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means, config = self._means["eval"].pop(), self._tokenizer.config
        for name in ("decided", "num_tokens", "num_images"):
            means.pop(name, None)
        if means:
            means["loss"] = (
                means["reconstruction_loss"]
                + config.ratio_weight * means["ratio_loss"]
                + config.commitment_weight * means.get("commitment_loss", 0.0)
            )
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    @torch.no_grad()
    def _note_probabilities(self, selector_log_probs: torch.Tensor) -> None:
        self._probabilities.extend(selector_log_probs[..., 0].exp().cpu())  # [I, N]

    def _gather_probabilities(self) -> torch.Tensor:
        """Those of the last images of all processes, `[I, N]`."""
        num_patches = self._tokenizer.config.num_patches
        return gather(torch.stack([*self._probabilities]) if self._probabilities else torch.empty(0, num_patches))

    def _set_threshold(self, probabilities: torch.Tensor) -> None:
        if len(probabilities):
            probabilities = probabilities.flatten().sort().values  # [patches]
            index = round((1 - self._tokenizer.config.keep_rate) * (len(probabilities) - 1))
            self._tokenizer.config.threshold = probabilities[index].item()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Private, as is all saving.
        self._probabilities_of_all = self._gather_probabilities()
        self._set_threshold(self._probabilities_of_all)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Private, as is all saving.
        super()._save(output_dir, state_dict)
        if self._is_saving:
            save_file({"probabilities": self._probabilities_of_all}, Path(output_dir, PROBABILITIES))

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        checkpoint = super()._find_checkpoint(resume_from_checkpoint)
        self._probabilities.clear()
        if checkpoint is not None:
            probabilities = load_file(Path(checkpoint, PROBABILITIES))["probabilities"]  # [I, N]
            index, num_processes = self.accelerator.process_index, self.accelerator.num_processes
            self._probabilities.extend(probabilities.tensor_split(num_processes)[index])
        return checkpoint

    def _get_sums_since_last_log(self) -> dict[str, Any]:
        return {**super()._get_sums_since_last_log(), "has_codebook": self.has_codebook}

    def _set_sums_since_last_log(self, processes: list[dict[str, Any]]) -> None:
        super()._set_sums_since_last_log(processes)
        self.has_codebook = processes[0]["has_codebook"]


class CodebookCallback(TrainerCallback):
    """Moves the codebook once a step."""

    def __init__(self, trainer: VisualTokenizerTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_optimizer_step`."""
        if self.trainer.has_codebook:
            self.trainer._tokenizer.quantizer.update(self.trainer.make_generator(state.global_step))


class TokenMeans:
    """
    What is logged of tokens: sums over images, kept on their device until they are asked for.

    Args:
        tokenizer ([`VWLMMVisualTokenizer`]): The tokenizer.
    """

    def __init__(self, tokenizer: VWLMMVisualTokenizer) -> None:
        self._tokenizer = tokenizer
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self._sums: dict[str, torch.Tensor] = {}
        self._last: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, outputs: VWLMMVisualTokenizerOutput) -> None:
        """Adds what the tokenizer has made of a micro-batch."""
        config, tokens = self._tokenizer.config, outputs.tokens
        cosine = torch.cosine_similarity(outputs.reconstruction.float(), outputs.patch_features.float(), dim=-1)
        kept = tokens.keep_mask.double().mean(dim=1)  # [I]
        probabilities = tokens.selector_log_probs[..., 0].exp()  # [I, N]
        directions = torch.nn.functional.normalize(tokens.projected.float(), dim=-1)  # [kept, d]
        distances, counts = directions.new_zeros(()), directions.new_zeros(config.num_codes)
        if tokens.code_ids is not None:
            distances = (directions - tokens.quantized).square().mean(dim=-1).sum()
            counts = tokens.code_ids.bincount(minlength=config.num_codes)
        decided = (probabilities < DECIDED) | (probabilities > 1 - DECIDED)
        values = {
            "images": torch.ones_like(kept).sum(),
            "tokens": tokens.keep_mask.sum(),
            "cosine": cosine.mean(dim=1).sum(),
            "ratio": (config.keep_rate - kept).square().sum(),
            "kept": kept.sum(),
            "decided": decided.double().mean(dim=1).sum(),
            "distances": distances,
            "counts": counts,
            "least": kept.min(),
            "most": kept.max(),
        }
        self._merge({name: value.double() for name, value in values.items()})
        self._keep_last(outputs, directions if tokens.code_ids is None else tokens.quantized)

    def _merge(self, values: dict[str, torch.Tensor]) -> None:
        reductions = {"least": torch.minimum, "most": torch.maximum}
        self._sums = {
            name: reductions.get(name, torch.add)(self._sums[name], value) if name in self._sums else value
            for name, value in values.items()
        }

    def _keep_last(self, outputs: VWLMMVisualTokenizerOutput, read: torch.Tensor) -> None:
        # What the decoder has read, in the places of patches, and what it was to rebuild.
        keep_mask = outputs.tokens.keep_mask
        tokens = read.new_zeros(*keep_mask.shape, read.shape[-1])  # [I, N, d]
        tokens[keep_mask] = read
        last = {"tokens": tokens, "policy": keep_mask.to(read), "features": outputs.patch_features}
        if len(tokens) == 1 and self._last:  # an image has no other beside it but that of before
            last = {name: torch.cat([self._last[name][-1:], value]) for name, value in last.items()}
        self._last = last

    def _measure_gain(self) -> torch.Tensor:
        """By how much an image's own tokens rebuild it better than another's, `[I]`; nothing of one image alone."""
        tokens, policy, features = self._last["tokens"], self._last["policy"], self._last["features"]
        cosines = []
        for shift in (0, 1):
            rebuilt = self._tokenizer.decoder(tokens.roll(shift, dims=0), policy.roll(shift, dims=0))  # [I, N, C]
            cosines.append(torch.cosine_similarity(rebuilt.float(), features.float(), dim=-1).mean(dim=1))
        return (cosines[0] - cosines[1])[: 0 if len(tokens) == 1 else None]

    def state_dict(self) -> dict[str, Any]:
        """The sums of this process. Reads the device."""
        return {name: value.tolist() for name, value in self._sums.items()}

    def load_state_dict(self, state_dicts: list[dict[str, Any]]) -> None:
        """Goes on with sums, of one process or several."""
        self.clear()
        for state_dict in state_dicts:
            self._merge({name: torch.tensor(value, dtype=torch.float64) for name, value in state_dict.items()})

    @torch.no_grad()
    def pop(self) -> dict[str, float]:
        """
        The means of all processes, which call this together, under their names in the logs; beside them `decided`, the
        share of patches that the selector has decided about, and `num_tokens` and `num_images`. Begins anew.
        """
        if not self._sums:
            return {}
        gain = gather(self._measure_gain())  # [I of all]
        mine = self.state_dict()
        self.clear()
        self.load_state_dict(gather_object([mine]))
        sums = {name: value.item() for name, value in self._sums.items() if name != "counts"}
        counts, num_images = self._sums["counts"], sums["images"]
        self.clear()
        logs = {
            "reconstruction_loss": 1 - sums["cosine"] / num_images,
            "ratio_loss": sums["ratio"] / num_images,
            "kept_share": sums["kept"] / num_images,
            "least_kept_share": sums["least"],
            "most_kept_share": sums["most"],
            "decided": sums["decided"] / num_images,
            "num_tokens": sums["tokens"],
            "num_images": num_images,
        }
        if len(gain):
            logs["token_gain"] = gain.mean().item()
        if num_codes := counts.sum().item():
            logs |= {
                "commitment_loss": sums["distances"] / num_codes,
                "codes_used": int((counts > 0).sum()),
                "code_perplexity": torch.special.entr(counts / num_codes).sum().exp().item(),
            }
        return logs


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
