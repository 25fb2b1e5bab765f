"""Turn scores into rows, tables and figures."""
