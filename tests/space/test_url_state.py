"""Values of the page's sliders and of its URL."""

import pytest
from url_state import slider


@pytest.mark.parametrize("value, taken", [(8, 4), (4, 4), (2, 2), (0, 1)])
def test_slider_clips_value_to_range(value, taken):
    """The page sends the old value until it knows the new maximum."""
    assert slider(1, 4, 2, step=1, label="Layer").preprocess(value) == taken
