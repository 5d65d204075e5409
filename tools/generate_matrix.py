"""Write README.md's matrix of ops, backends, dtypes and orders from the registry.

python tools/generate_matrix.py            write it
python tools/generate_matrix.py --check    exit 1 if it is not current
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stylegan_fast import backends

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"


def dtypes(name: str) -> str:
    backend = backends.BACKENDS[name]
    listed = getattr(backend, "GPU_DTYPES", None) or backend.dtypes()
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in listed)


def cell(op: str, name: str) -> str:
    if name == "reference":
        return f"PyTorch; {dtypes(name)}; any order"
    return f"**kernels**; {dtypes(name)}; {backends.KERNEL_ORDERS[op]}"


def matrix() -> str:
    names = list(backends.BACKENDS)
    rows = [["op", *(f"`{name}`" for name in names)], ["---"] * (1 + len(names))]
    rows += [[f"`{op}`", *(cell(op, name) for name in names)] for op in backends.OPS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def updated(text: str) -> str:
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{matrix()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if stale")
    text = README.read_text()
    current = updated(text) == text
    if parser.parse_args().check:
        if not current:
            print("README.md's matrix is not current: run python tools/generate_matrix.py")
        return 0 if current else 1
    README.write_text(updated(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
