"""Random subsets of labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vitp.probing.few_labels import FewLabels


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 5))
@settings(deadline=None)
def test_shots_and_shares_cover_each_class(labels, shots, seed):
    labels = np.array(labels)
    names = [f"class {label}" for label in range(4)]
    presence = np.eye(4, dtype=bool)[labels]
    counts = np.bincount(labels, minlength=4)
    if counts.min() < shots:
        with pytest.raises(ValueError, match=rf"'class {counts.argmin()}' \({counts.min()}\)"):
            FewLabels(shots=shots).draw(presence, seed, names)
    else:
        chosen = FewLabels(shots=shots).draw(presence, seed, names)
        assert np.bincount(labels[chosen]).tolist() == [shots] * 4
        if counts.min() > shots:
            assert set(chosen) < set(FewLabels(shots=shots + 1).draw(presence, seed, names))
    chosen = FewLabels(share=0.3).draw(presence, seed, names)
    assert len(set(chosen)) == len(chosen)
    expected = [0 if not count else max(int(0.3 * count + 0.5), 1) for count in counts]
    assert np.bincount(labels[chosen], minlength=4).tolist() == expected
    assert FewLabels(share=1.0).draw(presence, seed, names).tolist() == list(range(len(labels)))


def test_shots_of_multi_label_images():
    rng = np.random.default_rng(0)
    presence = rng.random((40, 3)) < [0.9, 0.5, 0.2]
    chosen = FewLabels(shots=3).draw(presence, 0, list("abc"))
    assert (presence[chosen].sum(0) >= 3).all() and len(chosen) <= 9
    # No image is superfluous: without its last image in the drawn order, a class has too few.
    assert presence[chosen].sum(0).min() == 3
    assert len(FewLabels(share=0.25).draw(presence, 0, list("abc"))) == 10
    draws = {tuple(FewLabels(shots=3).draw(presence, seed, list("abc"))) for seed in range(5)}
    assert len(draws) > 1


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.99])
def test_images_without_class_are_drawn_equally(share):
    labels = np.repeat([0, 1, 2], [20, 10, 40])
    presence = np.eye(3, dtype=bool)[labels][:, :2]
    chosen = FewLabels(share=share).draw(presence, 0, ["a", "b"])
    assert np.bincount(labels[chosen], minlength=3).tolist() == [max(int(share * n + 0.5), 1) for n in (20, 10, 40)]
    assert (np.bincount(labels[FewLabels(shots=3).draw(presence, 0, ["a", "b"])], minlength=3) == [3, 3, 0]).all()
