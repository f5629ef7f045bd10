"""Image encoders: ResNets cut into trunk and head, encoders of the user's own, preprocessing, views, the fast path."""
