# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters in stages II and IV, TRL's own trainers on the model, and recipes under `accelerate launch`."""

import ast
import copy
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import datasets
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from conftest import BY_HAND, make_image, tiny_text, tiny_vision
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, ModelConfig, SFTConfig, SFTTrainer, TrlParser

from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DECODER = r"model\.language_model\..*_proj"  # the decoder's matrices, and no other module's of the same name
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    **BY_HAND,
}
LOSSES = {1: {"language_loss"}, 2: {"language_loss"}, 3: {"visual_loss"}, 4: {"language_loss", "visual_loss"}}
TRAINS = {2: {"language_model", "lm_head", "multi_modal_projector"}, 3: {"vm_head"}, 4: {"language_model", "lm_head"}}
METHODS = {"lora": LoraConfig(target_modules=DECODER), "dora": LoraConfig(target_modules=DECODER, use_dora=True)}


@pytest.fixture
def make_trainer(vicuna, processor, dataset, tmp_path):
    """Makes a trainer of a stage, with an adapter or without, by default on weights that no stage has trained."""

    def make(stage, peft_config=None, model=None, **kwargs):
        if model is None:
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna, trained_stages=list(range(1, stage)))
        return VWLMMTrainer(
            model=model,
            args=VWLMMTrainingArguments(str(tmp_path / "run"), stage=stage, **{**SETTINGS, **kwargs}),
            train_dataset=dataset,
            processing_class=copy.deepcopy(processor),
            peft_config=copy.deepcopy(peft_config),
        )

    return make


@pytest.fixture(scope="module")
def small_world(tmp_path_factory) -> Path:
    """Eight captions and eight conversations of the small world, and their images."""
    folder = tmp_path_factory.mktemp("small_world") / "data"
    load_example("small_world").write_llava_dataset(folder, num_captions=8, num_conversations=8, num_held_out=0)
    return folder


@pytest.fixture(scope="module")
def preferences() -> datasets.Dataset:
    """Four questions with a better and a worse answer: one image, none, two, one."""

    def message(role, text):
        return [{"role": role, "content": text}]

    rows = [
        ("What is the color of the circle?", "Red.", "A blue square and a dog.", 1),
        ("How many people?", "Two people.", "Red.", 0),
        ("What is left?", "A red circle.", "Me.", 2),
        ("Describe the image.", "A dog.", "No.", 1),
    ]
    return datasets.Dataset.from_list(
        [
            {
                "images": [make_image(10 * i + j) for j in range(num_images)],
                "prompt": message("user", question),
                "chosen": message("assistant", chosen),
                "rejected": message("assistant", rejected),
            }
            for i, (question, chosen, rejected, num_images) in enumerate(rows)
        ]
    ).cast_column("images", datasets.List(datasets.Image()))


def load_example(name: str):
    """A script of `examples/` as a module. Scripts import each other."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def logs(trainer) -> list[dict]:
    """The logged steps, without the summary of the run."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def outputs(model, batch) -> dict[str, torch.Tensor]:
    """Logits, both losses and a greedy answer."""
    model.eval()
    output = model(**batch, visual_objective="visual_words", logits_to_keep=0)
    prompt = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "pixel_values")}
    return {
        "logits": output.logits,
        "language_loss": output.language_loss,
        "visual_loss": output.visual_loss,
        "answer": model.generate(**prompt, max_new_tokens=4, do_sample=False),
    }


