# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversion of checkpoints in the authors' format, in every shape they are published in."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, make_image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from modeling_vwlmm import VWLMMForConditionalGeneration, convert_official_checkpoint
from processing_vwlmm import VWLMMProcessor


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden checkpoint, to take apart."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "vicuna", folder, ignore=shutil.ignore_patterns("expected*", "sample*"))
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "outputs" / "converted"


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / "model.safetensors")


def write_weights(source: Path, weights: dict[str, torch.Tensor], shards: int = 1, safe: bool = False) -> None:
    """Writes weights as the Transformers of the authors' time did: single or sharded, `.bin` or safetensors."""
    (source / "model.safetensors").unlink()
    stem, suffix = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    save = (lambda tensors, file: save_file(tensors, file, {"format": "pt"})) if safe else torch.save
    names = list(weights)
    index = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}{suffix}" if shards > 1 else f"{stem}{suffix}"
        shard = {name: weights[name] for name in names[i::shards]}
        save(shard, source / file)
        index.update(dict.fromkeys(shard, file))
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": index}
        (source / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def edit_config(source: Path, **fields) -> None:
    config = json.loads((source / "config.json").read_text())
    config.update(fields)
    (source / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not ...})
    )


def assert_same_weights(folder: Path, expected: str) -> None:
    weights, expected = (
        {name: value for file in Path(path).glob("*.safetensors") for name, value in load_file(file).items()}
        for path in (folder, expected)
    )
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


def assert_nothing_left(output: Path) -> None:
    assert not output.exists()
    assert not output.parent.exists() or not list(output.parent.iterdir())


class TestTensors:
    def test_every_tensor_arrives_bit_for_bit_under_its_new_name(self, vicuna):
        official = load_file(GOLDEN / "vicuna" / "model.safetensors")
        converted = load_file(Path(vicuna) / "model.safetensors")
        assert len(official) == len(converted)
        for name, value in converted.items():
            name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
            name = name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
            name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
            name = name.replace("model.language_model.", "model.").replace("model.vm_head.", "vm_head.")
            assert torch.equal(official.pop(name), value), name
        assert not official

    @pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_file_format_and_shards_change_nothing(self, source, output, vicuna, shards, safe):
        write_weights(source, read_weights(source), shards, safe)
        convert_official_checkpoint(source, output)
        assert_same_weights(output, vicuna)

    @pytest.mark.parametrize("given", [None, "str", "Path"])
    def test_vision_tower_from_its_own_folder(self, source, output, vicuna, tmp_path, given):
        weights = {name: value for name, value in read_weights(source).items() if "vision_tower" not in name}
        write_weights(source, weights, safe=True)
        vision_tower = None
        if given is not None:
            vision_tower = {"str": str, "Path": Path}[given](
                shutil.move(source / "clip-vision-tower", tmp_path / "clip")
            )
        convert_official_checkpoint(source, output, vision_tower=vision_tower)
        assert_same_weights(output, vicuna)

    def test_paths_may_be_strings(self, source, output, vicuna):
        convert_official_checkpoint(str(source), str(output))
        assert_same_weights(output, vicuna)

    def test_buffers_that_are_computed_now_are_ignored(self, source, output, vicuna):
        weights = read_weights(source)
        for layer in range(3):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((6,), 7.0)
        weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        write_weights(source, weights)
        convert_official_checkpoint(source, output)
        assert_same_weights(output, vicuna)

    def test_half_precision_stays(self, source, output):
        edit_config(source, torch_dtype="bfloat16")
        write_weights(source, {name: value.bfloat16() for name, value in read_weights(source).items()}, safe=True)
        convert_official_checkpoint(source, output)
        assert {value.dtype for value in load_file(output / "model.safetensors").values()} == {torch.bfloat16}


