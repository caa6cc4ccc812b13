"""
Makes the two parts of the small world that VLSA's reconstruction needs, the counterparts of Stable Diffusion 3's.

    python examples/pretrain_vlsa_parts.py

writes to `examples/small_world/`, in half precision and diffusers' format:

- `vae/`: an `AutoencoderKL` that makes one of eight pixels, trained on crops of the grey world;
- `denoiser/`: an `SD3Transformer2DModel` that draws its latents, trained with captions of the grey world as prompts.

Both are read back from disk and measured. A VAE that is trained on squared errors alone keeps the coarse picture and
loses the patterns, so that nothing that is drawn through it can teach them: here what 2x2 pixels differ in counts
more, and a probe of the latents says what is left of it. The script takes about five minutes, and has to run only if
the small world itself changes.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from small_world import PATTERN_COLOURS, PATTERNS, PLACES, SHAPES, SIZES, DetailedScene, random_detailed_scene
from torch import nn
from tqdm import tqdm

from modeling_vwlmm.training.denoisers import SD3Denoiser
from modeling_vwlmm.training.reconstruction import add_noise, reconstruction_losses


OUTPUT = Path(__file__).parent / "small_world"
SEED = 0

FACTOR, LATENT_CHANNELS, CROP = 8, 16, 32
VAE_SCENES, VAE_BATCH, VAE_LR = 600, 16, 3e-3
VAE_STEPS = ((400, 4.0), (600, 40.0))  # and the weight of what 2x2 pixels differ in
LATENT_NOISE = 0.1  # standard deviation of the distribution that the encoder gives

DENOISER_SCENES, DENOISER_BATCH, DENOISER_STEPS, DENOISER_LR = 2000, 32, 400, 2e-3
WIDTH, PROMPT_WIDTH, MAX_THINGS = 96, 64, 4


def make_scenes(
    name: str, count: int, draw: Callable[[random.Random], DetailedScene] = random_detailed_scene
) -> list[DetailedScene]:
    """Scenes of the grey world. Names give different ones."""
    rng = random.Random(f"{SEED}/{name}")
    return [draw(rng) for _ in range(count)]


def to_pixels(scenes: list[DetailedScene]) -> torch.Tensor:
    """Their pictures, `[I, 3, 128, 128]` from -1 to 1."""
    images = np.stack([np.asarray(scene.image()) for scene in scenes])  # [I, 128, 128, 3]
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate that rises for 30 steps and then falls to 0."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, 1 - step / steps))


# ---------------------------------------------------------------------------------------------------------------- VAE


def build_vae() -> AutoencoderKL:
    """A VAE without attention, so that what it makes of a crop it makes of a picture."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 40),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=128,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def draw_crops(rng: random.Random, scenes: list[DetailedScene], pixels: torch.Tensor) -> torch.Tensor:
    """Crops with a thing in each, `[B, 3, CROP, CROP]`, at whole latents."""
    crops = []
    for index in rng.choices(range(len(scenes)), k=VAE_BATCH):
        thing = rng.choice(scenes[index].things)
        top, left = (
            min(max(2 * start + rng.randint(-CROP // 2, 2 * thing.side - CROP // 2), 0) // FACTOR * FACTOR, 128 - CROP)
            for start in (thing.top, thing.left)
        )
        crops.append(pixels[index, :, top : top + CROP, left : left + CROP])
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def take_detail(pixels: torch.Tensor) -> torch.Tensor:
    """What the pixels of each 2x2 differ in from their mean."""
    return pixels - F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2)


def train_vae() -> AutoencoderKL:
    """Trains the VAE. Its distribution has a fixed width, and no weight of a divergence has to be found."""
    torch.manual_seed(SEED)
    rng = random.Random(f"{SEED}/crops")
    scenes = make_scenes("vae", VAE_SCENES)
    pixels = to_pixels(scenes)
    vae = build_vae().to(memory_format=torch.channels_last).train()
    with torch.no_grad():  # the second half of the channels are logarithms of variances
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * np.log(LATENT_NOISE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = warm_up_and_decay(optimizer, sum(steps for steps, _ in VAE_STEPS))
    weights = [weight for steps, weight in VAE_STEPS for _ in range(steps)]
    for weight in (progress := tqdm(weights, desc="VAE")):
        crops = draw_crops(rng, scenes, pixels)
        mean = vae.encode(crops).latent_dist.mean
        copies = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
        coarse, detail = F.mse_loss(copies, crops), F.mse_loss(take_detail(copies), take_detail(crops))
        optimizer.zero_grad()
        (coarse + weight * detail).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(coarse=f"{coarse:.4f}", detail=f"{detail:.4f}")
    vae.eval()
    z = torch.cat([encode(vae, part) for part in pixels.split(50)])
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents of pictures, `[I, 16, 16, 16]`, shifted and scaled as the VAE's config says."""
    z = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(50)])
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def probe_latents(vae: AutoencoderKL, num_train: int = 600, num_test: int = 200) -> float:
    """How well a linear map reads a thing's pattern from the mean of the latents that it covers."""

    def read(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = make_scenes(name, count)
        z = encode(vae, to_pixels(scenes))
        features, labels = [], []
        for latent, scene in zip(z, scenes, strict=True):
            for thing, pattern in zip(scene.things, scene.patterns, strict=True):
                # A latent is of 4x4 pixels of the mask, which has half of the picture's.
                covered = F.avg_pool2d(torch.from_numpy(thing.mask())[None].float(), FACTOR // 2)[0] >= 0.75
                features.append(latent[:, covered].mean(dim=1))
                labels.append(list(PATTERNS).index(pattern))
        return torch.stack(features), torch.tensor(labels)

    return probe(*read("probe/train", num_train), *read("probe/test", num_test))


def probe(
    features: torch.Tensor, labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor
) -> float:
    """How often a linear map, fitted to features `[n, C]` and patterns `[n]`, is right about others."""
    features, test_features = (F.pad(rows, (0, 1), value=1.0) for rows in (features, test_features))
    gram = features.T @ features + 1e-2 * torch.eye(features.shape[1])
    weight = torch.linalg.solve(gram, features.T @ F.one_hot(labels).float())  # [C + 1, patterns]
    return ((test_features @ weight).argmax(dim=-1) == test_labels).float().mean().item()


# ----------------------------------------------------------------------------------------------------------- denoiser


class CaptionEmbedding(nn.Module):
    """
    A text encoder for captions of the grey world: a row for each phrase, the sum of its words, and their mean.

    Only the denoiser is kept; this is what it is trained with.
    """

    WORDS = (*PLACES, *SIZES, *PATTERN_COLOURS.values(), *SHAPES)

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(self.WORDS) + 1, PROMPT_WIDTH, padding_idx=0)
        self.nothing = nn.Parameter(torch.randn(PROMPT_WIDTH))
        self.pooled = nn.Linear(PROMPT_WIDTH, PROMPT_WIDTH)

    def tokenize(self, scenes: list[DetailedScene]) -> torch.Tensor:
        """Place, size, colour and shape of each thing, `[I, 4, 4]`; zeros where a scene has fewer."""
        rows = torch.zeros(len(scenes), MAX_THINGS, 4, dtype=torch.long)
        for row, scene in zip(rows, scenes, strict=True):
            for phrase, thing in zip(row, scene.things, strict=False):
                words = (thing.place, thing.size, thing.colour, thing.shape)
                phrase[:] = torch.tensor([self.WORDS.index(word) + 1 for word in words])
        return rows

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what `tokenize` returns the prompt, `[I, 4, 64]`, and the pooled embedding, `[I, 64]`."""
        rows = self.words(tokens).sum(dim=2)  # [I, 4, 64]
        rows = torch.where((tokens[..., :1] > 0), rows, self.nothing)
        return rows, self.pooled(rows.mean(dim=1))


def build_denoiser() -> SD3Transformer2DModel:
    """About 1 M parameters."""
    return SD3Transformer2DModel(
        sample_size=128 // FACTOR,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=PROMPT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=PROMPT_WIDTH,
        pos_embed_max_size=16,
    )


def get_losses(
    denoiser: SD3Transformer2DModel,
    condition: tuple[torch.Tensor, torch.Tensor],
    z: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The loss of the clean latent, of each picture, as the objective `reconstruction` has it: `[I]`."""
    z_t = add_noise(z, noise, sigma)
    return reconstruction_losses(z, z_t, sigma, SD3Denoiser(denoiser)(z_t, sigma, *condition))


def train_denoiser(vae: AutoencoderKL) -> tuple[SD3Transformer2DModel, CaptionEmbedding]:
    """Trains the denoiser and the embedding of its prompts."""
    torch.manual_seed(SEED)
    scenes = make_scenes("denoiser", DENOISER_SCENES)
    z = torch.cat([encode(vae, to_pixels(scenes[start : start + 100])) for start in range(0, len(scenes), 100)])
    denoiser, captions = build_denoiser().train(), CaptionEmbedding()
    tokens = captions.tokenize(scenes)
    parameters = [*denoiser.parameters(), *captions.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=DENOISER_LR, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = warm_up_and_decay(optimizer, DENOISER_STEPS)
    for _ in (progress := tqdm(range(DENOISER_STEPS), desc="Denoiser")):
        batch = torch.randint(len(z), (DENOISER_BATCH,))
        sigma, noise = torch.randn(DENOISER_BATCH).sigmoid(), torch.randn_like(z[batch])
        loss = get_losses(denoiser, captions(tokens[batch]), z[batch], sigma, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss:.3f}")
    return denoiser.eval(), captions.eval()


@torch.no_grad()
def measure_denoiser(
    denoiser: SD3Transformer2DModel, captions: CaptionEmbedding, vae: AutoencoderKL
) -> tuple[float, float]:
    """Its loss on new scenes, with their captions and with those of other scenes."""
    torch.manual_seed(SEED)
    scenes = make_scenes("denoiser/test", 200)
    z, tokens = encode(vae, to_pixels(scenes)), captions.tokenize(scenes)
    sigma, noise = torch.randn(len(z)).sigmoid(), torch.randn_like(z)
    own, others = (
        get_losses(denoiser, captions(prompts), z, sigma, noise).mean().item()
        for prompts in (tokens, tokens.roll(1, dims=0))
    )
    return own, others


# ---------------------------------------------------------------------------------------------------------------------


def load_vae() -> AutoencoderKL:
    """The VAE as its users will load it: from disk, in half precision."""
    return AutoencoderKL.from_pretrained(OUTPUT / "vae", torch_dtype=torch.float32).eval()


def count(model: nn.Module) -> str:
    """Its size in words."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"


def make_vae() -> None:
    """Trains, saves and measures the VAE."""
    train_vae().half().save_pretrained(OUTPUT / "vae")
    vae = load_vae()
    pixels = to_pixels(make_scenes("probe/test", 200))
    with torch.no_grad():
        z = encode(vae, pixels)
        copies = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
    print(f"VAE, {count(vae)}")
    print(f"  probe of the pattern from latents   {probe_latents(vae):.3f} (chance 0.25)")
    print(f"  mean squared error of pictures      {F.mse_loss(copies, pixels):.4f}")


def make_denoiser() -> None:
    """Trains, saves and measures the denoiser."""
    vae = load_vae()
    denoiser, captions = train_denoiser(vae)
    denoiser.half().save_pretrained(OUTPUT / "denoiser")
    denoiser = SD3Transformer2DModel.from_pretrained(OUTPUT / "denoiser", torch_dtype=torch.float32).eval()
    own, others = measure_denoiser(denoiser, captions, vae)
    print(f"Denoiser, {count(denoiser)}")
    print(f"  loss with a picture's caption       {own:.3f}")
    print(f"  loss with another picture's caption {others:.3f}")


def main() -> None:
    """Makes the parts that the command line names."""
    parts = {"vae": make_vae, "denoiser": make_denoiser}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help="what to make: vae, denoiser, or both")
    args = parser.parse_args()
    for part in args.parts:
        parts[part]()


if __name__ == "__main__":
    main()
