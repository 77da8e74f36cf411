"""MODEL_ZOO.md names configurations that exist."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path


def test_numbers_are_those_of_the_configurations(project_root: Path) -> None:
    """Every AP of an IAI in the table is in the head of its yaml, or of the yaml whose habits it changes."""
    text = (project_root / "MODEL_ZOO.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(iai/[\w/]+)\.yaml` \|(.*)\|$", text, flags=re.MULTILINE)
    assert len(rows) == 17
    for name, columns in rows:
        numbers = re.findall(r"\d+\.\d", columns.split("|")[-1])
        file = project_root / "configs" / f"{name.removesuffix('_released')}.yaml"
        head = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert numbers
        assert set(numbers) <= set(re.findall(r"\d+\.\d", head)), name


def test_configurations_exist(project_root: Path) -> None:
    text = (project_root / "MODEL_ZOO.md").read_text(encoding="utf-8")
    patterns = set(
        re.findall(r"`(?:configs/)?((?:coco|minvis|dvis|dvisplus|ctvis|vita|idol|iai|demo)/[^`\s]+\.yaml)`", text)
    )
    assert len(patterns) > 20
    for pattern in patterns:
        choices = [part.split(",") for part in re.findall(r"\{([^}]*)\}", pattern)]
        for chosen in product(*choices):
            name = pattern
            for part in chosen:
                name = re.sub(r"\{[^}]*\}", part, name, count=1)
            assert list((project_root / "configs").glob(name)), f"MODEL_ZOO.md names configs/{name}"
