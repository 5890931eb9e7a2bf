"""The interpreter of another environment: a file that cannot be run is one line, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.errors import BadUsage
from tracer.interpreters import lent


@pytest.mark.parametrize("content", ["not a program\n", "#!/nowhere/python\n"])
def test_a_file_that_the_system_cannot_execute_is_refused(tmp_path: Path, content: str) -> None:
    python = tmp_path / "python"
    python.write_text(content)
    python.chmod(0o755)
    with pytest.raises(BadUsage, match="does not run") as caught, lent(python):
        pass
    assert "\n" not in caught.value.line()
