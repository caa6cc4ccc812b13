# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The tests that Transformers runs on every model of its own, importable as the package `transformers_tests`.

They are not installed with Transformers. They come from the source distribution of the installed version, which is
downloaded once into `.cache`. It lacks four modules that they import, and stand-ins take their place:

- `exporters.test_export` and `generation.test_utils`: classes without tests. So the export and the generation tests
  are NOT run here; tests/test_generation.py tests generation. `test_generation_tester_mixin_inheritance` says nothing.
- `utils.test_configuration_utils`: a table that no test of a configuration made of others, as these are, reads.
- `distributed_testing_utils`: how the FSDP tests start their processes, written here for processes on the CPU.
"""

import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.multiprocessing
import transformers
from transformers import AutoModelForImageTextToText


VERSION = transformers.__version__
CACHE = Path(__file__).parents[2] / ".cache"
TESTS = CACHE / f"transformers-{VERSION}" / "tests"
RANKS_TIMEOUT = 180


def download() -> None:
    """Fetches and unpacks the tests, unless they are there."""
    if TESTS.is_dir():
        return
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # whole or not there: the last step is one rename
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
        subprocess.run(
            [*pip, "--no-deps", "--no-build-isolation", "--no-binary", "transformers", f"transformers=={VERSION}"],
            check=True,
        )
        (archive,) = Path(folder).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if "/tests/" in member.name]
            tar.extractall(folder, members=members, filter="data")
        (Path(folder) / TESTS.parent.name / "tests" / "__init__.py").touch()  # lacking, and looked for
        (Path(folder) / TESTS.parent.name).rename(TESTS.parent)


def _run_rank(rank: int, function: Callable, *args) -> None:
    # Unpickling this has imported this module, so the process knows the tests.
    function(rank, *args)


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    ranks = torch.multiprocessing.start_processes(
        _run_rank, (function, *args), nprocs, join=False, start_method="spawn"
    )
    try:
        deadline = time.monotonic() + RANKS_TIMEOUT
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:  # one has failed where the others wait for it
                raise TimeoutError(f"The {nprocs} processes were not done after {RANKS_TIMEOUT} seconds.")
    finally:
        for process in ranks.processes:
            process.kill()


def _import_as_package() -> None:
    stand_ins = {
        "": {"__path__": [str(TESTS)]},
        ".exporters": {"__path__": []},
        ".exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        ".generation": {"__path__": []},
        ".generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        ".utils": {"__path__": []},
        ".utils.test_configuration_utils": {"config_common_kwargs": {}},
        ".distributed_testing_utils": {
            "_get_distributed_backend": lambda: "gloo",
            "_get_distributed_device_type": lambda: "cpu",
            "_get_rank_device": lambda rank: torch.device("cpu"),
            "_set_rank_device": lambda rank: None,
            "_start_rank_processes": _start_rank_processes,
        },
    }
    for name, attributes in stand_ins.items():
        module = sys.modules[f"transformers_tests{name}"] = ModuleType(f"transformers_tests{name}")
        vars(module).update(attributes)


download()
_import_as_package()

from transformers_tests import test_fsdp_mixin  # noqa: E402  (importable from here on)


# The FSDP tests are made for decoders, and by default for a few of them. Processes that they start import this, too.
test_fsdp_mixin.AutoModelForCausalLM = AutoModelForImageTextToText
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