class TestAdapters:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("stage", [2, 4])
    def test_only_the_adapters_train(self, make_trainer, stage, method):
        trainer = make_trainer(stage, METHODS[method])
        before = weights(trainer.model)
        trainer.train()
        adapters = {name for name in before if "lora_" in name}
        assert changed(trainer.model, before) == adapters
        assert all("model.language_model." in name for name in adapters)
        assert any("magnitude" in name for name in adapters) == (method == "dora")
        first, last = logs(trainer)
        assert ("visual_loss" in first) == (stage == 4)
        assert first["loss"] == pytest.approx(first["language_loss"] + first.get("visual_loss", 0))
        assert last["language_loss"] < first["language_loss"]

    @pytest.mark.parametrize(("stage", "modules"), [(2, ["lm_head", "multi_modal_projector"]), (4, ["lm_head"])])
    def test_modules_to_save_train_too(self, make_trainer, stage, modules):
        trainer = make_trainer(stage, LoraConfig(target_modules=DECODER, modules_to_save=modules))
        before = weights(trainer.model)
        trainer.train()
        trained = {name for name in before if "lora_" in name or "modules_to_save" in name}
        assert changed(trainer.model, before) == trained
        assert all(any(f"{module}.modules_to_save" in name for name in trained) for module in modules)

    @pytest.mark.parametrize("stage", [2, 4])
    @pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ".*(q_proj|linear_1|vm_head)"], ids=str)
    def test_every_adapter_that_the_loss_can_reach_learns(
        self, make_trainer, model, stage, target_modules, monkeypatch
    ):
        """The vision tower has a `q_proj` as well. The VM head is a linear layer, and makes targets alone."""
        found = []
        monkeypatch.setattr("modeling_vwlmm.training.trainer.logger.warning", lambda message: found.append(message))
        trainer = make_trainer(stage, LoraConfig(target_modules=target_modules))
        before = weights(trainer.model)
        assert any("vision_tower" in name and "lora_" in name for name in before)
        trainer.train()
        # The adapter reads the layer before the tower's last.
        last = model.config.vision_config.num_hidden_layers - 1
        unread = ("vm_head", f"vision_tower.encoder.layers.{last}.")
        assert changed(trainer.model, before) == {
            name for name in before if "lora_" in name and not any(module in name for module in unread)
        }
        (message,) = [message for message in found if "no loss of this run depends on them" in message]
        assert f"vision_tower.encoder.layers.{last}." in message

    @pytest.mark.parametrize(
        ("stage", "where"), [(2, {"language_model", "multi_modal_projector"}), (4, {"language_model"})]
    )
    @pytest.mark.parametrize("excluded", [None, ["gate_proj"], r".*gate_proj"], ids=str)
    def test_all_linear_takes_what_the_stage_trains(self, make_trainer, stage, where, excluded):
        peft_config = LoraConfig(target_modules="all-linear", exclude_modules=excluded)
        trainer = make_trainer(stage, peft_config)
        before = weights(trainer.model)
        adapters = {name for name in before if "lora_" in name}
        assert {name.split(".")[3] for name in adapters} == where
        assert any("up_proj" in name for name in adapters)
        assert any("gate_proj" in name for name in adapters) == (excluded is None)
        trainer.train()
        assert changed(trainer.model, before) == adapters
        assert peft_config.exclude_modules in (None, excluded, set(excluded or ()))  # the user's own stays

    def test_vm_head_with_lora_makes_pseudo_image_features(self, make_trainer):
        trainer = make_trainer(4, LoraConfig(target_modules=".*(q_proj|vm_head)"))
        trainer.model.get_base_model().config.use_pseudo_image_features = True
        before = weights(trainer.model)
        trainer.train()
        assert any("vm_head" in name for name in changed(trainer.model, before))

    def test_what_the_folder_of_an_adapter_does_not_say_is_named(self, make_trainer, vicuna, caplog):
        settings = {"use_pseudo_image_features": True, "visual_word_temperature": 0.25}
        for changes in ({}, settings):
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna, trained_stages=[1, 2, 3], **changes)
            caplog.clear()
            make_trainer(4, METHODS["lora"], model=model)
            said = [r.getMessage() for r in caplog.records if "folder of an adapter" in r.getMessage()]
            assert len(said) == bool(changes)
        assert "use_pseudo_image_features=True, visual_word_temperature=0.25 will be there again if" in said[0]

    @pytest.mark.parametrize("method", METHODS)
    def test_gradient_checkpointing_makes_the_same_steps(self, make_trainer, method):
        """TRL's default, which lets the embeddings ask for gradients."""
        plain, checkpointed = (make_trainer(4, METHODS[method], gradient_checkpointing=c) for c in (False, True))
        for trainer in (plain, checkpointed):
            trainer.train()
        assert_close(weights(checkpointed.model), weights(plain.model))

    def test_adapter_on_the_mm_head_is_an_error(self, make_trainer):
        """The losses read the head's weight, and would not see the adapter."""
        with pytest.raises(ValueError, match="`lm_head`"):
            make_trainer(4, LoraConfig(target_modules=["q_proj", "lm_head"]))


