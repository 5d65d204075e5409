"""Plain PyTorch, any device, any order of differentiation: the oracle and the fallback."""
