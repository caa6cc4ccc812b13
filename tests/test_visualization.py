# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures say what `inspect_image` says, and every text of them stays in its place and can be read."""

import copy
import importlib
import io
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BY_HAND, GOLDEN, make_image
from PIL import Image
from transformers.integrations import TensorBoardCallback

from modeling_vwlmm import (
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    convert_lavit_checkpoint,
)
from modeling_vwlmm.inspection import DROPPED, InspectedImage, TopTokens, inspect_image
from processing_vwlmm import VWLMMProcessor


pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection

from modeling_vwlmm.visualization import (
    COLOUR_MAP,
    INK,
    SMALLEST,
    UNTRAINED,
    CodedImage,
    LogsVisualWords,
    draw_codes,
    draw_entropy,
    draw_image,
    draw_kept,
    draw_patch,
    draw_reconstructions,
    draw_visual_words,
    draw_word,
)


LONG = ["Donaudampfschifffahrtsgesellschaftskapitän", "WWWWWWWWWWWWWWWW", "ÅÅÅÅ(jgpqy)", "iiii"]
ODD = ["$x_1$", "$", "_", "\\frac", "中文", "😀", "ไทย", "عربي", "^{", "%"]


@pytest.fixture(scope="module")
def inspected(vicuna) -> InspectedImage:
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
    found = inspect_image(model, VWLMMProcessor.from_pretrained(vicuna), make_image(3))
    return replace(found, has_visual_words=True)


@pytest.fixture(scope="module")
def lavit(tmp_path_factory) -> list[InspectedImage]:
    folder = tmp_path_factory.mktemp("lavit")
    convert_lavit_checkpoint(GOLDEN / "lavit" / "checkpoint", folder)
    model, processor = VWLMMForConditionalGeneration.from_pretrained(folder), VWLMMProcessor.from_pretrained(folder)
    return [inspect_image(model, processor, make_image(seed)) for seed in range(3)]


@pytest.fixture
def make_inspected(processor):
    """Makes an image of any grid whose patches have given words in turn, and every third none."""

    def make(grid: tuple[int, int], words: list[str], drops: bool = True) -> InspectedImage:
        tokenizer = copy.deepcopy(processor.tokenizer)
        first = len(tokenizer)
        tokenizer.add_tokens(words)
        torch.manual_seed(0)
        number, size = grid[0] * grid[1], len(tokenizer)
        order = first + torch.arange(number) % len(words)  # [N]
        logits = torch.randn(number, size).scatter_(1, order.unsqueeze(1), 9.0)  # [N, C]
        keep_mask = torch.arange(number) % 3 < 2 if drops else torch.ones(number, dtype=torch.bool)  # [N]
        none = torch.full((1, number, 1), DROPPED)
        return InspectedImage(
            image=Image.fromarray(np.random.default_rng(0).integers(0, 256, (grid[0] * 4, grid[1] * 4, 3), np.uint8)),
            grid=grid,
            visual_words=logits.log_softmax(dim=-1),
            predictions=logits.roll(1, dims=0).log_softmax(dim=-1),
            cosines=logits / 10,
            keep_mask=keep_mask,
            codes=(torch.arange(number) % 5).masked_fill(~keep_mask, -1),
            layers=(0,),
            layer_tokens=TopTokens(none, none.float()),
            tokenizer=tokenizer,
            has_visual_words=True,
        )

    return make


