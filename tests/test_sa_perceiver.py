# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""VLSA's SA-Perceiver: its equations, the patches it reads, and that a model with it is a model like any other."""

import copy
import random
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import BY_HAND, GOLDEN, let_patches_matter, make_conversation
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from test_from_llava import make_llava
from test_hub import run_without_package
from torch.testing import assert_close
from transformers import CLIPVisionModel, pipeline, set_seed

from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.adapters_vwlmm import SAPerceiver, SAPerceiverProjector
from modeling_vwlmm.patches_vwlmm import Patches, get_token_centres, split_patches
from modeling_vwlmm.training import find_last_checkpoint
from processing_vwlmm import VWLMMProcessor
from processing_vwlmm.cutting_vwlmm import fit_grid, get_boxes


sys.path.insert(0, str(GOLDEN.parents[1] / "examples"))
from small_world import PATTERN_COLOURS, PATTERNS, PLACES, random_detailed_scene, random_twins


SIDE = 28  # of the tower's input, in pixels
NUM_TOKENS = 16
NEW_TOKENS = 8
SMALL_WORLD = GOLDEN.parents[1] / "examples/small_world"
VARIANTS = {
    "default": {},
    "no_nearness": {"distance_bias": False},
    "silu": {"activation": "silu", "distance_bias": False},
    "plain": {"pre_norm": False, "distance_bias": False},
}


def noise(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# One, two, four and three patches.
IMAGES = [noise(0, 20, 28), noise(1, 50, 20), noise(2, 90, 100), noise(3, 20, 80)]
NUM_PATCHES = [1, 2, 4, 3]


@pytest.fixture
def model(perceiving) -> VWLMMForConditionalGeneration:
    return VWLMMForConditionalGeneration.from_pretrained(perceiving, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(perceiving) -> VWLMMProcessor:
    return VWLMMProcessor.from_pretrained(perceiving)


def read(processor, *prompts: list[Image.Image], **options) -> dict[str, torch.Tensor]:
    """Prompts with these images, padded on the left."""
    conversations = [
        make_conversation((len(images), "What is left?" + " Who?" * len(images), ""))[:1] for images in prompts
    ]
    text = [processor.apply_chat_template(c, add_generation_prompt=True) for c in conversations]
    return dict(processor(text=text, images=list(prompts), padding=True, return_tensors="pt", **options))


def golden(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "vlsa/vlsa.npz") as file:
        return {name: torch.from_numpy(file[name]).to(dtype) for name in file}


def load_layers(module: torch.nn.Module, values: dict[str, torch.Tensor], prefix: str) -> None:
    """Gives a module its weights in the golden file, which calls those of a layer by the layer's name."""
    for name, parameter in module.named_parameters():
        key = prefix + name.removesuffix(".weight").replace(".bias", "_bias")
        parameter.data = values[key].reshape(parameter.shape).to(parameter.dtype)


class TestEquations:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_perceiver(self, variant, dtype, tolerance):
        """Alone and in a batch: grids of 1, 4 and 3 patches."""
        values = golden(dtype)
        perceiver = SAPerceiver(16, **VARIANTS[variant]).to(dtype)
        load_layers(perceiver, values, "perceiver.")
        inputs = [[values[f"image{i}.{name}"] for i in range(3)] for name in ("lo", "hi", "boxes")]
        for chosen in ([0], [1], [2], [0, 1, 2]):
            lo, hi, boxes = ([values[i] for i in chosen] for values in inputs)
            num_patches = torch.tensor([len(patches) for patches in hi])
            tokens, queries = perceiver(torch.stack(lo), torch.cat(hi), torch.cat(boxes), num_patches)
            for name, found in (("V", tokens), ("P", queries)):
                expected = torch.stack([values[f"image{i}.{variant}.{name}"] for i in chosen])
                assert_close(found, expected, atol=tolerance, rtol=0)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    def test_projector(self, dtype, tolerance):
        values = golden(dtype)
        adapter = SAPerceiverProjector(
            VWLMMConfig(
                vision_config={"hidden_size": 16, "num_attention_heads": 4, "image_size": 21, "patch_size": 7},
                text_config={"hidden_size": 20, "num_attention_heads": 2},
                adapter="sa_perceiver",
            )
        ).to(dtype)
        load_layers(adapter.perceiver, values, "perceiver.")
        for name in ("linear_1", "linear_2"):
            layer = adapter.get_submodule(name)
            layer.weight.data, layer.bias.data = values[f"projector.{name}"], values[f"projector.{name}_bias"]
        hi = [values[f"image{i}.hi"] for i in range(3)]
        boxes = torch.cat([values[f"image{i}.boxes"] for i in range(3)])
        patches = Patches(torch.cat(hi), boxes, [len(image) for image in hi])
        output = adapter(torch.stack([values[f"image{i}.lo"] for i in range(3)]), patches)
        for i in range(3):
            assert_close(output.image_features[i], values[f"image{i}.features"], atol=tolerance, rtol=0)
            assert_close(output.global_features[i], values[f"image{i}.global_feature"], atol=tolerance, rtol=0)

    def test_boxes(self):
        """Of images that are 1 x 1, 2 x 2 and 1 x 3 patches, on the snapshot's square."""
        values, settings = golden(), {"do_pad": True, "do_center_crop": False}
        for image, (rows, columns) in enumerate([(1, 1), (2, 2), (1, 3)]):
            boxes = torch.tensor(get_boxes(rows * 28, columns * 28, 28, 28, 4, settings), dtype=torch.float64)
            assert_close(boxes, values[f"image{image}.boxes"], atol=1e-10, rtol=0)

    def test_centres(self):
        values = golden()
        centres = get_token_centres(values["centres.box"][None], 3, 3)[0].flatten(0, 1)
        assert_close(centres, values["centres.values"], atol=1e-12, rtol=0)

    def test_half_precision_stays_close(self):
        """Logits and distances are not rounded to eight bits."""
        values = golden(torch.float32)
        perceiver = SAPerceiver(16)
        load_layers(perceiver, values, "perceiver.")
        inputs = [values["image1.lo"][None], values["image1.hi"], values["image1.boxes"]]
        tokens, _ = perceiver.bfloat16()(*(tensor.bfloat16() for tensor in inputs), [4])
        assert tokens.dtype == torch.bfloat16
        expected = values["image1.default.V"]
        assert (tokens[0].float() - expected).norm() < 0.02 * expected.norm()

    def test_start(self):
        perceiver = SAPerceiver(512, side=6)
        assert not perceiver.w_o1.weight.any() and not perceiver.w_o2.weight.any()
        assert perceiver.log_nearness.exp().item() == pytest.approx(18)
        assert perceiver.query.std().item() == pytest.approx(0.02, rel=0.2)
        names = {name for name, _ in SAPerceiver(8, distance_bias=False, pre_norm=False).named_parameters()}
        assert names == {"query", *(f"{name}.weight" for name in ("w_q", "w_kv", "w_o1", "w_k", "w_o2"))}

    def test_size(self):
        perceiver = SAPerceiver(1024)
        assert sum(p.numel() for p in perceiver.parameters()) == 5 * 1024**2 + 6 * 1024 + 1024 + 1

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match="'gelu'; expected one of .*'silu', 'softmax'"):
            SAPerceiver(8, activation="gelu")

    def test_tokens_that_are_no_square(self):
        features = torch.zeros(1, 10, 8)
        with pytest.raises(ValueError, match="10 tokens, which are no square grid.*class token"):
            SAPerceiver(8)(features, features, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), [1])
        SAPerceiver(8, distance_bias=False)(features, features, torch.zeros(1, 4), [1])


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("max_patch", 4, "field 'max_patch'.*expected max_patches, activation, distance_bias.*Leave it out"),
            ("max_patches", 0, "'max_patches'.* is 0; expected a whole number from 1 on"),
            ("max_patches", True, "'max_patches'.* is True"),
            ("activation", "relu", "'activation'.* is 'relu'; expected one of .*'silu', 'softmax'"),
            ("distance_bias", "yes", "'distance_bias'.* is 'yes'; expected True or False"),
        ],
    )
    def test_bad_fields(self, field, value, message, vicuna):
        with pytest.raises(ValueError, match=message):
            VWLMMForConditionalGeneration.from_pretrained(
                vicuna, adapter="sa_perceiver", adapter_config={field: value}
            )

    def test_fields_reach_the_perceiver(self, vicuna, tmp_path):
        options = {"max_patches": 9, "activation": "silu", "distance_bias": False}
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna, adapter="sa_perceiver", adapter_config=options)
        perceiver = model.model.multi_modal_projector.perceiver
        assert (perceiver.activation, perceiver.log_nearness) == ("silu", None)
        model.save_pretrained(tmp_path)
        assert VWLMMConfig.from_pretrained(tmp_path).adapter_config == options

    @pytest.mark.parametrize("max_patches", [0, -1, 1.5])
    def test_bad_processor(self, vicuna, max_patches):
        with pytest.raises(ValueError, match=f"`max_patches` is {max_patches}; expected a whole number"):
            VWLMMProcessor.from_pretrained(vicuna, max_patches=max_patches)