class TestConfigAndProcessor:
    @pytest.fixture
    def mistral(self, source, output) -> Path:
        edit_config(
            source,
            architectures=["vwMistralForCausalLM"],
            num_key_value_heads=2,
            sliding_window=64,
            rope_theta=1e6,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            bos_token_id=1,
        )
        weights = read_weights(source)
        for name in weights:
            if name.endswith(("k_proj.weight", "v_proj.weight")) and "vision_tower" not in name:
                weights[name] = weights[name][:24].clone()
        write_weights(source, weights, safe=True)
        convert_official_checkpoint(source, output)
        return output

    def test_mistral_gets_its_own_config_and_prompt(self, mistral):
        model = VWLMMForConditionalGeneration.from_pretrained(mistral)
        text = model.config.text_config
        assert text.model_type == "mistral"
        assert type(model.model.language_model).__name__ == "MistralModel"
        assert (text.num_key_value_heads, text.sliding_window, text.max_position_embeddings) == (2, 64, 1024)
        assert text.rms_norm_eps == 1e-5
        assert text.rope_parameters["rope_theta"] == 1e6
        prompt = VWLMMProcessor.from_pretrained(mistral).apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
        )
        assert prompt == "<s>[INST] <image>\nWho? [/INST]"

    def test_mistral_with_pseudo_image_features(self, source, output):
        edit_config(source, architectures=["vwPifMistralForCausalLM"])
        convert_official_checkpoint(source, output)
        config = VWLMMForConditionalGeneration.from_pretrained(output).config
        assert config.use_pseudo_image_features
        assert config.text_config.model_type == "mistral"

    def test_llama_config(self, vicuna):
        config = VWLMMForConditionalGeneration.from_pretrained(vicuna).config
        text = config.text_config
        assert text.model_type == "llama"
        assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size) == (48, 112, 3, 480)
        assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, 0)
        assert text.rms_norm_eps == 1e-6
        assert config.vision_config.hidden_act == "quick_gelu"
        assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
        assert (config.image_token_id, config.image_seq_length) == (480, 16)
        assert config.trained_stages == [1, 2, 3, 4]
        assert not config.use_pseudo_image_features

    def test_all_patches_with_the_class_token(self, source, output):
        edit_config(source, mm_vision_select_feature="cls_patch", mm_vision_select_layer=-1)
        convert_official_checkpoint(source, output)
        config = json.loads((output / "config.json").read_text())
        assert config["vision_feature_select_strategy"] == "full"
        assert config["vision_feature_layer"] == -1
        model = VWLMMForConditionalGeneration.from_pretrained(output)
        processor = VWLMMProcessor.from_pretrained(output)
        inputs = processor(images=make_image(1), text="<image>", return_tensors="pt")
        model(**inputs)
        assert model.get_visual_words(inputs["pixel_values"]).token_ids.shape[1] == model.config.image_seq_length

    def test_scaled_rope_is_carried_over(self, source, output):
        edit_config(source, rope_scaling={"type": "linear", "factor": 2.0})
        convert_official_checkpoint(source, output)
        rope = VWLMMForConditionalGeneration.from_pretrained(output).config.text_config.rope_parameters
        assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 10000.0)

    def test_config_names_no_class_of_the_authors_code_and_no_folder_of_this_machine(self, vicuna):
        config = (Path(vicuna) / "config.json").read_text()
        assert "vwLlamaForCausalLM" not in config
        assert str(GOLDEN) not in config

    def test_generation_config(self, source, output):
        settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "max_length": 4096}
        (source / "generation_config.json").write_text(json.dumps(settings))
        convert_official_checkpoint(source, output)
        generation_config = VWLMMForConditionalGeneration.from_pretrained(output).generation_config
        assert {name: getattr(generation_config, name) for name in settings} == settings

    def test_checkpoint_without_generation_config(self, source, output):
        (source / "generation_config.json").unlink()
        convert_official_checkpoint(source, output)
        assert VWLMMForConditionalGeneration.from_pretrained(output).generation_config.eos_token_id == 2


class TestEmptyFolders:
    """What is empty is free, and stays what it is."""

    @pytest.fixture(params=["folder", "link", "link_to_nothing", "working_folder"])
    def empty(self, request, tmp_path, monkeypatch):
        folder = tmp_path / "volume" / "folder"
        folder.mkdir(parents=True)
        if request.param == "folder":
            return folder
        if request.param == "working_folder":
            monkeypatch.chdir(folder)
            return Path(".")
        if request.param == "link_to_nothing":
            folder.rmdir()
        link = tmp_path / "link"
        link.symlink_to(folder, target_is_directory=True)
        return link

    def test_is_filled(self, source, vicuna, empty, tmp_path):
        was_link, inode = empty.is_symlink(), empty.exists() and empty.stat().st_ino
        convert_official_checkpoint(source, empty)
        assert_same_weights(empty, vicuna)
        assert empty.is_symlink() == was_link
        assert inode in (False, empty.stat().st_ino)
        assert {path.name for path in empty.iterdir()} == {path.name for path in Path(vicuna).iterdir()}
        assert [path.name for path in (tmp_path / "volume").iterdir()] == ["folder"]

    def test_stays_empty_where_a_conversion_fails(self, source, empty):
        weights = read_weights(source)
        weights["unknown"] = torch.ones(1)
        write_weights(source, weights)
        with pytest.raises(ValueError, match="unknown"):
            convert_official_checkpoint(source, empty)
        assert not empty.exists() or not list(empty.iterdir())


