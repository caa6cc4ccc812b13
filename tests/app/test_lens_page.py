# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The patch lens in a browser: by mouse, finger, and keyboard alone, bright and dark, on a desktop and a phone."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DESKTOP, find_faint
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from modeling_vwlmm import VWLMMForConditionalGeneration, convert_lavit_checkpoint
from modeling_vwlmm.inspection import inspect_image
from modeling_vwlmm.lens import make_lens
from processing_vwlmm import VWLMMProcessor


GOLDEN = Path(__file__).parents[1] / "golden"
# Random models say them all, and none of them may become an element or run.
HTML = [
    "<script>document.title='run'</script>",
    "<img src=x onerror=document.title='run'>",
    "</script>",
    "<b>bold</b>",
]
WORDS = [
    *HTML,
    *("red", "green", "blue", "small", "large", "circle", "square", "dark", "the", "a", "of", "und", "日本"),
]
K = 5


def write(folder: Path, models, names=("first.png", "second <b>.png"), **vision) -> SimpleNamespace:
    """A lens of a random model on images of noise: its `url`, and its `data`."""
    model, processor = models(WORDS, **vision)
    rng = np.random.default_rng(0)
    side = processor.image_processor.size.shortest_edge
    model.config.trained_stages = [1, 2, 3, 4]
    images = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in names]
    found = [inspect_image(model, processor, image, layers=[0, 1, 2]) for image in images]
    found[0].layer_tokens.values = found[0].layer_tokens.values.clone()
    found[0].layer_tokens.values[0, 5, 0] = 1  # a word for certain, with the strongest colour
    page = make_lens(zip(names, found, strict=True), "a random <i>model</i>", 2)
    (folder / "lens.html").write_text(page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL)[1])
    return SimpleNamespace(url=(folder / "lens.html").as_uri(), data=data, found=found)


@pytest.fixture(scope="module")
def lens(make_model_of_words, tmp_path_factory) -> SimpleNamespace:
    """Two images of 4 x 4 patches."""
    return write(tmp_path_factory.mktemp("lens"), make_model_of_words)


@pytest.fixture(scope="module")
def fine(make_model_of_words, tmp_path_factory) -> SimpleNamespace:
    """One image of 24 x 24 patches."""
    folder = tmp_path_factory.mktemp("fine")
    return write(folder, make_model_of_words, ["photo.png"], image_size=336, patch_size=14)


@pytest.fixture(autouse=True)
def nothing_goes_wrong(open_page, opened):
    """No page asks for anything but its own file, or has an error to report."""
    yield
    for page in opened:
        assert page.errors == []
        assert page.requested and all(url.startswith(("file:", "data:")) for url in page.requested)
        assert page.title() == "Patch lens: a random <i>model</i>"  # what a token would have changed, had it run


def patch(page: Page, row: int, column: int) -> Locator:
    return page.get_by_role("row").nth(row).get_by_role("gridcell").nth(column)


def says(lens: SimpleNamespace, packed: dict, at: int) -> list[str]:
    return [lens.data["tokens"][token] for token in packed["tokens"][K * at : K * at + K]]


def check_panel(page: Page, lens: SimpleNamespace, row: int, column: int, image: int = 0) -> None:
    """The panel says of a patch what the file has."""
    shown = lens.data["images"][image]
    at = row * shown["columns"] + column
    panel = page.locator("#panel")
    expect(panel.get_by_role("heading", level=2)).to_have_text(f"Row {row + 1}, column {column + 1}")
    for number, name in enumerate(("words", "predictions", "nearest")):
        items = panel.locator("#lists section").nth(number).locator("li")
        expect(items.locator(".token")).to_have_text(says(lens, shown[name], at))
        values = shown[name]["values"][K * at : K * at + K]
        formatted = [f"{value:.2f}" if name == "nearest" else f"{100 * value:.1f} %" for value in values]
        expect(items.locator(".value")).to_have_text(formatted)
    rows = panel.get_by_role("row")
    expect(rows.get_by_role("rowheader")).to_have_text(["Layer 0, read", "Layer 1", "Layer 2, last"])
    for number, layer in enumerate(shown["layers"]):
        expect(rows.nth(number).locator(".token")).to_have_text(says(lens, layer, at))
    expect(panel.locator("dd").nth(0)).to_have_text(f"{shown['kl'][at]:.2f} nats")
    expect(panel.locator("dd").nth(1)).to_have_text(f"{shown['entropy'][at]:.2f} nats")


