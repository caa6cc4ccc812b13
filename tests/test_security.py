# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What docs/security.md says: each statement is an attack that is tried."""

import ast
import importlib
import io
import json
import os
import pickle
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from conftest import BY_HAND, GOLDEN, make_conversation, make_image
from datasets import Dataset, Image, IterableDataset, List
from jinja2.exceptions import SecurityError
from safetensors.torch import load_file
from test_from_llava import make_llava
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vwlmm import (
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    convert_official_checkpoint,
)
from processing_vwlmm import VWLMMProcessor, load_llava_dataset


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that an attack makes if it succeeds. It has to be missing behind the test."""
    file = tmp_path / "attacked"
    yield file
    assert not file.exists()


class Attack:
    """Pickled, it makes a file when it is read."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def write_code(folder: Path, marker: Path) -> None:
    """Code of its own for every part of a checkpoint."""
    (folder / "attack.py").write_text(f"open({str(marker)!r}, 'w')\nclass A: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    auto_map = {**dict.fromkeys(names, "attack.A"), "AutoTokenizer": ["attack.A", "attack.A"]}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "auto_map": auto_map}))


def count_files_again(checkpoint: Path) -> None:
    """Lets a checkpoint whose files have been exchanged count as whole."""
    state = json.loads((checkpoint / "run_state.json").read_text())
    state["files"] = {name: (checkpoint / name).stat().st_size for name in state["files"]}
    (checkpoint / "run_state.json").write_text(json.dumps(state))


class TestFilesOfWeights:
    def test_pickles_are_refused(self, vicuna, processor, marker, tmp_path):
        folder = Path(shutil.copytree(vicuna, tmp_path / "checkpoint"))
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({**weights, "attack": Attack(marker)}, folder / "pytorch_model.bin")
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            VWLMMForConditionalGeneration.from_pretrained(folder)

        official = Path(shutil.copytree(GOLDEN / "vicuna", tmp_path / "official"))
        (official / "model.safetensors").rename(official / "kept")
        torch.save({**load_file(official / "kept"), "attack": Attack(marker)}, official / "pytorch_model.bin")
        with pytest.raises(ValueError, match="holds more than tensors"):
            convert_official_checkpoint(official, tmp_path / "output")

        llava = Path(make_llava(tmp_path / "llava", processor))
        torch.save({**load_file(llava / "model.safetensors"), "attack": Attack(marker)}, llava / "pytorch_model.bin")
        (llava / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="holds more than tensors"):
            VWLMMForConditionalGeneration.from_llava(str(llava))

    def test_resume_reads_no_pickle(self, model, processor, dataset, marker, tmp_path):
        args = VWLMMTrainingArguments(
            str(tmp_path / "run"),
            stage=4,
            visual_objective={"visual_words": 1.0, "features": 1.0},
            **{**BY_HAND, "max_steps": 1, "save_strategy": "steps", "save_steps": 1},
        )
        trainer = VWLMMTrainer(model, args, dataset.select([0, 2]), processor)
        trainer.train()
        checkpoint = tmp_path / "run" / "checkpoint-1"
        pickled = {file.name for suffix in ("bin", "pt", "pth") for file in checkpoint.rglob(f"*.{suffix}")}
        assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
        (modules,) = checkpoint.glob("_training_modules/*")
        torch.save(Attack(marker), checkpoint / "training_args.bin")  # is never read
        count_files_again(checkpoint)
        trainer.args.max_steps = 2
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 2
        for file in (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", checkpoint / "rng_state.pth", modules):
            content = file.read_bytes()
            torch.save(Attack(marker), file)
            count_files_again(checkpoint)
            with pytest.raises(Exception, match="(?i)weights_only|header|safetensor"):
                trainer.train(resume_from_checkpoint=str(checkpoint))
            file.write_bytes(content)

    def test_sharded_states_are_pickles(self, marker, tmp_path):
        """The exceptions. If this fails, the page can promise more."""
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack(marker)))
        with pytest.raises(Exception):  # noqa: B017 (whatever it makes of an open file)
            FileSystemReader(tmp_path).read_metadata().state_dict_metadata  # noqa: B018
        assert marker.exists()
        marker.unlink()
        engine = importlib.util.find_spec("deepspeed").submodule_search_locations[0]
        source = Path(engine, "runtime/checkpoint_engine/torch_checkpoint_engine.py").read_text()
        assert "weights_only=False" in source


