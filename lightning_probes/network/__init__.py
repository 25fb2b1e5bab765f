"""Turn a batch of a network into features and targets: which layers, their hooks, how activations are pooled."""
