"""Training of the drift network with Accelerate."""
