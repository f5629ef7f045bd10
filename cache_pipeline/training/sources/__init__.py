"""Where features come from: the device's memory, a cache in pieces, or frames through the encoder."""
