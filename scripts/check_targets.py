"""Compiles kernels and engine steps for TPUs and GPUs that are not here, and checks the programs.

    scripts/check_targets                                  the whole grid: hours
    scripts/check_targets --fast                           what every change must pass
    scripts/check_targets --model Llama-3.1-8B --topology v6e:2x4 [--step decode] [--tensor 8]
    scripts/check_targets --kernels --topology v6e:1x1     attention alone, and JAX's own beside it
    ... --update                                           writes docs/results/targets.json

Each program must fit its machine, change the cache in place, hold few temporaries and arguments,
move no more than 1.1 times what it must, and talk to other devices two times a layer. Then it is
compared with docs/results/targets.json, which states how much worse a figure may be. `moved` are
the bytes that planner/traffic.py counts, without the pages, `L2` those that a GPU reads from its
cache instead; `ideal` is target_checks/steps.py's.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxinfer.planner.launch import COMPILER_ENVIRONMENT  # noqa: E402

os.environ.update(COMPILER_ENVIRONMENT)  # before JAX is imported

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from concurrent.futures.process import BrokenProcessPool  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from multiprocessing import get_context  # noqa: E402
from typing import Any  # noqa: E402

from target_checks.cases import (  # noqa: E402
    FAST,
    KERNEL_TOPOLOGIES,
    MODELS,
    STEPS,
    kernel_cases,
    step_cases,
)
from target_checks.kernels import check_jax_kernel, check_kernel  # noqa: E402
from target_checks.rows import (  # noqa: E402
    STEP_HEADER,
    TOLERANCES,
    Row,
    from_stored,
    regressions,
    show,
)
from target_checks.steps import check_step  # noqa: E402

from jaxinfer.errors import UserError  # noqa: E402

LEDGER = Path(__file__).parents[1] / "docs" / "results" / "targets.json"
Check = Callable[[], Row]


def main() -> int:
    args = _parse()
    if args.table:
        rows = _read_ledger()["rows"]
        print(STEP_HEADER, *(show(from_stored(name, rows[name])) for name in rows), sep="\n")
        return 0
    checks = _checks(args)
    if not checks:
        print("No case of the grid has all that was named.", file=sys.stderr)
        return 2
    ledger = _read_ledger()
    print(STEP_HEADER)
    bad = 0
    try:
        # Processes: libtpu has crashed while it compiled two programs in one.
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            for row in pool.map(_call, checks):
                row = _judged(row, ledger, update=args.update)
                bad += bool(row.problems)
                print(show(row), flush=True)
                if args.explain:
                    print(*(f"    {line}" for line in row.largest), sep="\n", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a compiler's process ended; its log above says why.", file=sys.stderr)
        return 1
    print(f"{len(checks)} programs, {bad} with problems", file=sys.stderr)
    return 1 if bad else 0


def _call(check: Check) -> Row:
    return check()


def _judged(row: Row, ledger: dict[str, Any], *, update: bool) -> Row:
    """The row with its regressions; `update` stores it instead, if it has no other problem."""
    if not update:
        return replace(row, problems=(*row.problems, *regressions(row, ledger)))
    if not row.problems:
        ledger = _read_ledger()  # again: slices of the grid may run side by side
        rows = {**ledger["rows"], row.name: {**row.stored(), "compiler": _compiler(row.name)}}
        ledger["rows"] = dict(sorted(rows.items()))
        LEDGER.write_text(json.dumps(ledger, indent=1) + "\n")
    return row


def _read_ledger() -> dict[str, Any]:
    ledger = json.loads(LEDGER.read_text()) if LEDGER.exists() else {"rows": {}}
    return {**ledger, "tolerances": TOLERANCES}


def _compiler(name: str) -> str:
    """What made the program."""
    packages = ("libtpu",) if ":" in name.split(" | ")[0] else ("jax-cuda12-plugin",)
    found = []
    for package in ("jax", "jaxlib", *packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} ?")
    return ", ".join(found)


def _checks(args: argparse.Namespace) -> list[Check]:
    if args.fast:
        return [partial(check_step, case) for case in FAST]
    if args.kernels:
        checks: list[Check] = []
        for topology in args.topology or KERNEL_TOPOLOGIES:
            checks += [partial(check_kernel, topology, case) for case in kernel_cases()]
            checks.append(partial(check_jax_kernel, topology))
        return checks
    cases = step_cases(
        models=args.model, topologies=args.topology, steps=args.step, tensors=args.tensor
    )
    return [partial(check_step, case) for case in cases]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/check_targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fast", action="store_true", help="a few programs only")
    parser.add_argument("--kernels", action="store_true", help="attention alone")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[])
    parser.add_argument("--topology", nargs="+", default=[], help="like v6e:2x4, h100")
    parser.add_argument("--step", nargs="+", choices=STEPS, default=[])
    parser.add_argument("--tensor", nargs="+", type=int, default=[])
    parser.add_argument("--jobs", type=int, default=1, help="programs compiled side by side")
    parser.add_argument("--update", action="store_true", help="store what is found to be good")
    parser.add_argument("--table", action="store_true", help="what is stored; compiles nothing")
    parser.add_argument("--explain", action="store_true", help="what moves most, by operation")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
