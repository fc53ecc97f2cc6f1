"""The generalised Gauss-Newton matrix of a head, solved exactly."""
