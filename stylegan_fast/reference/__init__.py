"""Plain PyTorch, any device, any order of differentiation: the oracle of every test, the fallback."""
