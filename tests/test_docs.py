# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Every code block of README.md, CONTRIBUTING.md and docs/ runs as it is printed, and every name in the sentences of
README.md and docs/ exists.

`read_docs.py` reads each page from its top, in a process and a folder of its own. What lies in the folder is made by
the fixture `folder`, what the pages name on the Hub by the fixture `models`: small checkpoints of the same
architectures, behind a stand-in for the Hub. No block is skipped.
"""

import ast
import builtins
import dataclasses
import importlib
import inspect
import io
import json
import operator
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import NamedTuple, get_args

import peft
import pytest
import torch
import transformers
import trl
from conftest import GOLDEN, make_image, tiny_text, tiny_vision
from read_docs import LOOKED_UP
from test_backbones import save_decoder, save_tower
from test_from_llava import make_llava
from test_model_card import environment, hub  # noqa: F401
from trl import ModelConfig, TrlParser

import modeling_vwlmm
import processing_vwlmm
from modeling_vwlmm import (
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    VWLMMVisualTokenizer,
    VWLMMVisualTokenizerConfig,
    adapters_vwlmm,
    inspection,
    lens,
    loss_vwlmm,
    objectives_vwlmm,
    outputs_vwlmm,
    visualization,
)
from modeling_vwlmm.training.stages import METHODS, MODULES
from modeling_vwlmm.training.training_modules import FOLDER as TRAINING_MODULES
from processing_vwlmm import VWLMMProcessor, chat_templates_vwlmm


ROOT = Path(__file__).parents[1]
PAGES = sorted(["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])

# What is done with a block, by the word behind its fence. A word that is not here fails.
KINDS = {
    "python": "python",  # runs, in the namespace of its page
    "bash": "shell",  # runs, or is checked by the program's own parser: `PROGRAMS` in read_docs.py
    "yaml": "recipe",  # `examples/train.py` takes a step with it
    "bibtex": "citation",  # is an entry with the paper's number, which the page links
    "": "layout",  # names the repository's folders, all of them
}


class Change(NamedTuple):
    """`old` becomes `new`, in every block of the page that has it."""

    page: str
    old: str
    new: str
    why: str


# A few steps of what would take days.
TINY = '"max_steps": 4, "global_batch_size": 4, "per_device_train_batch_size": 4, "use_cpu": True'
CHANGES = [
    Change(
        "docs/change_the_method.md",
        '"runs/contrastive",\n',
        '"runs/contrastive",\n        logging_steps=1,\n',
        "so few data are one step, and a comment says what is logged",
    ),
    Change("docs/lavit.md", "num_codes=16384", "num_codes=4", "fewer than the features of so few images"),
    Change(
        "docs/lavit.md",
        '"max_steps": 45_000, "global_batch_size": 2048, "per_device_train_batch_size": 64',
        TINY,
        "days",
    ),
    Change(
        "docs/lavit.md",
        '"max_steps": 12_000, "global_batch_size": 2048, "per_device_train_batch_size": 8',
        TINY,
        "days",
    ),
    Change("docs/use_with.md", "localhost:8000", "localhost:{port}", "the port may be taken"),
    Change("docs/use_with.md", 'model="vwlmm"', 'model="runs/small_world/stage4"', "not vLLM answers, see `vllm`"),
]

# What a script is told beside its own arguments.
OPTIONS = {
    "examples/train.py": ["--dataloader_num_workers", "0"],  # the recipe's eight would have one sample each
    # The rest of a recipe, where a block has some of its lines.
    "block.yaml": shlex.split(
        "--model_name_or_path runs/stage3 --json_file data/instructions.json --image_folder data/images"
    ),
}


class Claim(NamedTuple):
    """Behind the block of the page that has `text`, `expression` is true in the page's namespace."""

    page: str
    text: str
    expression: str


