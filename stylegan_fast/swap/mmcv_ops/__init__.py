"""What the import hook executes under the names of the StyleGAN modules of `mmcv.ops` 2."""
