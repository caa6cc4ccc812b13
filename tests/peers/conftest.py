# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The verdict on a run of both models: a test that passes on LLaVA has to pass on VW-LMM.

What fails or is skipped on LLaVA, too, is reported and does not fail the run.
"""

from collections import Counter, defaultdict

import pytest
import suite  # noqa: F401  (here, so that the download is done before there are workers)


YARDSTICKS = {
    "TestVWLMM": "TestLlava",
    "TestVWLMMWithPseudoImageFeatures": "TestLlava",
    "TestVWLMMOnText": "TestLlavaOnText",
}
outcomes: dict[str, dict[str, str]] = defaultdict(dict)  # class -> test -> how it ended


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")  # marks of Transformers


def pytest_runtest_logreport(report):
    if report.when != "call" and report.passed:
        return
    _, class_name, test = report.nodeid.split("::")
    # Parts of a test and its teardown are reported by themselves, and one failure fails all of it.
    if outcomes[class_name].get(test) != "failed":
        outcomes[class_name][test] = report.outcome


def find_regressions() -> list[str]:
    """The tests that pass on LLaVA and do not pass on VW-LMM, each with how it ended."""
    return [
        f"{ours}::{test} {outcomes[ours].get(test)}"
        for ours, llava in YARDSTICKS.items()
        for test, outcome in outcomes[llava].items()
        if outcome == "passed" and outcomes[ours].get(test) != "passed"
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput") or session.exitstatus not in (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
    ):
        return
    llava_passes = any("passed" in outcomes[llava].values() for llava in YARDSTICKS.values())
    is_good = llava_passes and not find_regressions()
    session.exitstatus = pytest.ExitCode.OK if is_good else pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("VW-LMM beside LLaVA")
    for class_name, results in outcomes.items():
        counts = Counter(results.values())
        terminalreporter.write_line(
            f"{class_name:34}" + "".join(f"{counts[name]:5} {name}" for name in ("passed", "failed", "skipped"))
        )
    for llava in dict.fromkeys(YARDSTICKS.values()):
        for test, outcome in outcomes[llava].items():
            if outcome == "failed":
                terminalreporter.write_line(f"Fails on LLaVA, and may fail on VW-LMM: {llava}::{test}")
    for regression in find_regressions():
        terminalreporter.write_line(f"PASSES ON LLAVA, AND DOES NOT ON VW-LMM: {regression}")