class TestSavedAdapters:
    @pytest.fixture(params=[*METHODS, "modules_to_save"])
    def peft_config(self, request) -> LoraConfig:
        modules_to_save = LoraConfig(target_modules=DECODER, modules_to_save=["lm_head", "embed_tokens"])
        return METHODS.get(request.param, modules_to_save)

    @pytest.mark.parametrize("stage", [2, 4])
    def test_reloaded_and_merged(self, make_trainer, vicuna, dataset, tmp_path, peft_config, stage):
        trainer = make_trainer(stage, peft_config)
        batch = trainer.data_collator([dataset[i] for i in (0, 2, 5)])
        untrained = outputs(trainer.model, batch)
        trainer.train()
        trained = outputs(trainer.model, batch)
        assert (trained["logits"] - untrained["logits"]).abs().max() > 0.1
        trainer.save_model(tmp_path / "adapter")
        assert not (tmp_path / "adapter" / "model.safetensors").exists()

        base = VWLMMForConditionalGeneration.from_pretrained(vicuna)
        reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert_close(outputs(reloaded, batch), trained, atol=0, rtol=0)

        merged = reloaded.merge_and_unload()
        assert isinstance(merged, VWLMMForConditionalGeneration)
        merged_outputs = outputs(merged, batch)
        assert_close(merged_outputs, trained, atol=1e-5, rtol=0)
        merged.save_pretrained(tmp_path / "merged")
        again, loading = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not any(loading.values())
        assert_close(outputs(again, batch), merged_outputs, atol=0, rtol=0)

    def test_merged_in_the_run_that_trained_it(self, make_trainer, processor, tmp_path):
        """The checkpoint is an ordinary one: it names its stages, and the next stage starts from it."""
        trainer = make_trainer(2, METHODS["lora"])
        trainer.train()
        trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "merged")
        assert merged.config.trained_stages == [1, 2]
        following = make_trainer(3, model=merged, chat_template="vicuna_v1")
        before = weights(merged)
        following.train()
        assert changed(merged, before) == {"model.vm_head.weight"}
        following.save_model(tmp_path / "stage3")
        assert json.loads((tmp_path / "stage3" / "config.json").read_text())["trained_stages"] == [1, 2, 3]

    def test_training_goes_on_where_an_adapter_stopped(self, make_trainer, vicuna, tmp_path):
        trainer = make_trainer(4, METHODS["lora"])
        trainer.train()
        trainer.save_model(tmp_path / "adapter")
        base = VWLMMForConditionalGeneration.from_pretrained(vicuna)
        trainer = make_trainer(4, model=PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True))
        before = weights(trainer.model)
        trainer.train()
        assert changed(trainer.model, before) == {name for name in before if "lora_" in name}

    @pytest.mark.parametrize("load", [VWLMMForConditionalGeneration, AutoModelForImageTextToText])
    def test_transformers_loads_the_folder_of_an_adapter(self, make_trainer, dataset, tmp_path, load):
        trainer = make_trainer(4, METHODS["lora"])
        trainer.train()
        trainer.save_model(tmp_path / "adapter")
        batch = trainer.data_collator([dataset[0]])
        loaded = load.from_pretrained(tmp_path / "adapter")
        assert_close(outputs(loaded, batch), outputs(trainer.model, batch), atol=0, rtol=0)

    @pytest.mark.parametrize("stage", [2, 3])
    def test_training_beside_an_attached_adapter_is_an_error(self, make_trainer, tmp_path, stage):
        """Saving such a model writes the adapter alone: what the stage has trained would be lost."""
        make_trainer(2, METHODS["lora"]).save_model(tmp_path / "adapter")
        with pytest.raises(ValueError, match="adapter.*merge_and_unload"):
            make_trainer(stage, model=str(tmp_path / "adapter"))


