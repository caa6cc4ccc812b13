# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The app in a browser: questions, patches, words, models, uploads, two people at once, on a desktop and a phone."""

import importlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DESKTOP, PHONE, find_faint
from PIL import Image
from playwright.sync_api import Page, expect

from modeling_vwlmm import convert_lavit_checkpoint


ROOT = Path(__file__).parents[2]
PATIENCE = 60_000  # milliseconds for an answer, on a machine that does other things, too
# Notes each address beyond this machine that the app asks for.
WATCH = """
import os, socket
look_up = socket.getaddrinfo
def watched(host, *arguments, **options):
    if str(host) not in ("127.0.0.1", "localhost", "None"):
        with open(os.environ["ASKED_FOR"], "a") as file:
            print(host, file=file)
    return look_up(host, *arguments, **options)
socket.getaddrinfo = watched
"""


def import_example(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module(name)


models, app = import_example("app_models"), import_example("app")


def serve(folder: Path, place: Path, *, packages: str = "") -> SimpleNamespace:
    """Starts the app that lies in a folder, with `place` for what it leaves behind."""
    for name in ("watch", "temporary"):
        (place / name).mkdir()
    (place / "watch" / "sitecustomize.py").write_text(WATCH)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(place / "watch"), packages]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(place / "temporary"),
        "ASKED_FOR": str(place / "asked_for"),
    }
    (script,) = [path for path in ("app.py", "examples/app.py") if (folder / path).is_file()]
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, script, "--port", str(port)], cwd=folder, env=environment, stdout=log, stderr=log
        )
    served = SimpleNamespace(url=f"http://127.0.0.1:{port}/", process=process, place=place, folder=folder)
    for _ in range(240):
        if "Running on" in (place / "log").read_text():
            return served
        assert process.poll() is None, (place / "log").read_text()
        time.sleep(1)
    raise TimeoutError((place / "log").read_text())


@pytest.fixture(scope="module")
def served(vicuna, pif, tmp_path_factory):
    """The Space, with random checkpoints in place of the demos'."""
    place = tmp_path_factory.mktemp("served")
    shutil.copytree(vicuna, place / "runs/small_world/stage4")
    shutil.copytree(pif, place / "runs/small_world/pseudo_image_features")
    convert_lavit_checkpoint(ROOT / "tests/golden/lavit/checkpoint", place / "runs/small_world_lavit/stage2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        import_example("write_space").main(["space"])
    served = serve(place / "space", place)
    served.before = sorted((place / "space").rglob("*"))
    yield served
    served.process.kill()


@pytest.fixture(scope="module")
def expected(vicuna, pif):
    """What a model makes of an image, by `(name, reads_pseudo, image)`."""
    checkpoints = {"VW-LMM": models.Checkpoint(vicuna), "VW-LMM, pseudo": models.Checkpoint(pif)}

    def inspect(name: str, reads_pseudo: bool, image: Image.Image):
        return models.inspect(checkpoints[name], reads_pseudo, models.Picture(image, ""))

    inspect.checkpoints = checkpoints
    return inspect


@pytest.fixture(autouse=True)
def nothing_goes_wrong(open_page, opened):
    """No page asks for anything of another host, or has an error to report."""
    yield
    for page in opened:
        assert [said for said in page.errors if "[svelte-i18n]" not in said] == page.expected_errors
        assert page.requested and all(url.startswith((page.home, "data:", "blob:")) for url in page.requested)


def visit(page: Page, served: SimpleNamespace) -> Page:
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.home, page.expected_errors = served.url, []
    page.goto(served.url)
    page.wait_for_selector("#patches0 button[data-patch]")
    return page


def choose(page: Page, label: str, option: str, nth: int = 0) -> None:
    page.get_by_label(label).nth(nth).click()
    page.get_by_role("option", name=option, exact=True).click()


def ask(page: Page, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")


def answers(page: Page, side: int = 0):
    return page.locator(f"#chat{side} .bot.message")


def wait_for_answer(page: Page) -> None:
    """Until nothing is written any more."""
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def upload(page: Page, *files: tuple[str, bytes]) -> None:
    payload = [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in files]
    page.locator("input[type=file]").first.set_input_files(payload)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8))


def read_words(page: Page, side: int = 0) -> list[str]:
    return page.locator(f"#patches{side} button[data-patch]").all_text_contents()


def name_words(inspected, top) -> list[str]:
    return [inspected.get_text(token) for token in top.token_ids[:, 0].tolist()]


def letters(text: str) -> str:
    """What of a text Markdown leaves alone."""
    return re.sub(r"[\W_]", "", text)


