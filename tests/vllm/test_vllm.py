# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
vLLM serves a saved folder through its Transformers backend, without a plugin, and answers as Transformers does.

`make test-vllm` runs these tests in an environment of their own.
"""

import base64
import contextlib
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, make_image
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer
from vllm import LLM, SamplingParams

from modeling_vwlmm import VWLMMForConditionalGeneration, convert_lavit_checkpoint
from processing_vwlmm import VWLMMProcessor


HEAD_DIM = 32
NEW_TOKENS = 16
MAX_LENGTH = 512


def user(text: str, *images: Image.Image) -> dict:
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CONVERSATIONS = {
    "image": [user("Describe the image.", make_image(3))],
    "another image": [user("Describe the image.", make_image(4))],
    "three images": [user("What is left?", make_image(5), make_image(6), make_image(7))],
    "images in two turns": [
        {"role": "system", "content": "Answer in one word."},
        user("What is the color of the circle?", make_image(8)),
        assistant("Red."),
        user("Which color?", make_image(9)),
    ],
    "text alone": [user("How many people?")],
    # Of one, four and two patches where high resolution is read.
    "images of several sizes": [
        user(
            "What is left?",
            make_image(2).resize((20, 28)),
            make_image(11).resize((300, 280)),
            make_image(12).resize((50, 20)),
        )
    ],
    "literal placeholder": [user("What is <image> here?", make_image(10))],
}


def widen_heads(config: dict, weights: dict[str, torch.Tensor]) -> None:
    """
    Pads the attention heads with zeros to the smallest size that vLLM's CPU attention has a kernel for, 32 instead of
    12. What the model computes stays the same: the scale `1 / sqrt(head_dim)` goes into the queries, and the rotary
    base is chosen for the old frequencies.
    """
    heads, head_dim, width = config["num_attention_heads"], config["head_dim"], config["hidden_size"]
    zeros = HEAD_DIM // 2 - head_dim // 2  # rotary embeddings pair the two halves of a head, so each is padded
    for name, weight in weights.items():
        if ".language_model." in name and ".self_attn." in name:
            if "o_proj" in name:
                weight = F.pad(weight.view(width, heads, 2, head_dim // 2), (0, zeros)).reshape(width, -1)
            else:
                weight = F.pad(weight.view(heads, 2, head_dim // 2, width), (0, 0, 0, zeros)).reshape(-1, width)
            weights[name] = weight * math.sqrt(HEAD_DIM / head_dim) if "q_proj" in name else weight
    config["rope_parameters"]["rope_theta"] **= HEAD_DIM / head_dim
    config["head_dim"] = HEAD_DIM


def add_tokens(config: dict, weights: dict[str, torch.Tensor], number: int) -> None:
    """Enlarges the vocabulary by tokens that are unlike all others."""
    for name in ("model.language_model.embed_tokens.weight", "model.vm_head.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], -weights[name][:number]])
    config["vocab_size"] += number


@pytest.fixture(scope="session")
def wide_vicuna(vicuna, tmp_path_factory) -> Path:
    return save_variant(vicuna, tmp_path_factory.mktemp("vllm") / "vicuna")


def save_variant(source: str, folder: Path, num_new_tokens: int = 0, **fields) -> Path:
    """A copy that vLLM can serve on a CPU, with more tokens and other fields in its config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    widen_heads(config["text_config"], weights)
    add_tokens(config["text_config"], weights, num_new_tokens)
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(
    scope="session",
    # vLLM pads the embedding matrix to a multiple of 64 rows. The placeholder is one of the rows added, or past them
    # all, as it is behind Vicuna's 32,000 tokens, or an ordinary row, as in LLaVA's checkpoints.
    params=[
        "vicuna",
        "pif",
        "placeholder_past_all_rows",
        "placeholder_in_vocabulary_pif",
        "lavit_top_k",
        "perceiving",
    ],
)
def folder(request, wide_vicuna, vicuna, pif, perceiving, tmp_path_factory) -> Path:
    """The folder of a checkpoint that vLLM can serve on a CPU."""
    folder = tmp_path_factory.mktemp("vllm") / request.param
    if request.param == "vicuna":
        return wide_vicuna
    if request.param == "lavit_top_k":
        return save_lavit(folder)
    if request.param == "perceiving":
        return save_variant(perceiving, folder)
    if request.param == "pif":
        return save_variant(pif, folder)
    if request.param == "placeholder_in_vocabulary_pif":
        return save_variant(vicuna, folder, num_new_tokens=32, use_pseudo_image_features=True)
    save_variant(vicuna, folder, num_new_tokens=32, image_token_index=512)
    tokenizer = LlamaTokenizer.from_pretrained(GOLDEN / "vicuna", legacy=True)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(32)])
    VWLMMProcessor.from_vision_text_pretrained(GOLDEN / "vicuna" / "clip-vision-tower", tokenizer).save_pretrained(
        folder
    )
    return folder


