"""
The small world: a seeded generator of images, captions and questions that stands in for LLaVA's data.

    python examples/small_world.py runs/data

A scene is a 64x64 picture with one to four shapes on dark grey, at most one in each quadrant. Colour, shape, size and
exact place of every shape vary, and so does the grey. Captions and questions follow from the scene, and every question
has one right answer. Records and images are written in LLaVA's format, as `blip_laion_cc_sbu_558k.json` (captions) and
`llava_v1_5_mix665k.json` (conversations) have it, plus a held-out set with the facts that an evaluation needs.

A vision tower with 8-pixel patches sees a scene as 8x8 patches. A scene in words is the same grid with one word a
patch, "dark dark red circle dark …", and a language model can read it in place of the image.

A detailed scene, of the grey world, has 128x128 pixels. Its shapes are all of one grey and have patterns: rows,
columns or checks of single pixels, or none. Any 2x2 pixels of a shape have its grey on average, so that what is left
of the picture at 64x64 cannot tell one pattern from another.
"""

import argparse
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm


IMAGE_SIZE = 64
PATCH_SIZE = 8
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 50),
    "purple": (165, 50, 205),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (18, 21), "large": (27, 30)}  # shortest and longest side of the bounding box, in pixels
PLACES = {"top left": (0, 0), "top right": (32, 0), "bottom left": (0, 32), "bottom right": (32, 32)}
ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
NUMBERS = ("zero", "one", "two", "three", "four")
BACKGROUND_WORD = "dark"

# Which of 2x2 pixels are brighter than a shape's grey, 1, and which are darker, -1; and the colour that is said of a
# pattern: so the questions are those of other scenes.
PATTERNS = {
    "plain": ((0, 0), (0, 0)),
    "rows": ((1, 1), (-1, -1)),
    "columns": ((1, -1), (1, -1)),
    "checks": ((1, -1), (-1, 1)),
}
PATTERN_COLOURS = {"plain": "white", "rows": "red", "columns": "green", "checks": "blue"}
CONTRAST = 90  # how much brighter or darker, of 255
GREY = 128  # of the shapes of the grey world

KINDS = ("colour", "shape", "count", "exists", "where", "describe")
DETAIL_KINDS = ("detail", "twins", "shape")  # of questions on the grey world

# What `Scene.patch_objects` says of a patch that shows no object.
BACKGROUND = -1  # not one pixel of an object
BORDER = -2  # some pixels of an object, but less than half: neither object nor background
OBJECT_PIXELS = PATCH_SIZE**2 // 2  # of a patch that shows an object
WORD_PIXELS = PATCH_SIZE**2 // 8  # of a patch that says a word of an object, where a scene is in words


