"""What a network pickle of the originals needs to be loaded where their repository is not: executed
under the names `torch_utils.persistence`, `torch_utils.misc`, `dnnlib` and `dnnlib.util`."""
