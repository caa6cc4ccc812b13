# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path

import pytest
from datasets import List, Value
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from processing_vwlmm import VWLMMProcessor, llava_dataset, load_llava_dataset


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(llava_dataset, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    noise = Image.effect_noise((64, 48), 100).convert("RGB")
    for name in ("a.png", "b.jpg", "sub/c.png"):
        noise.save(folder / name)
    (folder / "truncated.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-400])
    (folder / "truncated.png").write_bytes((folder / "a.png").read_bytes()[:-400])
    (folder / "text.jpg").write_text("not an image")
    return folder


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


GOOD = [
    {"id": "one", "image": "a.png", "conversations": turns("<image>\nWhat?", "Red.", "Sure?", "Yes.")},
    {"id": 2, "conversations": turns("Hello.", "Hi.")},
    {"id": "three", "image": ["sub/c.png", "b.jpg"], "conversations": turns("1: <image>\n2: <image>\nSame?", "No.")},
]


@pytest.fixture
def load(tmp_path, images):
    def load(records, **kwargs):
        file = tmp_path / "data.json"
        file.write_text(records if isinstance(records, str) else json.dumps(records))
        return load_llava_dataset(file, images, **kwargs)

    return load


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "text": None}


class TestRows:
    def test_columns(self, load, images):
        dataset = load(GOOD)
        assert dataset.column_names == ["id", "messages", "images"]
        assert dataset["id"][:] == ["one", "2", "three"]
        assert dataset[0]["messages"] == [
            {"role": "user", "content": [IMAGE, text("What?")]},
            {"role": "assistant", "content": [text("Red.")]},
            {"role": "user", "content": [text("Sure?")]},
            {"role": "assistant", "content": [text("Yes.")]},
        ]
        assert dataset[1]["images"] == []
        assert [image.size for image in dataset[2]["images"]] == [(64, 48)] * 2
        # Nothing but the paths is stored.
        stored = dataset.data.column("images").to_pylist()[2]
        assert stored == [{"bytes": None, "path": str(images / name)} for name in ("sub/c.png", "b.jpg")]

    @pytest.mark.parametrize(
        "value, content",
        [
            ("<image>\nWhat?", [IMAGE, text("What?")]),
            ("What?\n<image>", [IMAGE, text("What?")]),
            ("What is <image> here? ", [IMAGE, text("What is  here?")]),  # LLaVA leaves both blanks
            ("<image>", [IMAGE]),
        ],
    )
    def test_single_marker_moves_to_the_front(self, load, value, content):
        dataset = load([{"id": 1, "image": "a.png", "conversations": turns(value, "Red.")}])
        assert dataset[0]["messages"][0]["content"] == content

    @pytest.mark.parametrize(
        "value, content",
        [
            ("<image>\n<image>\nSame?", [IMAGE, IMAGE, text("Same?")]),
            ("First <image>\nsecond\n<image>\n", [text("First "), IMAGE, text("second\n"), IMAGE]),
            ("Same?\n<image>\n\n<image>", [text("Same?\n"), IMAGE, text("\n"), IMAGE]),
        ],
    )
    def test_several_markers_stay(self, load, value, content):
        dataset = load([{"id": 1, "image": ["a.png", "b.jpg"], "conversations": turns(value, "Red.")}])
        assert dataset[0]["messages"][0]["content"] == content

    @pytest.mark.parametrize("value, content", [("<image>", [IMAGE]), ("<image>\nWhat?", [IMAGE, text("What?")])])
    def test_image_without_an_answer(self, load, value, content):
        dataset = load([{"id": 1, "image": "a.png", "conversations": turns(value)}])
        assert dataset[0]["messages"] == [{"role": "user", "content": content}]
        with pytest.raises(ValueError, match="no human turn with a gpt turn"):
            load([{"id": 1, "conversations": turns("What?")}])
        with pytest.raises(ValueError, match="or of an image without text one human turn alone"):
            load([{"id": 1, "image": ["a.png", "b.jpg"], "conversations": turns("<image>") * 2}])

    def test_marker_in_an_answer_is_text(self, load):
        dataset = load([{"id": 1, "conversations": turns("How do I mark images?", "Write <image>.")}])
        assert dataset[0]["messages"][1]["content"] == [text("Write <image>.")]

    def test_system_and_leading_gpt_turn(self, load):
        system = {"from": "system", "value": "Be brief."}
        dataset = load(
            [
                {"id": 1, "conversations": [system, *turns("What?", "Red.")]},
                {"id": 2, "conversations": turns("dropped", "Welcome.", "What?", "Red.")[1:]},
            ]
        )
        roles = [[message["role"] for message in messages] for messages in dataset["messages"]]
        assert roles == [["system", "user", "assistant"], ["user", "assistant"]]

    def test_text_without_a_conversation_is_one_message_that_answers_nothing(self, load):
        dataset = load([GOOD[0], {"id": "document", "text": "Once <image> upon\na time. "}])
        assert dataset[1]["messages"] == [{"role": "assistant", "content": [text("Once <image> upon\na time. ")]}]
        assert dataset[1]["images"] == []

    def test_collates_into_the_authors_ids(self, load, tmp_path):
        processor = VWLMMProcessor.from_vision_text_pretrained(
            GOLDEN / "vicuna" / "clip-vision-tower", GOLDEN / "vicuna"
        )
        golden = [r for r in json.loads((GOLDEN / "llava_labels.json").read_text()) if r["template"] == "vicuna_v1"]
        records = []
        for index, record in enumerate(golden):
            has_image = "<image>" in record["conversations"][0]["value"]
            image = "a.png" if has_image else None
            records.append({"id": index, "image": image, "conversations": record["conversations"]})
        dataset = load(records)
        batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(list(dataset))
        for row, record in enumerate(golden):
            ids = [i for one in record["input_ids"] for i in ([480] * 16 if one == -200 else [one])]
            assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == ids
            answers = [label for label in record["labels"] if label != -100]
            assert batch["labels"][row][batch["labels"][row] != -100].tolist() == answers
        assert batch["pixel_values"].shape == (2, 3, 28, 28)


def labelled(*labels):
    """The good records, of one image, none and two, with `image_labels`; `None` leaves the field out."""
    return [
        record if value is None else {**record, "image_labels": value}
        for record, value in zip(GOOD, labels, strict=True)
    ]


class TestImageLabels:
    @pytest.mark.parametrize(
        "labels, stored, dtype",
        [
            ([[[5, -100, 0]], None, [[1], []]], [[[5, -100, 0]], None, [[1], []]], "int32"),
            ([[["red", "dark"]], [], None], [[["red", "dark"]], [], None], "string"),
            # One column has one type: a word anywhere in the file, and every id is written as a string.
            ([[["red", -100]], None, [["circle"], [7]]], [[["red", "-100"]], None, [["circle"], ["7"]]], "string"),
            ([[[5]], None, [["red"], [7]]], [[["5"]], None, [["red"], ["7"]]], "string"),
            ([[[]], None, None], [[[]], None, None], "int32"),
        ],
        ids=["ids", "words", "both in a sample", "both in a file", "empty"],
    )
    def test_column(self, load, labels, stored, dtype):
        for _ in ("made", "from the cache"):
            dataset = load(labelled(*labels))
            assert dataset["image_labels"][:] == stored
            assert dataset.features["image_labels"] == List(List(Value(dtype)))

    def test_type_is_that_of_the_file(self, load):
        # The sample with the word is left out; the type of the others' labels does not depend on that.
        records = labelled([[5]], None, None) + [{**changed(["image"], "missing.png"), "image_labels": [["red"]]}]
        with pytest.warns(UserWarning, match="left out 1 of 4"):
            assert load(records, on_bad_image="skip")[0]["image_labels"] == [["5"]]

    @pytest.mark.parametrize(
        "labels, error",
        [
            ([None, [[5]], None], r"record 1 \(id 2\): found 1 lists in 'image_labels' and 0 paths"),
            ([None, None, [[5]]], r"record 2 \(id 'three'\): found 1 lists in 'image_labels' and 2 paths"),
            ([[], None, None], r"record 0 \(id 'one'\): found 0 lists in 'image_labels' and 1 paths"),
            (["red", None, None], "record 0: 'image_labels' is 'red', expected a list with one list for each image"),
            ([[5], None, None], r"record 0: 'image_labels\[0\]' is 5, expected a list of token ids or words"),
            ([["red"], None, None], r"record 0: 'image_labels\[0\]' is 'red', expected a list of token ids or words"),
        ],
    )
    def test_number_of_lists(self, load, labels, error):
        with pytest.raises(ValueError, match=error):
            load(labelled(*labels))

    # A word of digits would arrive as an id, and be learned as another token.
    @pytest.mark.parametrize("label", [True, 1.0, -1, 2**31, "", "7", "-100", None, [5]])
    def test_label(self, load, label):
        with pytest.raises(ValueError, match=r"record 2: 'image_labels\[1\]\[1\]' is .*, expected a token id as an"):
            load(labelled(None, None, [[5, "red"], [5, label]]))


def changed(path, value):
    """The first good record with one field changed; `...` removes it."""
    record = copy.deepcopy(GOOD[0])
    target = record
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return record


class TestMalformed:
    @pytest.mark.parametrize(
        "record, error",
        [
            ("text", "record 1: found a value of type str, expected an object"),
            (changed(["id"], ...), "record 1: 'id' is missing, expected a string or an integer"),
            (changed(["id"], 1.5), "record 1: 'id' is 1.5"),
            (changed(["image"], 3), "record 1: 'image' is 3, expected a path"),
            (changed(["image"], ""), "record 1: 'image' is '', expected a path"),
            (changed(["conversations"], ...), "record 1: 'conversations' is missing, expected a list"),
            (changed(["conversations"], []), r"record 1: 'conversations' is \[\], expected a list"),
            (changed(["conversations", 2], "x"), r"record 1: 'conversations\[2\]' is 'x', expected an object"),
            (changed(["conversations", 1, "from"], "bot"), r"'conversations\[1\].from' is 'bot', expected 'human' or"),
            (
                changed(["conversations", 1, "from"], ["gpt"]),
                r"'conversations\[1\].from' is \['gpt'\], expected 'human'",
            ),
            (changed(["conversations", 3, "value"], ...), r"'conversations\[3\].value' is missing, expected a string"),
            (changed(["conversations", 0, "value"], 7), r"'conversations\[0\].value' is 7, expected a string"),
            (changed(["conversations", 2, "from"], "gpt"), r"'conversations\[2\].from' is 'gpt', expected 'human'"),
            (
                changed(["conversations", 2, "from"], "system"),
                r"'conversations\[2\].from' is 'system', expected 'human'",
            ),
            (changed(["conversations"], turns("a", "Welcome.")[1:]), "record 1: .* no human turn with a gpt turn"),
            (
                changed(["conversations"], [*turns("a", "b"), *turns("<image>", "")[:1]]),
                "record 1 .*found 0 '<image>' .* Its last turn, which no gpt turn answers, is left out",
            ),
            ({"id": 1, "text": ""}, "record 1: 'text' is '', expected a text that is not empty"),
            ({"id": 1, "text": " \n"}, "record 1: 'text' is ' .n', expected a text that is not empty"),
            ({"id": 1, "text": ["a"]}, r"record 1: 'text' is \['a'\], expected a text"),
            ({"id": 1, "text": "a \ud800"}, "record 1: 'text' is .* half of a surrogate pair"),
            ({"id": 1, "text": None}, "record 1: 'conversations' is missing, expected a list"),
            (
                {"id": 1, "text": "a", "conversations": turns("a", "b")},
                "record 1: .*'text' and 'conversations'.*one of",
            ),
            ({"id": 1, "text": "a", "image": "a.png"}, "record 1: .*'text' and 'image'.*'conversations'"),
        ],
    )
    def test_names_index_and_field(self, load, record, error):
        with pytest.raises(ValueError, match=error):
            load([GOOD[1], record])

    @pytest.mark.parametrize(
        "content, error",
        [
            ('[{"id": 1}', "data.json is not valid JSON"),
            ('{"id": 1}\n{"id": 2}', "data.json is not valid JSON"),
            ("{}", "data.json holds a value of type dict, expected a list"),
            ("[]", "data.json holds an empty list"),
        ],
    )
    def test_file(self, load, content, error):
        with pytest.raises(ValueError, match=error):
            load(content)

    @pytest.mark.parametrize(
        "record, markers, paths",
        [
            (changed(["image"], ...), 1, 0),
            (changed(["image"], ["a.png", "b.jpg"]), 1, 2),
            (changed(["conversations", 0, "value"], "What?"), 0, 1),
            (changed(["conversations", 2, "value"], "And <image>?"), 2, 1),
        ],
    )
    def test_number_of_images(self, load, record, markers, paths):
        with pytest.raises(ValueError, match=rf"id 'one'\): found {markers} '<image>' .* {paths} paths"):
            load([record])

    def test_nothing_is_left_in_the_cache(self, load, cache):
        with pytest.raises(ValueError):
            load([GOOD[0], changed(["image"], "missing.png")])
        assert not [path for path in cache.rglob("*") if path.suffix in (".arrow", ".unfinished")]


BAD_FILES = {
    "missing.png": "the file does not exist",
    "truncated.jpg": "truncated",
    "truncated.png": "",
    "text.jpg": "UnidentifiedImageError",
    "sub": "IsADirectoryError",
}


class TestBadImages:
    @pytest.mark.parametrize("name", BAD_FILES)
    def test_raise(self, load, images, name):
        with pytest.raises(ValueError, match=rf"{images / name} \(sample 'one'\) .*{BAD_FILES[name]}"):
            load([*GOOD[1:], changed(["image"], name)])

    def test_skip(self, load, images):
        records = GOOD + [{**changed(["image"], name), "id": name} for name in BAD_FILES]
        with pytest.warns(
            UserWarning, match=rf"left out 5 of 8 samples because of 5 bad images(.|\n)*{images}/missing"
        ):
            dataset = load(records, on_bad_image="skip")
        assert dataset["id"][:] == ["one", "2", "three"]
        with pytest.warns(UserWarning, match="left out 5 of 8 samples"):  # from the cache, and still said
            load(records, on_bad_image="skip")

    def test_raise_after_skip(self, load):
        records = [GOOD[1], changed(["image"], "missing.png")]
        with pytest.warns(UserWarning, match="left out 1 of 2"):
            load(records, on_bad_image="skip")
        with pytest.raises(ValueError, match="missing.png"):
            load(records)

    def test_skip_warns_of_nothing_without_reason(self, load):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert len(load(GOOD, on_bad_image="skip")) == 3

    def test_skip_everything(self, load):
        with pytest.raises(ValueError, match="No sample is left: all 1"):
            load([changed(["image"], "missing.png")], on_bad_image="skip")

    def test_question_that_nothing_answers_is_dropped(self, load):
        (row,) = load([changed(["conversations"], turns("<image>", "Red.", "Sure?"))])
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]

    def test_several_threads(self, load, images):
        for index in range(600):
            os.link(images / "a.png", images / f"{index}.png")
        records = [{**changed(["image"], f"{index}.png"), "id": index} for index in range(600)]
        assert len(load(records, num_threads=2)) == 600
        (images / "411.png").unlink()
        with pytest.raises(ValueError, match=r"411.png \(sample '411'\) .* does not exist"):
            load(records, num_threads=2)

    def test_unknown_choice(self, load):
        with pytest.raises(ValueError, match="`on_bad_image` is 'ignore', expected 'raise' or 'skip'"):
            load(GOOD, on_bad_image="ignore")


