"""The example shop: orders from a file, steps and flows that handle them, a ledger that sees every call."""
