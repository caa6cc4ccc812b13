"""
Talk to checkpoints about images, and see what they make of every patch: visual words, where a word lives, real or
pseudo image features, two models side by side.

    make app

It opens on what `make demo` has trained, and offers what `make demo-lavit` and `make demo-vlsa` have. With others:

    .venv/bin/python examples/app.py path/to/checkpoint your-name/checkpoint-on-the-hub

Images and conversations stay in memory. What is uploaded lies in a temporary folder for minutes, which is deleted at
the end. Nothing is loaded from another host but a checkpoint that is named on the Hub.
"""

import argparse
import atexit
import logging
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from app_models import (
    MAX_BYTES,
    Checkpoint,
    Picture,
    find_checkpoints,
    inspect,
    read_upload,
    stream_answer,
)
from app_patches import VIEWS, render_details, render_message, render_patches, render_thumbnails, render_tray
from small_world import random_detailed_scene, random_scene


# Gradio reads both when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="vwlmm_app_")  # of uploads

import gradio as gr

from modeling_vwlmm.inspection import InspectedImage


atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
logger = logging.getLogger(__name__)

REAL, PSEUDO = "real", "pseudo"  # image features
NOTHING = "nothing"  # to compare with
QUESTIONS = ("Describe the image.", "How many shapes are there?", "What colour is the shape at the top left?")
MAX_UPLOADS = 20  # that one page keeps
UPLOAD_SECONDS = 600  # that a file stays on the disk
HEADER = """
<h1>An image in visual words</h1>
<p>Ask about an image, tap its patches, and look for a word: each patch is a distribution over the vocabulary.</p>
"""
# Both components are buttons in HTML. `trigger` tells the page which one was pressed; arrow keys move between them.
PRESS = """
const buttons = () => [...element.querySelectorAll("button")];
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const number = Number(button.dataset.patch ?? button.dataset.picture);
  if (button.dataset.patch !== undefined)
    for (const other of document.querySelectorAll("button[data-patch]"))
      other.setAttribute("aria-pressed", String(Number(other.dataset.patch) === number));
  trigger("press", {number});
});
element.addEventListener("keydown", (event) => {
  const columns = Number(element.querySelector("[data-columns]")?.dataset.columns ?? 1);
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
  const next = buttons()[buttons().indexOf(document.activeElement) + step];
  if (!step || !next) return;
  event.preventDefault();
  for (const button of buttons()) if (button.dataset.patch !== undefined) button.tabIndex = button === next ? 0 : -1;
  next.focus();
});
"""
# What a press or a question changes may be out of sight.
SHOW_DETAILS, SHOW_CHAT = (
    f"() => document.querySelector('#{name}0').scrollIntoView({{block: 'nearest', behavior: 'smooth'}})"
    for name in ("details", "chat")
)


@dataclass(frozen=True)
class Side:
    """One of two models that are looked at side by side: its settings, and what the page shows of it."""

    model: gr.Dropdown
    features: gr.Dropdown
    history: gr.State
    column: gr.Column
    patches: gr.HTML
    details: gr.HTML
    chat: gr.Chatbot


