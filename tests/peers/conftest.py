# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The verdict on a run of both models: a test that passes on LLaVA has to pass on VW-LMM.

What fails or is skipped on LLaVA, too, is reported and does not fail the run.
"""

from collections import Counter

import pytest
import suite


outcomes: dict[str, dict[str, str]] = {"Llava": {}, "VWLMM": {}}  # model -> test -> how it ended


def pytest_configure(config):
    # Before the workers start, so that one process downloads.
    suite.download()
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")  # marks of Transformers


def pytest_runtest_logreport(report):
    if report.when != "call" and report.passed:
        return
    _, class_name, test = report.nodeid.split("::")
    model = "Llava" if class_name.startswith("TestLlava") else "VWLMM"
    test = f"{class_name.removeprefix(f'Test{model}')}::{test}"
    # Parts of a test and its teardown are reported by themselves, and one failure fails all of it.
    if outcomes[model].get(test) != "failed":
        outcomes[model][test] = report.outcome


def find_regressions() -> list[str]:
    """The tests that pass on LLaVA and do not pass on VW-LMM."""
    return [
        test
        for test, outcome in outcomes["Llava"].items()
        if outcome == "passed" and outcomes["VWLMM"].get(test) != "passed"
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput") or session.exitstatus not in (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
    ):
        return
    is_good = "passed" in outcomes["Llava"].values() and not find_regressions()
    session.exitstatus = pytest.ExitCode.OK if is_good else pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("VW-LMM beside LLaVA")
    for model, results in outcomes.items():
        counts = Counter(results.values())
        terminalreporter.write_line(
            f"{model:8}" + "".join(f"{counts[outcome]:6} {outcome}" for outcome in ("passed", "failed", "skipped"))
        )
    for test, outcome in sorted(outcomes["Llava"].items()):
        if outcome == "failed":
            terminalreporter.write_line(f"fails on LLaVA: {test}, on VW-LMM: {outcomes['VWLMM'].get(test)}")
    for test in sorted(find_regressions()):
        terminalreporter.write_line(f"PASSES ON LLAVA ALONE: {test}, on VW-LMM: {outcomes['VWLMM'].get(test)}")
