"""Signs of trouble in a training: a rank that hangs, one that is slow, a gradient that runs away."""