def main(arguments: list[str] | None = None) -> None:
    """Serves the app until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # A Space has no command line, but variables.
    own = os.environ.get("VWLMM_CHECKPOINTS", "").split()
    parser.add_argument("checkpoints", nargs="*", default=own, help="folders, or names on the Hub")
    parser.add_argument("--host", help="by default this machine alone, 127.0.0.1; 0.0.0.0 for all who reach it")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also through a public link of Gradio's servers")
    args = parser.parse_args(arguments)
    try:
        checkpoints, missing = find_checkpoints(args.checkpoints)
        next(iter(checkpoints.values())).get_model(False)  # so that a wrong name is told here
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is deleted then, too
    page = build_page(checkpoints, missing, make_examples())
    page.queue(default_concurrency_limit=4).launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        max_file_size=MAX_BYTES,
        theme=make_theme(),
        css_paths=Path(__file__).with_suffix(".css"),
        footer_links=[],
        ssr_mode=False,
    )


def make_theme() -> gr.themes.Base:
    """Gradio's own, with a contrast of 4.5 and more where its text is too faint to read."""
    theme = gr.themes.Default(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(
        body_text_color_subdued="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_cancel_background_fill="#dc2626",
        button_cancel_background_fill_hover="#b91c1c",
    )


def make_examples() -> list[Picture]:
    """Scenes of the small world, and of the grey world that VLSA's demo is about."""
    rng = random.Random(13)
    scenes = sorted((random_scene(rng) for _ in range(6)), key=lambda scene: -len(scene.things))
    return [
        *(Picture(scene.image(), f"small world: {scene.caption()}") for scene in scenes),
        *(Picture(random_detailed_scene(rng).image(), f"grey world {number}") for number in (1, 2)),
    ]


def build_page(checkpoints: dict[str, Checkpoint], missing: str, examples: list[Picture]) -> gr.Blocks:
    """The page. What a visitor does is in `gr.State`, of which each has their own."""
    with gr.Blocks(title="Visual words", analytics_enabled=False, delete_cache=(60, UPLOAD_SECONDS)) as page:
        pictures, looked_at = gr.State(examples), gr.State(0)
        waiting = gr.State([0])  # pictures that go with the next question
        patch, is_answering = gr.State(None), gr.State(False)

        gr.HTML(HEADER, elem_id="header")
        with gr.Row(elem_id="pictures"):
            tray = gr.HTML(render_tray(examples, 0), js_on_load=PRESS, elem_id="tray")
            upload = gr.UploadButton(
                "Upload",
                file_types=["image"],
                file_count="multiple",
                type="binary",
                scale=0,
                min_width=90,
                size="md",
                elem_id="upload",
            )
        with gr.Row(elem_id="settings"):
            choices = ([*checkpoints], [NOTHING, *checkpoints])
            settings = [
                make_settings(checkpoints, *pair) for pair in zip(("Model", "Compare with"), choices, strict=True)
            ]
            view = gr.Dropdown([*VIEWS], value=next(iter(VIEWS)), label="Show on patches", min_width=150)
            word = gr.Textbox(label="Where is a word?", placeholder="red", submit_btn="Find", min_width=150)
        with gr.Row():
            sides = [build_side(number, *setting) for number, setting in enumerate(settings)]
        if missing:
            gr.Markdown(missing, elem_id="missing")
        with gr.Column(elem_id="bar"):
            with gr.Row(elem_id="ask"):
                question = gr.Textbox(
                    label="Question",
                    show_label=False,
                    container=False,
                    placeholder="Ask a question",
                    elem_id="question",
                )
                send = gr.Button("Send", variant="primary", scale=0, min_width=80)
                stop = gr.Button("Stop", variant="stop", scale=0, min_width=80, visible=False)
                clear = gr.Button("New", scale=0, min_width=60, elem_id="new")
            with gr.Row(elem_id="hints"):
                attached = gr.HTML(render_waiting(examples, [0]), elem_id="attached")
                suggestions = [(gr.Button(text, size="sm"), text) for text in QUESTIONS]

        def show(event: Callable) -> None:
            """Lets both sides be looked at anew behind an event."""
            for side in sides:
                event(
                    partial(look, checkpoints),
                    [side.model, side.features, pictures, looked_at, view, word, patch],
                    [side.patches, side.details],
                    show_progress="hidden",
                )

        for event in (page.load, view.input, word.submit, *(side.features.input for side in sides)):
            show(event)
        looked = [looked_at, waiting, patch, tray, attached]
        show(tray.press(pick, pictures, looked, show_progress="hidden").then)
        show(upload.upload(add_uploads, [upload, pictures], [pictures, *looked]).then)
        for side in sides:
            show(side.model.input(partial(update_features, checkpoints), side.model, side.features).then)
            event = side.patches.press(tap, None, patch, show_progress="hidden")
            for other in sides:
                event.then(
                    partial(look_at_patch, checkpoints),
                    [other.model, other.features, pictures, looked_at, patch],
                    other.details,
                    show_progress="hidden",
                ).then(None, js=SHOW_DETAILS)

        histories, chats = [side.history for side in sides], [side.chat for side in sides]
        conversation = [*histories, *chats, waiting, attached]
        # What begins a conversation anew waits for the answer that is being written.
        buttons = [send, stop, clear, sides[1].model, is_answering]
        models = [component for side in sides for component in (side.model, side.features)]
        filled = [button.click(partial(str, text), None, question) for button, text in suggestions]
        answering = []
        for event in (question.submit, send.click, *(event.then for event in filled)):
            asked = event(
                ask,
                [question, pictures, waiting, is_answering, sides[1].model, *histories],
                [question, *conversation, *buttons],
                show_progress="hidden",
            )
            answers = [*histories, *chats]
            answered = asked.success(
                partial(answer, checkpoints), [*models, *histories], answers, show_progress="hidden"
            )
            answered.then(end_answer, None, buttons, show_progress="hidden")
            asked.success(None, js=SHOW_CHAT)
            answering.append(answered)
        clear.click(restart, [pictures, looked_at], conversation, show_progress="hidden")
        sides[1].model.input(
            compare,
            [sides[1].model, sides[1].history, pictures, looked_at],
            [sides[1].column, *conversation],
            show_progress="hidden",
        )
        stop.click(end_answer, None, buttons, cancels=answering, show_progress="hidden")
    return page


def make_settings(
    checkpoints: dict[str, Checkpoint], label: str, choices: list[str]
) -> tuple[gr.Dropdown, gr.Dropdown]:
    """What to choose of one side: model and image features."""
    model = gr.Dropdown(choices, value=choices[0], label=label, min_width=150)
    return model, gr.Dropdown(label="Image features", min_width=150, **get_features(checkpoints, choices[0]))


def build_side(number: int, model: gr.Dropdown, features: gr.Dropdown) -> Side:
    """One side: the image with its patches, and beside or below it the conversation."""
    with gr.Column(visible=number == 0, min_width=320) as column, gr.Row():
        with gr.Column(min_width=300):
            patches = gr.HTML(js_on_load=PRESS, elem_classes="look", elem_id=f"patches{number}")
            details = gr.HTML(elem_classes="details", elem_id=f"details{number}")
        with gr.Column(min_width=300):
            chat = gr.Chatbot(
                label="Conversation",
                show_label=False,
                height=430,
                buttons=[],
                feedback_options=None,
                allow_tags=False,
                placeholder="Ask about the image, here or with one of the questions below.",
                elem_id=f"chat{number}",
            )
    return Side(model, features, gr.State([]), column, patches, details, chat)


def get_features(checkpoints: dict[str, Checkpoint], name: str) -> dict:
    """
    What the choice of image features is when a model has been chosen: set to those that it was trained to read, and
    without pseudo image features where no VM head has been trained to make them.
    """
    try:
        reads_pseudo = name != NOTHING and checkpoints[name].reads_pseudo_by_default()
        has_choice = name != NOTHING and (reads_pseudo or checkpoints[name].has_visual_words())
    except ValueError:  # of a checkpoint that cannot be loaded, which is said where its patches would be
        reads_pseudo = has_choice = False
    return {
        "choices": [REAL, PSEUDO] if has_choice else [REAL],
        "value": PSEUDO if reads_pseudo else REAL,
        "visible": name != NOTHING,
    }


def update_features(checkpoints: dict[str, Checkpoint], name: str) -> gr.Dropdown:
    """The choice of image features behind the choice of a model."""
    return gr.Dropdown(**get_features(checkpoints, name))


def look(
    checkpoints: dict[str, Checkpoint],
    name: str,
    features: str,
    pictures: list[Picture],
    looked_at: int,
    view: str,
    word: str,
    patch: int | None,
) -> tuple:
    """The patches of one side, and what is known of the one that was tapped."""
    if name == NOTHING:
        return gr.skip(), gr.skip()
    inspected = try_to_inspect(checkpoints[name], features, pictures[looked_at])
    if isinstance(inspected, str):
        return render_message(inspected), ""
    details = render_details(inspected, patch)
    title = f"{name} · {features} features"
    try:
        return render_patches(inspected, title, view, word, patch), details
    except ValueError as error:  # no such word, or no patch
        return render_patches(inspected, title, view, "", patch) + render_message(str(error)), details


def look_at_patch(
    checkpoints: dict[str, Checkpoint],
    name: str,
    features: str,
    pictures: list[Picture],
    looked_at: int,
    patch: int,
) -> str:
    """What is known of a patch. The image stays as it is, with the button that was pressed."""
    if name == NOTHING:
        return gr.skip()
    inspected = try_to_inspect(checkpoints[name], features, pictures[looked_at])
    return "" if isinstance(inspected, str) else render_details(inspected, patch)


def try_to_inspect(checkpoint: Checkpoint, features: str, picture: Picture) -> InspectedImage | str:
    """What a model makes of a picture, patch by patch; or what went wrong, in words for the page."""
    try:
        return inspect(checkpoint, features == PSEUDO, picture)
    except Exception as error:  # whatever a model raises
        logger.exception("An image could not be inspected.")
        return str(error)


def tap(event: gr.EventData) -> int:
    """The patch that was pressed."""
    return event.number


def pick(pictures: list[Picture], event: gr.EventData) -> tuple:
    """An image from the tray: it is looked at, and goes with the next question."""
    return show_pictures(pictures, [event.number])


def add_uploads(contents: list[bytes], pictures: list[Picture]) -> tuple:
    """Puts uploads into the tray. All of them go with the next question, and the last is looked at."""
    uploads = []
    for content in contents:
        try:
            picture, is_animated = read_upload(content)
        except ValueError as error:
            gr.Warning(str(error), title="Not added")
            continue
        uploads.append(picture)
        if is_animated:
            gr.Info("This image is animated. Its first frame is used.", title="Added")
    if not uploads:
        return (gr.skip(),) * 6
    own = [picture for picture in pictures if picture.is_upload]
    pictures = [*pictures[: len(pictures) - len(own)], *[*own, *uploads][-MAX_UPLOADS:]]
    return pictures, *show_pictures(pictures, [pictures.index(upload) for upload in uploads[-MAX_UPLOADS:]])


def show_pictures(pictures: list[Picture], waiting: list[int]) -> tuple:
    """Looks at the last of these pictures, which go with the next question."""
    return waiting[-1], waiting, None, render_tray(pictures, waiting[-1]), render_waiting(pictures, waiting)


def render_waiting(pictures: list[Picture], waiting: list[int]) -> str:
    """What goes with the next question."""
    if not waiting:
        return "<span>Goes on about the images above</span>"
    return f"<span>Goes with your question</span>{render_thumbnails([pictures[index] for index in waiting])}"


def restart(pictures: list[Picture], looked_at: int) -> tuple:
    """A new conversation, about the image that is looked at."""
    return [], [], [], [], [looked_at], render_waiting(pictures, [looked_at])


def compare(name: str, history: list[dict], pictures: list[Picture], looked_at: int) -> tuple:
    """Shows the other side or hides it. Both sides begin together."""
    if name != NOTHING and history:
        return gr.Column(visible=True), *[gr.skip()] * 6
    return gr.Column(visible=name != NOTHING), *restart(pictures, looked_at)


def ask(
    question: str,
    pictures: list[Picture],
    waiting: list[int],
    is_answering: bool,
    compared: str,
    *histories: list[dict],
) -> tuple:
    """Puts a question, with the pictures that wait, into the conversations."""
    if is_answering:
        raise gr.Error("Wait for the answer, or stop it.", title="Not sent")
    if not question.strip():
        raise gr.Error("Write a question first.", title="Not sent")
    turn = {"role": "user", "text": question.strip(), "pictures": [pictures[index] for index in waiting]}
    histories = [
        [*history, turn] if side == 0 or compared != NOTHING else [] for side, history in enumerate(histories)
    ]
    return (
        "",
        *histories,
        *map(show_chat, histories),
        [],
        render_waiting(pictures, []),
        gr.Button(visible=False),
        gr.Button(visible=True),
        gr.Button(interactive=False),
        gr.Dropdown(interactive=False),
        True,
    )


def answer(checkpoints: dict[str, Checkpoint], *inputs: str | list[dict]) -> Iterator[tuple]:
    """Answers as they are written, by both sides at once. Who presses Stop closes this generator."""
    *choices, first, second = inputs
    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(continue_history(checkpoints[name], features == PSEUDO, history)))
            for name, features, history in zip(choices[::2], choices[1::2], (first, second), strict=True)
            if history
        ]
        latest = [first, second]
        running = list(enumerate(streams))
        while running:
            for side, stream in list(running):
                try:
                    latest[side] = next(stream)
                except StopIteration:
                    running.remove((side, stream))
            yield *latest, *map(show_chat, latest)