LOAD = '__import__("modeling_vwlmm").VWLMMForConditionalGeneration.from_pretrained("{}")'
ALL_STAGES = LOAD + ".config.trained_stages == [1, 2, 3, 4]"
CLAIMS = [
    Claim(
        "README.md",
        "pipeline(",
        'type(vwlmm.model).__module__.startswith("transformers_modules.") '
        'and not {"modeling_vwlmm", "processing_vwlmm"} & set(__import__("sys").modules)',
    ),
    Claim("docs/quickstart.md", "top_k=3", "words.token_ids.shape == words.probabilities.shape == (1, 16, 3)"),
    Claim("docs/quickstart.md", "top_k=3", "nearest.shape == (1, 16)"),
    Claim("docs/quickstart.md", "inspect_image(", "inspected.grid == (4, 4) and inspected.get_kl().min() >= 0"),
    Claim("README.md", "conversion", LOAD.format("path/to/output")),
    Claim("README.md", "accelerate launch", ALL_STAGES.format("runs/vicuna_7b/stage4")),
    Claim(
        "docs/change_the_method.md",
        "trainer.train()  # logs contrastive_loss, contrastive_cosine, visual_words_loss, language_loss, visual_loss",
        '{"contrastive_loss", "contrastive_cosine", "visual_words_loss", "language_loss", "visual_loss"} '
        "<= trainer.state.log_history[0].keys()",
    ),
    Claim(
        "docs/change_the_method.md",
        'adapter="gated_mlp"',
        "isinstance(model.model.multi_modal_projector, GatedMLP) and model.model.multi_modal_projector.up.out_features"
        " == 512",
    ),
    Claim("docs/from_llava.md", "runs/from_llava/stage4", ALL_STAGES.format("runs/from_llava/stage4")),
    Claim("docs/lavit.md", "webdataset", "tokenizer.config.threshold and model.config.trained_stages == ['lavit-2']"),
    Claim("docs/lens.md", "modeling_vwlmm.lens", 'os.path.getsize("lens.html") > 10_000'),
    Claim("docs/lens.md", "get_top_words", "words.token_ids.shape == words.values.shape == (16, 3)"),
    Claim("docs/lens.md", "build_index", "len(neighbours) == 16 and neighbours[0][0].caption in captions"),
    Claim("docs/training.md", "stage=1", "trainer.model.config.trained_stages == [1]"),
    Claim("docs/training.md", "stage=1", 'os.path.isfile("runs/stage1/model.safetensors")'),
    Claim(
        "docs/training.md",
        "LoraConfig(",
        '{"adapter_model.safetensors", "processor_config.json"} <= set(os.listdir("runs/stage4_lora"))',
    ),
    Claim("docs/training.md", "merge_and_unload", ALL_STAGES.format("runs/stage4")),
    Claim("docs/training.md", "DPOTrainer(", "trainer.state.global_step > 0"),
    Claim("docs/visualization.md", "draw_image(", 'os.path.isfile("words.png")'),
    Claim(
        "docs/visualization.md",
        "--visual_words_images",
        'os.listdir("runs/small_world/stage4/figures") == ["step_000001.png"]',
    ),
    Claim("docs/vlsa.md", "llavar_422k", 'len(own) == sum("image" in record for record in records) > 0'),
    Claim(
        "docs/vlsa.md",
        "launch zero3 stage3",
        'VWLMMForConditionalGeneration.from_pretrained("runs/llama3_8b_vlsa/stage3").config.trained_stages '
        '== ["vlsa-1", "vlsa-2", "vlsa-3"]',
    ),
    Claim("docs/use_with.md", "output = model.generate", 'output.shape[1] > inputs["input_ids"].shape[1]'),
    Claim(
        "docs/use_with.md",
        "four_bits",
        "model.is_loaded_in_4bit and model.lm_head.weight.is_floating_point() "
        "and model.model.vm_head.weight.is_floating_point()",
    ),
    Claim("docs/use_with.md", "tower, llm", 'VWLMMForConditionalGeneration.from_pretrained("runs/stage0")'),
    Claim("docs/use_with.md", "temperature=0", "answer.choices[0].message.content"),
    Claim("docs/use_with.md", "merge_and_unload", ALL_STAGES.format("runs/stage4_merged")),
    Claim("docs/use_with.md", "stage4_again", ALL_STAGES.format("runs/stage4_again")),
    Claim(
        "docs/use_with.md",
        "push_to_hub.py",
        '__import__("huggingface_hub").file_exists("your-name/vwlmm-small-world", "model.safetensors")',
    ),
    Claim(
        "docs/use_with.md",
        "trainer.push_to_hub",
        '__import__("huggingface_hub").file_exists("your-name/vwlmm-small-world", "model.safetensors")',
    ),
]