class TestRemoteCode:
    def test_only_where_asked_for(self, vicuna, marker, tmp_path):
        folder = Path(shutil.copytree(vicuna, tmp_path / "checkpoint"))
        write_code(folder, marker)
        assert type(VWLMMForConditionalGeneration.from_pretrained(folder)) is VWLMMForConditionalGeneration
        assert type(VWLMMProcessor.from_pretrained(folder)) is VWLMMProcessor

    def test_parts_bring_none(self, marker, tmp_path):
        for part, source in (("vision", GOLDEN / "vicuna" / "clip-vision-tower"), ("text", GOLDEN / "vicuna")):
            folder = Path(shutil.copytree(source, tmp_path / part))
            write_code(folder, marker)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "attack"}))
        with pytest.raises(ValueError, match="trust_remote_code|custom code"):
            VWLMMForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))
        with pytest.raises(ValueError, match="trust_remote_code|custom code"):
            VWLMMProcessor.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))

    def test_a_converted_llava_needs_none(self, model, processor, tmp_path):
        model.to_llava().save_pretrained(tmp_path)
        processor.to_llava().save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.py"))
        AutoModelForImageTextToText.from_pretrained(tmp_path)
        AutoProcessor.from_pretrained(tmp_path)


@pytest.fixture
def server():
    """A server on this machine that has an image. `asked` counts what was fetched from it."""
    make_image(1).save(image := io.BytesIO(), "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(image.getvalue())

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = 0, f"http://127.0.0.1:{server.server_address[1]}/image.png"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def make_samples(kind: str, address: str) -> list[dict]:
    """Samples that name an image, in every place that a library underneath looks at."""
    (question, answer) = make_conversation((1, "What?", "A circle."))
    if kind in ("images", "cast"):
        return [{"messages": [question, answer], "images": [address]}]
    if kind == "image":
        return [{"messages": [question, answer], "image": address}]
    key = kind.split()[-1]
    question = {"role": "user", "content": [{"type": "image", key: address}, question["content"][1]]}
    if kind.startswith("prompt"):
        return [{"prompt": [question], "completion": [answer], "images": []}]
    sample = {"messages": [question, answer]}
    return [sample if kind.startswith("text") else {**sample, "images": []}]


PLACES = ["images", "image", "cast", "messages image", "messages url", "messages path", "text url", "prompt url"]


class TestAddresses:
    def make_trainer(self, model, processor, folder, train_dataset, **kwargs):
        args = VWLMMTrainingArguments(str(folder), stage=4, **{**BY_HAND, "max_steps": 1})
        return VWLMMTrainer(model, args, train_dataset, processor, **kwargs)

    @pytest.mark.parametrize("kind", PLACES)
    def test_nothing_is_fetched_in_training(self, model, processor, dataset, server, tmp_path, kind):
        named = Dataset.from_list(make_samples(kind, server.url))
        if kind == "cast":
            named = named.cast_column("images", List(Image()))
        with pytest.raises(ValueError, match="is the string 'http://127.*neither fetched nor opened"):
            self.make_trainer(model, processor, tmp_path, named)
        with pytest.raises(ValueError, match="neither fetched nor opened"):
            self.make_trainer(model, processor, tmp_path, dataset, eval_dataset={"a": named})
        trainer = self.make_trainer(model, processor, tmp_path, dataset)
        with pytest.raises(ValueError, match="neither fetched nor opened"):
            trainer.evaluate(named)
        assert server.asked == 0

    @pytest.mark.parametrize("kind", ["images", "messages url"])
    def test_nothing_is_fetched_in_streams(self, model, processor, dataset, server, tmp_path, kind):
        """Behind a first sample that is as it should be."""
        (named,) = make_samples(kind, server.url)
        (good,) = dataset.select([0])
        stream = IterableDataset.from_generator(lambda: iter([good, named]))
        trainer = self.make_trainer(model, processor, tmp_path, stream)
        with pytest.raises(ValueError, match="neither fetched nor opened"):
            trainer.train()
        assert server.asked == 0

    def test_no_file_is_opened(self, model, processor, tmp_path):
        """Other than those that a user makes a column of images of."""
        make_image(1).save(tmp_path / "secret.png")
        for kind in ("images", "messages path", "messages image"):
            named = Dataset.from_list(make_samples(kind, str(tmp_path / "secret.png")))
            with pytest.raises(ValueError, match="neither fetched nor opened"):
                self.make_trainer(model, processor, tmp_path, named)
        named = Dataset.from_list(make_samples("images", str(tmp_path / "secret.png")))
        self.make_trainer(model, processor, tmp_path, named.cast_column("images", List(Image()))).train()

    def test_what_was_filtered_out_is_not_asked_about(self, model, processor, dataset, server, tmp_path):
        named = Dataset.from_list(make_samples("images", server.url)).cast_column("images", List(Image()))
        both = datasets.concatenate_datasets([dataset.select_columns(["images"]), named.select_columns(["images"])])
        both = both.add_column("messages", [*dataset["messages"], make_samples("images", "")[0]["messages"]])
        self.make_trainer(model, processor, tmp_path, both.select(range(8)))
        with pytest.raises(ValueError, match="neither fetched nor opened"):
            self.make_trainer(model, processor, tmp_path, both.select([7, 8]))
        assert server.asked == 0

    @pytest.mark.parametrize(
        "name", ["http://{}", "//{}", "file://{}", "{}", "../secret.png", "link.png", "linked/secret.png"]
    )
    def test_records_stay_in_their_folder(self, server, tmp_path, name, monkeypatch):
        monkeypatch.setattr("processing_vwlmm.llava_dataset.HF_DATASETS_CACHE", tmp_path / "cache")
        make_image(1).save(secret := tmp_path / "secret.png")
        (images := tmp_path / "images").mkdir()
        (images / "link.png").symlink_to(secret)
        (images / "linked").symlink_to(tmp_path)
        name = name.format(server.url.removeprefix("http://") if "http" in name else secret)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A circle."}]
        (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "image": name, "conversations": turns}]))
        with pytest.raises(ValueError, match="the image folder|no readable image"):
            load_llava_dataset(tmp_path / "data.json", images)
        assert server.asked == 0

    def test_a_question_may_name_any(self, processor, server):
        """What a caller asks about is the caller's, and a server's clients are its callers."""
        content = [{"type": "image", "url": server.url}, {"type": "text", "text": "What?"}]
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
        assert server.asked == 1


