"""
Writes the app as a Space: a folder that needs nothing of this repository, to push to the Hub.

    python examples/write_space.py runs/space
    hf upload your-name/visual-words runs/space . --repo-type space

The demos' checkpoints that are there go with it. The Space's variable `VWLMM_CHECKPOINTS` names others on the Hub.
"""

import argparse
import shutil
from pathlib import Path

from app_models import DEMOS
from push_to_hub import IGNORED


EXAMPLES = Path(__file__).resolve().parent
FILES = ("app.py", "app.css", "app_models.py", "app_patches.py", "prompt_length.py", "small_world.py")
SPACE_FILES = ("README.md", "requirements.txt")
# Folders of packages, by the names under which they are imported.
PACKAGES = {"modeling_vwlmm": "modeling_vwlmm", "processing_vwlmm": "processing"}


def main(arguments: list[str] | None = None) -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the Space goes; what it had of it before is replaced")
    folder = parser.parse_args(arguments).folder
    if folder.resolve() in (Path.cwd(), EXAMPLES, EXAMPLES.parent):  # where what is copied would be deleted first
        parser.error(f"{folder} holds what the Space is made of; expected a folder of its own, such as runs/space.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(EXAMPLES / name, folder / name)
    for name in SPACE_FILES:
        shutil.copy(EXAMPLES / "space" / name, folder / name)
    copies = {name: (EXAMPLES.parent / source, ["__pycache__"]) for name, source in PACKAGES.items()}
    demos = [checkpoint for _, checkpoint, _ in DEMOS if (Path(checkpoint) / "config.json").is_file()]
    copies |= {checkpoint: (checkpoint, IGNORED) for checkpoint in demos}
    for name, (source, ignored) in copies.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*ignored))
    print(f"The Space is at {folder}. It has {', '.join(copies)}.")


if __name__ == "__main__":
    main()
