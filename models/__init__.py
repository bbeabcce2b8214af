"""What the networks are: pure descriptions in Core ML's MIL Builder. No weights, no files, no torch."""
