"""What unlearning did: utility, depth, membership; tables, plots and reports."""
