"""Triton kernels and their launchers: tensors in, tensors out; no checks, no autograd.

The directory is installed as `stylegan_fast.kernels`; only the backend `triton` imports it.
"""

if __name__ != "stylegan_fast.kernels":
    raise ImportError(
        f"imported as {__name__!r}, but this directory is the package stylegan_fast.kernels: "
        "install the repository (pip install -e .) and import that; if you meant the unrelated "
        "package named kernels, take the root of this repository off sys.path"
    )
