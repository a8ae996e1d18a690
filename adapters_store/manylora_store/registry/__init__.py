"""Which adapters there are: names, their history, and the revisions they point at, in SQL."""
