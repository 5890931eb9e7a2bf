"""Pages whose commands are run again: real output, nothing else touched, no command that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenarios.transcript import refresh

PAGE = """# A page

```console
$ echo one > file; echo said >&2
old
$ cat file; exit 1
$ seq 9  # 2 lines
1
```

```text
$ echo untouched
```
"""


def test_output_is_put_below_its_command_and_the_rest_stays(tmp_path: Path) -> None:
    fresh = refresh(PAGE, tmp_path)
    assert "$ echo one > file; echo said >&2\nsaid\n$ cat file; exit 1\none\n$ seq 9  # 2 lines\n1\n2\n…\n```" in fresh
    assert "old" not in fresh
    assert fresh.endswith("```text\n$ echo untouched\n```\n")
    assert refresh(fresh, tmp_path) == fresh


def test_a_command_that_fails_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 2"):
        refresh("```console\n$ exit 2\n```\n", tmp_path)


def test_a_block_without_an_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no end"):
        refresh("```console\n$ true\n", tmp_path)
