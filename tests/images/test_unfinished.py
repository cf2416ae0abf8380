"""What survives a kill."""

import numpy as np
import pytest
import torch

from modeling_vitp.images.large import LineFile, RowFile, appears_whole, part_path, weights_digest


def test_lines_and_rows_that_were_cut_short_are_taken_off(tmp_path):
    with LineFile(tmp_path / "lines", {"of": 1}) as lines:
        lines.append([{"a": 1}, "ü"])
        lines.append([])
    with RowFile(tmp_path / "rows", (2, 3), {"of": 1}) as rows:
        rows.append(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    for name in ("lines", "rows"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'[{"a"')
    with LineFile(tmp_path / "lines", {"of": 1}) as lines, RowFile(tmp_path / "rows", (2, 3), {"of": 1}) as rows:
        assert len(lines) == len(rows) == 2
        lines.append({"b": 0.1})
        rows.append(np.full((1, 2, 3), 7, dtype=np.uint8))
        assert list(lines) == list(lines) == [[{"a": 1}, "ü"], [], {"b": 0.1}]
        assert [top for top, _ in rows.read(2)] == [0, 2]
        np.testing.assert_array_equal(
            np.concatenate([part for _, part in rows.read(2)]).ravel(), [*range(12), *[7] * 6]
        )
        lines.delete()
        rows.delete()
    assert list(tmp_path.iterdir()) == []


def test_what_was_begun_with_something_else_is_refused(tmp_path):
    with LineFile(tmp_path / "lines", {"of": [1, 2], "by": (3,)}):
        pass
    with LineFile(tmp_path / "lines", {"of": [1, 2], "by": [3]}):
        pass
    with pytest.raises(ValueError, match="lines was begun with other by: go on with the same, or delete it"):
        LineFile(tmp_path / "lines", {"of": [1, 2], "by": [4]}).__enter__()


def test_a_file_that_fails_does_not_appear(tmp_path):
    path = tmp_path / "result"
    with pytest.raises(ZeroDivisionError), appears_whole(path) as unfinished:
        unfinished.write_text(str(1 / 0))
    assert not path.exists()
    assert part_path([path]) == tmp_path / "result.part"
    with appears_whole(path) as unfinished:
        unfinished.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="result exists: delete it, or give another name"):
        part_path([tmp_path / "other", path])
    with pytest.raises(FileNotFoundError, match="none/a.tif: there is no folder .*none"):
        part_path([tmp_path / "none" / "a.tif"])


def test_weights_have_the_same_hash_if_they_are_the_same():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert weights_digest(one) != weights_digest(other)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other) != weights_digest(other.to(torch.bfloat16))
