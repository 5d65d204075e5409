"""`modulated_conv2d`, which every repository defines among its networks, and every network pickle
again: it is found when it first calls one of the replaced ops, by its name and its arguments, and
replaced in the globals of the code that called."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

import torch

from .. import ops
from . import patching, state


def stylegan3(x, w, s, demodulate=True, padding=0, input_gain=None):
    """StyleGAN3's, whose padding of two numbers is of [rows, columns]. Its result is NCHW."""
    if isinstance(padding, (list, tuple)):
        padding = list(padding)[::-1]
    if demodulate and input_gain is None:
        input_gain = 1
    return ops.modulated_conv2d(
        x.contiguous(), w, s, padding=padding, demodulate=demodulate, input_gain=input_gain
    )


def stylegan2(
    x,
    weight,
    styles,
    noise=None,
    up=1,
    down=1,
    padding=0,
    resample_filter=None,
    demodulate=True,
    flip_weight=True,
    fused_modconv=True,
):
    """StyleGAN2's, whose result is NCHW where it is fused."""
    x = x.contiguous() if fused_modconv else x
    resampling = (up, down, padding, resample_filter)
    return ops.modulated_conv2d(
        x, weight, styles, noise, *resampling, demodulate, flip_weight, fused_modconv
    )


_NAME = "modulated_conv2d"


def _arguments(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


_FORMS = {_arguments(form.__code__): form for form in (stylegan2, stylegan3)}


def called() -> None:
    """For ops to call: replaces the function that called the op, if it is a `modulated_conv2d` of
    a known form."""
    if torch.compiler.is_compiling():
        return
    frame = sys._getframe(2)
    code = frame.f_code
    if code.co_name == _NAME:
        _replace(frame.f_globals, _arguments(code))


def _replace(names: dict[str, Any], arguments: tuple[str, ...]) -> None:
    original = names.get(_NAME)
    if original is None or original in _FORMS.values() or not state.installed:
        return
    where = f"{names.get('__name__')}.{_NAME}"
    form = _FORMS.get(arguments)
    if form is None:
        state.report.left[where] = f"its arguments ({', '.join(arguments)}) are unknown"
        return
    patching.set_global(names, _NAME, form)
    patching.rebind([(original, form)])
    state.report.routed[where] = f"by the form of {form.__name__}, after its first call"
