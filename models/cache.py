"""Where this user keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(kind: str) -> Path | None:
    """Return metaserve's folder for one kind of thing; None without a home.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/ ($XDG_CACHE_HOME)
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user without an entry, as containers have
        return None
    return cache / "metaserve" / kind
