# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card is true and complete, and what is uploaded to a Hub can be used from there."""

import ast
import base64
import copy
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_image
from huggingface_hub import EvalResult, ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig
from safetensors.torch import load
from test_hub import CODE_FILES, OTHER_FILES, run_without_package

from modeling_vwlmm import VWLMMConfig, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training.model_card import make_model_card, read_eval_results
from modeling_vwlmm.training.stages import METHODS, record_name


EXAMPLES = Path(__file__).parents[1] / "examples"
POPE = {
    "dataset_type": "lmms-lab/POPE",
    "dataset_name": "POPE",
    "dataset_split": "test",
    "metric_type": "accuracy",
    "metric_value": 0.875,
}
# What lmms-eval 0.7 writes, without what is not read.
LMMS_EVAL = {
    "results": {
        "gqa": {"alias": "gqa", "exact_match,none": 0.61, "exact_match_stderr,none": 0.004, "submission,none": []},
        "local": {"alias": "local", "acc,none": 1.0, "acc_stderr,none": "N/A", "acc,strict": 0.5},
        "group": {"alias": "group", "acc,none": 0.8, "acc_stderr,none": 0.01},
    },
    "configs": {
        "gqa": {"dataset_path": "lmms-lab/GQA", "dataset_name": "testdev_balanced", "test_split": "testdev"},
        "local": {"dataset_path": "json", "test_split": "test"},
    },
    "n-samples": {"gqa": {"original": 12578, "effective": 12578}, "local": {"original": 50, "effective": 8}},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as uploads and downloads need. Files of repositories are in `server.files`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            repo = json.loads(body)
            self.answer({"url": f"{self.server.url}/{repo['organization']}/{repo['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        else:
            repo_id = self.path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                name = f"/{repo_id}/resolve/main/{line['value'].get('path')}"
                if line["key"] == "file":
                    self.server.files[name] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[name]
            self.answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self):
        content = self.server.files.get(self.path.replace(COMMIT, "main"))
        if self.path.startswith("/api/models/") and "/tree/main?" in self.path:
            names = uploaded(self.server, self.path.removeprefix("/api/models/").split("/tree/")[0])
            self.answer([{"type": "file", "path": name, "size": 0, "oid": COMMIT} for name in names])
        elif content is None:
            self.answer({}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(content, headers={"ETag": hashlib.sha1(content).hexdigest()})

    do_HEAD = do_GET

    def answer(self, content, status=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


COMMIT = "0" * 40


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files = f"http://127.0.0.1:{server.server_port}", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environment(hub, cwd: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_nobody", "HF_HOME": str(cwd / "home")}


def uploaded(hub, repo_id: str) -> dict[str, bytes]:
    prefix = f"/{repo_id}/resolve/main/"
    return {name.removeprefix(prefix): content for name, content in hub.files.items() if name.startswith(prefix)}


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(vicuna, tmp_path_factory) -> Path:
    """A checkpoint whose parts came from the Hub, among what a training run leaves behind."""
    folder = tmp_path_factory.mktemp("publish") / "stage4"
    shutil.copytree(vicuna, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "lmsys/vicuna-7b-v1.5"
    config["vision_config"]["_name_or_path"] = "openai/clip-vit-large-patch14-336"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training_args.bin").write_text("holds paths of this machine")
    (folder / "_training_modules").mkdir()
    (folder / "_training_modules" / "features.safetensors").write_bytes(b"of an objective")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def published(hub, folder) -> str:
    """The card on the Hub, after the script has run. An earlier upload was of sharded weights, and more."""
    module = "_training_modules/features.safetensors"
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", module):
        hub.files[f"/me/vwlmm/resolve/main/{name}"] = b"earlier"
    (folder.parent / "results.json").write_text(json.dumps([POPE]))
    arguments = ["--license", "llama2", "--datasets", "a/captions", "b/conversations", "--metrics", "results.json"]
    subprocess.run(
        [sys.executable, str(EXAMPLES / "push_to_hub.py"), folder.name, "me/vwlmm", *arguments],
        cwd=folder.parent,
        env={**os.environ, **environment(hub, folder.parent)},
        timeout=120,
        check=True,
    )
    return uploaded(hub, "me/vwlmm")["README.md"].decode()


@pytest.fixture
def push_to_hub(monkeypatch):
    """The script's `main`, in this process, which is offline."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("push_to_hub").main


@pytest.fixture
def checkpoint(folder, tmp_path) -> Path:
    """A copy of the checkpoint that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("README.md")))


class TestScript:
    def test_repository_holds_the_checkpoint_and_nothing_else(self, hub, folder, published):
        files = uploaded(hub, "me/vwlmm")
        assert files.keys() == CODE_FILES | OTHER_FILES | {"README.md"}
        assert all(content == (folder / name).read_bytes() for name, content in files.items())

    def test_metadata(self, published, folder):
        assert published == (folder / "README.md").read_text()
        metadata = metadata_load(folder / "README.md")
        name, results = model_index_to_eval_results(metadata.pop("model-index"))
        assert name == "vwlmm"
        assert results == [EvalResult(task_type="image-text-to-text", **POPE)]
        assert metadata == {
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "base_model": ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"],
            "datasets": ["a/captions", "b/conversations"],
            "license": "llama2",
            "tags": ["vw-lmm", "visual-words"],
            "trained_stages": [1, 2, 3, 4],
        }

    def test_text(self, published):
        assert "| stage IV (multi-modal auto-regression) | decoder, MM head |" in published
        assert "| POPE | accuracy | 0.875 |" in published

    def test_snippets_run_from_the_hub(self, hub, published, tmp_path):
        """As they are printed, in a process that has neither this package nor the checkpoint."""
        make_image(3).save(tmp_path / "image.jpg")
        script = "".join(f"exec({snippet!r}, {{}})\nprint('---')\n" for snippet in snippets(published))
        output = run_without_package(script, tmp_path, **environment(hub, tmp_path))
        pipeline, auto_classes, rest = output.split("---\n")
        answer, words = auto_classes.rsplit("\n", 2)[:2]
        assert pipeline.startswith(answer)  # the pipeline writes on for longer
        assert len(answer) > 64
        assert len(ast.literal_eval(words)) == 16
        assert not rest

    def test_training_modules_are_asked_for(self, push_to_hub, checkpoint, capsys):
        push_to_hub([str(checkpoint), "me/dry", "--dry_run", "--with_training_modules"])
        assert capsys.readouterr().out.splitlines()[-1] == "_training_modules/features.safetensors"
        shutil.rmtree(checkpoint / "_training_modules")
        with pytest.raises(FileNotFoundError, match="has no _training_modules, which `--with_training_modules` asks"):
            push_to_hub([str(checkpoint), "me/dry", "--dry_run", "--with_training_modules"])

    def test_dry_run_lists_the_files(self, push_to_hub, checkpoint, capsys):
        push_to_hub([str(checkpoint), "me/dry", "--dry_run"])
        printed = capsys.readouterr().out.splitlines()
        assert sorted(CODE_FILES | OTHER_FILES | {"README.md"}) == printed[-len(CODE_FILES | OTHER_FILES) - 1 :]
        assert 'model="me/dry"' in (checkpoint / "README.md").read_text()

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "loss_vwlmm.py"]
    )
    def test_incomplete_folder(self, push_to_hub, checkpoint, name):
        (checkpoint / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"checkpoint lacks {name}\. Write a whole checkpoint"):
            push_to_hub([str(checkpoint), "me/incomplete"])
        assert not (checkpoint / "README.md").exists()

    def test_another_architecture(self, push_to_hub, checkpoint):
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
        with pytest.raises(ValueError, match="has the model type 'llava'; expected 'vwlmm'"):
            push_to_hub([str(checkpoint), "me/llava"])

    def test_two_sets_of_weights(self, push_to_hub, checkpoint):
        (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        with pytest.raises(ValueError, match="loads model.safetensors alone; remove what is not of this checkpoint"):
            push_to_hub([str(checkpoint), "me/incomplete"])

    @pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
    def test_no_custom_code(self, push_to_hub, checkpoint, name):
        config = json.loads((checkpoint / name).read_text())
        del config["auto_map"]
        (checkpoint / name).write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"checkpoint/{name} has no `auto_map`.* Save it again"):
            push_to_hub([str(checkpoint), "me/incomplete"])

    def test_missing_shard(self, push_to_hub, checkpoint, model):
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="300KB")
        shard = max(checkpoint.glob("*.safetensors"))
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}"):
            push_to_hub([str(checkpoint), "me/incomplete"])


