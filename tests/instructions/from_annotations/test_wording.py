"""Words of questions and answers."""

import pytest

from modeling_vitp.instructions.from_annotations.questions import plural


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("tree", "trees"),
        ("storage tank", "storage tanks"),
        ("bus", "buses"),
        ("bridge", "bridges"),
        ("factory", "factories"),
        ("railway", "railways"),
        ("fish", "fish"),
        ("series", "series"),
    ],
)
def test_plurals(one, several):
    assert plural(one) == several
