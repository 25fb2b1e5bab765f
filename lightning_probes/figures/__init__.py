"""Draw what a report holds, from plain values: error by depth, over time, and both as a map."""
