# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""lmms-eval: the command itself on the small world, and the prompts of the nine benchmarks of the paper's table 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import make_image
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image


EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = "runs/small_world/stage2"
SINGLE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


WRITE_DATA = """
from small_world import write_llava_dataset
write_llava_dataset("runs/small_world/data", num_captions=800, num_conversations=320, num_held_out=90)
"""

ANSWER_AS_THE_DEMO_DOES = f"""
import json
from evaluate import answer_questions, measure_answers
from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor
from small_world import read_held_out

model = VWLMMForConditionalGeneration.from_pretrained({CHECKPOINT!r})
processor = VWLMMProcessor.from_pretrained({CHECKPOINT!r})
records = read_held_out("runs/small_world/data")
answers = answer_questions(model, processor, records)
with open("expected.json", "w") as file:
    json.dump([answers, measure_answers(answers, records)["all"]], file)
"""


def run(folder: Path, *command: str, **environment: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), **environment}
    finished = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder in which a short demo has run: its stage II answers some questions rightly."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "examples").symlink_to(EXAMPLES)
    # `evaluate` is also the name of a library that lmms-eval imports: the examples are on no other process's path.
    run(folder, "-c", WRITE_DATA, PYTHONPATH="examples")
    for stage in (1, 2):
        run(folder, "examples/train.py", "--config", f"examples/recipes/small_world/stage{stage}.yaml")
    return folder


@pytest.fixture(scope="module")
def expected(demo) -> tuple[list[str], float]:
    """Answers and accuracy as the demo measures them."""
    run(demo, "-c", ANSWER_AS_THE_DEMO_DOES, PYTHONPATH="examples")
    return tuple(json.loads((demo / "expected.json").read_text()))


def evaluate(folder: Path, output: str, *arguments: str, launcher: tuple[str, ...] = ()) -> tuple[list[str], float]:
    """Answers and accuracy as lmms-eval logs them."""
    run(
        folder,
        *launcher,
        *("-m", "lmms_eval", "--model", "vwlmm", "--model_args", f"pretrained={CHECKPOINT}", "--tasks", "small_world"),
        *("--include_path", "examples/lmms_eval_vwlmm/small_world", "--output_path", output, "--log_samples"),
        *("--verbosity", "DEBUG", *arguments),
    )
    (results,) = (folder / output).rglob("*_results.json")
    (samples,) = (folder / output).rglob("*_samples_small_world.jsonl")
    samples = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    accuracy = json.loads(results.read_text())["results"]["small_world"]["exact_match,none"]
    return [sample["filtered_resps"] for sample in samples], accuracy


class TestSmallWorld:
    """The command on a local task: what it measures is what the demo measures."""

    def test_some_questions_are_answered_rightly(self, expected):
        _, accuracy = expected
        assert 0.05 < accuracy < 0.95  # otherwise the comparisons below prove little

    def test_accuracy_and_answers_are_those_of_the_demo(self, demo, expected):
        assert evaluate(demo, "batches", "--batch_size", "32") == expected

    def test_two_processes_share_the_questions(self, demo, expected):
        launcher = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu")
        assert evaluate(demo, "processes", "--batch_size", "45", launcher=launcher) == expected


QUESTION = {"question_id": 0, "question": "is it a Dog?", "answer": "yes", "answers": ["yes"] * 10}
SCIENCE = {"question": "Which is it?", "choices": ["a dog", "a cat"], "answer": 0, "hint": ""}
CHOICE = {
    **{
        "index": 0,
        "question": "Which?",
        "hint": "It barks.",
        "answer": "A",
        "A": "dog",
        "B": "cat",
        "C": "cow",
        "D": "ox",
    },
    **{"category": "animal", "L2-category": "nature", "source": "", "comment": "", "split": "dev"},
}
NO_HINT = {**CHOICE, "hint": "nan", "C": "nan", "D": "nan"}