def continue_history(checkpoint: Checkpoint, reads_pseudo: bool, history: list[dict]) -> Iterator[list[dict]]:
    """A conversation with its answer, as far as it has been written; or with what went wrong."""
    text, failure = "", "The model has written nothing."
    try:
        for text in stream_answer(checkpoint, reads_pseudo, to_messages(history)):
            yield [*history, {"role": "assistant", "text": text}]
    except Exception as error:  # whatever generation raises is said on the page
        logger.exception("A question could not be answered.")
        text, failure = "", f"No answer: {error}"
    if not text:
        yield [*history, {"role": "assistant", "text": failure, "has_failed": True}]


def end_answer() -> tuple:
    """The buttons as they are when no answer is being written."""
    return (
        gr.Button(visible=True),
        gr.Button(visible=False),
        gr.Button(interactive=True),
        gr.Dropdown(interactive=True),
        False,
    )


def to_messages(history: list[dict]) -> list[dict]:
    """
    A conversation for a chat template. Questions without an answer are left out, but for the last one; their images go
    with the next.
    """
    messages, pictures = [], {}
    for turn in history:
        if turn.get("has_failed"):
            messages.pop()
            continue
        if messages and messages[-1]["role"] == turn["role"]:  # stopped before the first word
            messages.pop()
        pictures = dict.fromkeys([*pictures, *turn["pictures"]]) if turn["role"] == "user" else {}  # no one twice
        images = [{"type": "image", "image": picture.image} for picture in pictures]
        messages.append({"role": turn["role"], "content": [*images, {"type": "text", "text": turn["text"]}]})
    return messages


def show_chat(history: list[dict]) -> list[dict]:
    """A conversation as the page shows it."""
    shown = []
    for turn in history:
        pictures = turn.get("pictures")
        content = [gr.HTML(render_thumbnails(pictures))] if pictures else []
        shown.append({"role": turn["role"], "content": [*content, turn["text"]]})
    return shown


if __name__ == "__main__":
    main()
