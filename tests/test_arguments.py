# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Options of a run: each does what it says, or is refused; nothing is ignored."""

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import BY_HAND
from torch.utils.data import ConcatDataset
from transformers import BitsAndBytesConfig
from trl import TrlParser

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training.stages import STAGES


@pytest.fixture
def make_trainer(model, processor, dataset, tmp_path):
    def make(stage=2, model=model, processing_class=processor, trainer_kwargs=None, **kwargs):
        settings = {"per_device_train_batch_size": 4, "global_batch_size": 4, "max_steps": 1, **BY_HAND, **kwargs}
        return VWLMMTrainer(
            model=model,
            args=VWLMMTrainingArguments(str(tmp_path / "run"), stage=stage, **settings),
            processing_class=copy.deepcopy(processing_class),
            **{"train_dataset": dataset, **(trainer_kwargs or {})},
        )

    return make


class TestCopies:
    """What follows from the stage follows from the new stage; what was given stays."""

    def derived(self, args):
        return (
            args.learning_rate,
            args.chat_template,
            args.visual_objective,
            args.global_batch_size,
            args.gradient_accumulation_steps,
        )

    @pytest.mark.parametrize("old", STAGES)
    @pytest.mark.parametrize("new", STAGES)
    def test_another_stage(self, tmp_path, old, new):
        args = VWLMMTrainingArguments(str(tmp_path), stage=old, per_device_train_batch_size=16, use_cpu=True)
        fresh = VWLMMTrainingArguments(str(tmp_path), stage=new, per_device_train_batch_size=16, use_cpu=True)
        copies = (replace(args, stage=new), replace(copy.deepcopy(args), stage=new))
        for again in (*copies, replace(pickle.loads(pickle.dumps(args)), stage=new)):
            assert self.derived(again) == self.derived(fresh)

    def test_what_was_given_stays(self, tmp_path):
        given = {"learning_rate": 3e-4, "chat_template": "mistral", "global_batch_size": 64}
        args = VWLMMTrainingArguments(str(tmp_path), stage=2, use_cpu=True, visual_objective="features", **given)
        again = replace(args, stage=1)
        assert {name: getattr(again, name) for name in given} == given
        assert again.visual_objective == "features"

    def test_batch_sizes_follow_each_other(self, tmp_path):
        args = VWLMMTrainingArguments(str(tmp_path), stage=2, per_device_train_batch_size=16, use_cpu=True)
        assert replace(args, per_device_train_batch_size=4).gradient_accumulation_steps == 32
        args = VWLMMTrainingArguments(str(tmp_path), stage=2, gradient_accumulation_steps=2, use_cpu=True)
        assert replace(args, per_device_train_batch_size=4).global_batch_size == 8

    def test_written_and_read(self, tmp_path):
        args = VWLMMTrainingArguments(str(tmp_path), stage=3, use_cpu=True)
        written = json.loads(args.to_json_string())
        assert written["learning_rate"] == 1e-3 and written["visual_objective"] == "vm_head"
        (tmp_path / "recipe.yaml").write_text(
            "\n".join(f"{key}: {json.dumps(written[key])}" for key in ("stage", "learning_rate", "chat_template"))
            + f"\noutput_dir: {tmp_path}\nuse_cpu: true\n"
        )
        (again,) = TrlParser(VWLMMTrainingArguments).parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])
        assert self.derived(again) == self.derived(args)


