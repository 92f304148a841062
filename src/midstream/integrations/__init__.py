"""midstream inside the trainers: a module for each, which imports that trainer when it is used."""
