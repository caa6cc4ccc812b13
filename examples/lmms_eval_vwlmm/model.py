# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""VW-LMM as a model of lmms-eval, with the prompts of LLaVA-1.5."""

from functools import partial
from itertools import takewhile

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from tqdm import tqdm

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


def textvqa_prompt(doc: dict) -> str:
    """The question, with the words that an OCR system has read in the image."""
    ocr_tokens = ", ".join(doc["ocr_tokens"])
    return (
        f"{doc['question'].capitalize()}\nReference OCR token: {ocr_tokens}\n"
        "Answer the question using a single word or phrase."
    )


def mmbench_prompt(doc: dict, instruction: str) -> str:
    """The question with its hint and its options, as far as the record has them, and what to answer with."""

    def is_given(name: str) -> bool:
        return str(doc.get(name)).lower() not in ("", "nan", "none")

    hint = [doc["hint"]] if is_given("hint") else []
    options = [f"{letter}. {doc[letter]}" for letter in takewhile(is_given, "ABCD")]
    return "\n".join([*hint, doc["question"], *options, instruction])


mmbench_en_prompt = partial(
    mmbench_prompt, instruction="Answer with the option's letter from the given choices directly."
)
mmbench_cn_prompt = partial(mmbench_prompt, instruction="请直接回答选项字母。")

# For the tasks whose own prompt is not the one that LLaVA-1.5 was evaluated with. lmms-eval takes models and tasks
# from other packages, but no other prompt for a task of its own.
LLAVA_PROMPTS = {
    **dict.fromkeys(("textvqa_val", "textvqa_val_lite", "textvqa_test"), textvqa_prompt),
    **dict.fromkeys(
        ("mmbench_en_dev", "mmbench_en_dev_lite", "mmbench_en_dev_static", "mmbench_en_test"), mmbench_en_prompt
    ),
    **dict.fromkeys(("mmbench_cn_dev", "mmbench_cn_dev_lite", "mmbench_cn_test", "mmbench_cn_cc"), mmbench_cn_prompt),
    "mmvet": lambda doc: doc["question"],
}


class VWLMM(lmms):
    """
    Answers the questions of lmms-eval's generation tasks, in batches padded on the left. Arguments are given as
    `--model_args name=value,name=value`.

    Args:
        pretrained (`str` or [`VWLMMForConditionalGeneration`]):
            Folder or Hub name of a checkpoint, or a model, which comes with its `processor`.
        batch_size (`int` or `str`, *optional*, defaults to 1): Questions a batch.
        device (`str`, *optional*): By default the GPU of this process, or the CPU where there is none.
        device_map (`str`, *optional*): `auto` to spread one model over all GPUs, in a single process.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights, by default as they were saved.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.
        processor ([`VWLMMProcessor`], *optional*): By default the one saved with the checkpoint.
    """

    is_simple = False  # it takes messages

    def __init__(
        self,
        pretrained: str | VWLMMForConditionalGeneration,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        processor: VWLMMProcessor | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1 or device is None:
            device = self.accelerator.device
        if isinstance(pretrained, str):
            self.model = VWLMMForConditionalGeneration.from_pretrained(
                pretrained, dtype=dtype, device_map=device_map or device, attn_implementation=attn_implementation
            )
        else:
            self.model = pretrained
        self.processor = VWLMMProcessor.from_pretrained(pretrained) if processor is None else processor
        self.device = self.model.device
        self.batch_size = int(batch_size)
        # lmms-eval reads them by its properties `rank` and `world_size`, which cannot be set.
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def ask(self, request: Instance) -> list[dict]:
        """The messages of a request. The text of the last one becomes the prompt that lmms-eval logs."""
        _, doc_to_messages, *rest, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        messages = doc_to_messages(doc)
        question = messages[-1]["content"][-1]
        if task in LLAVA_PROMPTS:
            question["text"] = LLAVA_PROMPTS[task](doc)
        request.arguments = (question["text"], doc_to_messages, *rest, doc_id, task, split)
        return messages

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answers the requests, batch by batch.

        A task's `generation_kwargs` go to `generate`. Decoding is greedy without `do_sample`, whatever `temperature`
        says: MM-Vet's task sets it, and turns `do_sample` off.

        Args:
            requests (`list[Instance]`): Requests of type `generate_until`.

        Returns:
            `list[str]`, the answers in the order of the requests.
        """
        # All requests of a batch have the same generation arguments. The longest prompts come first: they show at once
        # if memory is short.
        queue = Collator(requests, lambda r: -len(r.args[0]), group_fn=lambda r: r.args[2], grouping=True)
        answers = []
        with tqdm(total=len(requests), desc="Answering", unit="question", disable=self.rank != 0) as progress:
            for batch in queue.get_batched(n=self.batch_size):
                inputs = self.processor.apply_chat_template(
                    [self.ask(request) for request in batch],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs={"padding": True, "padding_side": "left"},
                ).to(self.device, self.model.dtype)
                arguments = {"max_new_tokens": 1024, "do_sample": False, **batch[0].args[2]}
                until = arguments.pop("until", None) or []
                arguments.pop("image_aspect_ratio", None)  # LLaVA's, while our processor reads images in one way
                output = self.model.generate(**inputs, **arguments)  # [B, L + new]
                texts = self.processor.batch_decode(
                    output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                for text in texts:
                    for stop in [until] if isinstance(until, str) else until:
                        # lmms-eval's own where a task names none. It would cut answers of several paragraphs.
                        if stop != "\n\n":
                            text = text.split(stop)[0]
                    answers.append(text.strip())
                progress.update(len(batch))
        return queue.get_original(answers)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: raises `NotImplementedError`."""
        raise NotImplementedError("This adapter has no multi-round generation. Use tasks of type `generate_until`.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: raises `NotImplementedError`."""
        raise NotImplementedError("This adapter scores no continuations. Use tasks of type `generate_until`.")