def test_mouse(desktop, lens, screenshots):
    desktop.goto(lens.url)
    expect(desktop.locator("#hint")).to_be_visible()
    expect(desktop.locator("#untrained")).to_be_hidden()
    patch(desktop, 1, 2).hover()
    check_panel(desktop, lens, 1, 2)
    desktop.locator("h1").hover()
    expect(desktop.locator("#hint")).to_be_visible()
    patch(desktop, 2, 3).click()
    patch(desktop, 0, 1).hover()
    check_panel(desktop, lens, 0, 1)
    expect(desktop.locator("#state")).to_have_text("A preview. Row 3, column 4 is held.")
    desktop.locator("h1").hover()
    check_panel(desktop, lens, 2, 3)
    desktop.screenshot(path=screenshots / "lens_desktop.png", full_page=True)
    patch(desktop, 3, 3).click()
    desktop.locator("h1").hover()
    check_panel(desktop, lens, 3, 3)
    expect(desktop.get_by_role("gridcell", selected=True)).to_have_count(1)
    desktop.keyboard.press("Escape")
    expect(desktop.locator("#hint")).to_be_visible()
    expect(desktop.get_by_role("gridcell", selected=True)).to_have_count(0)


def test_finger(phone, lens, screenshots):
    phone.goto(lens.url)
    patch(phone, 1, 2).tap()
    check_panel(phone, lens, 1, 2)
    expect(patch(phone, 1, 2)).to_have_attribute("aria-selected", "true")
    picture, panel = phone.locator("#picture").bounding_box(), phone.locator("#panel").bounding_box()
    assert panel["y"] > picture["y"] + picture["height"]
    assert phone.evaluate("document.documentElement.scrollWidth") == 375
    phone.screenshot(path=screenshots / "lens_phone.png", full_page=True)
    patch(phone, 3, 0).tap()
    check_panel(phone, lens, 3, 0)
    phone.get_by_role("button", name="Let go").tap()
    expect(phone.locator("#hint")).to_be_visible()


def test_zoom_makes_patches_that_a_finger_hits(phone, fine, screenshots):
    phone.goto(fine.url)
    assert patch(phone, 0, 0).bounding_box()["width"] < 16
    phone.get_by_role("slider", name="Zoom").fill("3")
    assert patch(phone, 0, 0).bounding_box()["width"] > 36
    assert phone.evaluate("document.documentElement.scrollWidth") == 375  # the image scrolls in its own frame
    patch(phone, 20, 22).tap()
    check_panel(phone, fine, 20, 22)
    phone.screenshot(path=screenshots / "lens_phone_zoomed.png")


