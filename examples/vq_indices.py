"""
Codebook indices of every image of a data set in LLaVA's format, for VLSA's questions on them: computed once, by the
VQ-VAE of Improved VQ-Diffusion or any other `VQModel` of diffusers, and written to a file that training maps.

    python examples/vq_indices.py llava_v1_5_mix665k.json images indices.npy

Images become squares, whatever their shape, so that a place in hundredths of width and height is the same place of
the map of indices. Each image file is encoded once, in however many conversations it is. A run that was killed goes on
from its last batch when it is started again.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from tqdm import tqdm

from processing_vwlmm import load_llava_dataset
from processing_vwlmm.images_vwlmm import convert_to_rgb, open_image
from processing_vwlmm.vq_indices import VQIndices, compute_digest, write_description


MODEL, SUBFOLDER = "microsoft/vq-diffusion-ithq", "vqvae"
IMAGE_SIZE = 256
LARGEST_CODEBOOK = 2**16  # what uint16 can count


class ImageFiles(torch.utils.data.Dataset):
    """Images as squares of pixels from -1 to 1, `[3, size, size]`, with the digests of their files."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths = paths
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        content = Path(self.paths[index]).read_bytes()
        try:
            image = convert_to_rgb(open_image(content))
        except ValueError as error:
            raise ValueError(f"{self.paths[index]}: {error}") from error
        image = image.resize((self.size, self.size), PIL.Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)  # [3, size, size]
        return pixels.float() / 127.5 - 1, compute_digest(content)


def load_vq_model(name: str, subfolder: str | None = None) -> Any:
    """
    A `VQModel` of diffusers.

    Args:
        name (`str`): On the Hub, or a local folder.
        subfolder (`str`, *optional*): Where in it the model lies; by default `vqvae` if it is not at the top.

    Raises:
        ImportError: If diffusers is missing.
        ValueError: If there is no such model, or its codebook is too large for the file.
    """
    try:
        from diffusers import VQModel
    except ImportError as error:
        raise ImportError(
            f"Codebook indices are computed by diffusers, which cannot be imported ({error}). Install it, with Python "
            '3.11 or later: pip install "diffusers>=0.42"'
        ) from error
    if subfolder is None and not Path(name, "config.json").is_file():
        subfolder = SUBFOLDER
    try:
        vq = VQModel.from_pretrained(name, subfolder=subfolder)
    except (OSError, ValueError) as error:
        place = name if subfolder is None else f"{name}, subfolder {subfolder}"
        raise ValueError(
            f"There is no VQ model to be loaded from {place}: {error}. If it is gated, accept its terms and log in "
            "with `hf auth login`; without a network pass a local folder as `--model`."
        ) from error
    if vq.config.num_vq_embeddings > LARGEST_CODEBOOK:
        raise ValueError(
            f"The codebook of {name} has {vq.config.num_vq_embeddings} entries, and the file holds indices up to "
            f"{LARGEST_CODEBOOK - 1}. Take a model with a smaller codebook."
        )
    return vq.eval().requires_grad_(False)


