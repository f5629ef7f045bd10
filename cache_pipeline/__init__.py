"""Train robot policies on frozen image features that are computed once and kept in a cache that can be trusted."""

__version__ = "0.1.0"
