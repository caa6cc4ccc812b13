"""
What the app asks of checkpoints and of uploads: answers as they are written, an image patch by patch, and whether a
file is an image. Nothing of the page is here.
"""

import base64
import copy
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from prompt_length import check_length
from transformers import TextIteratorStreamer

from modeling_vwlmm import VWLMMForConditionalGeneration
from modeling_vwlmm.inspection import InspectedImage, inspect_image
from processing_vwlmm import VWLMMProcessor
from processing_vwlmm.images_vwlmm import convert_to_rgb, open_image


# What the demos leave behind: name, folder, and the target of the Makefile that makes it.
DEMOS = (
    ("VW-LMM", "runs/small_world/stage4", "make demo"),
    ("VW-LMM, pseudo", "runs/small_world/pseudo_image_features", "make demo"),
    ("LaVIT", "runs/small_world_lavit/stage2", "make demo-lavit"),
    ("VLSA", "runs/small_world_vlsa/abc", "make demo-vlsa"),
)
MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 40_000_000  # of an upload, decoded
MAX_SIDE = 2048  # of an image that is kept: no model here reads more
MAX_NEW_TOKENS = 512  # of an answer


class Checkpoint:
    """
    A model and its processor, which are loaded when they are first asked for.

    Args:
        source (`str`): Folder, or name on the Hub.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.processor: VWLMMProcessor | None = None
        self._models: dict[bool, VWLMMForConditionalGeneration] = {}
        self._lock = threading.Lock()

    def get_model(self, reads_pseudo: bool) -> VWLMMForConditionalGeneration:
        """
        The model that reads image features, or pseudo image features. Both are there at once, with the same weights
        and each with a config of its own: no request sees what another one has chosen.

        Raises:
            ValueError: If there is no such checkpoint.
        """
        with self._lock:
            if not self._models:
                self._load()
        return self._models[reads_pseudo]

    def reads_pseudo_by_default(self) -> bool:
        """Whether it was trained to read pseudo image features."""
        self.get_model(False)
        return self._trained_with_pseudo

    def has_visual_words(self) -> bool:
        """Whether its VM head has been trained."""
        return 3 in self.get_model(False).config.trained_stages

    def _load(self) -> None:
        try:
            self.processor = VWLMMProcessor.from_pretrained(self.source)
            model = VWLMMForConditionalGeneration.from_pretrained(self.source).eval()
        except Exception as error:
            first_line = str(error).strip().split("\n")[0]
            raise ValueError(f"The checkpoint {self.source} cannot be loaded: {first_line}") from error
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._trained_with_pseudo = model.config.use_pseudo_image_features
        tensors = [*model.parameters(), *model.buffers()]
        for reads_pseudo in (False, True):
            # All is copied but the tensors, which both share.
            copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
            copied.config.use_pseudo_image_features = reads_pseudo
            self._models[reads_pseudo] = copied


def find_checkpoints(sources: list[str]) -> tuple[dict[str, Checkpoint], str]:
    """
    The checkpoints to choose from, by name: those that are given, by the end of their path, or by all of it where two
    end alike, or else those that the demos have made; and a sentence on what is missing, which is empty if nothing is.

    Raises:
        ValueError: If there is none.
    """
    if sources:
        ends = {source: "/".join(Path(source).absolute().parts[-2:]) for source in sources}
        counts = Counter(ends.values())
        return {end if counts[end] == 1 else source: Checkpoint(source) for source, end in ends.items()}, ""
    found = {name: Checkpoint(folder) for name, folder, _ in DEMOS if (Path(folder) / "config.json").is_file()}
    missing = [f"{name}: `{target}`" for name, _, target in DEMOS if name not in found]
    if not found:
        raise ValueError(
            f"There is no checkpoint at {DEMOS[0][1]}. Make one with `{DEMOS[0][2]}`, which takes minutes, or name "
            "your own: python examples/app.py path/to/checkpoint"
        )
    return found, f"Not trained here yet: {'; '.join(missing)}." if missing else ""


class Picture:
    """
    An image of somebody's, in memory. Copies of a page's state share it.

    Args:
        image (`PIL.Image.Image`): Upright, in RGB.
        name (`str`): What it is called.
        is_upload (`bool`, *optional*, defaults to `False`): Whether it is no example.
    """

    def __init__(self, image: Image.Image, name: str, is_upload: bool = False) -> None:
        self.image, self.name, self.is_upload = image, name, is_upload

    @cached_property
    def thumbnail(self) -> str:
        """The image with at most 160 pixels a side, as a URI. An answer that grows shows it again and again."""
        small = self.image.copy()
        small.thumbnail((160, 160))
        return encode_uri(small)

    def __deepcopy__(self, memo: dict) -> "Picture":
        return self


def read_upload(content: bytes) -> tuple[Picture, bool]:
    """
    A file that somebody has uploaded, and whether it is an animation, of which the first frame is taken.

    Raises:
        ValueError: If it is no image, or too large, in words for who uploaded it.
    """
    too_large = f"This image is too large: at most {MAX_PIXELS // 10**6} megapixels are read. Make it smaller."
    if len(content) > MAX_BYTES:
        raise ValueError(f"This file is too large: at most {MAX_BYTES // 2**20} MB are read. Make it smaller.")
    try:
        image = open_image(content)
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(too_large)
        image = convert_to_rgb(image)
    except ValueError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError) or str(error) == too_large:
            raise ValueError(too_large) from error
        raise ValueError(
            "This file is no image that can be read. Choose another one, such as a PNG, JPEG, WebP or GIF file."
        ) from error
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return Picture(image, f"your image, {image.width} x {image.height} pixels", is_upload=True), is_animated


# An inspected image of a large model takes hundreds of megabytes.
@lru_cache(maxsize=8)
def inspect(checkpoint: Checkpoint, reads_pseudo: bool, picture: Picture) -> InspectedImage:
    """What a model makes of a picture, patch by patch."""
    model = checkpoint.get_model(reads_pseudo)
    return inspect_image(model, checkpoint.processor, picture.image, layers=())


def stream_answer(checkpoint: Checkpoint, reads_pseudo: bool, messages: list[dict]) -> Iterator[str]:
    """
    The answer to a conversation that ends with a question, as far as it has been written, again and again. Who stops
    reading ends the generation.

    Args:
        checkpoint ([`Checkpoint`]): Who answers.
        reads_pseudo (`bool`): Whether from pseudo image features.
        messages (`list[dict]`): The conversation, in the format of chat templates.

    Raises:
        ValueError: If the conversation is longer than what the model reads, or whatever generation raises.
    """
    model = checkpoint.get_model(reads_pseudo)
    inputs = checkpoint.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    room = check_length(model, inputs)
    streamer = TextIteratorStreamer(checkpoint.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    is_stopped = threading.Event()
    failures = []

    def generate() -> None:
        try:
            model.generate(
                **inputs,
                streamer=streamer,
                max_new_tokens=max(min(MAX_NEW_TOKENS, room), 1),
                do_sample=False,
                stopping_criteria=[lambda ids, scores: torch.full((len(ids),), is_stopped.is_set()).to(ids.device)],
            )
        except Exception as error:  # which is raised where the answer is read
            failures.append(error)
        finally:
            streamer.end()

    thread = threading.Thread(target=generate)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            if streamer.text_queue.empty():  # else there is more to show at once
                yield text.strip()
        yield text.strip()
    finally:
        is_stopped.set()
        thread.join()
    if failures:
        raise failures[0]


def encode_uri(image: Image.Image) -> str:
    """An image as a `data:` URI, which needs no file."""
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