class TestFreshPerceiver:
    """A model that gets one computes what it has computed before, to the last bit."""

    @staticmethod
    def check(fresh, plain, processor, old_processor):
        inputs, old_inputs = (read(p, IMAGES[:1], IMAGES[1:]) for p in (processor, old_processor))
        assert len(inputs["pixel_values"]) == sum(NUM_PATCHES) + 4 and "patch_boxes" not in old_inputs
        with torch.no_grad():
            expected = plain(**old_inputs).logits
            assert (fresh(**inputs).logits - expected).abs().max() == 0.0
        let_patches_matter(fresh)
        with torch.no_grad():
            assert (fresh(**inputs).logits - expected).abs().max() > 0.01

    def test_from_pretrained(self, vicuna):
        plain = VWLMMForConditionalGeneration.from_pretrained(vicuna)
        fresh = VWLMMForConditionalGeneration.from_pretrained(vicuna, adapter="sa_perceiver")
        processors = [VWLMMProcessor.from_pretrained(vicuna, max_patches=n) for n in (4, None)]
        self.check(fresh, plain, *processors)

    def test_from_llava(self, tmp_path, vicuna):
        folder = make_llava(tmp_path / "llava", VWLMMProcessor.from_pretrained(vicuna))
        plain = VWLMMForConditionalGeneration.from_llava(folder)
        fresh = VWLMMForConditionalGeneration.from_llava(folder, adapter="sa_perceiver")
        assert fresh.config.adapter == "sa_perceiver" and fresh.config.trained_stages == [1, 2]
        processors = [VWLMMProcessor.from_llava(folder, max_patches=n) for n in (4, None)]
        self.check(fresh, plain, *processors)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_small_world(self, tmp_path, dtype):
        torch.manual_seed(0)
        parts = (SMALL_WORLD / "vision_tower", SMALL_WORLD / "llm")
        processors = [VWLMMProcessor.from_vision_text_pretrained(*parts, max_patches=n) for n in (4, None)]
        plain = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            *parts, image_token_index=processors[0].image_token_id
        )
        plain.save_pretrained(tmp_path)
        plain, fresh = (
            VWLMMForConditionalGeneration.from_pretrained(tmp_path, adapter=adapter, dtype=dtype)
            for adapter in ("mlp", "sa_perceiver")
        )
        images = [noise(0, 200, 100), noise(1, 64, 64)]
        text = ["<image> a", "<image>"]
        inputs, old_inputs = (
            p(text=text, images=images, padding=True, return_tensors="pt").to(dtype) for p in processors
        )
        with torch.no_grad():
            assert (fresh(**inputs).logits - plain(**old_inputs).logits).abs().max() == 0.0

    def test_from_parts(self):
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            SMALL_WORLD / "vision_tower",
            SMALL_WORLD / "llm",
            adapter="sa_perceiver",
            adapter_config={"max_patches": 2},
        )
        perceiver = model.model.multi_modal_projector.perceiver
        assert not perceiver.w_o1.weight.any() and not perceiver.w_o1.weight.is_meta
        assert perceiver.log_nearness.exp().item() == pytest.approx(32, rel=1e-2)  # 8 x 8 patches

    def test_llava_keeps_no_other_adapter(self, tmp_path, vicuna):
        folder = make_llava(tmp_path / "llava", VWLMMProcessor.from_pretrained(vicuna))
        with pytest.raises(ValueError, match="unknown|expected one of"):
            VWLMMForConditionalGeneration.from_llava(folder, adapter="unknown")


