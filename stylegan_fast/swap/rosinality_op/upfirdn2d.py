"""`op.upfirdn2d`."""

from stylegan_fast import ops

__all__ = ["upfirdn2d"]


def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)):
    """`ops.upfirdn2d` with pad = (before, after) of both axes, or (left, right, top, bottom)."""
    padding = tuple(pad) * 2 if len(pad) == 2 else tuple(pad)
    up = up if isinstance(up, int) else tuple(up)
    down = down if isinstance(down, int) else tuple(down)
    return ops.upfirdn2d(input, kernel, up, down, padding).contiguous()
