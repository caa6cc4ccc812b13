# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What is typed in a conversation is text, what cannot be used is refused, and every prompt has one BOS."""

import copy
import json
import shutil

import pytest
import sentencepiece
import torch
from conftest import GOLDEN, make_image
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from processing_vwlmm import VWLMMProcessor


TOWER = GOLDEN / "vicuna" / "clip-vision-tower"
CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{{- eos_token -}}"
    "{%- endgeneration -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"
)


def byte_level(**special) -> PreTrainedTokenizerFast:
    """A tokenizer like Qwen's and Llama 3's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["a red circle </s> " * 9], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_qwen(folder):
    return byte_level(
        eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>x"]
    )


def make_mistral(folder):
    """Its `[INST]` and `[/INST]` are control tokens, as since version 3 of the tokenizer."""
    tokenizer = LlamaTokenizer.from_pretrained(GOLDEN / "vicuna")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    return tokenizer


def make_llama(folder, legacy=True):
    shutil.copytree(GOLDEN / "vicuna", folder, ignore=shutil.ignore_patterns("*.safetensors", "clip*"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": legacy}))
    return folder


def make_normalizing(folder):
    """Added tokens are looked for behind a normalizer, and its pre-tokenizer puts a `▁` in front of a text alone."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [chr(i) for i in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=200, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>"])
    backend.train_from_iterator(["a red circle"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "llama": make_llama,
    "llama, not legacy": lambda folder: make_llama(folder, legacy=False),
    "mistral": make_mistral,
    "qwen": make_qwen,
    "normalizing": make_normalizing,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def processor(request, tmp_path_factory) -> VWLMMProcessor:
    folder = tmp_path_factory.mktemp("processor")
    text = TOKENIZERS[request.param](folder / "llm")
    template = "mistral" if request.param == "mistral" else "vicuna_v1"
    VWLMMProcessor.from_vision_text_pretrained(TOWER, text, template).save_pretrained(folder / "saved")
    return VWLMMProcessor.from_pretrained(folder / "saved")


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def special_ids(processor) -> dict[int, str]:
    return {i: token.content for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special}


def conversations(typed: str) -> list[list[dict]]:
    return [
        [user(f"a{typed}b"), assistant("a red circle")],
        [user("a"), assistant(f"a {typed} circle{typed}"), user(f"{typed}"), assistant(typed)],
        [{"role": "system", "content": f"{typed} a"}, {"role": "user", "content": typed}, assistant("a")],
        [user(typed[:2], typed[2:]), assistant("a")],  # the template puts the halves together
    ]


class TestControlTokensInText:
    @pytest.mark.parametrize("template", [None, CHATML], ids=["own", "jinja"])
    def test_are_text(self, processor, template):
        """Not one more control token than without what is typed, and every character of it."""
        specials = special_ids(processor)
        for typed in specials.values():
            for messages, plain in zip(conversations(typed), conversations("QQ"), strict=True):
                if template and isinstance(messages[-2]["content"], str):
                    continue  # it reads parts alone
                ids, expected = (
                    processor.apply_chat_template(one, chat_template=template, tokenize=True)[0]
                    for one in (messages, plain)
                )
                assert [i for i in ids if i in specials] == [i for i in expected if i in specials]
                found, expected = (processor.decode(one).replace(" ", "") for one in (ids, expected))
                assert found == expected.replace("QQ", typed)

    def test_an_answer_teaches_eos_once(self, processor):
        eos = processor.tokenizer.eos_token
        collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
        messages = [user("What?"), assistant(f"a{eos}b"), user(eos), assistant(f"red{eos}")]
        batch = collator([{"messages": messages, "images": []}, {"messages": messages[:2], "images": []}])
        assert (batch["labels"] == processor.tokenizer.eos_token_id).sum(dim=1).tolist() == [2, 1]
        learned = processor.decode(batch["labels"][1][batch["labels"][1] != -100]).replace(" ", "")
        assert learned == f"a{eos}b{eos}"

    def test_assistant_mask(self, processor):
        for typed in special_ids(processor).values():
            messages = [user(f"a{typed}b", {"type": "image", "image": make_image(0)}), assistant(f"a {typed} circle")]
            out = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
            )
            answer = processor.decode(out["input_ids"][out["assistant_masks"].bool()]).replace(" ", "")
            assert answer == f"a{typed}circle{processor.tokenizer.eos_token}"

    def test_rendered_without_the_processor(self, processor):
        """As vLLM does it."""
        for typed in special_ids(processor).values():
            messages = [user(f"a{typed}b"), assistant(f"a {typed} circle")]
            (rendered,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=processor.chat_template,
                **processor.tokenizer.special_tokens_map,
            )
            expected = processor.apply_chat_template(messages, tokenize=True)[0]
            assert processor.tokenizer(rendered, add_special_tokens=False).input_ids == expected

    def test_prompt_and_completion(self, processor):
        eos = processor.tokenizer.eos_token
        prompt, completion = [user(f"a{eos}b")], [assistant(f"a{eos}b")]
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        batch = collator([{"prompt": prompt, "completion": completion, "images": []}])
        assert (batch["labels"] == processor.tokenizer.eos_token_id).sum() == 1

    def test_messages_are_not_changed(self, processor):
        messages = [user("<image></s>", {"type": "image", "image": make_image(0)}), assistant("<s>")]
        before = copy.deepcopy(messages)
        processor.apply_chat_template(messages, tokenize=True)
        assert messages == before

    def test_added_words_stay_words(self, tmp_path):
        tokenizer = make_qwen(tmp_path)
        tokenizer.add_tokens(["<table>"])
        processor = VWLMMProcessor.from_vision_text_pretrained(TOWER, tokenizer)
        ids = processor.apply_chat_template([user("a <table>")], tokenize=True)[0]
        assert tokenizer.convert_tokens_to_ids("<table>") in ids

    def test_folder_without_the_second_mark(self, tmp_path):
        """Saved before there was one: its tokenizer does not remove it."""
        processor = VWLMMProcessor.from_vision_text_pretrained(TOWER, make_llama(tmp_path / "llm", legacy=False))
        processor.save_pretrained(tmp_path / "old")
        saved = json.loads((tmp_path / "old" / "tokenizer.json").read_text())
        saved["pre_tokenizer"] = None
        (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(saved))
        old = VWLMMProcessor.from_pretrained(tmp_path / "old")
        messages = [user("a</s>b"), assistant("b</s>")]
        expected = processor.apply_chat_template(messages, tokenize=True)
        assert old.apply_chat_template(messages, tokenize=True) == expected

    def test_ids_of_its_characters(self, tmp_path):
        """The same text tokenized by the LLM's tokenizer before it had control tokens."""
        vanilla = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "vicuna" / "tokenizer.model"))
        processor = VWLMMProcessor.from_vision_text_pretrained(TOWER, GOLDEN / "vicuna")
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "an </s> tag <s>"}]
        ids = processor.apply_chat_template(messages, tokenize=True)[0]
        # SentencePiece knows `</s>` and `<s>` as control symbols, which no text becomes.
        assert ids == [1] + vanilla.encode("s USER: an </s> tag <s>")


