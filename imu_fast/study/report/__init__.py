"""Tables, plots and pages of the studies."""
