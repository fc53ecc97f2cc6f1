"""Figures say what they are given: names as they are, and numbers without formulas."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
from matplotlib.text import Text

from imu_fast.study.report.demo_plots import new_figure, save


@pytest.mark.parametrize("last", [3.0, 300.0])
def test_logarithmic_axes_have_numbers_and_names_keep_their_dollars(tmp_path, last):
    figure = new_figure()
    axes = figure.subplots()
    axes.loglog([1, last], [1e-3, 1e2])
    axes.set_title("class $3^2$")
    assert save(figure, tmp_path / "figure.png") == "figure.png"
    labels = [
        label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()
    ]
    assert {"1", "100", "0.1"} <= set(labels), labels
    assert [text.get_text() for text in figure.findobj(Text) if "$" in text.get_text()] == [
        "class $3^2$"
    ]
