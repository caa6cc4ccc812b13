# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Objectives: their losses by hand, how several share a step, the modules that they train, and what a step costs."""

import collections
import copy
import logging
import math
import traceback
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import BY_HAND
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import TrainerCallback

from modeling_vwlmm import (
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    loss_vwlmm,
    objectives_vwlmm,
)
from modeling_vwlmm.objectives_vwlmm import Term, parse_objectives
from modeling_vwlmm.training import attach_training_modules
from modeling_vwlmm.training.checks import check_options
from modeling_vwlmm.training.collating import VWLMMDataCollator
from modeling_vwlmm.training.lockstep import encode_no_images
from modeling_vwlmm.training.means import PositionMeans
from modeling_vwlmm.training.sampling import ModalityLengthGroupedSampler
from modeling_vwlmm.training.stages import set_trainable_parameters


IMAGE, N, C, D = 480, 16, 480, 48  # placeholder, image tokens of an image, vocabulary, hidden size
HEAD = {"training_modules.features.weight", "training_modules.features.bias"}
ADAPTER, DECODER, MM_HEAD, VM_HEAD = (
    "model.multi_modal_projector.",
    "model.language_model.",
    "lm_head.",
    "model.vm_head.",
)
# Of the ways in which `batch` puts samples together, one.
ONE_LAYOUT = pytest.mark.parametrize("batch", ["right"], indirect=True)


@dataclass
class Sample:
    """Tokens of a sample, those of its text that are learned, and its images with their labels."""

    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor  # [I, 3, 28, 28]
    image_labels: torch.Tensor  # [I, N]