@dataclass(frozen=True)
class Thing:
    """
    One shape of a scene.

    Args:
        colour, shape, size, place (`str`): Its attributes, as `COLOURS`, `SHAPES`, `SIZES` and `PLACES` name them.
        rgb (`tuple[int, int, int]`): The exact colour, 0 to 255.
        left, top, side (`int`): The bounding box, in pixels.
    """

    colour: str
    shape: str
    size: str
    place: str
    rgb: tuple[int, int, int]
    left: int
    top: int
    side: int

    @property
    def words(self) -> tuple[str, str, str]:
        """The attribute words that are true of each of the thing's patches."""
        return self.colour, self.shape, self.size

    def mask(self) -> np.ndarray:
        """The pixels that the thing covers, `[64, 64]`."""
        y, x = np.ogrid[:IMAGE_SIZE, :IMAGE_SIZE]
        u, v = (x + 0.5 - self.left) / self.side, (y + 0.5 - self.top) / self.side  # 0 to 1 across the bounding box
        if self.shape == "circle":
            return (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
        inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
        return inside if self.shape == "square" else inside & (abs(u - 0.5) <= v / 2)


def count_by_patch(mask: np.ndarray) -> np.ndarray:
    """How many of each patch's pixels a mask `[64, 64]` has, `[64]` in raster order."""
    grid = mask.reshape(PATCHES_PER_SIDE, PATCH_SIZE, PATCHES_PER_SIDE, PATCH_SIZE)
    return grid.sum(axis=(1, 3)).flatten()


def random_thing(rng: random.Random, colour: str, shape: str, size: str, place: str) -> Thing:
    """A thing with these attributes, somewhere in its quadrant."""
    corner_x, corner_y = PLACES[place]
    rgb = tuple(min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLOURS[colour])
    while True:
        side = rng.randint(*SIZES[size])
        room = IMAGE_SIZE // 2 - 1 - side  # one pixel stays free on each side of the quadrant
        left, top = corner_x + rng.randint(1, room), corner_y + rng.randint(1, room)
        thing = Thing(colour, shape, size, place, rgb, left, top, side)
        # A scene in words says colour, shape and size at least once each, in a patch each.
        if (count_by_patch(thing.mask()) >= OBJECT_PIXELS).sum() >= len(thing.words):
            return thing


@dataclass(frozen=True)
class Scene:
    """
    One picture: things in raster order of their quadrants, no two alike in both colour and shape.

    Answers say where before they say what: a decoder that has named a place knows where to look for the rest.

    Args:
        grey (`int`): Brightness of the background, 0 to 255.
        things (`tuple[Thing, ...]`): One to four shapes.
    """

    grey: int
    things: tuple[Thing, ...]

    kinds = KINDS
    numbers = NUMBERS

    def image(self) -> Image.Image:
        """The picture, 64x64 pixels in RGB."""
        pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), self.grey, dtype=np.uint8)
        for thing in self.things:
            pixels[thing.mask()] = thing.rgb
        return Image.fromarray(pixels)

    def replace_thing(self, index: int, rng: random.Random, **attributes: str) -> "Scene":
        """The scene with another thing in place of one, of these attributes."""
        things = [*self.things[:index], *self.things[index + 1 :], random_thing(rng, **attributes)]
        return replace(self, things=tuple(sorted(things, key=lambda thing: list(PLACES).index(thing.place))))

    def masks(self) -> list[np.ndarray]:
        """The pixels that show each thing, `[64, 64]` each."""
        return [thing.mask() for thing in self.things]

    def caption(self) -> str:
        """A caption that names every thing with its place, size, colour and shape."""
        return ", ".join(f"at the {thing.place} a {thing.size} {thing.colour} {thing.shape}" for thing in self.things)

    def find_owners(self, num_pixels: int) -> np.ndarray:
        """
        For each patch, `[64]` in raster order: the index of the thing that has most of its pixels, if these are
        `num_pixels` at least, or `BORDER` if there are fewer, or `BACKGROUND`.
        """
        pixels = np.stack([count_by_patch(mask) for mask in self.masks()])  # [things, 64]
        most = pixels.max(axis=0)
        return np.where(most >= num_pixels, pixels.argmax(axis=0), np.where(most > 0, BORDER, BACKGROUND))

    def patch_objects(self) -> np.ndarray:
        """For each patch, `[64]` in raster order: the index of the thing it shows, or `BACKGROUND` or `BORDER`."""
        return self.find_owners(OBJECT_PIXELS)

    def true_words(self) -> list[tuple[str, ...]]:
        """For each patch: its thing's three attribute words, the background word alone, or nothing (border)."""
        names = {BACKGROUND: (BACKGROUND_WORD,), BORDER: ()}
        names |= {index: thing.words for index, thing in enumerate(self.things)}
        return [names[patch] for patch in self.patch_objects()]

    def in_words(self, rng: random.Random) -> list[str]:
        """
        The scene in words, one a patch: a random attribute of the thing that the patch shows, or the background word.

        An eighth of a patch is enough to show a thing: so its words begin at its rim, and the words before a patch in
        its middle tell what this one may say. Each attribute of a thing is said at least once, so that the words
        answer whatever the picture answers.

        Args:
            rng (`random.Random`): Draws the attributes.

        Returns:
            `list[str]`, a word for each of the 64 patches in raster order.
        """
        words = [BACKGROUND_WORD] * PATCHES_PER_SIDE**2
        owners = self.find_owners(WORD_PIXELS)
        for index, thing in enumerate(self.things):
            patches = np.flatnonzero(owners == index)
            said = [*thing.words, *rng.choices(thing.words, k=len(patches) - len(thing.words))]
            rng.shuffle(said)
            for patch, word in zip(patches, said, strict=True):
                words[patch] = word
        return words

    def question(self, kind: str, rng: random.Random) -> tuple[str, str]:
        """A question of one of the scene's `kinds` and its only right answer."""
        return getattr(self, f"_ask_{kind}")(rng)

    def names(self, thing: Thing, *attributes: str) -> list[str]:
        """The ways to name a thing by some of `attributes` that fit no other thing of the scene."""
        names = []
        for used in [(first,) for first in attributes] + [attributes]:
            values = [getattr(thing, attribute) for attribute in used]
            if sum(values == [getattr(other, attribute) for attribute in used] for other in self.things) == 1:
                names.append(" ".join(values) if "shape" in used else " ".join([*values, "shape"]))
        return names

    def _found(self, name: str, thing: Thing) -> str:
        """The thing as an answer takes it up: by the question's name, and by its place."""
        return f"the {name.split(' at ')[0]} at the {thing.place}"

    def _ask_colour(self, rng: random.Random) -> tuple[str, str]:
        thing = rng.choice(self.things)
        name = rng.choice([f"shape at the {thing.place}", *self.names(thing, "size", "shape")])
        return f"What colour is the {name}?", f"{self._found(name, thing)} is {thing.colour}"

    def _ask_shape(self, rng: random.Random) -> tuple[str, str]:
        thing = rng.choice(self.things)
        name = rng.choice([f"shape at the {thing.place}", *self.names(thing, "size", "colour")])
        return f"What is the {name}?", f"{self._found(name, thing)} is a {thing.shape}"

    def _ask_count(self, rng: random.Random) -> tuple[str, str]:
        thing = rng.choice(self.things)
        attribute, value, plural = rng.choice(
            [
                (None, None, "shapes"),
                # Sometimes what is not in the picture, so that "zero" is an answer, too.
                ("colour", colour := rng.choice([thing.colour, rng.choice(list(COLOURS))]), f"{colour} shapes"),
                ("shape", shape := rng.choice([thing.shape, rng.choice(SHAPES)]), f"{shape}s"),
            ]
        )
        count = sum(attribute is None or getattr(other, attribute) == value for other in self.things)
        return f"How many {plural} are there?", self.numbers[count]

    def _ask_exists(self, rng: random.Random) -> tuple[str, str]:
        thing = rng.choice(self.things)
        if rng.random() < 0.5:
            return f"Is there a {thing.colour} {thing.shape}?", f"yes, at the {thing.place}"
        # One attribute is right and the pair is not: the easiest mistake to make.
        near = [(colour, thing.shape) for colour in COLOURS] + [(thing.colour, shape) for shape in SHAPES]
        present = [(other.colour, other.shape) for other in self.things]
        colour, shape = rng.choice([pair for pair in near if pair not in present])
        return f"Is there a {colour} {shape}?", "no"

    def _ask_where(self, rng: random.Random) -> tuple[str, str]:
        thing = rng.choice(self.things)
        return f"Where is the {rng.choice(self.names(thing, 'colour', 'shape'))}?", f"at the {thing.place}"

    def _ask_describe(self, rng: random.Random) -> tuple[str, str]:
        return "Describe the image.", self.caption()

    def conversation(self, rng: random.Random) -> list[tuple[str, str]]:
        """Four to six questions with their answers, each of another kind."""
        return [self.question(kind, rng) for kind in rng.sample(self.kinds, rng.randint(4, 6))]