class TestTrainer:
    @pytest.fixture
    def make_trainer(self, model, processor, dataset, tmp_path):
        def make(push_to_hub=False, **kwargs):
            args = VWLMMTrainingArguments(
                str(tmp_path / "run"),
                stage=4,
                max_steps=1,
                per_device_train_batch_size=2,
                global_batch_size=2,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                push_to_hub=push_to_hub,
                hub_model_id="me/trained",
                hub_token="hf_of_nobody",
            )
            return VWLMMTrainer(
                model=model, args=args, train_dataset=dataset, processing_class=copy.deepcopy(processor), **kwargs
            )

        return make

    @pytest.fixture
    def online(self, hub, monkeypatch):
        """The Hub as this process sees it, without the repository of these tests."""
        for name in [name for name in hub.files if name.startswith("/me/trained/")]:
            del hub.files[name]
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        # Transformers keeps what an earlier test has made for another address.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        return hub

    def test_push_to_hub(self, make_trainer, model, online, tmp_path):
        model.config.trained_stages = [1, 2, 3]
        trainer = make_trainer()
        trainer.train()
        trainer.push_to_hub(license="llama2", dataset_name=["a/conversations"])

        files = uploaded(online, "me/trained")
        assert files.keys() == CODE_FILES | OTHER_FILES | {"README.md", "training_args.bin"}
        assert all(content == (tmp_path / "run" / name).read_bytes() for name, content in files.items())
        weights = load(files["model.safetensors"])
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        card = ModelCard(files["README.md"].decode())
        assert card.data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "datasets": ["a/conversations"],
            "license": "llama2",
            "tags": ["vw-lmm", "visual-words", "generated_from_trainer", "sft", "trl"],
            "trained_stages": [1, 2, 3, 4],
        }
        assert all('"me/trained", trust_remote_code=True' in snippet for snippet in snippets(card.text))
        assert f"- TRL: {version('trl')}\n" in card.text

    def test_recipe_with_push_to_hub(self, make_trainer, online):
        make_trainer(push_to_hub=True).save_model()
        assert uploaded(online, "me/trained").keys() > CODE_FILES | OTHER_FILES | {"README.md"}

    def test_continues_a_checkpoint_of_the_hub(self, make_trainer, model, tmp_path):
        model.config.name_or_path = "me/stage3"
        trainer = make_trainer()
        trainer.create_model_card(eval_results=[EvalResult(task_type="image-text-to-text", **POPE)])
        card = ModelCard.load(tmp_path / "run" / "README.md")
        assert card.data.base_model == ["me/stage3"]
        assert card.data.eval_results[0].metric_value == 0.875

    def test_adapter(self, make_trainer, model, tmp_path):
        model.config.text_config.name_or_path = "lmsys/vicuna-7b-v1.5"  # of the model below the adapter, not its own
        trainer = make_trainer(peft_config=LoraConfig(target_modules=["q_proj"]))
        trainer.save_model()  # PEFT writes a card of its own
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / "run" / "README.md")
        assert (card.data.library_name, card.data.base_model) == ("peft", None)
        assert '"BASE CHECKPOINT"' in card.text

    def test_adapter_runs_from_the_hub(self, make_trainer, model, processor, online, published, tmp_path):
        """DoRA, whose magnitudes take part; the snippet's answer is that of the model that was trained."""
        model.config.name_or_path = "me/vwlmm"
        trainer = make_trainer(
            peft_config=LoraConfig(
                target_modules=r"model\.language_model\..*_proj", use_dora=True, init_lora_weights=False
            )
        )
        for name, parameter in trainer.model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data *= 1 + torch.arange(len(parameter)) % 2
        trainer.push_to_hub()

        text = ModelCard(uploaded(online, "me/trained")["README.md"].decode()).text
        assert "An adapter: it needs torch, Transformers, PEFT, Pillow and the checkpoint" in text
        assert not any(claim in text for claim in ("its own code", "pipeline", "## Training stages"))
        (snippet,) = snippets(text)
        make_image(3).save(tmp_path / "image.jpg")
        printed = run_without_package(snippet, tmp_path, **environment(online, tmp_path))

        content = [
            {"type": "image", "path": str(tmp_path / "image.jpg")},
            {"type": "text", "text": "Describe the image."},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = trainer.model.eval().generate(**inputs, max_new_tokens=64)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert printed == answer + "\n"
        with trainer.model.disable_adapter():
            assert not torch.equal(trainer.model.generate(**inputs, max_new_tokens=64), output)


class TestCard:
    def test_leaves_out_what_is_not_known(self):
        card = make_model_card(VWLMMConfig(), "me/vwlmm")
        assert card.data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "tags": ["vw-lmm", "visual-words"],
        }
        assert "made from" not in card.text
        assert "get_visual_words" not in card.text  # no VM head has been trained
        assert re.findall("^#+ .*", card.text, flags=re.MULTILINE) == ["# vwlmm", "## Usage"]

    def test_stages_of_every_method(self):
        records = [record_name(method, stage) for method, stages in METHODS.items() for stage in stages]
        card = make_model_card(VWLMMConfig(trained_stages=records), "me/vwlmm")
        rows = card.text.partition("## Training stages\n")[2].strip().splitlines()
        assert len(rows) == 2 + len(records)
        assert rows[-2] == "| vlsa stage 2 (alignment with the vision tower) | adapter, vision tower |"

    def test_names_the_method_of_the_last_stage(self):
        papers = {(): "(VW-LMM)", (1, 2): "(VW-LMM)", ("lavit-1", "lavit-2"): "(LaVIT)", (1, "vlsa-2"): "(VLSA)"}
        for records, paper in papers.items():
            card = make_model_card(VWLMMConfig(trained_stages=list(records)), "me/vwlmm")
            assert re.findall(r"by the method of \[[^]]+\]\(https://[^)]+\) (\(.*\)), which", card.text) == [paper]

    def test_a_run_cites_the_paper_of_its_method(self):
        """As TRL's card does, by its number on arXiv; one that has none is not cited as another."""
        for method, number in (("vw-lmm", "2403.07720"), ("lavit", "2309.04669"), ("vlsa", None)):
            run = SimpleNamespace(args=SimpleNamespace(method=method))
            assert VWLMMTrainer._paper.fget(run).get("id") == number

    @pytest.mark.parametrize("local", ["models/llm", "/models/llm", "./models/llm", "a/models/llm", "llm", ""])
    def test_local_paths_are_no_base_models(self, local, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models" / "llm").mkdir(parents=True)
        config = VWLMMConfig(text_config={"model_type": "llama", "_name_or_path": local})
        config.vision_config.name_or_path = "openai/clip-vit-large-patch14-336"
        assert make_model_card(config, "me/vwlmm").data.base_model == ["openai/clip-vit-large-patch14-336"]
        assert make_model_card(config, "me/vwlmm", base_model=[]).data.base_model is None

    def test_no_model_is_its_own_base(self):
        config = VWLMMConfig()
        config.name_or_path = "me/vwlmm"
        assert make_model_card(config, "me/vwlmm").data.base_model is None

    def test_draft_is_written_anew_and_keeps_what_it_knew(self):
        old, new = (EvalResult(task_type="image-text-to-text", **POPE | {"metric_value": v}) for v in (0.5, 0.875))
        other = EvalResult(task_type="image-text-to-text", **POPE | {"metric_type": "f1"})
        draft = make_model_card(
            VWLMMConfig(trained_stages=[1]),
            "me/old",
            license="mit",
            datasets=["a/b"],
            tags=["trl"],
            base_model="me/base",
            eval_results=[old, other],
            training_procedure="With care.",
        )
        draft = ModelCard(str(draft))
        card = make_model_card(
            VWLMMConfig(trained_stages=[1, 2]), "me/new", previous=draft, license="llama2", eval_results=[new]
        )
        assert card.data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "license": "llama2",
            "datasets": ["a/b"],
            "base_model": ["me/base"],
            "tags": ["vw-lmm", "visual-words", "trl"],
            "trained_stages": [1, 2],
            "model-index": eval_results_to_model_index("new", [other, new]),
        }
        assert "me/old" not in card.text
        assert card.text.rstrip().endswith("## Training procedure\n\nWith care.")

    def test_text_that_is_no_draft_stays(self):
        text = "\n# My model\n\nIt sees.\n"
        previous = ModelCard(f"---\nlanguage: en\nlicense: mit\n---\n{text}")
        card = ModelCard(str(make_model_card(VWLMMConfig(), "me/vwlmm", previous=previous, license="llama2")))
        assert card.text == text
        assert (card.data.language, card.data.license) == ("en", "llama2")
        assert card.data.pipeline_tag == "image-text-to-text"


