"""What holds for all tests: the `browser` marker, and a last line that says aloud when no browser was there."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "browser: needs Chromium and playwright; skipped, and said so, where they are missing"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report for report in terminalreporter.stats.get("skipped", []) if "browser" in getattr(report, "keywords", {})
    ]
    if skipped:
        reason = skipped[0].longrepr[2] if isinstance(skipped[0].longrepr, tuple) else ""
        terminalreporter.write_line(
            f"BROWSER TESTS DID NOT RUN ({len(skipped)}): {reason.removeprefix('Skipped: ')}", red=True
        )