def compute_model_digest(vq: Any) -> str:
    """Of a model's config and weights, so that models with one name are told apart."""
    config = {name: value for name, value in vq.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vq.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def encode(vq: Any, pixels: torch.Tensor) -> torch.Tensor:
    """
    The nearest codebook entries (Euclidean; VLSA's equation 5) of images.

    Args:
        vq (`diffusers.VQModel`): The model.
        pixels (`torch.Tensor` of shape `[B, 3, H, W]`): From -1 to 1.

    Returns:
        `torch.Tensor` of shape `[B, h', w']`
    """
    latents = vq.encode(pixels.to(vq.device)).latents  # [B, d', h', w'], not quantised yet
    return quantize(vq.quantize, latents)


def quantize(quantizer: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents, `[B, d', h', w']`, as indices, `[B, h', w']`, by diffusers' `VectorQuantizer`."""
    indices = quantizer(latents)[2][2]  # [B * h' * w'], in raster order
    return indices.reshape(len(latents), *latents.shape[2:])


def find_images(json_file: str, image_folder: str, on_bad_image: str = "raise") -> dict[str, str]:
    """The paths of all images of a data set by their names, which are relative to its folder, each once."""
    dataset = load_llava_dataset(json_file, image_folder, on_bad_image)
    images = dataset.select_columns("images").with_format("arrow")[:]["images"].combine_chunks().flatten()
    folder = str(Path(image_folder).resolve())
    paths = pa.compute.unique(images.field("path")).to_pylist()
    return {Path(path).relative_to(folder).as_posix(): path for path in paths}


def compute_file(
    out: str | os.PathLike,
    images: dict[str, str],
    vq: Any,
    model: str,
    image_size: int = IMAGE_SIZE,
    batch_size: int = 32,
    num_workers: int = 0,
) -> VQIndices:
    """
    Writes the indices of images to `out` and what they are of to a `.json` beside it. Goes on where an earlier run of
    the same images by the same model has ended.

    Args:
        out (`str` or `os.PathLike`): A `.npy` file.
        images (`dict[str, str]`): Paths by name.
        vq (`diffusers.VQModel`): The model.
        model (`str`): Its name.
        image_size (`int`, *optional*, defaults to 256): Side of the squares that it encodes.
        batch_size, num_workers (`int`, *optional*): Images of a batch, and processes that read them.

    Returns:
        [`VQIndices`]

    Raises:
        ValueError: If what is there already is of other images or another model or no indices, if there is no folder
            or no image, or if the model cannot encode images of that size.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"The output is {out}, expected a `.npy` file.")
    if not out.parent.is_dir():
        raise ValueError(f"The output is {out}, and there is no folder {out.parent}. Make it first.")
    description = out.with_suffix(".json")
    if description.exists() and not (out.exists() or out.with_suffix(".npy.unfinished").exists()):
        raise ValueError(
            f"{description}, where the description of {out} goes, is there already, and no {out.name} beside it: it "
            "may be your data. Write to another file, or delete it."
        )
    if not images:
        raise ValueError("The data set has no images, so that there are no indices to compute.")
    try:
        grid = [*encode(vq, torch.zeros(1, 3, image_size, image_size)).shape[1:]]
    except RuntimeError as error:
        raise ValueError(f"{model} does not encode images of {image_size} x {image_size} pixels: {error}.") from error
    fields = {
        "model": model,
        "model_digest": compute_model_digest(vq),
        "codebook_size": vq.config.num_vq_embeddings,
        "grid": grid,
        "image_size": image_size,
    }
    header = fields | {"images": hashlib.sha256("\0".join(images).encode()).hexdigest()[:16]}
    unfinished, journal = out.with_suffix(".npy.unfinished"), out.with_suffix(".npy.progress")
    if out.exists() and not unfinished.exists():
        _check_is_same(VQIndices(out), fields, images)
        journal.unlink(missing_ok=True)
        return VQIndices(out)

    digests = _read_journal(journal, header) if unfinished.exists() else []
    if not digests:
        journal.unlink(missing_ok=True)
    indices = np.lib.format.open_memmap(
        unfinished,
        "r+" if digests else "w+",
        **({} if digests else {"dtype": np.uint16, "shape": (len(images), *grid)}),
    )  # [images, h', w']
    files = ImageFiles([*images.values()][len(digests) :], image_size)
    loader = torch.utils.data.DataLoader(files, batch_size, num_workers=num_workers)
    with (
        open(journal, "a") as file,
        tqdm(total=len(images), initial=len(digests), desc="Encoding images", unit="image") as progress,
    ):
        if not digests:
            _write_line(file, header)
        for pixels, new in loader:
            indices[len(digests) : len(digests) + len(new)] = encode(vq, pixels).cpu().numpy()
            indices.flush()  # before the journal says so
            digests += new
            _write_line(file, list(new))
            progress.update(len(new))
    write_description(out, dict(zip(images, digests, strict=True)), indices, fields)
    del indices
    os.replace(unfinished, out)
    journal.unlink()
    return VQIndices(out)


def _write_line(file: Any, value: Any) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _read_journal(journal: Path, header: dict[str, Any]) -> list[str]:
    """The digests of the images that are done. What a kill has cut off at its end is removed from the file."""
    if not journal.exists():
        return []
    lines = journal.read_bytes().split(b"\n")[:-1]  # behind the last newline lies what was cut off
    if not lines:
        return []
    found, *batches = map(json.loads, lines)
    for name, value in header.items():
        if found.get(name) != value:
            raise ValueError(
                f"{journal} is of a run with `{name}` {found.get(name)!r}, and this one has {value!r}. Give the same "
                "data set and model to go on, write to another file, or delete it to begin anew."
            )
    with open(journal, "r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return [digest for batch in batches for digest in batch]


def _check_is_same(indices: VQIndices, fields: dict[str, Any], images: dict[str, str]) -> None:
    for name, value in fields.items():
        found = getattr(indices, name)
        if (list(found) if name == "grid" else found) != value:
            raise ValueError(
                f"{indices.path} is there already, with `{name}` {found!r}, and this run has {value!r}: it is of "
                "another VQ model. Write to another file, or delete it."
            )
    if [*indices.images] != [*images]:
        raise ValueError(
            f"{indices.path} is there already, with {len(indices)} images of another data set than these "
            f"{len(images)}. Write to another file, or delete it."
        )


def main(args: list[str] | None = None) -> None:
    """Computes the file that the command line, or `args` in its place, describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json_file", help="data in LLaVA's format")
    parser.add_argument("image_folder", help="folder of its images")
    parser.add_argument("out", help="the .npy file to write; what it is of goes to a .json beside it")
    parser.add_argument("--model", default=MODEL, help="VQModel of diffusers: a name on the Hub, or a local folder")
    parser.add_argument("--subfolder", help=f"where it lies in there; by default {SUBFOLDER} if not at the top")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="side of the squares that are encoded")
    parser.add_argument("--batch-size", type=int, default=32, help="images that are encoded at once")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--on-bad-image", default="raise", choices=("raise", "skip"), help="as in training")
    options = parser.parse_args(args)
    if Path(options.out).with_suffix(".json").absolute() == Path(options.json_file).absolute():
        parser.error(f"what {options.out} is of would go to {options.json_file}, your data; choose another name")
    vq = load_vq_model(options.model, options.subfolder).to(options.device)  # first: reading may take minutes
    images = find_images(options.json_file, options.image_folder, options.on_bad_image)
    indices = compute_file(
        options.out, images, vq, options.model, options.image_size, options.batch_size, options.num_workers
    )
    height, width = indices.grid
    print(
        f"{options.out}: {height} x {width} indices of {len(indices)} images, a codebook of {indices.codebook_size} "
        "entries"
    )


if __name__ == "__main__":
    main()
