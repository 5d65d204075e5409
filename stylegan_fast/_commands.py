"""How the commands say in one line what the user can mend."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """The text with its control characters escaped: names in files may be hostile to terminals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refused(command: str, error: object) -> int:
    """Exit status 2, after one line on stderr."""
    line = printable(" ".join(str(error).split()))
    print(f"stylegan_fast {command}: {line}", file=sys.stderr)
    return 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for that a device or a number does not have."""
    signs = ("allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
