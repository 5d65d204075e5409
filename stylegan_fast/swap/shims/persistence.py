"""`torch_utils.persistence`: classes whose pickled instances carry the source code of their module.

To unpickle one is to execute that code.
"""

import copy
import inspect
import sys
import uuid
import warnings
from types import ModuleType

from dnnlib.util import EasyDict  # type: ignore[import-not-found]

__all__ = ["import_hook", "is_persistent", "persistent_class"]

_VERSION = 6

_hooks: list = []
_modules: dict[str, ModuleType] = {}
"""Modules by their source."""
_sources: dict[str, str] = {}
"""The source by the name of the module."""
_classes: set[type] = set()


def persistent_class(cls):
    """The class, with instances that can be unpickled where its module is not importable, and that
    know the arguments they were made with as `init_args` and `init_kwargs`."""
    if is_persistent(cls):
        return cls
    source = _source_of(sys.modules[cls.__module__])

    class Persistent(cls):  # type: ignore[misc, valid-type]
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args = copy.deepcopy(args)
            self._init_kwargs = copy.deepcopy(kwargs)

        @property
        def init_args(self):
            return copy.deepcopy(self._init_args)

        @property
        def init_kwargs(self):
            return EasyDict(copy.deepcopy(self._init_kwargs))

        def __reduce__(self):
            record = {
                "type": "class",
                "version": _VERSION,
                "module_src": source,
                "class_name": cls.__name__,
                "state": self.__getstate__() if hasattr(self, "__getstate__") else vars(self),
            }
            return _reconstruct_persistent_obj, (record,)

    Persistent.__name__ = cls.__name__
    Persistent.__doc__ = cls.__doc__
    _classes.add(Persistent)
    return Persistent


def is_persistent(obj):
    """Whether this is such a class, or an instance of one."""
    kind = obj if isinstance(obj, type) else type(obj)
    return kind in _classes


def import_hook(hook):
    """Calls hook(record) with what an instance was pickled as (attributes type, version,
    module_src, class_name, state) before it is unpickled; what it returns counts."""
    _hooks.append(hook)


def _source_of(module):
    if module.__name__ not in _sources:
        _remember(module, inspect.getsource(module))
    return _sources[module.__name__]


def _remember(module, source):
    _sources[module.__name__] = source
    _modules[source] = module


def _reconstruct_persistent_obj(meta):
    record = EasyDict(meta)
    record.state = record.get("state")
    for hook in _hooks:
        record = hook(record)
    if record.type != "class" or record.version > _VERSION:
        raise ValueError(f"a {record.type!r} of version {record.version!r} is unknown")
    kind = getattr(_module_of(record.module_src), record.class_name)
    instance = kind.__new__(kind)
    if hasattr(instance, "__setstate__"):
        instance.__setstate__(record.state)
    else:
        vars(instance).update(record.state)
    return instance


def _module_of(source):
    if source in _modules:
        return _modules[source]
    warnings.warn(
        "this network's file contains code, which is being executed; "
        "stylegan_fast.checkpoints.load_networks reads such files without executing anything",
        stacklevel=3,
    )
    module = ModuleType(f"_imported_module_{uuid.uuid4().hex}")
    sys.modules[module.__name__] = module
    _remember(module, source)
    try:
        exec(compile(source, f"<{module.__name__}>", "exec"), vars(module))
    except BaseException:
        del sys.modules[module.__name__], _sources[module.__name__], _modules[source]
        raise
    return module
