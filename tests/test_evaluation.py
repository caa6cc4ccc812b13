# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: every set under its own name, nothing of one in another, and rows as the options say."""

import copy
import logging

import pytest
import torch
from conftest import BY_HAND
from datasets import Dataset

from modeling_vwlmm import VWLMMTrainer, VWLMMTrainingArguments


NAMES = ("loss", "language_loss", "visual_loss", "visual_words_loss", "num_image_positions", "padding_share")


@pytest.fixture
def make_trainer(model, processor, dataset, tmp_path):
    """A trainer that takes steps of next to no size, so that the model stays as it is."""

    def make(stage=4, eval_dataset=None, trainer_kwargs=None, **kwargs):
        args = VWLMMTrainingArguments(
            **{
                "output_dir": str(tmp_path / "run"),
                "stage": stage,
                "chat_template": "vicuna_v1",
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 2,
                "global_batch_size": 4,
                "max_steps": 2,
                **BY_HAND,
                "learning_rate": 1e-12,
                **kwargs,
            }
        )
        return VWLMMTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=copy.deepcopy(processor),
            **(trainer_kwargs or {}),
        )

    return make


@pytest.fixture
def sets(dataset) -> dict[str, Dataset]:
    return {"a": dataset.select([0, 1, 2]), "b": dataset.select([3, 4, 5, 6])}


class TestNames:
    def test_each_of_several_sets_has_its_own_losses(self, make_trainer, sets):
        alone = {name: make_trainer(eval_dataset=data).evaluate() for name, data in sets.items()}
        trainer = make_trainer(eval_dataset=sets)
        metrics = trainer.evaluate()
        logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
        for name in sets:
            for loss in NAMES:
                assert metrics[f"eval_{name}_{loss}"] == pytest.approx(alone[name][f"eval_{loss}"], rel=1e-6)
                assert logged[f"eval_{name}_{loss}"] == metrics[f"eval_{name}_{loss}"]
        assert metrics["eval_a_visual_loss"] != metrics["eval_b_visual_loss"]
        assert not {f"eval_{loss}" for loss in NAMES} & metrics.keys()

    def test_best_model_by_the_loss_of_one_set(self, make_trainer, sets):
        trainer = make_trainer(
            eval_dataset=sets,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="best",
            metric_for_best_model="a_visual_loss",
            greater_is_better=False,
        )
        trainer.train()
        losses = [e["eval_a_visual_loss"] for e in trainer.state.log_history if "eval_a_visual_loss" in e]
        assert len(losses) == 2 and trainer.state.best_metric == min(losses)

    def test_prefixes(self, make_trainer, sets):
        trainer = make_trainer(eval_dataset=sets["a"])
        plain, held_out = trainer.evaluate(), trainer.evaluate(metric_key_prefix="held_out")
        predicted = trainer.predict(sets["a"]).metrics
        for loss in NAMES:
            assert held_out[f"held_out_{loss}"] == predicted[f"test_{loss}"] == plain[f"eval_{loss}"]
        assert not [name for name in held_out if name.startswith("eval_")]

    def test_two_objectives_keep_their_entropies_apart(self, make_trainer, sets):
        metrics = make_trainer(
            eval_dataset=sets["a"],
            visual_objective={"visual_words": 1.0, "vm_head": 1.0},
            trains=["decoder", "vm_head"],
        ).evaluate()
        entropies = [name for name in metrics if name.endswith("entropy")]
        assert sorted(entropies) == ["eval_visual_word_entropy", "eval_vm_head_visual_word_entropy"]


