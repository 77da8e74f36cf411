"""The benchmark of the evaluation: both ways agree, on a case of a few videos."""

from __future__ import annotations

from vis.engine.benchmarks import Settings, evaluation


def test_both_evaluations_agree() -> None:
    settings = Settings(frames=(5,), output_size=(90, 160), threads=2)
    result = evaluation.measure_evaluation(settings, videos=4, run=evaluation.main)
    assert result["largest_difference"] <= 1e-12
    assert 0.1 < result["vis"]["stats"][0] < 0.9
    assert result["predictions"] == 4 * evaluation.PREDICTIONS
    assert 0 < result["masks"] <= 5 * result["predictions"]
    text = "\n".join(evaluation.lines(result))
    assert "4 videos, 200 predictions" in text
    assert "faster" in text
