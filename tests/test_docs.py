"""The documents name things that exist: files, functions, flags, routes, layers."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from jaxinfer.cli.main import COMMANDS
from jaxinfer.config.fields import settings_of
from jaxinfer.config.schema import ServeConfig, ServerConfig
from jaxinfer.config.validate import MISSING
from jaxinfer.models.registry import FAMILIES
from jaxinfer.server.app import create_app_around
from jaxinfer.server.state import ServerState
from tests.test_layers import LAYERS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], key=lambda path: path.as_posix()
)
BASES = (ROOT, ROOT / "jaxinfer")  # `engine/core.py` may be said for `jaxinfer/engine/core.py`

_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?P<path>[\w.-]+(?:/[\w.-]+)+|[\w-]+\.(?:py|md|toml))(?::(?P<name>[\w.]+))?")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]+)")
_HYPOTHETICAL = re.compile(r"\.\.\.|my[-_]|^[A-Z]+$|^owner/")


def fenced_blocks_removed(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def find(path: str) -> Path | None:
    return next((base / path for base in BASES if (base / path).exists()), None)


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, constants and Class.members that a module defines."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(prefix + node.target.id)
            if isinstance(node, ast.Assign):
                names.update(prefix + t.id for t in node.targets if isinstance(t, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(names)


def looks_like_a_file(path: str) -> bool:
    """`engine/core.py`, `tests/golden`, but not `owner/name` or `text/event-stream`."""
    if _HYPOTHETICAL.search(path) or path.startswith(("/", "~")):
        return False
    top = path.split("/")[0]
    is_ours = top in LAYERS or (ROOT / top).exists()
    return is_ours or path.endswith((".py", ".md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_exist(document: Path):
    text = fenced_blocks_removed(document.read_text(encoding="utf-8"))
    for code in _CODE.findall(text):
        match = _PATH.fullmatch(code)
        if match is None or not looks_like_a_file(match["path"]):
            continue
        path, name = match["path"], match["name"]
        if "docs/add-a-" in str(document) and find(path) is None and name is None:
            continue  # the file that the reader is told to write
        file = find(path)
        assert file is not None, f"{document.name} names {path}, which does not exist"
        if name is not None:
            assert name in names_in(file), f"{document.name}: {path} has no {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def known_flags() -> set[str]:
    """Of the settings, of the commands' own parsers, of the scripts and of the tools they call."""
    flags: set[str] = set()
    for setting in settings_of(ServeConfig).values():
        flags |= {name.replace("_", "-") for name in (setting.name, *setting.aliases)}
    flags |= {f"no-{flag}" for flag in flags}
    for source in (*(ROOT / "jaxinfer/cli").glob("*.py"), *(ROOT / "scripts").iterdir()):
        if source.is_file():
            flags |= set(_FLAG.findall(source.read_text(encoding="utf-8")))
    for source in ("tests/conftest.py", "jaxinfer/config/load.py"):
        flags |= set(_FLAG.findall((ROOT / source).read_text(encoding="utf-8")))
    return flags


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_flags_exist(name: str):
    known = known_flags()
    for flag in _FLAG.findall((ROOT / name).read_text(encoding="utf-8")):
        assert flag in known, f"{name} names --{flag}, which no command takes"


def state_of_the_readme() -> tuple[str, str]:
    """What the README says works (and all else that it says), and what it says is missing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, missing = text.split("What does not work yet:")
    missing, after = missing.split("\n## ", 1)
    return before + after, missing


def test_commands_exist_or_are_said_not_to():
    works, missing = state_of_the_readme()
    shown = re.findall(r"^jaxinfer ([a-z-]+)", works, re.M) + re.findall(
        r"`jaxinfer ([a-z-]+)", works
    )
    assert shown
    for command in shown:
        assert command in COMMANDS, f"README.md says `jaxinfer {command}`"
    row = next(line for line in missing.splitlines() if "no such command" in line)
    absent = {code.removeprefix("jaxinfer ") for code in _CODE.findall(row)}
    assert absent
    assert not absent & COMMANDS.keys(), "README.md says that a command which exists does not"


def test_routes_exist_or_are_said_not_to():
    routes = create_app_around(ServerState(ServerConfig())).router.resources()
    served = {resource.canonical for resource in routes}
    works, missing = state_of_the_readme()
    row = next(line for line in works.splitlines() if line.startswith("| HTTP"))
    for route in re.findall(r"`(/[^`]+)`", row):
        assert route in served, f"README.md says that {route} works"
    row = next(line for line in missing.splitlines() if "no such route" in line)
    for route in re.findall(r"`(/[^`]+)`", row):
        assert route not in served, f"README.md says that {route} is missing, but it exists"


def test_layers_are_those_that_are_checked():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text.split("## Layers")[1].split("## ")[0], re.M)
    shown = {name: int(row) for row, cell in rows for name in re.findall(r"`([a-z_]+)`", cell)}
    packages = {
        path.stem for path in (ROOT / "jaxinfer").iterdir() if path.is_dir() or path.suffix == ".py"
    } - {"__init__", "__pycache__", "py"}
    assert shown == {name: LAYERS[name] for name in packages & LAYERS.keys()}


def test_the_readme_names_what_is_refused():
    """Each vLLM setting that is refused so far stands in the README's table of what is missing."""
    _, missing = state_of_the_readme()
    for setting in MISSING:
        flag = "--" + setting.name.replace("_", "-")
        assert flag in missing, f"README.md does not say that {flag} is refused"


def test_the_readme_names_the_architectures():
    works, _ = state_of_the_readme()
    assert set(re.findall(r"`(\w+ForCausalLM)`", works)) == FAMILIES.keys()
