"""
Makes the two pretrained parts of the small world, the counterparts of CLIP and Vicuna.

    python examples/pretrain_small_world.py

writes to `examples/small_world/`, in half precision:

- `vision_tower/`: a CLIP vision tower, trained contrastively on pictures and their captions; the text side is dropped;
- `llm/`: a Llama decoder with its tokenizer, trained on text alone: captions, and scenes in words followed by
  questions about them.

Both parts are read back from disk and measured at the end. Scenes are made on the fly, so that none comes twice. The
whole script takes about an hour, most of it for the decoder, and has to run only if the small world itself changes.
"""

import argparse
import copy
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from small_world import (
    BACKGROUND,
    BACKGROUND_WORD,
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    NUMBERS,
    PATCH_SIZE,
    PATCHES_PER_SIDE,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    random_scene,
    random_thing,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


OUTPUT = Path(__file__).parent / "small_world"
SEED = 0

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
NUM_PATCHES = PATCHES_PER_SIDE**2

VISION_STEPS, VISION_BATCH, KEPT_PATCHES = 900, 128, 24
LLM_STEPS, EXERCISE_STEPS, LLM_BATCH = 3000, 300, 16
MUON_LR, ADAMW_LR, WARM_UP = 0.015, 2e-3, 30
RESIDUAL_SCALE = 16


# ---------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the small world, and characters and bytes for all other text."""
    phrases = [
        SYSTEM,
        BACKGROUND_WORD,
        *COLOURS,
        *SHAPES,
        *(f"{shape}s" for shape in SHAPES),
        *SIZES,
        *PLACES,
        *NUMBERS,
        "yes no USER ASSISTANT a at the and shape shapes",
        "What colour is the How many are there Is there a Where is the Describe the image",
    ]
    words = dict.fromkeys(word.strip(".,'") for phrase in phrases for word in phrase.split())
    line_starts = ["at", "USER", "What", "How", "Is", "Where", "Describe"]  # no space before them
    characters = ["▁", "\n", *map(chr, range(ord(" ") + 1, ord("~") + 1))]
    pieces = dict.fromkeys([f"▁{word}" for word in words] + line_starts + characters)

    # The model picks the split with the best total score: whole words first, then characters, bytes if nothing else.
    vocabulary = [(special, 0.0) for special in ("<unk>", "<s>", "</s>")]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(piece, -10.0 if piece in characters else -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    # The space before an image is no token of its own: an image stands exactly where a scene in words would.
    tokenizer.normalizer = normalizers.Replace(Regex(r" +\z"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


# -------------------------------------------------------------------------------------------------------- vision tower


def build_clip(vocab_size: int) -> CLIPModel:
    """About 1 M parameters for pictures, and as few as will do for captions."""
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    text = {
        "vocab_size": vocab_size + 1,
        "eos_token_id": vocab_size,  # CLIP reads a caption's features at an end token of its own
        "pad_token_id": 0,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    # As large as the patches' own embeddings: at the usual 0.02, place is not learned in the few steps of this script.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.4)
    return model


def twin(scene: Scene, rng: random.Random) -> Scene:
    """The same scene but for one attribute of one thing: the caption that is hardest to tell from the right one."""
    while True:
        index = rng.randrange(len(scene.things))
        thing = scene.things[index]
        attribute, values = rng.choice(
            [("colour", COLOURS), ("shape", SHAPES), ("shape", SHAPES), ("size", SIZES), ("place", PLACES)]
        )
        looks = {"colour": thing.colour, "shape": thing.shape, "size": thing.size, "place": thing.place}
        looks[attribute] = rng.choice([value for value in values if value != looks[attribute]])
        others = scene.things[:index] + scene.things[index + 1 :]
        if any(
            looks["place"] == other.place or (looks["colour"], looks["shape"]) == (other.colour, other.shape)
            for other in others
        ):
            continue
        things = sorted((*others, random_thing(rng, **looks)), key=lambda thing: list(PLACES).index(thing.place))
        return replace(scene, things=tuple(things))


def contrastive_scenes(rng: random.Random, size: int) -> list[Scene]:
    """Pairs of twins, without two equal captions: the attributes alone tell which caption belongs to which picture."""
    scenes = {}
    while len(scenes) < size:
        scene = random_scene(rng)
        other = twin(scene, rng)
        if scene.caption() not in scenes and other.caption() not in scenes:
            scenes |= {scene.caption(): scene, other.caption(): other}
    return list(scenes.values())


def to_pixel_values(scenes: list[Scene], processor: CLIPImageProcessorPil) -> torch.Tensor:
    """What the image processor makes of pictures that have the right size already, at once: `[B, 3, 64, 64]`."""
    images = np.stack([np.asarray(scene.image()) for scene in scenes])  # [B, 64, 64, 3]
    pixels = torch.from_numpy(images).float() / 255
    return ((pixels - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)).permute(0, 3, 1, 2)


def drop_patches(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """
    Keeps the class token and a random part of the patches, before the last layer.

    The class token can then rely on no single patch, so that every patch of an object learns to tell about it.

    Args:
        layer (`torch.nn.Module`): The layer, which this is a hook of.
        inputs (`tuple[torch.Tensor, ...]`): Its arguments, hidden states of shape `[B, 1 + N, D]` first.

    Returns:
        The arguments, with hidden states of shape `[B, 1 + K, D]` in training, and unchanged otherwise.
    """
    if not layer.training:
        return inputs
    states, *rest = inputs
    kept = torch.rand(states.shape[0], NUM_PATCHES).argsort(-1)[:, :KEPT_PATCHES]  # [B, K]
    kept = F.pad(kept + 1, (1, 0))  # [B, 1 + K], the class token first
    return states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1])), *rest


def train_vision_tower(tokenizer: PreTrainedTokenizerFast, processor: CLIPImageProcessorPil) -> CLIPVisionModel:
    """Trains vision tower and text encoder to tell which caption belongs to which picture, and returns the tower."""
    torch.manual_seed(SEED)
    rng = random.Random(f"{SEED}/vision")
    model = build_clip(len(tokenizer)).train()
    hook = model.vision_model.encoder.layers[-1].register_forward_pre_hook(drop_patches)
    optimizers = Optimizers(model, VISION_STEPS)
    progress = tqdm(range(VISION_STEPS), desc="Vision tower")
    for _ in progress:
        scenes = contrastive_scenes(rng, VISION_BATCH)
        captions = [torch.tensor([*tokenizer(s.caption()).input_ids, len(tokenizer)]) for s in scenes]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(
                input_ids=pad_sequence(captions, batch_first=True),  # [B, T]
                pixel_values=to_pixel_values(scenes, processor),  # [B, 3, 64, 64]
                return_loss=True,
            )
        accuracy = (output.logits_per_image.argmax(-1) == torch.arange(len(scenes))).float().mean()
        optimizers.step(output.loss)
        progress.set_postfix(loss=f"{output.loss:.3f}", retrieval=f"{accuracy:.2f}")
    hook.remove()
    tower = model.vision_model
    writers = [module for layer in tower.encoder.layers for module in (layer.self_attn.out_proj, layer.mlp.fc2)]
    rescale_residual_stream([tower.pre_layrnorm, *writers], 1 / RESIDUAL_SCALE)
    return tower.eval()


@torch.no_grad()
def probe_vision_tower(tower: CLIPVisionModel, processor: CLIPImageProcessorPil) -> dict[str, float]:
    """How well a linear map reads the attributes of the object at a patch from that patch's features of layer -2."""

    def features_and_labels(seed: str, count: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        rng = random.Random(seed)
        scenes = [random_scene(rng) for _ in range(count)]
        pixel_values = processor([scene.image() for scene in scenes], return_tensors="pt").pixel_values
        states = [
            tower(batch, output_hidden_states=True).hidden_states[-2][:, 1:] for batch in pixel_values.split(250)
        ]
        patches = torch.from_numpy(np.stack([scene.patch_objects() for scene in scenes]))  # [B, 64]
        on_object = patches >= 0
        things = [scene.things[index] for scene, row in zip(scenes, patches, strict=True) for index in row[row >= 0]]
        labels = {
            "colour": torch.tensor([list(COLOURS).index(thing.colour) for thing in things]),
            "shape": torch.tensor([SHAPES.index(thing.shape) for thing in things]),
            "size": torch.tensor([list(SIZES).index(thing.size) for thing in things]),
            "place": torch.tensor([list(PLACES).index(thing.place) for thing in things]),
        }
        states = F.pad(torch.cat(states), (0, 1), value=1.0)  # [B, 64, D + 1]
        clear = on_object | (patches == BACKGROUND)
        data = {name: (states[on_object], label) for name, label in labels.items()}
        return data | {"object": (states[clear], on_object[clear].long())}

    train = features_and_labels("probe/train", 2000)
    test = features_and_labels("probe/test", 500)
    accuracies = {}
    for name, (features, labels) in train.items():
        gram = features.T @ features + 1e-1 * torch.eye(features.shape[1])
        weight = torch.linalg.solve(gram, features.T @ F.one_hot(labels).float())  # [D + 1, classes]
        features, labels = test[name]
        accuracies[name] = ((features @ weight).argmax(-1) == labels).float().mean().item()
    return accuracies


# ------------------------------------------------------------------------------------------------------ language model


def build_llm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of five layers."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        # Scaled so that the fastest rotary frequency turns once per row of patches: a word's column is a phase that
        # attention can read, and left and right are learned in minutes.
        rope_parameters={"rope_type": "linear", "factor": PATCHES_PER_SIDE / (2 * math.pi), "rope_theta": 1e5},
    )
    return LlamaForCausalLM(config)


class TextEncoder:
    """Prompts with a scene in words at the place of the image, as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        self.image_id, self.assistant_id = self.tokenizer.convert_tokens_to_ids(["<image>", "▁ASSISTANT"])

    def __call__(self, prompt: str, scene_words: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Encodes one prompt.

        Args:
            prompt (`str`): A prompt, with `<image>` where the scene goes.
            scene_words (`list[str]`): The scene in words, one a patch.

        Returns:
            Token ids, which of them are the scene, and which are the replies (or all of a plain caption), each `[L]`.
        """
        ids = torch.tensor(self.tokenizer(prompt.replace("<image>", "<image>" * NUM_PATCHES)).input_ids)
        in_scene = ids == self.image_id
        if "ASSISTANT" in prompt:
            started = F.pad(ids == self.assistant_id, (2, 0))[:-2].cumsum(0)  # behind "ASSISTANT" and the colon
            ended = F.pad(ids == self.tokenizer.eos_token_id, (1, 0))[:-1].cumsum(0)
            in_reply = started > ended
        else:
            in_reply = ~in_scene
        if in_scene.any():
            ids[in_scene] = torch.tensor(self.tokenizer(" ".join(scene_words), add_special_tokens=False).input_ids)
        return ids, in_scene, in_reply


def vicuna_prompt(turns: list[tuple[str, str]]) -> str:
    """The "vicuna_v1" format: the answers end in </s>."""
    turns = [(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]]
    return f"{SYSTEM} " + "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)


def places_in_words(rng: random.Random) -> list[str]:
    """A grid like a scene in words, in which each patch says where it is: "top left top … right bottom right"."""
    half = PATCHES_PER_SIDE // 2
    rows = [("top", "left", "right") if row < half else ("bottom", "left", "right") for row in range(PATCHES_PER_SIDE)]
    return [
        rng.choice((vertical, left if column < half else right))
        for vertical, left, right in rows
        for column in range(PATCHES_PER_SIDE)
    ]


def names_and_places(scene: Scene, rng: random.Random) -> str:
    """
    Where each thing is, by all of its names. A question about a thing takes this step first; one sample exercises it
    up to eight times.
    """
    attributes = ("size", "colour", "shape")
    found = [f"the {name} at the {thing.place}" for thing in scene.things for name in scene.names(thing, *attributes)]
    return ", ".join(rng.sample(found, min(len(found), 8)))


def exercise(scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """A prompt with "<image>" where the words go, and these words: a caption, or practice in reading a scene."""
    words = scene.in_words(rng)
    drawn = rng.random()
    if drawn < 0.2:
        # Half of reading a scene is to know where in the grid a patch is, and this asks it 64 times a sample.
        return f"{SYSTEM} USER: <image>", places_in_words(rng)
    if drawn < 0.3:
        return f"<image>{scene.caption()}\n", words
    if drawn < 0.6:
        return f"{SYSTEM} USER: <image> ASSISTANT: {names_and_places(scene, rng)}</s>", words
    return vicuna_prompt([scene.question("describe", rng)]), words


def text_batch(encode: TextEncoder, rng: random.Random, exercises: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws a batch.

    Args:
        encode (`TextEncoder`): Encodes prompts.
        rng (`random.Random`): Draws scenes and prompts.
        exercises (`float`): The share of samples that are no conversations.

    Returns:
        Token ids, padded with -100, and the weight of each token in the loss, both `[B, L]`.
    """
    samples = []
    for _ in range(LLM_BATCH):
        scene = random_scene(rng)
        if rng.random() < exercises:
            prompt, words = exercise(scene, rng)
        else:
            # More questions than a conversation of the instruction data has: the model learns from their answers.
            turns = scene.conversation(rng) + [scene.question(kind, rng) for kind in rng.choices(KINDS[:-1], k=4)]
            rng.shuffle(turns)
            prompt, words = vicuna_prompt(turns), scene.in_words(rng)
        ids, in_scene, in_reply = encode(prompt, words)
        # The words of a scene are mostly random, questions wholly, and nothing can be learned from that. With full
        # weight they would be most of the loss, and its gradient mostly noise.
        samples.append((ids, torch.where(in_reply, 1.0, torch.where(in_scene, 0.2, 0.02))))
    labels, weights = zip(*samples, strict=True)
    return pad_sequence(labels, batch_first=True, padding_value=-100), pad_sequence(weights, batch_first=True)


def train_llm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """
    Trains the LLM, on exercises first: they are short and ask much, and teach to read a scene in a fraction of the
    time that questions take.
    """
    torch.manual_seed(SEED)
    rng = random.Random(f"{SEED}/llm")
    model = build_llm(tokenizer).train()
    encode = TextEncoder(tokenizer)
    optimizers = Optimizers(model, LLM_STEPS)
    progress = tqdm(range(LLM_STEPS), desc="Language model")
    for step in progress:
        labels, weights = text_batch(encode, rng, exercises=1.0 if step < EXERCISE_STEPS else 0.15)  # [B, L]
        # Padding is on the right, where a causal model never looks, so that no attention mask is needed.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=labels.clamp(min=0), use_cache=False).logits  # [B, L, C]
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")  # [B, L - 1]
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        optimizers.step(loss)
        progress.set_postfix(loss=f"{loss:.3f}")
    writers = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    rescale_residual_stream([model.model.embed_tokens, *writers], RESIDUAL_SCALE)
    return model.eval()


@torch.no_grad()
def measure_llm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 600) -> dict[str, float]:
    """Exact-match accuracy by kind on new scenes in words: the ceiling of what images can reach."""
    rng = random.Random(f"{SEED}/measure")
    encode = TextEncoder(tokenizer)
    right = Counter()
    for start in tqdm(range(0, count, 60), desc="Answering"):
        prompts, kinds, answers = [], [], []
        for index in range(start, start + 60):
            scene, kind = random_scene(rng), KINDS[index % len(KINDS)]
            question, answer = scene.question(kind, rng)
            prompt = vicuna_prompt([(question, "")]).removesuffix(" </s>")
            prompts.append(encode(prompt, scene.in_words(rng))[0])
            kinds.append(kind)
            answers.append(answer)
        input_ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(p) for p in prompts], True, padding_side="left")
        output = model.generate(input_ids=input_ids, attention_mask=mask, do_sample=False, max_new_tokens=48)
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        for kind, text, answer in zip(kinds, texts, answers, strict=True):
            right[kind] += text.strip() == answer
    return {kind: right[kind] / (count // len(KINDS)) for kind in KINDS} | {"all": right.total() / count}


# ---------------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """
    SGD with momentum whose steps on a matrix are orthogonalised (Jordan et al., 2024); AdamW takes the rest.

    With it, the LLM learns to read a scene in a third of AdamW's steps. `torch.optim.Muon` computes in bfloat16, which
    few CPUs have instructions for.

    Args:
        matrices (`list[torch.nn.Parameter]`): What to train.
        lr (`float`): Learning rate.
        momentum (`float`, *optional*, defaults to 0.95): Decay of the average of gradients.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Takes one step."""
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])
                tall = update.shape[0] > update.shape[1]
                update = update.T if tall else update
                update = update / (update.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values go towards 1
                    gram = update @ update.T
                    update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
                update = update.T if tall else update
                matrix.add_(update, alpha=-group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


class Optimizers:
    """
    Muon for the matrices of the layers, AdamW for all else, with linear warm-up and decay.

    Args:
        model (`torch.nn.Module`): What to train.
        steps (`int`): The number of steps, after which the learning rate is 0.
    """

    def __init__(self, model: torch.nn.Module, steps: int) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
        self.parameters = [*matrices, *others]
        self.optimizers = [Muon(matrices, lr=MUON_LR), torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95))]
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / steps))
            for optimizer in self.optimizers
        ]

    def step(self, loss: torch.Tensor) -> None:
        """Backward, clipping, and one step of both optimizers."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


@torch.no_grad()
def rescale_residual_stream(writers: list[torch.nn.Module], factor: float) -> None:
    """
    Multiplies what layers write into the residual stream. Outputs stay the same, as every layer normalises what it
    reads.

    As trained, features of the vision tower are a hundred times as long as embeddings of the LLM. An adapter then
    learns directions that no word has; between streams of about one scale, image features land beside words.

    Args:
        writers (`list[torch.nn.Module]`): The modules whose outputs are added to the stream.
        factor (`float`): Factor of their weights and biases.
    """
    for writer in writers:
        for parameter in writer.parameters():
            parameter.mul_(factor)


def report(title: str, model: torch.nn.Module, accuracies: dict[str, float]) -> None:
    """Prints a model's size and what it was measured to know."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{title}, {parameters / 1e6:.2f} M parameters")
    for name, accuracy in accuracies.items():
        print(f"  {name:10} {accuracy:6.1%}")


def make_vision_tower(tokenizer: PreTrainedTokenizerFast) -> None:
    """Trains, saves and measures the vision tower."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    train_vision_tower(tokenizer, processor).half().save_pretrained(OUTPUT / "vision_tower")
    processor.save_pretrained(OUTPUT / "vision_tower")
    # Measured as its users will load it: from disk, in half precision.
    tower = CLIPVisionModel.from_pretrained(OUTPUT / "vision_tower", dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(OUTPUT / "vision_tower")
    report("Vision tower: linear probe of layer -2, by patch", tower, probe_vision_tower(tower, processor))


def make_llm(tokenizer: PreTrainedTokenizerFast) -> None:
    """Trains, saves and measures the LLM and its tokenizer."""
    train_llm(tokenizer).half().save_pretrained(OUTPUT / "llm")
    tokenizer.save_pretrained(OUTPUT / "llm")
    llm = LlamaForCausalLM.from_pretrained(OUTPUT / "llm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(OUTPUT / "llm")
    report("Language model: exact match on scenes in words", llm, measure_llm(llm, tokenizer))


def main() -> None:
    """Makes the parts that the command line names."""
    parts = {"vision_tower": make_vision_tower, "llm": make_llm}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help="what to make: vision_tower, llm, or both")
    args = parser.parse_args()
    for part in args.parts:
        parts[part](build_tokenizer())


if __name__ == "__main__":
    main()