def test_questions_are_answered_as_they_are_written(desktop, served, expected, screenshots):
    visit(desktop, served)
    ask(desktop, "Describe the image.")
    lengths = set()
    while desktop.get_by_role("button", name="Stop").is_visible() or not lengths:
        lengths |= {len(text) for text in answers(desktop).all_text_contents()}
    assert len(lengths) > 3
    wait_for_answer(desktop)
    example = app.make_examples()[0]
    messages = app.to_messages([{"role": "user", "text": "Describe the image.", "pictures": [example]}])
    *_, answer = models.stream_answer(expected.checkpoints["VW-LMM"], False, messages)
    assert letters(answers(desktop).inner_text()) == letters(answer)


def test_several_images_and_turns(desktop, served):
    visit(desktop, served)
    asked = desktop.locator("#chat0 .user.message")
    for number, question in enumerate(["Describe the image.", "And what else?", "And here?"]):
        if number == 2:
            upload(desktop, ("one.png", encode(noise(1))), ("two.png", encode(noise(2))))
            expect(desktop.locator("#attached img")).to_have_count(2)
        expect(desktop.locator("#attached img")).to_have_count([1, 0, 2][number])
        ask(desktop, question)
        expect(answers(desktop)).to_have_count(number + 1)
        wait_for_answer(desktop)
    expect(asked.locator("img")).to_have_count(3)
    expect(desktop.locator("#tray button")).to_have_count(len(app.make_examples()) + 2)
    expect(desktop.locator("#tray button").last).to_have_attribute("aria-pressed", "true")
    desktop.get_by_role("button", name="New").click()
    expect(asked).to_have_count(0)
    expect(desktop.locator("#attached img")).to_have_count(1)


def test_stop_ends_an_answer(desktop, served):
    visit(desktop, served)
    ask(desktop, "Describe the image.")
    expect(answers(desktop)).to_have_text(re.compile(r"\w{2,}"))
    desktop.get_by_role("button", name="Stop").click()
    wait_for_answer(desktop)
    time.sleep(0.5)
    text = answers(desktop).inner_text()
    time.sleep(1)
    assert answers(desktop).inner_text() == text
    ask(desktop, "  ")
    expect(desktop.get_by_text("Write a question first.")).to_be_visible()
    ask(desktop, "And now?")
    expect(answers(desktop)).to_have_count(2)
    expect(desktop.get_by_role("button", name="New")).to_be_disabled()
    desktop.get_by_role("button", name="Stop").click()
    desktop.get_by_role("button", name="New").click()
    expect(answers(desktop)).to_have_count(0)


def test_a_patch_is_told_in_full(desktop, served, expected):
    visit(desktop, served)
    inspected = expected("VW-LMM", False, app.make_examples()[0].image)
    assert read_words(desktop) == name_words(inspected, inspected.get_top_words())
    desktop.locator("#patches0 button[data-patch='6']").click()
    details = desktop.locator("#details0")
    expect(details.get_by_role("heading")).to_have_text(f"Row 2, column 3 · KL {inspected.get_kl()[6]:.2f} nats")
    for title, top in (
        ("Visual words", inspected.get_top_words(5)),
        ("Predicted before it", inspected.get_top_predictions(5)),
        ("Nearest tokens", inspected.get_nearest_tokens(5)),
    ):
        rows = details.locator("table", has_text=title).locator("tr")
        values = zip(top.token_ids[6].tolist(), top.values[6].tolist(), strict=True)
        expect(rows).to_have_text([f"{inspected.get_text(token)}{value:.2f}" for token, value in values])
    for view, top in (
        ("nearest tokens", inspected.get_nearest_tokens()),
        ("predictions", inspected.get_top_predictions()),
    ):
        choose(desktop, "Show on patches", view)
        expect(desktop.locator("#patches0 button[data-patch]")).to_have_text(name_words(inspected, top))
    expect(desktop.locator("#patches0 button[aria-pressed=true]")).to_have_attribute("data-patch", "6")


def test_a_word_is_found_or_not(desktop, served, expected):
    visit(desktop, served)
    inspected = expected("VW-LMM", False, app.make_examples()[0].image)
    word = inspected.get_text(int(inspected.get_top_words().token_ids[9, 0]))
    search = desktop.get_by_label("Where is a word?")
    search.fill(word)
    desktop.get_by_role("button", name="Find").click()
    values = inspected.find_word(word)
    expect(desktop.locator("#patches0 button[data-patch]")).to_have_text([f"{value:.2f}" for value in values.tolist()])
    row, column = divmod(int(values.argmax()), 4)
    expect(desktop.locator("#patches0 .caption")).to_contain_text(f"row {row + 1}, column {column + 1}")
    search.fill("zzzyx")
    search.press("Enter")
    expect(desktop.get_by_role("alert")).to_contain_text("No token reads 'zzzyx'; expected a word of the vocabulary")
    assert read_words(desktop) == name_words(inspected, inspected.get_top_words())


