"""Training under `ParameterServerStrategy`: the chief's loop, the workers' steps, and what they tell each other."""