def random_scene(rng: random.Random) -> Scene:
    """A scene of one to four things."""
    count = rng.choices((1, 2, 3, 4), weights=(3, 3, 2, 2))[0]
    places = sorted(rng.sample(list(PLACES), count), key=list(PLACES).index)
    looks = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    things = tuple(
        random_thing(rng, colour, shape, rng.choice(list(SIZES)), place)
        for place, (colour, shape) in zip(places, looks, strict=True)
    )
    return Scene(grey=rng.randint(15, 75), things=things)


@dataclass(frozen=True)
class DetailedScene(Scene):
    """
    A scene of the grey world, 128x128 pixels, whose things have patterns.

    Args:
        patterns (`tuple[str, ...]`): The pattern of each thing, as `PATTERNS` names them.
    """

    patterns: tuple[str, ...]

    def image(self) -> Image.Image:
        """The picture, 128x128 pixels in RGB."""
        pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), self.grey)
        signs = np.zeros((2 * IMAGE_SIZE, 2 * IMAGE_SIZE, 1), dtype=int)
        for thing, pattern in zip(self.things, self.patterns, strict=True):
            pixels[thing.mask()] = thing.rgb
            everywhere = np.tile(PATTERNS[pattern], (IMAGE_SIZE, IMAGE_SIZE))
            mask = thing.mask().repeat(2, axis=0).repeat(2, axis=1)
            signs[mask, 0] = everywhere[mask]
        pixels = pixels.repeat(2, axis=0).repeat(2, axis=1) + CONTRAST * signs
        return Image.fromarray(pixels.astype(np.uint8))

    def ask_about(self, thing: Thing, kind: str) -> tuple[str, str]:
        """
        A question that says of a thing no more than its place, and its answer: by `kind` about its `"shape"`, which a
        picture of half the size shows, or its `"detail"`, its colour, which only its pattern tells.
        """
        place = f"shape at the {thing.place}"
        if kind == "shape":
            return f"What is the {place}?", f"the {place} is a {thing.shape}"
        return f"What colour is the {place}?", f"the {place} is {thing.colour}"