def test_models_and_features(desktop, served, expected):
    visit(desktop, served)
    image = app.make_examples()[0].image
    choose(desktop, "Show on patches", "predictions")
    for name, features in (("VW-LMM", "pseudo"), ("VW-LMM, pseudo", None), ("VW-LMM, pseudo", "real")):
        if name != "VW-LMM":
            choose(desktop, "Model", name)
        if features is None:  # those that it was trained with
            expect(desktop.get_by_label("Image features").first).to_have_value("pseudo")
        else:
            choose(desktop, "Image features", features)
        inspected = expected(name, features != "real", image)
        words = name_words(inspected, inspected.get_top_predictions())
        expect(desktop.locator("#patches0 button[data-patch]")).to_have_text(words)
    choose(desktop, "Compare with", "LaVIT")
    expect(desktop.locator("#patches1 .dropped").first).to_be_visible()
    expect(desktop.locator("#patches1 .caption")).to_contain_text("patches kept")
    desktop.locator("#patches1 .kept").first.click()
    expect(desktop.locator("#details1").get_by_role("heading")).to_contain_text("code")
    ask(desktop, "Describe the image.")
    for side in (0, 1):
        expect(answers(desktop, side)).to_have_text(re.compile(r"\w{2,}"))
    choose(desktop, "Compare with", "nothing")
    expect(desktop.locator("#patches1")).to_be_hidden()
    expect(desktop.locator("#missing")).to_have_text("Not trained here yet: VLSA: make demo-vlsa.")


def test_uploads_that_are_none(desktop, served):
    visit(desktop, served)
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    for name, content, message in (
        ("text.png", b"I am no image", "This file is no image that can be read."),
        ("half.png", encode(noise(1))[:200], "This file is no image that can be read."),
        ("wide.png", encode(Image.new("1", (9000, 9000))), "This image is too large"),
        (
            "moves.gif",
            encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "This image is animated. Its first frame is used.",
        ),
    ):
        upload(desktop, (name, content))
        expect(desktop.get_by_text(message).last).to_be_visible()
        desktop.locator(".toast-close").first.click()  # or the next one would be taken for said, too
        expect(desktop.locator(".toast-close")).to_have_count(0)
    expect(desktop.locator("#tray button")).to_have_count(len(app.make_examples()) + 1)
    upload(desktop, ("huge.png", bytes(models.MAX_BYTES + 1)))
    expect(desktop.get_by_text(re.compile("too large|exceed|maximum", re.IGNORECASE)).last).to_be_visible()
    desktop.expected_errors = [said for said in desktop.errors if "413" in said]
    upload(desktop, ("good.png", encode(noise(2))))
    expect(desktop.locator("#tray button")).to_have_count(len(app.make_examples()) + 2)
    assert "Traceback" not in desktop.content()


def test_two_people_do_not_meet(open_page, served, expected):
    pages = [visit(open_page(**DESKTOP), served) for _ in range(2)]
    images = [noise(11), noise(12)]
    for page, image in zip(pages, images, strict=True):
        upload(page, ("mine.png", encode(image)))
        expect(page.locator("#tray button")).to_have_count(len(app.make_examples()) + 1)
        choose(page, "Show on patches", "predictions")
    choose(pages[1], "Image features", "pseudo")
    for page in pages:
        ask(page, "Describe the image.")
    for page, image, reads_pseudo in zip(pages, images, (False, True), strict=True):
        inspected = expected("VW-LMM", reads_pseudo, image)
        words = name_words(inspected, inspected.get_top_predictions())
        expect(page.locator("#patches0 button[data-patch]")).to_have_text(words)
    for page in pages:
        wait_for_answer(page)
        expect(page.locator("#chat0 .user.message")).to_have_count(1)
    told = [letters(answers(page).inner_text()) for page in pages]
    for text, image, reads_pseudo in zip(told, images, (False, True), strict=True):
        question = {"role": "user", "text": "Describe the image.", "pictures": [models.Picture(image, "")]}
        *_, answer = models.stream_answer(expected.checkpoints["VW-LMM"], reads_pseudo, app.to_messages([question]))
        assert text == letters(answer)
    shown = [page.locator("#tray img").last.get_attribute("src") for page in pages]
    assert shown[0] not in pages[1].content() and shown[1] not in pages[0].content()


