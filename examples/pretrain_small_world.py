"""
Makes the two pretrained parts of the small world, the counterparts of CLIP and Vicuna.

    python examples/pretrain_small_world.py
    python examples/pretrain_small_world.py --world larger

writes to `examples/small_world/`, or `examples/larger_world/`, in half precision:

- `vision_tower/`: a CLIP vision tower, trained contrastively on pictures and their captions; the text side is dropped;
- `llm/`: a Llama decoder with its tokenizer, trained on text alone: captions, and scenes in words followed by
  questions about them.

Both parts are read back from disk and measured at the end. Scenes are made on the fly, so that none comes twice. The
whole script takes about an hour, most of it for the decoder, and has to run only if a world itself changes. The parts
of the larger world start from those of the small world, whose words and colours they know.
"""

import argparse
import copy
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import larger_world
import numpy as np
import small_world
import torch
import torch.nn.functional as F
from small_world import (
    BACKGROUND,
    BACKGROUND_WORD,
    COLOURS,
    IMAGE_SIZE,
    PATCH_SIZE,
    PATCHES_PER_SIDE,
    SHAPES,
    Scene,
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


SEED = 0

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
NUM_PATCHES = PATCHES_PER_SIDE**2

VISION_BATCH, KEPT_PATCHES = 128, 24
LLM_BATCH = 16
MUON_LR, ADAMW_LR, WARM_UP = 0.015, 2e-3, 30
ORDER = ("size", "texture", "colour", "shape")  # of words in a name
RESIDUAL_SCALE = 16


@dataclass(frozen=True)
class World:
    """
    What is pretrained on.

    Args:
        module (`ModuleType`): Makes the scenes.
        phrases (`tuple[str, ...]`): With the words of questions and answers that the small world lacks.
        vision_steps, llm_steps, exercise_steps (`int`): Of training; the last are the first ones of the LLM.
        caption_tokens (`int`): Of the longest caption, at least.
        start (`str`, *optional*): Name of the world whose parts these start from.
    """

    module: ModuleType
    phrases: tuple[str, ...]
    vision_steps: int
    llm_steps: int
    exercise_steps: int
    caption_tokens: int
    start: str | None = None

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return Path(__file__).with_name(self.module.__name__)


WORLDS = {
    "small": World(
        small_world,
        (),
        vision_steps=900,
        llm_steps=3000,
        exercise_steps=300,
        caption_tokens=64,
    ),
    "larger": World(
        larger_world,
        (
            *larger_world.TEXTURES,
            *larger_world.DIRECTIONS,
            "What texture is covered nothing",
        ),
        vision_steps=450,
        llm_steps=1000,
        exercise_steps=150,
        caption_tokens=128,
        start="small",
    ),
}


# ---------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of a world, and characters and bytes for all other text."""
    phrases = [
        SYSTEM,
        BACKGROUND_WORD,
        *COLOURS,
        *SHAPES,
        *(f"{shape}s" for shape in SHAPES),
        *world.module.SIZES,
        *world.module.PLACES,
        *world.module.NUMBERS,
        "yes no USER ASSISTANT a at the and shape shapes",
        "What colour is the How many are there Is there a Where is the Describe the image",
        *world.phrases,
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


def build_clip(vocab_size: int, caption_tokens: int) -> CLIPModel:
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
        "max_position_embeddings": caption_tokens,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    # As large as the patches' own embeddings: at the usual 0.02, place is not learned in the few steps of this script.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.4)
    return model


def twin(world: World, scene: Scene, rng: random.Random) -> Scene:
    """The same scene but for one attribute of one thing: the caption that is hardest to tell from the right one."""
    attributes = [*world.module.ATTRIBUTES.items(), ("place", world.module.PLACES)]
    changes = [pair for pair in attributes for _ in range(1 + (pair[0] == "shape"))]  # shapes are hard to tell
    while True:
        index = rng.randrange(len(scene.things))
        thing = scene.things[index]
        attribute, values = rng.choice(changes)
        looks = {name: getattr(thing, name) for name, _ in attributes}
        looks[attribute] = rng.choice([value for value in values if value != looks[attribute]])
        others = scene.things[:index] + scene.things[index + 1 :]
        if any(
            looks["place"] == other.place or (looks["colour"], looks["shape"]) == (other.colour, other.shape)
            for other in others
        ):
            continue
        return scene.replace_thing(index, rng, **looks)


def contrastive_scenes(world: World, rng: random.Random, size: int) -> list[Scene]:
    """Pairs of twins, without two equal captions: the attributes alone tell which caption belongs to which picture."""
    scenes = {}
    while len(scenes) < size:
        scene = world.module.random_scene(rng)
        other = twin(world, scene, rng)
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


def train_vision_tower(
    world: World, tokenizer: PreTrainedTokenizerFast, processor: CLIPImageProcessorPil
) -> CLIPVisionModel:
    """Trains vision tower and text encoder to tell which caption belongs to which picture, and returns the tower."""
    torch.manual_seed(SEED)
    rng = random.Random(f"{SEED}/vision")
    model = build_clip(len(tokenizer), world.caption_tokens).train()
    if world.start:
        start = CLIPVisionModel.from_pretrained(WORLDS[world.start].folder / "vision_tower", dtype=torch.float32)
        model.vision_model.load_state_dict(start.state_dict())
        rescale_residual_stream(get_tower_writers(model.vision_model), RESIDUAL_SCALE)
    hook = model.vision_model.encoder.layers[-1].register_forward_pre_hook(drop_patches)
    optimizers = Optimizers(model, world.vision_steps)
    progress = tqdm(range(world.vision_steps), desc="Vision tower")
    for _ in progress:
        scenes = contrastive_scenes(world, rng, VISION_BATCH)
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
    rescale_residual_stream(get_tower_writers(model.vision_model), 1 / RESIDUAL_SCALE)
    return model.vision_model.eval()


def get_tower_writers(tower: torch.nn.Module) -> list[torch.nn.Module]:
    """What writes into the tower's residual stream."""
    layers = tower.encoder.layers
    return [tower.pre_layrnorm, *(module for layer in layers for module in (layer.self_attn.out_proj, layer.mlp.fc2))]


@torch.no_grad()
def probe_vision_tower(world: World, tower: CLIPVisionModel, processor: CLIPImageProcessorPil) -> dict[str, float]:
    """How well a linear map reads the attributes of the object at a patch from that patch's features of layer -2."""

    def features_and_labels(seed: str, count: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        rng = random.Random(seed)
        scenes = [world.module.random_scene(rng) for _ in range(count)]
        pixel_values = processor([scene.image() for scene in scenes], return_tensors="pt").pixel_values
        states = [
            tower(batch, output_hidden_states=True).hidden_states[-2][:, 1:] for batch in pixel_values.split(250)
        ]
        patches = torch.from_numpy(np.stack([scene.patch_objects() for scene in scenes]))  # [B, 64]
        on_object = patches >= 0
        things = [scene.things[index] for scene, row in zip(scenes, patches, strict=True) for index in row[row >= 0]]
        labels = {
            name: torch.tensor([list(values).index(getattr(thing, name)) for thing in things])
            for name, values in {**world.module.ATTRIBUTES, "place": world.module.PLACES}.items()
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


def places_in_words(world: World, rng: random.Random) -> list[str]:
    """A grid like a scene in words, in which each patch says where it is: "top left top … right bottom right"."""
    words = []
    for row in range(PATCHES_PER_SIDE):
        for column in range(PATCHES_PER_SIDE):
            x, y = ((index + 0.5) * PATCH_SIZE for index in (column, row))
            *_, place = (name for name, (left, top) in world.module.PLACES.items() if left <= x and top <= y)
            words.append(rng.choice(place.split()))
    return words


def names_and_places(world: World, scene: Scene, rng: random.Random) -> str:
    """
    Where each thing is, by all of its names. A question about a thing takes this step first; one sample exercises it
    up to eight times.
    """
    attributes = sorted(world.module.ATTRIBUTES, key=ORDER.index)
    found = [f"the {name} at the {thing.place}" for thing in scene.things for name in scene.names(thing, *attributes)]
    return ", ".join(rng.sample(found, min(len(found), 8)))


def exercise(world: World, scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """A prompt with "<image>" where the words go, and these words: a caption, or practice in reading a scene."""
    words = scene.in_words(rng)
    drawn = rng.random()
    if drawn < 0.2:
        # Half of reading a scene is to know where in the grid a patch is, and this asks it 64 times a sample.
        return f"{SYSTEM} USER: <image>", places_in_words(world, rng)
    if drawn < 0.3:
        return f"<image>{scene.caption()}\n", words
    if drawn < 0.6:
        return f"{SYSTEM} USER: <image> ASSISTANT: {names_and_places(world, scene, rng)}</s>", words
    return vicuna_prompt([scene.question("describe", rng)]), words


def text_batch(
    world: World, encode: TextEncoder, rng: random.Random, exercises: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws a batch.

    Args:
        world (`World`): Where scenes are from.
        encode (`TextEncoder`): Encodes prompts.
        rng (`random.Random`): Draws scenes and prompts.
        exercises (`float`): The share of samples that are no conversations.

    Returns:
        Token ids, padded with -100, and the weight of each token in the loss, both `[B, L]`.
    """
    samples = []
    for _ in range(LLM_BATCH):
        scene = world.module.random_scene(rng)
        if rng.random() < exercises:
            prompt, words = exercise(world, scene, rng)
        else:
            # More questions than a conversation of the instruction data has: the model learns from their answers.
            turns = scene.conversation(rng) + [
                scene.question(kind, rng) for kind in rng.choices(scene.kinds[:-1], k=4)
            ]
            rng.shuffle(turns)
            prompt, words = vicuna_prompt(turns), scene.in_words(rng)
        ids, in_scene, in_reply = encode(prompt, words)
        # The words of a scene are mostly random, questions wholly, and nothing can be learned from that. With full
        # weight they would be most of the loss, and its gradient mostly noise.
        samples.append((ids, torch.where(in_reply, 1.0, torch.where(in_scene, 0.2, 0.02))))
    labels, weights = zip(*samples, strict=True)
    return pad_sequence(labels, batch_first=True, padding_value=-100), pad_sequence(weights, batch_first=True)


def train_llm(world: World, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """
    Trains the LLM, on exercises first: they are short and ask much, and teach to read a scene in a fraction of the
    time that questions take.
    """
    torch.manual_seed(SEED)
    rng = random.Random(f"{SEED}/llm")
    model = build_llm(tokenizer).train()
    if world.start:
        copy_llm(WORLDS[world.start].folder / "llm", model, tokenizer)
    encode = TextEncoder(tokenizer)
    optimizers = Optimizers(model, world.llm_steps)
    progress = tqdm(range(world.llm_steps), desc="Language model")
    for step in progress:
        labels, weights = text_batch(world, encode, rng, 1.0 if step < world.exercise_steps else 0.15)  # [B, L]
        # Padding is on the right, where a causal model never looks, so that no attention mask is needed.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=labels.clamp(min=0), use_cache=False).logits  # [B, L, C]
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")  # [B, L - 1]
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        optimizers.step(loss)
        progress.set_postfix(loss=f"{loss:.3f}")
    rescale_residual_stream(get_decoder_writers(model), RESIDUAL_SCALE)
    return model.eval()


def get_decoder_writers(model: LlamaForCausalLM) -> list[torch.nn.Module]:
    """What writes into the decoder's residual stream."""
    decoder = model.model
    writers = [module for layer in decoder.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [decoder.embed_tokens, *writers]


@torch.no_grad()
def copy_llm(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives a new LLM the layers of the one in a folder, and its rows of the tokens that both have."""
    start, known = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    rescale_residual_stream(get_decoder_writers(start), 1 / RESIDUAL_SCALE)
    vocabulary, known = tokenizer.get_vocab(), known.get_vocab()
    tokens = [(vocabulary[token], row) for token, row in known.items() if token in vocabulary]
    here, there = (torch.tensor(rows) for rows in zip(*tokens, strict=True))
    weights = start.state_dict()
    for name, weight in model.state_dict().items():
        if len(weight) == len(vocabulary):
            weight[here] = weights[name][there]
        else:
            weight.copy_(weights[name])


@torch.no_grad()
def measure_llm(
    world: World, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 600
) -> dict[str, float]:
    """Exact-match accuracy by kind on new scenes in words: the ceiling of what images can reach."""
    rng = random.Random(f"{SEED}/measure")
    encode = TextEncoder(tokenizer)
    asked, right = Counter(), Counter()
    for start in tqdm(range(0, count, 60), desc="Answering"):
        prompts, kinds, answers = [], [], []
        for index in range(start, start + 60):
            scene, kind = world.module.random_scene(rng), world.module.KINDS[index % len(world.module.KINDS)]
            question, answer = scene.question(kind, rng)
            prompt = vicuna_prompt([(question, "")]).removesuffix(" </s>")
            prompts.append(encode(prompt, scene.in_words(rng))[0])
            kinds.append(kind)
            answers.append(answer)
        input_ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(p) for p in prompts], True, padding_side="left")
        output = model.generate(input_ids=input_ids, attention_mask=mask, do_sample=False, max_new_tokens=96)
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        for kind, text, answer in zip(kinds, texts, answers, strict=True):
            asked[kind] += 1
            right[kind] += text.strip() == answer
    return {kind: right[kind] / asked[kind] for kind in asked} | {"all": right.total() / count}


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


def make_vision_tower(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    """Trains, saves and measures the vision tower."""
    folder = world.folder / "vision_tower"
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    train_vision_tower(world, tokenizer, processor).half().save_pretrained(folder)
    processor.save_pretrained(folder)
    # Measured as its users will load it: from disk, in half precision.
    tower = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder)
    report("Vision tower: linear probe of layer -2, by patch", tower, probe_vision_tower(world, tower, processor))


def make_llm(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    """Trains, saves and measures the LLM and its tokenizer."""
    folder = world.folder / "llm"
    train_llm(world, tokenizer).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    llm = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report("Language model: exact match on scenes in words", llm, measure_llm(world, llm, tokenizer))


def main() -> None:
    """Makes the parts that the command line names."""
    parts = {"vision_tower": make_vision_tower, "llm": make_llm}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help="what to make: vision_tower, llm, or both")
    parser.add_argument("--world", choices=WORLDS, default="small")
    args = parser.parse_args()
    world = WORLDS[args.world]
    for part in args.parts:
        parts[part](world, build_tokenizer(world))


if __name__ == "__main__":
    main()
