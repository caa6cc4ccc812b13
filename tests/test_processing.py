# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
import inspect
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipVisionConfig,
)
from transformers.utils import is_torchvision_available
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from processing_vwlmm import VWLMMProcessor


GOLDEN = Path(__file__).parent / "golden"
TOWER = GOLDEN / "vicuna" / "clip-vision-tower"
LLAVA_LABELS = json.loads((GOLDEN / "llava_labels.json").read_text())
PATCHES = 16  # of one image of the golden tower
IMAGE_ID = 480  # one past the golden vocabulary
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def make_processor(folder, text=GOLDEN / "vicuna", vision=TOWER, **kwargs):
    """A processor that has been saved and loaded again: what a checkpoint's users get."""
    VWLMMProcessor.from_vision_text_pretrained(vision, text, **kwargs).save_pretrained(folder)
    return VWLMMProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    return {
        name: make_processor(tmp_path_factory.mktemp(name), chat_template=name)
        for name in ("vicuna_v1", "mistral", "plain")
    }


@pytest.fixture
def processor(processors):
    return processors["vicuna_v1"]


@pytest.fixture(scope="module")
def byte_level_llm(tmp_path_factory):
    """A tokenizer like Qwen's: byte-level BPE without BOS, `<|im_end|>` as EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["a red circle " * 9], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    folder = tmp_path_factory.mktemp("qwen")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def image(width=40, height=20, color="red"):
    return Image.new("RGB", (width, height), color)


def user(*parts):
    """A user message; a string is a text part and anything else an image."""
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts
        ],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def golden_messages(record):
    messages = []
    for turn in record["conversations"]:
        text = turn["value"].replace("<image>", "").strip()
        if turn["from"] == "gpt":
            messages.append(assistant(text))
        else:
            messages.append(user(*([image()] if "<image>" in turn["value"] else []), text))
    return messages


def expand(ids, labels=None):
    """The authors' -200 for one image, written as the placeholders that this project has in its place."""
    if labels is None:
        return [i for one in ids for i in ([IMAGE_ID] * PATCHES if one == -200 else [one])]
    return [i for one, label in zip(ids, labels, strict=True) for i in ([-100] * PATCHES if one == -200 else [label])]


