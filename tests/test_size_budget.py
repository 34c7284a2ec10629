"""Files stay small enough to be read in one go. (Functions: ruff's PLR0915 and C90.)"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "jaxinfer").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path):
    text = path.read_text(encoding="utf-8")
    num_lines = len(text.splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{path} has {num_lines} lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            where = f"{path}:{node.lineno}: {node.name}"
            assert length <= MAX_FUNCTION_LINES, f"{where} has {length} lines"