class TestOrdinaryText:
    TEXTS = [
        "a red circle",
        "  two  spaces ",
        "a\nb\n\nc",
        "ünïcödé 漢字 🙂",
        "<b>a</b> x < s > y",
        "[INST",
        "\x00\x07",
    ]

    def test_same_ids_as_the_llm_alone(self, tmp_path):
        for name, make in TOKENIZERS.items():
            text = make(tmp_path / name)
            processor = VWLMMProcessor.from_vision_text_pretrained(TOWER, text)
            if isinstance(text, PreTrainedTokenizerFast) and not isinstance(text, LlamaTokenizer):
                for one in self.TEXTS:
                    assert processor.tokenizer(one).input_ids == text(one).input_ids, (name, one)


@pytest.fixture(scope="module", params=["llama", "llama, not legacy", "normalizing"])
def with_bos(request, tmp_path_factory) -> VWLMMProcessor:
    text = TOKENIZERS[request.param](tmp_path_factory.mktemp("llm") / "llm")
    return VWLMMProcessor.from_vision_text_pretrained(TOWER, text)


class TestOneBos:
    TEXTS = ["<s>a red circle", "a red", "<s>a", "a dog"]

    @pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 0, 3, 2]])
    def test_as_alone(self, with_bos, order):
        texts = [self.TEXTS[i] for i in order]
        batch = with_bos(text=texts)["input_ids"]
        assert batch == [with_bos(text=text)["input_ids"][0] for text in texts]
        assert [ids.count(1) for ids in batch] == [1] * 4 and [ids[0] for ids in batch] == [1] * 4

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_truncated_with_images(self, with_bos, side):
        texts = [f"{text} <image>" if i else text for i, text in enumerate(self.TEXTS)]
        options = {"truncation": True, "max_length": 24, "padding_side": side, "return_offsets_mapping": True}
        images = [[]] + [[make_image(i)] for i in range(3)]
        out = with_bos(text=texts, images=images, padding=True, pad_to_multiple_of=8, return_tensors="pt", **options)
        flat = with_bos(
            text=texts, images=[make_image(i) for i in range(3)], text_kwargs={"padding": "max_length", **options}
        )
        assert out["pixel_values"].shape == (3, 3, 28, 28) and len(flat["input_ids"][0]) == 24
        assert out["input_ids"].shape[1] % 8 == 0 and out["offset_mapping"].shape == (*out["input_ids"].shape, 2)
        for row, text in enumerate(texts):
            alone = with_bos(text=text, images=images[row] or None, **options)
            kept = out["attention_mask"][row].bool()
            assert out["input_ids"][row][kept].tolist() == alone["input_ids"][0]
            assert out["offset_mapping"][row][kept].tolist() == [list(span) for span in alone["offset_mapping"][0]]
            assert kept.tolist() == sorted(kept.tolist(), reverse=side == "right")

    def test_numbers_of_images(self, with_bos):
        with pytest.raises(ValueError, match="found 1 `<image>` and 0 images"):
            with_bos(text=["<s>a", "<image>"])

    def test_explicit_choice(self, with_bos):
        ids = with_bos(text=["<s>a", "a"], add_special_tokens=False)["input_ids"]
        assert [one.count(1) for one in ids] == [1, 0]