class TestAuthorsValues:
    @pytest.mark.parametrize("record", LLAVA_LABELS, ids=lambda record: record["name"])
    def test_ids_and_labels(self, processors, record):
        collator = DataCollatorForVisionLanguageModeling(processors[record["template"]], assistant_only_loss=True)
        messages = golden_messages(record)
        images = [part.pop("image") for m in messages for part in m["content"] if part["type"] == "image"]
        batch = collator([{"messages": messages, "images": images}])
        assert batch["input_ids"][0].tolist() == expand(record["input_ids"])
        assert batch["labels"][0].tolist() == expand(record["input_ids"], record["labels"])

    @pytest.mark.parametrize("record", LLAVA_LABELS, ids=lambda record: record["name"])
    def test_ids_before_saving(self, record):
        template = record["template"]
        processor = VWLMMProcessor.from_vision_text_pretrained(TOWER, GOLDEN / "vicuna", chat_template=template)
        ids = processor.apply_chat_template(golden_messages(record), tokenize=True)[0]
        assert ids == expand(record["input_ids"])

    @pytest.mark.parametrize("checkpoint", ["vicuna", "pif"])
    def test_batch_of_prompts(self, tmp_path, checkpoint):
        processor = make_processor(tmp_path, GOLDEN / checkpoint, GOLDEN / checkpoint / "clip-vision-tower")
        expected = load_file(GOLDEN / checkpoint / "expected.safetensors")
        facts = json.loads((GOLDEN / checkpoint / "expected.json").read_text())
        images = [[Image.open(GOLDEN / checkpoint / name) for name in s["images"]] for s in facts["samples"]]
        batch = processor(
            text=facts["prompts"], images=images, padding=True, padding_side="right", return_tensors="pt"
        )
        for ids, mask, golden_ids, golden_mask in zip(
            batch["input_ids"], batch["attention_mask"], expected["input_ids"], expected["attention_mask"], strict=True
        ):
            assert ids[mask.bool()].tolist() == expand(golden_ids[golden_mask.bool()].tolist())
        assert torch.equal(batch["attention_mask"].bool(), expected["expanded_attention_mask"].bool())
        assert torch.equal(batch["input_ids"] == IMAGE_ID, expected["image_positions"].bool())
        # torchvision resizes with another bicubic filter than the authors' PIL, by a grey level or two.
        tolerance = 3e-2 if is_torchvision_available() else 1e-6
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=tolerance, rtol=0)

    def test_generation_prompts(self, processor):
        facts = json.loads((GOLDEN / "vicuna" / "expected.json").read_text())
        for index, greedy in facts["greedy"].items():
            question = facts["samples"][int(index)]["turns"][0][0].removeprefix("<image>\n")
            prompt = processor.apply_chat_template([user(image(), question)], add_generation_prompt=True)
            assert prompt == f"<s>{greedy['prompt']}"

    def test_later_turn_with_legacy_false(self, tmp_path):
        # Vicuna's published tokenizers set the flag. The reference cuts the prompt at `<image>` as the authors' code
        # does, and tokenizes each piece as the slow tokenizer of Transformers 4 does.
        folder = tmp_path / "llm"
        shutil.copytree(GOLDEN / "vicuna", folder, ignore=shutil.ignore_patterns("*.safetensors", "clip*"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": False}))
        processor = make_processor(tmp_path / "processor", folder)
        sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"), add_bos=False)
        sp_prefix = len(sp.encode("<unk>"))

        def encode(piece):
            ids = []
            for number, segment in enumerate(piece.split("</s>")):
                ids += [2] if number else []
                segment = segment if number else f" {segment}"
                ids += sp.encode(f"<unk>{segment}")[sp_prefix:] if segment else []
            return ids

        pieces = [f"{SYSTEM} USER: ", "\nWhat is it? ASSISTANT: Red.</s>USER: How many? ASSISTANT: Two.</s>"]
        expected = [1] + encode(pieces[0]) + [IMAGE_ID] * PATCHES + encode(pieces[1])
        messages = [user(image(), "What is it?"), assistant("Red."), user("How many?"), assistant("Two.")]
        assert processor.apply_chat_template(messages, tokenize=True)[0] == expected
        turn = processor.apply_chat_template(messages, tokenize=True)[0].index(2) + 1
        assert processor.tokenizer.convert_ids_to_tokens(expected)[turn] == "U"


class TestTemplates:
    def test_vicuna_v1(self, processor):
        messages = [user(image(), "What?"), assistant("Red."), user("Sure?"), assistant("Yes.")]
        assert processor.apply_chat_template(messages) == (
            f"<s>{SYSTEM} USER: <image>\nWhat? ASSISTANT: Red.</s>USER: Sure? ASSISTANT: Yes.</s>"
        )
        assert processor.apply_chat_template([{"role": "system", "content": "Be brief."}, user("What?")]) == (
            "<s>Be brief. USER: What?"
        )

    def test_mistral(self, processors):
        messages = [user(image(), "What?"), assistant("Red."), user("Sure?"), assistant("Yes.")]
        expected = "[INST] <image>\nWhat? [/INST]Red.</s>[INST] Sure? [/INST]Yes.</s>"
        assert processors["mistral"].apply_chat_template(messages) == f"<s>{expected}"
        messages = [{"role": "system", "content": "Be brief."}, user(image(), "What?")]
        assert processors["mistral"].apply_chat_template(messages, add_generation_prompt=True) == (
            "<s>[INST] Be brief.\n\n<image>\nWhat? [/INST]"
        )

    def test_plain_drops_the_question(self, processors):
        messages = [user("Describe.", image()), assistant("a red circle")]
        assert processors["plain"].apply_chat_template(messages) == "<s><image>a red circle\n"

    def test_images_keep_their_place(self, processor):
        messages = [user("First", image(), "second", image(), image()), assistant("Ok."), user(image(), "Third?")]
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
            f"<s>{SYSTEM} USER: First<image>\nsecond<image>\n<image> ASSISTANT: Ok.</s>"
            "USER: <image>\nThird? ASSISTANT:"
        )

    def test_content_as_string(self, processor):
        as_strings = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
        as_parts = [user("What?"), assistant("Red.")]
        assert processor.apply_chat_template(as_strings) == processor.apply_chat_template(as_parts)

    @pytest.mark.parametrize("name", ["vicuna_v1", "mistral"])
    def test_trl_finds_spans_and_a_trained_stop_token(self, processors, name):
        assert has_generation_markers(processors[name].chat_template)
        assert is_chat_template_stop_token_trained(processors[name])

    def test_spans_behind_several_images(self, processors):
        for name, answers in (("vicuna_v1", "Red.</s> Two.</s>"), ("mistral", "Red.</s>Two.</s>")):
            messages = [user(image(), image(), "What?"), assistant("Red."), user(image(), "And?"), assistant("Two.")]
            out = processors[name].apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
            )
            answer_ids = out["input_ids"][out["assistant_masks"].bool()]
            assert processors[name].decode(answer_ids) == answers

    @pytest.mark.parametrize(
        "name, messages, error",
        [
            ("vicuna_v1", [{"role": "tool", "content": "x"}], r"messages\[0\] has role 'tool', expected 'user'"),
            ("mistral", [user("a"), user("b")], r"messages\[1\] has role 'user', expected 'assistant'"),
            ("vicuna_v1", [{"role": "system", "content": "s"}, assistant("a")], r"messages\[1\] has role 'assistant'"),
            ("vicuna_v1", [user("a"), {**user(image()), "role": "assistant"}], "Images belong in user messages"),
            ("vicuna_v1", [{**user(image()), "role": "system"}, user("a")], "Images belong in user messages"),
            (
                "mistral",
                [{"role": "user", "content": [{"type": "video"}]}],
                "type 'video', expected 'text' or 'image'",
            ),
            ("vicuna_v1", [user("a"), {"role": "assistant", "content": None}], "has no content"),
            ("plain", [user("a"), assistant("b")], "needs an image"),
            ("plain", [user(image()), assistant("b"), user("c")], "found 3 messages"),
        ],
    )
    def test_errors(self, processors, name, messages, error):
        with pytest.raises((TemplateError, ValueError), match=error):
            processors[name].apply_chat_template(messages)

    def test_unknown_template(self):
        with pytest.raises(ValueError, match="'vicuna', expected one of.*vicuna_v1"):
            VWLMMProcessor.from_vision_text_pretrained(TOWER, GOLDEN / "vicuna", chat_template="vicuna")


