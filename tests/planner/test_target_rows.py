"""scripts/check_targets: what is worse than docs/results/targets.json, and what that holds."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    yield
    for name in [name for name in sys.modules if name.startswith("target_checks")]:
        del sys.modules[name]


def row():
    from target_checks.rows import Row

    return Row(
        name="v6e:2x2 | Llama-3.2-1B TP=4 | decode",
        num_args=30,
        argument_mib=400.0,
        alias_mib=300.0,
        temp_mib=50.0,
        code_mib=10.0,
        moved_mib=200.0,
        ideal_mib=210.0,
        always={"all-reduce": 5},
        in_branches={"all-gather": 2},
        trace_s=1.0,
        compile_s=20.0,
    )


def worse(**changes: object) -> list[str]:
    """What is said of a row that differs from the stored one in this."""
    from target_checks.rows import TOLERANCES, regressions

    first = row()
    ledger = {"tolerances": TOLERANCES, "rows": {first.name: first.stored()}}
    return regressions(replace(first, **changes), json.loads(json.dumps(ledger)))


def test_the_same_is_no_regression_however_long_it_took() -> None:
    assert worse() == []
    assert worse(compile_s=900.0, trace_s=90.0, temp_mib=55.0, moved_mib=203.0) == []
    assert worse(temp_mib=1.0, moved_mib=100.0) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temp_mib": 57.0}, "temp_mib was 50.0, is 57.0"),
        ({"moved_mib": 210.0}, "moved_mib was 200.0, is 210.0"),
        ({"code_mib": 15.0}, "code_mib"),
        ({"argument_mib": 406.0}, "argument_mib"),
        ({"num_args": 31}, "num_args was 30, is 31"),
        ({"always": {"all-gather": 1, "all-reduce": 5}}, "always was"),
        ({"in_branches": {}}, "in_branches was"),
        ({"name": "v6e:2x2 | another | decode"}, "--update"),
    ],
)
def test_a_worse_figure_is_named_with_the_one_before(changes: dict, words: str) -> None:
    (problem,) = worse(**changes)
    assert words in problem


def test_the_ledger_has_what_the_fast_check_compiles_and_the_tolerances_it_states() -> None:
    from target_checks.cases import FAST, MODELS, step_cases
    from target_checks.rows import TOLERANCES, Row

    ledger = json.loads((REPOSITORY / "docs" / "results" / "targets.json").read_text())
    assert ledger["tolerances"] == TOLERANCES
    assert {case.name for case in FAST} <= ledger["rows"].keys()
    fields = set(Row.__dataclass_fields__)
    for stored in ledger["rows"].values():
        assert set(stored) - {"compiler"} <= fields
        assert stored["compiler"]
    every = list(step_cases(models=[], topologies=[], steps=[], tensors=[]))
    assert len({case.name for case in every}) == len(every)
    assert {case.config_json["vocab_size"] > 0 for case in every} == {True}
    assert {case.model for case in every} == set(MODELS)
