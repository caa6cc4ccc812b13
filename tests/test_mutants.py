# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""That `make mutants` still changes the code that it names, which moves on without it."""

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_edit_fits(mutant):
    assert (ROOT / "modeling_vwlmm" / mutant.file).read_text().count(mutant.old) == 1
    files = mutant.tests.partition("::")[0].split()
    assert files and all((ROOT / "tests" / file).exists() for file in files)