class TestErrors:
    def test_output_exists(self, source, output):
        output.mkdir(parents=True)
        (output / "precious.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=re.escape(str(output))):
            convert_official_checkpoint(source, output)
        assert [path.name for path in output.iterdir()] == ["precious.txt"]

    def test_no_checkpoint_there(self, tmp_path, output):
        with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "nothing" / "config.json"))):
            convert_official_checkpoint(tmp_path / "nothing", output)
        assert_nothing_left(output)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("mm_projector_type", "linear"),
            ("mm_projector_type", ...),
            ("mm_vision_select_feature", "cls"),
            ("mm_use_im_start_end", True),
            ("mm_use_im_patch_token", True),
        ],
    )
    def test_another_format(self, source, output, field, value):
        edit_config(source, **{field: value})
        with pytest.raises(ValueError, match=rf"config\.json has {field}={None if value is ... else value!r}"):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    @pytest.mark.parametrize("name", ["mm_vision_tower", "mm_vision_select_layer", "architectures"])
    def test_incomplete_config(self, source, output, name):
        edit_config(source, **{name: ...})
        with pytest.raises(ValueError, match=rf"config\.json.* {name}"):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    def test_converted_checkpoint_is_not_of_the_authors_format(self, vicuna, output):
        with pytest.raises(ValueError, match="authors' code"):
            convert_official_checkpoint(vicuna, output)

    @pytest.mark.parametrize(
        ("missing", "named"),
        [
            ("vm_head.weight", "model.vm_head.weight"),
            ("lm_head.weight", "lm_head.weight"),
            ("model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
            ("model.mm_projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
        ],
    )
    def test_missing_tensor(self, source, output, missing, named):
        weights = read_weights(source)
        del weights[missing]
        write_weights(source, weights, safe=True)
        with pytest.raises(ValueError, match=rf"{re.escape(str(source))} lacks 1 tensors, {re.escape(named)}"):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    def test_part_of_the_vision_tower_missing(self, source, output):
        """A tower of which some tensors are there is a broken checkpoint, not one without a tower."""
        weights = read_weights(source)
        name = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
        del weights[name]
        write_weights(source, weights, safe=True)
        with pytest.raises(
            ValueError, match=r"lacks 1 tensors, model\.vision_tower\.encoder\.layers\.1\.mlp\.fc1\.weight"
        ):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    def test_unknown_tensor(self, source, output):
        write_weights(source, {**read_weights(source), "model.image_newline": torch.zeros(48)})
        with pytest.raises(ValueError, match=r"pytorch_model\.bin has the unknown tensor model\.image_newline"):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    def test_tensor_of_another_shape(self, source, output):
        weights = read_weights(source)
        weights["vm_head.weight"] = torch.zeros(500, 48)
        write_weights(source, weights)
        with pytest.raises(
            ValueError, match=r"has model\.vm_head\.weight of shape \(500, 48\).*announces \(480, 48\)"
        ):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    def test_missing_shard(self, source, output):
        write_weights(source, read_weights(source), shards=3)
        (source / "pytorch_model-00002-of-00003.bin").unlink()
        with pytest.raises(OSError, match="pytorch_model-00002-of-00003.bin"):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    def test_no_tokenizer(self, source, output):
        (source / "tokenizer.model").unlink()
        with pytest.raises((OSError, ValueError)):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    @pytest.mark.parametrize(
        ("content", "named"), [({"step": 7}, "step, a int"), (Path("x"), "holds more than tensors")]
    )
    def test_bin_with_more_than_tensors(self, source, output, content, named):
        write_weights(source, read_weights(source))
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(ValueError, match=rf"pytorch_model\.bin.* {named}"):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)

    @pytest.mark.parametrize("safe", [True, False])
    @pytest.mark.parametrize(
        "content", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-50], lambda b: b"version"]
    )
    def test_damaged_shard(self, source, output, safe, content):
        write_weights(source, read_weights(source), shards=3, safe=safe)
        (file,) = source.glob("*model-00002-of-00003.*")
        file.write_bytes(content(file.read_bytes()))
        with pytest.raises(ValueError, match=rf"{file.name} is damaged .*Download it again"):
            convert_official_checkpoint(source, output)
        assert_nothing_left(output)


MEASURED = """
import re, sys
from modeling_vwlmm import convert_official_checkpoint
convert_official_checkpoint(*sys.argv[1:])
# Not `ru_maxrss`, which a process inherits from the one that has started it.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
def test_memory_for_the_largest_shard_is_enough(source, output, safe):
    """2 GB in five shards."""
    vocab_size = 7_000_000  # rows of 48, in three matrices of the vocabulary
    edit_config(source, vocab_size=vocab_size, torch_dtype="float16")
    weights = {name: tensor.half() for name, tensor in read_weights(source).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "vm_head.weight"):
        weights[name] = torch.zeros(vocab_size, 48, dtype=torch.float16)
    write_weights(source, weights, shards=5, safe=safe)
    sizes = [file.stat().st_size for file in source.iterdir() if file.suffix in (".bin", ".safetensors")]
    assert sum(sizes) > 2e9
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(output)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout.splitlines()[-1]) < 1.3 * max(sizes) + 1e9
    shutil.rmtree(output)


def test_command_line(source, output, vicuna):
    result = subprocess.run(
        [sys.executable, "-m", "modeling_vwlmm.conversion", str(source), str(output)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert_same_weights(output, vicuna)


def test_converted_model_is_ready_to_use(vicuna):
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.no_grad():
        words = model.get_visual_words(torch.zeros(1, 3, 28, 28), top_k=480)
    assert_close(words.probabilities.sum(-1), torch.ones(1, 16))
