"""What the import hook executes under the names of NVlabs' `torch_utils.ops` modules, and of copies
of that folder in other repositories: their functions and arguments, on this library's ops."""
