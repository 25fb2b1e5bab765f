"""Probe a network while it trains: from batches to points on curves."""