def make_sample(seed: int, *parts: list[int] | None) -> Sample:
    """A sample of parts of text and, for `None`, images; the last part of it is learned."""
    generator = torch.Generator().manual_seed(seed)
    num_images = parts.count(None)
    image_labels = torch.randint(0, C, (num_images, N), generator=generator)
    image_labels[:, 2::3] = -100
    input_ids = [token for part in parts for token in ([IMAGE] * N if part is None else part)]
    return Sample(
        input_ids=input_ids,
        labels=[-100] * (len(input_ids) - len(parts[-1])) + parts[-1],
        pixel_values=torch.randn(num_images, 3, 28, 28, generator=generator),
        image_labels=image_labels,
    )


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Two images, the first before all text; none; one."""
    return [
        make_sample(0, None, [5, 6], None, [7, 8, 9]),
        make_sample(1, [1, 10, 11], [12, 13]),
        make_sample(2, [1, 20], None, [21, 22, 23, 24]),
    ]


@pytest.fixture(params=["left", "right", "packed"])
def batch(request, samples) -> dict[str, torch.Tensor]:
    """The samples padded on either side, or in one row."""
    return {
        **(pack(samples) if request.param == "packed" else pad(samples, request.param)),
        "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
        "image_labels": torch.cat([sample.image_labels for sample in samples]),
        "use_cache": False,  # with a cache, Transformers does not look whether samples are packed
    }


def pad(samples: list[Sample], side: str) -> dict[str, torch.Tensor]:
    longest = max(len(sample.input_ids) for sample in samples)

    def stack(rows, filling):
        rows = [(row, [filling] * (longest - len(row))) for row in rows]
        return torch.tensor([row + rest if side == "right" else rest + row for row, rest in rows])

    return {
        "input_ids": stack([sample.input_ids for sample in samples], 0),
        "labels": stack([sample.labels for sample in samples], -100),
        "attention_mask": stack([[1] * len(sample.input_ids) for sample in samples], 0),
    }


def pack(samples: list[Sample]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([sum([sample.input_ids for sample in samples], [])]),
        "labels": torch.tensor([sum([sample.labels for sample in samples], [])]),
        "position_ids": torch.tensor([sum([list(range(len(sample.input_ids))) for sample in samples], [])]),
    }


@dataclass
class Position:
    """What there is to know of one supervised position."""

    name: str
    log_q: torch.Tensor  # the decoder's prediction, [C]
    label: int
    before: torch.Tensor | None = None  # the decoder's output before it, [D]
    layers: list[torch.Tensor] | None = None  # the outputs of all layers at it, [D] each
    image_feature: torch.Tensor | None = None  # [D]
    patch_feature: torch.Tensor | None = None  # [W]


def positions(model, samples) -> list[Position]:
    """Every position of text that is learned, and every image position, of samples that pass one by one."""
    found = []
    for sample in samples:
        pixel_values = sample.pixel_values if len(sample.pixel_values) else None
        output = model(
            input_ids=torch.tensor([sample.input_ids]), pixel_values=pixel_values, output_hidden_states=True
        )
        log_q = output.logits[0].double().log_softmax(-1)  # [L, C]
        images = model.get_image_features(pixel_values) if len(sample.pixel_values) else None
        tokens = iter(range(len(sample.pixel_values) * N))
        for n, (token, label) in enumerate(zip(sample.input_ids, sample.labels, strict=True)):
            if token == IMAGE:
                i = next(tokens)
                found.append(
                    Position(
                        name="image" if n > 0 else "first image token",
                        log_q=log_q[n - 1],
                        label=int(sample.image_labels.flatten()[i]),
                        before=output.hidden_states[-1][0, n - 1],
                        layers=[layer[0, n] for layer in output.hidden_states],
                        image_feature=torch.cat(tuple(images.image_features))[i],
                        patch_feature=images.patch_features.flatten(0, 1)[i],
                    )
                )
            elif label != -100:
                found.append(Position("text", log_q[n - 1], label))
    return found


def cross_entropy(positions: list[Position]) -> torch.Tensor:
    return torch.stack([-position.log_q[position.label] for position in positions]).mean()


def by_hand(model, samples, name: str, **options) -> tuple[torch.Tensor, int]:
    """The mean loss of an objective and how many positions it has, one at a time."""
    every = positions(model, samples)
    if name == "language":
        chosen = [p for p in every if p.name == "text"]
        return cross_entropy(chosen), len(chosen)
    predicted = [p for p in every if p.name == "image"]
    if name == "token_labels":
        chosen = [p for p in predicted if p.label != -100]
        return cross_entropy(chosen), len(chosen)
    if name == "visual_words":
        losses = []
        for p in predicted:
            log_p = model.model.vm_head(p.image_feature).double().log_softmax(-1).detach()  # [C]
            losses.append(F.kl_div(p.log_q, log_p, log_target=True, reduction="sum"))
        return torch.stack(losses).mean(), len(losses)
    head, losses = model.training_modules["features"], []
    if options.get("shift", True):
        pairs = [(p.before, p.image_feature) for p in predicted]
    else:
        chosen = [p for p in every if p.name != "text"]
        pairs = [(p.layers[options.get("layer", -1)], p.patch_feature) for p in chosen]
    for hidden, target in pairs:
        guess, target = (head.weight @ hidden + head.bias).double(), target.detach().double()
        cosine = guess @ target / (guess.norm() * target.norm())
        losses.append(1 - cosine if options.get("loss") == "cosine" else ((guess - target) ** 2).mean())
    return torch.stack(losses).mean(), len(losses)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name in found.keys() | wanted.keys():
        pair = torch.broadcast_tensors(*(grads.get(name, torch.zeros(())) for grads in (found, wanted)))
        assert_close(*pair, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def reached(grads: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, gradient in grads.items() if gradient.any()}


class TestTokenLabels:
    def test_is_the_cross_entropy_with_the_given_tokens(self, model, batch, samples):
        output = model(**batch, visual_objective="token_labels")
        expected, count = by_hand(model, samples, "token_labels")
        # A third has no label, nor has the first token of an image at the start anything before it.
        assert count == 3 * N - 15 - 1 == output.num_image_positions == output.terms["token_labels"].count
        assert_close(output.losses["token_labels"].double(), expected, atol=1e-6, rtol=1e-5)
        language, _ = by_hand(model, samples, "language")
        assert_close(output.language_loss.double(), language, atol=1e-6, rtol=1e-5)
        assert_close(output.loss.double(), language + expected, atol=1e-6, rtol=1e-5)
        assert_close(output.visual_loss, output.losses["token_labels"])

    def test_gradients_are_those_of_full_logits(self, model, batch, samples):
        found = gradients(model, model(**batch, visual_objective="token_labels", visual_loss_weight=0.7).loss)
        language, token_labels = (by_hand(model, samples, name)[0] for name in ("language", "token_labels"))
        assert_same_gradients(found, gradients(model, language + 0.7 * token_labels))

    def test_labels_of_a_neighbour_are_another_loss(self, model, batch):
        loss = model(**batch, visual_objective="token_labels").visual_loss
        for shift in (-1, 1):
            rolled = {**batch, "image_labels": batch["image_labels"].roll(shift, dims=1)}
            assert abs(model(**rolled, visual_objective="token_labels").visual_loss - loss) > 1e-3

    @ONE_LAYOUT
    def test_without_labels_nothing_is_learned(self, model, batch):
        batch["image_labels"][:] = -100
        output = model(**batch, visual_objective="token_labels")
        assert output.visual_loss == 0 and output.num_image_positions == 0
        assert_close(output.loss, output.language_loss)

    @ONE_LAYOUT
    @pytest.mark.parametrize("rows", [2, 4])
    def test_as_many_labels_as_image_tokens(self, model, batch, rows):
        batch["image_labels"] = torch.cat([batch["image_labels"]] * 2)[:rows]
        with pytest.raises(ValueError, match=rf"Found {rows * N} `image_labels` for {3 * N} image tokens"):
            model(**batch, visual_objective="token_labels")

    @ONE_LAYOUT
    def test_no_labels_at_all(self, model, batch):
        del batch["image_labels"]
        with pytest.raises(ValueError, match="`token_labels` needs `image_labels`.*Pass it"):
            model(**batch, visual_objective="token_labels")


class TestColumnOfLabels:
    @pytest.fixture
    def collate(self, processor, dataset):
        collator = VWLMMDataCollator(
            copy.deepcopy(processor), objectives=parse_objectives("token_labels")[0], image_seq_length=N
        )

        def collate(*columns, rows=(0, 1, 2)):
            return collator([{**dataset[i], "image_labels": c} for i, c in zip(rows, columns, strict=True)])

        return collate

    def test_images_in_their_order_and_none_for_text(self, collate):
        batch = collate([[1] * N], [], [[2] * N, [3] * N])
        assert batch["image_labels"].tolist() == [[1] * N, [2] * N, [3] * N]
        assert collate([], rows=[1])["image_labels"].shape == (0, N)

    def test_words_are_tokens_as_they_stand_in_a_text(self, collate, processor):
        ids = processor.tokenizer("a red dog", add_special_tokens=False).input_ids
        assert [processor.tokenizer.convert_ids_to_tokens(i) for i in ids[1:]] == ["▁red", "▁dog"]
        labels = collate([["red", "▁dog", None, *[-100] * (N - 3)]], rows=[0])["image_labels"][0]
        assert labels.tolist() == [*ids[1:], *[-100] * (N - 2)]

    def test_a_column_of_words_can_leave_some_out(self, collate):
        """Arrow has one type a column: words, and null for none."""
        column = datasets.Dataset.from_dict({"image_labels": [[["dog"] * (N - 1) + [None]]]})["image_labels"][0]
        (labels,) = collate(column, rows=[0])["image_labels"].tolist()
        assert labels[-1] == -100 and -100 not in labels[:-1]

    def test_ids_in_a_column_of_words(self, collate):
        (labels,) = collate([["dog"] * (N - 2) + ["5", "-100"]], rows=[0])["image_labels"].tolist()
        assert labels[-2:] == [5, -100]

    def test_a_sample_without_labels_among_others(self, collate):
        assert collate(None, [], rows=[2, 1])["image_labels"].tolist() == [[-100] * N] * 2

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([[1] * (N - 1)], r"^Sample 'sample-0': An image has 15 `image_labels`; expected 16"),
            ([], r"^Sample 'sample-0': There are `image_labels` for 0 images, and 1 images"),
            ([[1] * N] * 2, r"^Sample 'sample-0': There are `image_labels` for 2 images, and 1 images"),
            ([["quetzal"] * N], r"^Sample 'sample-0': The image label 'quetzal' is no token"),
            ([[IMAGE] * N], r"^Sample 'sample-0': The image label 480 is no id .*not the image placeholder's \(480\)"),
            ([[-1] * N], r"^Sample 'sample-0': The image label -1 is no id of a token"),
            ([[C + 1] * N], r"^Sample 'sample-0': The image label 481 is no id of a token"),
            ([[5.7] * N], r"^Sample 'sample-0': The image label 5\.7 is a float; expected the id of a token as an"),
            ([[True] * N], r"^Sample 'sample-0': The image label True is a bool"),
            ([[""] * N], r"^Sample 'sample-0': The image label '' is no token"),
            ([None], r"^Sample 'sample-0': The `image_labels` of an image are None; expected a list with one label"),
            (["a" * N], r"^Sample 'sample-0': The `image_labels` of an image are 'a+'; expected a list"),
            (5, r"^Sample 'sample-0': The `image_labels` of a sample are 5; expected a list with one list for each"),
        ],
        ids=str,
    )
    def test_what_is_wrong_with_which_sample(self, collate, labels, message):
        with pytest.raises(ValueError, match=message):
            collate([], labels, rows=[1, 0])

    def test_any_word_where_the_placeholder_is_an_early_token(self, collate, processor, dataset):
        early = copy.deepcopy(processor)
        early.image_token_id = 7
        (labels,) = (
            objectives_vwlmm.TokenLabels()
            .collate([{**dataset[0], "image_labels": [[479] * N]}], early, N)["image_labels"]
            .tolist()
        )
        assert labels == [479] * N


OPTIONS = [
    {},
    {"loss": "cosine"},
    {"shift": False},
    {"shift": False, "layer": 1},
    {"shift": False, "layer": 0, "loss": "cosine"},
]


class TestFeatures:
    @pytest.fixture(autouse=True)
    def with_head(self, model):
        attach_training_modules(model, parse_objectives({"features": {}})[0], seed=1)

    @pytest.fixture
    def attach(self, model):
        def attach(options):
            attach_training_modules(model, parse_objectives({"features": options})[0], seed=1)
            return {"features": options}

        return attach

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_is_the_distance_of_what_the_head_makes_from_the_feature(self, model, batch, samples, attach, options):
        output = model(**batch, visual_objective=attach(options))
        expected, count = by_hand(model, samples, "features", **options)
        # Where nothing is shifted, the first image token of all has a feature to align with.
        assert count == output.num_image_positions == 3 * N - (0 if "shift" in options else 1)
        assert_close(output.visual_loss.double(), expected, atol=1e-6, rtol=1e-5)
        assert_close(output.loss, output.language_loss + output.visual_loss)
        cosine = 1 - by_hand(model, samples, "features", **{**options, "loss": "cosine"})[0]
        found = output.terms["features"].metrics["features_cosine"].double() / count
        assert_close(found, cosine.detach(), atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_gradients_are_those_of_the_loss_written_out(self, model, batch, samples, attach, options):
        """Of the head, of the decoder, and below: what the decoder reads may learn, what is predicted may not."""
        model.model.vision_tower.requires_grad_(True)
        objective = {**attach(options), "language": 0}
        found = gradients(model, model(**batch, visual_objective=objective).loss)
        assert_same_gradients(found, gradients(model, by_hand(model, samples, "features", **options)[0]))
        assert reached(found) >= HEAD
        depth = options.get("layer", model.config.text_config.num_hidden_layers)
        layers = {int(name.split(".")[3]) for name in reached(found) if name.startswith(f"{DECODER}layers.")}
        assert layers == set(range(depth))

    def test_targets_of_the_aligned_variant_teach_the_tower_nothing(self, model, batch, attach):
        model.model.vision_tower.requires_grad_(True)
        objective = {**attach({"shift": False}), "language": 0}
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].detach()}),
            with_kwargs=True,
        )
        names = reached(gradients(model, model(**batch, visual_objective=objective).loss))
        hook.remove()
        assert names > HEAD and all(name in HEAD or name.startswith(DECODER) for name in names)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_features_of_a_neighbour_are_another_loss(self, model, batch, attach, options):
        """Targets alone move: images are encoded before, and what the decoder reads stays."""
        objective = attach(options)
        batch["mm_encoder_outputs"] = {"image": model.get_image_features(batch.pop("pixel_values"))}
        images = batch["mm_encoder_outputs"]["image"]
        loss = model(**batch, visual_objective=objective).visual_loss
        images.image_features = [features.roll(1, dims=0) for features in images.image_features]
        images.patch_features = images.patch_features.roll(1, dims=1)
        output = model(**batch, visual_objective=objective)
        assert abs(output.visual_loss - loss) > 1e-4 * loss
        assert_close(output.language_loss, model(**batch).language_loss)

    @ONE_LAYOUT
    def test_hidden_states_are_returned_to_who_asks_for_them(self, model, batch, attach):
        objective = attach({"shift": False, "layer": 1})
        assert model(**batch, visual_objective=objective).hidden_states is None
        assert len(model(**batch, visual_objective=objective, output_hidden_states=True).hidden_states) == 4

    @ONE_LAYOUT
    def test_head_that_nobody_has_attached(self, model, batch):
        del model.training_modules
        with pytest.raises(ValueError, match="`VWLMMTrainer` attaches it.*attach_training_modules.*before it makes"):
            model(**batch, visual_objective="features")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"loss": "l1"}, "`loss` of `features` is 'l1'; expected 'mse' or 'cosine'"),
            ({"layer": 1}, "`layer` of `features` is 1, and `shift` is true.*Set `shift` to false"),
            ({"depth": 1}, r"`features` has no such options as \['depth'\]"),
            ({"shift": False, "layer": 4}, "`layer` of `features` is 4, and the decoder has 3 layers; expected 0"),
            ({"shift": False, "layer": -5}, "`layer` of `features` is -5"),
            ({"shift": False, "layer": "1"}, "`layer` of `features` is '1'"),
        ],
        ids=str,
    )
    def test_options_that_do_not_fit(self, model, options, message):
        with pytest.raises(ValueError, match=message):
            attach_training_modules(model, parse_objectives({"features": options})[0])


MAPPINGS = [
    {"visual_words": 0.1},
    {"visual_words": 0.5, "token_labels": 0.25},
    {"language": 0.0, "visual_words": 1.0, "features": 2.0},
    {"language": 0.5, "token_labels": 3},
    {"features": {"weight": 1, "loss": "cosine"}},
    {"token_labels": {}, "features": 0.5, "visual_words": 0},
]


def weight_of(options) -> float:
    return options.get("weight", 1.0) if isinstance(options, dict) else options


class TestMappings:
    @pytest.fixture(autouse=True)
    def with_head(self, model):
        attach_training_modules(model, parse_objectives("features")[0], seed=1)

    @pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
    def test_sum_of_weights_times_means(self, model, batch, samples, mapping):
        output = model(**batch, visual_objective=mapping)
        weights = {name: weight_of(options) for name, options in {"language": 1.0, **mapping}.items()}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        assert output.losses.keys() == output.terms.keys() == weights.keys()
        means = {}
        for name in weights:
            options = mapping.get(name, {})
            options = {k: v for k, v in options.items() if k != "weight"} if isinstance(options, dict) else {}
            means[name], count = by_hand(model, samples, name, **options)
            assert output.terms[name].count == count, name
            assert_close(output.terms[name].total.double() / count, means[name], atol=1e-6, rtol=1e-5)
            assert_close(output.losses[name].double(), means[name], atol=1e-6, rtol=1e-5)
        wanted = sum(weights[name] * mean for name, mean in means.items())
        assert_close(output.loss.double(), wanted, atol=1e-6, rtol=1e-5)
        if "language" in weights:
            assert_close(output.language_loss, output.losses["language"])
        else:
            assert output.language_loss is None and output.num_text_positions is None
        visual = {name: weight for name, weight in weights.items() if name != "language"}
        mean = sum(weight * means[name] for name, weight in visual.items()) / sum(visual.values())
        assert_close(output.visual_loss.double(), mean, atol=1e-6, rtol=1e-5)
        assert output.num_image_positions == output.terms[next(iter(visual))].count

    def test_one_pass_of_the_head_gives_the_gradients_of_several(self, model, batch, monkeypatch):
        weights = {"language": 0.5, "token_labels": 0.25, "visual_words": 2.0}
        counts = {"language": 31, "token_labels": 77, "visual_words": 100}
        passes = []
        monkeypatch.setattr(
            objectives_vwlmm,
            "linear_row_losses",
            lambda *args: passes.append(len(args[0])) or loss_vwlmm.linear_row_losses(*args),
        )
        output = model(**batch, visual_objective=weights, num_items_in_batch=counts)
        together = gradients(model, output.loss)
        assert passes == [sum(term.count for term in output.terms.values())]
        apart = collections.defaultdict(float)
        for name, weight in weights.items():
            alone = model(**batch, visual_objective={"language": 0, name: weight}, num_items_in_batch=counts)
            assert_close(alone.terms[name].total, output.terms[name].total)
            assert_close(alone.losses[name] * counts[name], output.terms[name].total)
            for parameter, gradient in gradients(model, alone.loss).items():
                apart[parameter] += gradient
        assert len(passes) == 4
        assert_same_gradients(together, dict(apart))

    def test_objectives_of_two_heads_do_not_share_a_pass(self, model, batch):
        """Each head learns from the other's prediction, which does not learn."""
        mapping = {"vm_head": 0.5, "visual_words": 2.0, "language": 0}
        together = gradients(model, model(**batch, visual_objective=mapping).loss)
        apart = [
            gradients(model, model(**batch, visual_objective={name: weight, "language": 0}).loss)
            for name, weight in mapping.items()
            if weight
        ]
        assert "model.vm_head.weight" not in apart[1] and "lm_head.weight" not in apart[0]
        names = apart[0].keys() | apart[1].keys()
        assert_same_gradients(together, {n: sum(grads.get(n, torch.zeros(())) for grads in apart) for n in names})

    @ONE_LAYOUT
    def test_nor_do_two_that_learn_from_unlike_teachers(self, model, batch, monkeypatch):
        class OppositeWords(objectives_vwlmm.VisualWords):
            name = "opposite_words"

            def predict(self, inputs):
                rows = super().predict(inputs)
                return rows._replace(teacher=-rows.teacher)

        monkeypatch.setitem(objectives_vwlmm.OBJECTIVES, "opposite_words", OppositeWords)
        weights = {"visual_words": 0.5, "opposite_words": 2.0}
        together = model(**batch, visual_objective={**weights, "language": 0})
        apart = [model(**batch, visual_objective={name: weight, "language": 0}) for name, weight in weights.items()]
        assert abs(apart[0].visual_loss - apart[1].visual_loss) > 1e-2
        assert_close(together.loss, apart[0].loss + apart[1].loss)
        one, other = (gradients(model, output.loss) for output in apart)
        assert_same_gradients(gradients(model, together.loss), {name: one[name] + other[name] for name in one})

    @ONE_LAYOUT
    def test_counts_of_the_step_by_name(self, model, batch):
        mapping = {"visual_words": 0.5, "features": 0.25}
        counts = {"language": 100, "visual_words": torch.tensor(200.0), "features": 400}
        output = model(**batch, visual_objective=mapping, num_items_in_batch=counts)
        for name, count in counts.items():
            assert_close(output.losses[name], output.terms[name].total.detach() / count)
        total = output.losses["language"] + 0.5 * output.losses["visual_words"] + 0.25 * output.losses["features"]
        assert_close(output.loss.detach(), total)

    @ONE_LAYOUT
    def test_weight_0_drops_the_term(self, model, batch, monkeypatch):
        monkeypatch.setattr(objectives_vwlmm.VisualWords, "predict", None)
        output = model(**batch, visual_objective={"visual_words": 0})
        assert_close(output.loss, model(**batch).loss)
        assert output.visual_loss is None and output.losses.keys() == {"language"}

    @ONE_LAYOUT
    @pytest.mark.parametrize("labelled", [True, False])
    def test_nothing_to_learn_is_no_loss(self, model, batch, labelled):
        if not labelled:
            del batch["labels"]
        assert model(**batch, visual_objective={"language": 0, "visual_words": 0}).loss is None

    @ONE_LAYOUT
    @pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, -math.inf, True, "1", None])
    def test_weights_that_are_none(self, model, batch, weight):
        for options in (weight, {"weight": weight}):
            with pytest.raises(ValueError, match="weight of `visual_words` is .*; expected a finite number"):
                model(**batch, visual_objective={"visual_words": options})

    @ONE_LAYOUT
    @pytest.mark.parametrize(
        ("objective", "message"),
        [
            ({"visual_word": 1.0}, "'visual_word'; expected None, 'visual_words' or 'vm_head'.*'token_labels'"),
            ({"visual_word": 0.0}, "'visual_word'; expected"),
            (["visual_words"], r"\['visual_words'\]; expected a name or a mapping of names to weights"),
            (1.0, "1.0; expected a name or a mapping"),
            ({"visual_words": {"loss": "cosine"}}, r"`visual_words` has no such options as \['loss'\]"),
            ({"language": {"weight": 0, "loss": "cosine"}}, "`language` has no such options"),
        ],
        ids=str,
    )
    def test_what_is_no_mapping_of_names_to_weights(self, model, batch, objective, message):
        with pytest.raises(ValueError, match=message):
            model(**batch, visual_objective=objective)


