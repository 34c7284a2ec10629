"""The document of a run as tables in Markdown. Knows rows; measures nothing."""

from collections.abc import Iterable, Sequence
from typing import Any

_POINT = ("batch", "context", "chunk", "head_dim", "page_size")


def table_of(document: dict[str, Any]) -> str:
    """Everything that was found, and what was not and why."""
    device = document["device"]
    lines = [
        f"{device['kind']}, JAX {device['jax']}, Python {document['python']}, {document['date']}, "
        f"{document['total_s']:.0f} s of {document['budget_s']:.0f} s",
    ]
    if document["is_rehearsal"]:
        lines.append("A REHEARSAL on a CPU: none of these figures means anything.")
    rates = {row["name"]: row["value"] for row in _rows(document, "device") if "value" in row}
    if "matmul_flops_per_s" in rates:
        lines.append(
            f"Copies {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s (read + written), matrix products "
            f"{rates['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s (bfloat16)."
        )
    lines += ["", *_section_table(document)]
    numerics = [
        {"what": section["name"].removeprefix("numerics "), **row}
        for section in document["sections"]
        if section["name"].startswith("numerics ")
        for row in section["rows"]
    ]
    for title, rows in (
        ("Largest error against the reference", numerics),
        ("Attention, microseconds and the share of measured copies or products",
         _by_point(_rows(document, "attention "))),
        ("Engine", _rows(document, "engine")),
    ):  # fmt: skip
        for part in _alike(rows):
            lines += ["", f"{title}:", "", *_markdown(part)]
    return "\n".join(lines)


def _rows(document: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    return [row for s in document["sections"] if s["name"].startswith(prefix) for row in s["rows"]]


def _section_table(document: dict[str, Any]) -> list[str]:
    return _markdown(
        [
            {"section": s["name"], "s": s["seconds"], "rows": len(s["rows"]), "error": s["error"]}
            for s in document["sections"]
        ]
    )


def _by_point(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a point, a column an implementation."""
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in _POINT)
        line = points.setdefault(key, dict(zip(_POINT, key, strict=True)))
        line[row["backend"]] = _attention_cell(row)
    return list(points.values())


def _attention_cell(row: dict[str, Any]) -> str:
    if "us" not in row:
        return "failed" if "error" in row else "-"
    share = row.get("share_of_copy", row.get("share_of_matmul"))
    return f"{row['us']:.1f} ({share:.0%})"


def _alike(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that have the same columns, together; those that only say why there is nothing, last."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        columns = tuple(row) if "what" in row and "skipped" not in row else ()
        groups.setdefault(columns, []).append(row)
    return list(groups.values())


def _markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [_line(columns), _line(["---"] * len(columns))]
    return [*lines, *(_line(_cell(row.get(column)) for column in columns) for row in rows)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")