class TestImageFolder:
    @pytest.mark.parametrize(
        "name", ["../secret.png", "sub/../../secret.png", "{absolute}", "link.png", "linked/secret.png"]
    )
    @pytest.mark.parametrize("on_bad_image", ["raise", "skip"])
    def test_path_that_leaves(self, load, images, name, on_bad_image):
        secret = images.parent / "secret.png"
        (images / "a.png").rename(secret)
        (images / "link.png").symlink_to(secret)
        (images / "linked").symlink_to(images.parent)
        name = name.replace("{absolute}", str(secret))
        with pytest.raises(ValueError, match="(leaves|outside) the image folder"):
            load([GOOD[1], changed(["image"], name)], on_bad_image=on_bad_image)

    def test_sibling_with_the_same_beginning(self, load, images):
        os.rename(images / "sub", f"{images}-private")
        with pytest.raises(ValueError, match="leaves the image folder"):
            load([changed(["image"], "../images-private/c.png")])

    def test_paths_inside(self, load, images):
        (images / "link.png").symlink_to(images / "a.png")
        assert len(load([changed(["image"], "sub/../a.png"), changed(["image"], "link.png")])) == 2

    def test_folder_behind_a_link(self, tmp_path, images):
        (tmp_path / "link").symlink_to(images)
        (tmp_path / "data.json").write_text(json.dumps(GOOD))
        assert len(load_llava_dataset(tmp_path / "data.json", tmp_path / "link")) == 3


