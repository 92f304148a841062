"""midstream on many machines."""
