"""Write down the calls of a training step and runs them again on the frozen network."""
