"""
Draws what a model writes: the codes of an image behind a prompt, and an image of these codes.

    python examples/images_from_codes.py runs/lavit/stage2 "a red circle" --tokenizer runs/lavit/tokenizer
    python examples/images_from_codes.py path/to/output "a dog" --pipeline path/to/LaVIT/highres_pixel_decoding

The tokenizer's decoder rebuilds patch features from the codes, and one of two things draws:

- The denoiser of a checkpoint that was trained with the objective `reconstruction`. It reads what that checkpoint's
  adapter makes of patch features, so that the rebuilt ones pass through the adapter as those of an image would. By
  default the checkpoint is the model itself; `--reconstruction` names another on the same vision tower.
- With `--pipeline`, Stable Diffusion XL in the form that LaVIT's authors have released. In place of a text it reads
  the conditions that their decoder makes. Real weights were not run, for want of them: a pipeline of this shape with
  tiny random weights was.

A decoder learns directions of features and not their lengths, which an adapter reads, too. They are taken, place by
place, from the images that `--like` names, or else from a plain grey one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from reconstruct import load, paint

from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration, VWLMMVisualTokenizer
from modeling_vwlmm.training.denoisers import Pretrained, import_diffusers
from modeling_vwlmm.training.reconstruction import get_conditions
from modeling_vwlmm.visualization import to_pixels
from processing_vwlmm import VWLMMProcessor


# Where a converted model has the tokenizer whose decoder makes features or, at the higher resolution, conditions.
TOKENIZERS = {False: "visual_tokenizer", True: "visual_tokenizer_highres"}


def check_writes_codes(checkpoint: str) -> None:
    """Raises `ValueError` if a checkpoint's config has no visual tokenizer, before any weight is read."""
    if VWLMMConfig.from_pretrained(checkpoint).visual_tokenizer_config is None:
        raise ValueError(
            f"{checkpoint} has no visual tokenizer, and writes no codes. Give a model of LaVIT's stage 2, or a "
            "converted one."
        )


def load_tokenizer(
    folder: str | Path, model: VWLMMForConditionalGeneration, has_conditions: bool = False
) -> VWLMMVisualTokenizer:
    """
    The visual tokenizer of a model, by itself and with its decoder.

    Args:
        folder (`str` or `Path`): Folder of the tokenizer.
        model ([`VWLMMForConditionalGeneration`]): The model whose codes it has to have.
        has_conditions (`bool`, *optional*, defaults to `False`):
            Whether its decoder has to make what Stable Diffusion XL reads.

    Raises:
        FileNotFoundError: If there is no tokenizer.
        ValueError: If it has no decoder, another one than is asked for, or other codes.
    """
    file = Path(folder, "config.json")
    if (
        not file.exists()
        or json.loads(file.read_text()).get("model_type") != VWLMMVisualTokenizer.config_class.model_type
    ):
        raise FileNotFoundError(
            f"{folder} holds no visual tokenizer, and the one inside of a model has no decoder. Name the folder that "
            "LaVIT's stage 1 has written with `--tokenizer`."
        )
    tokenizer, loading = VWLMMVisualTokenizer.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = sorted(name for name in loading["missing_keys"] if name.startswith("decoder."))
    if missing:
        raise ValueError(
            f"The visual tokenizer in {folder} has no decoder: {len(missing)} of its tensors are missing, "
            f"{missing[0]} among them. Name the folder that LaVIT's stage 1 has written with `--tokenizer`."
        )
    if has_conditions and tokenizer.decoder.condition_pool is None:
        raise ValueError(
            f"The decoder in {folder} does not make the two conditions that Stable Diffusion XL reads "
            f"(`condition_dims` is {tokenizer.config.condition_dims}, `pooled_condition_dim` "
            f"{tokenizer.config.pooled_condition_dim}). Name the authors' decoder of the higher resolution, "
            "`visual_tokenizer_highres` of a converted model, with `--tokenizer`."
        )
    codes, own = tokenizer.quantizer.embedding, model.model.visual_tokenizer.quantizer.embedding
    if codes.shape != own.shape or not torch.equal(codes, own.to(codes)):
        raise ValueError(
            f"The codebook in {folder}, {tuple(codes.shape)}, is not that of the model, {tuple(own.shape)}: the "
            "model's codes mean nothing to it. Name the tokenizer that the model was made from with `--tokenizer`."
        )
    return tokenizer.to(model.device).eval()


