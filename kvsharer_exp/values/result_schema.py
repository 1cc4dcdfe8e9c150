"""The version of ``result.json``."""

from __future__ import annotations

SCHEMA = 1  # of result.json
