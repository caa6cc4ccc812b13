# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What reading LLaVA's data costs, how the file is cut into records, and what the data are known by."""

import gc
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from processing_vwlmm import llava_dataset, load_llava_dataset


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from reading import read, write_records


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(llava_dataset, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_memory_does_not_grow_with_the_records(tmp_path):
    """No record stays in memory: what grows is the cached table, which is mapped, and is counted once touched."""
    peaks = []
    for num_records in (1000, 20_000):
        files = write_records(tmp_path / str(num_records), num_records)
        samples, *_, peak = read(*files, tmp_path / "cache")
        assert samples == num_records
        peaks.append(peak)
    assert (peaks[1] - peaks[0]) / 19_000 < 2500


class TestCollector:
    @pytest.mark.parametrize("enabled", [True, False])
    @pytest.mark.parametrize("is_malformed", [False, True])
    def test_is_as_it_was(self, tmp_path, monkeypatch, enabled, is_malformed):
        seen = []
        read = llava_dataset.read_record
        monkeypatch.setattr(llava_dataset, "read_record", lambda *args: seen.append(gc.isenabled()) or read(*args))
        json_file, images = write_records(tmp_path / "data", 3)
        if is_malformed:
            json_file.write_text("[1]")
        (gc.enable if enabled else gc.disable)()
        try:
            if is_malformed:
                with pytest.raises(ValueError, match="record 0"):
                    load_llava_dataset(json_file, images)
            else:
                load_llava_dataset(json_file, images)
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
        assert seen and not any(seen)


LISTS = [
    [{"a": 'x\\"]},{', "b": [1, {"c": []}]}, 12, -1.5e-7, True, None, "é\u2028𝄞", 12345678901234567890],
    [{"long": "y" * 300}, "z" * 100],
    [1],
]


class TestRecords:
    @pytest.mark.parametrize("block_size", [1, 2, 7, 64])
    @pytest.mark.parametrize("indent", [None, 2])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_are_those_of_the_parser(self, tmp_path, monkeypatch, block_size, indent, encoding):
        monkeypatch.setattr(llava_dataset, "BLOCK_SIZE", block_size)
        for values in LISTS:
            file = tmp_path / "values.json"
            file.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding=encoding)
            assert list(llava_dataset.read_records(file)) == values

    @pytest.mark.parametrize("block_size", [1, 64])
    @pytest.mark.parametrize(
        "text",
        ["", " ", "[", "[1", "[1,", "[1,]", "[,]", "[1 2]", '["a', "[tru]", "[1] 2", "[1]]", '[{"a" 1}]', "[1.]"],
    )
    def test_of_no_json(self, tmp_path, monkeypatch, block_size, text):
        monkeypatch.setattr(llava_dataset, "BLOCK_SIZE", block_size)
        file = tmp_path / "values.json"
        file.write_text(text)
        with pytest.raises(ValueError, match="is not valid JSON"):
            list(llava_dataset.read_records(file))

    def test_fault_is_found_where_it_is(self):
        """And not after the rest of a file of a gigabyte has been read."""
        file = io.StringIO('[{"a": 1},\n {"a" 2},' + " " * 10_000_000 + "]")
        with pytest.raises(ValueError, match="char 17"):
            list(llava_dataset._read_list(file))
        assert file.tell() <= 2 * llava_dataset.BLOCK_SIZE


class TestFingerprint:
    def load(self, folder, **options):
        return load_llava_dataset(folder / "records.json", folder / "images", **options)

    def test_is_the_same_elsewhere(self, tmp_path):
        write_records(tmp_path / "here", 20)
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        for image in (tmp_path / "there" / "images").iterdir():
            os.utime(image, (1, 1))
        assert self.load(tmp_path / "here")._fingerprint == self.load(tmp_path / "there")._fingerprint

    @pytest.mark.parametrize("change", ["record", "image"])
    def test_is_another_of_other_data(self, tmp_path, change):
        write_records(tmp_path, 20)
        before = self.load(tmp_path)._fingerprint
        if change == "record":
            text = (tmp_path / "records.json").read_text()
            (tmp_path / "records.json").write_text(text.replace("circle", "square", 1))
        else:
            with open(tmp_path / "images" / "000000000000.jpg", "ab") as file:
                file.write(b"more")
        assert self.load(tmp_path)._fingerprint != before

    def test_of_what_was_left_out(self, tmp_path):
        write_records(tmp_path, 20)
        before = self.load(tmp_path, on_bad_image="skip")._fingerprint
        (tmp_path / "images" / "000000000000.jpg").unlink()
        with pytest.warns(UserWarning, match="left out"):
            assert self.load(tmp_path, on_bad_image="skip")._fingerprint != before
