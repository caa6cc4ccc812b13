"""
Controls of the experiment: no words, visual words of the wrong image, and words that say nothing. Importing this file
makes them objectives that `visual_objective` knows.
"""

from dataclasses import replace

import torch

from modeling_vwlmm.objectives_vwlmm import OBJECTIVES, HeadRows, ImageObjective, ObjectiveInputs, Term, VisualWords


class NoWords(ImageObjective):
    """Nothing: images without text are read and teach nothing, so that language alone has the steps of the others."""

    name = "no_words"

    def predict(self, inputs: ObjectiveInputs) -> Term:
        # The zero has a gradient: a batch may have no text, either.
        return Term(0 * inputs.hidden_states.sum(), len(inputs.positions_of(self)), {})


class OtherImage(VisualWords):
    """
    The visual words of another image of the batch at the same place: as sharp, and true of nothing that is seen. It is
    the next one that is no copy of the same picture.

    Raises:
        ValueError: If the images of a batch are all the same.
    """

    name = "other_image"

    def predict(self, inputs: ObjectiveInputs) -> HeadRows:
        if len(inputs.positions_of(self)):  # none of an image that only fills up the last step of an epoch
            features = torch.stack(tuple(inputs.images["image_features"]))  # [I, N, D]
            features = features[_find_others(inputs.images["patch_features"])]
            # A copy: others of the same step learn from the images as they are.
            inputs = replace(inputs, images={**inputs.images, "image_features": features})
        return super().predict(inputs)


def _find_others(patches: torch.Tensor) -> list[int]:
    """For each image of `[I, N, W]` the index of the next one that differs, the first after the last."""
    others = []
    for index, image in enumerate(patches):
        following = [*range(index + 1, len(patches)), *range(index)]
        # Copies differ in the last digits, by their place in the batch.
        other = next((o for o in following if not torch.allclose(patches[o], image, rtol=1e-3, atol=1e-3)), None)
        if other is None:
            raise ValueError(
                f"The objective `other_image` found {len(patches)} images in a batch, all of them the same picture; "
                "expected at least two pictures. Raise `per_device_train_batch_size`; if it is the last batch of an "
                "epoch, set `dataloader_drop_last`."
            )
        others.append(other)
    return others


class UniformWords(VisualWords):
    """Uniform words, of entropy log C: the decoder learns to be sure of nothing at image positions."""

    name = "uniform_words"
    reads_visual_words = False

    def predict(self, inputs: ObjectiveInputs) -> HeadRows:
        rows = super().predict(inputs)
        return rows._replace(teacher=torch.zeros_like(rows.teacher))


OBJECTIVES |= {objective.name: objective for objective in (NoWords, OtherImage, UniformWords)}
