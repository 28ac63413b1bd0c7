"""Data: documents become packed rows once, and rows become batches with their noise."""