class TestBackwardTwice:
    """The loss has its gradients ready, and scales them in place where nobody asks for them again."""

    @ONE_LAYOUT
    @pytest.mark.parametrize("scale", [1.0, 0.5, 8.0])
    def test_every_pass_over_a_kept_graph_adds_the_same(self, model, batch, scale):
        objective = {"visual_words": 0.5, "token_labels": 0.25}
        once = gradients(model, model(**batch, visual_objective=objective).loss)
        model.zero_grad()
        loss = scale * model(**batch, visual_objective=objective).loss
        for _ in range(2):
            loss.backward(retain_graph=True)
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in once:
                assert_close(parameter.grad, 3 * scale * once[name], atol=1e-6, rtol=1e-5)

    @ONE_LAYOUT
    def test_other_scales_of_one_loss(self, model, batch):
        loss = model(**batch, visual_objective="visual_words").loss
        head = model.lm_head.weight
        first, second = (torch.autograd.grad(scale * loss, head, retain_graph=True)[0] for scale in (4.0, 1.0))
        assert_close(first, 4 * second)
        assert_close(torch.autograd.grad(loss, head)[0], second)


# What makes the host wait for an accelerator. The gradient of `masked_scatter` selects by a mask.
READS = {
    "aten::_local_scalar_dense",
    "aten::_unique",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_scatter_backward",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}


class ReadsOfLists(TorchFunctionMode):
    """Records the reads that no operation makes on a CPU."""

    def __init__(self, reads: collections.Counter):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.reads["list"] += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Records what is read of tensors, and the most rows of `C` numbers that one holds, forward and backward."""

    def __init__(self):
        super().__init__()
        self.reads = collections.Counter()
        self.most_rows = 0
        self.num_backward = 0
        self.lists = ReadsOfLists(self.reads)

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.lists.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.num_backward += name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
        has_mask = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READS or has_mask:
            # Transformers looks, for every decoder and once a forward, whether rows are packed.
            looks = any("masking_utils" in frame.filename for frame in traceback.extract_stack())
            self.reads["look for packed rows" if looks else name] += 1
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (list, tuple)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == C:
                self.most_rows = max(self.most_rows, tensor.numel() // C)
        return output


class TestPseudoImageFeatures:
    NUM_ROWS = 80  # more than the embeddings have columns: no weight is as large as the visual words of all rows

    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch):
        monkeypatch.setitem(loss_vwlmm.CHUNK_BYTES, "cpu", 7 * 4 * C)

    @pytest.fixture
    def inputs(self, model):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(self.NUM_ROWS, D, generator=generator, requires_grad=True)
        return features, model.model.vm_head, model.get_input_embeddings().weight

    def test_chunks_give_the_expected_embedding_and_its_gradients(self, inputs):
        features, vm_head, embeddings = inputs
        leaves = (features, vm_head.weight, embeddings)
        found, wanted = vm_head(features, embeddings), (features @ vm_head.weight.T).softmax(-1) @ embeddings
        assert_close(found, wanted)
        direction = torch.linspace(-1, 1, found.numel()).view_as(found)
        for gradient, other in zip(
            torch.autograd.grad((found * direction).sum(), leaves),
            torch.autograd.grad((wanted * direction).sum(), leaves),
            strict=True,
        ):
            assert_close(gradient, other, atol=1e-5, rtol=1e-4)

    def test_visual_words_of_all_rows_are_neither_held_nor_made(self, inputs):
        features, vm_head, embeddings = inputs
        kept = []
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
            with Operations() as operations:
                loss = vm_head(features, embeddings).square().sum()
            forward_rows = operations.most_rows
            with operations:
                loss.backward()
        assert kept and max(kept) < self.NUM_ROWS * C
        # The transposed head has as many rows as there are hidden sizes.
        assert forward_rows <= operations.most_rows <= D

    def test_images_on_their_way_hold_none(self, model, samples):
        model.config.use_pseudo_image_features = True
        pixel_values = torch.cat([sample.pixel_values for sample in samples] * 2)[:5]
        kept = []
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            images = model.get_image_features(pixel_values)
        assert sum(len(features) for features in images.pooler_output) == self.NUM_ROWS
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        rest = [t for t in kept if t.untyped_storage().data_ptr() not in weights and t.ndim > 1 and t.shape[-1] == C]
        assert kept and not rest


class TestStageThree:
    """The VM head learns from what the decoder predicts up to the last image token, and nothing else runs."""

    @pytest.mark.parametrize("objective", ["vm_head", {"visual_words": 1.0, "language": 0}], ids=str)
    def test_nothing_runs_behind_the_last_image_token(self, model, batch, objective):
        lengths = []
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        model(**batch, visual_objective=objective)
        last = (batch["input_ids"] == IMAGE).any(dim=0).nonzero().max()
        assert lengths == [last + 1] and last + 1 < batch["input_ids"].shape[1]

    @ONE_LAYOUT
    def test_text_behind_images_is_learned_where_there_is_any_to_learn(self, model, batch):
        lengths = []
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        for objective in (None, "visual_words", {"vm_head": 1.0, "language": 1.0}):
            model(**batch, visual_objective=objective)
        assert lengths == [batch["input_ids"].shape[1]] * 3


class Calls:
    """Counts the calls of a model's tower and adapter."""

    def __init__(self, model):
        self.tower = self.adapter = 0
        model.model.vision_tower.register_forward_hook(lambda *args: self._add("tower"))
        model.model.multi_modal_projector.register_forward_hook(lambda *args: self._add("adapter"))

    def _add(self, name: str) -> None:
        setattr(self, name, getattr(self, name) + 1)


class TestBatchesWithoutImages:
    @pytest.fixture
    def text(self, samples) -> dict[str, torch.Tensor]:
        return pad(samples[1:2], "right")

    def test_a_model_without_a_trainer_runs_nothing_in_their_place(self, model, text):
        calls = Calls(model)
        for objective in (None, "visual_words", "vm_head", {"token_labels": 1.0}):
            model(**text, visual_objective=objective, image_labels=torch.empty(0, N, dtype=torch.long)).loss.backward()
        model(input_ids=text["input_ids"])
        assert (calls.tower, calls.adapter) == (0, 0)

    @pytest.mark.parametrize("runs_tower", [False, True])
    @pytest.mark.parametrize("use_pseudo_image_features", [False, True])
    def test_what_trains_gets_gradients_of_zero(self, model, text, samples, runs_tower, use_pseudo_image_features):
        """So that every process has the same gradients to average, and loss and weights are those of the text."""
        model.config.use_pseudo_image_features = use_pseudo_image_features
        model.model.vision_tower.requires_grad_(runs_tower)
        attach_training_modules(model, parse_objectives("features")[0])
        expected = model(**text).loss
        model.encode_no_images = lambda base: encode_no_images(base, runs_tower)
        calls = Calls(model)
        loss = model(**text, visual_objective={"features": 1.0}).loss
        assert (calls.tower, calls.adapter) == (runs_tower, 1)
        assert_close(loss, expected)
        grads = gradients(model, loss)
        for prefix in (
            ADAPTER,
            "training_modules.",
            *(["model.vision_tower.encoder.layers.0."] if runs_tower else []),
        ):
            found = {name: gradient for name, gradient in grads.items() if name.startswith(prefix)}
            assert found and not reached(found)

    def test_without_labels_nothing_is_trained_nor_run(self, model, text):
        model.encode_no_images = lambda base: encode_no_images(base, True)
        calls = Calls(model)
        model(input_ids=text["input_ids"])
        model.generate(input_ids=text["input_ids"], max_new_tokens=2)
        assert (calls.tower, calls.adapter) == (0, 0)

    def test_images_are_not_run_twice(self, model, samples):
        model.encode_no_images = lambda base: encode_no_images(base, True)
        calls = Calls(model)
        pixel_values = samples[2].pixel_values
        model(**pad(samples[2:], "right"), pixel_values=pixel_values, visual_objective="visual_words")
        assert (calls.tower, calls.adapter) == (1, 1)


# --- In the trainer


@pytest.fixture(scope="session")
def labelled(dataset) -> datasets.Dataset:
    """The small dataset with a label for two image tokens of three."""
    labels = [
        [
            [-100 if n % 3 == 0 else (31 * sample + 17 * image + 7 * n) % C for n in range(N)]
            for image in range(len(images))
        ]
        for sample, images in enumerate(dataset["images"])
    ]
    return dataset.add_column("image_labels", labels, feature=datasets.List(datasets.List(datasets.Value("int64"))))


@pytest.fixture
def make_trainer(model, processor, labelled, tmp_path):
    """Makes a trainer with settings under which a step can be computed by hand."""

    def make(stage, model=model, train_dataset=labelled, trainer_kwargs=None, **kwargs):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "chat_template": "vicuna_v1",
            "per_device_train_batch_size": 4,
            "global_batch_size": 8,
            "max_steps": 1,
            **BY_HAND,
        }
        return VWLMMTrainer(
            model=model,
            args=VWLMMTrainingArguments(stage=stage, **{**defaults, **kwargs}),
            train_dataset=train_dataset,
            processing_class=copy.deepcopy(processor),
            **(trainer_kwargs or {}),
        )

    return make


def logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def samples_of(trainer, rows) -> list[Sample]:
    """Samples of a dataset as the trainer's collator makes them one by one."""
    found = []
    for row in rows:
        batch = trainer.data_collator([row])
        found.append(
            Sample(
                batch["input_ids"][0].tolist(),
                batch["labels"][0].tolist(),
                batch.get("pixel_values", torch.empty(0, 3, 28, 28)),
                batch["image_labels"] if "image_labels" in batch else torch.full((len(row["images"]), N), -100),
            )
        )
    return found


BOTH = {"token_labels": 0.5, "features": {"weight": 0.25, "loss": "cosine"}}


def both_by_hand(model, samples) -> dict[str, float]:
    """What is logged of the language loss and the two of `BOTH`."""
    options = {"language": {}, "token_labels": {}, "features": {"loss": "cosine"}}
    found = [by_hand(model, samples, name, **kwargs) for name, kwargs in options.items()]
    language, labels, features = (mean.item() for mean, _ in found)
    num_text, num_labels, num_features = (count for _, count in found)
    return {
        "loss": language + 0.5 * labels + 0.25 * features,
        "language_loss": language,
        "num_text_positions": num_text,
        "token_labels_loss": labels,
        "num_image_positions": num_labels,
        "features_loss": features,
        "num_features_positions": num_features,
        "features_cosine": 1 - features,
        "visual_loss": (0.5 * labels + 0.25 * features) / 0.75,
    }


