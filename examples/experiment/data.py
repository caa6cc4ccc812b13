"""
Data of the experiment: a world without some combinations of colour and shape, and questions on scenes like those of
training, on such combinations, on more objects and on noisy pictures.

Everything is in LLaVA's format. Training data depend on the seed of a replicate; questions are the same for all.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import larger_world
import numpy as np
import small_world
from PIL import Image
from small_world import Scene


WORLDS = {"small": small_world, "larger": larger_world}
NOISE = 40  # standard deviation of a pixel's noise, of 255
PLACEHOLDER = "<image>"


def get_world(plan: dict[str, Any], setting: str) -> str:
    """Where the scenes of a setting are from, a name of `WORLDS`."""
    return plan["settings"][setting].get("world", "small")


def draw_scene(world: str, rng: random.Random, is_wanted: Callable[[Scene], bool]) -> Scene:
    """The first scene that is wanted."""
    while not is_wanted(scene := WORLDS[world].random_scene(rng)):
        pass
    return scene


def is_crowded(scene: Scene, world: str) -> bool:
    """Whether a scene has as many things as the world has places. None that is trained on has."""
    return len(scene.things) == len(WORLDS[world].PLACES)


def shows(scene: Scene, looks: list[list[str]]) -> bool:
    """Whether a scene shows one of these combinations of colour and shape."""
    return any([thing.colour, thing.shape] in looks for thing in scene.things)


def write_questions(
    folder: Path, num_main: int, num_others: int, held_out_looks: list[list[str]], world: str = "small"
) -> None:
    """
    Writes `main.json`, `new_combinations.json`, `more_objects.json`, `noise.json` and their images into `folder`.

    Args:
        folder (`Path`): Folder to write.
        num_main (`int`): Questions on scenes like those of training, the kinds in equal shares.
        num_others (`int`): Questions of each other set. Those of `noise` are the first of `main`.
        held_out_looks (`list[list[str]]`): Pairs of colour and shape that no scene but `new_combinations` shows.
        world (`str`, *optional*, defaults to `"small"`): Of `WORLDS`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    wanted = {
        "main": lambda scene: not is_crowded(scene, world) and not shows(scene, held_out_looks),
        "new_combinations": lambda scene: not is_crowded(scene, world) and shows(scene, held_out_looks),
        "more_objects": lambda scene: is_crowded(scene, world) and not shows(scene, held_out_looks),
    }
    for name, is_wanted in wanted.items():
        rng = random.Random(f"questions/{name}")
        records = []
        for index in range(num_main if name == "main" else num_others):
            scene = draw_scene(world, rng, is_wanted)
            kind = scene.kinds[index % len(scene.kinds)]
            question, answer = scene.question(kind, rng)
            record = {"id": f"{name}_{index:04d}", "image": f"{name}_{index:04d}.png"}
            scene.image().save(folder / "images" / record["image"])
            turns = [{"from": "human", "value": f"{PLACEHOLDER}\n{question}"}, {"from": "gpt", "value": answer}]
            records.append(record | {"kind": kind, "question": question, "answer": answer, "conversations": turns})
            records[-1]["patch_words"] = scene.true_words()
        write_json(folder / f"{name}.json", records)
        if name == "main":
            write_json(folder / "noise.json", [_add_noise(record, folder) for record in records[:num_others]])


def _add_noise(record: dict, folder: Path) -> dict:
    name = f"noise_{record['image']}"
    pixels = np.asarray(Image.open(folder / "images" / record["image"])).astype(float)
    pixels += np.random.default_rng([ord(letter) for letter in record["id"]]).normal(0, NOISE, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
    return record | {"image": name}


def read_questions(folder: Path, name: str) -> list[dict]:
    """The questions of a set, with the paths of their images."""
    records = json.loads((folder / f"{name}.json").read_text())
    return [record | {"image": str(folder / "images" / record["image"])} for record in records]


def write_training_data(
    folder: Path, sizes: dict[str, int], held_out_looks: list[list[str]], seed: int, world: str = "small"
) -> None:
    """
    Writes `captions.json`, `conversations.json` and `images.json`, pictures without text, into `folder`. In each
    record `image_labels` are the true words of the patches: a random attribute of the object, the background's word,
    or none at an object's border.

    Args:
        folder (`Path`): Folder to write.
        sizes (`dict[str, int]`): Records of each of the three, by the names of the files.
        held_out_looks (`list[list[str]]`): Pairs of colour and shape that no scene shows.
        seed (`int`): Of all that is drawn.
        world (`str`, *optional*, defaults to `"small"`): Of `WORLDS`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        rng, records = random.Random(f"{seed}/{name}"), []
        for index in range(size):
            scene = draw_scene(world, rng, lambda s: not is_crowded(s, world) and not shows(s, held_out_looks))
            record = {"id": f"{name}_{index:05d}", "image": f"{name}_{index:05d}.png"}
            scene.image().save(folder / "images" / record["image"])
            if name == "captions":
                turns = [(PLACEHOLDER, scene.caption())]
            elif name == "conversations":
                (question, answer), *rest = scene.conversation(rng)
                turns = [(f"{PLACEHOLDER}\n{question}", answer), *rest]
            else:
                turns = [(PLACEHOLDER, None)]
            values = [(side, text) for turn in turns for side, text in zip(("human", "gpt"), turn, strict=True)]
            record["conversations"] = [{"from": side, "value": text} for side, text in values if text is not None]
            record["image_labels"] = [[rng.choice(words) if words else -100 for words in scene.true_words()]]
            records.append(record)
        write_json(folder / f"{name}.json", records)


def write_json(path: Path, records: list[dict]) -> None:
    """Writes records, one a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