def save_lavit(folder: Path) -> Path:
    """LaVIT's golden checkpoint, which keeps a fixed number of patches: an engine has no mask for tokens."""
    converted, source = folder.parent / "converted", folder.parent / "lavit"
    convert_lavit_checkpoint(GOLDEN / "lavit/checkpoint", converted)
    model = VWLMMForConditionalGeneration.from_pretrained(converted)
    tokenizer, processor = model.config.visual_tokenizer_config, VWLMMProcessor.from_pretrained(converted)
    tokenizer.selection = "top_k"
    model.config.text_config.max_position_embeddings = MAX_LENGTH
    model.config.image_seq_length = round(tokenizer.keep_rate * tokenizer.num_patches)
    processor.num_image_tokens = model.config.image_seq_length
    model.save_pretrained(source)
    processor.save_pretrained(source)
    return save_variant(source, folder)


@pytest.fixture(scope="session")
def llm(folder):
    llm = LLM(
        str(folder),
        trust_remote_code=True,
        dtype="float32",
        max_model_len=MAX_LENGTH,
        kv_cache_memory_bytes=2**28,
        limit_mm_per_prompt={"image": 3},
        enforce_eager=True,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


def generate(folder: Path, messages: list[dict]) -> tuple[list[int], list[int], torch.Tensor]:
    """Prompt, greedy answer `[T]` and the log-probabilities of its tokens `[T]` with Transformers."""
    processor = VWLMMProcessor.from_pretrained(folder)
    model = VWLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    prompt, answer = output.sequences[0].split([inputs["input_ids"].shape[1], len(output.logits)])
    logprobs = torch.cat(output.logits).log_softmax(dim=-1).gather(1, answer[:, None])  # [T, 1]
    return prompt.tolist(), answer.tolist(), logprobs[:, 0]


def to_vllm(messages: list[dict]) -> list[dict]:
    """The same messages with images as `LLM.chat` takes them."""
    return [
        {
            **message,
            "content": [
                {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


class TestSameAnswersAsTransformers:
    def test_all_prompts_in_one_batch(self, llm, folder):
        """Prompt, greedy tokens and their probabilities."""
        outputs = llm.chat(
            [to_vllm(messages) for messages in CONVERSATIONS.values()],
            SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0),
            use_tqdm=False,
        )
        expected = {name: generate(folder, messages) for name, messages in CONVERSATIONS.items()}
        for (name, (prompt, answer, logprobs)), output in zip(expected.items(), outputs, strict=True):
            assert output.prompt_token_ids == prompt, name
            assert list(output.outputs[0].token_ids) == answer, name
            found = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, answer, strict=True)]
            torch.testing.assert_close(torch.tensor(found), logprobs, atol=1e-4, rtol=0)
        # That the images count is in the reference, or else an engine without images would pass.
        _, _, logprobs = expected["image"]
        _, _, others = expected["another image"]
        assert (logprobs[: len(others)] - others[: len(logprobs)]).abs().max() > 0.01


@pytest.fixture(scope="module")
def server(wide_vicuna, tmp_path_factory):
    """Address of a `vllm serve` process, and the folder where it keeps the code of checkpoints that it has loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cwd = tmp_path_factory.mktemp("server")
    command = [Path(sys.executable).parent / "vllm", "serve", wide_vicuna, "--served-model-name", "vwlmm"]
    command += ["--trust-remote-code", "--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", "256M", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    with open(cwd / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for_health(f"http://127.0.0.1:{port}/health", process, cwd / "log")
        yield f"http://127.0.0.1:{port}/v1", cwd / "modules"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its engine and workers


def wait_for_health(url: str, process: subprocess.Popen, log: Path, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"`vllm serve` does not answer at {url}; the end of its log:\n{log.read_text()[-5000:]}")
            time.sleep(0.5)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class TestServer:
    def test_image_chat_with_openai_client(self, server, wide_vicuna):
        """The authors' question about their picture, and the answer of their own code."""
        url, _ = server
        image = Image.open(GOLDEN / "vicuna" / "sample0_image0.png")
        golden = json.loads((GOLDEN / "vicuna" / "expected.json").read_text())["greedy"]["0"]["new_token_ids"]
        question = "What is the color of the circle?"
        content = [
            {"type": "image_url", "image_url": {"url": data_url(image)}},
            {"type": "text", "text": question},
        ]
        with openai.OpenAI(base_url=url, api_key="none") as client:
            response = client.chat.completions.create(
                model="vwlmm",
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=len(golden),
            )
        _, answer, _ = generate(wide_vicuna, [user(question, image)])
        assert answer[: len(golden)] == golden
        processor = VWLMMProcessor.from_pretrained(wide_vicuna)
        assert response.choices[0].message.content == processor.decode(golden, skip_special_tokens=True)

    def test_code_comes_from_the_folder(self, server):
        _, modules = server
        assert list(modules.rglob("modeling_vwlmm.py"))
