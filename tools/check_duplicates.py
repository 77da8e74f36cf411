"""Fails if a block of ten lines stands twice in the project.

    python tools/check_duplicates.py [--lines 10] [FOLDER ...]     # default: vis tools tests

Lines are compared without indentation. Blank lines, comments, imports and lines of nothing but punctuation
do not count, so ten lines are ten lines that say something.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

ENDINGS = {".py", ".cpp", ".cu", ".cuh", ".h"}
FOLDERS = ("vis", "tools", "tests")

Line = tuple[int, str]  # number in the file, normalised text
Place = tuple[Path, int, int]  # file, first and last line


def _python_imports(text: str) -> set[int]:
    """Numbers of the lines that import statements take, their continuation lines included."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def significant_lines(path: Path) -> list[Line]:
    """The lines of a file that count."""
    text = path.read_text(encoding="utf-8")
    is_python = path.suffix == ".py"
    passed_over = _python_imports(text) if is_python else set()
    comment = "#" if is_python else ("//", "/*", "*", "#include")
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = " ".join(line.split())
        if number in passed_over or stripped.startswith(comment) or not re.search(r"\w", stripped):
            continue
        lines.append((number, stripped))
    return lines


def find_duplicates(paths: list[Path], size: int) -> list[tuple[Place, Place]]:
    """Pairs of places that share at least ``size`` lines, each pair as long as it gets, in reading order."""
    files = [significant_lines(path) for path in paths]
    seen: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, lines in enumerate(files):
        for start in range(len(lines) - size + 1):
            seen[tuple(text for _, text in lines[start : start + size])].append((number, start))
    pairs: set[tuple[int, int, int, int]] = set()
    for places in seen.values():
        for index, (file_a, a) in enumerate(places):
            for file_b, b in places[index + 1 :]:
                if file_a != file_b or b - a >= size:  # a run of equal lines does not duplicate itself
                    pairs.add((file_a, a, file_b, b))
    found = []
    for file_a, a, file_b, b in sorted(pairs):
        if (file_a, a - 1, file_b, b - 1) in pairs:
            continue  # inside a longer one
        length = size
        while (file_a, a + length - size + 1, file_b, b + length - size + 1) in pairs:
            length += 1
        first, second = files[file_a][a : a + length], files[file_b][b : b + length]
        found.append(((paths[file_a], first[0][0], first[-1][0]), (paths[file_b], second[0][0], second[-1][0])))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help=f"default: {' '.join(FOLDERS)}")
    parser.add_argument("--lines", type=int, default=10, help="how many equal lines are too many")
    arguments = parser.parse_args(argv)
    folders = arguments.folders or [Path(name) for name in FOLDERS if Path(name).is_dir()]
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in ENDINGS)
    if not paths:
        parser.error(f"no source files in {', '.join(map(str, folders)) or 'the present folder'}")
    found = find_duplicates(paths, arguments.lines)
    for (file_a, a, end_a), (file_b, b, end_b) in found:
        print(f"{file_a}:{a}-{end_a} stands again at {file_b}:{b}-{end_b}")
    print(f"{len(paths)} files, {len(found)} blocks of {arguments.lines} lines or more stand twice")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
