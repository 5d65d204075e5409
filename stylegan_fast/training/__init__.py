"""Training: data, augmentation, losses, the loop. Nothing here is imported by the package."""
