"""Hold features and fit linear classifiers on them, without any knowledge of networks or Lightning."""
