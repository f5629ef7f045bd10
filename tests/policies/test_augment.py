from __future__ import annotations

import torch

from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.policies.augment import draw_views
from cache_pipeline.policies.draws import Share

CPU = torch.device("cpu")


def test_all_obs_steps_of_a_window_get_one_view_and_windows_differ() -> None:
    views = draw_views(ViewSpec(), (4, 3), torch.Generator().manual_seed(0), CPU)
    for values in (views.crop, views.color):
        assert values is not None
        windows = values.view(4, 3, -1)
        assert torch.equal(windows, windows[:, :1].expand_as(windows))
        assert len({tuple(row) for row in windows[:, 0].tolist()}) == 4


def test_colours_stay_in_the_ranges_of_the_spec() -> None:
    color = draw_views(ViewSpec(hue=0.0), (1000,), torch.Generator().manual_seed(0), CPU).color
    assert color is not None
    assert float(color[:, :3].min()) >= 0.7
    assert float(color[:, :3].max()) <= 1.3
    assert color[:, 3].abs().max() == 0


def test_a_share_of_a_batch_gets_the_views_of_its_windows() -> None:
    whole = draw_views(ViewSpec(), (6, 2), torch.Generator().manual_seed(0), CPU)
    share = draw_views(ViewSpec(), (2, 2), Share(torch.Generator().manual_seed(0), 2, 4, 6), CPU)
    assert torch.equal(share.crop, whole.crop[4:8])
