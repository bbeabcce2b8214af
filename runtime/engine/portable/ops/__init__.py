"""The operations, filed and named as coremltools files them."""