def write_codes(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, prompt: str, seed: int = 0, **options: Any
) -> torch.Tensor:
    """
    The codes that a model writes behind a prompt, a `torch.LongTensor` of shape `[codes]`.

    Args:
        model, processor: The model and its processor.
        prompt (`str`): What a caption would say.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
        options: What else [`~VWLMMForConditionalGeneration.generate_image_codes`] takes.

    Raises:
        ValueError: If there are none.
    """
    # As captions are trained on: behind nothing, not even a token that begins a text.
    inputs = processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    torch.manual_seed(seed)
    (codes,) = model.generate_image_codes(inputs["input_ids"].long(), inputs["attention_mask"], **options)
    if not len(codes):
        raise ValueError(
            f"Behind {prompt!r} the model ends the image before it has written a code. Try another `--seed` or "
            "prompt; a model that was trained without captions before their images (`text_first_share`) writes none."
        )
    return codes


@torch.inference_mode()
def measure_lengths(
    tokenizer: VWLMMVisualTokenizer, processor: VWLMMProcessor, images: list[Image.Image] | None = None
) -> torch.Tensor:
    """The mean lengths of patch features at each place of images, by default of a plain one: `[N, 1]`."""
    if not images:
        color = tuple(int(255 * value) for value in processor.image_processor.image_mean or (0.5, 0.5, 0.5))
        images = [Image.new("RGB", (tokenizer.config.vision_config.image_size,) * 2, color)]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]  # [I, 3, H, W]
    features = tokenizer.encode_patches(pixel_values.to(tokenizer.device))  # [I, N, C]
    return features.norm(dim=-1, keepdim=True).mean(dim=0)