class TestSums:
    def test_nothing_leaks_into_the_next_evaluation(self, make_trainer, sets, dataset):
        """Neither of a prediction, nor of an evaluation that failed half-way."""
        expected = make_trainer(eval_dataset=sets["a"]).evaluate()
        trainer = make_trainer(eval_dataset=sets["a"])
        trainer.predict(sets["b"])
        # Its third batch fails, which is made when the first runs: a sample has lost its image.
        broken = dataset.select([0, 1, 3, 4, 5]).map(lambda row: {"images": row["images"] * (row["id"] != "sample-5")})
        calls = []
        hook = trainer.model.register_forward_hook(lambda *args: calls.append(1))
        with pytest.raises(ValueError, match="sample-5"):
            trainer.evaluate(broken)
        hook.remove()
        assert calls
        metrics = trainer.evaluate()
        for loss in NAMES:
            assert metrics[f"eval_{loss}"] == expected[f"eval_{loss}"]

    def test_training_keeps_its_sums(self, make_trainer, sets):
        kwargs = {"max_steps": 2, "logging_steps": 2}
        between = make_trainer(eval_dataset=sets, eval_strategy="steps", eval_steps=1, **kwargs)
        alone = make_trainer(**kwargs)
        for trainer in (between, alone):
            trainer.train()
        ours, expected = (next(e for e in t.state.log_history if "loss" in e) for t in (between, alone))
        for loss in NAMES:
            assert ours[loss] == pytest.approx(expected[loss], rel=1e-6)

    def test_no_batch_counts_for_more_than_its_positions(self, make_trainer, dataset):
        losses = [
            make_trainer(eval_dataset=dataset.select(range(5)), per_device_eval_batch_size=size).evaluate()
            for size in (1, 2, 5)
        ]
        for other in losses[1:]:
            for loss in NAMES[:-1]:
                assert other[f"eval_{loss}"] == pytest.approx(losses[0][f"eval_{loss}"], rel=1e-5)

    def test_stage_without_text_predicts_nothing(self, make_trainer, sets):
        output = make_trainer(3).predict(sets["a"])
        assert output.predictions is None and output.label_ids is None
        assert output.metrics["test_visual_loss"] > 0

    def test_other_calls_of_the_model_run_nothing_for_it(self, make_trainer, model, sets, dataset):
        """What stands in for images on a process without one is the trainer's alone, also when a step fails."""
        trainer = make_trainer()
        batch = trainer.data_collator([dataset[1]])
        with pytest.raises(RuntimeError):
            trainer.compute_loss(model, {**batch, "position_ids": torch.zeros(3, 3, 3)})
        assert model.encode_no_images is None


class TestRows:
    def run(self, trainer):
        """The shapes of the batches of an evaluation, and its metrics."""
        shapes = []
        hook = trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        metrics = trainer.evaluate()
        hook.remove()
        return shapes, metrics

    @pytest.mark.parametrize(("packing", "eval_packing"), [(True, False), (True, None), (False, True)])
    def test_eval_packing(self, make_trainer, dataset, packing, eval_packing):
        plain_shapes, plain = self.run(make_trainer(eval_dataset=dataset))
        trainer = make_trainer(eval_dataset=dataset, packing=packing, eval_packing=eval_packing, max_length=300)
        shapes, metrics = self.run(trainer)
        if eval_packing is False:
            assert shapes == plain_shapes
        else:
            assert sum(rows for rows, _ in shapes) < len(dataset)
            assert max(length for _, length in shapes) <= 300  # of a row, and not of a batch
        for loss in NAMES[:-1]:
            assert metrics[f"eval_{loss}"] == pytest.approx(plain[f"eval_{loss}"], rel=1e-5)

    def test_packed_rows_are_padded_to_a_multiple(self, make_trainer, dataset):
        trainer = make_trainer(eval_dataset=dataset, packing=True, pad_to_multiple_of=64, max_length=320)
        shapes, metrics = self.run(trainer)
        assert all(length % 64 == 0 for _, length in shapes)
        _, plain = self.run(make_trainer(eval_dataset=dataset))
        assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)

    def test_evaluation_in_groups_keeps_its_order(self, make_trainer, dataset):
        shapes, _ = self.run(make_trainer(eval_dataset=dataset, train_sampling_strategy="group_by_length"))
        assert shapes == self.run(make_trainer(eval_dataset=dataset))[0]


def test_nothing_is_said_of_an_ordinary_run(make_trainer, sets, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(eval_dataset=sets)
        trainer.train()
        trainer.evaluate()
    assert not [r for r in caplog.records if "modeling_vwlmm" in r.name and "never been" not in r.getMessage()]