class Block(NamedTuple):
    page: str
    line: int
    fence: str
    code: str

    @property
    def kind(self) -> str:
        """What is done with it."""
        assert self.fence in KINDS, f"{self} is of an unknown kind, {self.fence!r}: say in KINDS what is done with it"
        return KINDS[self.fence]

    def __str__(self):
        return f"{self.page}, line {self.line}"


def read_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, without the indentation that they have inside of a list."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, flags=re.MULTILINE)
    blocks = [Block(page, text[: m.start()].count("\n") + 1, m[2].strip(), textwrap.dedent(m[3])) for m in found]
    fences = re.findall(r"^ *(?:```|~~~)", text, flags=re.MULTILINE)
    assert len(fences) == 2 * len(blocks), f"{page} has {len(fences)} fences and {len(blocks)} blocks"
    return blocks


def read_spans(page: str) -> list[str]:
    """What stands between backticks in the sentences of a page."""
    text = (ROOT / page).read_text()
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return sorted({re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)})


BLOCKS = {page: read_blocks(page) for page in ("CONTRIBUTING.md", *PAGES)}
SPANS = {page: read_spans(page) for page in PAGES}


def is_command(span: str) -> bool:
    return " " in span and span.split()[0] in LOOKED_UP


@pytest.fixture(scope="module")
def models(request, hub, processor, tmp_path_factory):  # noqa: F811
    """A stand-in for the Hub, with a small checkpoint for each name of the pages and recipes."""
    folder = tmp_path_factory.mktemp("models")
    checkpoints = {
        "openai/clip-vit-large-patch14-336": save_tower("clip", folder / "clip"),
        "openai/clip-vit-large-patch14": save_tower("clip", folder / "clip_224"),
        "meta-llama/Llama-2-7b-hf": save_decoder("llama", folder / "llama2"),
        "meta-llama/Meta-Llama-3-8B-Instruct": save_decoder("llama", folder / "llama3"),
        "microsoft/vq-diffusion-ithq": save_vq_model(folder / "vq"),
        "stabilityai/stable-diffusion-3-medium-diffusers": request.getfixturevalue("pipeline"),
        "facebook/dinov2-large": save_tower("dinov2", folder / "dinov2"),
        "lmsys/vicuna-7b-v1.5": save_decoder("llama", folder / "vicuna"),
        "Qwen/Qwen3-8B": save_decoder("qwen3", folder / "qwen3"),
        "llava-hf/llava-1.5-7b-hf": make_llava(folder / "llava", processor),
    }
    for name, checkpoint in checkpoints.items():
        for file in Path(checkpoint).rglob("*.*"):
            hub.files[f"/{name}/resolve/main/{file.relative_to(checkpoint)}"] = file.read_bytes()
    return hub


def save_vq_model(folder: Path) -> Path:
    """A VQ model that makes one of eight pixels, where a pipeline has it."""
    from diffusers import VQModel  # an optional dependency

    torch.manual_seed(0)
    VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=4,
        num_vq_embeddings=20,
        norm_num_groups=2,
        layers_per_block=1,
    ).save_pretrained(folder / "vqvae")
    return folder


