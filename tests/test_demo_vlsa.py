# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The small world's VLSA: what its data ask, what its shipped VAE keeps, and that every arm of the demo takes steps which
teach what the arm says. What they learn in the end, the demo prints.
"""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_diffusers
from PIL import Image
from safetensors.torch import load_file

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


ROOT = Path(__file__).parents[1]
PARTS = ROOT / "examples" / "small_world"
PLACES = {"top left": (0, 0), "top right": (64, 0), "bottom left": (0, 64), "bottom right": (64, 64)}
PERCEIVER = "model.multi_modal_projector.perceiver."

pytestmark = needs_diffusers
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture
def demo_vlsa(in_root):
    return importlib.import_module("demo_vlsa")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with data and both starts, of an adapter that has learned nothing."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        importlib.import_module("small_world").write_detailed_dataset(folder / "data", 6, num_held_out=3)
    parts = (PARTS / "vision_tower", PARTS / "llm")
    for name, max_patches in (("start_low", None), ("start_high", 4)):
        processor = VWLMMProcessor.from_vision_text_pretrained(*parts, max_patches=max_patches)
        torch.manual_seed(0)
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            *parts, image_token_index=processor.image_token_id, dtype=torch.float32
        )
        model.save_pretrained(folder / "mlp")
        options = {} if max_patches is None else {"adapter": "sa_perceiver"}
        VWLMMForConditionalGeneration.from_pretrained(folder / "mlp", **options).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def read_patterns(image: Image.Image) -> dict[str, str]:
    """The colour word of the pattern in each quadrant of a picture of the grey world, from its pixels."""
    pixels = np.asarray(image.convert("L")).astype(int)
    found = {}
    for name, (x, y) in PLACES.items():
        blocks = pixels[y : y + 64, x : x + 64].reshape(32, 2, 32, 2).swapaxes(1, 2)
        blocks = blocks[np.abs(blocks.mean(axis=(2, 3)) - 128) < 1]  # those inside of the thing
        if len(blocks):
            rows, columns = (np.ptp(blocks.mean(axis=axis), axis=1).max() > 90 for axis in (2, 1))
            is_plain = np.ptp(blocks.reshape(len(blocks), 4), axis=1).max() == 0
            found[name] = "white" if is_plain else "red" if rows else "green" if columns else "blue"
    return found


def test_answers_are_what_the_pixels_show(world):
    """Every question names a place alone, and no picture of training is asked about."""
    records = json.loads((world / "data" / "instructions.json").read_text())
    held_out = json.loads((world / "data" / "held_out.json").read_text())
    turns = []
    for record in records:
        texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        assert sum("What is" in question for question, _ in pairs) == 1 and len(pairs) <= 4
        turns += [(record["image"], *pair) for pair in pairs]
    turns += [(record["image"], record["question"], record["answer"]) for record in held_out]
    asked = 0
    for name, question, answer in turns:
        place = question.rpartition(" at the ")[2].rstrip("?")
        patterns = read_patterns(Image.open(world / "data" / "images" / name))
        assert answer.startswith(f"the shape at the {place} is ") and place in patterns
        if question.startswith("What colour"):
            asked += 1
            assert answer.rpartition(" ")[2] == patterns[place]
    assert asked > 10
    kinds = [record["kind"] for record in held_out]
    assert kinds == ["detail"] * 3 + ["twins"] * 3 + ["shape"] * 3
    twins = [
        read_patterns(Image.open(world / "data" / "images" / r["image"])) for r in held_out if r["kind"] == "twins"
    ]
    assert all(len(patterns) == 2 == len(set(patterns.values())) for patterns in twins)


def test_vae_keeps_the_patterns():
    """A VAE of squared errors alone is at 0.33, and one that knows nothing at 0.48."""
    parts = importlib.import_module("pretrain_vlsa_parts")
    vae = parts.load_vae()
    assert parts.probe_latents(vae, num_train=100, num_test=40) >= 0.8
    z = parts.encode(vae, parts.to_pixels(parts.make_scenes("probe/test", 40)))
    assert abs(z.mean()) < 0.3 and 0.7 < z.std() < 1.3  # shifted and scaled as the config says


# What of each arm learns: the perceiver, the Epigone beside the checkpoint, the VM head before.
LEARNS = {
    "low": set(),
    "a": {"perceiver"},
    "ab": {"perceiver", "epigone"},
    "c": set(),
    "abc": {"perceiver", "epigone"},
    "a_visual_words": {"perceiver", "vm_head"},
}


def test_every_arm_is_tested(demo_vlsa):
    assert {arm.folder for arm in demo_vlsa.ARMS if arm.options is not None} == LEARNS.keys()


def settings(world) -> list[str]:
    """Of a run of two steps: the first gives the perceiver's way out a weight, the second what lies before it."""
    options = {
        "json_file": world / "data" / "instructions.json",
        "image_folder": world / "data" / "images",
        "max_steps": 2,
        "global_batch_size": 2,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def find_changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors of two checkpoints that differ."""
    begun, ended = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name for name in ended if not torch.equal(ended[name], begun[name])}


@pytest.mark.parametrize("folder", LEARNS)
def test_steps_of_an_arm(demo_vlsa, world, tmp_path, folder):
    arm = next(arm for arm in demo_vlsa.ARMS if arm.folder == folder)
    for name in ("start_low", "start_high"):
        (tmp_path / name).symlink_to(world / name)
    demo_vlsa.train_arm(arm, tmp_path, settings(world))
    changed = find_changed(world / ("start_high" if arm.reads_patches else "start_low"), tmp_path / folder)
    assert "lm_head.weight" in changed and not any(".vision_tower." in name for name in changed)
    learned = {
        "perceiver": f"{PERCEIVER}w_kv.weight" in changed,
        "vm_head": any("vm_head" in name for name in changed),
        "epigone": (tmp_path / folder / "_training_modules" / "reconstruction.safetensors").exists(),
    }
    assert {name for name, is_learned in learned.items() if is_learned} == LEARNS[folder]


def test_reconstruction_alone(demo_vlsa, world, tmp_path):
    """The recipe teaches the adapter, from a denoiser that stays frozen and from no text."""
    train = importlib.import_module("train")
    recipe = ["--config", str(demo_vlsa.RECIPES / "reconstruction.yaml"), *settings(world)]
    train.main([*recipe, "--model_name_or_path", str(world / "start_high"), "--output_dir", str(tmp_path / "alone")])
    changed = find_changed(world / "start_high", tmp_path / "alone")
    assert f"{PERCEIVER}w_kv.weight" in changed and all(".multi_modal_projector." in name for name in changed)
    saved = load_file(tmp_path / "alone" / "_training_modules" / "reconstruction.safetensors")
    assert saved and all(name.startswith("epigone.") for name in saved)


def test_table(demo_vlsa, world, monkeypatch):
    monkeypatch.setattr(demo_vlsa, "RUNS", world)
    answers = {"detail": 0.5, "twins": 0.25, "shape": 1.0, "all": 0.6}
    pixel = {"questions": 60, "unreadable": 60, "mean_absolute_error": float("nan"), "mean_colour_error": float("nan")}
    table = demo_vlsa.make_table(
        {
            "none": {"answers": answers, "pixel": pixel},
            "some": {
                "answers": answers,
                "pixel": {**pixel, "unreadable": 1, "mean_absolute_error": 12.34, "mean_colour_error": 30.0},
            },
        }
    )
    head, _, none, some = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert head[0] == "exact match, 3 questions each" and "nan" not in table
    assert none == ["none", "50.0%", "25.0%", "100.0%", "", "60"]
    assert some[-2:] == ["12.3 (mean colour 30.0)", "1"]


def test_probe_reads_the_quadrant_of_each_thing(world):
    """Else a linear map is fitted to features of other things, and finds nothing before and after."""
    probe_reconstruction = importlib.import_module("probe_reconstruction")
    model = VWLMMForConditionalGeneration.from_pretrained(world / "start_high").eval()
    processor = VWLMMProcessor.from_pretrained(world / "start_high")
    scenes = importlib.import_module("pretrain_vlsa_parts").make_scenes("test", 3)
    features, labels = probe_reconstruction.read(model, processor, scenes)
    things = [
        (scene, thing, pattern)
        for scene in scenes
        for thing, pattern in zip(scene.things, scene.patterns, strict=True)
    ]
    assert len(features) == len(labels) == len(things) > 3
    for row, label, (scene, thing, pattern) in zip(features, labels, things, strict=True):
        with torch.no_grad():
            tokens = model.get_image_features(**processor(images=scene.image(), return_tensors="pt")).image_features[0]
        left, top = PLACES[thing.place]
        quadrant = tokens.reshape(8, 8, -1)[top // 16 :, left // 16 :][:4, :4]
        torch.testing.assert_close(row, quadrant.mean(dim=(0, 1)), atol=1e-4, rtol=0)
        assert list(probe_reconstruction.PATTERNS)[label] == pattern
