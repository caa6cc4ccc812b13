# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` on a saved folder, without this package, answers as `generate` does."""

import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_lavit_training as lavit
import torch
from conftest import make_image
from PIL import ExifTags, Image
from test_hub import WITHOUT_PACKAGE

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

QUESTION = "What is in the image?"


@contextlib.contextmanager
def serve(checkpoint: str, folder: Path) -> Iterator[openai.OpenAI]:
    """A client of a server of this checkpoint, which keeps its log and its code in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", WITHOUT_PACKAGE + "from transformers.cli.transformers import main; main()"]
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    with (
        open(folder / "log", "w+") as log,
        subprocess.Popen(
            [*command, "serve", checkpoint, *options], cwd=folder, stdout=log, stderr=log, env=environment
        ) as server,
    ):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            for _ in range(240):
                assert server.poll() is None, (folder / "log").read_text()[-4000:]
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                time.sleep(0.5)
            yield client
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def client(vicuna, tmp_path_factory):
    with serve(vicuna, tmp_path_factory.mktemp("serve")) as client:
        yield client


def ask(client, model: str, *images, question: str = QUESTION, **options) -> str:
    content = [{"type": "text", "text": question}]
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=12, temperature=0.0
    )
    return answer.choices[0].message.content


def generate(model, processor, *images, question: str = QUESTION) -> str:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_about_an_image(client, vicuna, model, processor):
    first, second = make_image(1), make_image(5)
    answers = [ask(client, vicuna, image) for image in (first, second)]
    assert answers == [generate(model, processor, image) for image in (first, second)]
    assert answers[0] != answers[1]


def test_image_that_lies_on_its_side(client, vicuna, model, processor):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = make_image(1)
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    answer = ask(client, vicuna, sideways, exif=exif)
    assert answer == generate(model, processor, upright) != generate(model, processor, sideways)


def test_image_of_16_bits(client, vicuna, model, processor):
    grey = make_image(1).convert("L")
    levels = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert ask(client, vicuna, levels) == generate(model, processor, grey)


def test_control_tokens_are_text(client, vicuna, model, processor):
    question = "What is </s> in <s> the <image> picture?"
    assert ask(client, vicuna, make_image(1), question=question) == generate(
        model, processor, make_image(1), question=question
    )


def test_answers_to_text_alone(client, vicuna, model, processor):
    assert ask(client, vicuna) == generate(model, processor)


def test_model_that_drops_image_tokens(tmp_path):
    """Images of which different numbers of tokens are kept, and a question behind an answer."""
    images = [make_image(seed) for seed in (1, 5)]
    tokenizer = lavit.make_tokenizer()
    processor = lavit.make_processor(tokenizer)
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokenizer.selector.fc3.weight.mul_(20)
        probabilities = tokenizer.selector(tokenizer.encode_patches(pixel_values))[..., 0].exp()  # [I, N]
    tokenizer.config.threshold = probabilities.median().item()
    model = lavit.make_model(tokenizer)
    kept = model.model.select_tokens(pixel_values)[0].sum(dim=1).tolist()
    assert len(set(kept)) == 2 and max(kept) < tokenizer.config.num_patches
    folder = str(tmp_path / "lavit")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with serve(folder, tmp_path) as client:
        answers = [ask(client, folder, image) for image in images]
        assert answers == [generate(model, processor, image) for image in images]
        assert answers[0] != answers[1]
        # Behind another conversation, too.
        assert ask(client, folder, images[0]) == answers[0]


def test_images_of_several_resolutions(perceiving, tmp_path):
    """Of four patches and of one, for VLSA's adapter."""
    images = [make_image(1).resize((90, 70)), make_image(5).resize((20, 28))]
    model, processor = (cls.from_pretrained(perceiving) for cls in (VWLMMForConditionalGeneration, VWLMMProcessor))
    with serve(perceiving, tmp_path) as client:
        assert ask(client, perceiving, *images) == generate(model, processor, *reversed(images))
