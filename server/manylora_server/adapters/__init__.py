"""Adapters as the running server manages them: catalogue, residency, receipts, intake."""
