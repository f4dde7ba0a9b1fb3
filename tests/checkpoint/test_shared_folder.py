"""A folder that only some processes can see is refused before anything is written into it."""

import pytest

from polyaccel.checkpoint import write
from polyaccel.errors import CheckpointError


def test_a_place_that_the_main_process_has_made_and_this_one_does_not_see_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_GRACE_S", 0.1)
    attempt = write.begin_checkpoint(tmp_path / "shared" / "one")
    write.require_shared(tmp_path / "shared" / "one", attempt)
    with pytest.raises(CheckpointError, match=r"other/\.one\..*\.saving does not appear") as caught:
        write.require_shared(tmp_path / "other" / "one", attempt)
    assert "that all hosts share" in caught.value.hint
    write.abandon(tmp_path / "shared" / "one", attempt)
