"""How a model is trained: one step, the loops around it, and what a run writes."""
