"""Several configurations timed in turn."""

from __future__ import annotations

from pathlib import Path

from vis.engine.benchmarks import Settings, beside


def test_each_configuration_has_its_figures_and_parts(project_root: Path) -> None:
    first, second = (
        str(project_root / f"configs/demo/{name}.yaml") for name in ("minvis_synthetic", "dvis_online_synthetic")
    )
    settings = Settings(
        config_file=first,
        beside=(second,),
        input_size=(64, 96),
        output_size=(90, 130),
        frames=(2,),
        warmup=0,
        repeats=1,
    )
    result = beside.measure_beside(settings)
    assert list(result["models"]) == [first, second]
    for figures in result["models"].values():
        total, parts = figures["seconds_per_frame"], figures["parts"]
        assert set(parts) == {"network", "tracker"}
        assert 0 < sum(parts.values()) < total["median"]
    lines = beside.lines(result)
    assert "video of 2 frames" in lines[0]
    assert lines[1].startswith("configs/demo/minvis_synthetic.yaml: ")
    assert "times the first" in lines[-1]
