"""What the import hook executes under the names of rosinality's `op` modules, and of copies of that
folder in other repositories."""
