"""The originals' argument `impl`."""

from __future__ import annotations

from ..backends import BACKENDS

_BACKENDS: dict[str | None, str | None] = {name: name for name in BACKENDS}
_BACKENDS |= {"ref": "reference", "cuda": None, None: None}


def backend_of(impl: str | None) -> str | None:
    """Our `backend` for their `impl`: 'ref' is the reference, 'cuda' the best there is."""
    try:
        return _BACKENDS[impl]
    except (KeyError, TypeError):
        raise ValueError(f"impl={impl!r} is unknown; choose 'ref' or 'cuda'") from None
