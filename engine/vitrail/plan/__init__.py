"""A tower's spec -> `plan.Plan`: the steps that compute it, and the memory they need."""