class TestArguments:
    @pytest.mark.parametrize(
        ("stage", "objective", "names"),
        [
            *((stage, "features", ["language", "features"]) for stage in (1, 2, 4)),
            (3, {"vm_head": 1.0, "features": 0.5}, ["language", "vm_head", "features"]),
            (1, {"visual_words": 0.1}, ["language", "visual_words"]),
            (2, {"token_labels": 0.5, "language": 0}, ["token_labels"]),
            (4, {"token_labels": 0.5}, ["language", "token_labels"]),
            (4, {}, ["language"]),
        ],
        ids=str,
    )
    def test_objective_of_the_user_wins_over_the_stages(self, make_trainer, stage, objective, names):
        trainer = make_trainer(stage, visual_objective=objective)
        trainer.train()
        entry = logs(trainer)[0]
        losses = {name.removesuffix("_loss") for name in entry if name.endswith("_loss")}
        assert losses - {"visual"} == set(names)
        _, weights = trainer.args.get_objectives()
        assert weights.keys() == set(names)
        assert entry["loss"] == pytest.approx(sum(weights[name] * entry[f"{name}_loss"] for name in names), rel=1e-5)

    @pytest.mark.parametrize(
        ("stage", "options", "message"),
        [
            (
                3,
                {"visual_objective": "visual_words"},
                r"Stage 3 trains model\.vm_head, which learns nothing from",
            ),
            (4, {"trains": ["decoder", "vm_head"]}, r"model\.vm_head, which learns nothing .*Leave `vm_head` out"),
            (2, {"visual_objective": {"language": 0, "features": 1}}, "lm_head, which learns nothing from features"),
        ],
        ids=str,
    )
    def test_a_module_that_no_objective_teaches(self, make_trainer, stage, options, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(stage, **options)

    def test_the_vm_head_learns_through_pseudo_image_features(self, make_trainer, model):
        model.config.use_pseudo_image_features = True
        before = model.model.vm_head.weight.detach().clone()
        make_trainer(4, trains=["decoder", "mm_head", "vm_head"]).train()
        assert not torch.equal(model.model.vm_head.weight, before)

    def test_a_weight_beside_a_mapping_weighs_nothing(self, make_trainer):
        for weight in (0, 0.5):
            with pytest.raises(ValueError, match="no name that it could weigh. Write the weight into the mapping"):
                make_trainer(4, visual_objective={"visual_words": 1.0}, visual_loss_weight=weight)
        with pytest.raises(ValueError, match="`visual_objective` is None, no name that it could weigh"):
            make_trainer(2, visual_loss_weight=0.5)

    def test_evaluation_data_without_the_column(self, make_trainer, labelled):
        trainer = make_trainer(2, visual_objective="token_labels", trainer_kwargs={"eval_dataset": labelled})
        with pytest.raises(ValueError, match="`token_labels` learns from a column `image_labels`"):
            trainer.evaluate(labelled.remove_columns("image_labels"))

    def test_a_collator_of_the_user_that_leaves_something_out(self, make_trainer, labelled):
        trainer = make_trainer(2, visual_objective="token_labels")
        batch = trainer.data_collator([labelled[0]])
        del batch["supervised_positions"], batch["image_labels"]
        with pytest.raises(ValueError, match="the objectives read image_labels, too"):
            trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))

    def test_a_collator_of_the_user_whose_labels_are_the_token_ids(self, make_trainer, labelled):
        trainer = make_trainer(2)
        batch = trainer.data_collator([labelled[0]])
        expected = (batch["input_ids"][:, 1:] != IMAGE).sum()
        batch["labels"] = batch["input_ids"].clone()
        del batch["supervised_positions"]
        _, counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        assert counts == {"language": expected}

    def test_one_process_with_several_gpus_is_refused(self, make_trainer):
        trainer = make_trainer(2)
        trainer.args._n_gpu = 2
        with pytest.raises(ValueError, match="One process sees 2 GPUs.*Start one process for each"):
            check_options(trainer.args, {}, uses_peft=False)

    def test_a_head_that_is_tied_to_the_embeddings_trains_under_either_name(self, model):
        model.lm_head.weight = model.get_input_embeddings().weight
        for modules, trains in ((("lm_head",), True), (("model.language_model",), True), (("model.vm_head",), False)):
            set_trainable_parameters(model, modules)
            assert model.lm_head.weight.requires_grad == trains

    def test_sums_that_are_kept_keep_no_graph(self):
        value = torch.ones((), requires_grad=True)
        means = PositionMeans({"language": 1.0})
        for _ in range(2):
            means.add_terms({"language": Term(2 * value, 2, {"metric": 3 * value})})
        assert not any(kept.requires_grad for kept in sum(means._sums.values(), []) if isinstance(kept, torch.Tensor))
        assert means.pop() == {"language_loss": 1.0, "num_text_positions": 4, "metric": 1.5}

    def test_what_had_no_position_has_no_mean(self):
        means = PositionMeans({"language": 1.0, "codes": 3.0, "features": 1.0})
        terms = {"language": Term(torch.tensor(0.0), 0, {}), "codes": Term(torch.tensor(0.0), torch.tensor(0), {})}
        means.add_terms(terms)
        assert means.pop() == {"num_text_positions": 0, "num_image_positions": 0}
        means.add_terms(terms | {"features": Term(torch.tensor(4.0), 2, {})})
        assert means.pop() == {
            "num_text_positions": 0,
            "num_image_positions": 0,
            "num_features_positions": 2,
            "features_loss": 2.0,
            "visual_loss": 2.0,
        }

    def test_weight_of_an_objective_by_name(self, make_trainer):
        assert make_trainer(2, visual_objective="features", visual_loss_weight=0.3).args.get_objectives()[1] == {
            "language": 1.0,
            "features": 0.3,
        }

    @pytest.mark.parametrize(
        ("stage", "trains", "prefixes"),
        [
            (4, ["adapter", "decoder"], (ADAPTER, DECODER)),
            (1, ["vision_tower", "adapter"], (ADAPTER, "model.vision_tower.")),
            (2, ["mm_head"], (MM_HEAD,)),
            (3, ["vm_head", "adapter"], (VM_HEAD, ADAPTER)),
        ],
        ids=str,
    )
    def test_modules_of_the_user_train_and_no_other(self, make_trainer, model, stage, trains, prefixes):
        before = weights(model)
        trainer = make_trainer(stage, trains=trains)
        trainer.train()
        # The adapter reads the layer before the tower's last, and nothing depends on what is behind.
        unread = ("model.vision_tower.encoder.layers.3.", "model.vision_tower.post_layernorm.")
        wanted = {name for name in before if name.startswith(prefixes) and not name.startswith(unread)}
        assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
        changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert changed <= wanted and all(any(name.startswith(prefix) for name in changed) for prefix in prefixes)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"method": "blip"}, "`method` is 'blip'; expected 'vw-lmm' or 'lavit'"),
            (
                {"trains": ["adapter", "head"]},
                "`trains` is .'adapter', 'head'.; expected some of 'adapter'",
            ),
            ({"visual_objective": "words"}, "`visual_objective` is 'words'; expected None, 'visual_words'"),
            ({"visual_objective": {"features": {"loss": "l1"}}}, "`loss` of `features` is 'l1'"),
            ({"visual_objective": {"visual_words": -1}}, "weight of `visual_words` is -1"),
            ({"visual_objective": {"visual_words": math.inf}}, "weight of `visual_words` is inf"),
            ({"visual_objective": {"language": 0}}, "which leaves nothing to learn"),
            ({"visual_loss_weight": math.nan}, "`visual_loss_weight` is nan"),
            ({"visual_loss_weight": -0.5}, "`visual_loss_weight` is -0.5"),
        ],
        ids=str,
    )
    def test_errors_of_the_arguments_need_no_model(self, tmp_path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            VWLMMTrainingArguments(str(tmp_path), stage=4, use_cpu=True, **kwargs)

    @pytest.mark.parametrize("form", ["dataset", "stream", "evaluation", "one of several evaluations"])
    def test_a_missing_column_is_an_error_before_weights_are_loaded(self, make_trainer, dataset, labelled, form):
        data = {"train_dataset": dataset if form == "dataset" else labelled}
        if form == "stream":
            data["train_dataset"] = dataset.to_iterable_dataset()
        elif form == "evaluation":
            data["trainer_kwargs"] = {"eval_dataset": dataset}
        elif form == "one of several evaluations":
            data["trainer_kwargs"] = {"eval_dataset": {"good": labelled, "bad": dataset}}
        message = "`token_labels` learns from a column `image_labels`, and the dataset has id, messages, images"
        with pytest.raises(ValueError, match=message):
            make_trainer(4, model="no/such/model", visual_objective="token_labels", **data)


class TestLogs:
    def test_over_accumulation_they_are_the_values_by_hand(self, make_trainer, model, labelled):
        """Micro-batches of three, three and two samples, with unequally many positions of each kind."""
        trainer = make_trainer(2, visual_objective=BOTH, per_device_train_batch_size=3, global_batch_size=9)
        expected = both_by_hand(model, samples_of(trainer, labelled))
        trainer.train()
        (entry,) = logs(trainer)
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=1e-4), name

    def test_evaluation(self, make_trainer, model, labelled):
        rows = labelled.select(range(5))
        trainer = make_trainer(
            2, visual_objective=BOTH, trainer_kwargs={"eval_dataset": rows}, per_device_eval_batch_size=2
        )
        expected = both_by_hand(model, samples_of(trainer, rows))
        metrics = trainer.evaluate()
        for name, value in expected.items():
            if name != "loss":  # a mean over batches, as everywhere in Transformers
                assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name

    def test_language_of_weight_0_is_not_logged(self, make_trainer):
        trainer = make_trainer(4, visual_objective={"language": 0.0, "visual_words": 0.5})
        trainer.train()
        (entry,) = logs(trainer)
        assert "language_loss" not in entry and "num_text_positions" not in entry
        assert entry["loss"] == pytest.approx(0.5 * entry["visual_loss"], rel=1e-5)


