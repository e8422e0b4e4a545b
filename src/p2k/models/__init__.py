"""Floor 3: small assemblies of layers for the experiments."""
