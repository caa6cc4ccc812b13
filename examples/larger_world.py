"""
The larger world: scenes of the small world's kind in which more can be seen and more can be asked.

Up to six things lie at six places, have textures, and cover one another. Beside the questions of the small world there
are those for a texture, for what is next to a thing in a direction, and for what is covered. Pictures and patches have
the same sizes, and all that reads a `Scene` reads these.

    python examples/larger_world.py scenes.png

draws twelve of them.
"""

import argparse
import random
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from PIL import Image
from small_world import COLOURS, IMAGE_SIZE, SHAPES, WORD_PIXELS, Scene, Thing


SIZES = {"small": (14, 17), "large": (21, 25)}  # shortest and longest side of the bounding box, in pixels
COLUMNS, ROWS = ("left", "middle", "right"), ("top", "bottom")
CELL = (IMAGE_SIZE // len(COLUMNS), IMAGE_SIZE // len(ROWS))  # width and height of a place, in pixels
PLACES = {
    f"{row} {column}": (x * CELL[0], y * CELL[1]) for y, row in enumerate(ROWS) for x, column in enumerate(COLUMNS)
}
REACH = 4  # how many pixels a thing may lie outside of its place
TEXTURES = ("plain", "striped", "dotted")
ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES}
SHADE = 0.45  # brightness of stripes and dots, as a share of the thing's own
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
COVERED_SHARE = 0.08  # of a covered thing's pixels that others hide, at least
VISIBLE_SHARE = 0.6  # of any thing's pixels that are seen, at least

KINDS = ("colour", "shape", "texture", "count", "exists", "where", "relation", "covered", "describe")


@dataclass(frozen=True)
class TexturedThing(Thing):
    """
    Args:
        texture (`str`): As `TEXTURES` names it.
        is_covered (`bool`): Whether other things hide a part of it.
    """

    texture: str
    is_covered: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The attribute words that are true of each of the thing's patches."""
        return self.colour, self.shape, self.size, self.texture, *(["covered"] if self.is_covered else [])

    def paint(self, pixels: np.ndarray) -> None:
        """Draws the thing over what is in a picture `[64, 64, 3]`."""
        y, x = np.ogrid[:IMAGE_SIZE, :IMAGE_SIZE]
        y, x, mask = y - self.top, x - self.left, self.mask()
        pixels[mask] = self.rgb
        if self.texture != "plain":
            dark = (x + y) % 6 < 3 if self.texture == "striped" else (x % 5 < 2) & (y % 5 < 2)
            pixels[mask & dark] = [round(SHADE * channel) for channel in self.rgb]


@dataclass(frozen=True)
class LargerScene(Scene):
    """
    One picture of the larger world: one to six things, no two alike in both colour and shape.

    Args:
        order (`tuple[int, ...]`): The things from the one at the back to the one in front.
    """

    order: tuple[int, ...]

    kinds = KINDS
    numbers = NUMBERS

    def image(self) -> Image.Image:
        """The picture, 64x64 pixels in RGB."""
        pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), self.grey, dtype=np.uint8)
        for index in self.order:
            self.things[index].paint(pixels)
        return Image.fromarray(pixels)

    def replace_thing(self, index: int, rng: random.Random, **attributes: str) -> "LargerScene":
        """A scene with another thing in place of one, of these attributes. All of its things move a little."""
        kept = [
            {name: getattr(thing, name) for name in (*ATTRIBUTES, "place")}
            for thing in (*self.things[:index], *self.things[index + 1 :])
        ]
        return arrange(rng, sorted([*kept, attributes], key=lambda each: list(PLACES).index(each["place"])))

    def masks(self) -> list[np.ndarray]:
        """The pixels that show each thing, `[64, 64]` each: those that nothing in front of it hides."""
        masks, hidden = [thing.mask() for thing in self.things], np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        for index in reversed(self.order):
            masks[index], hidden = masks[index] & ~hidden, masks[index] | hidden
        return masks

    def caption(self) -> str:
        """A caption that names every thing with its place and all its attributes."""
        return ", ".join(
            " ".join([f"at the {thing.place} a", *(["covered"] if thing.is_covered else []), thing.size])
            + f" {thing.texture} {thing.colour} {thing.shape}"
            for thing in self.things
        )

    def find_next(self, thing: Thing, direction: str) -> Thing | None:
        """The first thing that is in a direction of `DIRECTIONS` from another, in its row or its column."""
        found = {other.place: other for other in self.things}
        row, column = thing.place.split()
        x, y = COLUMNS.index(column), ROWS.index(row)
        across, down = DIRECTIONS[direction]
        while 0 <= (x := x + across) < len(COLUMNS) and 0 <= (y := y + down) < len(ROWS):
            if (place := f"{ROWS[y]} {COLUMNS[x]}") in found:
                return found[place]
        return None

    def _ask_texture(self, rng: random.Random) -> tuple[str, str]:
        thing = rng.choice(self.things)
        name = rng.choice([f"shape at the {thing.place}", *self.names(thing, "colour", "shape")])
        return f"What texture is the {name}?", f"{self._found(name, thing)} is {thing.texture}"

    def _ask_relation(self, rng: random.Random) -> tuple[str, str]:
        pairs = list(product(self.things, DIRECTIONS))
        rng.shuffle(pairs)
        # Mostly one that has an answer, if there is one.
        pairs.sort(key=lambda pair: self.find_next(*pair) is None, reverse=rng.random() < 0.2)
        thing, direction = pairs[0]
        other = self.find_next(thing, direction)
        name = rng.choice(self.names(thing, "colour", "shape"))
        return f"What is {direction} the {name}?", self._name(other) if other else "nothing"

    def _ask_covered(self, rng: random.Random) -> tuple[str, str]:
        covered = [self._name(thing) for thing in self.things if thing.is_covered]
        return "What is covered?", ", ".join(covered) or "nothing"

    def _name(self, thing: Thing) -> str:
        return f"at the {thing.place} the {thing.colour} {thing.shape}"


