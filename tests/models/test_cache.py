"""Where a user's cache is: the XDG base directories, and machines without a home."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.cache import user_cache


@pytest.mark.parametrize(
    ("root", "found"),
    [
        ("/var/tmp/mine", "/var/tmp/mine/metaserve/models"),
        ("", "/home/of/ada/.cache/metaserve/models"),
        ("relative/to/what", "/home/of/ada/.cache/metaserve/models"),
    ],
)
def test_it_follows_xdg_and_falls_back_to_the_home(
    monkeypatch: pytest.MonkeyPatch, root: str, found: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", root)
    monkeypatch.setenv("HOME", "/home/of/ada")
    assert user_cache("models") == Path(found)


def test_a_user_without_a_home_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache("onnxruntime") is None
