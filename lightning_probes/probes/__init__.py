"""Hold features and fits linear classifiers on them; knows no network and no Lightning."""