@torch.inference_mode()
def rebuild(tokenizer: VWLMMVisualTokenizer, codes: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Patch features `[1, N, C]` of an image's codes, in the decoder's directions and of lengths `[N, 1]`."""
    return torch.nn.functional.normalize(tokenizer.decode(codes), dim=-1) * lengths


@torch.inference_mode()
def condition(
    model: VWLMMForConditionalGeneration, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    What the denoiser of a model is told of patch features `[I, N, C]`: what it was told of images in training, image
    features behind the adapter. Of high-resolution patches codes know nothing; a snapshot then is its own only one.
    """
    return get_conditions(model.model.adapt(features))


def check_same_tower(model: VWLMMForConditionalGeneration, other: VWLMMForConditionalGeneration, name: str) -> None:
    """Raises `ValueError` if the adapter of `other`, called `name`, reads other features than the codes stand for."""
    fields = ("vision_feature_layer", "vision_feature_select_strategy")
    own, others = model.model.vision_tower.state_dict(), other.model.vision_tower.state_dict()
    is_same = own.keys() == others.keys() and all(
        own[key].shape == others[key].shape and torch.equal(own[key], others[key].to(own[key])) for key in own
    )
    if not is_same or any(getattr(model.config, field) != getattr(other.config, field) for field in fields):
        raise ValueError(
            f"{name} has another vision tower than the model, or reads another layer of it: its adapter does not know "
            "the features that the codes stand for. Give a checkpoint on the same tower, which its training kept "
            "frozen."
        )


def load_pipeline(name: str) -> Any:
    """
    Stable Diffusion XL without its text encoders, of the folder or name of a pipeline that may lack them.

    Raises:
        ImportError: If diffusers is not installed, or an earlier one.
        OSError: If the pipeline has no VAE, U-Net or scheduler.
    """
    diffusers = import_diffusers("`--pipeline`")
    vae, unet = Pretrained("AutoencoderKL", name, "vae"), Pretrained("UNet2DConditionModel", name, "unet")
    try:  # only to read what its class is
        scheduler = diffusers.EulerDiscreteScheduler.load_config(name, subfolder="scheduler")
    except OSError as error:
        raise OSError(f"{name!r} has a VAE and a U-Net, and no scheduler: {error} Name a whole pipeline.") from error
    return diffusers.StableDiffusionXLPipeline(
        vae=vae.load(use_safetensors=None),  # the authors' release may have none
        unet=unet.load(use_safetensors=None),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


@torch.inference_mode()
def paint_with_pipeline(
    pipeline: Any, tokenizer: VWLMMVisualTokenizer, codes: torch.Tensor, seed: int = 0, **options: Any
) -> Image.Image:
    """
    An image of codes, by Stable Diffusion XL.

    Args:
        pipeline (`diffusers.StableDiffusionXLPipeline`): The pipeline.
        tokenizer ([`VWLMMVisualTokenizer`]): With a decoder that makes conditions.
        codes (`torch.LongTensor` of shape `[codes]`): The codes.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.
        options: What else the pipeline takes, such as `guidance_scale`.

    Raises:
        ValueError: If the pipeline reads conditions of other widths.
    """
    prompt, pooled = tokenizer.get_conditions(tokenizer.decode(codes))  # [1, N, J], [1, Q]
    config = pipeline.unet.config
    # Behind the pooled condition stand six numbers, sizes and corners, each as sines and cosines.
    reads = (
        config.cross_attention_dim,
        config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,
    )
    makes = (prompt.shape[-1], pooled.shape[-1])
    if makes != reads:
        raise ValueError(
            f"The tokenizer's decoder makes conditions of {makes[0]} and {makes[1]} numbers, and the pipeline reads "
            f"{reads[0]} and {reads[1]}. Name the pipeline that the decoder was trained for."
        )
    return pipeline(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=torch.zeros_like(prompt),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).images[0]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model that writes codes")
    parser.add_argument("prompt", help="what the image shows, as a caption would say it")
    parser.add_argument("-o", "--output", default="from_codes.png", help="picture to write")
    parser.add_argument(
        "--tokenizer",
        help="folder of the visual tokenizer with its decoder; by default `visual_tokenizer` of the checkpoint, or "
        "with `--pipeline` `visual_tokenizer_highres`",
    )
    parser.add_argument("--reconstruction", help="checkpoint whose denoiser draws; by default the model's own")
    parser.add_argument("--vae", help="path or name of its VAE, if it has moved")
    parser.add_argument("--denoiser", help="path or name of its pretrained denoiser, if it has moved")
    parser.add_argument("--like", nargs="+", help="images whose features are as long as the rebuilt ones shall be")
    parser.add_argument("--pipeline", help="folder or name of a Stable Diffusion XL that draws in place of a denoiser")
    parser.add_argument("--guidance", type=float, default=5.0, help="with `--pipeline`, its guidance scale")
    parser.add_argument("--top_k", type=int, default=50, help="codes are drawn from the so many likeliest")
    parser.add_argument("--code_guidance", type=float, default=1.0, help="guidance scale of the codes; 1 is none")
    parser.add_argument("--steps", type=int, default=28, help="steps from noise to image")
    parser.add_argument("--seed", type=int, default=0, help="of codes and noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)
    check_writes_codes(options.checkpoint)
    pipeline = None if options.pipeline is None else load_pipeline(options.pipeline).to(options.device)
    model = VWLMMForConditionalGeneration.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    model, processor = model.to(options.device), VWLMMProcessor.from_pretrained(options.checkpoint)
    folder = options.tokenizer or Path(options.checkpoint, TOKENIZERS[pipeline is not None])
    tokenizer = load_tokenizer(folder, model, has_conditions=pipeline is not None)
    if pipeline is None:
        name = options.reconstruction or options.checkpoint
        painter, _ = load(name, vae=options.vae, denoiser=options.denoiser)
        check_same_tower(model, painter.to(options.device), name)
    codes = write_codes(
        model,
        processor,
        options.prompt,
        options.seed,
        do_sample=True,
        top_k=options.top_k,
        guidance_scale=options.code_guidance,
    )
    if pipeline is not None:
        settings = {"guidance_scale": options.guidance, "num_inference_steps": options.steps}
        picture = paint_with_pipeline(pipeline, tokenizer, codes, options.seed, **settings)
    else:
        images = processor.image_processor.fetch_images(options.like or [])
        features = rebuild(tokenizer, codes, measure_lengths(tokenizer, processor, images))  # [1, N, C]
        reconstructor = painter.training_modules["reconstruction"]
        generator, sides = torch.Generator().manual_seed(options.seed), [reconstructor.size] * 2
        drawn = paint(reconstructor, condition(painter, features), sides, options.steps, generator)  # [1, 3, H, W]
        picture = Image.fromarray(to_pixels(drawn)[0])
    picture.save(options.output)
    print(f"{options.output}: {len(codes)} codes of {tokenizer.config.num_patches} at most, {options.prompt!r}")


if __name__ == "__main__":
    main()
