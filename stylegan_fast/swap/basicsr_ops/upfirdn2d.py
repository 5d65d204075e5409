"""`basicsr.ops.upfirdn2d.upfirdn2d`."""

from stylegan_fast.swap.rosinality_op.upfirdn2d import upfirdn2d

__all__ = ["upfirdn2d"]
