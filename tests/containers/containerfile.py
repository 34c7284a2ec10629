"""Reads Containerfiles: instructions by stage. Knows their syntax as far as ours use it."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
CONTAINERFILES = tuple(sorted(ROOT.glob("Containerfile.*")))


class Instruction(NamedTuple):
    name: str
    value: str

    def words(self) -> list[str]:
        """Of the exec form: a JSON list. Raises ValueError for the shell form."""
        return json.loads(self.value)


class Stage(NamedTuple):
    """What comes after a FROM; the instructions before the first one are a stage of their own."""

    base: str
    instructions: tuple[Instruction, ...]

    def all(self, name: str) -> list[str]:
        return [each.value for each in self.instructions if each.name == name]

    def one(self, name: str) -> Instruction:
        (only,) = (each for each in self.instructions if each.name == name)
        return only

    def pairs(self, name: str) -> dict[str, str]:
        """key=value of ENV or LABEL."""
        words = (word for value in self.all(name) for word in shlex.split(value))
        return dict(word.split("=", 1) for word in words)

    def environment(self) -> dict[str, str]:
        return self.pairs("ENV")


def instructions(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def stages(path: Path) -> list[Stage]:
    found = [("", [])]
    for instruction in instructions(path):
        if instruction.name == "FROM":
            found.append((instruction.value, []))
        else:
            found[-1][1].append(instruction)
    return [Stage(base, tuple(contents)) for base, contents in found]


def last_stage(path: Path) -> Stage:
    return stages(path)[-1]
