"""Memory of each tier and the lanes that copy between them. Knows bytes, not tensors' meaning."""
