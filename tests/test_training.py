# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The four stages: what trains, on which loss, over which positions, and what stops a run."""

import copy
import json
import math

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from conftest import BY_HAND, GOLDEN, make_conversation, make_image
from peft import LoraConfig
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training.answers import find_answers
from modeling_vwlmm.training.packing import count_tokens, pack_rows
from modeling_vwlmm.training.sampling import estimate_lengths
from modeling_vwlmm.training.trainer import set_trainable_parameters
from modeling_vwlmm.training.watching import History
from processing_vwlmm import VWLMMProcessor, mix_datasets


IMAGE = 480  # id of the placeholder
ADAPTER, DECODER, MM_HEAD, VM_HEAD = (
    "model.multi_modal_projector.",
    "model.language_model.",
    "lm_head.",
    "model.vm_head.",
)
TRAINS = {1: (ADAPTER,), 2: (DECODER, MM_HEAD, ADAPTER), 3: (VM_HEAD,), 4: (DECODER, MM_HEAD)}
LOSSES = {1: {"language"}, 2: {"language"}, 3: {"visual"}, 4: {"language", "visual"}}


@pytest.fixture(scope="session")
def captions() -> datasets.Dataset:
    """Eight captions of unequal length, one with two images: data of stages I and III."""
    words = ["a", "red", "circle", "left", "of", "a", "blue", "square"]
    samples = [make_conversation((1 + (i == 3), "", " ".join(words[: i + 1]))) for i in range(8)]
    return datasets.Dataset.from_dict(
        {
            "id": [f"caption-{i}" for i in range(8)],
            "messages": samples,
            "images": [[make_image(100 + 10 * i + j) for j in range(1 + (i == 3))] for i in range(8)],
        }
    ).cast_column("images", datasets.List(datasets.Image()))


@pytest.fixture
def make_trainer(model, processor, dataset, captions, tmp_path):
    """Makes a trainer with settings under which a step can be computed by hand."""

    def make(stage, train_dataset=None, model=model, trainer_kwargs=None, **kwargs):
        defaults = {
            "per_device_train_batch_size": 4,
            "global_batch_size": 8,
            "max_steps": 1,
            **BY_HAND,
        }
        args = VWLMMTrainingArguments(**{"output_dir": str(tmp_path / "run"), "stage": stage, **defaults, **kwargs})
        if train_dataset is None:
            train_dataset = captions if stage in (1, 3) else dataset
        return VWLMMTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=copy.deepcopy(processor),
            **(trainer_kwargs or {}),
        )

    return make


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logs(trainer) -> list[dict]:
    """The logged steps, without the summary of the run."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model, trainer, samples, stage) -> dict[str, float]:
    """Both losses of samples, one sample and one position at a time."""
    language, visual, entropy = [], [], []
    for sample in samples:
        inputs = trainer.data_collator([sample])
        labels = inputs.pop("labels")[0].tolist()
        with torch.no_grad():
            output = model(**inputs)
        log_q = output.logits[0].double().log_softmax(-1)  # [L, C]
        language += [-log_q[n - 1, label] for n, label in enumerate(labels) if n > 0 and label != -100]
        positions = [n for n, token in enumerate(inputs["input_ids"][0].tolist()) if token == IMAGE]
        for i, n in enumerate(positions):
            if n > 0:
                log_p = model.model.vm_head(output.image_hidden_states[i]).double().log_softmax(-1).detach()
                student, teacher = (log_p, log_q[n - 1]) if stage == 3 else (log_q[n - 1], log_p)
                visual.append(F.kl_div(student, teacher, log_target=True, reduction="sum"))
                entropy.append(-(log_p.exp() * log_p).sum())
    expected = {}
    if "language" in LOSSES[stage]:
        expected |= {"language_loss": torch.stack(language).mean().item(), "num_text_positions": len(language)}
    if "visual" in LOSSES[stage]:
        expected |= {"visual_loss": torch.stack(visual).mean().item(), "num_image_positions": len(visual)}
        expected["visual_word_entropy"] = torch.stack(entropy).mean().item()
    expected["loss"] = expected.get("language_loss", 0) + expected.get("visual_loss", 0)
    return expected


class TestArguments:
    def test_no_stage_and_unknown_stage(self, tmp_path):
        for stage in (None, 0, 5, "2"):
            with pytest.raises(ValueError, match=rf"`stage` is {stage!r}; expected 1, 2, 3 or 4"):
                VWLMMTrainingArguments(str(tmp_path), stage=stage)

    @pytest.mark.parametrize(
        ("stage", "global_batch_size", "learning_rate", "chat_template", "objective"),
        [
            (1, 256, 1e-3, "plain", None),
            (2, 128, 2e-5, None, None),
            (3, 256, 1e-3, "plain", "vm_head"),
            (4, 128, 2e-5, None, "visual_words"),
        ],
    )
    def test_defaults_are_those_of_the_paper(
        self, tmp_path, stage, global_batch_size, learning_rate, chat_template, objective
    ):
        args = VWLMMTrainingArguments(str(tmp_path), stage=stage, per_device_train_batch_size=16, use_cpu=True)
        assert args.global_batch_size == global_batch_size
        assert args.gradient_accumulation_steps == global_batch_size // 16
        assert args.learning_rate == learning_rate
        assert args.chat_template == chat_template
        assert args.visual_objective == objective
        assert (args.weight_decay, args.lr_scheduler_type, args.num_train_epochs) == (0, "cosine", 1)
        assert args.optim.value.startswith("adamw")
        assert args.get_warmup_steps(1000) == 30
        assert args.assistant_only_loss

    def test_what_the_user_passes_wins(self, tmp_path):
        args = VWLMMTrainingArguments(
            str(tmp_path),
            stage=1,
            use_cpu=True,
            per_device_train_batch_size=2,
            global_batch_size=6,
            learning_rate=0.5,
            chat_template="vicuna_v1",
            lr_scheduler_type="linear",
            warmup_steps=7,
            num_train_epochs=3,
            weight_decay=0.1,
            max_length=99,
        )
        assert (args.gradient_accumulation_steps, args.learning_rate, args.chat_template) == (3, 0.5, "vicuna_v1")
        assert (args.lr_scheduler_type, args.get_warmup_steps(1000), args.num_train_epochs) == ("linear", 7, 3)
        assert (args.weight_decay, args.max_length) == (0.1, 99)

    def test_accumulation_steps_give_the_global_batch_size(self, tmp_path):
        args = VWLMMTrainingArguments(
            str(tmp_path), stage=2, per_device_train_batch_size=4, gradient_accumulation_steps=3, use_cpu=True
        )
        assert args.global_batch_size == 12

    def test_both_must_agree(self, tmp_path):
        with pytest.raises(
            ValueError, match="`global_batch_size` is 16, but .* is 12.*Leave `gradient_accumulation_st"
        ):
            VWLMMTrainingArguments(
                str(tmp_path),
                stage=2,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=3,
                global_batch_size=16,
            )

    @pytest.mark.parametrize(
        ("world_size", "per_device", "size", "message"),
        [
            (1, 8, 20, r"not a multiple of the 8 .*Set it to 16 or 24, or set `per_device_train_batch_size` to 5\."),
            (1, 8, 4, r"Set it to 8, or set `per_device_train_batch_size` to 4\."),
            (4, 8, 100, r"the 32 samples .*4 processes.*Set it to 96 or 128, or set .* to 5\."),
            (3, 8, 128, r"the 24 samples .*3 processes.*Set it to 120 or 144\."),
            (1, 8, 0, r"`global_batch_size` is 0.*Set it to 8\."),
        ],
    )
    def test_impossible_sizes(self, tmp_path, monkeypatch, world_size, per_device, size, message):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        with pytest.raises(ValueError, match=message):
            VWLMMTrainingArguments(
                str(tmp_path), stage=4, per_device_train_batch_size=per_device, global_batch_size=size
            )

    def test_processes_count(self, tmp_path, monkeypatch):
        # Set for this alone: the arguments read it first, and a process group cannot be joined here.
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: None)
        args = VWLMMTrainingArguments(str(tmp_path), stage=4, per_device_train_batch_size=8)
        assert args.gradient_accumulation_steps == 4

    def test_ablation_has_no_visual_objective(self, tmp_path):
        args = VWLMMTrainingArguments(str(tmp_path), stage=4, visual_loss_weight=0, use_cpu=True)
        assert args.visual_objective is None


class TestWhatTrains:
    @pytest.mark.parametrize("use_pseudo_image_features", [False, True], ids=["plain", "pseudo_image_features"])
    @pytest.mark.parametrize("stage", [1, 2, 3, 4])
    def test_parameters_of_the_stage_and_no_other(self, make_trainer, model, stage, use_pseudo_image_features):
        model.config.use_pseudo_image_features = use_pseudo_image_features
        before = weights(model)
        trainer = make_trainer(stage, max_steps=2)
        trainer.train()
        changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if name.startswith(TRAINS[stage])}

    def test_frozen_from_an_earlier_stage_trains_again(self, make_trainer, model):
        make_trainer(1)
        assert not model.lm_head.weight.requires_grad
        make_trainer(4)
        assert model.lm_head.weight.requires_grad
        assert not any(parameter.requires_grad for parameter in model.model.multi_modal_projector.parameters())

    def test_ablation_trains_on_the_language_loss_alone(self, make_trainer, model):
        before = weights(model)
        trainer = make_trainer(4, visual_loss_weight=0)
        trainer.train()
        changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if name.startswith(TRAINS[4])}
        assert "visual_loss" not in logs(trainer)[0]
        assert logs(trainer)[0]["loss"] == pytest.approx(logs(trainer)[0]["language_loss"])

    def test_visual_loss_weight(self, make_trainer):
        entry = (trainer := make_trainer(4, visual_loss_weight=0.5)).train() and logs(trainer)[0]
        assert entry["loss"] == pytest.approx(entry["language_loss"] + 0.5 * entry["visual_loss"])

    def test_visual_loss_weight_is_not_of_stage_3(self, make_trainer):
        entry = (trainer := make_trainer(3, visual_loss_weight=0)).train() and logs(trainer)[0]
        assert entry["loss"] == pytest.approx(entry["visual_loss"])
        assert entry["loss"] > 0.1

    def test_stage_3_and_4_lower_their_losses(self, make_trainer):
        for stage in (3, 4):
            trainer = make_trainer(stage, max_steps=6)
            trainer.train()
            first, *_, last = logs(trainer)
            for name in LOSSES[stage]:
                assert last[f"{name}_loss"] < first[f"{name}_loss"]

    def test_defaults_of_trl_train_too(self, make_trainer):
        """bf16 and gradient checkpointing, which the other tests switch off."""
        for stage in (2, 3, 4):
            trainer = make_trainer(stage, bf16=True, gradient_checkpointing=True)
            trainer.train()
            assert math.isfinite(logs(trainer)[0]["loss"])


class TestPrompts:
    def test_stage_1_reads_captions_as_llava_does(self, make_trainer):
        """Token ids and labels of LLaVA's own preprocessing."""
        case = next(c for c in json.loads((GOLDEN / "llava_labels.json").read_text()) if c["template"] == "plain")
        caption = case["conversations"][-1]["value"]
        collator = make_trainer(1).data_collator
        batch = collator([{"messages": make_conversation((1, "", caption)), "images": [make_image(1)]}])
        for name, filler in (("input_ids", IMAGE), ("labels", -100)):
            expected = [
                t
                for token, i in zip(case[name], case["input_ids"], strict=True)
                for t in [token if i != -200 else filler] * (16 if i == -200 else 1)
            ]
            assert batch[name][0].tolist() == expected

    def test_stage_2_supervises_what_the_assistant_says(self, make_trainer, processor, dataset):
        batch = make_trainer(2).data_collator([dataset[3]])
        labels = batch["labels"][0]
        assert processor.decode(labels[labels != -100]) == processor.decode(
            processor.tokenizer("Hello.</s>A blue square and a dog.</s>", add_special_tokens=False).input_ids
        )

    def test_processor_keeps_its_own_template(self, make_trainer, processor):
        trainer = make_trainer(1)
        assert trainer.processing_class.chat_template == processor.chat_template

    def test_template_of_the_user(self, make_trainer, processor, captions):
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}<image>{% else %}"
            "{% generation %}X{% endgeneration %}{% endif %}{% endfor %}"
        )
        batch = make_trainer(3, chat_template=template).data_collator([captions[0]])
        assert batch["input_ids"].shape[1] == 16 + len(processor.tokenizer("X", add_special_tokens=False).input_ids)