class TestLiteralPlaceholder:
    MESSAGES = [user(image(), "Is <image> a tag?"), assistant("<image> is one."), user("<image>"), assistant("Yes.")]

    @pytest.mark.parametrize("name", ["vicuna_v1", "mistral"])
    def test_is_text(self, processors, name):
        processor = processors[name]
        out = processor.apply_chat_template(self.MESSAGES, tokenize=True, return_dict=True)
        ids = out["input_ids"][0]
        assert ids.count(IMAGE_ID) == PATCHES
        text = processor.decode([i for i in ids if i != IMAGE_ID])
        assert "Is <image> a tag?" in text and "<image> is one.</s>" in text
        assert out["pixel_values"][0].shape == (3, 28, 28)

    def test_has_the_ids_of_its_characters(self, processor):
        # The same text tokenized by an LLM's tokenizer that has never heard of the placeholder.
        vanilla = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "vicuna" / "tokenizer.model"))
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "an <image> tag"}]
        ids = processor.apply_chat_template(messages, tokenize=True)[0]
        assert ids == [1] + vanilla.encode("s USER: an <image> tag")

    def test_rendered_prompt_passed_on(self, processor):
        prompt = processor.apply_chat_template(self.MESSAGES)
        tokenized = processor.apply_chat_template(self.MESSAGES, tokenize=True)
        assert processor(text=prompt, images=[image()])["input_ids"] == tokenized

    def test_in_training(self, processor):
        collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
        messages = [
            {"role": "user", "content": "What is <image>?"},
            {"role": "assistant", "content": "<image>: a tag."},
        ]
        batch = collator([{"messages": messages, "images": [image()]}, {"messages": messages, "images": []}])
        assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [PATCHES, 0]
        for labels in batch["labels"]:
            assert processor.decode(labels[labels != -100]) == "<image>: a tag.</s>"

    def test_byte_level_tokenizer(self, tmp_path, byte_level_llm):
        processor = make_processor(tmp_path, byte_level_llm)
        out = processor.apply_chat_template(
            self.MESSAGES, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = out["input_ids"][0], out["assistant_masks"][0]
        assert ids.count(processor.image_token_id) == PATCHES
        expected = (
            f"{SYSTEM} USER: \nIs <image> a tag? ASSISTANT: <image> is one.<|im_end|>"
            "USER: <image> ASSISTANT: Yes.<|im_end|>"
        )
        assert processor.decode([i for i in ids if i != processor.image_token_id]) == expected
        answers = processor.decode([i for i, is_answer in zip(ids, mask, strict=True) if is_answer])
        assert answers == " <image> is one.<|im_end|> Yes.<|im_end|>"

    @pytest.mark.skipif(
        "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters,
        reason="this Transformers does not tell typed control tokens from the template's",
    )
    def test_sanitized_in_a_template_that_does_not_mark_it(self, tmp_path):
        # As in the templates that LLaVA's checkpoints come with: no image token is missing, so nothing is to report.
        processor = make_processor(tmp_path)
        processor.chat_template = (
            "{{- bos_token -}}{%- for message in messages -%}{%- for part in message['content'] -%}"
            "{{- '<image>' if part['type'] == 'image' else part['text'] -}}"
            "{%- endfor -%}{%- endfor -%}"
        )
        out = processor.apply_chat_template(
            [user(image(), "Is <image> a tag?")], tokenize=True, return_dict=True, sanitize_control_tokens=True
        )
        ids = out["input_ids"][0]
        assert ids.count(IMAGE_ID) == PATCHES
        assert processor.decode([i for i in ids if i != IMAGE_ID]).endswith("Is <image> a tag?")

    def test_raw_prompt_has_placeholders(self, processor):
        assert processor(text="<image>", images=image())["input_ids"][0].count(IMAGE_ID) == PATCHES


class TestCall:
    def test_text_only(self, processor):
        for images in (None, [], [[], []]):
            out = processor(text=["a dog", "a red circle"], images=images, padding=True, return_tensors="pt")
            assert set(out) == {"input_ids", "attention_mask"}
        assert out["attention_mask"][0].tolist() == [0] * 1 + [1] * (out["input_ids"].shape[1] - 1)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_zero_one_and_three_images(self, processor, side):
        conversations = [
            [user("What?")],
            [user("Hello."), assistant("Hi."), user(image(color="blue"), "What?")],
            [user(image(), image(), "What?"), assistant("Red."), user(image(color="blue"))],
        ]
        out = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": side},
        )
        assert (out["input_ids"] == IMAGE_ID).sum(1).tolist() == [0, PATCHES, 3 * PATCHES]
        assert out["pixel_values"].shape == (4, 3, 28, 28)
        assert torch.equal(out["pixel_values"][0], out["pixel_values"][3])
        assert not torch.equal(out["pixel_values"][0], out["pixel_values"][1])
        for row, conversation in enumerate(conversations):
            alone = processor.apply_chat_template(conversation, tokenize=True)[0]
            assert out["input_ids"][row][out["attention_mask"][row].bool()].tolist() == alone

    def test_one_bos(self, processor):
        assert processor(text="<s>a dog", text_kwargs={"add_special_tokens": True})["input_ids"][0][:2] == [1, 1]
        for ids in (
            processor(text="a dog")["input_ids"][0],
            processor(text=["<s>a dog"])["input_ids"][0],
            processor.apply_chat_template([user("a dog")], tokenize=True)[0],
        ):
            assert ids.index(1) == 0 and ids.count(1) == 1

    @pytest.mark.parametrize(
        "text, images, error",
        [
            ("<image> a <image>", image(), "The prompts: found 2 `<image>` and 1 images"),
            ("<image>", None, "found 1 `<image>` and 0 images"),
            ("a", [image()], "found 0 `<image>` and 1 images"),
            (["<image> <image>", "a"], [[image()], [image()]], "Sample 0: found 2 `<image>` and 1 images"),
            (["<image>", "a"], [[image()], [image()]], "Sample 1: found 0 `<image>` and 1 images"),
            (["<image>", "a"], [[image()]], "Found 2 texts and images for 1 samples"),
        ],
    )
    def test_number_of_images(self, processor, text, images, error):
        with pytest.raises(ValueError, match=error):
            processor(text=text, images=images)

    @pytest.mark.parametrize("side, left", [("right", 9), ("left", 8)])
    def test_max_length_that_cuts_image_tokens(self, tmp_path, side, left):
        processor = make_processor(tmp_path)
        processor.tokenizer.truncation_side = side
        arguments = {"text": ["a dog", "<image>d"], "images": [[], [image()]], "truncation": True}
        ids = processor(**arguments, max_length=18)["input_ids"][1]
        assert ids.count(IMAGE_ID) == PATCHES
        with pytest.raises(ValueError, match=rf"Sample 1: `max_length`=10 cuts image tokens, {left} of 16 are left"):
            processor(**arguments, max_length=10)
        assert len(processor(text="a red circle", truncation=True, max_length=3)["input_ids"][0]) == 3

    def test_max_length_in_training(self, processor):
        collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True, max_length=90)
        with pytest.raises(ValueError, match="`max_length`=90 cuts image tokens, 3 of 16"):
            collator(
                [{"messages": [user("What?"), assistant("Red.")], "images": []}] * 0
                + [{"messages": [{"role": "user", "content": "What?"}, assistant("Red.")], "images": [image()]}]
            )


