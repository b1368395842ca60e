"""What the benchmark programs share: models, contenders, clocks, statistics and reports."""
