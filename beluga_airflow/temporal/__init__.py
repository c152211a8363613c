"""Flows on Temporal: one workflow that runs any flow, one that runs a batch, and their worker."""