class TestTokenizers:
    def test_placeholder_is_one_past_the_vocabulary(self, processor):
        assert (
            processor.image_token_id
            == IMAGE_ID
            == sentencepiece.SentencePieceProcessor(
                model_file=str(GOLDEN / "vicuna" / "tokenizer.model")
            ).get_piece_size()
        )
        tokenizer = processor.tokenizer
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
        assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 2048
        assert processor.decode([1, 396, IMAGE_ID, 2], skip_special_tokens=True).strip() == "A"

    def test_known_placeholder_keeps_its_id(self, tmp_path, byte_level_llm):
        # A normalized token is searched for behind the normalizer, where a literal `<image>` looks like one.
        tokenizer = AutoTokenizer.from_pretrained(byte_level_llm)
        tokenizer.add_tokens(["<image>", "<other>"], special_tokens=False)
        known = tokenizer.convert_tokens_to_ids("<image>")
        processor = make_processor(tmp_path, tokenizer)
        assert processor.image_token_id == known and len(processor.tokenizer) == len(tokenizer)
        ids = processor.apply_chat_template([user("an <image> tag", image())], tokenize=True)[0]
        assert ids.count(known) == PATCHES

    def test_without_bos(self, tmp_path, byte_level_llm):
        processor = make_processor(tmp_path, byte_level_llm)
        vanilla = AutoTokenizer.from_pretrained(byte_level_llm)
        assert processor.tokenizer.bos_token is None and processor.tokenizer.pad_token == "<|endoftext|>"
        assert processor.image_token_id == len(vanilla)
        text = f"{SYSTEM} USER: What? ASSISTANT: Red.<|im_end|>"
        assert processor.apply_chat_template([user("What?"), assistant("Red.")]) == text
        assert processor.apply_chat_template([user("What?"), assistant("Red.")], tokenize=True)[0] == vanilla.encode(
            text
        )

    def test_bos_that_the_tokenizer_does_not_add(self, byte_level_llm):
        # As GPT-2's: BOS exists, but the LLM has never seen it at the start of a text.
        tokenizer = AutoTokenizer.from_pretrained(byte_level_llm, bos_token="<|im_end|>")
        processor = VWLMMProcessor.from_vision_text_pretrained(TOWER, tokenizer)
        assert processor.tokenizer.bos_token == "<|im_end|>"
        assert processor.apply_chat_template([user("What?")]) == f"{SYSTEM} USER: What?"

    def test_loaded_llama_tokenizer(self, tmp_path):
        processor = make_processor(tmp_path, LlamaTokenizer.from_pretrained(GOLDEN / "vicuna"))
        for record in LLAVA_LABELS[:3]:
            ids = processor.apply_chat_template(golden_messages(record), tokenize=True)[0]
            assert ids == expand(record["input_ids"])

    def test_tokenizer_json_is_taken_as_it_is(self, tmp_path):
        # Loaded as `LlamaTokenizer`, this one would get a `▁` in front, which its file does not ask for.
        tokenizer = LlamaTokenizer.from_pretrained(GOLDEN / "vicuna")
        tokenizer.save_pretrained(tmp_path / "llm")
        saved = json.loads((tmp_path / "llm" / "tokenizer.json").read_text())
        saved["pre_tokenizer"]["prepend_scheme"] = "never"
        (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(saved))
        assert not (tmp_path / "llm" / "tokenizer.model").exists()
        processor = make_processor(tmp_path / "processor", tmp_path / "llm")
        assert processor.tokenizer.tokenize("hat") == ["hat"]
        assert processor.tokenizer.bos_token == "<s>" and processor(text="hat")["input_ids"][0][0] == 1

    def test_loaded_tokenizer_is_not_changed(self, byte_level_llm):
        tokenizer = AutoTokenizer.from_pretrained(byte_level_llm)
        before = tokenizer.backend_tokenizer.to_str()
        VWLMMProcessor.from_vision_text_pretrained(TOWER, tokenizer)
        assert tokenizer.backend_tokenizer.to_str() == before

    def test_no_eos(self, byte_level_llm):
        tokenizer = AutoTokenizer.from_pretrained(byte_level_llm)
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no `eos_token`"):
            VWLMMProcessor.from_vision_text_pretrained(TOWER, tokenizer)


