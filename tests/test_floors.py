"""The three floors: imports go down only.

Oracle: import-linter, which reads the imports itself.
"""

import subprocess
import sys
from pathlib import Path


def test_imports_go_down_only(project_root: Path) -> None:
    """import-linter's contracts in pyproject.toml hold."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=project_root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
