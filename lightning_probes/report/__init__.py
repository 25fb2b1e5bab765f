"""Turns scores into rows, tables and figures."""