class TestCache:
    @pytest.fixture
    def made(self, monkeypatch):
        calls = []
        make = llava_dataset._make
        monkeypatch.setattr(llava_dataset, "_make", lambda *args: calls.append(args) or make(*args))
        return calls

    def test_made_once(self, load, made):
        first, second = load(GOOD), load(GOOD)
        assert len(made) == 1
        assert second.to_dict() == first.to_dict() and second._fingerprint == first._fingerprint

    def test_changed_json(self, load, made):
        load(GOOD)
        assert len(load(GOOD[:2])) == 2
        assert len(made) == 2

    def test_changed_image(self, load, images, made):
        load(GOOD)
        (images / "b.jpg").write_text("broken since")
        with pytest.raises(ValueError, match="b.jpg"):
            load(GOOD)
        assert len(made) == 2

    def test_repaired_image(self, load, images, made):
        with pytest.warns(UserWarning, match="left out 1 of 4"):
            load([*GOOD, changed(["image"], "new.png")], on_bad_image="skip")
        os.link(images / "a.png", images / "new.png")
        assert len(load([*GOOD, changed(["image"], "new.png")], on_bad_image="skip")) == 4

    def test_good_image_of_a_skipped_sample(self, load, made):
        records = [GOOD[0], {**GOOD[2], "image": ["sub/c.png", "missing.png"]}]
        for _ in range(2):
            with pytest.warns(UserWarning, match="left out 1 of 2 samples because of 1 bad images"):
                load(records, on_bad_image="skip")
        assert len(made) == 1

    def test_interrupted_writing(self, load, made, monkeypatch):
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(GOOD)
        monkeypatch.setattr(os, "replace", replace)
        assert len(load(GOOD)) == 3 and len(made) == 2

    def test_several_processes_at_once(self, tmp_path, images, monkeypatch):
        (tmp_path / "data.json").write_text(json.dumps(GOOD))
        make = llava_dataset._make

        def slow_make(*args):
            with open(tmp_path / "made", "a") as file:
                file.write("once ")
            time.sleep(0.3)
            make(*args)

        monkeypatch.setattr(llava_dataset, "_make", slow_make)
        with multiprocessing.get_context("fork").Pool(3) as pool:
            datasets = pool.starmap(load_llava_dataset, [(tmp_path / "data.json", images)] * 3, chunksize=1)
        assert [dataset["id"][:] for dataset in datasets] == [["one", "2", "three"]] * 3
        assert (tmp_path / "made").read_text() == "once "
