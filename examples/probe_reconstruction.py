"""
What reconstruction alone teaches an adapter: the small world's SA-Perceiver learns from a frozen denoiser and from no
text, and a linear map says how much detail there is in its image features, before and after.

    python examples/probe_reconstruction.py --seed 0

It needs stage II of `make demo`, as `make demo-vlsa` leaves it, and trains with the recipe
`examples/recipes/small_world_vlsa/reconstruction.yaml`.
"""

import argparse
from pathlib import Path

import torch
import train
from demo_vlsa import NUM_CONVERSATIONS, RECIPES, RUNS, make_starts
from pretrain_vlsa_parts import make_scenes, probe
from small_world import PATTERNS, PLACES, DetailedScene, random_twins, write_detailed_dataset

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


NUM_TRAIN, NUM_TEST = 300, 150
BATCH_SIZE = 25


def main() -> None:
    """Trains, and prints the probe before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of new weights, order and noise")
    args = parser.parse_args()
    output = RUNS / f"reconstruction_{args.seed}"
    write_detailed_dataset(RUNS / "data", NUM_CONVERSATIONS)
    make_starts(output, args.seed)
    begin, end = output / "start_high", output / "trained"
    recipe = ["--config", str(RECIPES / "reconstruction.yaml"), "--seed", str(args.seed)]
    train.main([*recipe, "--model_name_or_path", str(begin), "--output_dir", str(end)])
    for name, folder in (("before", begin), ("after", end)):
        detail, twins = measure(folder)
        print(f"{name}: {detail:.3f} of the patterns of new scenes, {twins:.3f} of those of twins (chance 0.25)")


def measure(folder: Path) -> tuple[float, float]:
    """How well a linear map reads patterns from image features: of new scenes, and of scenes with twins."""
    model = VWLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = VWLMMProcessor.from_pretrained(folder)
    scenes = make_scenes("probe/twins", NUM_TEST, random_twins)
    tests = [read(model, processor, test) for test in (make_scenes("probe/test", NUM_TEST), scenes)]
    fitted = read(model, processor, make_scenes("probe/train", NUM_TRAIN))
    return tuple(probe(*fitted, *test) for test in tests)


@torch.inference_mode()
def read(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, scenes: list[DetailedScene]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each thing the mean of the image features of its quadrant, `[n, D]`, and its pattern, `[n]`."""
    features, labels = [], []
    for start in range(0, len(scenes), BATCH_SIZE):
        some = scenes[start : start + BATCH_SIZE]
        inputs = processor(images=[scene.image() for scene in some], return_tensors="pt")
        tokens = torch.stack(tuple(model.get_image_features(**inputs).image_features))  # [I, 64, D]
        quadrants = tokens.unflatten(1, (2, 4, 2, 4)).mean(dim=(2, 4)).flatten(1, 2)  # [I, 4, D]
        for row, scene in zip(quadrants, some, strict=True):
            features += [row[list(PLACES).index(thing.place)] for thing in scene.things]
            labels += [list(PATTERNS).index(pattern) for pattern in scene.patterns]
    return torch.stack(features), torch.tensor(labels)


if __name__ == "__main__":
    main()
