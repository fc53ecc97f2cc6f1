"""What methods do to small language models that are trained here, against retraining."""
