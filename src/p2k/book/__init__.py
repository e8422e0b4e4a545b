"""Floor 5: catalogue, claims, provenance, figures, runner and the `p2k` command."""
