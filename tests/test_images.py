# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Images as they are in the world: upright and of 8 bits wherever they come in, or refused by name."""

import base64
import copy
import io
import json
import pickle
import resource
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import GOLDEN, make_image, tiny_text
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image, ImageCms
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaProcessor,
    logging,
    pipeline,
)
from transformers.image_utils import PILImageResampling
from transformers.utils import is_torchvision_available
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor, images_vwlmm, llava_dataset, load_llava_dataset
from processing_vwlmm.building_vwlmm import count_extra_tokens
from processing_vwlmm.images_vwlmm import convert_to_rgb, find_problem


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(llava_dataset, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """What a camera writes of an upright image that is held so."""
    transpose = Image.Transpose
    steps = {2: transpose.FLIP_LEFT_RIGHT, 3: transpose.ROTATE_180, 4: transpose.FLIP_TOP_BOTTOM}
    steps |= {5: transpose.TRANSPOSE, 6: transpose.ROTATE_90, 7: transpose.TRANSVERSE, 8: transpose.ROTATE_270}
    return image.transpose(steps[orientation]) if orientation > 1 else image


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[PIL.Image.ExifTags.Base.Orientation] = orientation
    tags[PIL.Image.ExifTags.Base.Make] = "camera"
    return tags


def user(part: dict) -> list[dict]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]


def from_message(processor, part: dict) -> torch.Tensor:
    out = processor.apply_chat_template(user(part), tokenize=True, return_dict=True, return_tensors="pt")
    return out["pixel_values"]


def from_llava_dataset(processor, data: bytes, folder: Path) -> torch.Tensor:
    (folder / "images").mkdir()
    (folder / "images" / "a").write_bytes(data)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    (folder / "data.json").write_text(json.dumps([{"id": 1, "image": "a", "conversations": turns}]))
    dataset = load_llava_dataset(folder / "data.json", folder / "images")
    return DataCollatorForVisionLanguageModeling(processor)([dataset[0]])["pixel_values"]


