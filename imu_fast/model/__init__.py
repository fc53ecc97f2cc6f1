"""From a user's model and data to gradient factors."""
