"""Building blocks without configuration: attention, the deformable-attention op, position encodings, point sampling."""