class TestCutting:
    @pytest.mark.parametrize(
        ("height", "width", "expected"),
        [
            (1, 1, (1, 1, 1, 1)),
            (28, 28, (28, 28, 1, 1)),
            (29, 28, (29, 28, 2, 1)),
            (56, 56, (56, 56, 2, 2)),
            (57, 56, (56, 55, 2, 2)),
            (28, 112, (28, 112, 1, 4)),
            (56, 112, (28, 56, 1, 2)),
            (1, 10_000, (1, 112, 1, 4)),
            (10_000, 10_000, (56, 56, 2, 2)),
        ],
    )
    def test_grid(self, height, width, expected):
        grid = fit_grid(height, width, SIDE, SIDE, 4)
        assert (grid.height, grid.width, grid.rows, grid.columns) == expected
        turned = fit_grid(width, height, SIDE, SIDE, 4)
        assert (turned.width, turned.height, turned.columns, turned.rows) == expected

    def test_cap_holds_for_any_size(self):
        rng = np.random.default_rng(0)
        for _ in range(3000):
            height, width = (int(2 ** rng.uniform(0, 14)) for _ in range(2))
            max_patches = int(rng.integers(1, 13))
            grid = fit_grid(height, width, SIDE, SIDE, max_patches)
            assert 1 <= grid.rows * grid.columns <= max_patches
            assert (grid.rows - 1) * SIDE < grid.height <= grid.rows * SIDE
            assert (grid.columns - 1) * SIDE < grid.width <= grid.columns * SIDE
            if -(-height // SIDE) * -(-width // SIDE) <= max_patches:
                assert (grid.height, grid.width) == (height, width)

    def test_rows_of_a_batch(self, processor, vicuna):
        """A snapshot as without patches, then patches in raster order, which are the image's own pixels."""
        inputs = processor(images=IMAGES, return_tensors="pt")
        pixel_values, boxes = inputs["pixel_values"], inputs["patch_boxes"]
        assert boxes.dtype == torch.float32 and len(boxes) == len(pixel_values) == sum(NUM_PATCHES) + 4
        starts = (boxes == 0).all(dim=1).nonzero().flatten()
        assert starts.tolist() == [0, 2, 5, 10]
        expected = VWLMMProcessor.from_pretrained(vicuna)(images=IMAGES, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixel_values[starts], expected)
        # The second image is 50 x 20, and lies in the middle of 56 x 28.
        shown = torch.cat([pixel_values[3], pixel_values[4]], dim=1)  # [3, 56, 28]
        settings = processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
        found = ((shown * std + mean) * 255).round().byte()
        assert torch.equal(found[:, 3:53, 4:24], torch.from_numpy(np.asarray(IMAGES[1])).permute(2, 0, 1))
        color = torch.tensor([int(value * 255) for value in settings.image_mean], dtype=torch.uint8)
        assert (found[:, :3] == color[:, None, None]).all() and (found[:, :, 24:] == color[:, None, None]).all()

    def test_boxes(self, processor):
        """In the snapshot's unit square, in whose middle the shorter side of the image is."""
        boxes = processor(images=[noise(0, 56, 28), noise(0, 20, 80)], return_tensors="pt")["patch_boxes"]
        assert_close(boxes[:3], torch.tensor([[0, 0, 0, 0], [0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 0.75]]))
        # 80 x 20 pixels in the middle of 84 x 28, so that the first patch begins 2 pixels before and 4 above it.
        left, top = -2 / 80, (30 - 4) / 80
        assert_close(boxes[4], torch.tensor([top, left, top + 28 / 80, left + 28 / 80]))

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"do_pad": True, "do_center_crop": False}, [0.25, 0.0, 0.75, 0.5]),
            # The middle 28 x 28 of 28 x 56: LLaVA's own checkpoints.
            ({"do_pad": False, "do_center_crop": True, "size": {"shortest_edge": 28}}, [0.0, -0.5, 1.0, 0.5]),
            # The whole image, pressed into a square.
            ({"do_pad": False, "do_center_crop": False}, [0.0, 0.0, 1.0, 0.5]),
        ],
    )
    def test_boxes_follow_what_the_snapshot_shows(self, options, expected):
        size = {"height": SIDE, "width": SIDE}
        settings = {"do_resize": True, "size": size, "crop_size": size, **options}
        assert get_boxes(28, 56, SIDE, SIDE, 4, settings)[0] == pytest.approx(expected)

    def test_patches_lie_where_their_boxes_say(self, processor):
        """A white dot is in the snapshot where the box of its patch puts it."""
        for size, dot in (((100, 60), (70, 20)), ((28, 90), (5, 80)), ((300, 200), (250, 30))):
            pixels = np.zeros((*size, 3), dtype=np.uint8)
            reach = max(size) // 20
            pixels[dot[0] - reach : dot[0] + reach, dot[1] - reach : dot[1] + reach] = 255
            inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
            rows = inputs["pixel_values"].sum(dim=1)  # [rows, 28, 28]
            rows = (rows - rows.mean(dim=(1, 2), keepdim=True)).relu()
            patch = int(rows[1:].flatten(1).max(dim=1).values.argmax()) + 1
            places = []
            for row, box in ((0, torch.tensor([0.0, 0.0, 1.0, 1.0])), (patch, inputs["patch_boxes"][patch])):
                weights = (rows[row] > rows[row].max() * 0.7).float().flatten()
                centres = get_token_centres(box[None], SIDE, SIDE)[0].flatten(0, 1)
                places.append((centres * weights[:, None]).sum(0) / weights.sum())
            assert_close(places[0], places[1], atol=0.04, rtol=0)

    @pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (10_000, 10_000)])
    def test_any_size_has_as_many_tokens(self, processor, model, size):
        image = Image.new("RGB", size, "red")
        inputs = processor(images=image, text="<image>", return_tensors="pt")
        counted = processor._get_num_multimodal_tokens([size[::-1]])
        num_rows = 1 + min(4, -(-size[0] // SIDE) * -(-size[1] // SIDE))
        assert (inputs["input_ids"] == 480).sum() == NUM_TOKENS and counted.num_image_tokens == [NUM_TOKENS]
        assert len(inputs["pixel_values"]) == num_rows and counted.num_image_patches == [num_rows]
        images = model.model.get_image_features(inputs["pixel_values"], patch_boxes=inputs["patch_boxes"])
        assert [tuple(features.shape) for features in images.image_features] == [(NUM_TOKENS, 48)]
        assert tuple(images.global_features.shape) == (1, 48)

    def test_counts_are_those_of_the_rows(self, processor):
        counted = processor._get_num_multimodal_tokens([image.size[::-1] for image in IMAGES])
        assert counted.num_image_patches == [1 + number for number in NUM_PATCHES]

    @pytest.mark.parametrize("image", [Image.new("RGB", (0, 5)), np.zeros((5, 0, 3), np.uint8), torch.zeros(3, 0, 5)])
    def test_no_pixels(self, processor, vicuna, image):
        for each in (processor, VWLMMProcessor.from_pretrained(vicuna)):
            with pytest.raises(ValueError, match="has 0 x 5 pixels, expected|of shape .* has no pixels|no pixels"):
                each(images=image, text="<image>", return_tensors="pt")
        with pytest.raises(ValueError, match="has 0 x 5 pixels; expected one at least"):
            processor._get_num_multimodal_tokens([[5, 0]])

    def test_a_bomb_is_a_file(self, monkeypatch, processor, tmp_path):
        """What is in memory already has been decoded."""
        image = Image.new("RGB", (100, 90))
        image.save(tmp_path / "image.png")
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 5000)
        processor(images=image, text="<image>")
        with pytest.raises(ValueError, match="no readable image"), pytest.warns():
            processor(images=[str(tmp_path / "image.png")], text="<image>")

    def test_kinds_of_images(self, processor, tmp_path):
        """The same pixels in any form."""
        image = IMAGES[2]
        image.save(tmp_path / "image.png")
        pixels = np.asarray(image)
        expected = processor(images=image, return_tensors="pt")
        for other in (
            str(tmp_path / "image.png"),
            pixels,
            torch.from_numpy(pixels.copy()).permute(2, 0, 1),
            pixels.astype(np.float32) / 255,
        ):
            found = processor(images=[other], return_tensors="pt")
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
            assert torch.equal(found["patch_boxes"], expected["patch_boxes"])
        lists = processor(images=[image])
        assert len(lists["pixel_values"]) == len(lists["patch_boxes"]) == 5
        with pytest.raises(ValueError, match="float32 with 3 channels.*Leave `do_rescale`"):
            processor(images=[pixels.astype(np.float32) / 255], do_rescale=False)

    def test_prompts_of_which_some_open_with_bos(self, processor):
        inputs = processor(
            text=["<s><image> a", "<image><image> b"], images=IMAGES[:3], return_tensors="pt", padding=True
        )
        together = processor(images=IMAGES[:3], return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], together["pixel_values"])
        assert torch.equal(inputs["patch_boxes"], together["patch_boxes"])

    def test_saved_and_reloaded(self, processor, vicuna, tmp_path):
        processor.save_pretrained(tmp_path)
        assert VWLMMProcessor.from_pretrained(tmp_path).max_patches == 4
        old = VWLMMProcessor.from_pretrained(vicuna)
        assert old.max_patches is None and "patch_boxes" not in old.model_input_names
        assert "patch_boxes" in processor.model_input_names
        with pytest.raises(ValueError, match="`max_patches` is 4, and a LLaVA's processor cuts no patches"):
            processor.to_llava()