class TestTRLTrainers:
    @pytest.fixture
    def make_dpo_trainer(self, model, processor, preferences, tmp_path):
        def make(peft_config=None, **kwargs):
            settings = {**SETTINGS, "gradient_accumulation_steps": 1, "max_steps": 4, "max_length": None, **kwargs}
            return DPOTrainer(
                model=model,
                args=DPOConfig(str(tmp_path / "dpo"), **settings),
                train_dataset=preferences,
                processing_class=copy.deepcopy(processor),
                peft_config=copy.deepcopy(peft_config),
            )

        return make

    @pytest.mark.parametrize("gradient_checkpointing", [False, True])
    def test_dpo_prefers_what_was_chosen(self, make_dpo_trainer, model, gradient_checkpointing):
        trainer = make_dpo_trainer(learning_rate=1e-3, gradient_checkpointing=gradient_checkpointing)
        before = weights(model)
        trainer.train()
        first, *_, last = logs(trainer)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
        assert last["rewards/margins"] > 0 and last["loss"] < first["loss"]
        trained = {name.split(".")[1] for name in changed(model, before)}
        assert trained == {"language_model", "multi_modal_projector", "weight"}  # the last one is the MM head's

    def test_dpo_with_lora(self, make_dpo_trainer):
        trainer = make_dpo_trainer(METHODS["lora"])
        before = weights(trainer.model)
        trainer.train()
        assert logs(trainer)[-1]["rewards/margins"] > 0
        assert changed(trainer.model, before) == {name for name in before if "lora_" in name}

    def test_dpo_scores_answers_as_the_model_does(self, make_dpo_trainer, model, preferences):
        trainer = make_dpo_trainer()
        model.eval()
        batch = trainer.data_collator([preferences[0], preferences[3]])
        chosen, rejected = trainer.compute_ref_log_probs(model, batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad():
            log_q = model(**inputs).logits[:, :-1].log_softmax(-1)  # [4, L - 1, C]
        answers = batch["completion_mask"][:, 1:].bool()  # [4, L - 1]
        ids = batch["input_ids"][:, 1:].masked_fill(~answers, 0)
        expected = (log_q.gather(-1, ids[..., None])[..., 0] * answers).sum(dim=1)  # [4]
        assert_close(torch.cat([chosen, rejected]), expected, atol=1e-4, rtol=1e-5)

        batch["pixel_values"] = batch["pixel_values"].flip(0)
        others = torch.cat(trainer.compute_ref_log_probs(model, batch))
        assert ((others - expected).abs() > 1e-3).all()

    def test_sft_trainer_takes_the_step_of_stage_2(self, make_trainer, model, processor, dataset, tmp_path):
        args = SFTConfig(str(tmp_path / "sft"), assistant_only_loss=True, max_length=None, **SETTINGS)
        trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=copy.deepcopy(processor))
        trainer.train()
        ours = make_trainer(2)
        ours.train()
        for entry, other in zip(logs(trainer), logs(ours), strict=True):
            assert entry["loss"] == pytest.approx(other["language_loss"], rel=1e-5)
        assert_close(weights(model), weights(ours.model), atol=1e-4, rtol=1e-4)


