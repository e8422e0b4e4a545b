"""Floor 0: backends, tolerances, checks, seeds and device probes. Imports torch and nothing above."""
