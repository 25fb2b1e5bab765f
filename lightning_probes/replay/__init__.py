"""Record the calls of a training step, and run them again on the frozen network."""