def from_hub_dataset(processor, data: bytes, folder: Path) -> torch.Tensor:
    """Bytes in the table, as of a dataset from the Hub."""
    messages = [*user({"type": "image"}), {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]
    dataset = Dataset.from_dict({"messages": [messages], "images": [[{"bytes": data, "path": None}]]})
    dataset = dataset.cast_column("images", List(ImageFeature()))
    row = dataset[0]
    row["messages"] = messages
    return DataCollatorForVisionLanguageModeling(processor)([row])["pixel_values"]


def write(data: bytes, folder: Path) -> str:
    (folder / "written").write_bytes(data)
    return str(folder / "written")


# Every way in which an image reaches the model.
WAYS = {
    "processor": lambda p, data, _: (
        p(text="<image>", images=Image.open(io.BytesIO(data)), return_tensors="pt").pixel_values
    ),
    "images alone": lambda p, data, _: p(images=Image.open(io.BytesIO(data)), return_tensors="pt").pixel_values,
    "decoded before": lambda p, data, _: p(images=load(data), return_tensors="pt").pixel_values,
    "image processor": lambda p, data, _: p.image_processor(load(data), return_tensors="pt").pixel_values,
    "image processor, nested": lambda p, data, _: p.image_processor([[load(data)]], return_tensors="pt").pixel_values,
    "image processor, path": lambda p, data, folder: (
        p.image_processor(write(data, folder), return_tensors="pt").pixel_values
    ),
    "message": lambda p, data, _: from_message(p, {"type": "image", "image": load(data)}),
    "path in a message": lambda p, data, folder: from_message(p, {"type": "image", "path": write(data, folder)}),
    "Path in a message": lambda p, data, folder: from_message(
        p, {"type": "image", "image": Path(write(data, folder))}
    ),
    "bytes in a message": lambda p, data, _: from_message(p, {"type": "image", "image": data}),
    "data URL in a message": lambda p, data, _: from_message(
        p, {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}
    ),
    "base64 in a message": lambda p, data, _: from_message(
        p, {"type": "image", "base64": base64.b64encode(data).decode()}
    ),
    "LLaVA's data": from_llava_dataset,
    "data with bytes": from_hub_dataset,
}


def load(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def pixels_of(processor, image: Image.Image) -> torch.Tensor:
    """What LLaVA's own image processor makes of an upright RGB image."""
    own = processor.image_processor.without_rules
    settings = {k: v for k, v in processor.image_processor.to_dict().items() if k != "image_processor_type"}
    return own(**settings)(image, return_tensors="pt")["pixel_values"]


class TestOrientation:
    @pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
    def test_once_wherever_it_comes_in(self, processor, way, tmp_path, form):
        upright = make_image(3).resize((48, 32))
        lossless = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0}
        for orientation in (1, 6) if form != "JPEG" else range(1, 9):
            data = encode(turned(upright, orientation), form, exif=exif(orientation), **lossless)
            folder = tmp_path / str(orientation)
            folder.mkdir()
            found = way(processor, data, folder)
            tolerance = 0.15 if form == "JPEG" else 0
            torch.testing.assert_close(found, pixels_of(processor, upright), atol=tolerance, rtol=0)
            # The tolerance tells one orientation from another.
            assert (found - pixels_of(processor, upright.transpose(Image.Transpose.ROTATE_90))).abs().max() > 0.5

    def test_pipeline(self, processor, vicuna, tmp_path):
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
        pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
        upright = make_image(3).resize((48, 32))
        sideways = load(encode(turned(upright, 6), "PNG", exif=exif(6)))
        seen = []
        model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        pipe(text=user({"type": "image", "image": sideways}), max_new_tokens=1)
        torch.testing.assert_close(seen[0], pixels_of(processor, upright))

    def test_exif_that_cannot_be_read(self, processor):
        data = encode(make_image(0), "PNG", exif=b"Exif\0\0no TIFF header")
        with pytest.raises(ValueError, match="is no readable image"):
            processor(images=load(data))


DEPTHS = {
    "8 bits": (Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (40, 1))), "PNG"),
    "I;16": (Image.fromarray(np.tile(np.arange(256, dtype=np.uint16) * 257, (40, 1))), "PNG"),
    "I;16 TIFF": (Image.fromarray(np.tile(np.arange(256, dtype=np.uint16) * 257, (40, 1))), "TIFF"),
    "I;16B TIFF": (
        Image.frombytes("I;16B", (256, 40), np.tile(np.arange(256, dtype=">u2") * 257, (40, 1)).tobytes()),
        "TIFF",
    ),
    "I": (Image.fromarray(np.tile(np.arange(256, dtype=np.int32) * 257, (40, 1))), "TIFF"),
    "I of 8 bits": (Image.fromarray(np.tile(np.arange(256, dtype=np.int32), (40, 1))), "TIFF"),
    "F to 1": (Image.fromarray(np.tile(np.arange(256, dtype=np.float32) / 255, (40, 1))), "TIFF"),
    "F to 255": (Image.fromarray(np.tile(np.arange(256, dtype=np.float32), (40, 1))), "TIFF"),
}


