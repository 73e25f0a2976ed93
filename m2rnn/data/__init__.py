"""Text to token files to packed batches, without knowing any model; and the folder that such work happens in."""