class TestVision:
    def siglip(self, folder, image_size=28):
        SiglipVisionConfig(image_size=28, patch_size=7, hidden_size=32, num_attention_heads=4).save_pretrained(folder)
        settings = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": image_size, "width": image_size},
        }
        settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "do_resize": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        return folder

    def test_clip(self, processor):
        assert (processor.patch_size, processor.num_additional_image_tokens) == (7, 1)
        assert processor.vision_feature_select_strategy == "default"

    def test_siglip(self, tmp_path):
        processor = make_processor(tmp_path / "processor", vision=self.siglip(tmp_path))
        assert (processor.num_additional_image_tokens, processor.vision_feature_select_strategy) == (0, "full")
        assert processor.image_processor.resample == 2
        out = processor(text="<image>", images=image(40, 20, (255, 0, 0)), return_tensors="pt")
        assert (out["input_ids"] == IMAGE_ID).sum() == PATCHES
        pixels = out["pixel_values"][0]  # [3, 28, 28]
        assert pixels.shape == (3, 28, 28)
        torch.testing.assert_close(pixels[:, 14, 14], torch.tensor([1.0, -1.0, -1.0]))
        # int(0.5 * 255) = 127, then (127 / 255 - 0.5) / 0.5
        torch.testing.assert_close(pixels[:, 0, 0], torch.full((3,), -1 / 255), atol=1e-6, rtol=0)
        assert processor._get_num_multimodal_tokens(image_sizes=[(40, 20)]).num_image_tokens == [PATCHES]

    def test_loaded_tower(self):
        tower = CLIPVisionModel.from_pretrained(TOWER)
        processor = VWLMMProcessor.from_vision_text_pretrained(tower, GOLDEN / "vicuna")
        assert processor.patch_size == 7
        made_from_scratch = CLIPVisionModel(CLIPVisionConfig.from_pretrained(TOWER))
        made_from_scratch.name_or_path = ""
        with pytest.raises(ValueError, match="no `name_or_path`"):
            VWLMMProcessor.from_vision_text_pretrained(made_from_scratch, GOLDEN / "vicuna")

    def test_sizes_that_disagree(self, tmp_path):
        with pytest.raises(ValueError, match="'height': 14.*expects.*'height': 28"):
            VWLMMProcessor.from_vision_text_pretrained(self.siglip(tmp_path, image_size=14), GOLDEN / "vicuna")


