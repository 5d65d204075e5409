"""What was routed to this library, what was left alone, and why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    routed: dict[str, str] = field(default_factory=dict)
    """How, by the names of modules, functions and classes."""
    left: dict[str, str] = field(default_factory=dict)
    """Why not."""

    def __str__(self) -> str:
        if not (self.routed or self.left):
            return "nothing was routed to stylegan_fast"
        parts = ((self.routed, "routed to stylegan_fast"), (self.left, "left alone"))
        lines = []
        for entries, title in parts:
            if entries:
                width = max(map(len, entries))
                lines.append(f"{title}:")
                lines += [f"  {name:<{width}}  {how}" for name, how in sorted(entries.items())]
        return "\n".join(lines)