@pytest.fixture(scope="module")
def folder(vicuna, tmp_path_factory) -> Path:
    """What a reader has: a clone, the data, what `make demo` leaves behind, and the checkpoints that a page names."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("examples", "modeling_vwlmm", "processing", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)

    data = folder / "runs/small_world/data"
    import_example("small_world").write_llava_dataset(data, 8, 8, num_held_out=1, text_only_share=0.25)
    for records, json_file, images in (
        ("captions", "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "data/LLaVA-Pretrain/images"),
        ("instructions", "data/LLaVA-Instruct/llava_v1_5_mix665k.json", "data/LLaVA-Instruct"),
        ("instructions", "data/instructions.json", "data/images"),
        ("instructions", "data/LLaVAR/chat_llavar.json", "data/LLaVAR/images"),
        ("instructions", "data/LLaVA-NeXT/mix790k.json", "data/LLaVA-NeXT/images"),
        ("captions", "blip_laion_cc_sbu_558k.json", "images"),
    ):
        shutil.copytree(data / "images", folder / images)
        shutil.copy(data / f"{records}.json", folder / json_file)
    make_image(3).save(folder / "photo.png")
    write_webdataset(folder / "data/cc12m/00000.tar")
    preference = {
        "images": ["photo.png"],
        "prompt": [{"role": "user", "content": "Describe the image."}],
        "chosen": [{"role": "assistant", "content": "A red circle."}],
        "rejected": [{"role": "assistant", "content": "A dog."}],
    }
    (folder / "preferences.jsonl").write_text(2 * f"{json.dumps(preference)}\n")

    shutil.copytree(GOLDEN / "vicuna", folder / "path/to/VW-LMM-vicuna-7b")
    shutil.copytree(GOLDEN / "lavit/checkpoint", folder / "path/to/LaVIT")
    for name, stages in (("small_world/stage4", 4), ("small_world/stage3", 3), ("stage3", 3)):
        config = Path(shutil.copytree(vicuna, folder / "runs" / name)) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"trained_stages": [1, 2, 3, 4][:stages]}))
    return folder


def write_webdataset(file: Path) -> None:
    """Pairs of an image and its caption, as img2dataset writes them."""
    file.parent.mkdir()
    with tarfile.open(file, "w") as shard:
        for index in range(8):
            image = io.BytesIO()
            make_image(index).save(image, "JPEG")
            for suffix, content in (("jpg", image.getvalue()), ("txt", b"a picture"), ("json", b"{}")):
                entry = tarfile.TarInfo(f"{index:09}.{suffix}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def import_example(name: str):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def read(models, folder, tmp_path_factory):
    """Reads blocks in a folder of their own. Returns the seconds of those that ran, and what was printed."""
    for package in ("bitsandbytes", "openai", "uvicorn"):
        pytest.importorskip(package)
    variables = environment(models, tmp_path_factory.mktemp("home"))
    variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "read_docs.py"],
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def read(blocks: list[dict]) -> tuple[list[float], str]:
        place = shutil.copytree(folder, tmp_path_factory.mktemp("page") / "folder", symlinks=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for block in blocks:
            block["code"] = block["code"].replace("localhost:{port}", f"localhost:{port}")
        page = {"folder": str(place), "blocks": blocks, "options": OPTIONS, "port": port}
        print(json.dumps(page), file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline())
        return answer["seconds"], answer["log"]

    yield read
    process.stdin.close()
    process.wait()


class TestBlocks:
    @pytest.mark.parametrize("page", BLOCKS)
    def test_run(self, page, read):
        """Those that run, in the order of the page."""
        if page == "docs/lens.md":
            pytest.importorskip("latentlens")  # the Makefile installs it, for the pinned versions alone
        blocks = [block for block in BLOCKS[page] if block.kind in ("python", "shell", "recipe")]
        orders = []
        for block in blocks:
            code = block.code
            for change in CHANGES:
                if change.page == page:
                    code = code.replace(change.old, change.new)
            claims = [claim.expression for claim in CLAIMS if claim.page == page and claim.text in block.code]
            orders.append({"kind": block.kind, "code": code, "claims": claims})
        seconds, log = read(orders)
        print(dict(zip(map(str, blocks), seconds, strict=False)))
        assert len(seconds) == len(blocks), f"{blocks[len(seconds)]}: the block fails.\n{log[-4000:]}"
        # What Transformers says of weights that a checkpoint lacks, or has without a place for them.
        assert not re.search("newly initialized|were not used|MISSING|UNEXPECTED", log), log

    @pytest.mark.parametrize("block", [b for p in BLOCKS for b in BLOCKS[p] if b.fence in ("bibtex", "")], ids=str)
    def test_are_true(self, block):
        """Those that say something."""
        if block.kind == "citation":
            entry = re.fullmatch(r"@article\{\w+,\n((?:  \w+ +=  ?\{.+\},?\n)+)\}\n", block.code)
            ((arxiv, openreview),) = re.findall(r"arXiv:([\d.]+)|OpenReview (\w+)", entry[1])
            url = f"https://arxiv.org/abs/{arxiv}" if arxiv else f"https://openreview.net/forum?id={openreview}"
            assert url in (ROOT / block.page).read_text()
        else:
            named = set(re.findall(r"^(\w+)/", block.code, flags=re.MULTILINE))
            assert named == {file.parent.name for file in ROOT.glob("*/*.py")}

    def test_changes_and_claims_are_of_blocks(self):
        for page, text, *_ in [*CHANGES, *CLAIMS]:
            assert any(text in block.code for block in BLOCKS[page]), f"no block of {page} has {text!r}"


# Names in sentences that neither this repository nor the signature of a function in a library has.
SELECTIONS = get_args(VWLMMVisualTokenizerConfig.__annotations__["selection"])
FOREIGN = {
    # Columns of TRL's datasets.
    *("messages", "images", "prompt", "chosen", "rejected", "length"),
    # Tasks of lmms-eval, and the variable that its judge reads. Which prompts they get, tests/lmms_eval says.
    *("vqav2", "gqa", "pope", "vizwiz_vqa", "scienceqa_img", "textvqa", "mmbench_en", "mmbench_en_dev_static"),
    *("mmbench_cn", "mmvet", "OPENAI_API_KEY"),
    # Of torch, Transformers (a keyword that `from_pretrained` does not list, a prefix of logs, a command) and Llama.
    *("requires_grad", "device_map", "eval_", "serve", "q_proj"),
    # Of torch, TRL, `datasets`, shells and SLURM, on the pages on security, long runs and data.
    *("image", "image_url", "tools", "chat_template_kwargs", "env", "SHARDED_STATE_DICT", "weights_only", "kill"),
    *("cast_column", "List", "Image", "Dataset", "load_dataset", "streaming"),
    *("completion", "system", "text", "linear", "group_by_length", "assistant_model"),
    # Of files and logs that only a run has.
    *("benchmark_parameters", "eval_a_", "eval_b_", "eval_loss", "adapter_grad_norm", "metric_key_prefix"),
}
SYMBOL = re.compile(r"[A-Za-z](_[A-Za-z]{1,2})?")  # of the equations: `C`, `x_n`, `W_VM`
PATH = re.compile(r"[\w./-]+/[\w./-]*|[\w-]+\.(py|yaml|md|bin|model|jsonl|safetensors)")
# What a reader has or gets, and the repository has not.
READERS_FILE = re.compile(r"runs/\S+|data/|README\.md|\S+\.(safetensors|bin|model|jsonl)")
VLLM_OPTIONS = {"--gpu-memory-utilization", "--requeue"}  # of vLLM and SLURM, which are not installed here


@pytest.fixture(scope="module")
def logged(vicuna, processor, dataset, pipeline, tmp_path_factory) -> set[str]:
    """Names of what is logged, with every objective."""
    names = set()
    dataset = dataset.select([0, 2, 4, 5])  # one turn each, with one image or two
    dataset = dataset.add_column("image_labels", [[[5] * 16 for _ in images] for images in dataset["images"]])
    dataset.num_skipped_samples = 0  # as the reader counts them
    for stage, objective in ((3, None), (4, {"visual_words": 0.1, "token_labels": 0.1, "features": 1.0})):
        args = VWLMMTrainingArguments(
            str(tmp_path_factory.mktemp("logged")),
            stage=stage,
            visual_objective=objective,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = VWLMMTrainer(vicuna, args, dataset)
        trainer.train()
        names |= trainer.state.log_history[0].keys()
    tokenizer = VWLMMVisualTokenizer(
        VWLMMVisualTokenizerConfig(
            vision_config=tiny_vision("clip").config,
            num_codes=4,
            code_dim=4,
            num_merger_layers=1,
            num_decoder_layers=1,
        )
    )
    args = VWLMMTrainingArguments(
        str(tmp_path_factory.mktemp("logged")),
        method="lavit",
        stage=1,
        continuous_steps=0,
        random_mask_steps=0,
        **{name: getattr(args, name) for name in ("max_steps", "logging_steps", "save_strategy", "use_cpu")},
        **{"report_to": "none", "disable_tqdm": True, "global_batch_size": 8},
    )
    trainer = VWLMMTrainer(tokenizer, args, dataset, processor)
    trainer.train()
    names |= trainer.state.log_history[0].keys()
    args = VWLMMTrainingArguments(
        str(tmp_path_factory.mktemp("logged")),
        stage=2,
        visual_objective={"codes": 1.0, "reconstruction": {"vae": str(pipeline)}},
        **{name: getattr(args, name) for name in ("max_steps", "logging_steps", "save_strategy", "use_cpu")},
        **{"report_to": "none", "disable_tqdm": True},
    )
    text = tiny_text("llama", vocab_size=500)
    model = VWLMMForConditionalGeneration.from_visual_tokenizer(tokenizer, text, adapter="mlp")
    processor = VWLMMProcessor.from_visual_tokenizer(tokenizer.config, str(GOLDEN / "vicuna"), num_text_tokens=500)
    trainer = VWLMMTrainer(model, args, dataset, processor)
    trainer.train()
    return names | trainer.state.log_history[0].keys()


class Names:
    """What there is: names, and the objects that the pages call by one."""

    def __init__(self, model: VWLMMForConditionalGeneration, logged: set[str]):
        modules = (
            *(modeling_vwlmm, processing_vwlmm, adapters_vwlmm, inspection, loss_vwlmm, objectives_vwlmm),
            visualization,
            *(transformers, trl, peft, builtins),
        )
        functions = (
            *(
                processing_vwlmm.add_cognition_alignment,
                processing_vwlmm.load_llava_dataset,
                VWLMMTrainer,
                VWLMMTrainer.create_model_card,
            ),
            *(VWLMMForConditionalGeneration.get_visual_words, VWLMMForConditionalGeneration.from_llava),
            *(VWLMMProcessor.from_vision_text_pretrained, transformers.pipeline, transformers.QuantoConfig),
            *(VWLMMForConditionalGeneration.generate, *objectives_vwlmm.OBJECTIVES.values()),
            *(VWLMMForConditionalGeneration.forward, VWLMMProcessor, adapters_vwlmm.SAPerceiver),
        )
        dataclass_types = (
            *(VWLMMTrainingArguments, import_example("train").ScriptArguments, ModelConfig, peft.LoraConfig),
            inspection.InspectedImage,
            *(value for value in vars(outputs_vwlmm).values() if dataclasses.is_dataclass(value)),
        )
        self.quoted = {*objectives_vwlmm.OBJECTIVES, *METHODS, *chat_templates_vwlmm.CHAT_TEMPLATES, *MODULES}
        self.quoted |= {*adapters_vwlmm.ADAPTERS, *SELECTIONS}
        self.names = logged | FOREIGN | self.quoted | vars(model.config).keys() | vars(model.generation_config).keys()
        self.names |= {name for module in modules for name in (*dir(module), module.__name__)}
        self.names |= {
            *modeling_vwlmm.__all__,
            *modeling_vwlmm.training.__all__,
            TRAINING_MODULES,
            *dir(objectives_vwlmm.Objective),
            *(name for adapter in adapters_vwlmm.ADAPTERS.values() for name in vars(adapter)),
        }
        self.names |= {name for function in functions for name in inspect.signature(function).parameters}
        self.names |= {field.name for type_ in dataclass_types for field in dataclasses.fields(type_)}
        self.names |= {name for class_ in (VWLMMForConditionalGeneration, VWLMMTrainer) for name in dir(class_)}
        for objective in objectives_vwlmm.OBJECTIVES.values():
            self.names |= {*objective.columns, *objective.optional_columns}
            defaults = [option.default for option in inspect.signature(objective).parameters.values()]
            self.names |= {default for default in defaults if isinstance(default, str)}
        self.names |= {*dir(VWLMMVisualTokenizer), *vars(VWLMMVisualTokenizerConfig())}
        self.modules = {path for path, _ in model.named_modules()}
        self.objects = {
            "model": model,
            "config": model.config,
            "text_config": model.config.text_config,
            "trainer": VWLMMTrainer,
            "inputs": objectives_vwlmm.ObjectiveInputs,
            "torch": torch,
            "F": torch.nn.functional,
            "VWLMMTrainingArguments": VWLMMTrainingArguments,
            "VWLMMVisualTokenizer": VWLMMVisualTokenizer,
        }
        self.packages = set()
        for file in ROOT.glob("constraints*.txt"):
            self.packages |= set(re.findall(r"^[\w.-]+(?===)", file.read_text(), flags=re.MULTILINE))

    def has(self, dotted: str) -> bool:
        """Whether there is such a name, such an attribute, or such a module of the model."""
        name, *attributes = dotted.split(".")
        if dotted in self.modules or not attributes:
            return dotted in self.modules | self.names or bool(SYMBOL.fullmatch(dotted))
        try:
            operator.attrgetter(".".join(attributes))(self.objects[name])
        except (AttributeError, KeyError):
            return False
        return True

    def unknown(self, span: str) -> list[str]:
        """The names, attributes and keywords of an expression, an assignment or a line of YAML that there are not."""
        if span.startswith("--") or PATH.fullmatch(span) or span in self.packages:
            return []
        try:
            (statement,) = ast.parse(span).body
        except (SyntaxError, ValueError):  # no Python, such as an equation
            return []
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            value = statement.value.value
            return [span] if isinstance(value, str) and value not in self.quoted else []
        found, nodes = [], [statement.target if isinstance(statement, ast.AnnAssign) else statement]
        for node in nodes:  # the list grows meanwhile
            if isinstance(node, ast.Attribute | ast.Name):
                found.append(ast.unparse(node))
                continue
            if isinstance(node, ast.keyword):
                found.append(node.arg)
            nodes += ast.iter_child_nodes(node)
        return [name for name in found if not self.has(name)]


@pytest.fixture(scope="module")
def names(vicuna, logged) -> Names:
    return Names(VWLMMForConditionalGeneration.from_pretrained(vicuna), logged)


class TestSentences:
    @pytest.mark.parametrize("page", PAGES)
    def test_names_exist(self, page, names):
        """Of all that is Python between backticks; what is quoted is a name of ours."""
        assert {span: unknown for span in SPANS[page] if (unknown := names.unknown(span))} == {}

    @pytest.mark.parametrize("page", PAGES)
    def test_options_and_files_exist(self, page, capsys):
        parser = TrlParser((import_example("train").ScriptArguments, VWLMMTrainingArguments, ModelConfig))
        required = ["--json_file", "x", "--image_folder", "x", "--output_dir", "x", "--stage", "4", "--use_cpu"]
        for main in (import_example("push_to_hub").main, lens.main):
            with pytest.raises(SystemExit):
                main(["--help"])
        known = set(re.findall(r"--\w+", capsys.readouterr().out)) | parser._option_string_actions.keys()
        for span in SPANS[page]:
            if span.startswith("--"):
                option, *values = shlex.split(span)
                assert option in known | VLLM_OPTIONS
                if values and option in known:
                    parser.parse_args_and_config([*required, option, *values])
            elif PATH.fullmatch(span):
                places = (ROOT, (ROOT / page).parent, ROOT / "modeling_vwlmm", ROOT / "examples/recipes")
                assert READERS_FILE.fullmatch(span) or any((place / span).exists() for place in places), span

    @pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_command, SPANS[page]))])
    def test_commands_exist(self, page, read):
        commands = [span for span in SPANS[page] if is_command(span)]
        seconds, log = read([{"kind": "command", "code": command} for command in commands])
        assert len(seconds) == len(commands), f"`{commands[len(seconds)]}` of {page}\n{log[-4000:]}"