def random_thing(rng: random.Random, colour: str, shape: str, size: str, place: str, texture: str) -> TexturedThing:
    """A thing with these attributes, somewhere at its place."""
    rgb = tuple(min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLOURS[colour])
    side = rng.randint(*SIZES[size])
    left, top = (
        rng.randint(max(start - REACH, 0), min(max(start + cell - side, start) + REACH, IMAGE_SIZE - side))
        for start, cell in zip(PLACES[place], CELL, strict=True)
    )
    return TexturedThing(colour, shape, size, place, rgb, left, top, side, texture)


def random_scene(rng: random.Random) -> LargerScene:
    """A scene of one to six things."""
    count = rng.choices(range(1, 7), weights=(2, 3, 3, 3, 2, 2))[0]
    places = sorted(rng.sample(list(PLACES), count), key=list(PLACES).index)
    looks = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    return arrange(
        rng,
        [
            {"colour": colour, "shape": shape, "place": place, "size": rng.choice(list(SIZES))}
            | {"texture": rng.choice(TEXTURES)}
            for (colour, shape), place in zip(looks, places, strict=True)
        ],
    )


def arrange(rng: random.Random, attributes: list[dict[str, str]]) -> LargerScene:
    """A scene of things with these attributes, in raster order of places. What is said of each of them can be seen."""
    while True:
        things = tuple(random_thing(rng, **each) for each in attributes)
        scene = LargerScene(rng.randint(15, 75), things, tuple(rng.sample(range(len(things)), len(things))))
        shares = [seen.sum() / thing.mask().sum() for seen, thing in zip(scene.masks(), things, strict=True)]
        covered = [replace(thing, is_covered=bool(share < 1)) for thing, share in zip(things, shares, strict=True)]
        scene = replace(scene, things=tuple(covered))
        # A few hidden pixels would leave open whether a thing is covered.
        is_plain = all(share == 1 or VISIBLE_SHARE <= share < 1 - COVERED_SHARE for share in shares)
        owners = scene.find_owners(WORD_PIXELS).tolist()
        if is_plain and all(owners.count(index) >= len(thing.words) for index, thing in enumerate(scene.things)):
            return scene


def draw(path: str, columns: int = 6, rows: int = 2, scale: int = 2, gap: int = 8) -> None:
    """Writes a picture of some scenes of three things or more."""
    rng, side = random.Random(3), scale * IMAGE_SIZE
    picture = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), "white")
    for row, column in product(range(rows), range(columns)):
        while len((scene := random_scene(rng)).things) < 3:
            pass
        image = scene.image().resize((side, side), Image.Resampling.NEAREST)
        picture.paste(image, (column * (side + gap) + gap, row * (side + gap) + gap))
    picture.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="file to write")
    draw(parser.parse_args().picture)
