"""From an adapter's files to the one algebra, against the layout of the loaded base."""