class TestSaving:
    def test_folder_is_complete(self, tmp_path, processor):
        processor.save_pretrained(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert {"processing_vwlmm.py", "chat_templates_vwlmm.py", "chat_template.jinja", "tokenizer.json"} <= names
        config = json.loads((tmp_path / "processor_config.json").read_text())
        assert config["auto_map"] == {"AutoProcessor": "processing_vwlmm.VWLMMProcessor"}

    def test_second_round_changes_nothing(self, tmp_path, processor):
        for name in ("first", "second"):
            processor.save_pretrained(tmp_path / name)
            processor = VWLMMProcessor.from_pretrained(tmp_path / name)
        for path in (tmp_path / "first").iterdir():
            assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name

    def test_truncation_is_not_saved(self, tmp_path, processor):
        # What a training run leaves behind in its tokenizer must not shorten the prompts of the checkpoint's users.
        long = "a red circle and a dog"
        expected = processor(text=long)["input_ids"]
        processor(text=[long, "a"], truncation=True, max_length=3, padding=True)
        processor.save_pretrained(tmp_path)
        assert VWLMMProcessor.from_pretrained(tmp_path)(text=long)["input_ids"] == expected

    def test_tokenizer_beside_a_model_config(self, tmp_path, processor):
        # In a checkpoint's folder `AutoTokenizer` also sees the model's config.
        processor.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "llava", "text_config": {"model_type": "llama"}})
        )
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        record = LLAVA_LABELS[0]
        prompt = processor.apply_chat_template(golden_messages(record)).replace("<image>", "<image>" * PATCHES)
        assert tokenizer.encode(prompt, add_special_tokens=False) == expand(record["input_ids"])
