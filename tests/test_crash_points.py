"""A command killed at any change of the file system goes on to the very bytes, and leaves nothing behind."""

import pytest

from tools import crash_points


@pytest.mark.slow
def test_killed_at_a_dozen_changes_and_given_again(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert crash_points.trials(12) == []
