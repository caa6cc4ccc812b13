"""
LaVIT on the small world: a visual tokenizer learns which patches to keep and what code each is, then a model learns to
read and to write them beside text, and answers questions about images it has never seen.

    make demo-lavit

It trains with the recipes of `examples/recipes/small_world_lavit`, beside the ablation without codes, and
ends with tables and two pictures in `runs/small_world_lavit`.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import train
from demo import answer_table, log_to, markdown_table
from evaluate import answer_questions, measure_answers
from few_shot import answer_with_examples, read_examples
from PIL import Image
from small_world import COLOURS, PATCHES_PER_SIDE, SHAPES, read_held_out, write_llava_dataset
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMVisualTokenizer
from modeling_vwlmm.visualization import CodedImage, draw_codes, draw_kept
from processing_vwlmm import VWLMMProcessor


RECIPES = Path("examples/recipes/small_world_lavit")
RUNS = Path("runs/small_world_lavit")
SHIPPED_LANGUAGE_MODEL, LANGUAGE_MODEL = "examples/small_world/llm", RUNS / "llm"
# Captions and conversations, each of which is seen once.
SIZES = {"quick": (3600, 2800), "full": (8000, 5000)}
# Both arms of the comparison: name, folder, and what it has in place of the recipes'.
ARMS = {
    "text and codes": ("stage2", []),
    "text alone": ("no_codes", ["--visual_objective", "{}", "--text_first_share", "0"]),
}
SHOTS = (0, 2, 4)
NUM_FEW_SHOT_QUESTIONS = 120


def main() -> None:
    """Writes the data, trains both stages, and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42, help="of weights and order; the data are the same for all")
    parser.add_argument("--size", choices=SIZES, default="quick", help="how much stage 2 sees; the page has both")
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of checkpoints, tables and pictures")
    args = parser.parse_args()
    start = time.monotonic()
    print("\n=== Writing the small world")
    write_llava_dataset(RUNS / "data", *SIZES[args.size])
    make_language_model()
    records = read_held_out(RUNS / "data")
    print("\n=== Stage 1: the visual tokenizer")
    seed = ["--seed", str(args.seed)]
    train.main(["--config", str(RECIPES / "stage1.yaml"), *seed, "--output_dir", str(args.output / "tokenizer")])
    tokenizer = VWLMMVisualTokenizer.from_pretrained(args.output / "tokenizer")
    processor = VWLMMProcessor.from_pretrained(args.output / "tokenizer")
    tables = measure_tokenizer(tokenizer, processor, records, args.output)
    print("\n" + tables)

    print(f"\n=== Stage 2 with {' and with '.join(ARMS)}, at once; they log to {args.output}/*.log")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=train_arm, args=(args.output, folder, [*options, *seed]))
        for folder, options in ARMS.values()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"Training failed; see {args.output}/*.log")
    accuracies = {}
    for name, (folder, _) in ARMS.items():
        model = VWLMMForConditionalGeneration.from_pretrained(args.output / folder)
        accuracies[name] = measure_answers(answer_questions(model, processor, records), records)

    print("\n=== Examples in context, and codes")
    model = VWLMMForConditionalGeneration.from_pretrained(args.output / "stage2")
    tables += "\n" + answer_table(accuracies, records)
    tables += (
        "\n" + measure_shots(model, processor, records) + "\n" + measure_codes(model, processor, tokenizer, records)
    )
    (args.output / "results.md").write_text(tables)
    print(
        f"\n{tables}\nPictures: {args.output / 'kept.png'}, {args.output / 'codes.png'}\n\n"
        f"All of it took {(time.monotonic() - start) / 60:.1f} minutes."
    )


def make_language_model() -> None:
    """
    Saves the small world's LLM with a token for each word of LaVIT's prompts, which its tokenizer spells letter by
    letter: that was nearly half of a conversation.
    """
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_LANGUAGE_MODEL)
    tokenizer.add_tokens([AddedToken(word, lstrip=True) for word in ("Question", "Answer")])
    model = AutoModelForCausalLM.from_pretrained(SHIPPED_LANGUAGE_MODEL)
    torch.manual_seed(0)  # draws the new rows
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(LANGUAGE_MODEL)
    tokenizer.save_pretrained(LANGUAGE_MODEL)


