"""What the GPU paths give and how fast they are, on the GPU of this machine; within a time budget.

    scripts/gpu_check [--json FILE] [--budget-s 460] [--only SECTION ...]
    scripts/gpu_check --platform cpu       # a rehearsal without a GPU: every section, tiny sizes

Every section runs in a child process with a time limit of its own and reports row by row: one that
hangs, faults or is late costs only what it had not said yet, and the rest goes on. A case for which
there is no time is skipped, with a word. Without a GPU nothing is measured, and the exit code is 0.

How it is timed: kernels as a loop of several calls inside one program, each fed by the one before,
the fastest of several runs; engine steps as the wall time of many. Bandwidth and matrix rate, which
the shares refer to, are measured by the first section on the same device.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_sections.parent import Limits, SectionResult, run_section, run_together
from gpu_sections.plan import SECTIONS, Section
from gpu_sections.tables import table_of

ROOT = Path(__file__).parent.parent
NO_GPU = "nothing was measured, nothing is claimed."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file (default: docs/results/gpu_DEVICE.json)")
    parser.add_argument("--budget-s", type=float, default=460.0, help="of everything together")
    names = ", ".join(section.name for section in SECTIONS[1:])
    parser.add_argument(
        "--only", nargs="+", metavar="SECTION", default=[""],
        help=f"leave the others out; beginnings of: {names}",
    )  # fmt: skip
    parser.add_argument(
        "--platform", choices=["gpu", "cpu"], default="gpu", help="cpu: a rehearsal, tiny sizes"
    )
    return parser


def main() -> int:
    """0 unless a section that ran failed."""
    args = _parser().parse_args()
    start_s = time.monotonic()
    limits = Limits(end_s=start_s + args.budget_s, start_s=start_s)
    options: dict[str, Any] = {"platform": args.platform}
    device, *rest = SECTIONS
    facts = run_section(device, options, limits)
    found = next((row for row in facts.rows if row.get("name") == "device"), None)
    if args.platform == "gpu" and (found is None or found["platform"] != "gpu"):
        what = f"JAX found {found['kind']}" if found else f"JAX did not start: {facts.error}"
        print(f"No GPU to be used is here ({what}): {NO_GPU}")
        return 0
    assert found is not None, facts.error
    options |= {row["name"]: row["value"] for row in facts.rows if "value" in row}
    results = [facts]
    for group in _groups([s for s in rest if s.name.startswith(tuple(args.only))]):
        results += run_together(group, options, limits)
    document = _document(found, args, results, time.monotonic() - start_s)
    path = args.json or ROOT / "docs" / "results" / f"gpu_{_slug(found['kind'])}.json"
    if args.platform == "gpu" or args.json is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")
    print(table_of(document))
    return 1 if any(result.error for result in results) else 0


def _groups(sections: list[Section]) -> list[list[Section]]:
    """Sections that time nothing run side by side: starting and compiling is what takes long."""
    groups: list[list[Section]] = []
    for section in sections:
        if section.is_timed or not groups or groups[-1][-1].is_timed:
            groups.append([])
        groups[-1].append(section)
    return groups


def _document(
    device: dict[str, Any], args: argparse.Namespace, results: list[SectionResult], total_s: float
) -> dict[str, Any]:
    return {
        "device": {key: value for key, value in device.items() if key != "name"},
        "is_rehearsal": args.platform == "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "cpu_cores": os.cpu_count(),
        "budget_s": args.budget_s,
        "total_s": round(total_s, 1),
        "sections": [
            {
                "name": result.name,
                "seconds": round(result.seconds, 1),
                "error": result.error,
                "rows": result.rows,
            }
            for result in results
        ],
    }


def _slug(kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_").removeprefix("nvidia_")


if __name__ == "__main__":
    sys.exit(main())
