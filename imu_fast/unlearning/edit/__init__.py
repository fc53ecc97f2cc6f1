"""The smallest edit of the head, by a quadratic program."""
