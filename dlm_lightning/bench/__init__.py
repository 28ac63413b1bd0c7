"""How fast a training step is, beside frozen baselines and an AR step, in one run."""