def test_by_keyboard_alone(desktop, served):
    visit(desktop, served)
    keyboard = desktop.keyboard

    def tab_to(selector: str) -> None:
        for _ in range(60):
            keyboard.press("Tab")
            if desktop.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab never comes to {selector}")

    tab_to("#tray button")
    keyboard.press("ArrowRight")
    keyboard.press("Enter")
    expect(desktop.locator("#tray button").nth(1)).to_have_attribute("aria-pressed", "true")
    tab_to("#settings textarea, #settings input[placeholder=red]")
    keyboard.type("zzzyx")
    keyboard.press("Enter")
    expect(desktop.get_by_role("alert")).to_contain_text("No token reads")
    tab_to("#patches0 button")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        keyboard.press(key)
    expect(desktop.locator("#details0").get_by_role("heading")).to_contain_text("Row 2, column 3")
    assert desktop.evaluate("document.activeElement.dataset.patch") == "6"
    tab_to("#question textarea")
    keyboard.type("Describe the image.")
    keyboard.press("Enter")
    expect(answers(desktop)).to_have_text(re.compile(r"\w{2,}"))
    tab_to("#ask button")
    keyboard.press("Enter")  # Stop
    wait_for_answer(desktop)


def test_on_a_phone(phone, served):
    visit(phone, served)
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]
    phone.locator("#patches0 button[data-patch='3']").tap()
    expect(phone.locator("#details0").get_by_role("heading")).to_contain_text("Row 1, column 4")
    expect(phone.locator("#details0 table").first).to_be_in_viewport()
    ask(phone, "Describe the image.")
    expect(answers(phone)).to_have_text(re.compile(r"\w{2,}"))
    expect(phone.locator("#chat0")).to_be_in_viewport()
    phone.get_by_role("button", name="Stop").tap()
    wait_for_answer(phone)
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bright_and_dark(open_page, served, screenshots, scheme):
    page = visit(open_page(**DESKTOP, color_scheme=scheme), served)
    assert find_faint(page, ".patches") == []
    page.locator("#patches0 button[data-patch='6']").click()
    expect(page.locator("#details0 table").first).to_be_visible()
    page.get_by_label("Where is a word?").fill("zzzyx")
    page.get_by_label("Where is a word?").press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    ask(page, "Describe the image.")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    assert find_faint(page, ".patches") == []
    page.get_by_role("button", name="Stop").click()
    wait_for_answer(page)
    page.screenshot(path=screenshots / f"app_{scheme}.png", full_page=True)
    assert find_faint(page, ".patches") == []


def test_nothing_is_left_behind(desktop, served):
    """Last, because it ends the app."""
    visit(desktop, served)
    upload(desktop, ("mine.png", encode(noise(21))))
    expect(desktop.locator("#tray button")).to_have_count(len(app.make_examples()) + 1)
    (temporary,) = (served.place / "temporary").glob("vwlmm_app_*")
    assert list(temporary.rglob("mine.png"))
    assert list((served.place / "temporary").iterdir()) == [temporary]
    served.process.send_signal(signal.SIGTERM)
    served.process.wait(60)
    assert list((served.place / "temporary").iterdir()) == []
    assert sorted(served.folder.rglob("*")) == served.before
    assert not (served.place / "asked_for").exists()
    desktop.expected_errors = [said for said in desktop.errors if "ERR_" in said]  # it has gone


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    if not (ROOT / "runs/small_world/stage4/config.json").is_file():
        pytest.skip("needs what `make demo` trains")
    served = serve(ROOT, tmp_path_factory.mktemp("trained"), packages=str(ROOT))
    yield served
    served.process.kill()


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_on_what_the_demo_has_trained(size, request, trained, screenshots):
    """Screenshots to look at, and an answer that is right."""
    page = visit(request.getfixturevalue(size), trained)
    page.screenshot(path=screenshots / f"app_{size}_first.png")
    page.locator("#patches0 button[data-patch='18']").click()
    expect(page.locator("#details0 table").first).to_be_visible()
    ask(page, "Describe the image.")
    wait_for_answer(page)
    expect(answers(page)).to_have_text(app.make_examples()[0].name.removeprefix("small world: "))
    page.screenshot(path=screenshots / f"app_{size}_answer.png")
    page.get_by_label("Where is a word?").fill("red")
    page.get_by_label("Where is a word?").press("Enter")
    expect(page.locator("#patches0 .legend")).to_be_visible()
    page.screenshot(path=screenshots / f"app_{size}_word.png")
    choose(page, "Compare with", "VW-LMM")
    choose(page, "Image features", "pseudo", nth=1)
    ask(page, "How many shapes are there?")
    wait_for_answer(page)
    page.screenshot(path=screenshots / f"app_{size}_compared.png", full_page=True)