def get_focused(page: Page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label') ?? ''").split(":")[0]


def test_keyboard_alone(desktop, lens):
    desktop.goto(lens.url)
    press = desktop.keyboard.press
    for _ in range(10):  # images, colours, what is written, zoom, the image
        press("Tab")
        if get_focused(desktop).startswith("Row"):
            break
    assert get_focused(desktop) == "Row 1, column 1"
    check_panel(desktop, lens, 0, 0)
    outline = "getComputedStyle(document.activeElement).outlineWidth"
    assert desktop.evaluate(outline) == "3px"
    steps = {
        **{"ArrowRight": (1, 2), "ArrowDown": (2, 2), "End": (2, 4), "ArrowUp": (1, 4), "Home": (1, 1)},
        **{"ArrowLeft": (1, 1), "Control+End": (4, 4)},
    }
    for key, (row, column) in steps.items():
        press(key)
        assert get_focused(desktop) == f"Row {row}, column {column}", key
    for key in ("ArrowRight", "ArrowDown"):  # there is nothing beyond
        press(key)
        assert get_focused(desktop) == "Row 4, column 4"
    press("Enter")
    press("ArrowLeft")
    check_panel(desktop, lens, 3, 2)
    expect(desktop.get_by_role("status").filter(has_text="Row 4, column 4 is held.")).to_be_attached()
    assert desktop.locator(".patch[tabindex='0']").count() == 1  # one stop of Tab, where one has been
    press("Tab")
    assert not get_focused(desktop).startswith("Row")
    check_panel(desktop, lens, 3, 3)
    press("Shift+Tab")
    assert get_focused(desktop) == "Row 4, column 3"
    press("Escape")
    expect(desktop.locator("#hint")).to_be_visible()
    press("Control+Home")
    check_panel(desktop, lens, 0, 0)


def test_keyboard_reaches_all_choices(desktop, lens):
    desktop.goto(lens.url)
    desktop.get_by_role("radio", name="first.png").focus()
    desktop.keyboard.press("ArrowRight")
    expect(desktop.locator("#name")).to_have_text("second <b>.png · 4 × 4 patches")
    desktop.keyboard.press("Tab")
    desktop.keyboard.press("ArrowRight")
    expect(desktop.get_by_role("radio", name="KL")).to_be_checked()
    expect(desktop.locator("#legend")).to_be_visible()


def get_colors(page: Page) -> list[str]:
    return page.locator(".patch").evaluate_all("patches => patches.map((patch) => patch.style.backgroundColor)")


def test_where_is_a_word(desktop, lens, screenshots):
    desktop.goto(lens.url)
    image = lens.data["images"][0]
    patches = range(16)
    word = next(w for w in WORDS[4:] if 1 < sum(w in says(lens, image["words"], at) for at in patches) < 16)
    expected = lens.found[0].find_word(word)
    has_it = [word in says(lens, image["words"], at) for at in patches]
    desktop.get_by_role("radio", name="Where is").check()
    box = desktop.get_by_role("combobox", name="Where is")
    box.fill(word)
    highest = f"{100 * float(expected.max()):.1f} %"
    said = desktop.locator("#said")
    expect(said).to_contain_text(f"“{word}” is among the first 5 words of {sum(has_it)} patches, at most {highest}.")
    expect(desktop.locator("#legend")).to_contain_text(highest)
    colors = get_colors(desktop)
    assert [bool(color) for color in colors] == has_it
    assert colors[int(expected.argmax())] == "rgba(254, 232, 56, 0.82)"  # the bright end of cividis
    at = has_it.index(True)
    patch(desktop, at // 4, at % 4).click()
    expect(desktop.locator("#lists section").first.locator(".found .token")).to_have_text(word)
    desktop.screenshot(path=screenshots / "lens_search.png", full_page=True)
    box.fill("elephant")
    expect(said).to_have_text("“elephant” is not among the first 5 words of any patch. The file has no more of them.")
    assert not any(get_colors(desktop)) and desktop.locator("#legend").is_hidden()
    box.fill("")
    expect(said).to_contain_text("The file has the first 5 words of each patch.")
    # A visual word of the panel is looked for, too, whatever it looks like.
    desktop.get_by_role("radio", name="None").check()
    words = desktop.locator("#lists section").first.get_by_role("button")
    words.nth(1).click()
    second = says(lens, image["words"], at)[1]
    assert box.input_value() == second
    expect(said).to_contain_text(f"“{second}” is among the first 5 words")


@pytest.mark.parametrize(("name", "field"), [("KL", "kl"), ("Entropy", "entropy")])
def test_overlays(desktop, lens, name, field):
    desktop.goto(lens.url)
    assert not any(get_colors(desktop))
    desktop.get_by_role("radio", name=name).check()
    highest = max(value for image in lens.data["images"] for value in image[field])
    expect(desktop.locator("#legend")).to_have_text(f"0{highest:.2f} nats")
    values, colors = lens.data["images"][0][field], get_colors(desktop)
    red = [int(re.match(r"rgba\((\d+), ", color)[1]) for color in colors]
    order = sorted(range(16), key=values.__getitem__)
    assert [red[at] for at in order] == sorted(red) and len(set(red)) > 1  # cividis: brighter is more, of one scale
    desktop.get_by_role("radio", name="None").check()
    assert not any(get_colors(desktop)) and desktop.locator("#legend").is_hidden()


def test_switch_of_images_and_of_what_is_written(desktop, lens):
    desktop.goto(lens.url)
    written = desktop.locator(".patch span")
    for image, name in enumerate(("first.png", "second <b>.png")):
        desktop.get_by_role("radio", name=name).check()
        expect(desktop.locator("#hint")).to_be_visible()
        shown = lens.data["images"][image]
        assert desktop.locator("#picture img").get_attribute("src") == shown["source"]
        sources = {"visual word": shown["words"], "nearest token": shown["nearest"], "layer 2": shown["layers"][2]}
        for option, packed in sources.items():
            desktop.get_by_role("combobox", name="On patches").select_option(option)
            expect(written).to_have_text([says(lens, packed, at)[0] for at in range(16)])
        desktop.get_by_role("combobox", name="On patches").select_option("nothing")
        expect(written).to_have_count(0)
        patch(desktop, 3, 1).click()
        check_panel(desktop, lens, 3, 1, image)


def test_tokens_that_look_like_html_are_shown_as_text(desktop, lens):
    desktop.goto(lens.url)
    elements = desktop.locator("script, b, i").count()
    image = lens.data["images"][0]
    for text in HTML:
        at = next(at for at in range(16) if text in says(lens, image["words"], at))
        patch(desktop, at // 4, at % 4).hover()
        expect(desktop.locator("#lists section").first.locator(".token").filter(has_text=text).first).to_be_visible()
    assert desktop.locator("script, b, i").count() == elements
    assert desktop.locator("#panel img").count() == 0
    expect(desktop.locator("#about")).to_contain_text("a random <i>model</i>")


def get_contrast(page: Page, selector: str, behind: str) -> float:
    """Of text and what is behind it, as WCAG computes it."""

    def luminance(selector: str, name: str) -> float:
        color = page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")
        channels = [int(channel) / 255 for channel in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, brighter = sorted((luminance(selector, "color"), luminance(behind, "backgroundColor")))
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bright_and_dark(open_page, lens, screenshots, scheme):
    page = open_page(**DESKTOP, color_scheme=scheme)
    page.goto(lens.url)
    page.get_by_role("radio", name="KL").check()
    patch(page, 1, 1).click()
    background = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 21, 26)"}[scheme]
    assert get_contrast(page, "#panel h2", "#panel") > 7
    assert get_contrast(page, "#panel .value", "#panel") > 4.5
    assert get_contrast(page, "#about", "body") > 4.5
    assert get_contrast(page, "#lists .token", "#lists .bar") > 4.5
    assert get_contrast(page, "#overlays input:checked + span", "#overlays input:checked + span") > 4.5
    page.screenshot(path=screenshots / f"lens_{scheme}.png", full_page=True)
    page.get_by_text("How to read this page").click()
    assert find_faint(page, "#grid") == []
    page.get_by_role("radio", name="Where is").check()  # a word, which nobody has typed yet
    assert find_faint(page, "#grid") == []


def test_no_motion_where_none_is_wanted(open_page, lens):
    seconds = []
    for wish in ("no-preference", "reduce"):
        page = open_page(**DESKTOP, reduced_motion=wish)
        page.goto(lens.url)
        durations = "elements => elements.map((one) => getComputedStyle(one).transitionDuration)"
        seconds.append(max(float(one.split("s")[0]) for one in page.locator("body *").evaluate_all(durations)))
    assert seconds[0] > 0 and seconds[1] == 0


def test_lavit(desktop, tmp_path, screenshots):
    convert_lavit_checkpoint(GOLDEN / "lavit" / "checkpoint", tmp_path / "lavit")
    model = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "lavit")
    processor = VWLMMProcessor.from_pretrained(tmp_path / "lavit")
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    found = inspect_image(model, processor, image)
    (tmp_path / "lens.html").write_text(make_lens([("x.png", found)], "a random <i>model</i>", 2))
    desktop.goto((tmp_path / "lens.html").as_uri())
    expect(desktop.locator("#untrained")).to_contain_text("has not been trained")
    rows, columns = found.grid
    for kept in (True, False):
        at = found.keep_mask.tolist().index(kept)
        patch(desktop, at // columns, at % columns).click()
        code = str(int(found.codes[at])) if kept else "–"
        expect(desktop.locator("dd").nth(2)).to_have_text(code)
        expect(desktop.locator("dd").nth(3)).to_have_text("reads it" if kept else "does not read it")
        expect(desktop.locator("#lists")).to_be_visible(visible=kept)
    expect(desktop.locator(".patch.dropped")).to_have_count(int((~found.keep_mask).sum()))
    desktop.screenshot(path=screenshots / "lens_lavit.png", full_page=True)
