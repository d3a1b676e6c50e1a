"""The last steps before a backend: interface, opset, supported forms."""
