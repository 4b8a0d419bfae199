"""The figures that compare embeddings and outputs, against formulas in NumPy and worked cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail.int8 import similarity


def _rows(rows: int, columns: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=dice, dtype=torch.float64) + offset


def test_cosines_are_those_of_the_formula() -> None:
    y, r = _rows(7, 5, 1), _rows(7, 5, 2)
    wanted = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(y.numpy(), r.numpy(), strict=True)]
    np.testing.assert_allclose(similarity.cosines(y, r), wanted, rtol=1e-12)
    mean = r.mean(dim=0)
    torch.testing.assert_close(
        similarity.centered_cosines(y, r), similarity.cosines(y - mean, r - mean)
    )


def test_centered_cosines_see_what_a_common_direction_hides() -> None:
    r = _rows(64, 32, offset=100.0)
    y = r + _rows(64, 32, seed=1)  # an error as large as what tells rows apart
    assert similarity.cosines(y, r).mean() > 0.9999
    assert similarity.centered_cosines(y, r).mean() < 0.8


def test_the_mean_that_is_subtracted_is_that_of_the_reference() -> None:
    r = _rows(64, 32)
    assert similarity.centered_cosines(r + 0.5, r).mean() < 0.95
    own = r + 0.5 - (r + 0.5).mean(dim=0)
    assert similarity.cosines(own, r - r.mean(dim=0)).min() > 0.999999


def _neighbors(x: np.ndarray, count: int) -> list[set[int]]:
    """The nearest rows, found row by row."""
    found = []
    for i, row in enumerate(x):
        scores = [
            (-(row @ b) / np.linalg.norm(row) / np.linalg.norm(b), j)
            for j, b in enumerate(x)
            if j != i
        ]
        found.append({j for _, j in sorted(scores)[:count]})
    return found


@pytest.mark.parametrize("count", [1, 4, 10])
def test_neighbors_kept_are_those_of_a_search_row_by_row(count: int) -> None:
    r = _rows(40, 8, offset=2.0)
    y = r + 0.3 * _rows(40, 8, seed=1)
    centered = [(x - r.mean(dim=0)).numpy() for x in (y, r)]
    pairs = zip(*(_neighbors(x, count) for x in centered), strict=True)
    wanted = np.mean([len(a & b) / count for a, b in pairs])
    assert 0.2 < wanted < 1.0
    assert similarity.neighbors_kept(y, r, count) == pytest.approx(wanted)
    assert similarity.neighbors_kept(r, r, count) == 1.0


def test_few_rows_have_fewer_neighbors() -> None:
    assert similarity.neighbors_kept(_rows(3, 4, 1), _rows(3, 4, 2), 10) == 1.0
    assert similarity.neighbors_kept(_rows(1, 4, 1), _rows(1, 4, 2), 1) == 1.0


def test_accuracy_holds_every_figure() -> None:
    r = _rows(200, 16, offset=1.0)
    y = r + 0.02 * _rows(200, 16, seed=1)
    figures = similarity.accuracy(y.float(), r.float())
    plain, centered = similarity.cosines(y, r), similarity.centered_cosines(y, r)
    wanted = {
        "pictures": 200,
        "cosine_mean": plain.mean(),
        "cosine_p1": np.quantile(plain.numpy(), 0.01),
        "cosine_worst": plain.min(),
        "centered_mean": centered.mean(),
        "centered_p1": np.quantile(centered.numpy(), 0.01),
        "centered_worst": centered.min(),
        "top1": similarity.neighbors_kept(y, r, 1),
        "top10": similarity.neighbors_kept(y, r, 10),
        "sqnr": 10 * np.log10(float((r * r).sum() / ((y - r) ** 2).sum())),
    }
    assert figures.to_dict() == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-5)


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((1, 3), (1, 3))])
def test_accuracy_refuses_other_shapes(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"wanted two \(N, D\)"):
        similarity.accuracy(*(torch.ones(shape) for shape in shapes))


def test_the_gain_of_a_layer_is_the_scale_that_is_off() -> None:
    r = _rows(500, 12)
    noise = 1e-3 * _rows(500, 12, seed=1)
    assert similarity.linear_figures(1.03 * r + noise, r).layer_gain == pytest.approx(0.03, 1e-2)
    assert similarity.linear_figures(0.9 * r, r).layer_gain == pytest.approx(0.1)
    assert similarity.linear_figures(r + noise, r).layer_gain < 1e-4


def test_the_gain_of_a_channel_finds_one_row_that_is_doubled() -> None:
    r = _rows(500, 12)
    y = r.clone()
    y[:, 5] *= 2
    assert similarity.linear_figures(y, r).channel_gain == pytest.approx(1.0)


def test_channels_without_variance_have_no_gain() -> None:
    r = _rows(500, 12)
    r[:, 5] = 1e-3 * r[:, 5] + 3.0  # a large constant is no variance
    y = r.clone()
    y[:, 5] *= 2
    assert similarity.linear_figures(y, r).channel_gain < 1e-12
    r[:, 5] *= 100
    y[:, 5] *= 100
    assert similarity.linear_figures(y, r).channel_gain == pytest.approx(1.0)


def test_the_gain_of_a_channel_sees_a_scale_behind_a_large_bias() -> None:
    r = _rows(500, 12)
    y = r.clone()
    y[:, 5] *= 2
    y[:, 5] += 50.0
    r[:, 5] += 50.0
    figures = similarity.linear_figures(y, r)
    assert figures.channel_gain == pytest.approx(1.0)
    y[:, 5] = r[:, 5] - 10.0  # and a bias that is off, though every deviation is right
    assert similarity.linear_figures(y, r).channel_gain == pytest.approx(0.2, rel=0.05)


def test_a_wide_layer_has_smaller_channels() -> None:
    """Of 4,000 channels the mean one has 2.5e-4 of the variance, and a quarter of it counts."""
    r = _rows(300, 4000)
    for share, gain in ((0.3, 1.0), (0.2, 0.0)):
        y = r.clone()
        y[:, 7] *= 2
        y[:, 7] *= share**0.5
        scaled = r.clone()
        scaled[:, 7] *= share**0.5
        assert similarity.linear_figures(y, scaled).channel_gain == pytest.approx(gain)


def test_layers_side_by_side_have_variances_of_their_own() -> None:
    """As queries, whose rows contain the softmax scale, beside values."""
    r = _rows(500, 24)
    r[:, :12] *= 0.005
    y = r.clone()
    y[:, 5] *= 2
    gains = []
    for layers in (1, 2):
        sums = similarity.ChannelSums(24, layers)
        sums.add(y, r)
        gains.append(sums.channel_gain)
    assert gains == [pytest.approx(0.0), pytest.approx(1.0)]


def test_sums_of_parts_are_those_of_the_whole() -> None:
    r = _rows(300, 12, offset=0.5)
    y = (r + 0.01 * _rows(300, 12, seed=1)).half()
    sums = similarity.ChannelSums(12)
    for start, stop in ((0, 7), (7, 200), (200, 300)):
        sums.add(y[start:stop], r[start:stop].float())
    whole = similarity.linear_figures(y.double(), r)
    assert sums.figures.to_dict() == pytest.approx(whole.to_dict(), rel=1e-3)
    error = y.double() - r
    assert whole.sqnr == pytest.approx(10 * np.log10(float((r * r).sum() / (error**2).sum())))


def test_equal_outputs_have_a_finite_sqnr() -> None:
    r = _rows(20, 4)
    figures = similarity.linear_figures(r, r)
    assert figures.to_dict() == {"sqnr": 200.0, "layer_gain": 0.0, "channel_gain": 0.0}


def test_outputs_that_are_not_finite_have_figures_that_are_not() -> None:
    r = _rows(20, 4)
    y = r.clone()
    y[3, 2] = float("nan")
    figures = similarity.linear_figures(y, r)
    assert np.isnan([figures.sqnr, figures.layer_gain, figures.channel_gain]).all()
    assert np.isnan(similarity.accuracy(y, r).centered_mean)
