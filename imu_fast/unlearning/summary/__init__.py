"""What is kept of a training set for the day when some of it is to be forgotten."""
