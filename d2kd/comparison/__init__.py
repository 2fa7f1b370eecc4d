"""Runs side by side: rows of a table, trained over seeds, as data, table and figure."""
