"""Reports on data and runs: inspection, HTML pages, plots, the probe, the quickstart and benchmarks."""
