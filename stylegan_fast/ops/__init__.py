"""The public functions: validate, choose a backend, run, with autograd. One file an op."""

from .bias_act import bias_act

__all__ = ["bias_act"]
