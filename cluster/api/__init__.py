"""The public surfaces. Thin: they validate, translate, and hand requests to the coordinator."""