def get_text(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def find(figure, title: str):
    """The axes of the panel with a title."""
    return next(axes for axes in figure.axes if title in get_text(axes))


def find_words(axes, title: str) -> dict[int, str]:
    """The words of a panel by patch."""
    columns = int(axes.get_xlim()[1])
    words = [text for text in axes.texts if text.get_text() != title]
    return {int(y) * columns + int(x): text.get_text() for text in words for x, y in [text.get_position()]}


def assert_is_whole(figure) -> None:
    """Nothing is cut off at an edge, no words of a line overlap, and none is too small to read."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox(renderer)  # inches
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    texts = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    assert min(text.get_size() for text in texts) >= SMALLEST
    x0, y0, x1, y1 = np.array([text.get_window_extent(renderer).extents for text in texts]).T
    overlaps = (x0 < x1[:, None]) & (x0[:, None] < x1) & (y0 < y1[:, None]) & (y0[:, None] < y1)
    assert overlaps.sum() == len(texts), [texts[a].get_text() for a, b in np.argwhere(overlaps) if a != b]


class TestTexts:
    @pytest.mark.parametrize("grid", [(8, 8), (24, 24), (3, 7), (2, 1)])
    def test_words_stay_in_their_patches(self, make_inspected, grid):
        """Whatever resolution the figure is saved at."""
        figure = draw_visual_words(make_inspected(grid, LONG + ODD), ("visual_words",))
        (axes,) = figure.axes
        words = axes.texts[1:]  # behind the title
        assert len(words) == sum(patch % 3 < 2 for patch in range(grid[0] * grid[1]))
        assert min(text.get_size() for text in words) >= SMALLEST
        for dpi in (72, 150, 301):
            figure.set_dpi(dpi)
            renderer = FigureCanvasAgg(figure).get_renderer()
            for text in words:
                box = text.get_window_extent(renderer)
                x, y = np.floor(text.get_position())
                (left, bottom), (right, top) = axes.transData.transform([(x, y + 1), (x + 1, y)])
                assert left <= box.x0 and box.x1 <= right and bottom <= box.y0 and box.y1 <= top, text

    def test_what_has_no_room_ends_with_an_ellipsis(self, make_inspected):
        figure = draw_visual_words(make_inspected((24, 24), LONG, drops=False), ("visual_words",))
        long, wide, odd, short = get_text(figure.axes[0])[1:5]
        assert long.endswith("…") and LONG[0].startswith(long[:-1]) and len(long) > 4
        assert wide.endswith("…") and short == "iiii"
        (panel,) = draw_visual_words(make_inspected((2, 2), LONG, drops=False), ("visual_words",)).axes
        assert get_text(panel)[1:] == LONG  # in a large patch they are whole

    def test_no_character_is_a_command_and_none_warns(self, make_inspected, caplog):
        image = make_inspected((4, 5), ODD, drops=False)
        logging.getLogger("transformers").propagate = True
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for figure in (draw_visual_words(image), draw_patch(image, 0, 0), draw_word(image, "$x_1$")):
                figure.savefig(io.BytesIO(), format="png")
                figure.savefig(io.BytesIO(), format="svg")
        words = find_words(find(draw_visual_words(image), "visual words, P′"), "visual words, P′")
        assert words[0] == "$x_1$" and words[3] == "\\frac" and len(words[4]) == 2
        assert sum("no font here has" in record.message for record in caplog.records) <= 1

    @pytest.mark.parametrize("colour", ["black", "white", "blue", "#777777"])
    def test_contrast(self, make_inspected, colour):
        """WCAG's 4.5 : 1, whatever the image."""
        image = replace(make_inspected((2, 2), LONG), image=Image.new("RGB", (8, 8), colour))
        figure = draw_visual_words(image, ("visual_words",))
        behind = figure.axes[0].images[0].get_array()[0, 0] / 255
        ink = np.array([int(INK[at : at + 2], 16) for at in (1, 3, 5)]) / 255

        def get_luminance(rgb):
            return (0.2126, 0.7152, 0.0722) @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)

        assert (get_luminance(behind) + 0.05) / (get_luminance(ink) + 0.05) >= 4.5

    @pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
    def test_nothing_is_cut_off_and_nothing_overlaps(self, make_inspected, grid):
        image = make_inspected(grid, LONG)
        untrained = replace(image, has_visual_words=False)
        caption = "What is this?\n" + "an answer that goes on and on, " * 20
        for figure in (
            draw_visual_words(image, title="a title"),
            draw_visual_words(untrained, title="a title " * 40),
            draw_visual_words([image, untrained], captions=[caption, "short"]),
            draw_visual_words(image, ("image", "visual_words", "nearest_tokens", "predictions", "kl", "entropy")),
            draw_word(image, LONG[0]),
            draw_entropy(untrained),
            draw_patch(untrained, 0, 1),
            draw_kept([image] * 9),
            draw_codes([image] * 3),
            draw_reconstructions([torch.zeros(3, 3, 9, 7), torch.zeros(3, 3, 3, 5)]),
        ):
            assert_is_whole(figure)


