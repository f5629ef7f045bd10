"""One module per dataset layout on disk."""
