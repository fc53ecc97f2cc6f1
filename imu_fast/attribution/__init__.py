"""Which training samples a prediction owes what: gradients along training, and retraining."""
