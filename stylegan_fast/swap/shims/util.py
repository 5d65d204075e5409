"""`dnnlib.util`."""

import importlib

__all__ = ["EasyDict", "call_func_by_name", "construct_class_by_name", "get_obj_by_name"]


class EasyDict(dict):
    """A dictionary whose items are attributes, too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value

    def __delattr__(self, name):
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


def get_obj_by_name(name):
    """The object `package.module.name`."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def call_func_by_name(*args, func_name, **kwargs):
    return get_obj_by_name(func_name)(*args, **kwargs)


def construct_class_by_name(*args, class_name, **kwargs):
    return get_obj_by_name(class_name)(*args, **kwargs)