class TestModel:
    def test_images_of_any_number_of_patches_in_a_batch(self, model, processor):
        inputs = processor(images=IMAGES, return_tensors="pt")
        together = model.model.get_image_features(**inputs)
        for index, image in enumerate(IMAGES):
            alone = model.model.get_image_features(**processor(images=[image], return_tensors="pt"))
            assert_close(together.image_features[index], alone.image_features[0], atol=1e-4, rtol=0)
            assert_close(together.global_features[index], alone.global_features[0], atol=1e-4, rtol=0)
        assert together.patch_features.shape[:2] == (4, NUM_TOKENS)

    @pytest.mark.parametrize("activation", ["softmax", "silu"])
    def test_padding_of_a_batch_is_no_patch(self, activation):
        torch.manual_seed(0)
        perceiver = SAPerceiver(8, activation=activation, side=2)
        torch.nn.init.normal_(perceiver.w_o1.weight)
        snapshots, patches = torch.randn(2, 4, 8), torch.randn(4, 4, 8)
        boxes = torch.rand(4, 2).repeat(1, 2) + torch.tensor([0, 0, 0.5, 0.5])
        together = perceiver(snapshots, patches, boxes, [1, 3])[0]
        assert_close(together[:1], perceiver(snapshots[:1], patches[:1], boxes[:1], [1])[0])
        assert_close(together[1:], perceiver(snapshots[1:], patches[1:], boxes[1:], [3])[0])
        for num_patches in ([1, 2], [4], [4, 0]):
            with pytest.raises(ValueError, match=rf"is \{num_patches}, of 2 snapshots and 4 patches; expected"):
                perceiver(snapshots, patches, boxes, num_patches)
        for wrong, found in ((boxes[1:], r"torch.Size\(\[3, 4\]\)"), (boxes.tolist(), "list"), (None, "NoneType")):
            with pytest.raises(ValueError, match=rf"`patch_boxes` is {found}; expected a tensor of shape \(4, 4\)"):
                perceiver(snapshots, patches, wrong, [1, 3])

    def test_order_of_patches(self, model, processor):
        """It is nothing but the boxes that says where a patch is."""
        inputs = processor(images=[IMAGES[2]], return_tensors="pt")
        order = torch.tensor([0, 3, 1, 4, 2])
        pixel_values, boxes = inputs["pixel_values"], inputs["patch_boxes"]
        expected = model.model.get_image_features(pixel_values, patch_boxes=boxes).image_features[0]
        moved = model.model.get_image_features(pixel_values[order], patch_boxes=boxes[order]).image_features[0]
        mixed = model.model.get_image_features(pixel_values[order], patch_boxes=boxes).image_features[0]
        assert_close(moved, expected, atol=1e-4, rtol=0)
        assert (mixed - expected).abs().max() > 0.01

    def test_without_boxes_a_snapshot_is_its_own_patch(self, model, processor):
        pixel_values = processor(images=IMAGES, return_tensors="pt")["pixel_values"][:2]
        alone = model.model.get_image_features(pixel_values).image_features
        assert len(alone) == 2
        rows = pixel_values[[0, 0, 1, 1]]
        boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).repeat(2, 1)
        boxed = model.model.get_image_features(rows, patch_boxes=boxes).image_features
        assert_close(torch.stack(alone), torch.stack(boxed), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda boxes: boxes[:-1],
                r"\[4, 4\]\), and `pixel_values` has 5 rows; expected a tensor of shape \(5, 4",
            ),
            (
                lambda boxes: boxes[:, :3],
                r"\[5, 3\]\), and `pixel_values` has 5 rows; expected a tensor of shape \(5, 4",
            ),
            (lambda boxes: boxes.tolist(), "`patch_boxes` is list, and `pixel_values` has 5 rows; expected a tensor"),
            (lambda boxes: boxes.roll(-1, 0), "Row 0 of `patch_boxes` is .*; expected zeros.*snapshot"),
            (lambda boxes: boxes * torch.tensor([1, 1, 1, 1, 0])[:, None], "Row 4 .* with no patch behind it"),
            (lambda boxes: boxes * 0, "Row 0 .* with no patch behind it.*Leave `patch_boxes` out"),
            (lambda boxes: boxes + 1, "Row 0 of `patch_boxes` is .*; expected zeros.*snapshot"),
            (lambda boxes: boxes[:, [2, 3, 0, 1]], "Row 1 of `patch_boxes` is .*; expected finite .* with y0 < y1"),
            (lambda boxes: boxes / (boxes > 0.6), "Row [0-9] of `patch_boxes` is .*"),
        ],
    )
    def test_boxes_that_do_not_fit(self, model, processor, change, message):
        inputs = read(processor, [IMAGES[2]])
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, "patch_boxes": change(inputs["patch_boxes"])})

    def test_adapters_that_read_no_patches(self, vicuna, processor):
        mlp = VWLMMForConditionalGeneration.from_pretrained(vicuna)
        with pytest.raises(ValueError, match="reads one row of `pixel_values` an image.*without `max_patches`"):
            mlp(**read(processor, [IMAGES[2]]))

    def test_visual_words_and_nearest_tokens(self, model, processor):
        inputs = processor(images=IMAGES, return_tensors="pt")
        features = torch.stack(model.model.get_image_features(**inputs).image_features)  # [4, N, D]
        words = model.get_visual_words(**inputs, top_k=2)
        assert words.token_ids.shape == (4, NUM_TOKENS, 2)
        assert torch.equal(words.token_ids[..., 0], model.model.vm_head(features).argmax(dim=-1))
        embeddings = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=-1)
        nearest = (features @ embeddings[: model.config.text_config.vocab_size].T).argmax(dim=-1)
        assert torch.equal(model.get_nearest_tokens(**inputs), nearest)

    def test_pseudo_image_features(self, model, processor):
        model.config.use_pseudo_image_features = True
        images = model.model.get_image_features(**processor(images=IMAGES, return_tensors="pt"))
        words = model.model.vm_head(torch.stack(images.image_features)).softmax(dim=-1)
        vocabulary = model.get_input_embeddings().weight[: model.config.text_config.vocab_size]
        assert_close(torch.stack(images.pooler_output), words @ vocabulary, atol=1e-5, rtol=1e-4)

    def test_reloaded(self, model, processor, perceiving, tmp_path):
        model.save_pretrained(tmp_path)
        before, after = load_file(f"{perceiving}/model.safetensors"), load_file(tmp_path / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        inputs = read(processor, IMAGES)
        with torch.no_grad():
            again = VWLMMForConditionalGeneration.from_pretrained(tmp_path)
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)

    def test_no_llava_computes_this(self, model):
        with pytest.raises(ValueError, match="`adapter` is 'sa_perceiver'"):
            model.to_llava()


