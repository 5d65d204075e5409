"""Triton kernels and their launchers: tensors in, tensors out; no checks, no autograd.

The directory is installed as `stylegan_fast.kernels`; only the backend `triton` imports it.
"""

if __name__ != "stylegan_fast.kernels":
    raise ImportError(
        f"this directory is the package stylegan_fast.kernels, but it was imported as {__name__!r}; "
        "run `pip install -e .` and import stylegan_fast.kernels, or, if you want the unrelated "
        "package of that name, take this repository's root off sys.path"
    )
