"""Whether the hook is installed, and what it did since."""

from __future__ import annotations

from .report import Report

installed = False
pickles = False
device: str | None = None
report = Report()
