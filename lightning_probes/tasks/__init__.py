"""Define what is asked of a probe, without any knowledge of layers, networks or Lightning."""
