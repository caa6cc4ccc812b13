"""
`examples/train.py`, with the controls of the experiment among its objectives: `no_words`, `other_image` and
`uniform_words`.

    python examples/experiment/train_arm.py --config RECIPE --visual_objective '{"other_image": 0.3}'
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import objectives  # noqa: F401  makes the controls known
import train


if __name__ == "__main__":
    train.main()
