"""Requests, scheduling and the step loop over one model."""
