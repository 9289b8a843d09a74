"""Counts the cases that Hypothesis draws, for `make test-long`."""

from __future__ import annotations

import re

import pytest

PASSING = re.compile(r"(\d+) passing")  # in Hypothesis's statistics of one test; a history of a machine is one case

drawn = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fewest-cases", type=int, help="say how many random cases were drawn; fail for fewer than these")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    global drawn
    drawn += sum(map(int, PASSING.findall(getattr(item, "hypothesis_statistics", ""))))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    fewest = session.config.getoption("fewest_cases", None)
    if fewest is not None and exitstatus == pytest.ExitCode.OK and drawn < fewest:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    fewest = config.getoption("fewest_cases", None)
    if fewest is not None:
        terminalreporter.write_line(f"{drawn:,} random cases drawn, of at least {fewest:,}", bold=True)