PROMPTS = [IMAGES[:1], [IMAGES[2], IMAGES[1]], [], IMAGES[3:]]


class TestGeneration:
    """Prompts with one image, two of different sizes, none, and one with another number of patches."""

    @staticmethod
    def generate(model, inputs, **kwargs) -> torch.Tensor:
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **kwargs}
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    def test_first_token_is_that_of_forward(self, model, processor):
        inputs = read(processor, *PROMPTS)
        with torch.no_grad():
            expected = model(**inputs).logits[:, -1]
        output = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert_close(output.logits[0], expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    def test_a_padded_batch_answers_as_one_by_one(self, model, processor, options):
        together = self.generate(model, read(processor, *PROMPTS), **options)
        for index, images in enumerate(PROMPTS):
            alone = self.generate(model, read(processor, images), **options)
            assert torch.equal(together[index], alone[0]), index
        if not options:  # that the patches count
            inputs = read(processor, *PROMPTS)
            perceiver = model.model.multi_modal_projector.perceiver
            torch.nn.init.zeros_(perceiver.w_o1.weight)
            torch.nn.init.zeros_(perceiver.w_o2.weight)
            assert not torch.equal(self.generate(model, inputs)[1], together[1])

    def test_sampling_with_a_seed(self, model, processor):
        inputs = read(processor, PROMPTS[1])
        options = {"do_sample": True, "top_k": 50}
        set_seed(0)
        sampled = self.generate(model, inputs, **options)
        set_seed(0)
        assert torch.equal(self.generate(model, inputs, **options), sampled)
        set_seed(0)
        several = self.generate(model, inputs, **options, num_return_sequences=3)
        assert several.shape == (3, NEW_TOKENS) and len(several.unique(dim=0)) > 1

    def test_without_a_cache_and_in_chunks(self, model, processor):
        inputs = read(processor, *PROMPTS)
        expected = self.generate(model, inputs)
        assert torch.equal(self.generate(model, inputs, use_cache=False), expected)
        assert torch.equal(self.generate(model, inputs, prefill_chunk_size=7), expected)

    def test_pipeline(self, model, processor):
        content = [{"type": "image", "image": image} for image in PROMPTS[1]]
        content.append({"type": "text", "text": "What is left? Who? Who?"})
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
        text = pipe(text=[{"role": "user", "content": content}], return_full_text=False, **options)
        expected = self.generate(model, read(processor, PROMPTS[1]), min_new_tokens=0)[0]
        assert text[0]["generated_text"] == processor.decode(expected, skip_special_tokens=True)


def test_folder_works_without_the_package(perceiving, model, processor, tmp_path):
    IMAGES[2].save(tmp_path / "image.png")
    output = run_without_package(
        f"""
        from transformers import AutoModelForImageTextToText, AutoProcessor
        trust = {{"trust_remote_code": True}}
        model = AutoModelForImageTextToText.from_pretrained({perceiving!r}, **trust)
        processor = AutoProcessor.from_pretrained({perceiving!r}, **trust)
        content = [{{"type": "image", "image": "image.png"}}, {{"type": "text", "text": "What is left? Who?"}}]
        inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
                                               tokenize=True, return_dict=True, return_tensors="pt")
        print(model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, -8:].tolist())
        model.save_pretrained("again")
        processor.save_pretrained("again")
        print(AutoProcessor.from_pretrained("again", **trust).max_patches)
        """,
        tmp_path,
    )
    expected = TestGeneration.generate(model, read(processor, [IMAGES[2]]))[0].tolist()
    assert {str(expected), "4"} <= set(output.splitlines())
    again, before = load_file(tmp_path / "again/model.safetensors"), load_file(f"{perceiving}/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())


class TestTraining:
    """The samples have images of one to four patches, two images, or none."""

    @pytest.fixture
    def make_trainer(self, perceiving, processor, dataset, tmp_path):
        def make(stage, model=None, peft_config=None, train_dataset=dataset, **options):
            if model is None:
                model = VWLMMForConditionalGeneration.from_pretrained(perceiving)
            defaults = {"per_device_train_batch_size": 4, "global_batch_size": 4, "max_steps": 1, **BY_HAND}
            args = VWLMMTrainingArguments(
                str(tmp_path / "run"), stage=stage, **{**defaults, "chat_template": "vicuna_v1", **options}
            )
            return VWLMMTrainer(
                model=model,
                args=args,
                train_dataset=train_dataset,
                processing_class=copy.deepcopy(processor),
                peft_config=peft_config,
            )

        return make

    @staticmethod
    def weights(model) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize("stage", [1, 2])
    def test_all_of_the_perceiver_learns(self, make_trainer, stage):
        """Whatever a stage freezes, not this. Of images of every number of patches, and texts alone, in one batch."""
        trainer = make_trainer(stage, optim="sgd", learning_rate=1.0)
        before = self.weights(trainer.model)
        trainer.train()
        changed = {name for name, value in self.weights(trainer.model).items() if not torch.equal(value, before[name])}
        perceiver = {name for name in before if "multi_modal_projector" in name}
        assert len(perceiver) == 13 + 4 and perceiver <= changed
        assert {name.split(".")[1] for name in changed - perceiver} == (
            set() if stage == 1 else {"language_model", "weight"}
        )

    def test_a_fresh_perceiver_learns(self, make_trainer, vicuna):
        """From zeros, of which everything else gets its gradients only behind them."""
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna, adapter="sa_perceiver")
        make_trainer(1, model=model, max_steps=4, learning_rate=1e-2).train()
        perceiver = model.model.multi_modal_projector.perceiver
        assert perceiver.w_o1.weight.any() and perceiver.w_o2.weight.any()
        assert perceiver.log_nearness.item() != pytest.approx(np.log(8), abs=1e-4)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_cuts_of_a_step(self, make_trainer, stage):
        """One batch of four and two of two: the same loss, images and weights."""
        results = []
        for size in (4, 2):
            trainer = make_trainer(
                stage, per_device_train_batch_size=size, optim="sgd", learning_rate=0.1, max_steps=2
            )
            trainer.train()
            log = [entry for entry in trainer.state.log_history if "loss" in entry]
            results.append(([entry["loss"] for entry in log], self.weights(trainer.model)))
        assert_close(*(torch.tensor(losses) for losses, _ in results), atol=0, rtol=1e-5)
        for name, value in results[0][1].items():
            assert_close(results[1][1][name], value, atol=1e-5, rtol=1e-5, msg=name)

    def test_packed_as_padded(self, make_trainer):
        results = []
        for packing in (False, True):
            options = {"packing": True, "max_length": 1200} if packing else {}
            trainer = make_trainer(2, per_device_train_batch_size=8, global_batch_size=8, **options)
            batch = trainer.data_collator(
                list(trainer.train_dataset) if not packing else [list(trainer.train_dataset)]
            )
            assert len(batch["patch_boxes"]) == len(batch["pixel_values"]) > 7
            with torch.no_grad():
                results.append(trainer.compute_loss(trainer.model, dict(batch)))
        assert_close(*results, atol=1e-5, rtol=1e-5)

    def test_images_are_counted_and_not_their_rows(self, make_trainer):
        trainer = make_trainer(1, per_device_train_batch_size=8, global_batch_size=8)
        counted = []
        trainer._means["train"].add_batch = lambda positions, padding, images: counted.append(int(images))
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.compute_loss(trainer.model.train(), batch)
        assert counted == [sum(len(sample["images"]) for sample in trainer.train_dataset)] == [7]

    def test_texts_alone(self, make_trainer, dataset):
        """Every module is called, so that processes stay in step, and learns nothing."""
        trainer = make_trainer(1, train_dataset=dataset.select([1, 6, 1, 6]))
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert "patch_boxes" not in batch
        trainer.compute_loss(trainer.model, batch).backward()
        adapter = trainer.model.model.multi_modal_projector
        assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())

    @pytest.mark.parametrize("whole", [None, ["multi_modal_projector"]], ids=["targets", "whole"])
    def test_lora(self, make_trainer, processor, whole):
        target = r".*language_model.*(q|v)_proj" if whole else r".*(language_model.*(q|v)_proj|perceiver\.w_\w+)"
        trainer = make_trainer(2, peft_config=LoraConfig(target_modules=target, modules_to_save=whole), max_steps=2)
        before = self.weights(trainer.model)
        trainer.train()
        after = self.weights(trainer.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        learns = ("modules_to_save" if whole else "lora_") + "|lora_"
        assert changed == {name for name in before if any(part in name for part in learns.split("|"))}
        assert any("perceiver.w_q" in name for name in changed)
        inputs = read(processor, *PROMPTS)
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits
            merged = trainer.model.merge_and_unload()(**inputs).logits
        assert_close(merged, expected, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("objective", ["visual_words", "vm_head", "features", "token_labels"])
    def test_objectives(self, make_trainer, objective, dataset):
        """Of image positions, of which there are as many as ever."""
        stage = 3 if objective == "vm_head" else 4
        if objective == "token_labels":
            labels = [[[5] * NUM_TOKENS] * len(sample["images"]) for sample in dataset]
            dataset = dataset.add_column("image_labels", labels)
        trainer = make_trainer(
            stage,
            visual_objective=objective,
            train_dataset=dataset,
            per_device_train_batch_size=8,
            global_batch_size=8,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["num_image_positions"] == 7 * NUM_TOKENS and log["visual_loss"] > 0

    def test_resumed(self, make_trainer, tmp_path):
        whole = make_trainer(2, max_steps=4, save_strategy="steps", save_steps=2)
        whole.train()
        resumed = make_trainer(2, max_steps=4, save_strategy="steps", save_steps=2)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
        assert find_last_checkpoint(str(tmp_path / "run")).endswith("checkpoint-4")
        others = self.weights(whole.model)
        assert all(torch.equal(value, others[name]) for name, value in self.weights(resumed.model).items())

    @pytest.mark.parametrize(
        ("adapter", "max_patches", "message"),
        [
            (
                "sa_perceiver",
                None,
                r"max_patches=None, and the model.*'sa_perceiver', expects 4. Set .*max_patches = 4",
            ),
            (
                "sa_perceiver",
                9,
                r"max_patches=9.*expects 4. Set .*or `adapter_config=\{'max_patches': 9\}` of the model",
            ),
            ("mlp", 4, r"max_patches=4.*'mlp', expects None. Set `processor.max_patches = None`"),
        ],
    )
    def test_processor_of_another_model(self, make_trainer, vicuna, processor, adapter, max_patches, message):
        other = copy.deepcopy(processor)
        other.max_patches = max_patches
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna, adapter=adapter)
        with pytest.raises(ValueError, match=message):
            VWLMMTrainer(
                model=model,
                args=make_trainer(2).args,
                train_dataset=make_trainer(2).train_dataset,
                processing_class=other,
            )


class TestDetail:
    """Patterns of single pixels, which a snapshot cannot show."""

    def test_scenes(self):
        """Any 2 x 2 pixels of a thing have its colour on average, and the picture of half the size no pattern."""
        rng = random.Random(0)
        scenes = [random_detailed_scene(rng) for _ in range(20)] + [random_twins(rng)]
        for scene in scenes:
            pixels = np.asarray(scene.image()).astype(int)
            assert pixels.shape == (128, 128, 3)
            means = pixels.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
            for thing, pattern in zip(scene.things, scene.patterns, strict=True):
                assert (means[thing.mask()] == thing.rgb).all()
                first = pixels[thing.mask().repeat(2, 0).repeat(2, 1)] - thing.rgb
                assert bool(first.any()) == (pattern != "plain")
                assert thing.colour == PATTERN_COLOURS[pattern]
        first, second = scenes[-1].things
        assert (first.shape, first.rgb, first.side) == (second.shape, second.rgb, second.side)
        assert first.place != second.place and scenes[-1].patterns[0] != scenes[-1].patterns[1]
        rng = random.Random(0)
        assert [random_detailed_scene(rng) for _ in range(20)] == scenes[:20]

    def test_twins(self):
        """
        Which of two places has which pattern: a perceiver with a head for each quadrant learns it in 300 steps.
        Without distances it would be right half of the time, for it could not know which place is which, and snapshots
        alone are right by chance.
        """
        rng = random.Random(0)
        tower = CLIPVisionModel.from_pretrained(SMALL_WORLD / "vision_tower", dtype=torch.float32)
        processor = VWLMMProcessor.from_vision_text_pretrained(
            SMALL_WORLD / "vision_tower", SMALL_WORLD / "llm", max_patches=4
        )

        def encode(scenes) -> tuple[torch.Tensor, Patches, torch.Tensor]:
            inputs = processor(images=[scene.image() for scene in scenes], return_tensors="pt")
            with torch.no_grad():
                features = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
            labels = torch.full((len(scenes), 4), -100)
            for row, scene in zip(labels, scenes, strict=True):
                for thing, pattern in zip(scene.things, scene.patterns, strict=True):
                    row[list(PLACES).index(thing.place)] = list(PATTERNS).index(pattern)
            return *split_patches(features, inputs["patch_boxes"]), labels

        train, test = (
            encode([random_detailed_scene(rng) for _ in range(200)]),
            encode([random_twins(rng) for _ in range(100)]),
        )
        width = tower.config.hidden_size

        def learn(perceiver: SAPerceiver | None) -> float:
            head = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, 4))
            modules = torch.nn.ModuleList([head, perceiver] if perceiver else [head])
            optimizer = torch.optim.AdamW(modules.parameters(), lr=3e-3)

            def answer(snapshots: torch.Tensor, patches: Patches, indices: torch.Tensor) -> torch.Tensor:
                tokens = snapshots[indices]  # [I, 64, W]
                if perceiver is not None:
                    of_image = patches.features.unflatten(0, (-1, 4))[indices].flatten(0, 1)
                    boxes = patches.boxes.unflatten(0, (-1, 4))[indices].flatten(0, 1)
                    tokens, _ = perceiver(tokens, of_image, boxes, [4] * len(indices))
                return head(tokens.unflatten(1, (2, 4, 2, 4)).mean(dim=(2, 4)).flatten(1, 2))  # [I, 4, 4]

            for _ in range(300):
                indices = torch.randint(len(train[0]), (8,))
                logits = answer(*train[:2], indices)
                optimizer.zero_grad()
                F.cross_entropy(logits.flatten(0, 1), train[2][indices].flatten()).backward()
                optimizer.step()
            with torch.no_grad():
                found = answer(*test[:2], torch.arange(len(test[0]))).argmax(dim=-1)
            is_thing = test[2] >= 0
            return (found == test[2])[is_thing].float().mean().item()

        torch.manual_seed(0)
        assert learn(SAPerceiver(width, side=8)) >= 0.75
        assert learn(None) <= 0.35