class TestDepth:
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_scaled_not_clipped(self, processor, way, tmp_path, depth):
        image, form = DEPTHS[depth]
        expected = pixels_of(processor, DEPTHS["8 bits"][0].convert("RGB"))
        assert torch.equal(way(processor, encode(image, form), tmp_path), expected)

    def test_pixels_as_they_are(self):
        for depth, (image, form) in DEPTHS.items():
            found = np.asarray(convert_to_rgb(load(encode(image, form))))
            assert (found == np.tile(np.arange(256), (40, 1))[..., None]).all(), depth

    def test_dark_16_bits_of_a_png_stay_dark(self):
        dark = np.full((4, 4), 200, np.uint16)
        assert np.asarray(convert_to_rgb(load(encode(Image.fromarray(dark), "PNG")))).max() == 1

    @pytest.mark.parametrize(
        "values, error",
        [
            (np.array([[0, np.nan]], np.float32), "NaN or infinite"),
            (np.array([[0, np.inf]], np.float32), "NaN or infinite"),
            (np.array([[0, 300.0]], np.float32), "from 0.0 to 300.0, expected numbers from 0 to 1 or from 0 to 255"),
            (np.array([[-1, 1.0]], np.float32), "from -1.0 to 1.0"),
            (np.array([[-1, 1]], np.int32), "from -1 to 1, expected integers"),
            (np.array([[0, 70000]], np.int32), "from 0 to 70000, expected integers from 0 to 255 or from 0 to 65535"),
        ],
    )
    def test_unknown_range_is_refused(self, processor, tmp_path, values, error):
        image = Image.fromarray(np.tile(values, (8, 4)))
        for name in ("processor", "image processor", "bytes in a message", "path in a message", "LLaVA's data"):
            folder = tmp_path / name
            folder.mkdir()
            with pytest.raises(ValueError, match=error):
                WAYS[name](processor, encode(image, "TIFF"), folder)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32, np.float64, np.float16, bool])
    @pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
    def test_arrays(self, processor, kind, dtype):
        grey = make_image(1)
        levels = np.asarray(grey)
        if dtype is bool:
            levels = (levels > 127) * np.uint8(255)
        scale = {np.uint16: 257, bool: 1 / 255}.get(dtype, 1 / 255 if np.issubdtype(dtype, np.floating) else 1)
        array = kind((levels.astype(np.float64) * scale).astype(dtype).transpose(2, 0, 1).copy())
        found = processor.image_processor([array], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, pixels_of(processor, Image.fromarray(levels)))

    def test_array_that_is_scaled_already(self, processor):
        array = np.linspace(-1, 1, 3 * 28 * 28, dtype=np.float32).reshape(3, 28, 28)
        as_it_is = {"do_rescale": False, "do_normalize": False, "do_resize": False}
        out = processor.image_processor([array], return_tensors="np", **as_it_is)
        np.testing.assert_array_equal(out["pixel_values"][0], array)
        with pytest.raises(ValueError, match=r"An image of shape \(3, 28, 28\) cannot be used: it has pixels from -1"):
            processor.image_processor([array])


def transparent(mode: str) -> Image.Image:
    """A red square on transparent green: the green must not show."""
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (2, 2, 6, 6))
    if mode == "LA":
        return image.convert("LA")
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.paste(0, (2, 2, 6, 6))
        palette.putpalette([255, 0, 0, 0, 255, 0])
        return palette
    return image


