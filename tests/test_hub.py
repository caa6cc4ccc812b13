# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""A saved folder is complete: it works in a Python process that does not have this package."""

import filecmp
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import make_image


CODE_FILES = {
    "adapters_vwlmm.py",
    "codebook_vwlmm.py",
    "configuration_vwlmm.py",
    "dropping_vwlmm.py",
    "image_codes_vwlmm.py",
    "image_features_vwlmm.py",
    "visual_tokenizer_vwlmm.py",
    "modeling_vwlmm.py",
    "kernels_vwlmm.py",
    "loss_vwlmm.py",
    "objectives_vwlmm.py",
    "outputs_vwlmm.py",
    "parts_vwlmm.py",
    "patches_vwlmm.py",
    "placeholders_vwlmm.py",
    "processing_vwlmm.py",
    "vision_vwlmm.py",
    "packed_vwlmm.py",
    "visual_words_vwlmm.py",
    "building_vwlmm.py",
    "chat_templates_vwlmm.py",
    "cutting_vwlmm.py",
    "images_vwlmm.py",
    "messages_vwlmm.py",
}
OTHER_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


# Runs first in a process where only the package's own folders are not importable.
WITHOUT_PACKAGE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_vwlmm", "processing_vwlmm"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocker())
"""


def run_without_package(script: str, cwd: Path, **variables) -> str:
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    environment |= variables
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + textwrap.dedent(script)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def without_package(vicuna, tmp_path_factory) -> Path:
    """A folder in which another process has loaded, used and saved the checkpoint."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(vicuna, cwd / "checkpoint")
    make_image(3).save(cwd / "image.png")
    output = run_without_package(
        """
        import torch
        from transformers import (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM,
                                  AutoProcessor, pipeline)
        trust = {"trust_remote_code": True}
        print("config", AutoConfig.from_pretrained("checkpoint", **trust).model_type)
        print("base", type(AutoModel.from_pretrained("checkpoint", **trust)).__name__)
        print("multimodal", type(AutoModelForMultimodalLM.from_pretrained("checkpoint", **trust)).__name__)
        model = AutoModelForImageTextToText.from_pretrained("checkpoint", **trust)
        processor = AutoProcessor.from_pretrained("checkpoint", **trust)
        print("model", type(model).__name__, type(processor).__name__)

        ask = lambda image: [{"role": "user", "content": [{"type": "image", "image": image},
                                                         {"type": "text", "text": "Describe the image."}]}]
        inputs = processor.apply_chat_template(ask("image.png"), add_generation_prompt=True, tokenize=True,
                                               return_dict=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        print("generated", ids.tolist())
        pipe = pipeline("image-text-to-text", model="checkpoint", **trust)
        text = pipe(text=ask("image.png"), max_new_tokens=8, do_sample=False, return_full_text=False)
        print("pipeline", text[0]["generated_text"] == processor.decode(ids, skip_special_tokens=True))
        print("words", tuple(model.get_visual_words(inputs["pixel_values"], top_k=2).token_ids.shape))

        model.save_pretrained("again")
        processor.save_pretrained("again")
        AutoModel.from_pretrained("checkpoint", **trust).save_pretrained("base")
        again = AutoModelForImageTextToText.from_pretrained("again", **trust)
        same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        print("weights", same, type(AutoProcessor.from_pretrained("again", **trust)).__name__)
        """,
        cwd,
    )
    (cwd / "output.txt").write_text(output)
    return cwd


def test_folder_holds_every_file(vicuna):
    assert {path.name for path in Path(vicuna).iterdir()} == CODE_FILES | OTHER_FILES


def test_auto_classes_and_pipeline(without_package, model, processor):
    lines = dict(line.split(" ", 1) for line in (without_package / "output.txt").read_text().splitlines())
    assert lines["config"] == "vwlmm"
    assert lines["base"] == "VWLMMModel"
    assert lines["multimodal"] == "VWLMMForConditionalGeneration"
    assert lines["model"] == "VWLMMForConditionalGeneration VWLMMProcessor"
    assert lines["pipeline"] == "True"
    assert lines["words"] == "(1, 16, 2)"
    assert lines["weights"] == "True VWLMMProcessor"
    # The other process answers as this one does.
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": make_image(3)}, {"type": "text", "text": "Describe the image."}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert lines["generated"] == str(ids.tolist())


class TestSavingAgain:
    @pytest.fixture
    def third(self, without_package) -> Path:
        """What a further process saves that has loaded what the first one saved."""
        run_without_package(
            """
            from transformers import AutoModelForImageTextToText, AutoProcessor
            for auto_class in (AutoModelForImageTextToText, AutoProcessor):
                auto_class.from_pretrained("again", trust_remote_code=True).save_pretrained("third")
            """,
            without_package,
        )
        return without_package / "third"

    def test_loses_no_file(self, without_package):
        assert {path.name for path in (without_package / "again").iterdir()} == CODE_FILES | OTHER_FILES

    def test_changes_no_bit(self, without_package, third):
        for before, after in (("checkpoint", "again"), ("again", "third")):
            names = sorted(CODE_FILES | OTHER_FILES)
            before, after = without_package / before, without_package / after
            assert filecmp.cmpfiles(before, after, names, shallow=False) == (names, [], [])


def test_base_model_saved_alone_is_complete(without_package):
    saved = {path.name for path in (without_package / "base").iterdir()}
    assert saved >= {"config.json", "model.safetensors", "configuration_vwlmm.py", "modeling_vwlmm.py"}