class TestTemplates:
    @pytest.mark.parametrize("images", [True, False])
    @pytest.mark.parametrize("streamed", [True, False])
    def test_none_from_data(self, model, processor, tmp_path, images, streamed):
        sample = {
            "messages": make_conversation((0, "What?", "A circle.")),
            "chat_template_kwargs": {"chat_template": "{% generation %}attack{% endgeneration %}"},
            **({"images": []} if images else {}),
        }
        data = IterableDataset.from_generator(lambda: iter([sample])) if streamed else Dataset.from_list([sample])
        args = VWLMMTrainingArguments(str(tmp_path), stage=4, **{**BY_HAND, "max_steps": 1})
        with pytest.raises(ValueError, match="column `chat_template_kwargs`.*template of its own"):
            VWLMMTrainer(model, args, data, processor)

    def test_text_is_no_template(self, processor):
        text = "{{ 7 * 7 }} {% raw %} {# a #}"
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        assert text in processor.apply_chat_template(messages)

    def test_those_of_checkpoints_are_sandboxed(self, processor):
        for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
            with pytest.raises(SecurityError):
                processor.apply_chat_template([{"role": "user", "content": "What?"}], chat_template=attack)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


class TestScripts:
    def test_recipes_are_data(self, example, marker, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"output_dir: !!python/object/apply:builtins.open [{marker}, w]\n")
        with pytest.raises(yaml.constructor.ConstructorError, match="python/object"):
            example("train").main(["--config", str(recipe)])

    def test_recipes_set_the_environment(self, example, monkeypatch, tmp_path):
        """Which can be harm enough: a recipe is to be read like a script."""
        monkeypatch.setenv("VWLMM_TEST", "before")
        (tmp_path / "recipe.yaml").write_text("env: {VWLMM_TEST: after}\n")
        with pytest.raises(ValueError, match="`stage` is None"):
            example("train").main(["--config", str(tmp_path / "recipe.yaml")])
        assert os.environ["VWLMM_TEST"] == "after"

    def test_publishing_leaves_out_what_is_no_checkpoint(self, example, vicuna, tmp_path):
        folder = Path(shutil.copytree(vicuna, tmp_path / "checkpoint"))
        expected = {path.name for path in folder.iterdir()}
        for name in (".env", ".git/config", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "wandb/run.log"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("secret")
        assert set(example("push_to_hub").list_files(folder)) == expected


CALLS = {
    # What runs code, or reads what can bring some, and the keyword that makes it safe.
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv"), None),
    **dict.fromkeys(
        ("pickle.load", "pickle.loads", "Unpickler", "pickle.Unpickler", "joblib.load", "dill.load"), None
    ),
    **dict.fromkeys(("yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "urlopen", "load_image"), None),
    **dict.fromkeys(("subprocess.run", "subprocess.Popen", "subprocess.check_output", "httpx.get"), None),
    "torch.load": "weights_only",
}
FOLDERS = ("modeling_vwlmm", "processing", "examples")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_source_calls_nothing_that_runs_data(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            assert "trust_remote_code" not in keywords, ast.unparse(node)
            if name == "httpx.get" and file.name == "images_vwlmm.py":
                continue  # for who asks the processor for an image by its URL
            if name in CALLS:
                safe = keywords.get(CALLS[name])
                assert isinstance(safe, ast.Constant) and safe.value is True, ast.unparse(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            names = {alias.name for alias in node.names}
            assert not imported & {"pickle", "subprocess", "dill", "joblib", "requests"} or names == {
                "UnpicklingError"
            }, ast.unparse(node)


def test_page_names_every_test():
    source = ast.parse(Path(__file__).read_text())
    tests = {node.name for node in ast.walk(source) if isinstance(node, ast.FunctionDef)}
    tests = {name for name in tests if name.startswith("test_")} - {"test_page_names_every_test"}
    assert set(re.findall(r"\btest_\w+(?!\.py)\b", PAGE.read_text())) - {"test_security", "test_conversion"} == tests