class TestModes:
    @pytest.mark.parametrize(
        "mode, form",
        [("RGBA", form) for form in ("PNG", "WEBP", "GIF", "TIFF")]
        + [("LA", "PNG"), ("LA", "TIFF"), ("P", "PNG"), ("P", "GIF")],
    )
    def test_transparent_pixels_are_white(self, processor, mode, form):
        options = {"transparency": 1} if mode == "P" else {"lossless": True, "exact": True} if form == "WEBP" else {}
        found = np.asarray(convert_to_rgb(load(encode(transparent(mode), form, **options))))
        assert (found[0, 0] == 255).all()
        assert (found[4, 4] == (76 if mode == "LA" else [255, 0, 0])).all()

    def test_half_transparent(self):
        found = convert_to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 102)))
        assert found.getpixel((0, 0)) == (153, 153, 153)

    @pytest.mark.parametrize("mode, color", [("L", 7), ("RGB", (1, 2, 3)), ("I;16", 7 * 257)])
    def test_transparent_color(self, mode, color):
        image = Image.new(mode, (4, 4), 0)
        image.paste(color, (0, 0, 2, 2)) if mode != "I;16" else image.putpixel((0, 0), color)
        found = convert_to_rgb(load(encode(image, "PNG", transparency=color)))
        assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((3, 3)) == (0, 0, 0)

    def test_opaque_is_as_pillow_has_it(self):
        noise = make_image(2)
        for mode in ("1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "RGBX"):
            image = noise.convert(mode)
            assert convert_to_rgb(image).tobytes() == image.convert("RGB").tobytes(), mode
        assert convert_to_rgb(noise) is noise
        lab = ImageCms.profileToProfile(
            noise, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
        assert convert_to_rgb(lab).mode == "RGB"

    def test_cmyk_jpeg(self):
        """Adobe writes CMYK upside down, and says so in a marker of its own."""
        data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
        marker = data.index(b"\xff\xee")
        assert data[marker + 4 : marker + 9] == b"Adobe"
        red = np.asarray(convert_to_rgb(load(data)))[8, 8]
        assert (np.abs(red.astype(int) - [255, 0, 0]) < 4).all()
        assert find_problem_of(data) is None

    def test_animation_is_its_first_frame_and_says_so(self, monkeypatch):
        warnings = []
        monkeypatch.setattr(images_vwlmm.logger, "warning_once", warnings.append)
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        for form in ("GIF", "WEBP", "PNG", "TIFF"):
            options = {"lossless": True} if form == "WEBP" else {}
            data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
            assert convert_to_rgb(Image.open(io.BytesIO(data))).getpixel((0, 0)) == (255, 0, 0)
        assert len(warnings) == 4 and "only the first is read" in warnings[0]

    def test_wrong_extension(self, processor, tmp_path):
        make_image(0).save(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / "a.jpg")
        assert find_problem(tmp_path / "a.jpg") is None
        found = from_message(processor, {"type": "image", "path": str(tmp_path / "a.jpg")})
        assert torch.equal(found, pixels_of(processor, make_image(0)))


def find_problem_of(data: bytes) -> str | None:
    return find_problem(io.BytesIO(data))


class TestSizes:
    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 3), (2, 3)])
    def test_small(self, processor, size):
        image = Image.new("RGB", size, "red")
        out = processor(text="<image>", images=image, return_tensors="pt")
        assert out["pixel_values"].shape == (1, 3, 28, 28)
        assert torch.equal(out["pixel_values"], pixels_of(processor, image))

    @pytest.mark.skipif(is_torchvision_available(), reason="torchvision rounds otherwise than Pillow")
    @pytest.mark.parametrize("size", [(300, 7), (7, 300), (257, 101), (101, 257)])
    def test_resized_before_it_is_padded_are_the_same_pixels(self, processor, monkeypatch, size):
        image = make_image(4).resize(size)
        expected = pixels_of(processor, image)
        monkeypatch.setattr(images_vwlmm, "MAX_SQUARE", 1000)
        monkeypatch.setattr(images_vwlmm, "STRIP", 3000)
        assert torch.equal(processor.image_processor(image, return_tensors="pt")["pixel_values"], expected)

    def test_very_long_takes_little_memory(self, processor):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for size in ((20000, 3), (3, 20000)):
            found = processor(images=Image.new("RGB", size, "red"), return_tensors="pt")["pixel_values"]
            assert found.shape == (1, 3, 28, 28)
        # A square of 20,000 x 20,000 has 1.2 GB.
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 300

    def test_very_long_without_padding_is_refused(self, processor):
        other = LlavaProcessor(image_processor=CLIPImageProcessor(), tokenizer=processor.tokenizer, patch_size=14)
        ours = VWLMMProcessor(
            image_processor=other.image_processor, tokenizer=processor.tokenizer, patch_size=14
        ).image_processor
        with pytest.raises(ValueError, match="20000 x 3 pixels is too long .* 224 pixels, its long one 1493333. Cut"):
            ours(Image.new("RGB", (20000, 3)))
        image = Image.new("RGB", (40, 30), "red")
        expected = other.image_processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(ours(image, return_tensors="pt")["pixel_values"], expected)

    def test_decompression_bomb(self, processor, monkeypatch, tmp_path):
        data = encode(Image.new("L", (64, 64)), "PNG")
        for limit in (4000, 1000):  # Pillow warns of the one, and refuses the other
            monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.warns() if limit == 4000 else pytest.raises(PIL.Image.DecompressionBombError):
                Image.open(io.BytesIO(data))
            for name in ("bytes in a message", "path in a message", "LLaVA's data"):
                folder = tmp_path / f"{limit} {name}"
                folder.mkdir()
                with pytest.raises(ValueError, match=r"no readable image: .*(limit|MAX_IMAGE_PIXELS)"):
                    WAYS[name](processor, data, folder)