@pytest.fixture(scope="module")
def vicuna_processor() -> VWLMMProcessor:
    return VWLMMProcessor.from_vision_text_pretrained(TOWER, GOLDEN / "vicuna")


IMAGE = {"type": "image", "image": make_image(0)}


class TestRefused:
    @pytest.mark.parametrize("template", [None, CHATML], ids=["own", "jinja"])
    @pytest.mark.parametrize(
        "messages, error",
        [
            ([user({"type": "text", "text": None})], r"messages\[0\]\['content'\]\[0\]\['text'\] is missing or None"),
            ([user("a", {"type": "text"})], r"messages\[0\]\['content'\]\[1\]\['text'\] is missing or None"),
            ([user("a", {"type": "text", "text": 7})], r"\[1\]\['text'\] is 7, expected a string"),
            ([user("a"), {"role": "assistant", "content": None}], r"messages\[1\], .*'assistant', has no content"),
            ([user("a"), {"role": "assistant"}], r"messages\[1\].* has no content"),
            ([user("a"), {"role": "assistant", "content": []}], r"messages\[1\].* has no content"),
            ([{"role": "user", "content": 7}], r"messages\[0\].* has no content: found 7"),
            ([{"content": "a"}], r"messages\[0\]\['role'\] is missing"),
            (["a"], r"messages\[0\] is 'a', expected a dictionary"),
            ([user({"type": "video", "video": "a.mp4"})], r"\[0\] has type 'video', expected 'text' or 'image'"),
            ([user({"type": "audio", "audio": "a.wav"})], r"\[0\] has type 'audio'"),
            ([user({"type": None})], r"\[0\] has type missing or None"),
            ([user(7)], r"messages\[0\]\['content'\]\[0\] is 7"),
            ([user({"type": "text", "text": "a", "image": make_image(0)})], r"is a text and has 'image'"),
            ([user({**IMAGE, "text": "a"})], r"is an image and has 'text'"),
            ([user({**IMAGE, "url": "a.png"})], r"has 'image' and 'url'"),
            ([user("a\ud800b")], r"\['text'\] has half of a surrogate pair at character 1"),
            ([{"role": "user", "content": "\udfff"}], r"\['content'\] has half of a surrogate pair"),
            ([{**user("a"), "tool_calls": [{"a": 1}]}], r"messages\[0\] has 'tool_calls'"),
            ([], "expected a list of messages"),
            (None, "`messages` is missing or None"),
            ("What?", "`messages` is 'What\\?'"),
        ],
    )
    def test_message(self, vicuna_processor, messages, error, template):
        with pytest.raises(ValueError, match=error):
            vicuna_processor.apply_chat_template(messages, chat_template=template)
        with pytest.raises(ValueError, match=f"conversation 1, .*{error}"):
            vicuna_processor.apply_chat_template([[user("a")], messages], chat_template=template)

    def test_part_of_no_text_where_the_template_alone_sees_it(self, vicuna_processor):
        with pytest.raises(TemplateError, match="type 'text' without text"):
            render_jinja_template(
                conversations=[[user({"type": "text", "text": None})]], chat_template=vicuna_processor.chat_template
            )

    @pytest.mark.parametrize(
        "name, value",
        [
            ("tools", [{"name": "search"}]),
            ("documents", [{"title": "a", "text": "b"}]),
            ("load_audio_from_video", True),
            ("enable_thinking", True),
            ("return_assistant_tokens_mask", True),
            ("fps", 2),
        ],
    )
    def test_argument_of_the_template(self, vicuna_processor, name, value):
        with pytest.raises(ValueError, match=f"`{name}`"):
            vicuna_processor.apply_chat_template([user("a")], **{name: value})

    def test_argument_that_the_template_reads(self, vicuna_processor):
        template = "{{ tools[0].name }} {{ documents[0].text }} {{ style }}"
        given = {"tools": [{"name": "a</s>"}], "documents": [{"text": "b"}], "style": "c", "chat_template": template}
        ids = vicuna_processor.apply_chat_template([user("a")], tokenize=True, **given)[0]
        assert vicuna_processor.decode(ids) == "<s> a</s> b c" and 2 not in ids

    @pytest.mark.parametrize(
        "arguments",
        [
            {"videos": [[0]]},
            {"audio": [0.0]},
            {"speed": 2},
            {"text_kwargs": {"speed": 2}},
            {"images_kwargs": {"speed": 2}},
            {"videos_kwargs": {"fps": 2}},
            {"audio_kwargs": {"sampling_rate": 2}},
            {"fps": 2},
        ],
    )
    def test_argument_of_the_processor(self, vicuna_processor, arguments):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}.* is set"):
            vicuna_processor(text="a", **arguments)

    @pytest.mark.parametrize("text, error", [(["a", None], r"text\[1\] is a NoneType"), ("a\ud83d", "surrogate pair")])
    def test_text(self, vicuna_processor, text, error):
        with pytest.raises(ValueError, match=error):
            vicuna_processor(text=text)

    def test_what_is_taken(self, vicuna_processor):
        options = {"padding": True, "return_mm_token_type_ids": True, "text_kwargs": {"truncation": False}}
        out = vicuna_processor(text="a <image>", images=[make_image(0)], do_resize=True, device=None, **options)
        assert torch.tensor(out["mm_token_type_ids"]).sum() == 16
        vicuna_processor(text="a", videos=[], audio=None, images_kwargs={"do_resize": True})