def random_detailed_scene(rng: random.Random) -> DetailedScene:
    """A detailed scene of one to four things."""
    count = rng.choices((1, 2, 3, 4), weights=(3, 3, 2, 2))[0]
    return _detail(rng, rng.sample([(pattern, shape) for pattern in PATTERNS for shape in SHAPES], count))


def random_twins(rng: random.Random) -> DetailedScene:
    """
    A detailed scene of two things that are alike in all but place and pattern: who mixes up places is right by chance.
    """
    shape, patterns = rng.choice(SHAPES), rng.sample(list(PATTERNS), 2)
    scene = _detail(rng, [(pattern, shape) for pattern in patterns])
    first, second = scene.things
    corner, other = PLACES[first.place], PLACES[second.place]
    twin = replace(
        first,
        colour=second.colour,
        place=second.place,
        left=first.left - corner[0] + other[0],
        top=first.top - corner[1] + other[1],
    )
    return replace(scene, things=(first, twin))


def _detail(rng: random.Random, looks: list[tuple[str, str]]) -> DetailedScene:
    """A scene of things with these patterns and shapes."""
    places = sorted(rng.sample(list(PLACES), len(looks)), key=list(PLACES).index)
    things = []
    for place, (pattern, shape) in zip(places, looks, strict=True):
        thing = random_thing(rng, PATTERN_COLOURS[pattern], shape, rng.choice(list(SIZES)), place)
        things.append(replace(thing, rgb=(GREY,) * 3))
    return DetailedScene(rng.randint(15, 75), tuple(things), tuple(pattern for pattern, _ in looks))


def write_llava_dataset(
    folder: str | Path,
    num_captions: int,
    num_conversations: int,
    num_held_out: int = 500,
    text_only_share: float = 0.03,
    seed: int = 0,
) -> None:
    """
    Writes `captions.json`, `instructions.json`, `held_out.json` and `images/*.png` into `folder`.

    Image paths in the records are relative to `folder / "images"`. No training image is among the held-out ones.

    Args:
        folder (`str` or `Path`): Folder to write, which is made if it does not exist.
        num_captions (`int`): Images with one caption each, for stages I and III.
        num_conversations (`int`): Conversations of four to six questions, for stages II and IV.
        num_held_out (`int`, *optional*, defaults to 500): Images with one question each, the kinds in equal shares.
        text_only_share (`float`, *optional*, defaults to 0.03):
            The share of the conversations that is about a scene in words and has no image.
        seed (`int`, *optional*, defaults to 0): Seed of all that is drawn.
    """
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    progress = tqdm(total=num_captions + num_conversations + num_held_out, desc="Small world", unit="scene")

    rng = random.Random(f"{seed}/held out")
    held_out, records = set(), []
    for index in range(num_held_out):
        scene = random_scene(rng)
        kind = KINDS[index % len(KINDS)]
        question, answer = scene.question(kind, rng)
        name = f"held_out_{index:06d}.png"
        scene.image().save(images / name)
        held_out.add(scene)
        records.append(
            {
                "id": f"held_out_{index:06d}",
                "image": name,
                "kind": kind,
                "question": question,
                "answer": answer,
                "patch_words": scene.true_words(),
            }
        )
        progress.update()
    _write_json(folder / "held_out.json", records)

    rng = random.Random(f"{seed}/captions")
    records = []
    while len(records) < num_captions:
        if (scene := random_scene(rng)) in held_out:
            continue
        name = f"caption_{len(records):06d}"
        scene.image().save(images / f"{name}.png")
        records.append(_record(name, [("<image>", scene.caption())], f"{name}.png"))
        progress.update()
    _write_json(folder / "captions.json", records)

    rng = random.Random(f"{seed}/instructions")
    records = []
    while len(records) < num_conversations:
        if (scene := random_scene(rng)) in held_out:
            continue
        name = f"instruction_{len(records):06d}"
        (question, answer), *rest = scene.conversation(rng)
        if rng.random() < text_only_share:
            words = " ".join(scene.in_words(rng))
            records.append(_record(name, [(f"{words}\n{question}", answer), *rest]))
        else:
            scene.image().save(images / f"{name}.png")
            records.append(_record(name, [(f"<image>\n{question}", answer), *rest], f"{name}.png"))
        progress.update()
    _write_json(folder / "instructions.json", records)
    progress.close()


