# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What the app does without its page, and the Space that it is. `tests/app` opens the page."""

import importlib
import io
import os
import re
import shutil
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_image
from huggingface_hub import SpaceCard
from PIL import Image

from modeling_vwlmm import convert_lavit_checkpoint
from modeling_vwlmm.inspection import inspect_image


pytest.importorskip("gradio")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]


def import_example(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module(name)


models, patches, app = (import_example(name) for name in ("app_models", "app_patches", "app"))


@pytest.fixture(scope="module")
def checkpoint(vicuna):
    return models.Checkpoint(vicuna)


@pytest.fixture(scope="module")
def picture():
    return models.Picture(make_image(3), "noise")


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


class TestUploads:
    def test_an_image_is_upright_and_in_rgb(self):
        exif = Image.Exif()
        exif[Image.ExifTags.Base.Orientation] = 6
        picture, is_animated = models.read_upload(encode(Image.new("L", (30, 20)), "JPEG", exif=exif))
        assert (picture.image.size, picture.image.mode, is_animated) == ((20, 30), "RGB", False)
        assert picture.is_upload

    def test_of_an_animation_the_first_frame(self):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        picture, is_animated = models.read_upload(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
        assert is_animated and picture.image.getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize(
        "content", [b"", b"Hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encode(make_image(1))[:300]]
    )
    def test_no_image(self, content):
        with pytest.raises(ValueError, match=r"^This file is no image that can be read\. Choose another one"):
            models.read_upload(content)

    @pytest.mark.parametrize("side", [7000, 20_000])  # the second is a bomb by Pillow's own limit
    def test_too_many_pixels(self, side):
        content = bytearray(encode(Image.new("1", (8, 8))))
        content[16:24] = side.to_bytes(4) * 2  # what its header says
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
        with pytest.raises(ValueError, match="^This image is too large: at most 40 megapixels are read"):
            models.read_upload(bytes(content))

    def test_too_many_bytes(self):
        with pytest.raises(ValueError, match="^This file is too large: at most 20 MB are read"):
            models.read_upload(bytes(models.MAX_BYTES + 1))

    def test_what_is_kept_is_no_larger_than_what_models_read(self):
        picture, _ = models.read_upload(encode(Image.new("RGB", (4096, 1024))))
        assert picture.image.size == (2048, 512)

    def test_a_page_keeps_the_last_uploads_and_all_examples(self, monkeypatch):
        shown = []
        monkeypatch.setattr(app.gr, "Warning", lambda text, title: shown.append(text))
        examples = [models.Picture(make_image(1), "example")]
        contents = [encode(make_image(seed)) for seed in range(app.MAX_UPLOADS)]
        pictures, *_ = app.add_uploads(contents, examples)
        pictures, looked_at, waiting, *_ = app.add_uploads([b"no image", encode(make_image(50))], pictures)
        assert pictures[0] is examples[0] and len(pictures) == 1 + app.MAX_UPLOADS
        assert looked_at == app.MAX_UPLOADS and waiting == [looked_at]
        assert np.array_equal(np.asarray(pictures[-1].image), np.asarray(make_image(50)))
        assert len(shown) == 1


class TestCheckpoints:
    def test_features_are_a_choice_of_each_request(self, checkpoint, picture):
        real, pseudo = checkpoint.get_model(False), checkpoint.get_model(True)
        assert not real.model.config.use_pseudo_image_features and pseudo.model.config.use_pseudo_image_features
        assert all(
            mine.data_ptr() == other.data_ptr()
            for mine, other in zip(real.state_dict().values(), pseudo.state_dict().values(), strict=True)
        )
        expected = [inspect_image(model, checkpoint.processor, picture.image).predictions for model in (real, pseudo)]
        assert not torch.allclose(*expected)
        start = threading.Barrier(2)

        def ask(reads_pseudo: bool) -> bool:
            start.wait()
            found = inspect_image(checkpoint.get_model(reads_pseudo), checkpoint.processor, picture.image)
            return torch.allclose(found.predictions, expected[reads_pseudo])

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(ask, [False, True] * 4))

    def test_default_features_are_those_it_was_trained_with(self, checkpoint, pif):
        assert not checkpoint.reads_pseudo_by_default() and models.Checkpoint(pif).reads_pseudo_by_default()

    def test_without_a_vm_head_there_is_no_choice(self, checkpoint, tmp_path):
        convert_lavit_checkpoint(GOLDEN / "lavit/checkpoint", tmp_path / "lavit")
        found = {"VW-LMM": checkpoint, "LaVIT": models.Checkpoint(str(tmp_path / "lavit"))}
        found["none"] = models.Checkpoint(str(tmp_path))  # which the page says where its patches would be
        choices = {name: app.get_features(found, name)["choices"] for name in (*found, app.NOTHING)}
        assert choices.pop("VW-LMM") == ["real", "pseudo"] and set(map(tuple, choices.values())) == {("real",)}
        images = [models.Picture(make_image(1), "noise")]
        assert "cannot be loaded" in app.look(found, "none", "real", images, 0, "image", "", None)[0]

    def test_those_of_the_demos_are_found(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="no checkpoint at runs/small_world/stage4.*`make demo`"):
            models.find_checkpoints([])
        folder = tmp_path / "runs/small_world_lavit/stage2"
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        found, missing = models.find_checkpoints([])
        assert list(found) == ["LaVIT"]
        assert "VLSA: `make demo-vlsa`" in missing and "LaVIT" not in missing
        found, missing = models.find_checkpoints(["some/where/stage4", "me/mine", "a/run/stage4", "b/run/stage4", "."])
        expected = ["where/stage4", "me/mine", "a/run/stage4", "b/run/stage4", "/".join(tmp_path.parts[-2:])]
        assert list(found) == expected  # in full where two end alike
        sources = [own.source for own in found.values()]
        assert sources == ["some/where/stage4", "me/mine", "a/run/stage4", "b/run/stage4", "."]
        assert missing == ""

    def test_a_checkpoint_that_is_none_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=f"The checkpoint {tmp_path} cannot be loaded: .+"):
            models.Checkpoint(str(tmp_path)).get_model(False)

    def test_targets_are_those_of_the_makefile(self):
        targets = (ROOT / "Makefile").read_text()
        for _, folder, command in models.DEMOS:
            assert f"\n{command.removeprefix('make ')}:" in targets
            assert Path(folder).parts[0] == "runs"


def converse(picture, *questions: str) -> list[dict]:
    return app.to_messages([{"role": "user", "text": text, "pictures": [picture]} for text in questions])


class TestAnswers:
    def test_grow_to_what_generate_writes(self, checkpoint, picture, monkeypatch):
        monkeypatch.setattr(models, "MAX_NEW_TOKENS", 12)
        messages = converse(picture, "Describe the image.")
        # What is read late comes at once: on a busy machine a tiny model has written all before anybody reads.
        hook = checkpoint.get_model(False).register_forward_hook(lambda *_: time.sleep(0.05))
        pieces = list(models.stream_answer(checkpoint, False, messages))
        hook.remove()
        inputs = checkpoint.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = checkpoint.get_model(False).generate(**inputs, max_new_tokens=12, do_sample=False)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        assert pieces[-1] == checkpoint.processor.decode(tokens, skip_special_tokens=True).strip()
        assert len(set(pieces)) > 2
        assert all(later.startswith(earlier) for earlier, later in zip(pieces, pieces[1:], strict=False))

    def test_end_when_nobody_reads_on(self, checkpoint, picture, monkeypatch):
        monkeypatch.setattr(models, "MAX_NEW_TOKENS", 200)
        steps = []
        model = checkpoint.get_model(False)
        hook = model.register_forward_hook(lambda *_: steps.append(1))
        answer = models.stream_answer(checkpoint, False, converse(picture, "Describe the image."))
        next(answer)
        answer.close()
        hook.remove()
        assert len(steps) < 200
        assert not [thread for thread in threading.enumerate() if "generate" in thread.name]

    def test_what_goes_wrong_reaches_the_reader(self, vicuna, picture):
        checkpoint = models.Checkpoint(vicuna)
        checkpoint.get_model(False).generation_config.num_beams = 2  # which nothing can be streamed with
        question = {"role": "user", "text": "Describe the image.", "pictures": [picture]}
        *_, history = app.continue_history(checkpoint, False, [question])
        assert history[-1]["has_failed"] and "No answer: " in history[-1]["text"] and "beam" in history[-1]["text"]
        assert len(app.to_messages([*history, question])) == 1  # the model never reads it
        long = {**question, "text": "word " * 5000}
        (history,) = app.continue_history(checkpoint, False, [long])
        assert re.search(r"No answer: A prompt has \d+ tokens, and the model reads \d+ at most", history[-1]["text"])

    def test_both_sides_at_once(self, checkpoint, pif, picture, monkeypatch):
        monkeypatch.setattr(models, "MAX_NEW_TOKENS", 8)
        checkpoints = {"one": checkpoint, "other": models.Checkpoint(pif)}
        question = [{"role": "user", "text": "Describe the image.", "pictures": [picture]}]
        *_, (first, second, *chats) = app.answer(checkpoints, "one", "real", "other", "pseudo", question, question)
        alone = [
            list(app.continue_history(own, p, question))[-1]
            for own, p in zip(checkpoints.values(), (0, 1), strict=True)
        ]
        assert [first, second] == alone
        assert [chat[-1]["content"] for chat in chats] == [[first[-1]["text"]], [second[-1]["text"]]]
        *_, (first, second, *_) = app.answer(checkpoints, "one", "real", app.NOTHING, "real", question, [])
        assert first == alone[0] and second == []

    def test_a_question_that_was_stopped_is_left_out(self, picture):
        asked = {"role": "user", "text": "Who?", "pictures": [picture]}
        answered = {"role": "assistant", "text": "Me."}
        roles = [message["role"] for message in app.to_messages([asked, asked, answered, asked])]
        assert roles == ["user", "assistant", "user"]

    def test_images_of_a_question_without_an_answer_go_with_the_next(self, picture):
        """The page says that it goes on about the images above."""
        asked, other = (
            {"role": "user", "text": "Who?", "pictures": [own]} for own in (picture, models.Picture(make_image(4), ""))
        )
        follows, answered = {**asked, "pictures": []}, {"role": "assistant", "text": "Me."}
        failed = {**answered, "has_failed": True}

        def get_images(*history: dict) -> list[list[Image.Image]]:
            return [[part["image"] for part in m["content"][:-1]] for m in app.to_messages([*history])]

        first, second = (turn["pictures"][0].image for turn in (asked, other))
        assert get_images(asked, follows) == get_images(asked, failed, follows) == [[first]]
        assert get_images(asked, other, failed, asked) == [[first, second]]
        assert get_images(asked, answered, follows) == [[first], [], []]


@pytest.fixture(scope="module")
def inspected(checkpoint, picture):
    return models.inspect(checkpoint, False, picture)


class TestPatches:
    def test_each_is_a_button_with_its_word(self, inspected):
        html = patches.render_patches(inspected, "model", "visual words", selected=5)
        labels = re.findall(r'data-patch="(\d+)".*?aria-label="row (\d), column (\d): (.*?)"', html)
        assert [(int(r) - 1) * 4 + int(c) - 1 for _, r, c, _ in labels] == list(range(16))
        word = inspected.get_text(int(inspected.get_top_words().token_ids[6, 0]))
        assert labels[6][3] == patches.escape(word)
        assert re.findall(r'data-patch="(\d+)" tabindex="0" aria-pressed="true"', html) == ["5"]
        assert html.count('tabindex="0"') == html.count('aria-pressed="true"') == 1

    def test_wide_letters_have_room(self, inspected, monkeypatch):
        for word, letters in (("日本語", 6), ("שלום!", 5), ("a", 4)):
            monkeypatch.setattr(type(inspected), "get_text", lambda self, token, word=word: word)
            html = patches.render_patches(inspected, "model", "visual words")
            assert html.count(f"--letters:{letters};") == 16

    @pytest.mark.parametrize("view", patches.VIEWS)
    def test_views_differ(self, inspected, view):
        others = [patches.render_patches(inspected, "model", other) for other in patches.VIEWS if other != view]
        assert patches.render_patches(inspected, "model", view) not in others

    def test_details_are_those_of_the_model(self, inspected):
        html = patches.render_details(inspected, 6)
        assert f"KL {inspected.get_kl()[6]:.2f} nats" in html and "Row 2, column 3" in html
        for top in (inspected.get_top_words(5), inspected.get_top_predictions(5), inspected.get_nearest_tokens(5)):
            for token, value in zip(top.token_ids[6].tolist(), top.values[6].tolist(), strict=True):
                assert re.search(
                    f">{re.escape(patches.escape(inspected.get_text(token)))}</th>.*?{value:.2f}</td>", html
                )

    def test_a_word_is_where_it_is(self, inspected):
        word = inspected.get_text(int(inspected.get_top_words().token_ids[9, 0]))
        values = inspected.find_word(word)
        html = patches.render_patches(inspected, "model", "KL", word)
        shown = re.findall(r'aria-label="row \d, column \d: (.*?)"', html)
        assert shown == [f"{value:.2f}" for value in values]
        assert f"row {int(values.argmax()) // 4 + 1}, column {int(values.argmax()) % 4 + 1}</p>" in html
        with pytest.raises(ValueError, match="No token reads 'zzzyx'"):
            patches.render_patches(inspected, "model", "KL", "zzzyx")

    def test_nothing_of_a_vocabulary_is_markup(self, inspected, monkeypatch):
        monkeypatch.setattr(type(inspected), "get_text", lambda self, token: '<script>"')
        html = patches.render_patches(inspected, "<b>", "visual words") + patches.render_details(inspected, 0)
        assert "<script" not in html and "<b>" not in html and html.count("&lt;script&gt;&quot;") > 30

    def test_dropped_ones_have_no_words(self, tmp_path):
        convert_lavit_checkpoint(GOLDEN / "lavit/checkpoint", tmp_path)
        inspected = models.inspect(models.Checkpoint(str(tmp_path)), False, models.Picture(make_image(5), "noise"))
        html = patches.render_patches(inspected, "model", "visual words")
        kept, dropped = inspected.keep_mask, (~inspected.keep_mask).nonzero()[0].item()
        assert html.count('class="dropped"') == int((~kept).sum()) > 0 and ": dropped" in html
        assert f"{int(kept.sum())} of {len(kept)} patches kept" in html
        assert "has not been trained" in html and "nearest" in html  # in place of visual words
        first = kept.nonzero()[0].item()
        assert "dropped this patch" in patches.render_details(inspected, dropped)
        assert f"code {inspected.codes[first]}" in patches.render_details(inspected, first)
        token = int(inspected.get_nearest_tokens().token_ids[first, 0])
        word = patches.render_patches(inspected, "model", "KL", inspected.get_text(token))
        assert f": {inspected.find_near(inspected.get_text(token))[first]:.2f}" in word and "highest cosine" in word

    def test_numbers_stand_out_from_their_colours(self):
        def get_luminance(red: float, green: float, blue: float) -> float:
            linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        tints, _ = patches._tint(torch.linspace(0, 1, 50), 0.0)
        for tint in tints:
            red, green, blue, ink, halo = re.match(
                r"background:rgb\((\d+) (\d+) (\d+) / .8\);color:(#\w+);--halo:(#\w+)$", tint
            ).groups()
            behind = get_luminance(*(int(channel) / 255 for channel in (red, green, blue)))
            assert (1.05 if ink == "#fff" else behind + 0.05) / (behind + 0.05 if ink == "#fff" else 0.05) > 4.5
            assert {ink, halo} == {"#000", "#fff"}  # what shines through of the image can be as bright, or as dark

    def test_no_patch_is_no_error(self, tmp_path, monkeypatch):
        """A threshold that no patch reaches."""
        convert_lavit_checkpoint(GOLDEN / "lavit/checkpoint", tmp_path)
        lavit = models.Checkpoint(str(tmp_path))
        options = lavit.get_model(False).model.visual_tokenizer.config
        options.selection, options.threshold, options.min_tokens = "threshold", 1.1, 0
        images = [models.Picture(make_image(5), "noise")]

        def look(view: str, word: str) -> str:
            return app.look({"LaVIT": lavit}, "LaVIT", "real", images, 0, view, word, None)[0]

        monkeypatch.setattr(models.inspect(lavit, False, images[0]), "has_visual_words", True)  # KL is shown, too
        for view in patches.VIEWS:
            assert "0 of 16 patches kept" in look(view, "") and 'role="alert"' not in look(view, "")
        found = look("KL", "red")
        assert "0 of 16 patches kept" in found and 'class="legend"' not in found
        assert "“red” is nowhere: of 16 patches the token selector has dropped all; expected one or more" in found

    def test_a_tap_draws_no_grid(self, checkpoint, picture, inspected, tmp_path, monkeypatch):
        """It reads its own patch alone: of 576 patches and 32,000 tokens each list takes a while."""
        found = {"VW-LMM": checkpoint, "none": models.Checkpoint(str(tmp_path))}
        sizes, get_top_words = [], type(inspected).get_top_words
        monkeypatch.setattr(
            type(inspected),
            "get_top_words",
            lambda self, k: sizes.append(len(self.visual_words)) or get_top_words(self, k),
        )
        monkeypatch.delattr(app, "render_patches")
        details = app.look_at_patch(found, "VW-LMM", "real", [picture], 0, 6)
        assert details == patches.render_details(inspected, 6) and sizes == [1, 1]
        assert app.look_at_patch(found, "none", "real", [picture], 0, 6) == ""  # said where its patches would be


class TestSpace:
    def test_card_is_valid(self):
        card = SpaceCard.load(ROOT / "examples/space/README.md")
        assert card.data.sdk == "gradio" and (ROOT / "examples" / card.data.app_file).is_file()
        assert f"gradio=={card.data.sdk_version}\n" in (ROOT / "constraints.txt").read_text()
        assert {card.data.colorFrom, card.data.colorTo} <= {
            "red",
            "yellow",
            "green",
            "blue",
            "indigo",
            "purple",
            "pink",
            "gray",
        }
        assert len(card.data.short_description) <= 60 and card.data.license == "apache-2.0"

    def test_requirements_are_those_of_the_package(self):
        tomllib = pytest.importorskip("tomllib")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        required = {*project["dependencies"], *project["optional-dependencies"]["figures"]}
        assert set((ROOT / "examples/space/requirements.txt").read_text().splitlines()) == required

    def test_folder_has_the_checkpoints_of_the_demos(self, vicuna, tmp_path, monkeypatch):
        shutil.copytree(vicuna, tmp_path / "runs/small_world/stage4")
        (tmp_path / "runs/small_world/stage4/training_args.bin").touch()
        monkeypatch.chdir(tmp_path)
        import_example("write_space").main(["space"])
        monkeypatch.chdir("space")
        assert list(models.find_checkpoints([])[0]) == ["VW-LMM"]
        assert not Path("runs/small_world/stage4/training_args.bin").exists()
        assert {"app.py", "README.md", "requirements.txt", "modeling_vwlmm", "processing_vwlmm"} <= set(os.listdir())

    def test_no_checkpoint_is_written_over_itself(self, vicuna, tmp_path, monkeypatch, capsys):
        shutil.copytree(vicuna, tmp_path / "runs/small_world/stage4")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            import_example("write_space").main(["."])
        assert "expected a folder of its own" in capsys.readouterr().err
        assert os.listdir() == ["runs"] and Path("runs/small_world/stage4/config.json").is_file()
