"""Imports go down the list of layers only, in every module of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEAVES = (
    "_C",
    "_checks",
    "_commands",
    "_env",
    "_store",
    "_version",
    "activations",
    "backends.geometry",
    "weight_gradients",
)
"""Modules that everything may import, and that import nothing but each other."""

PACKAGE = ""
LAYERS = (
    "kernels",
    "reference",
    "backends",
    "ops",
    "layers",
    "models",
    "checkpoints",
    "training",
    "generation",
    "swap",
    PACKAGE,
    "testing",
    "benchmarks",
    "check",
    "info",
    "__main__",
)
"""From the bottom; the package's own `__init__` re-exports what is below it."""

FOLDERS = {
    PACKAGE: ROOT / "stylegan_fast",
    "kernels": ROOT / "kernels",
    "benchmarks": ROOT / "benchmarks",
}


def _modules() -> dict[str, Path]:
    """Source files by their names inside the package: `ops` is stylegan_fast/ops/__init__.py."""
    found = {}
    for prefix, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = (prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part not in ("", "__init__"))] = path
    return found


MODULES = _modules()


def imports(module: str, is_package: bool, source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of all that the source imports from the package, inside functions too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            absolute = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else None
            base = [node.module] if node.module else []
            prefix = base if above is None else ["stylegan_fast", *above, *base]
            absolute = [(".".join(filter(None, prefix)), alias.name) for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            absolute = [(node.args[0].value, "")]
        else:
            continue
        for target, name in absolute:
            if target.split(".")[0] == "stylegan_fast":
                inside = target.removeprefix("stylegan_fast").removeprefix(".")
                submodule = f"{inside}.{name}".removeprefix(".")
                if name and (submodule in MODULES or submodule in LEAVES):
                    yield submodule, ""
                else:
                    yield inside, name


def layer(module: str) -> int:
    """0 for a leaf, then the position in LAYERS; ValueError for a module that has no place."""
    return 0 if module in LEAVES else 1 + LAYERS.index(module.split(".")[0])


def violations(module: str, is_package: bool, source: str) -> list[str]:
    wrong = []
    for target, name in imports(module, is_package, source):
        if layer(target) > layer(module):
            wrong.append(f"{module or 'stylegan_fast'} imports {target or 'stylegan_fast'}")
        private = any(part.startswith("_") and part != "__version__" for part in (target, name))
        if module.startswith("benchmarks") and private and not target.startswith("benchmarks"):
            wrong.append(f"{module} imports the private {target}.{name}")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    path = MODULES[module]
    assert violations(module, path.name == "__init__.py", path.read_text()) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("reference.bias_act", "from ..ops import bias_act"),
        ("reference.bias_act", "def late():\n    from stylegan_fast.ops.bias_act import bias_act"),
        ("kernels.epilogue", "import stylegan_fast.backends.native"),
        ("kernels.epilogue", "from ..backends import select"),
        ("kernels.epilogue", "from .. import reference"),
        ("activations", "from . import ops"),
        ("backends.geometry", "from ..reference.upfirdn2d import output_size"),
        ("ops.bias_act", "from .. import __version__"),
        ("ops.bias_act", "import importlib\nimportlib.import_module('stylegan_fast.layers')"),
        ("layers", "from .models import stylegan2\nfrom ..models import stylegan2"),
        ("benchmarks.cases", "from stylegan_fast._checks import check_tensor"),
        ("benchmarks.cases", "from ..ops.bias_act import _checked_bias"),
    ],
)
def test_an_import_upwards_is_found(module, source):
    assert violations(module, module == "layers", source) != []


@pytest.mark.parametrize(
    "module, source",
    [
        ("kernels.epilogue", "import triton\nfrom ..backends.geometry import Geometry"),
        ("ops.bias_act", "import torch\nfrom ..reference import bias_act\nfrom .. import _env"),
        ("backends.native", "from stylegan_fast import _C"),
        ("benchmarks.cases", "from stylegan_fast import __version__, ops\nfrom . import _table"),
    ],
)
def test_an_import_downwards_is_allowed(module, source):
    assert violations(module, False, source) == []


def test_only_the_triton_backend_imports_the_triton_kernels():
    importers = {
        module
        for module, path in MODULES.items()
        for target, _ in imports(module, path.name == "__init__.py", path.read_text())
        if target.split(".")[0] == "kernels" != module.split(".")[0]
    }
    assert importers <= {"backends.triton"}


def test_compiled_sources_include_no_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    included = {
        header
        for path in sources
        for header in re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text())
    }
    assert "pybind11/pybind11.h" in included
    assert not {header for header in included if re.match(r"(torch|ATen|c10)/", header)}
