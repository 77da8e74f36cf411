"""The table of a sweep: mean, standard deviation and number of seeds of each setting, difference to a baseline."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vis.checkpoint import write_text_atomic

#: Metrics that are not in the results of an evaluation -> where the manifest has them.
OTHERS = {
    "train_time": ("iterations", "train_seconds"),
    "iteration_time": ("iterations", "seconds_each"),
    "wall_time": ("seconds",),
    "memory": ("peak_memory_mib",),
}
_UNITS = {
    "train_time": "train time",
    "iteration_time": "s/iteration",
    "wall_time": "wall time",
    "memory": "memory (MiB)",
}
_TIMES = ("train_time", "wall_time")


@dataclass
class Row:
    """One setting: the numbers of its seeds by metric."""

    name: str
    label: str
    expected: int
    published: float | None = None
    numbers: dict[str, list[float]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)

    def add(self, seed: int, manifest: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The results of one run."""
        self.seeds.append(seed)
        for metric, value in measure(manifest, metrics).items():
            self.numbers.setdefault(metric, []).append(value)

    def mean(self, metric: str) -> float | None:
        """Over the seeds that have it."""
        values = self.numbers.get(metric)
        return statistics.fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Of the sample (n - 1); None for one seed."""
        values = self.numbers.get(metric, [])
        return statistics.stdev(values) if len(values) > 1 else None


def measure(manifest: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, float]:
    """The numbers of a finished run. ``AP`` is of the only data set; of several it is ``<data set>/AP`` for each.

    Numbers that could not be measured (-1) are left out.
    """
    found: dict[str, float] = {}
    for metric in metrics:
        if metric in OTHERS:
            value: Any = manifest
            for key in OTHERS[metric]:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, (int, float)):
                found[metric] = float(value)
            continue
        for name, value in _leaves(manifest.get("results") or {}):
            if (name == metric or name.endswith(f"/{metric}")) and value >= 0:
                found[name] = value
    return found


def _leaves(results: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """``name, number`` with the data set before the name where there are several; the task "segm" is left out."""
    found = []
    for key, value in results.items():
        if isinstance(value, Mapping):
            found += _leaves(value, prefix if key == "segm" else f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found.append((f"{prefix}{key}", float(value)))
    return found


def columns(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """The metrics that some row has, in the order asked for."""
    present = dict.fromkeys(name for row in rows for name in row.numbers)
    found: list[str] = []
    for metric in metrics:
        found += [name for name in present if name == metric or name.endswith(f"/{metric}")]
    return list(dict.fromkeys(found))


def as_csv(rows: Sequence[Row], metrics: Sequence[str], baseline: str) -> str:
    """Every number: mean, standard deviation, number of seeds and difference, for each metric."""
    names = columns(rows, metrics)
    base = next(row for row in rows if row.name == baseline)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [f"{name}{suffix}" for name in names for suffix in ("", " std", " n", " delta")]
    writer.writerow(["setting", "label", "seeds", "seeds expected", "published", *parts])
    for row in rows:
        cells: list[Any] = [row.name, row.label, len(row.seeds), row.expected, _blank(row.published)]
        for name in names:
            mean, start = row.mean(name), base.mean(name)
            delta = mean - start if mean is not None and start is not None else None
            cells += [_blank(mean), _blank(row.deviation(name)), len(row.numbers.get(name, [])), _blank(delta)]
        writer.writerow(cells)
    return out.getvalue()


def as_markdown(rows: Sequence[Row], metrics: Sequence[str], baseline: str) -> str:
    """For a README."""
    head, body = _cells(rows, metrics, baseline, "±")
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def as_latex(rows: Sequence[Row], metrics: Sequence[str], baseline: str) -> str:
    """A tabular for a paper, with the rules of booktabs."""
    head, body = _cells(rows, metrics, baseline, "±")
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\toprule", _latex_line(head), "\\midrule"]
    return "\n".join([*lines, *map(_latex_line, body), "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {char: f"\\{char}" for char in "&%$#_{}"}
    special |= {"±": r"$\pm$", "Δ": r"$\Delta$", "−": "$-$", "–": "--"}
    return " & ".join("".join(special.get(char, char) for char in cell) for cell in cells) + r" \\"


def _cells(rows: Sequence[Row], metrics: Sequence[str], baseline: str, sign: str) -> tuple[list[str], list[list[str]]]:
    names = columns(rows, metrics)
    base = next(row for row in rows if row.name == baseline)
    first = names[0] if names else ""
    published = any(row.published is not None for row in rows)
    head = ["setting", "seeds"]
    for name in names:
        head += (
            [_UNITS.get(name, name), f"Δ {name}"] if name == first and first not in OTHERS else [_UNITS.get(name, name)]
        )
    head += ["published"] if published else []
    body = []
    for row in rows:
        count = len(row.seeds)
        line = [row.label, str(count) if count == row.expected else f"{count} of {row.expected}"]
        for name in names:
            mean, deviation, start = row.mean(name), row.deviation(name), base.mean(name)
            spread = f" {sign} {_show(name, deviation)}" if deviation is not None else ""
            line.append("–" if mean is None else _show(name, mean) + spread)
            if name == first and first not in OTHERS:
                same = row is base or mean is None or start is None
                line.append("" if same or mean is None or start is None else f"{mean - start:+.2f}".replace("-", "−"))
        line += ([f"{row.published:.1f}" if row.published is not None else ""]) if published else []
        body.append(line)
    return head, body


def _show(name: str, value: float) -> str:
    if name in _TIMES:
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{hours} h {minutes:02d} min"
            if hours
            else f"{minutes} min {seconds:02d} s"
            if minutes
            else f"{value:.1f} s"
        )
    if name == "memory":
        return f"{value:.0f}"
    return f"{value:.3f}" if name == "iteration_time" else f"{value:.2f}"


def _blank(value: float | None) -> Any:
    return "" if value is None else round(value, 6)


def write_tables(folder: Path, rows: Sequence[Row], metrics: Sequence[str], baseline: str) -> str:
    """Write ``table.csv``, ``table.md`` and ``table.tex`` and return the second."""
    folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(rows, metrics, baseline)
    write_text_atomic(as_csv(rows, metrics, baseline), folder / "table.csv")
    write_text_atomic(text, folder / "table.md")
    write_text_atomic(as_latex(rows, metrics, baseline), folder / "table.tex")
    return text