class TestResults:
    def test_lmms_eval(self, tmp_path):
        (tmp_path / "results.json").write_text(json.dumps(LMMS_EVAL))
        gqa, local, strict = read_eval_results(tmp_path / "results.json")  # a group is no dataset
        assert (gqa.dataset_type, gqa.dataset_config, gqa.dataset_split) == (
            "lmms-lab/GQA",
            "testdev_balanced",
            "testdev",
        )
        assert (gqa.metric_type, gqa.metric_value, gqa.dataset_args) == ("exact_match", 0.61, None)
        # No dataset of the Hub, and only some of its samples.
        assert (local.dataset_type, local.dataset_name, local.dataset_args) == ("local", "local", {"num_samples": 8})
        assert [(r.metric_type, r.metric_value) for r in (local, strict)] == [("acc", 1.0), ("acc,strict", 0.5)]
        card = ModelCard(str(make_model_card(VWLMMConfig(), "me/vwlmm", eval_results=[gqa, local, strict])))
        assert card.data.eval_results == [gqa, local, strict]

    @pytest.mark.parametrize("content", [{"colour": 0.9}, [{"dataset_name": "POPE"}], ["POPE"], 0.9])
    def test_anything_else(self, tmp_path, content):
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=r"results\.json cannot be read as results .*`metric_value`, or the results"
        ):
            read_eval_results(tmp_path / "results.json")
