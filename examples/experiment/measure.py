"""What is measured: answers of an arm, visual words of a stage III, and intervals over replicates."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from data import read_questions
from evaluate import answer_questions, ask, measure_answers

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from processing_vwlmm import VWLMMProcessor, load_llava_dataset


BATCH_SIZE = 100
DIGITS = 6  # of what goes into results
SETS = ("main", "new_combinations", "more_objects", "noise")
NUM_IMAGES = 300  # whose visual words are measured
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure_arm(checkpoint: Path, questions: Path) -> dict[str, dict[str, float]]:
    """
    Answers to all questions, as shares that are right, and what is left of the divergence from the visual words.

    Args:
        checkpoint (`Path`): Folder of the model.
        questions (`Path`): Folder of the questions.

    Returns:
        `dict`, by set. That of each kind and of `"all"`; for `main` also `present_found` and `absent_denied` of the
        questions `exists`, and `nll`, nats a token of the right answers. Under `kl` that of [`measure_words`].
    """
    model = VWLMMForConditionalGeneration.from_pretrained(checkpoint).eval().to(DEVICE)
    processor = VWLMMProcessor.from_pretrained(checkpoint)
    sets = {name: records for name in SETS if (records := read_questions(questions, name))}
    everything = [record for records in sets.values() for record in records]
    answers = iter(answer_questions(model, processor, everything))
    measured = {}
    for name, records in sets.items():
        given = [next(answers) for _ in records]
        kinds = sorted({record["kind"] for record in records})
        measured[name] = measure_answers(given, records, kinds)
        if name == "main":
            measured[name] |= measure_existence(given, records)
            measured[name]["nll"] = measure_nll(model, processor, checkpoint, questions)
    return {**round_all(measured), "kl": measure_words(checkpoint, questions)["kl"]}


def measure_existence(answers: Sequence[str], records: Sequence[dict]) -> dict[str, float]:
    """Of the questions `exists`: the share of what is there that gets a yes, and of what is not that gets a no."""
    asked, right = Counter(), Counter()
    for answer, record in zip(answers, records, strict=True):
        if record["kind"] == "exists":
            true = record["answer"].split(",")[0]
            asked[true] += 1
            right[true] += answer.split(",")[0] == true
    return {"present_found": right["yes"] / max(asked["yes"], 1), "absent_denied": right["no"] / max(asked["no"], 1)}


def measure_nll(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, folder: Path, questions: Path
) -> float:
    """Nats a token of the right answers to `main`, each token behind the right ones before it."""
    args = VWLMMTrainingArguments(
        str(folder),
        stage=2,
        visual_objective={},
        per_device_train_batch_size=1,
        global_batch_size=1,
        per_device_eval_batch_size=BATCH_SIZE,
        dataloader_pin_memory=False,
        report_to="none",
    )
    dataset = load_llava_dataset(str(questions / "main.json"), str(questions / "images"))
    trainer = VWLMMTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, processing_class=processor
    )
    return trainer.evaluate()["eval_loss"]


@torch.inference_mode()
def measure_words(checkpoint: Path, questions: Path) -> dict[str, dict[str, float]]:
    """
    Visual words `P'` behind the prompts of `main`, and what the decoder predicts, `Q`.

    Returns:
        `dict`, in nats: `entropy` of the words, `kl` from them to `Q`, and `kl_place` from them to their mean over all
        images at the same place, which is what a decoder is left with that knows nothing but the place. Each a mean
        over patches that show an `object`, its `border`, the `background`, and over `all`.
    """
    model = VWLMMForConditionalGeneration.from_pretrained(checkpoint).eval().to(DEVICE)
    processor = VWLMMProcessor.from_pretrained(checkpoint)
    records = read_questions(questions, "main")[:NUM_IMAGES]
    words, predicted = [], []
    for start in range(0, len(records), BATCH_SIZE):
        inputs = processor.apply_chat_template(
            [[ask(record)] for record in records[start : start + BATCH_SIZE]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        ).to(DEVICE)
        features = torch.stack(model.get_image_features(inputs["pixel_values"]).image_features)  # [I, N, D]
        logits = model(**inputs, use_cache=False).logits  # [I, L, C]
        is_image = inputs["input_ids"][:, 1:] == model.config.image_token_id  # [I, L - 1]
        words.append(model.model.vm_head(features).double().log_softmax(dim=-1))  # [I, N, C]
        predicted.append(logits[:, :-1][is_image].double().log_softmax(dim=-1).view_as(words[-1]))  # [I, N, C]
    words, predicted = torch.cat(words).cpu(), torch.cat(predicted).cpu()
    place = words.exp().mean(dim=0).log()  # [N, C]
    measures = {
        "entropy": -(words.exp() * words).sum(dim=-1),
        "kl": (words.exp() * (words - predicted)).sum(dim=-1),
        "kl_place": (words.exp() * (words - place)).sum(dim=-1),
    }  # [I, N] each
    number = torch.tensor([[len(true) for true in record["patch_words"]] for record in records])  # of true words
    kinds = {"object": number > 1, "border": number == 0, "background": number == 1, "all": number >= 0}
    return round_all(
        {name: {kind: values[of].mean().item() for kind, of in kinds.items()} for name, values in measures.items()}
    )


def round_all(values: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """As many digits as a repeated run has in common with the first, whatever the machine prints."""
    return {name: {key: round(value, DIGITS) for key, value in row.items()} for name, row in values.items()}
