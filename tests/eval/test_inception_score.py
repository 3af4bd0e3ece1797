"""eval.metrics.inception_score against closed forms, torch-fidelity and torchmetrics."""

import pytest
import torch
import torch.nn.functional as F
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.inception import InceptionScore

from d2g.core.errors import SettingError
from d2g.core.seeds import generator
from eval.metrics.inception_score import inception_score


def test_the_score_of_confident_and_diverse_logits_is_the_number_of_classes() -> None:
    confident = 1000.0 * F.one_hot(torch.arange(30) % 5, 5)
    assert inception_score(confident, splits=1).mean == pytest.approx(5)
    assert inception_score(confident[torch.arange(30) % 5 == 0], splits=2).mean == pytest.approx(1)
    assert inception_score(torch.zeros(30, 5), splits=3).mean == pytest.approx(1)


def test_rows_sorted_by_class_are_shuffled() -> None:
    ordered = 1000.0 * F.one_hot(torch.arange(400) // 80, 5)
    assert inception_score(ordered, splits=5).mean == pytest.approx(1)
    assert inception_score(ordered, generator(0), splits=5).mean > 4.5


@pytest.mark.parametrize(("count", "splits"), [(200, 10), (203, 10), (50, 1)])
def test_agrees_with_torch_fidelity(count: int, splits: int) -> None:
    logits = 3 * torch.randn(count, 20, generator=generator(count))
    ours = inception_score(logits, splits=splits)
    published = isc_features_to_metric(logits, splits=splits, shuffle=False)
    assert ours.mean == pytest.approx(published["inception_score_mean"], rel=1e-12)
    assert ours.deviation == pytest.approx(published["inception_score_std"], rel=1e-9, abs=1e-12)


def test_agrees_with_torchmetrics() -> None:
    """torchmetrics shuffles with the global generator and divides by splits - 1."""
    logits = 3 * torch.randn(120, 20, generator=generator(1), dtype=torch.float64)
    with pytest.warns(UserWarning, match="save all extracted features"):
        published = InceptionScore(feature=torch.nn.Identity(), splits=6)
    published.update(logits)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, deviation = published.compute()
        torch.manual_seed(0)
        order = torch.randperm(120)
    ours = inception_score(logits[order], splits=6)
    assert ours.mean == pytest.approx(mean.item(), rel=1e-9)
    assert ours.deviation * (6 / 5) ** 0.5 == pytest.approx(deviation.item(), rel=1e-9)


def test_more_splits_than_images_are_refused() -> None:
    with pytest.raises(SettingError, match="of 9 images takes 1 to that many splits, got 10"):
        inception_score(torch.zeros(9, 3))