class TestNormalisation:
    SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}

    @pytest.mark.parametrize("stage", [1, 2, 3, 4])
    def test_micro_batches_make_the_same_step(self, make_trainer, vicuna, stage):
        results = []
        for size in (8, 4, 2, 1):
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
            before = weights(model)
            trainer = make_trainer(stage, model=model, per_device_train_batch_size=size, **self.SGD)
            assert trainer.args.gradient_accumulation_steps == 8 // size
            trainer.train()
            results.append((logs(trainer)[0], weights(model)))
        (log, after), *others = results
        assert any((after[name] - before[name]).abs().max() > 1e-3 for name in after)
        for other_log, other_after in others:
            for name in [*(f"{loss}_loss" for loss in LOSSES[stage]), "loss"]:
                assert other_log[name] == pytest.approx(log[name], rel=1e-5), name
            for name in after:
                assert_close(other_after[name], after[name], atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    def test_last_step_of_an_epoch_may_be_short(self, make_trainer, vicuna, dataset):
        """Three samples in micro-batches of two: one of two, one of one."""
        results = []
        for size, step in ((2, 8), (4, 8)):
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
            trainer = make_trainer(
                4,
                dataset.select(range(3)),
                model=model,
                per_device_train_batch_size=size,
                global_batch_size=step,
                **self.SGD,
            )
            trainer.train()
            results.append((logs(trainer)[0]["loss"], weights(model)))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        for name, value in results[0][1].items():
            assert_close(value, results[1][1][name], atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("stage", [1, 2, 3, 4])
    def test_gradient_is_that_of_the_means_over_all_positions(self, make_trainer, model, vicuna, stage):
        """The SGD step divided by the learning rate is the gradient of the two means of the whole batch."""
        trainer = make_trainer(stage, model=model, per_device_train_batch_size=2, **self.SGD)
        reference = VWLMMForConditionalGeneration.from_pretrained(vicuna)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        before = weights(model)
        trainer.train()
        reference(**batch, visual_objective=trainer.args.visual_objective).loss.backward()
        for name, value in weights(model).items():
            if name.startswith(TRAINS[stage]):
                gradient = reference.get_parameter(name).grad
                assert_close((before[name] - value) / 0.1, gradient, atol=2e-5, rtol=1e-4)


class TestPacking:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("use_pseudo_image_features", [False, True])
    @pytest.mark.parametrize("stage", [1, 2, 3, 4])
    def test_packed_samples_make_the_same_step(
        self, make_trainer, vicuna, stage, use_pseudo_image_features, implementation
    ):
        gradients = []
        for packing in (False, True):
            model = VWLMMForConditionalGeneration.from_pretrained(
                vicuna, attn_implementation=implementation, use_pseudo_image_features=use_pseudo_image_features
            )
            trainer = make_trainer(stage, model=model, packing=packing, optim="sgd", learning_rate=1.0)
            before = weights(model)
            trainer.train()
            (entry,) = logs(trainer)
            gradients.append({name: before[name] - value for name, value in weights(model).items()} | {"log": entry})
        plain, packed = (gradient.pop("log") for gradient in gradients)
        assert packed.pop("padding_share") == 0 < plain.pop("padding_share")
        for name in ("loss", *(f"{loss}_loss" for loss in LOSSES[stage])):
            assert packed[name] == pytest.approx(plain[name], rel=1e-5)
        assert {n: v for n, v in packed.items() if "num_" in n} == {n: v for n, v in plain.items() if "num_" in n}
        for name, gradient in gradients[0].items():
            assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)

    def test_a_row_holds_the_samples_of_a_micro_batch(self, make_trainer, dataset):
        collator = make_trainer(2, packing=True).data_collator
        samples = [dataset[i] for i in range(3)]
        alone = [collator([dataset[i]]) for i in range(3)]
        row = collator(samples)
        for name in ("input_ids", "labels", "position_ids"):
            assert_close(row[name], torch.cat([sample[name] for sample in alone], dim=1))
        assert "attention_mask" not in row
        assert_close(row["pixel_values"], torch.cat([s["pixel_values"] for s in alone if "pixel_values" in s]))

    def test_evaluation(self, make_trainer, dataset):
        losses = [
            make_trainer(4, packing=packing, trainer_kwargs={"eval_dataset": dataset}).evaluate()["eval_loss"]
            for packing in (False, True)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    def test_what_would_not_be_packed_is_an_error(self, make_trainer, dataset):
        with pytest.raises(
            ValueError, match="`packing` is set, and batches come from a DataCollatorForLanguageModeling"
        ):
            make_trainer(2, dataset.select([1, 6]).remove_columns("images"), packing=True)


class TestPackingAcrossTheDataset:
    LENGTHS = np.random.default_rng(0).integers(1, 100, 300)
    SMALL_ROWS = {"packing": True, "max_length": 400, "per_device_train_batch_size": 2, "global_batch_size": 2}

    @pytest.fixture
    def many(self, dataset) -> datasets.Dataset:
        return datasets.concatenate_datasets([dataset] * 3)

    def test_every_sample_is_in_one_row_and_no_row_is_too_long(self):
        rows = pack_rows(self.LENGTHS, 128)
        assert sorted(index for row in rows for index in row) == list(range(300))
        assert max(self.LENGTHS[list(row)].sum() for row in rows) <= 128

    def test_best_fit(self):
        for lengths, rows in (
            ([6, 5, 5, 3, 1], [[1, 3, 6], [5, 5]]),
            ([7, 6, 3], [[3, 7], [6]]),  # where it leaves no room, though there is more elsewhere
            ([7, 6, 4, 3], [[3, 7], [4, 6]]),
        ):
            assert sorted(sorted(lengths[i] for i in row) for row in pack_rows(lengths, 10)) == rows

    def test_follows_from_seed_and_epoch(self):
        rows = pack_rows(self.LENGTHS, 128, seed=1, epoch=2)
        assert rows == pack_rows(self.LENGTHS, 128, seed=1, epoch=2)
        for other in (pack_rows(self.LENGTHS, 128, 1, 3), pack_rows(self.LENGTHS, 128, 2, 2)):
            assert set(map(frozenset, other)) != set(map(frozenset, rows))
            assert len(other) == len(rows)

    def test_longer_than_a_row_has_one_of_its_own(self):
        assert sorted(pack_rows([500, 128, 1], 128)) == [(0,), (1,), (2,)]

    @pytest.mark.parametrize("template", [None, "plain"])
    @pytest.mark.parametrize("text", ["parts", "string"])
    def test_tokens_are_counted_as_the_collator_makes_them(self, make_trainer, dataset, captions, template, text):
        samples = dataset if template is None else captions
        if text == "string":  # TRL puts the placeholders in front of the first question
            samples = samples.map(
                lambda sample: {
                    "messages": [
                        {"role": m["role"], "content": "".join(part["text"] or "" for part in m["content"])}
                        for m in sample["messages"]
                    ]
                },
                features=datasets.Features(
                    {
                        **samples.features,
                        "messages": datasets.List(
                            {"role": datasets.Value("string"), "content": datasets.Value("string")}
                        ),
                    }
                ),
            )
        collator = make_trainer(2, samples, chat_template=template).data_collator
        expected = [collator([sample])["input_ids"].shape[1] for sample in samples]
        assert count_tokens(samples, collator).tolist() == expected
        lengths = samples.add_column("length", list(range(len(samples))))
        assert count_tokens(lengths, collator).tolist() == list(range(len(samples)))

    def test_data_that_cannot_be_counted_is_an_error(self, make_trainer, dataset):
        collator = make_trainer(2).data_collator
        with pytest.raises(ValueError, match="has id, images. Give it `messages`, or a column `length`"):
            count_tokens(dataset.remove_columns("messages"), collator)

    @pytest.mark.parametrize("flattens_rows", [False, True])
    @pytest.mark.parametrize("stage", [1, 2, 3, 4])
    def test_rows_make_the_step_of_their_samples(self, make_trainer, vicuna, many, captions, stage, flattens_rows):
        samples = many if stage in (2, 4) else captions
        trainer = make_trainer(stage, samples, packing=True, max_length=400, chat_template="vicuna_v1")
        collator = trainer.data_collator
        collator.flattens_rows = flattens_rows
        lengths = count_tokens(samples, collator)
        rows = pack_rows(lengths, 400)[:3]
        packed = collator([[samples[i] for i in row] for row in rows])
        assert packed["input_ids"].shape[0] == (1 if flattens_rows else 3)
        # Rows of unlike length: what fills them up must not be learned, nor seen.
        assert len({lengths[list(row)].sum() for row in rows}) > 1
        plain = make_trainer(stage, samples, chat_template="vicuna_v1").data_collator(
            [samples[i] for row in rows for i in row]
        )
        results = []
        for batch in (plain, packed):
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
            set_trainable_parameters(model, stage)
            batch = {name: value for name, value in batch.items() if name != "attention_mask"}
            output = model(**batch, visual_objective=trainer.args.visual_objective, use_cache=False)
            output.loss.backward()
            results.append((output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (one, gradients), (other, others) = results
        assert {name: term.count for name, term in one.terms.items()} == {n: t.count for n, t in other.terms.items()}
        assert_close(other.loss, one.loss, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            assert_close(others[name], gradient, atol=1e-6, rtol=1e-4)

    def test_nothing_is_predicted_from_the_sample_before(self, make_trainer, dataset):
        """Where all text is supervised, the first token of a sample is, too."""
        plain, packed = (
            make_trainer(2, packing=packing, assistant_only_loss=False).data_collator([dataset[i] for i in range(3)])
            for packing in (False, True)
        )
        for batch in (plain, packed):
            batch["supervised"] = len(batch["supervised_positions"]["by_objective"]["language"])
        assert packed["supervised"] == plain["supervised"]
        assert (packed["labels"][packed["position_ids"] == 0] == -100).all()

    def test_samplers_are_told_the_epoch(self, make_trainer, many):
        """By the trainer: on several processes a resumed run's data loader hides them from Accelerate."""
        for options in (self.SMALL_ROWS, {"train_sampling_strategy": "group_by_length"}):
            trainer = make_trainer(2, many, **options)
            sampler = trainer.get_train_dataloader().batch_sampler.sampler
            trainer.state.epoch = 3.25  # as a run that is resumed there has it
            trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
            assert sampler.epoch == 3

    def test_a_step_takes_rows_and_logs_what_fills_them_up(self, make_trainer, many):
        trainer = make_trainer(2, many, **self.SMALL_ROWS)
        rows = pack_rows(count_tokens(many, trainer.data_collator), 400, trainer.args.seed)
        trainer.train()
        (entry,) = logs(trainer)
        batch = trainer.data_collator([[many[i] for i in row] for row in rows[:2]])
        assert batch["input_ids"].shape[0] == 2
        assert entry["num_text_positions"] == (batch["labels"] != -100).sum()
        alone = [trainer.data_collator([many[i]])["input_ids"].shape[1] for row in rows[:2] for i in row]
        assert entry["padding_share"] == pytest.approx(1 - sum(alone) / batch["input_ids"].numel())

    def test_all_samples_in_every_epoch(self, make_trainer, many):
        trainer = make_trainer(2, many, **self.SMALL_ROWS, max_steps=-1, num_train_epochs=2)
        seen = []
        collate = trainer.data_collator.torch_call
        trainer.data_collator.torch_call = lambda rows: (
            seen.append([s["id"] for r in rows for s in r]) or collate(rows)
        )
        trainer.train()
        epochs = len(seen) // 2
        assert sorted(sum(seen[:epochs], [])) == sorted(sum(seen[epochs:], [])) == sorted(many["id"])
        assert seen[:epochs] != seen[epochs:]

    @pytest.mark.parametrize(
        "options", [SMALL_ROWS, {"train_sampling_strategy": "group_by_length"}], ids=["packed", "grouped"]
    )
    def test_resumed_in_the_second_epoch(self, make_trainer, vicuna, many, tmp_path, options):
        """The order of an epoch follows from its number, also where batches of it are skipped."""
        options = {
            "per_device_train_batch_size": 2,
            "global_batch_size": 2,
            "max_steps": -1,
            "num_train_epochs": 2,
        } | options
        steps = make_trainer(2, many, **options).get_train_dataloader()
        stop = len(steps) + len(steps) // 2
        results = []
        for resumes in (False, True):
            folder = tmp_path / f"{resumes}"
            kwargs = {**options, "output_dir": str(folder), "save_strategy": "steps", "save_steps": stop}
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
            trainer = make_trainer(2, many, model=model, **kwargs)
            checkpoint = str(tmp_path / "False" / f"checkpoint-{stop}") if resumes else None
            trainer.train(resume_from_checkpoint=checkpoint)
            assert trainer.state.global_step == 2 * len(steps) > stop
            results.append(weights(model))
        for name, value in results[0].items():
            assert torch.equal(results[1][name], value), name

    def test_a_column_of_lengths_that_are_no_tokens(self, make_trainer, many):
        data = many.add_column("length", [1] * len(many))
        with pytest.raises(ValueError, match="were packed into a row of 400 tokens, and have.*says less"):
            make_trainer(2, data, **self.SMALL_ROWS).train()

    def test_options_that_do_not_go_together(self, make_trainer, dataset, caplog):
        with pytest.raises(ValueError, match="`packing` puts samples of unlike length together.*Leave one"):
            make_trainer(2, packing=True, train_sampling_strategy="group_by_length")
        with pytest.raises(ValueError, match="`packing` fills rows of `max_length` tokens, which is None"):
            make_trainer(2, packing=True, max_length=None)
        make_trainer(2, dataset.to_iterable_dataset(), packing=True)
        assert "streamed data puts the samples of a micro-batch into one row" in caplog.text


class TestGrouping:
    @pytest.fixture
    def mixed(self, dataset) -> datasets.Dataset:
        return datasets.concatenate_datasets([dataset] * 12)

    def order(self, trainer, epoch=0) -> list[int]:
        sampler = trainer._get_train_sampler()
        sampler.set_epoch(epoch)
        return list(sampler)

    def test_a_batch_has_images_or_none(self, make_trainer, mixed):
        trainer = make_trainer(4, mixed, train_sampling_strategy="group_by_length")
        order = self.order(trainer)
        assert sorted(order) == list(range(len(mixed)))
        whole = [order[start : start + 8] for start in range(0, len(order) // 8 * 8, 8)]
        mixtures = [batch for batch in whole if len({bool(mixed[i]["images"]) for i in batch}) > 1]
        assert len(mixtures) <= 1  # what is left over of both kinds

    def test_less_padding(self, make_trainer, mixed):
        shares = {}
        for strategy in ("random", "group_by_length"):
            trainer = make_trainer(4, mixed, train_sampling_strategy=strategy, max_steps=-1, logging_steps=1000)
            trainer.train()
            shares[strategy] = next(entry["padding_share"] for entry in trainer.state.log_history)
        assert shares["group_by_length"] < 0.5 * shares["random"]

    def test_order_follows_from_seed_and_epoch(self, make_trainer, mixed):
        def order(epoch, **kwargs):
            return self.order(make_trainer(4, mixed, train_sampling_strategy="group_by_length", **kwargs), epoch)

        assert order(0) == order(0)
        assert order(0) != order(1)
        assert order(0) != order(0, seed=1)
        assert order(0, seed=1) == order(0, data_seed=1)

    def test_training_goes_through_another_order_each_epoch(self, make_trainer, mixed):
        seen = []

        class Recorder(VWLMMTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                seen.append(inputs["input_ids"].tolist())
                return super().compute_loss(model, inputs, *args, **kwargs)

        trainer = make_trainer(4, mixed, train_sampling_strategy="group_by_length", max_steps=-1, num_train_epochs=2)
        trainer.__class__ = Recorder
        trainer.train()
        half = len(seen) // 2
        assert seen[:half] != seen[half:]
        samples = [sorted(row for batch in epoch for row in batch if row) for epoch in (seen[:half], seen[half:])]
        assert len(samples[0]) == len(samples[1]) == len(mixed)

    def test_lengths_are_about_the_tokens(self, make_trainer, mixed):
        trainer = make_trainer(4)
        lengths, has_images = estimate_lengths(mixed, image_seq_length=16)
        tokens = [trainer.data_collator([mixed[i]])["input_ids"].numel() for i in range(8)]
        assert np.corrcoef(lengths[:8], tokens)[0, 1] > 0.9
        assert has_images[:8].tolist() == [bool(mixed[i]["images"]) for i in range(8)]

    def test_column_of_lengths(self, make_trainer, mixed):
        lengths = list(range(len(mixed)))
        trainer = make_trainer(4, mixed.add_column("length", lengths), train_sampling_strategy="group_by_length")
        assert list(trainer._get_train_sampler().lengths) == lengths

    def test_resumed_run_continues_identically(self, make_trainer, mixed, vicuna, tmp_path):
        def run(model, **kwargs):
            settings = {"train_sampling_strategy": "group_by_length", "max_steps": 4, "save_steps": 2}
            trainer = make_trainer(4, mixed, model=model, save_strategy="steps", **settings)
            trainer.train(**kwargs)
            return weights(trainer.model)

        expected = run(VWLMMForConditionalGeneration.from_pretrained(vicuna))
        resumed = run(
            VWLMMForConditionalGeneration.from_pretrained(vicuna),
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"),
        )
        assert_close(resumed, expected, atol=0, rtol=0)


class TestLogs:
    @pytest.mark.parametrize("stage", [1, 2, 3, 4])
    def test_names_and_values(self, make_trainer, model, stage):
        trainer = make_trainer(stage, per_device_train_batch_size=2)
        expected = by_hand(model, trainer, trainer.train_dataset, stage)
        trainer.train()
        entry = logs(trainer)[0]
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=1e-4), name
        others = {"language_loss", "visual_loss", "visual_word_entropy", "num_text_positions", "num_image_positions"}
        assert not (others - expected.keys()) & entry.keys()

    def test_sums_start_anew_behind_every_log(self, make_trainer):
        trainer = make_trainer(4, max_steps=4, logging_steps=2, learning_rate=1e-12)
        trainer.train()
        first, second = logs(trainer)
        trainer = make_trainer(4, max_steps=1, learning_rate=1e-12)
        trainer.train()
        one = logs(trainer)[0]
        for name in ("num_text_positions", "num_image_positions"):
            assert first[name] == second[name] == 2 * one[name]
        assert second["visual_loss"] == pytest.approx(one["visual_loss"], rel=1e-5)

    @pytest.mark.parametrize("stage", [2, 3, 4])
    def test_evaluation(self, make_trainer, model, dataset, captions, stage):
        data = captions if stage == 3 else dataset
        trainer = make_trainer(
            stage, trainer_kwargs={"eval_dataset": data.select(range(5))}, per_device_eval_batch_size=2
        )
        expected = by_hand(model, trainer, data.select(range(5)), stage)
        trainer.evaluate()
        entry = trainer.state.log_history[-1]
        for name, value in expected.items():
            assert entry[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name

    def test_evaluation_between_steps_mixes_nothing(self, make_trainer, dataset):
        trainer = make_trainer(
            4,
            max_steps=2,
            learning_rate=1e-12,
            eval_strategy="steps",
            eval_steps=1,
            logging_steps=2,
            trainer_kwargs={"eval_dataset": dataset.select(range(2))},
        )
        trainer.train()
        alone = make_trainer(4, max_steps=2, learning_rate=1e-12, logging_steps=2)
        alone.train()
        assert logs(trainer)[0]["num_text_positions"] == logs(alone)[0]["num_text_positions"]
        assert logs(trainer)[0]["language_loss"] == pytest.approx(logs(alone)[0]["language_loss"], rel=1e-5)

    def test_metrics_of_evaluate_name_both_losses(self, make_trainer, dataset):
        trainer = make_trainer(4, trainer_kwargs={"eval_dataset": dataset.select(range(2))})
        assert {"eval_loss", "eval_language_loss", "eval_visual_loss"} <= trainer.evaluate().keys()


class TestMetrics:
    def test_compute_metrics_sees_logits_beside_the_visual_objective(self, make_trainer, dataset):
        shapes = []

        def compute_metrics(prediction):
            shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
            return {"seen": 1.0}

        trainer_kwargs = {"eval_dataset": dataset.select([0]), "compute_metrics": compute_metrics}
        metrics = make_trainer(4, trainer_kwargs=trainer_kwargs).evaluate()
        ((predictions, labels),) = shapes
        assert predictions == (*labels, 480)
        assert metrics["eval_seen"] == 1.0

    def test_transformers_own_trainer_predicts(self, model, make_trainer, dataset, tmp_path):
        """It gathers what the model returns, but for what it cannot gather."""
        seen = []
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
        collator = make_trainer(2).data_collator
        trainer = Trainer(
            model, args, data_collator=collator, compute_metrics=lambda p: seen.append(p.predictions) or {"n": 1}
        )
        rows = dataset.select([0])
        assert trainer.evaluate(rows)["eval_n"] == 1
        assert trainer.predict(rows).metrics["test_n"] == 1
        assert any(array.shape[-1:] == (model.lm_head.out_features,) for array in seen[0])

    def test_compute_metrics_in_stage_3_is_an_error(self, make_trainer):
        with pytest.raises(ValueError, match="compute_metrics"):
            make_trainer(3, trainer_kwargs={"compute_metrics": lambda prediction: {}})


class TestData:
    @pytest.mark.parametrize("stage", [2, 4])
    @pytest.mark.parametrize(
        "samples", [[1, 6], [2, 2], [3, 3], [0, 1]], ids=["text_only", "two_images", "later_turn", "mixed"]
    )
    def test_trains(self, make_trainer, model, dataset, samples, stage):
        before = weights(model)
        trainer = make_trainer(
            stage, dataset.select(samples), per_device_train_batch_size=1, global_batch_size=2, max_steps=1
        )
        trainer.train()
        assert math.isfinite(logs(trainer)[0]["loss"])
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        if samples == [1, 6] and stage == 4:
            entry = logs(trainer)[0]
            assert entry["num_image_positions"] == 0 and "visual_loss" not in entry  # 0 would be a perfect one

    @pytest.mark.parametrize("stage", [1, 3])
    def test_text_only_micro_batch_adds_nothing_to_a_stage_that_learns_from_images(
        self, make_trainer, model, dataset, stage
    ):
        before = weights(model)
        trainer = make_trainer(
            stage,
            dataset.select([1, 6]),
            chat_template="vicuna_v1",
            per_device_train_batch_size=1,
            global_batch_size=2,
        )
        trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())

    def test_dataset_without_a_column_of_images(self, make_trainer, model, dataset):
        before = weights(model)
        trainer = make_trainer(2, dataset.select([1, 6]).remove_columns("images"), global_batch_size=4)
        trainer.train()
        assert math.isfinite(logs(trainer)[0]["language_loss"])
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])

    def test_supervising_all_text_leaves_placeholders_out(self, make_trainer, model, dataset):
        trainer = make_trainer(4, dataset, assistant_only_loss=False)
        batch = trainer.data_collator([dataset[0]])
        assert (batch["input_ids"] == IMAGE).sum() == 16
        assert not (batch["labels"] == IMAGE).any() and (batch["labels"] != -100).sum() > 50
        trainer.train()
        assert math.isfinite(logs(trainer)[0]["loss"])
        # And as everybody writes it.
        inputs = {**batch, "labels": batch["input_ids"].clone()}
        for objective in (None, "visual_words"):
            assert math.isfinite(model(**inputs, visual_objective=objective).language_loss)

    def test_streaming_dataset(self, make_trainer, dataset):
        trainer = make_trainer(4, dataset.to_iterable_dataset())
        trainer.train()
        assert logs(trainer)[0]["num_image_positions"] == 7 * 16


class TestCheckpoints:
    def test_resumed_run_continues_identically(self, make_trainer, vicuna, tmp_path):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
        settings |= {"global_batch_size": 4, "lr_scheduler_type": "cosine"}
        through = make_trainer(4, **settings)
        through.train()
        resumed = make_trainer(4, model=VWLMMForConditionalGeneration.from_pretrained(vicuna), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert [e["step"] for e in logs(resumed)] == [1, 2, 3, 4]
        for ours, theirs in zip(logs(resumed), logs(through), strict=True):
            for name in ("loss", "language_loss", "visual_loss", "learning_rate"):
                assert ours[name] == theirs[name], name
        for name, value in weights(through.model).items():
            assert torch.equal(value, resumed.model.get_parameter(name)), name

    def test_saved_model_is_complete(self, make_trainer, model, processor, tmp_path):
        model.config.trained_stages = [1, 2]
        trainer = make_trainer(3)
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        again = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "saved")
        assert again.config.trained_stages == [1, 2, 3]
        for name, value in weights(model).items():
            assert torch.equal(value, again.get_parameter(name)), name
        saved = VWLMMProcessor.from_pretrained(tmp_path / "saved")
        assert saved.chat_template == processor.chat_template
        assert saved.image_token_id == IMAGE
        # Nothing that training needed stays behind: generation pads on the left, and cuts nothing.
        assert saved.tokenizer.padding_side == "left"
        assert len(saved.tokenizer("dog " * 3000).input_ids) > 3000
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["text_config"]["use_cache"]

    def test_next_stage_starts_from_the_folder(self, make_trainer, tmp_path):
        make_trainer(3).train()
        trainer = make_trainer(3)
        trainer.save_model(tmp_path / "stage3")
        following = make_trainer(4, model=str(tmp_path / "stage3"))
        following.train()
        assert following.model.dtype == torch.float32

    def test_stages_are_recorded_in_order_with_repeats(self, make_trainer, model):
        for stage in (2, 2, 4):
            make_trainer(stage).train()
        assert model.config.trained_stages == [1, 2, 3, 4, 2, 2, 4]

    def test_stage_counts_only_when_it_has_ended(self, make_trainer, model, vicuna, tmp_path):
        """Not before its last step, and once, also where its last checkpoint is resumed."""

        def saved(step):
            return json.loads((tmp_path / f"run/checkpoint-{step}/config.json").read_text())["trained_stages"]

        model.config.trained_stages = []
        settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(2, **settings)
        assert model.config.trained_stages == []
        trainer.train()
        assert model.config.trained_stages == [2]
        assert (saved(1), saved(2)) == ([], [2])

        for folder, step, expected in ((vicuna, 1, [2]), (vicuna, 2, [2]), (tmp_path / "run/checkpoint-2", 2, [2])):
            again = VWLMMForConditionalGeneration.from_pretrained(folder)
            if folder == vicuna:
                again.config.trained_stages = []
            make_trainer(2, model=again, **settings).train(f"{tmp_path}/run/checkpoint-{step}")
            assert again.config.trained_stages == expected

    def test_stage_that_fails_does_not_count(self, make_trainer, model):
        model.config.trained_stages = []
        trainer = make_trainer(2, trainer_kwargs={"callbacks": [NotANumber()]}, max_steps=4)
        with pytest.raises(FloatingPointError):
            trainer.train()
        assert model.config.trained_stages == []


class NotANumber(TrainerCallback):
    """Spoils a weight before the third step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.lm_head.weight.data[7, 7] = float("nan")


class TestErrors:
    @pytest.mark.parametrize("stage", [2, 3, 4])
    def test_loss_that_is_no_number_stops_the_run(self, make_trainer, tmp_path, stage):
        trainer = make_trainer(
            stage,
            max_steps=5,
            save_strategy="steps",
            save_steps=1,
            trainer_kwargs={"callbacks": [NotANumber()]},
        )
        with pytest.raises(FloatingPointError, match="loss of step 3 is nan"):
            trainer.train()
        saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        assert saved == ["checkpoint-1", "checkpoint-2"]
        last = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-2")
        assert all(parameter.isfinite().all() for parameter in last.parameters())

    def test_max_length_below_the_image_tokens(self, make_trainer):
        with pytest.raises(ValueError, match=r"`max_length` is 32.*sample 'sample-2' has 2 images of 16 tokens"):
            make_trainer(2, max_length=32)

    def test_max_length_that_cuts_behind_the_prompt(self, make_trainer, dataset):
        # Room for the image tokens, not for the system prompt in front of them.
        with pytest.raises(ValueError, match=r"sample-4.*`max_length`=100"):
            make_trainer(2, dataset.select([4, 4]), max_length=100, global_batch_size=4).train()

    def test_max_length_looks_at_the_samples_that_are_left(self, make_trainer, dataset):
        make_trainer(2, dataset.select([0, 1]), max_length=20)  # sample 2 has two images

    def test_options_that_no_loss_here_knows(self, make_trainer):
        for options in ({"loss_type": "dft"}, {"label_smoothing_factor": 0.1}):
            with pytest.raises(ValueError, match=next(iter(options))):
                make_trainer(2, **options)

    @pytest.mark.parametrize("stage", [1, 3])
    def test_peft_in_a_stage_that_it_would_freeze(self, make_trainer, stage):
        with pytest.raises(ValueError, match=f"Stage {stage} trains"):
            make_trainer(stage, trainer_kwargs={"peft_config": LoraConfig(target_modules=["q_proj"])})

    def test_chat_template_that_does_not_exist(self, make_trainer):
        with pytest.raises(ValueError, match="'vicuna-v1'.*vicuna_v1"):
            make_trainer(2, chat_template="vicuna-v1")

    def test_sample_that_the_template_refuses_is_named(self, make_trainer, dataset):
        trainer = make_trainer(1, dataset)
        with pytest.raises(ValueError, match="sample-1.*needs an image"):
            trainer.data_collator([dataset[0], dataset[1]])

    def test_parameters_that_would_train_in_fp16(self, make_trainer, model):
        model.half()
        with pytest.raises(ValueError, match="would train in float16"):
            make_trainer(1)

    def test_max_length_none_takes_everything(self, make_trainer):
        make_trainer(2, max_length=None).train()

    def test_max_length_may_cut_text(self, make_trainer, dataset):
        make_trainer(2, dataset.select([5, 5]), max_length=130, global_batch_size=4).train()

    def test_processor_of_another_model(self, make_trainer, vicuna):
        other = VWLMMForConditionalGeneration.from_pretrained(vicuna, image_token_index=200)
        with pytest.raises(ValueError, match=r"placeholder has id 480, the model expects 200"):
            make_trainer(2, model=other)

    def test_arguments_of_another_trainer(self, model, dataset, processor, tmp_path):
        for args in (SFTConfig(str(tmp_path), use_cpu=True, bf16=False), TrainingArguments(str(tmp_path))):
            with pytest.raises(
                TypeError, match=rf"`args` is a {type(args).__name__}; expected VWLMMTrainingArguments"
            ):
                VWLMMTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)

    def test_another_model(self, make_trainer, model):
        with pytest.raises(TypeError, match="`model` is a CLIPVisionModel; expected VWLMMForConditionalGeneration"):
            make_trainer(2, model=model.model.vision_tower)

    def test_surplus_image_names_the_sample(self, make_trainer, dataset):
        broken = dataset.select([0, 4]).map(
            lambda row: {"images": row["images"] * (2 if row["id"] == "sample-4" else 1)}
        )
        with pytest.raises(ValueError, match="sample-4"):
            make_trainer(2, broken, global_batch_size=4).train()

    def test_no_samples(self, make_trainer, dataset):
        with pytest.raises(ValueError, match="The training dataset has no samples"):
            make_trainer(4, dataset.select([]))

    def test_image_that_cannot_be_read_names_its_file(self, make_trainer, dataset, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no image")
        row = {"id": ["a"], "messages": [dataset[0]["messages"]], "images": [[str(tmp_path / "broken.png")]]}
        broken = datasets.Dataset.from_dict(row).cast_column("images", datasets.List(datasets.Image()))
        with pytest.raises((ValueError, OSError), match="broken.png"):
            make_trainer(2, broken, global_batch_size=4).train()


class TestWarnings:
    @pytest.fixture
    def warnings_of(self, make_trainer, model, monkeypatch):
        def collect(stage, trained_stages, **kwargs):
            found = []
            for module in ("trainer", "checks"):
                logger = f"modeling_vwlmm.training.{module}.logger.warning"
                monkeypatch.setattr(logger, lambda message, *a, **k: found.append(message))
            model.config.trained_stages = trained_stages
            make_trainer(stage, **kwargs)
            return found

        return collect

    def test_stage_4_on_a_vm_head_that_was_never_trained(self, warnings_of):
        (message,) = warnings_of(4, [1, 2])
        assert "builds on stage 3" in message
        assert "model.vm_head may never have been trained" in message

    def test_pseudo_image_features_of_a_vm_head_that_was_never_trained(self, warnings_of, model):
        assert not warnings_of(4, [1, 2], visual_loss_weight=0)  # nothing reads it
        model.config.use_pseudo_image_features = True
        (message,) = warnings_of(4, [1, 2], visual_loss_weight=0)
        assert "builds on stage 3" in message

    def test_stage_3_on_a_fresh_vm_head(self, warnings_of):
        (message,) = warnings_of(3, [1, 2])
        assert "VM head has never been trained" in message

    @pytest.mark.parametrize(("stage", "missing"), [(2, [1]), (3, [1, 2]), (4, [1, 2, 3])])
    def test_every_stage_that_is_missing(self, warnings_of, stage, missing):
        messages = [message for message in warnings_of(stage, []) if "builds on" in message]
        assert len(messages) == len(missing)
        for number, message in zip(missing, messages, strict=True):
            assert f"builds on stage {number} " in message

    @pytest.mark.parametrize(("stage", "trained"), [(1, []), (2, [1]), (4, [1, 2, 3]), (4, [1, 2, 3, 4])])
    def test_silent_where_all_is_well(self, warnings_of, stage, trained):
        assert warnings_of(stage, trained) == []

    def test_ablation_needs_no_vm_head(self, warnings_of):
        assert warnings_of(4, [1, 2], visual_loss_weight=0) == []

    def test_temperatures_that_nothing_reads(self, warnings_of, model):
        model.config.visual_word_temperature = model.config.pseudo_image_feature_temperature = 0.5
        for stage in (2, 3):
            learned = {2: "language", 3: "vm_head"}[stage]
            of_words, of_features = warnings_of(stage, [1, 2, 3])
            assert f"`visual_word_temperature` is 0.5, and this run learns no visual words, but {learned}" in of_words
            assert "`pseudo_image_feature_temperature` is 0.5, and the model reads no pseudo" in of_features
        model.config.use_pseudo_image_features = True
        assert warnings_of(4, [1, 2, 3]) == []


def test_plain_trainer_of_transformers_fine_tunes_the_model(model, make_trainer, dataset, tmp_path):
    collator = make_trainer(2).data_collator
    rows = [collator([row]) for row in dataset]
    args = TrainingArguments(
        str(tmp_path / "plain"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-12,
    )
    data = [{name: value for name, value in row.items() if name != "id"} for row in rows]
    trainer = Trainer(model, args, train_dataset=data, data_collator=lambda batch: dict(batch[0]))
    trainer.train()
    ours = make_trainer(2, learning_rate=1e-12, per_device_train_batch_size=1)
    ours.train()
    assert logs(trainer)[0]["loss"] == pytest.approx(logs(ours)[0]["loss"], rel=1e-3)


def test_lora_trains_the_adapters_alone(make_trainer, model):
    from peft import LoraConfig

    before = weights(model)
    trainer = make_trainer(
        4, trainer_kwargs={"peft_config": LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)")}
    )
    trainer.train()
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert logs(trainer)[0]["visual_loss"] > 0
    assert any(p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)


class TestImagesWithoutText:
    @pytest.fixture
    def images(self):
        message = {"role": "user", "content": [{"type": "image", "text": None}]}
        return [{"id": f"image {i}", "messages": [message], "images": [make_image(i)]} for i in range(4)]

    @pytest.mark.parametrize("stage, objective", [(3, "vm_head"), (4, "visual_words"), (4, "features")])
    def test_objectives_of_images_learn(self, model, processor, images, tmp_path, stage, objective):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        options = {**BY_HAND, "per_device_train_batch_size": 4, "global_batch_size": 4}
        args = VWLMMTrainingArguments(str(tmp_path), stage=stage, visual_objective=objective, **options)
        data = datasets.Dataset.from_list(images)
        trainer = VWLMMTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if f"{objective}_loss" in entry)
        assert entry.get("num_text_positions", 0) == 0 < entry["num_image_positions"]
        assert_close(entry["loss"], entry[f"{objective}_loss"])
        learned = "model.vm_head.weight" if stage == 3 else "model.language_model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(model.state_dict()[learned], before[learned])

    def make(self, model, processor, data, tmp_path, **options):
        options = {**BY_HAND, "per_device_train_batch_size": 4, "global_batch_size": 4, **options}
        args = VWLMMTrainingArguments(str(tmp_path), **options)
        data = datasets.Dataset.from_list(data) if isinstance(data, list) else data
        return VWLMMTrainer(model=model, args=args, train_dataset=data, processing_class=processor)

    @pytest.mark.parametrize(
        "options",
        [
            {"packing": True, "max_length": 512, "per_device_train_batch_size": 1, "global_batch_size": 1},
            {"train_sampling_strategy": "group_by_length"},
            {"per_device_train_batch_size": 1},
            {"streams": True, "max_steps": 1},
        ],
        ids=["packing", "group_by_length", "accumulation", "streaming"],
    )
    def test_however_they_come_they_are_learned_as_they_are_evaluated(
        self, model, processor, images, tmp_path, options
    ):
        data = datasets.Dataset.from_list(images)
        streams = options.get("streams", False)
        options = {name: value for name, value in options.items() if name != "streams"}
        given = data.to_iterable_dataset() if streams else images
        trainer = self.make(model, processor, given, tmp_path, stage=4, eval_packing=False, **options)
        expected = trainer.evaluate(data)
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert entry["loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
        assert entry["num_image_positions"] == expected["eval_num_image_positions"] > 0
        assert entry["num_text_positions"] == expected["eval_num_text_positions"] == 0

    def test_a_mixture_with_conversations(self, model, processor, images, dataset, tmp_path):
        alone = datasets.Dataset.from_list(images, features=dataset.features)
        options = {"per_device_train_batch_size": 16, "global_batch_size": 16}
        mixed = mix_datasets([alone, dataset], [2, 1])
        trainer = self.make(model, processor, mixed, tmp_path, stage=4, **options)
        counts = [trainer.evaluate(part) for part in (alone, dataset, mixed)]
        for kind, weight in (("image", 2), ("text", 0)):
            of_images, of_dataset, of_both = (entry[f"eval_num_{kind}_positions"] for entry in counts)
            assert of_both == weight * of_images + of_dataset > 0
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert entry["loss"] == pytest.approx(counts[2]["eval_loss"], rel=1e-4)

    def test_a_step_is_compared_with_steps_that_learn_the_same(
        self, model, processor, images, dataset, tmp_path, monkeypatch
    ):
        found = []
        monkeypatch.setattr(History, "find_outlier", lambda self, values, learned: found.append(learned))
        texts = [{"id": str(i), "messages": make_conversation((0, "Who?", "Me.")), "images": []} for i in range(4)]
        data = datasets.Dataset.from_list([*images, *texts], features=dataset.features)
        self.make(model, processor, data, tmp_path, stage=4, train_sampling_strategy="group_by_length").train()
        assert sorted(found) == [("language",), ("visual_words",)]

    def test_a_resumed_run_continues_identically(self, vicuna, processor, images, tmp_path):
        found = []
        for checkpoint in (None, str(tmp_path / "checkpoint-1")):
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
            options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
            trainer = self.make(model, processor, images, tmp_path, stage=4, **options)
            trainer.train(resume_from_checkpoint=checkpoint)
            found.append(weights(model))
        assert_close(*found, atol=0, rtol=0)

    def test_a_run_that_learns_answers_alone_refuses_them(self, model, processor, images, dataset, tmp_path):
        """Before a step is taken, of data to evaluate, too; of a stream in the step that meets one."""
        with pytest.raises(ValueError, match="4 of 4 samples have no answer, the first of them 'image 0'"):
            self.make(model, processor, images, tmp_path, stage=2)
        args = VWLMMTrainingArguments(str(tmp_path), stage=2, **BY_HAND)
        data = {"eval_dataset": {"text": dataset, "images": datasets.Dataset.from_list(images)}}
        with pytest.raises(ValueError, match="4 of 4 samples have no answer"):
            VWLMMTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor, **data)
        stream = datasets.Dataset.from_list(images).to_iterable_dataset()
        trainer = self.make(model, processor, stream, tmp_path, stage=2, max_steps=1)
        with pytest.raises(ValueError, match="Sample 'image [0-3]': It has no answer, and nothing else"):
            trainer.train()

    def test_conversations_without_an_answer_and_without_images(self, model, processor, tmp_path):
        question = [{"role": "user", "content": "Hello"}]
        for rows in ([{"messages": question}], [{"prompt": question, "completion": []}]):
            with pytest.raises(ValueError, match="1 of 1 samples have no answer, the first of them 0, .*if they have"):
                self.make(model, processor, rows, tmp_path, stage=4)

    @pytest.mark.parametrize("assistant_only_loss", [True, False])
    def test_prompts_without_completions(self, model, processor, images, tmp_path, assistant_only_loss):
        rows = [{"prompt": image["messages"], "images": image["images"]} for image in images]
        with pytest.raises(ValueError, match="has prompt, images, and a `prompt` without `completion` has no answer"):
            self.make(model, processor, rows, tmp_path, stage=2, assistant_only_loss=assistant_only_loss)

    @pytest.mark.parametrize("form", ["parts", "strings", "completion"])
    def test_empty_answers_are_named(self, model, processor, tmp_path, caplog, form):
        def say(role, text):
            return {"role": role, "content": text if form == "strings" else [{"type": "text", "text": text}]}

        rows = [
            [say("user", "a"), say("assistant", "b")],
            [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", " \n")],
            [say("user", "a"), say("assistant", "")],
        ]
        names = ("messages",) if form != "completion" else ("prompt", "completion")
        rows = [dict(zip(names, (row,) if form != "completion" else (row[:1], row[1:]), strict=True)) for row in rows]
        self.make(model, processor, [row | {"id": f"row {n}"} for n, row in enumerate(rows)], tmp_path, stage=4)
        (message,) = [record.getMessage() for record in caplog.records if "empty answer" in record.getMessage()]
        assert "2 of 3 samples have an empty answer, the first of them 'row 1'" in message

    @pytest.mark.parametrize("is_large", [False, True])
    @pytest.mark.parametrize(
        ("message", "expected"),
        [
            ({"role": "assistant", "content": [{"type": "image", "text": None}]}, ([], [])),
            ({"role": "assistant", "content": [{"type": "image"}]}, ([], [])),
            ({"role": "assistant", "content": [{"type": "text", "text": ""}]}, ([], [1])),
            ({"role": "assistant", "content": []}, ([], [1])),
            ({"role": "assistant", "content": ""}, ([], [1])),
            ({"role": "assistant", "content": None, "tool_calls": [{"name": "draw"}]}, ([], [])),
            ({"role": "assistant", "tool_calls": [{"name": "draw"}]}, ([], [])),
            ({"role": "assistant", "content": [["odd"]]}, ([], [])),
            ({"role": "user", "content": [{"type": "image"}]}, ([1], [])),
        ],
    )
    def test_what_is_an_answer(self, message, expected, is_large):
        """Behind a sample without messages, which hides two; and in lists with offsets of 64 bits."""
        messages = pa.array([message] * 3)
        conversations = pa.ListArray.from_arrays([0, 2, 3], messages, mask=pa.array([True, False]))
        if is_large:
            conversations = conversations.cast(pa.large_list(messages.type))
        assert find_answers(datasets.Dataset(pa.table({"messages": conversations}))) == expected

    def test_without_labels_nothing_is_learned(self, model, processor, images, tmp_path):
        data = [{**image, "image_labels": None} for image in images[:3]]
        data.append({**images[3], "image_labels": [["-100"] * model.config.image_seq_length]})
        trainer = self.make(model, processor, data, tmp_path, stage=4, visual_objective="token_labels")
        with pytest.raises(ValueError, match="It has no answer, and nothing else of it is learned by .*token_labels"):
            trainer.train()

    def test_texts_without_an_answer(self, model, processor, images, tmp_path):
        message = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
        data = [*images, {"id": "text", "messages": [message], "images": []}]
        trainer = self.make(
            model, processor, data, tmp_path, stage=4, per_device_train_batch_size=5, global_batch_size=5
        )
        with pytest.raises(ValueError, match="Sample 'text': It has no answer, and nothing else of it is learned"):
            trainer.train()

    def test_a_mixture_without_labels_of_all(self, model, images):
        labels = [[7] * model.config.image_seq_length]
        labelled = datasets.Dataset.from_list([{**image, "image_labels": labels} for image in images])
        plain = datasets.Dataset.from_list(images)
        mixed = mix_datasets([plain, labelled], [1, 2])
        assert [sample["image_labels"] for sample in mixed] == [None] * 4 + [labels] * 8
        assert mix_datasets([plain, plain], [1, 1]).column_names == plain.column_names