class TestSteps:
    SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "visual_objective": BOTH}

    def step(self, make_trainer, vicuna, **kwargs) -> dict[str, torch.Tensor]:
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
        trainer = make_trainer(2, model=model, **{**self.SGD, **kwargs})
        before = weights(model)
        trainer.train()
        return {name: (before[name] - value) / 0.1 for name, value in weights(model).items()}

    @pytest.mark.parametrize(
        "options",
        [
            {"per_device_train_batch_size": 3, "global_batch_size": 9},
            {"per_device_train_batch_size": 1},
            {"packing": True},
        ],
        ids=str,
    )
    def test_they_are_the_gradient_of_the_means_by_hand(self, make_trainer, vicuna, model, labelled, options):
        """Whatever the micro-batches, and for packed rows, which several samples share."""
        found = self.step(make_trainer, vicuna, **options)
        trainer = make_trainer(2, visual_objective=BOTH)
        samples = samples_of(trainer, labelled)
        means = [
            weight * by_hand(model, samples, name, **kwargs)[0]
            for name, weight, kwargs in (
                ("language", 1.0, {}),
                ("token_labels", 0.5, {}),
                ("features", 0.25, {"loss": "cosine"}),
            )
        ]
        wanted = gradients(model, sum(means))
        assert wanted.keys() >= HEAD
        for name, gradient in found.items():
            other = wanted.get(name, torch.zeros_like(gradient))
            assert_close(gradient, other, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")

    def test_accumulation_divides_nothing_again(self, make_trainer, model, labelled):
        """Transformers does where it believes that a model takes no counts, unless the trainer says otherwise."""
        model.accepts_loss_kwargs = False
        trainer = make_trainer(2, visual_objective=BOTH, per_device_train_batch_size=2)
        expected = both_by_hand(model, samples_of(trainer, labelled))
        trainer.train()
        assert logs(trainer)[0]["loss"] == pytest.approx(expected["loss"], rel=1e-4)

    @pytest.mark.parametrize("stage", [1, 3])
    def test_a_step_of_text_alone_changes_nothing_that_learns_from_images(self, make_trainer, model, labelled, stage):
        trainer = make_trainer(stage, train_dataset=labelled.select([1, 6]), max_grad_norm=1.0)
        before = weights(model)
        calls = Calls(model)
        trainer.train()
        assert (calls.tower, calls.adapter) == (0, 1)
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


class Warnings(logging.Handler):
    """Collects what Transformers warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("transformers").addHandler(self)
        return self.messages

    def __exit__(self, *args):
        logging.getLogger("transformers").removeHandler(self)


class TestTrainingModules:
    FEATURES = {"visual_objective": {"features": 1.0}}
    SAVES = {**FEATURES, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}

    def test_new_weights_follow_from_the_seed_and_disturb_no_other_random_number(self, model):
        objectives, _ = parse_objectives("features")
        heads, numbers = [], []
        for seed in (0, 0, 1):
            torch.manual_seed(5)
            attach_training_modules(model, objectives, seed)
            heads.append(model.training_modules["features"].weight.detach().clone())
            numbers.append(torch.rand(1))
        assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
        assert numbers[0] == numbers[1] == numbers[2]

    def test_those_of_an_earlier_run_go(self, make_trainer, model, tmp_path):
        make_trainer(2, **self.FEATURES)
        assert {name for name in model.state_dict() if "training" in name} == HEAD
        make_trainer(2)
        assert not [name for name in model.state_dict() if "training" in name]
        assert not set(model._keys_to_ignore_on_save or ()) & HEAD

    def test_saved_beside_the_model_which_loads_without_a_warning(self, make_trainer, model, tmp_path):
        trainer = make_trainer(2, **self.FEATURES)
        before = weights(model)
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        model.save_pretrained(tmp_path / "by_the_model")
        head = load_file(tmp_path / "saved" / "_training_modules" / "features.safetensors")
        for name, value in head.items():
            assert torch.equal(value, model.training_modules["features"].get_parameter(name))
            assert not torch.equal(value, before[f"training_modules.features.{name}"])
        for folder in (tmp_path / "saved", tmp_path / "by_the_model"):
            tensors = load_file(folder / "model.safetensors")
            assert tensors.keys() == before.keys() - HEAD
            with Warnings() as messages:
                loaded, info = VWLMMForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
            assert messages == [] and not any(info.values())
            assert not hasattr(loaded, "training_modules")
        # Transformers does warn, and it would be seen.
        del tensors["lm_head.weight"]
        save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
        with Warnings() as messages:
            VWLMMForConditionalGeneration.from_pretrained(tmp_path / "saved")
        assert any("lm_head.weight" in message for message in messages)

    @pytest.mark.parametrize("uses_lora", [False, True], ids=["whole", "lora"])
    def test_resumed_run_continues_identically(self, make_trainer, vicuna, tmp_path, uses_lora):
        """Weights, the modules that only training has, and the state of the optimizer, to the last bit."""
        results = []
        for folder in ("through", "resumed"):
            peft_config = LoraConfig(target_modules=r"model\.language_model\..*_proj") if uses_lora else None
            trainer = make_trainer(
                4,
                model=VWLMMForConditionalGeneration.from_pretrained(vicuna),
                output_dir=str(tmp_path / folder),
                trainer_kwargs={"peft_config": peft_config},
                **self.SAVES,
            )
            with Warnings() as messages:
                trainer.train(
                    resume_from_checkpoint=str(tmp_path / "through/checkpoint-2") if folder == "resumed" else None
                )
            assert not [message for message in messages if "training_modules" in message or "missing" in message]
            states = [
                tensor for state in trainer.optimizer.state_dict()["state"].values() for tensor in state.values()
            ]
            results.append((weights(trainer.model), states, logs(trainer)))
        (through, states, entries), (resumed, other_states, other_entries) = results
        assert through.keys() == resumed.keys() and len(states) == len(other_states) > 0
        assert not [name for name, value in through.items() if not torch.equal(resumed[name], value)]
        assert all(torch.equal(value, other) for value, other in zip(states, other_states, strict=True))
        assert [entry["features_loss"] for entry in entries] == [entry["features_loss"] for entry in other_entries]
        modules = [
            load_file(tmp_path / "through" / f"checkpoint-{step}/_training_modules/features.safetensors")
            for step in (2, 4)
        ]
        assert not torch.equal(modules[0]["weight"], modules[1]["weight"])

    def test_resumed_without_its_modules_is_an_error(self, make_trainer, tmp_path):
        make_trainer(4, **{**self.SAVES, "visual_objective": "visual_words"}).train()
        with pytest.raises(ValueError, match="made by another run: objectives was .*visual_words.* and is .*features"):
            make_trainer(4, **self.SAVES).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))

    @pytest.mark.parametrize("uses_lora", [False, True], ids=["whole", "lora"])
    def test_best_model_at_the_end(self, make_trainer, labelled, tmp_path, uses_lora):
        """The loss falls; asked for the highest, the first checkpoint is the best."""
        peft_config = LoraConfig(target_modules=["q_proj"]) if uses_lora else None
        trainer = make_trainer(
            4,
            trainer_kwargs={"eval_dataset": labelled.select([0]), "peft_config": peft_config},
            **{**self.SAVES, "save_steps": 1, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
            load_best_model_at_end=True,
            metric_for_best_model="eval_features_loss",
            greater_is_better=True,
        )
        trainer.train()
        heads = [
            load_file(tmp_path / f"run/checkpoint-{step}/_training_modules/features.safetensors") for step in (1, 2)
        ]
        assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
        base = trainer.model.get_base_model() if uses_lora else trainer.model
        assert torch.equal(base.training_modules["features"].weight, heads[0]["weight"])
        assert not torch.equal(heads[0]["weight"], heads[1]["weight"])

    def test_trains_beside_lora(self, make_trainer, tmp_path):
        trainer = make_trainer(
            4, trainer_kwargs={"peft_config": LoraConfig(target_modules="all-linear")}, max_steps=2, **self.FEATURES
        )
        before = weights(trainer.model)
        assert not [name for name in before if "training_modules" in name and "lora" in name]
        trainer.train()
        changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
        heads = {name for name in before if "training_modules" in name}
        assert len(heads) == 2 and heads < changed
        assert all("lora_" in name for name in changed - heads)
        trainer.save_model(tmp_path / "saved")
        (head,) = (tmp_path / "saved" / "_training_modules").iterdir()
        assert torch.equal(
            load_file(head)["weight"], trainer.model.get_base_model().training_modules["features"].weight
        )
        adapter = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        assert adapter and not [name for name in adapter if "training_modules" in name]


class StepReads(TrainerCallback):
    """What has been read when each step begins."""

    def __init__(self, operations: Operations):
        self.operations = operations
        self.begun = []

    def on_step_begin(self, *args, **kwargs):
        self.begun.append(self.operations.reads.copy())


class TestCosts:
    RUNS = [
        (1, {}),
        (2, {}),
        (3, {}),
        (4, {}),
        (4, {"packing": True}),
        (2, {"visual_objective": BOTH}),
        (4, {"visual_objective": {"features": {"shift": False, "layer": 1}}}),
    ]

    # Whether loss and gradient norm are numbers.
    READS = {"list": 1}

    @pytest.mark.parametrize(("stage", "options"), RUNS, ids=str)
    def test_the_host_reads_one_tensor_in_a_micro_batch(self, make_trainer, labelled, stage, options):
        trainer = make_trainer(stage, logging_steps=100, per_device_train_batch_size=8, **options)
        batch = trainer.data_collator([labelled[i] for i in range(8)])
        (batch,), counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = 1
        with Operations() as operations:
            trainer.training_step(trainer.model, batch, counts)
            trainer._get_grad_norm(trainer.model)
        assert (operations.num_backward > 0) == (stage != 3)  # what runs backward is seen
        assert operations.reads.pop("look for packed rows", 0) == ("packing" in options)
        assert operations.reads == self.READS

    def test_one_in_a_step_that_accumulates(self, make_trainer, labelled):
        trainer = make_trainer(4, logging_steps=100, per_device_train_batch_size=2, global_batch_size=8)
        batches = [trainer.data_collator([labelled[2 * i], labelled[2 * i + 1]]) for i in range(4)]
        batches, counts = trainer.get_batch_samples(iter(batches), 4, torch.device("cpu"))
        with Operations() as operations:
            for batch in batches:
                trainer.accelerator.gradient_state._set_sync_gradients(batch is batches[-1])
                trainer.training_step(trainer.model, batch, counts)
            trainer._get_grad_norm(trainer.model)
        assert operations.reads == self.READS

    def test_nor_another_one_in_the_rest_of_the_step(self, make_trainer):
        """Clipping, the optimizer and what lies between steps, without the data loader, which is on the host."""
        operations = Operations()
        steps = StepReads(operations)
        trainer = make_trainer(
            4,
            logging_steps=100,
            max_steps=4,
            max_grad_norm=1.0,
            trainer_kwargs={"callbacks": [steps]},
            per_device_train_batch_size=8,
        )
        load = trainer.get_batch_samples

        def load_unseen(*args):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return load(*args)

        trainer.get_batch_samples = load_unseen
        with operations:
            trainer.train()
        reads = steps.begun[3] - steps.begun[2]
        assert reads.pop("look for packed rows", 0) <= 1
        assert reads == self.READS

    @pytest.mark.parametrize(("stage", "options"), RUNS, ids=str)
    def test_no_step_makes_the_logits_of_all_positions(self, make_trainer, labelled, monkeypatch, stage, options):
        monkeypatch.setitem(loss_vwlmm.CHUNK_BYTES, "cpu", 16 * 4 * C)
        trainer = make_trainer(stage, per_device_train_batch_size=8, **options)
        trainer.args.packing = False  # the rows are given here
        batch = trainer.data_collator([labelled[i] for i in range(8)])
        (batch,), counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        assert sum(counts.values()) > D
        trainer.current_gradient_accumulation_steps = 1
        with Operations() as operations:
            trainer.training_step(trainer.model, batch, counts)
        # The transposed heads have as many rows as there are hidden sizes.
        assert operations.most_rows <= D

    def test_evaluation_makes_none_either(self, make_trainer, labelled, monkeypatch):
        monkeypatch.setitem(loss_vwlmm.CHUNK_BYTES, "cpu", 16 * 4 * C)
        trainer = make_trainer(4, trainer_kwargs={"eval_dataset": labelled})
        with Operations() as operations:
            trainer.evaluate()
        assert operations.most_rows <= D


def test_batches_of_one_modality_come_in_random_order():
    """Not all that have images first."""
    has_images = [True, False] * 40
    sampler = ModalityLengthGroupedSampler(4, list(range(80)), has_images)
    order = list(sampler)
    kinds = [has_images[order[start]] for start in range(0, 80, 4)]
    assert sorted(kinds) not in (kinds, kinds[::-1])
