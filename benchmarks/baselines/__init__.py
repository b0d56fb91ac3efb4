"""What generation is compared with: each engine is a process of its own, maybe of another environment."""
