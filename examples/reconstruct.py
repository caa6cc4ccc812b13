"""
What image features know of an image: the image itself, what the VAE keeps of it, and what the denoiser of the
objective `reconstruction` draws from the image features alone, side by side, one image a row.

    python examples/reconstruct.py runs/vlsa/stage2 cat.jpg dog.jpg -o picture.png

VAE and denoiser are those that the checkpoint was trained with. `--vae` and `--denoiser` say where they are now.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from modeling_vwlmm import VWLMMForConditionalGeneration
from modeling_vwlmm.objectives_vwlmm import parse_objectives
from modeling_vwlmm.training import attach_training_modules
from modeling_vwlmm.training.reconstruction import Reconstructor, get_conditions, get_normalization, make_pictures
from modeling_vwlmm.training.training_modules import FOLDER
from modeling_vwlmm.visualization import draw_reconstructions
from processing_vwlmm import VWLMMProcessor


def load(checkpoint: str, **changes: str | None) -> tuple[VWLMMForConditionalGeneration, VWLMMProcessor]:
    """
    A model with what it was trained to reconstruct images with, and its processor.

    Args:
        checkpoint (`str`): Folder of a checkpoint.
        changes (`str`, *optional*): Options of the objective in place of those of the training.

    Raises:
        FileNotFoundError: If the checkpoint was not trained to reconstruct.
    """
    file = Path(checkpoint, FOLDER, "reconstruction.json")
    if not file.exists():
        raise FileNotFoundError(
            f"{checkpoint} has no {FOLDER}/{file.name}: it was not trained with the objective `reconstruction`, or it "
            "comes from the Hub, where that folder is left out. Give the folder that the training wrote."
        )
    options = json.loads(file.read_text()) | {name: value for name, value in changes.items() if value is not None}
    model = VWLMMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    objectives, _ = parse_objectives({"reconstruction": {**options, "trains_denoiser": True}}, has_labels=False)
    attach_training_modules(model, objectives, folder=checkpoint)
    return model.eval(), VWLMMProcessor.from_pretrained(checkpoint)


@torch.inference_mode()
def reconstruct(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    images: list[Image.Image],
    num_steps: int = 28,
    seed: int = 0,
) -> list[torch.Tensor]:
    """
    Images, the VAE's copies of them, and what the denoiser draws from their features.

    Args:
        model, processor: As [`load`] returns them.
        images (`list[PIL.Image.Image]`): The images.
        num_steps (`int`, *optional*, defaults to 28): Steps of Euler's method from noise to the image.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.

    Returns:
        `list[torch.Tensor]`, for each image `[3 kinds, 3, H, W]`, from -1 to 1.
    """
    reconstructor: Reconstructor = model.training_modules["reconstruction"]
    inputs = processor(
        images=images, text=[processor.image_token] * len(images), padding=True, return_tensors="pt"
    ).to(model.device)
    inputs = {name: inputs[name] for name in ("pixel_values", "patch_boxes") if name in inputs}
    outputs = model.model.get_image_features(**inputs)
    conditions = get_conditions(outputs)
    mean, std = get_normalization(processor.image_processor)
    size, image = reconstructor.size, reconstructor.image
    pictures = make_pictures(inputs["pixel_values"], inputs.get("patch_boxes"), mean, std, size, image)

    generator = torch.Generator().manual_seed(seed)
    made: dict[int, torch.Tensor] = {}
    for group in pictures:
        own = [None if condition is None else condition[group.indices] for condition in conditions]
        copies = reconstructor.decode(reconstructor.encode(group.pixels))
        drawn = paint(reconstructor, own, group.pixels.shape[-2:], num_steps, generator, group.boxes)
        kinds = torch.stack([group.pixels, copies, drawn], dim=1)  # [I, 3 kinds, 3, H, W]
        made |= dict(zip(group.indices, kinds, strict=True))
    return [made[index] for index in range(len(made))]


@torch.inference_mode()
def paint(
    reconstructor: Reconstructor,
    conditions: Sequence[torch.Tensor | None],
    sides: Sequence[int],
    num_steps: int,
    generator: torch.Generator,
    boxes: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Images from noise, by Euler's method.

    Args:
        reconstructor ([`Reconstructor`]): What was trained to reconstruct images.
        conditions (`Sequence`): What is known of the images, as [`get_conditions`] returns it.
        sides (`Sequence[int]`): Height and width of the images in pixels.
        num_steps (`int`): Steps from noise to the image.
        generator (`torch.Generator`): Draws the noise, on the CPU.
        boxes (`torch.Tensor` of shape `[I, 4]`, *optional*): See [`Pictures`].

    Returns:
        `torch.Tensor` of shape `[I, 3, H, W]`, from -1 to 1.
    """
    features = conditions[0]  # [I, l, D]
    shape = reconstructor.get_latent_shape(*sides)
    z_t = torch.randn(len(features), *shape, generator=generator).to(features.device)
    sigmas = torch.linspace(1, 0, num_steps + 1).tolist()
    for sigma, following in tqdm(zip(sigmas, sigmas[1:], strict=False), total=num_steps, desc="Drawing", unit="step"):
        shares = z_t.new_full((len(z_t),), sigma)  # [I]
        z_t = z_t + (following - sigma) * reconstructor.denoise(z_t, shares, *conditions, boxes)
    return reconstructor.decode(z_t)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a checkpoint that was trained with `reconstruction`")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("-o", "--output", default="reconstructed.png", help="picture to write")
    parser.add_argument("--vae", help="path or name of the VAE, if it has moved")
    parser.add_argument("--denoiser", help="path or name of the pretrained denoiser, if it has moved")
    parser.add_argument("--steps", type=int, default=28, help="steps from noise to image")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; expected 1 or more, for noise alone is no reconstruction")
    model, processor = load(options.checkpoint, vae=options.vae, denoiser=options.denoiser)
    images = processor.image_processor.fetch_images(options.images)
    pictures = reconstruct(model.to(options.device), processor, images, options.steps, options.seed)
    draw_reconstructions(pictures).savefig(options.output)
    print(f"{options.output}: {len(images)} rows of original, VAE, and what is drawn from the image features")


if __name__ == "__main__":
    main()