def train_arm(output: Path, folder: str, options: list[str]) -> None:
    """Stage 2 on captions, then on conversations, with a half of the cores."""
    torch.set_num_threads(max((os.cpu_count() or 1) // 2, 1))
    captions = str(output / f"{folder}_captions")
    with log_to(output / f"{folder}.log"):
        begin = ["--config", str(RECIPES / "stage2.yaml"), "--visual_tokenizer", str(output / "tokenizer")]
        train.main([*begin, *options, "--output_dir", captions])
        go_on = ["--config", str(RECIPES / "stage2_conversations.yaml"), "--model_name_or_path", captions]
        train.main([*go_on, *options, "--output_dir", str(output / folder)])


def read_pixels(processor: VWLMMProcessor, records: list[dict]) -> torch.Tensor:
    """The images of records, `[I, 3, H, W]`."""
    images = [Image.open(record["image"]) for record in records]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def measure_tokenizer(
    tokenizer: VWLMMVisualTokenizer, processor: VWLMMProcessor, records: list[dict], output: Path
) -> str:
    """What is kept, and what can be rebuilt from it, by threshold and by a draw; draws both pictures."""
    features = tokenizer.encode_patches(read_pixels(processor, records))  # [I, N, C]
    log_probs = tokenizer.selector(features)  # [I, N, 2]
    words = [record["patch_words"] for record in records]
    is_object = torch.tensor([[len(word) > 1 for word in image] for image in words])  # [I, N]
    is_background = torch.tensor([[len(word) == 1 for word in image] for image in words])
    columns = {}
    for selection in ("threshold", "sample"):
        tokens = tokenizer.encode(patch_features=features, keep_mask=tokenizer.select(log_probs, selection=selection))
        kept = tokens.keep_mask
        lengths = kept.sum(dim=1).float()
        counts = tokens.code_ids.bincount(minlength=tokenizer.config.num_codes).double()
        columns[selection] = {
            "patches kept": f"{kept.float().mean():.3f}",
            "the same, least and most of an image": f"{lengths.min() / 64:.2f}, {lengths.max() / 64:.2f}",
            "object patches kept": f"{kept[is_object].float().mean():.3f}",
            "background patches kept": f"{kept[is_background].float().mean():.3f}",
            "objects with a token": f"{share_of_objects(kept, records):.3f}",
            "correlation of length and object area": f"{correlate(lengths, is_object.sum(dim=1)):.2f}",
            "correlation of length and number of objects": f"{correlate(lengths, count_objects(records)):.2f}",
            "codes used": str(int((counts > 0).sum())),
            "perplexity of codes": f"{torch.special.entr(counts / counts.sum()).sum().exp():.1f}",
            "cosine of rebuilt features": f"{cosine(tokenizer.decode(tokens.code_ids, kept), features):.3f}",
            **{f"patches of a code that agree on {k}": f"{v:.3f}" for k, v in agree(tokens, words).items()},
        }
        if selection == "threshold":
            codes = torch.full(kept.shape, -1).masked_scatter(kept, tokens.code_ids)  # [I, N]
            grid = (PATCHES_PER_SIDE, PATCHES_PER_SIDE)
            images = [CodedImage(r["image"], grid, own) for r, own in zip(records, codes, strict=True)]
            draw_kept(images[:8]).savefig(output / "kept.png")
            draw_codes(images).savefig(output / "codes.png")
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(kept.shape, generator=generator) < tokenizer.config.keep_rate  # [I, N]
    tokens = tokenizer.encode(patch_features=features, keep_mask=random)
    none = torch.zeros_like(random)
    # No decoder that gets no tokens can do better than the mean direction of each place.
    nothing = torch.nn.functional.normalize(features, dim=-1).mean(dim=0, keepdim=True)  # [1, N, C]
    baselines = {
        "cosine, tokens of a random third": f"{cosine(tokenizer.decode(tokens.code_ids, random), features):.3f}",
        "cosine, no tokens": f"{cosine(tokenizer.decode(tokens.code_ids[:0], none), features):.3f}",
        "cosine, best without tokens": f"{cosine(nothing, features):.3f}",
    }
    rows = [[name, *(column[name] for column in columns.values())] for name in columns["threshold"]]
    rows += [[name, value, ""] for name, value in baselines.items()]
    return markdown_table([f"tokenizer, {len(records)} images", *columns], rows)


def cosine(rebuilt: torch.Tensor, features: torch.Tensor) -> float:
    """Mean cosine of features, `[I, N, C]`."""
    return torch.cosine_similarity(rebuilt, features, dim=-1).mean().item()


def correlate(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation of two rows of numbers."""
    return float(np.corrcoef(a.numpy(), b.numpy())[0, 1])


def find_objects(record: dict) -> list[np.ndarray]:
    """The patches of each object of an image, `[N]` booleans: those of one quadrant with the same words."""
    places: dict[tuple, list[int]] = {}
    for patch, words in enumerate(record["patch_words"]):
        if len(words) > 1:
            places.setdefault((patch // 32, patch % 8 // 4, *words), []).append(patch)
    return [np.isin(np.arange(64), patches) for patches in places.values()]


def count_objects(records: list[dict]) -> torch.Tensor:
    """How many objects each image has, `[I]`."""
    return torch.tensor([len(find_objects(record)) for record in records])


def share_of_objects(kept: torch.Tensor, records: list[dict]) -> float:
    """The share of objects of which at least one patch is kept."""
    pairs = zip(kept.numpy(), records, strict=True)
    return float(np.mean([image[patches].any() for image, record in pairs for patches in find_objects(record)]))


def agree(tokens: object, words: list[list[list[str]]]) -> dict[str, float]:
    """Of kept object patches, the share whose colour, or shape, is the most frequent one of their code."""
    kept = [words[image][patch] for image, patch in tokens.keep_mask.nonzero().tolist()]
    shares = {}
    for kind, names in (("colour", COLOURS), ("shape", SHAPES)):
        found: dict[int, Counter] = {}
        for code, patch in zip(tokens.code_ids.tolist(), kept, strict=True):
            for word in set(patch) & set(names):
                found.setdefault(code, Counter())[word] += 1
        most = sum(counter.most_common(1)[0][1] for counter in found.values())
        shares[kind] = most / sum(counter.total() for counter in found.values())
    return shares


def measure_shots(model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, records: list[dict]) -> str:
    """Exact match with examples in context."""
    asked, examples = records[:NUM_FEW_SHOT_QUESTIONS], read_examples(RUNS / "data")
    rows = []
    for shots in SHOTS:
        answers = answer_with_examples(model, processor, asked, examples, shots)
        right = sum(answer == record["answer"] for answer, record in zip(answers, asked, strict=True))
        rows.append([str(shots), str(len(asked)), f"{right / len(asked):.1%}"])
    return markdown_table(["examples in context", "questions", "exact match"], rows)


def measure_codes(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    tokenizer: VWLMMVisualTokenizer,
    records: list[dict],
) -> str:
    """The codes' loss on held-out images beside the entropy of their frequencies, tokens, and the time of a step."""
    total, positions, codes = 0.0, 0, []
    texts = [f"{processor.image_token}{record['question']}" for record in records]
    for start in range(0, len(records), 50):
        batch = records[start : start + 50]
        inputs = processor(
            images=[Image.open(record["image"]) for record in batch],
            text=texts[start : start + 50],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        with torch.inference_mode():
            term = model(**inputs, visual_objective="codes", use_cache=False).terms["codes"]
        total, positions = total + term.total.item(), positions + int(term.count)
        codes += model.get_image_codes(inputs["pixel_values"])
    counts = torch.cat(codes).bincount().double()
    entropy = torch.special.entr(counts / counts.sum()).sum().item()
    rows = [
        ["loss of codes and [/IMG], nats", f"{total / positions:.3f}"],
        ["entropy of the codes' frequencies, nats", f"{entropy:.3f}"],
        ["tokens an image", f"{np.mean([len(image) for image in codes]):.1f} of 64"],
    ]
    for name, ratio in time_steps(model, processor, tokenizer).items():
        rows.append([f"time of a training step on captions, {name} / of the MLP adapter's 64 tokens", f"{ratio:.2f}"])
    return markdown_table([f"codes, {len(records)} images", ""], rows)


def time_steps(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, tokenizer: VWLMMVisualTokenizer
) -> dict[str, float]:
    """The median time of a training step on captions, without and with codes, over one of the MLP adapter, in turn."""
    records = json.loads((RUNS / "data" / "captions.json").read_text())[:16]
    inputs = processor(
        images=[Image.open(RUNS / "data" / "images" / record["image"]) for record in records],
        text=[processor.image_token + record["conversations"][1]["value"] for record in records],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    mlp = VWLMMForConditionalGeneration.from_visual_tokenizer(
        tokenizer, LANGUAGE_MODEL, adapter="mlp", dtype=torch.float32
    )
    models = {"mlp": mlp, "text": model, "text and codes": model}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(9):
        for name, timed in models.items():
            begun = time.perf_counter()
            selected = {}
            if name != "mlp":
                keep_mask, patch_features = timed.model.select_tokens(inputs["pixel_values"])
                selected = {"keep_mask": keep_mask, "patch_features": patch_features}
            objective = {"codes": 0.1} if name == "text and codes" else {}
            output = timed.train()(**inputs, **selected, visual_objective=objective, use_cache=False)
            output.loss.backward()
            times[name].append(time.perf_counter() - begun)
    model.zero_grad()
    model.eval()
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {name: medians[name] / medians["mlp"] for name in ("text", "text and codes")}


if __name__ == "__main__":
    main()
