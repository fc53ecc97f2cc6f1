"""Studies: the demo, the comparison, their data and reports."""