# For each of the nine names: documents as the data set holds them, and what LLaVA-1.5 asks for each. See its
# docs/Evaluation.md, llava/eval/model_vqa_mmbench.py and scripts/v1_5/eval.
BENCHMARKS = {
    "vqav2": ([QUESTION], ["is it a Dog?" + SINGLE_WORD]),
    "gqa": ([{**QUESTION, "imageId": "n1"}], ["is it a Dog?" + SINGLE_WORD]),
    "vizwiz_vqa": (
        [QUESTION],
        ["Is it a dog?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SINGLE_WORD],
    ),
    "scienceqa_img": (
        [SCIENCE, {**SCIENCE, "hint": "It barks."}],
        ["Which is it?\nA. a dog\nB. a cat" + LETTER, "Context: It barks.\nWhich is it?\nA. a dog\nB. a cat" + LETTER],
    ),
    "textvqa": (
        [{**QUESTION, "ocr_tokens": ["BEWARE", "DOG"]}],
        ["Is it a dog?\nReference OCR token: BEWARE, DOG" + SINGLE_WORD],
    ),
    "pope": ([QUESTION], ["is it a Dog?" + SINGLE_WORD]),
    "mmbench_en": (
        [CHOICE, NO_HINT],
        ["It barks.\nWhich?\nA. dog\nB. cat\nC. cow\nD. ox" + LETTER, "Which?\nA. dog\nB. cat" + LETTER],
    ),
    "mmbench_cn": (
        [CHOICE, NO_HINT],
        [
            "It barks.\nWhich?\nA. dog\nB. cat\nC. cow\nD. ox\n请直接回答选项字母。",
            "Which?\nA. dog\nB. cat\n请直接回答选项字母。",
        ],
    ),
    "mmvet": ([{**QUESTION, "capability": "rec"}], ["is it a Dog?"]),
}


@pytest.fixture(scope="module")
def adapter(vicuna):
    return get_model("vwlmm")(pretrained=vicuna, batch_size=3, device="cpu")


@pytest.fixture(scope="module")
def task_manager() -> TaskManager:
    return TaskManager(model_name="vwlmm")


@pytest.mark.parametrize("name", BENCHMARKS)
class TestBenchmarks:
    """The nine names: lmms-eval's own tasks, documents of our own in place of the download."""

    @pytest.fixture
    def requests(self, name, adapter, task_manager, monkeypatch) -> list[Instance]:
        image = Image.new("RGB", (8, 6), "red")
        docs = datasets.Dataset.from_list([{**doc, "image": image} for doc in BENCHMARKS[name][0]])

        def load_dataset(path, name=None, split=None, **kwargs):
            if name == "testdev_balanced_images":  # GQA keeps questions and images apart
                return datasets.Dataset.from_list([{"id": "n1", "image": image}])
            return datasets.DatasetDict(dict.fromkeys(("val", "validation", "dev", "testdev", "test"), docs))

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        monkeypatch.setenv(
            "OPENAI_API_KEY", "unused"
        )  # the judge of MM-Vet's answers asks for one when it is imported
        tasks = task_manager.load_task_or_group(name, "chat")
        if name not in tasks:  # a group: its tasks by name
            (tasks,) = tasks.values()
        requests = []
        for task_name, task in tasks.items():
            adapter.task_dict[task_name] = task.dataset
            task.build_all_requests(rank=0, world_size=1)
            requests += task.instances
        return requests

    def test_prompts_are_those_of_llava(self, name, adapter, requests):
        expected = BENCHMARKS[name][1]
        assert len(requests) % len(expected) == 0 and requests
        for request, prompt in zip(requests, expected * (len(requests) // len(expected)), strict=True):
            (message,) = adapter.ask(request)
            image, text = message["content"]
            assert image["type"] == "image" and isinstance(image["url"], Image.Image)
            assert text == {"type": "text", "text": prompt}
            assert request.args[0] == prompt  # what `--log_samples` writes

    def test_questions_are_answered(self, name, adapter, requests):
        for request in requests:
            request.args[2]["max_new_tokens"] = 3
        answers = adapter.generate_until(requests)
        assert len(answers) == len(requests) and all(isinstance(answer, str) for answer in answers)


class TestAnswers:
    """What lmms-eval asks of an adapter."""

    DOCS = [
        {"images": 1, "text": "What is left?"},
        {"images": 0, "text": "Hello?"},
        {"images": 2, "text": "Describe the image of a red circle left of a blue square."},
        {"images": 1, "text": "Where?"},
        {"images": 0, "text": "How many people are walking with a dog behind them?"},
    ]

    @pytest.fixture
    def answer(self, adapter):
        """Answers to `DOCS` with some generation arguments."""

        def doc_to_messages(doc):
            images = [{"type": "image", "url": make_image(i)} for i in range(doc["images"])]
            return [{"role": "user", "content": [*images, {"type": "text", "text": doc["text"]}]}]

        def answer(docs=self.DOCS, batch_size=3, **arguments):
            adapter.task_dict["questions"] = {"test": docs}
            requests = [
                Instance(
                    "generate_until",
                    (doc["text"], doc_to_messages, {"max_new_tokens": 8, **arguments}, index, "questions", "test"),
                    idx=0,
                    metadata={"task": "questions", "doc_id": index, "repeats": 1},
                )
                for index, doc in enumerate(docs)
            ]
            adapter.batch_size = batch_size
            return adapter.generate_until(requests)

        return answer

    def test_batches_answer_as_single_questions_do(self, answer):
        arguments = {
            "no_repeat_ngram_size": 1,
            "max_new_tokens": 24,
        }  # makes a model that has learned nothing say different things
        answers = answer(**arguments)
        assert len(set(answers)) == len(self.DOCS)  # so that a wrong order shows
        assert answers == [answer([doc], **arguments)[0] for doc in self.DOCS]

    def test_generation_arguments_arrive(self, answer):
        greedy = answer()
        assert all(len(short) < len(long) for short, long in zip(answer(max_new_tokens=1), greedy, strict=True))
        assert answer(num_beams=4) != greedy
        assert answer(do_sample=True, temperature=9.0) != greedy

    def test_greedy_unless_told_to_sample(self, adapter, answer, monkeypatch):
        monkeypatch.setattr(adapter.model.generation_config, "do_sample", True)  # as some LLMs come
        assert answer(do_sample=False, temperature=9.0, top_p=1.0) == answer(temperature=9.0) == answer()

    @pytest.mark.parametrize("as_list", [True, False])
    def test_until_cuts_the_answer(self, answer, as_list):
        whole = answer()
        stop = whole[0][len(whole[0]) // 2]
        cut = answer(until=[stop] if as_list else stop)
        assert cut == [text.split(stop)[0].strip() for text in whole] != whole

    def test_paragraphs_are_not_cut(self, adapter, answer, monkeypatch):
        monkeypatch.setattr(
            adapter.processor, "batch_decode", lambda ids, **_: ["One.\n\nTwo. ASSISTANT: Three"] * len(ids)
        )
        assert set(answer(until=["\n\n", "ASSISTANT:"])) == {"One.\n\nTwo."}

    def test_what_it_does_not_do_is_an_error(self, adapter):
        with pytest.raises(NotImplementedError, match="generate_until"):
            adapter.loglikelihood([])
        with pytest.raises(NotImplementedError, match="generate_until"):
            adapter.generate_until_multi_round([])
