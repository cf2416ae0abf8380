"""What the page's sliders take, and what its URL restores."""

import pytest
from url_state import slider


@pytest.mark.parametrize("value, taken", [(8, 4), (4, 4), (2, 2), (0, 1)])
def test_a_slider_that_has_been_made_shorter_takes_its_end(value, taken):
    """The page sends where it stood until it knows."""
    assert slider(1, 4, 2, step=1, label="Layer").preprocess(value) == taken
