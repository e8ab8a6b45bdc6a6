"""The modules that take the place of a model's linears."""
