# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of datasets: how often each sample is there, and how a recipe names them."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, List, Value

from processing_vwlmm import llava_dataset, mix_datasets


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train
from small_world import write_llava_dataset


def numbers(first, count):
    return Dataset.from_dict({"number": list(range(first, first + count))})


class TestMix:
    def test_counts(self):
        mixed = mix_datasets([numbers(0, 10), numbers(100, 8), numbers(200, 4)], [2, 1.5, 0.25])
        counts = Counter(mixed["number"])
        assert [counts[number] for number in range(10)] == [2] * 10
        assert sorted(counts[number] for number in range(100, 108)) == [1] * 4 + [2] * 4
        assert sum(counts[number] for number in range(200, 204)) == 1

    def test_draw_follows_the_seed(self):
        datasets = [numbers(0, 100), numbers(100, 100)]
        first, same, other = (mix_datasets(datasets, [0.5, 0.5], seed) for seed in (0, 0, 1))
        assert first["number"][:] == same["number"][:] != other["number"][:]
        # The draw of one does not repeat that of another, nor depend on its weight.
        assert [number + 100 for number in first["number"][:50]] != first["number"][50:]
        assert mix_datasets(datasets, [0.25, 0.5])["number"][25:] == first["number"][50:]

    def test_fingerprint(self):
        one, two = numbers(0, 10), numbers(100, 10)
        cases = [([one, two], [1, 2], 0), ([two, one], [1, 2], 0), ([one, two], [2, 1], 0), ([one, two], [1, 2], 1)]
        assert len({mix_datasets(*case)._fingerprint for case in cases}) == 4
        assert mix_datasets([one, two], [1.0, 2.0])._fingerprint == mix_datasets(*cases[0])._fingerprint

    @pytest.mark.parametrize("order", [1, -1])
    def test_labels_of_ids_and_of_words(self, order):
        datasets = [Dataset.from_dict({"image_labels": labels}) for labels in ([[[5, -100]], None], [[["red", "7"]]])]
        transformed = datasets[0].with_transform(lambda batch: batch)  # what changes samples still does
        for first in (datasets[0], transformed):
            parts = [first, datasets[1]][::order]
            mixed = mix_datasets(parts, [1, 1])
            rows = [[[["5", "-100"]], None], [[["red", "7"]]]][::order]
            assert mixed["image_labels"][:] == sum(rows, [])
            assert mixed._fingerprint == mix_datasets(parts, [1, 1])._fingerprint

    def test_labels_of_ids_of_other_width(self):
        datasets = [
            Dataset.from_dict({"image_labels": [[[5]]]}, features=Features({"image_labels": List(List(Value(width)))}))
            for width in ("int32", "int64")
        ]
        assert mix_datasets(datasets, [1, 1])["image_labels"][:] == [[[5]], [[5]]]

    @pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "3", True, None])
    def test_weight_is_refused(self, weight):
        with pytest.raises(ValueError, match="weight of dataset 1 is .*, expected a positive finite number"):
            mix_datasets([numbers(0, 2), numbers(0, 2)], [1, weight])

    def test_refused(self):
        with pytest.raises(ValueError, match="1 datasets and 2 weights"):
            mix_datasets([numbers(0, 2)], [1, 1])
        with pytest.raises(ValueError, match="Give all of them the same columns"):
            mix_datasets([numbers(0, 2), Dataset.from_dict({"text": ["a"]})], [1, 1])
        with pytest.raises(ValueError, match="Give all of them the same columns"):  # a number is no label
            labels = [[[5]]], [[[5.0]]]
            mix_datasets([Dataset.from_dict({"image_labels": column}) for column in labels], [1, 1])
        with pytest.raises(ValueError, match="No sample is left of dataset 1: its weight is 0.1, and it has 2"):
            mix_datasets([numbers(0, 2), numbers(0, 2)], [1, 0.1])
        with pytest.raises(ValueError, match="No sample is left: all datasets are empty"):
            mix_datasets([numbers(0, 0)], [0.1])


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(llava_dataset, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_llava_dataset(tmp_path, 6, 4, num_held_out=1)
    return tmp_path


class TestRecipe:
    def load(self, *args):
        parser = train.TrlParser((train.ScriptArguments,))
        return train.load_data(parser.parse_args_and_config([*map(str, args)])[0], seed=0)

    def entry(self, data, name, **options):
        return {"json_file": str(data / f"{name}.json"), "image_folder": str(data / "images"), **options}

    def test_yaml_and_command_line(self, data):
        entries = [self.entry(data, "captions", weight=2), self.entry(data, "instructions")]
        (data / "recipe.yaml").write_text(yaml.safe_dump({"datasets": entries}))
        from_yaml = self.load("--config", data / "recipe.yaml")
        from_line = self.load("--datasets", json.dumps(entries))
        sizes = [len(json.loads((data / f"{name}.json").read_text())) for name in ("captions", "instructions")]
        assert len(from_yaml) == len(from_line) == 2 * sizes[0] + sizes[1]
        assert from_yaml._fingerprint == from_line._fingerprint

    def test_one_file_is_as_before(self, data):
        entry = self.entry(data, "captions")
        alone = self.load("--json_file", entry["json_file"], "--image_folder", entry["image_folder"])
        assert alone.column_names == ["id", "messages", "images"]

    @pytest.mark.parametrize(
        "options, error",
        [
            ({"weight": 0}, "weight of dataset 0 is 0"),
            ({"weigth": 2}, "keys .*'weigth'"),
            ({"image_folder": ...}, "keys .*expected 'json_file' and 'image_folder'"),
        ],
    )
    def test_refused_entries(self, data, options, error):
        entry = {key: value for key, value in self.entry(data, "captions", **options).items() if value is not ...}
        with pytest.raises(ValueError, match=error):
            self.load("--datasets", json.dumps([entry]))

    def test_refused_together(self, data):
        entry = self.entry(data, "captions")
        with pytest.raises(ValueError, match="either `datasets` or `json_file`"):
            self.load("--datasets", json.dumps([entry]), "--json_file", entry["json_file"])
        with pytest.raises(ValueError, match="either `datasets` or `json_file`"):
            self.load()
        for wrong in ("[]", "{}", "no JSON"):
            with pytest.raises(ValueError, match="`datasets` is"):
                self.load("--datasets", wrong)