class TestRecipes:
    @pytest.mark.parametrize("world", ["small_world", "vicuna_7b"])
    def test_recipes_parse_and_follow_each_other(self, world):
        script_arguments = load_example("train").ScriptArguments
        previous = None
        for stage in (1, 2, 3, 4):
            parser = TrlParser((script_arguments, VWLMMTrainingArguments, ModelConfig))
            recipe = ["--config", str(EXAMPLES / "recipes" / world / f"stage{stage}.yaml")]
            script, training, model = parser.parse_args_and_config(
                [*recipe, "--use_cpu", "true", "--bf16", "false", "--tf32", "false"]
            )
            assert training.stage == stage
            assert model.model_name_or_path == previous
            assert (script.vision_tower is None, script.language_model is None) == (stage > 1, stage > 1)
            previous = training.output_dir

    @pytest.mark.parametrize(
        ("world", "method", "stages"), [("llama3_8b_vlsa", "vlsa", 3), ("llama2_7b_lavit", "lavit", 2)]
    )
    def test_recipes_of_other_methods(self, world, method, stages):
        """They parse, each starts from what the one before has written, and settings are those of the papers."""
        train = load_example("train")
        previous = None
        for stage in range(1, stages + 1):
            parser = TrlParser((train.ScriptArguments, VWLMMTrainingArguments, ModelConfig))
            recipe = ["--config", str(EXAMPLES / "recipes" / world / f"stage{stage}.yaml")]
            script, training, model = parser.parse_args_and_config([*recipe, "--use_cpu", "true", "--bf16", "false"])
            assert (training.method, training.stage) == (method, stage)
            assert previous == (script.visual_tokenizer if method == "lavit" else model.model_name_or_path)
            assert bool(script.vision_tower) == (stage == 1)
            previous = training.output_dir
            rates = {"vlsa": (1e-3, 2e-5, 2e-5), "lavit": (1e-4, 1e-4)}[method]
            batches = {"vlsa": (256, 128, 128), "lavit": (2048, 2048)}[method]
            assert (training.learning_rate, training.global_batch_size) == (rates[stage - 1], batches[stage - 1])
            if method == "vlsa":
                assert bool(script.cognition_alignment) == (stage == 3)
                assert training.get_objectives()[0].keys() == {"language", "reconstruction"}
                expected = {"adapter": "sa_perceiver", "adapter_config": {"max_patches": 4}} if stage == 1 else {}
                assert train.read_adapter(script) == expected
            elif stage == 2:
                assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.1)
                assert training.warmup_steps == 2000
                for entry in script.datasets:
                    train._check_entry(entry)

    @pytest.mark.parametrize("starts_from", ["parts", "checkpoint"])
    def test_adapter_of_a_recipe(self, starts_from, processor, small_world, tmp_path):
        """A perceiver and a processor that cuts for it, which train; of a checkpoint, in place of its adapter."""
        recipe = ["--config", str(EXAMPLES / "recipes/small_world/stage1.yaml"), "--adapter=sa_perceiver"]
        overrides = {
            "adapter_config": '{"max_patches": 2}',
            "json_file": small_world / "captions.json",
            "image_folder": small_world / "images",
            "output_dir": tmp_path / "run",
            "vision_tower": EXAMPLES / "small_world/vision_tower",
            "language_model": EXAMPLES / "small_world/llm",
            "max_steps": 1,
            "warmup_steps": 0,
            "global_batch_size": 2,
            "per_device_train_batch_size": 2,
            "dataloader_num_workers": 0,
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }
        if starts_from == "checkpoint":
            base = VWLMMForConditionalGeneration.from_vision_text_pretrained(
                tiny_vision("clip"),
                tiny_text("llama", vocab_size=480, max_position_embeddings=2048),
                image_token_index=processor.image_token_id,
            )
            base.save_pretrained(tmp_path / "base")
            processor.save_pretrained(tmp_path / "base")
            overrides["model_name_or_path"] = tmp_path / "base"
        load_example("train").main([*recipe, *(f"--{name}={value}" for name, value in overrides.items())])
        model = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "run")
        assert (model.config.adapter, model.config.adapter_config) == ("sa_perceiver", {"max_patches": 2})
        assert model.model.multi_modal_projector.perceiver.w_o1.weight.any()
        assert type(processor).from_pretrained(tmp_path / "run").max_patches == 2

    def test_temperatures_of_a_recipe(self, tmp_path, monkeypatch):
        """Whole numbers, too, reach the model that trains."""
        train = load_example("train")
        recipe = (EXAMPLES / "recipes/small_world/stage4.yaml").read_text()
        words = "visual_word_temperature: 2\npseudo_image_feature_temperature: 0.5\nuse_pseudo_image_features: true\n"
        (tmp_path / "recipe.yaml").write_text(f"{recipe}\n{words}")
        config, found = VWLMMConfig(), {}
        model = SimpleNamespace(config=config)
        data = datasets.Dataset.from_list([{"images": [], "messages": []}])
        monkeypatch.setattr(train, "load_data", lambda *_: data)
        monkeypatch.setattr(train, "load_model", lambda *_: (model, None))
        monkeypatch.setattr(train, "find_last_checkpoint", lambda _: None)
        monkeypatch.setattr(train, "VWLMMTrainer", lambda **kwargs: found.update(kwargs) or MagicMock())
        train.main(["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "--bf16", "false"])
        assert found["model"] is model and config.use_pseudo_image_features
        assert (config.visual_word_temperature, config.pseudo_image_feature_temperature) == (2, 0.5)

    def test_bad_adapter_of_a_recipe(self):
        train = load_example("train")
        with pytest.raises(ValueError, match="`adapter` is 'perceiver'; expected one of mlp, sa_perceiver"):
            train.read_adapter(train.ScriptArguments(adapter="perceiver"))
        with pytest.raises(ValueError, match="`adapter_config` is 4; expected a mapping"):
            train.read_adapter(train.ScriptArguments(adapter="sa_perceiver", adapter_config="4"))

    def test_qlora(self, small_world, processor, tmp_path):
        """The recipe on a small model: what it saves loads on the 4-bit base, and merges into the whole one."""
        pytest.importorskip("bitsandbytes")
        size = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit weights come in blocks of 64
        base = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            tiny_vision("clip", **size),
            tiny_text("llama", **size, vocab_size=480, max_position_embeddings=2048),
            image_token_index=processor.image_token_id,
            trained_stages=[1],
        )
        base.save_pretrained(tmp_path / "base")
        processor.save_pretrained(tmp_path / "base")
        overrides = {
            "model_name_or_path": tmp_path / "base",
            "json_file": small_world / "instructions.json",
            "image_folder": small_world / "images",
            "output_dir": tmp_path / "qlora",
            "max_steps": 2,
            "global_batch_size": 4,
            "per_device_train_batch_size": 2,
            "dataloader_num_workers": 0,
            "lora_r": 4,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }
        command = ["--config", str(EXAMPLES / "recipes/vicuna_7b/qlora.yaml")]
        load_example("train").main([*command, *(f"--{name}={value}" for name, value in overrides.items())])

        saved = load_file(tmp_path / "qlora" / "adapter_model.safetensors")
        assert {name.split(".")[3] for name in saved} == {"language_model", "multi_modal_projector"}
        assert all(("lora_" in name) == ("language_model" in name) for name in saved)
        adapter = saved["base_model.model.model.multi_modal_projector.linear_1.weight"]
        assert not torch.equal(adapter.float(), base.model.multi_modal_projector.linear_1.weight)
        ids = torch.tensor([[5, 6, 7]])
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        for options in ({"quantization_config": four_bits}, {}):
            model = PeftModel.from_pretrained(
                VWLMMForConditionalGeneration.from_pretrained(tmp_path / "base", **options), tmp_path / "qlora"
            )
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            assert logits.isfinite().all()
        merged = model.merge_and_unload()
        with torch.no_grad():
            assert_close(merged(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)

    def test_objectives_from_the_command_line(self, tmp_path):
        parser = TrlParser(VWLMMTrainingArguments)
        common = ["--output_dir", str(tmp_path), "--stage", "4", "--use_cpu", "true", "--bf16", "false"]
        for text, objective in (("features", "features"), ('{"visual_words": 0.1}', {"visual_words": 0.1})):
            (args,) = parser.parse_args_and_config(
                [*common, "--visual_objective", text, "--trains", "adapter", "decoder"]
            )
            assert (args.visual_objective, args.trains) == (objective, ["adapter", "decoder"])

    def test_data_without_a_column_are_refused_before_weights_are_looked_for(self, small_world, tmp_path):
        command = [
            "--json_file",
            str(small_world / "instructions.json"),
            "--image_folder",
            str(small_world / "images"),
        ]
        command += ["--model_name_or_path", str(tmp_path / "nothing"), "--output_dir", str(tmp_path), "--stage", "4"]
        command += ["--visual_objective", "token_labels", "--use_cpu", "true", "--bf16", "false"]
        with pytest.raises(ValueError, match="`token_labels` learns from a column `image_labels`"):
            load_example("train").main(command)

    def test_accelerate_launches_the_four_stages(self, small_world, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(ROOT)  # a recipe names the pretrained parts from here
        for stage in (1, 2, 3, 4):
            data = small_world / ("captions.json" if stage in (1, 3) else "instructions.json")
            overrides = {"json_file": data, "image_folder": small_world / "images"}
            overrides |= {"output_dir": tmp_path / f"stage{stage}", "max_steps": 2, "logging_steps": 1}
            overrides |= {"global_batch_size": 4, "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
            overrides |= {"disable_tqdm": True}
            if stage > 1:
                overrides["model_name_or_path"] = tmp_path / f"stage{stage - 1}"
            command = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "examples/train.py"]
            command += ["--config", f"examples/recipes/small_world/stage{stage}.yaml"]
            command += [f"--{name}={value}" for name, value in overrides.items()]
            launch_command(launch_command_parser().parse_args(command))
            lines = capfd.readouterr().out.splitlines()
            entries = [ast.literal_eval(line) for line in lines if line.startswith("{'loss'")]
            assert len(entries) == 2
            for entry in entries:
                assert {name for name in ("language_loss", "visual_loss") if name in entry} == LOSSES[stage]
                assert math.isfinite(float(entry["loss"]))
            # The recipe's, in all stages but III other than the default. The first step is warm-up.
            assert float(entries[1]["learning_rate"]) == {1: 2e-3, 2: 1e-3, 3: 5e-3, 4: 5e-4}[stage]

        folders = [tmp_path / f"stage{stage}" for stage in (1, 2, 3, 4)]
        stages = [json.loads((folder / "config.json").read_text())["trained_stages"] for folder in folders]
        assert stages == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
        # Each went on from the weights of the one before: what it does not train is bit for bit there.
        tensors = [load_file(folder / "model.safetensors") for folder in folders]
        for stage, before, after in zip((2, 3, 4), tensors, tensors[1:], strict=False):
            kept = {name for name in after if torch.equal(after[name], before[name])}
            modules = {name.removeprefix("model.").split(".")[0] for name in after.keys() - kept}
            assert modules == TRAINS[stage]

    def test_dora_from_the_command_line(self, vicuna, small_world, tmp_path):
        options = {"stage": 4, "model_name_or_path": vicuna, "json_file": small_world / "instructions.json"}
        options |= {"image_folder": small_world / "images", "output_dir": tmp_path / "adapter"}
        options |= {"use_peft": True, "use_dora": True, "lora_target_modules": DECODER, **SETTINGS}
        load_example("train").main([str(part) for name, value in options.items() for part in (f"--{name}", value)])
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["use_dora"] and config["target_modules"] == DECODER
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert tensors and all("language_model" in name and "lora_" in name for name in tensors)