def write_detailed_dataset(
    folder: str | Path, num_conversations: int, num_held_out: int = 200, max_details: int = 3, seed: int = 0
) -> None:
    """
    Writes `instructions.json`, `held_out.json` and `images/*.png` of the grey world into `folder`.

    Args:
        folder (`str` or `Path`): Folder to write, which is made if it does not exist.
        num_conversations (`int`): Conversations of up to `max_details` questions on detail and one on a shape.
        num_held_out (`int`, *optional*, defaults to 200): Questions of each kind: `detail`, `shape`, and `twins`, on
            the detail of scenes with twins.
        max_details (`int`, *optional*, defaults to 3): See above.
        seed (`int`, *optional*, defaults to 0): Seed of all that is drawn.
    """
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed}/detailed/held out")
    held_out, records = set(), []
    for kind in DETAIL_KINDS:
        for index in range(num_held_out):
            scene = random_twins(rng) if kind == "twins" else random_detailed_scene(rng)
            name = f"{kind}_{index:06d}"
            scene.image().save(images / f"{name}.png")
            held_out.add(scene)
            question, answer = scene.ask_about(rng.choice(scene.things), "shape" if kind == "shape" else "detail")
            records.append({"id": name, "image": f"{name}.png", "kind": kind, "question": question, "answer": answer})
    _write_json(folder / "held_out.json", records)

    rng = random.Random(f"{seed}/detailed/instructions")
    records = []
    progress = tqdm(total=num_conversations, desc="Grey world", unit="scene")
    while len(records) < num_conversations:
        if (scene := random_detailed_scene(rng)) in held_out:
            continue
        name = f"instruction_{len(records):06d}"
        scene.image().save(images / f"{name}.png")
        asked = rng.sample(scene.things, min(max_details, len(scene.things)))
        turns = [scene.ask_about(thing, "detail") for thing in asked]
        turns.append(scene.ask_about(rng.choice(scene.things), "shape"))
        rng.shuffle(turns)
        (question, answer), *rest = turns
        records.append(_record(name, [(f"<image>\n{question}", answer), *rest], f"{name}.png"))
        progress.update()
    _write_json(folder / "instructions.json", records)
    progress.close()


def read_held_out(folder: str | Path) -> list[dict]:
    """
    The held-out questions, in the order they were written.

    Args:
        folder (`str` or `Path`): The folder that `write_llava_dataset` or `write_detailed_dataset` has written.

    Returns:
        `list[dict]`, each with `id`, `image` (a path), `kind`, `question`, `answer`, and, where scenes have no
        detail, `patch_words`: 64 lists in raster order, with the three attribute words of the patch's object,
        `["dark"]` for background, and nothing where an object covers less than half of the patch.
    """
    records = json.loads((Path(folder) / "held_out.json").read_text())
    return [record | {"image": str(Path(folder) / "images" / record["image"])} for record in records]


def _record(name: str, turns: list[tuple[str, str]], image: str | None = None) -> dict:
    conversations = [
        {"from": speaker, "value": value}
        for question, answer in turns
        for speaker, value in (("human", question), ("gpt", answer))
    ]
    return {"id": name} | ({"image": image} if image else {}) | {"conversations": conversations}


def _write_json(path: Path, records: list[dict]) -> None:
    path.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("folder", help="where captions.json, instructions.json, held_out.json and images/ go")
    parser.add_argument("--num-captions", type=int, default=2000)
    parser.add_argument("--num-conversations", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_llava_dataset(args.folder, args.num_captions, args.num_conversations, seed=args.seed)