class TestBroken:
    @pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
    @pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.9])
    def test_truncated(self, processor, tmp_path, form, keep):
        data = encode(make_image(1).resize((64, 64)), form)
        data = data[: int(len(data) * keep)]
        assert find_problem_of(data)
        for name in ("bytes in a message", "path in a message", "LLaVA's data"):
            folder = tmp_path / name
            folder.mkdir()
            with pytest.raises(ValueError, match="is no readable image"):
                WAYS[name](processor, data, folder)

    @pytest.mark.parametrize("source", ["missing.png", "directory", "text.txt"])
    def test_no_image(self, processor, tmp_path, source):
        (tmp_path / "directory").mkdir()
        (tmp_path / "text.txt").write_text("no image")
        for path in (str(tmp_path / source), tmp_path / source):
            with pytest.raises(ValueError, match="no readable image"):
                processor.image_processor(path)

    def test_a_long_path_is_no_base64(self, processor, tmp_path):
        with pytest.raises(ValueError, match="missing.png is no readable image: the file does not exist"):
            processor.image_processor(str(tmp_path / ("a" * 64) / "missing.png"))

    def test_truncated_image_that_was_opened(self, processor):
        data = encode(make_image(1), "PNG")[:-300]
        with pytest.raises(ValueError, match="An image of mode RGB and 25 x 21 pixels is no readable image"):
            processor(text="<image>", images=Image.open(io.BytesIO(data)))


class TestImageProcessor:
    def test_is_saved_under_its_own_name(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
        assert saved["image_processor_type"] == "LlavaImageProcessor"
        assert "AutoImageProcessor" not in saved.get("auto_map", {})

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_copies_keep_the_rules(self, processor, copied):
        grey = Image.fromarray(np.full((8, 8), 257 * 7, np.uint16))
        found = copied(processor.image_processor)(grey, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, pixels_of(processor, Image.new("RGB", (8, 8), (7, 7, 7))))

    def test_one_that_is_passed_is_not_changed(self, processor):
        own = CLIPImageProcessor(resample=PILImageResampling.BILINEAR)
        kind = type(own)
        VWLMMProcessor(image_processor=own, tokenizer=processor.tokenizer, patch_size=14)
        assert type(own) is kind


# What Transformers' towers make: tokens beside the patches.
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
TOWERS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "aimv2_vision_model": 0,
    "ijepa": 0,
    "vit": 1,
    "vit_msn": 1,
    "mlcd_vision_model": 1,
    "beit": 1,
    "data2vec-vision": 1,
}


class TestClassToken:
    @pytest.mark.parametrize("kind", TOWERS)
    def test_tower_is_asked(self, kind):
        assert count_extra_tokens(AutoConfig.for_model(kind, **SMALL)) == TOWERS[kind]

    @pytest.mark.parametrize(
        "kind, error",
        [
            ("dinov2_with_registers", "5 beside them, such as register tokens"),
            ("deit", "2 beside them"),
            ("convnext", "'convnext' cannot be used"),
            ("swin", "cannot be used|beside them"),
            ("vit_mae", "beside them"),
        ],
    )
    def test_refused(self, kind, error):
        with pytest.raises(ValueError, match=error):
            count_extra_tokens(AutoConfig.for_model(kind, **(SMALL if kind not in ("convnext", "swin") else {})))

    def test_sides_that_are_two_numbers(self):
        config = CLIPVisionConfig(**SMALL)
        config.image_size = (28, 28)
        with pytest.raises(ValueError, match="not one number each"):
            count_extra_tokens(config)

    @pytest.mark.parametrize("kind", ["aimv2_vision_model", "ijepa", "vit"])
    def test_model_and_processor_agree(self, kind, tmp_path):
        tower = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL))
        tower.save_pretrained(tmp_path)
        settings = json.loads((GOLDEN / "vicuna" / "clip-vision-tower" / "preprocessor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        processor = VWLMMProcessor.from_vision_text_pretrained(str(tmp_path), GOLDEN / "vicuna")
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            str(tmp_path),
            tiny_text("llama", vocab_size=480),
            image_token_index=processor.image_token_id,
            vision_feature_layer=-1,
        )
        inputs = processor(text="<image>\na red circle", images=make_image(0), return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == model.config.image_seq_length == 16
        with torch.no_grad():
            model(**inputs)
            features = model.model.get_image_features(inputs["pixel_values"]).patch_features  # [1, N, W]
            states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]  # [1, N (+ 1), W]
        torch.testing.assert_close(features, states[:, -16:], atol=1e-4, rtol=1e-4)


def test_quiet(processor):
    """Ordinary images are as they were, without a word."""
    assert logging.get_verbosity() >= logging.WARNING
    out = processor(text="<image>", images=make_image(0), return_tensors="pt")
    assert torch.equal(out["pixel_values"], pixels_of(processor, make_image(0)))