class TestNothingIsIgnored:
    @pytest.mark.parametrize(
        ("options", "found"),
        [
            ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy` is 'wrapped'"),
            ({"packing": True, "max_length": None}, "`max_length` tokens, which is None"),
            ({"eval_packing": True, "max_length": None}, "`max_length` tokens, which is None"),
            ({"shuffle_dataset": True, "train_sampling_strategy": "sequential"}, "`shuffle_dataset` is set"),
            ({"padding_free": True}, "[Pp]adding"),
            ({"truncation_mode": "keep_end"}, "keep_end"),
            ({"loss_type": "dft"}, "`loss_type` is set"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is set"),
            ({"router_aux_loss_coef": 0.1}, "`router_aux_loss_coef` is set"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refused_by_the_trainer(self, make_trainer, options, found):
        with pytest.raises(ValueError, match=found):
            make_trainer(**options)

    @pytest.mark.parametrize(
        ("options", "found"),
        [
            ({"stage": 2, "visual_loss_weight": 0.5}, "no name that it could weigh"),
            ({"stage": 1, "visual_loss_weight": 2.0}, "no name that it could weigh"),
            ({"stage": 4, "visual_objective": {"visual_words": 1}, "visual_loss_weight": 0.5}, "Write the weight"),
            ({"stage": 2, "chat_template": "mistral", "chat_template_path": "x.jinja"}, "are both set"),
            ({"stage": 2, "auto_find_batch_size": True}, "auto_find_batch_size"),
        ],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
    )
    def test_refused_by_the_arguments(self, tmp_path, options, found):
        with pytest.raises(ValueError, match=found):
            VWLMMTrainingArguments(str(tmp_path), use_cpu=True, **options)

    def test_weight_of_the_only_loss_is_named(self, tmp_path, monkeypatch):
        found = []
        monkeypatch.setattr("modeling_vwlmm.training.arguments.logger.warning", found.append)
        assert VWLMMTrainingArguments(str(tmp_path), stage=3, visual_loss_weight=0.5).visual_loss_weight == 1
        assert ["`visual_loss_weight` is 0.5" in message for message in found] == [True]

    def test_new_options_of_trl_are_looked_at(self):
        """Of an option that TRL adds nobody has asked yet whether this trainer follows it."""
        from transformers import TrainingArguments
        from trl import SFTConfig

        known = {
            *("model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "chat_template_path"),
            *("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "eos_token", "max_length"),
            *("truncation_mode", "shuffle_dataset", "packing", "packing_strategy", "padding_free"),
            *("pad_to_multiple_of", "eval_packing", "completion_only_loss", "assistant_only_loss", "loss_type"),
            *("activation_offloading", "pad_token"),
        }
        assert {f.name for f in fields(SFTConfig)} - {f.name for f in fields(TrainingArguments)} <= known

    @pytest.mark.parametrize("kind", [list, ConcatDataset])
    def test_training_data_of_another_kind(self, make_trainer, dataset, kind):
        data = list(dataset) if kind is list else ConcatDataset([list(dataset)])
        for trainer_kwargs in ({"train_dataset": data}, {"eval_dataset": {"a": data}}):
            with pytest.raises(TypeError, match=f"is a {kind.__name__}; expected"):
                make_trainer(4, trainer_kwargs=trainer_kwargs)


class TestTemplates:
    UNMARKED = "{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}" + (
        "{% endfor %}{% endfor %}"
    )

    @pytest.mark.parametrize("stage", [1, 3])
    def test_stages_with_a_template_of_their_own_need_no_other(self, make_trainer, processor, dataset, caplog, stage):
        """That of `from_llava` has no generation tags."""
        processor = copy.deepcopy(processor)
        processor.chat_template = self.UNMARKED
        captions = dataset.select([4, 5])
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer(stage, processing_class=processor, trainer_kwargs={"train_dataset": captions})
        trainer.train()
        assert trainer.processing_class.chat_template == self.UNMARKED
        assert trainer.args.assistant_only_loss
        assert not [record for record in caplog.records if "chat template" in record.getMessage()]
        if stage == 1:
            (entry,) = [entry for entry in trainer.state.log_history if "num_text_positions" in entry]
            answers = ["Left.", "A red circle left of a blue square."]
            ids = processor.tokenizer(answers, add_special_tokens=False).input_ids
            assert entry["num_text_positions"] == pytest.approx(sum(map(len, ids)), abs=4)  # and what closes each

    @pytest.mark.parametrize("stage", [2, 4])
    def test_others_do(self, make_trainer, processor, stage):
        processor = copy.deepcopy(processor)
        processor.chat_template = self.UNMARKED
        with pytest.raises(ValueError, match="generation"):
            make_trainer(stage, processing_class=processor)
        with pytest.raises(ValueError, match="no `{% generation %}` tags"):
            make_trainer(stage, processing_class=processor, chat_template=self.UNMARKED)
        make_trainer(stage, processing_class=processor, chat_template="vicuna_v1")

    def test_template_from_a_file_takes_the_place_of_the_stages(self, make_trainer, processor, dataset, tmp_path):
        (tmp_path / "template.jinja").write_text(processor.get_chat_template("mistral"))
        trainer = make_trainer(1, chat_template_path=str(tmp_path / "template.jinja"))
        text = trainer.processing_class.decode(trainer.data_collator([dataset[1]])["input_ids"][0])
        assert "[INST]" in text


class TestSource:
    @pytest.fixture
    def two_revisions(self, vicuna, tmp_path) -> Path:
        """A cache of the Hub with a checkpoint in two revisions, whose models and processors differ."""
        repo = tmp_path / "cache" / "models--me--checkpoint"
        (repo / "refs").mkdir(parents=True)
        for name, commit in (("main", "a" * 40), ("old", "b" * 40)):
            folder = repo / "snapshots" / commit
            shutil.copytree(vicuna, folder)
            (repo / "refs" / name).write_text(commit)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "trained_stages": [1, 2, 3, len(name)]}))
            template = (folder / "chat_template.jinja").read_text()
            (folder / "chat_template.jinja").write_text(f"{{# {name} #}}{template}")
        return tmp_path / "cache"

    def test_model_and_processor_are_of_one_revision(self, two_revisions, dataset, tmp_path):
        """Also of arguments that are used again."""
        script = (
            "import sys; from datasets import load_from_disk; from modeling_vwlmm import *\n"
            "data = load_from_disk(sys.argv[1])\n"
            "for revision in sys.argv[3:]:\n"
            "    args = VWLMMTrainingArguments(sys.argv[2], stage=4, use_cpu=True, report_to='none',\n"
            "        model_init_kwargs={'revision': revision, 'dtype': 'bfloat16'})\n"
            "    for _ in range(2):\n"
            "        trainer = VWLMMTrainer('me/checkpoint', args, data)\n"
            "        print(trainer.model.dtype, trainer.model.config.trained_stages[-1],\n"
            "              trainer.processing_class.chat_template.split('}')[0])\n"
        )
        dataset.save_to_disk(tmp_path / "data")
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "data"), str(tmp_path / "run"), "main", "old"],
            env={**os.environ, "HF_HUB_CACHE": str(two_revisions), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        lines = [line for line in result.stdout.splitlines() if line.startswith("torch.")]
        assert lines == ["torch.bfloat16 4 {# main #"] * 2 + ["torch.bfloat16 3 {# old #"] * 2, result

    def test_quantization_config(self, make_trainer, vicuna):
        config = BitsAndBytesConfig(load_in_4bit=True)
        from peft import LoraConfig

        lora = LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=".*vision_tower.*")
        trainer = make_trainer(4, model=vicuna, trainer_kwargs={"quantization_config": config, "peft_config": lora})
        assert trainer.model.get_base_model().is_loaded_in_4bit
        with pytest.raises(ValueError, match="Leave it out of one"):
            make_trainer(
                4,
                model=vicuna,
                model_init_kwargs={"quantization_config": config},
                trainer_kwargs={"quantization_config": config},
            )

    def test_what_a_loaded_model_cannot_follow_is_named(self, make_trainer, caplog):
        with caplog.at_level(logging.WARNING):
            make_trainer(model_init_kwargs={"dtype": "bfloat16"})
        assert any("`model_init_kwargs` will be ignored" in record.getMessage() for record in caplog.records)

    def test_dtype_is_fp32_unless_it_is_said(self, make_trainer, vicuna, tmp_path):
        VWLMMForConditionalGeneration.from_pretrained(vicuna, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
        assert make_trainer(model=str(tmp_path / "bf16")).model.dtype == torch.float32