class TestVisualWords:
    def test_panels_say_what_is_inspected(self, inspected):
        figure = draw_visual_words(inspected)
        for title, top in (
            ("visual words, P′", inspected.get_top_words()),
            ("nearest tokens", inspected.get_nearest_tokens()),
            ("predicted before the patch is seen, Q", inspected.get_top_predictions()),
        ):
            words = find_words(find(figure, title), title)
            assert words == {n: inspected.get_text(int(token)) for n, (token,) in enumerate(top.token_ids)}
        (picture,) = find(figure, "KL(P′‖Q)").images
        assert np.array_equal(picture.get_array().data, inspected.get_kl().reshape(4, 4).numpy())
        assert picture.get_clim() == pytest.approx((0, inspected.get_kl().max().item()))
        assert picture.get_cmap().name == COLOUR_MAP == "viridis"
        assert "nats" in sum(map(get_text, figure.axes), [])

    def test_dropped_patches_are_hatched_and_have_no_value(self, lavit):
        image = next(image for image in lavit if not image.keep_mask.all())
        dropped = (~image.keep_mask).nonzero()[:, 0].tolist()
        figure = draw_visual_words(image)
        title = "nearest tokens"
        assert find_words(find(figure, title), title).keys() == {*image.keep_mask.nonzero()[:, 0].tolist()}
        for name in (title, "KL(P′‖Q)"):
            (cover,) = (one for one in find(figure, name).collections if isinstance(one, PatchCollection))
            corners = {tuple(path.get_extents().min) for path in cover.get_paths()}
            assert corners == {(n % image.grid[1], n // image.grid[1]) for n in dropped} and cover.get_hatch()
        values = find(figure, "KL(P′‖Q)").images[0].get_array()
        assert values.mask.reshape(-1).nonzero()[0].tolist() == dropped

    def test_untrained_vm_head_is_said(self, inspected):
        untrained = replace(inspected, has_visual_words=False)
        word = inspected.get_text(int(inspected.get_top_words().token_ids[0, 0]))
        draws = draw_visual_words, draw_entropy, lambda image: draw_patch(image, 0, 0), lambda i: draw_word(i, word)
        for draw in draws:
            assert UNTRAINED in sum(map(get_text, draw(untrained).axes), [])
            assert UNTRAINED not in sum(map(get_text, draw(inspected).axes), [])
        assert UNTRAINED not in sum(map(get_text, draw_visual_words(untrained, ["nearest_tokens"]).axes), [])

    def test_several_images_are_rows_with_captions(self, inspected):
        figure = draw_visual_words([inspected] * 2, ("image", "visual_words"), ["first\nline", "$second$"])
        panels = [axes for axes in figure.axes if axes.images]
        assert len(panels) == 4 and len({axes.get_position().y0 for axes in panels}) == 2
        texts = [text for axes in figure.axes for text in get_text(axes)]
        assert [text for text in texts if text in ("first", "line", "$second$")] == ["first", "line", "$second$"]

    def test_one_call(self, vicuna, processor, inspected):
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
        word = inspected.get_text(int(inspected.get_top_words().token_ids[0, 0]))
        for draw, options in ((draw_visual_words, {}), (draw_word, {"word": word})):
            figure = draw_image(model, processor, make_image(3), draw, **options)
            expected = draw(inspected, **options)
            texts = [[t for t in map(get_text, f.axes) if t != [UNTRAINED]] for f in (figure, expected)]
            assert texts[0] == texts[1]

    def test_word_and_entropy(self, inspected):
        word = inspected.get_text(int(inspected.get_top_words().token_ids[5, 0]))
        (picture,) = find(draw_word(inspected, word), f"“{word}” among the visual words").images
        assert np.array_equal(picture.get_array().data.reshape(-1), inspected.find_word(word).numpy())
        (picture,) = find(draw_entropy(inspected), "entropy of the visual words").images
        assert np.array_equal(picture.get_array().data.reshape(-1), inspected.get_entropy().numpy())
        with pytest.raises(ValueError, match="No token reads 'zzzyx'"):
            draw_word(inspected, "zzzyx")

    def test_bars_of_a_patch(self, inspected):
        figure = draw_patch(inspected, 2, 1, top_k=5)
        for title, top in (
            ("visual words, P′", inspected.get_top_words(5)),
            ("predicted before the patch is seen, Q", inspected.get_top_predictions(5)),
            ("nearest tokens", inspected.get_nearest_tokens(5)),
        ):
            axes = find(figure, title)
            assert [bar.get_width() for bar in axes.patches] == pytest.approx(top.values[9].tolist())
            assert {inspected.get_text(token) for token in top.token_ids[9].tolist()} <= {*get_text(axes)}
        frames = find(figure, "image").patches
        assert {frame.get_xy() for frame in frames} == {(1, 2)}

    def test_refused(self, inspected, lavit):
        with pytest.raises(ValueError, match=r"`panels` is \['words'\]; expected some of 'image'"):
            draw_visual_words(inspected, ["words"])
        with pytest.raises(ValueError, match="Found 0 images"):
            draw_visual_words([])
        with pytest.raises(ValueError, match="Found 2 images and 1 captions"):
            draw_visual_words([inspected] * 2, captions=["one"])
        with pytest.raises(ValueError, match="no patch in row 4 and column 0: the image has 4 x 4"):
            draw_patch(inspected, 4, 0)
        image = next(image for image in lavit if not image.keep_mask.all())
        row, column = divmod(int((~image.keep_mask).nonzero()[0]), image.grid[1])
        with pytest.raises(ValueError, match="is dropped, and has no words. Choose one that is kept: in row"):
            draw_patch(image, row, column)


class TestFigures:
    def test_pyplot_knows_none_of_them_and_they_are_saved(self, inspected, tmp_path):
        import matplotlib.pyplot as plt

        before = plt.get_fignums()
        figure = draw_visual_words(inspected)
        assert plt.get_fignums() == before
        for name in ("words.png", "words.svg", "words.pdf"):
            figure.savefig(tmp_path / name)
        assert (tmp_path / "words.svg").read_text().count("<svg") == 1
        width, height = figure.get_size_inches() * figure.dpi
        assert Image.open(tmp_path / "words.png").size == pytest.approx((width, height), abs=1)
        shown = Image.open(io.BytesIO(figure._repr_png_()))  # what a notebook calls
        assert np.array_equal(np.asarray(shown), np.asarray(Image.open(tmp_path / "words.png")))

    def test_without_matplotlib(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "modeling_vwlmm.visualization")
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match="`pip install matplotlib`"):
            importlib.import_module("modeling_vwlmm.visualization")


class TestCodes:
    def test_kept_patches(self, lavit):
        figure = draw_kept(lavit)
        texts = [text for axes in figure.axes for text in get_text(axes)]
        assert texts == [f"{int(image.keep_mask.sum())} of {len(image.keep_mask)}" for image in lavit]
        covers = [one for axes in figure.axes for one in axes.collections]
        assert [len(cover.get_paths()) for cover in covers] == [int((~image.keep_mask).sum()) for image in lavit]

    def test_a_row_is_a_code_and_the_most_frequent_is_first(self, tmp_path):
        make_image(0).save(tmp_path / "image.png")
        codes = torch.tensor([7, -1, 7, 3, 2, 7, 3, -1, -1] + [-1] * 91)  # of 10 x 10 patches
        coded = [CodedImage(str(tmp_path / "image.png"), (10, 10), codes)] * 2
        figure = draw_codes(coded, num_codes=2, num_patches=5)
        texts = [text for axes in figure.axes for text in get_text(axes)]
        assert texts == ["code 7", "6 patches", "code 3", "4 patches"]
        marked = [axes.patches[-1].get_xy() for axes in figure.axes]
        assert marked == [
            (0, 0),
            (0, 0),
            (2, 0),
            (2, 0),
            (5, 0),
            (3, 0),
            (3, 0),
            (6, 0),
            (6, 0),
        ]  # of both images in turn
        for axes, (x, y) in zip(figure.axes, marked, strict=True):  # the patch is in sight
            assert axes.get_xlim()[0] <= x < axes.get_xlim()[1] and axes.get_ylim()[1] <= y < axes.get_ylim()[0]

    def test_refused(self, inspected):
        for draw in (draw_kept, draw_codes):
            with pytest.raises(ValueError, match="Found 1 images, of which 1 have no codes"):
                draw([inspected])
            with pytest.raises(ValueError, match="Found 0 images"):
                draw([])


class TestReconstructions:
    @pytest.mark.parametrize("size", [28, 500])
    def test_every_pixel_is_shown(self, size):
        """Small ones as squares of a whole number of pixels."""
        torch.manual_seed(0)
        pictures = [torch.rand(3, 3, size, size) * 2 - 1, torch.rand(3, 3, size // 2, size) * 2 - 1]
        figure = draw_reconstructions(pictures)
        drawn = np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"))
        for axes, own in zip(figure.axes, [one for row in pictures for one in row], strict=True):
            box = axes.get_window_extent()
            scale = round(box.width / size)
            assert (box.width, box.height) == pytest.approx((scale * own.shape[2], scale * own.shape[1]))
            left, top = round(box.x0), round(len(drawn) - box.y1)
            found = drawn[top : top + round(box.height), left : left + round(box.width)]
            found = found[scale // 2 :: scale, scale // 2 :: scale]
            assert np.array_equal(found, ((own + 1) * 127.5).round().byte().movedim(0, -1).numpy())
        titles = sum(map(get_text, figure.axes), [])
        assert titles == ["image", "what the VAE keeps of it", "drawn from the image features"]

    def test_refused(self):
        with pytest.raises(ValueError, match=r"Found \[2\] pictures of the images; expected 3 of each"):
            draw_reconstructions([torch.zeros(2, 3, 4, 4)])


class Recorder:
    """Takes what TensorBoard's writer is given."""

    def __init__(self):
        self.images = {}

    def add_image(self, tag, pixels, step, dataformats):
        assert dataformats == "HWC" and pixels.dtype == np.uint8
        self.images[tag, step] = pixels.shape

    def add_text(self, *args):
        pass

    add_scalar = add_hparams = flush = close = add_text


@pytest.fixture
def make_trainer(vicuna, processor, dataset, tmp_path):
    def make(name="run", stage=4, **kwargs):
        settings = {"per_device_train_batch_size": 4, "global_batch_size": 4, "max_steps": 3, **BY_HAND, **kwargs}
        return VWLMMTrainer(
            model=VWLMMForConditionalGeneration.from_pretrained(vicuna, dtype=torch.float32),
            args=VWLMMTrainingArguments(str(tmp_path / name), stage=stage, **settings),
            train_dataset=dataset,
            processing_class=copy.deepcopy(processor),
        )

    return make


class Modes(LogsVisualWords):
    """Looks at the model behind each step, a module of which its user has put into evaluation mode."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.model.vision_tower.eval()
        before = [module.training for module in model.modules()]
        super().on_step_end(args, state, control, **kwargs)
        assert before == [module.training for module in model.modules()] and any(before) and not all(before)
        assert not any(parameter.is_inference() for parameter in model.parameters())


class TestWhileTraining:
    def test_it_draws_and_changes_nothing(self, make_trainer, tmp_path, monkeypatch):
        """In bf16, with gradient checkpointing."""
        options = {"bf16": True, "gradient_checkpointing": True}
        make_image(1).save(tmp_path / "image.png")
        plain = make_trainer("plain", **options)
        plain.train()
        trainer = make_trainer(**options)
        monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
        sys.modules["torch.utils.tensorboard"].SummaryWriter = Recorder
        writer = Recorder()
        trainer.add_callback(TensorBoardCallback(writer))
        trainer.add_callback(Modes(trainer, [str(tmp_path / "image.png"), make_image(2)], steps=2))
        trainer.train()
        files = sorted(path.name for path in (tmp_path / "run" / "figures").iterdir())
        assert files == ["step_000002.png", "step_000003.png"]
        height, width = np.asarray(Image.open(tmp_path / "run" / "figures" / files[0])).shape[:2]
        assert writer.images == {("visual_words", step): (height, width, 3) for step in (2, 3)}
        for name, value in plain.model.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[name]), name

    def test_a_vm_head_that_learns_is_not_called_untrained(self, make_trainer):
        trainer = make_trainer(stage=3)
        assert [image.has_visual_words for image in LogsVisualWords(trainer, [make_image(1)], 1)._inspect()] == [True]
        trainer = make_trainer(stage=2)
        trainer.model.config.trained_stages = [1]
        assert [image.has_visual_words for image in LogsVisualWords(trainer, [make_image(1)], 1)._inspect()] == [False]

    def test_refused(self, make_trainer, tmp_path, monkeypatch):
        trainer = make_trainer()
        with pytest.raises(ValueError, match="missing.png is no readable image"):
            LogsVisualWords(trainer, [str(tmp_path / "missing.png")], 1)
        make_image(1).save(tmp_path / "cut.bmp")
        (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:200])
        with pytest.raises(OSError, match="truncated"):
            LogsVisualWords(trainer, [str(tmp_path / "cut.bmp")], 1)
        for images, steps in (([], 1), ([make_image(1)], 0)):
            with pytest.raises(ValueError, match=f"Found {len(images)} images every {steps} steps"):
                LogsVisualWords(trainer, images, steps)
        monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
        with pytest.raises(ValueError, match="sharded over processes .* would wait for the others"):
            LogsVisualWords(trainer, [make_image(1)], 1)

    def test_recipe_with_an_image_that_does_not_exist(self, monkeypatch, tmp_path):
        """Before data and weights are read: there are none here."""
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
        options = ["--json_file", "none.json", "--image_folder", "none", "--stage", "4", "--use_cpu"]
        with pytest.raises(FileNotFoundError, match="`visual_words_images` has .*none.png; expected paths"):
            importlib.import_module("train").main(
                [*options, "--output_dir", str(tmp_path), "--visual_words_images", str(tmp_path / "none.png")]
            )
