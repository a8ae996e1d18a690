"""From what somebody sends or names to an adapter's two files in a private folder."""
